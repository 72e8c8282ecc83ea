"""The mechanism on per-sample gradients as others do it: what ours is timed beside, after its result was checked."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

Peer = Callable[[], list[Tensor]]


def eager(parts: list[Tensor], max_grad_norm: float, noise_multiplier: float) -> list[Tensor]:
    """Plain torch, written well: two readings of the gradients, float32 sums."""
    norms = [torch.linalg.vector_norm(part.flatten(1), dim=1, dtype=torch.float32) for part in parts]
    coef = (max_grad_norm / (torch.stack(norms).norm(dim=0) + 1e-6)).clamp(max=1.0)
    sums = [torch.einsum("b,b...->...", coef, part.float()) for part in parts]
    if noise_multiplier:
        sums = [s + torch.randn_like(s) * (noise_multiplier * max_grad_norm) for s in sums]
    return sums


def compiled(parts: list[Tensor], max_grad_norm: float, noise_multiplier: float) -> Peer:
    function = torch.compile(eager, dynamic=False)
    return lambda: function(parts, max_grad_norm, noise_multiplier)


def opacus(parts: list[Tensor], max_grad_norm: float, noise_multiplier: float) -> Peer | None:
    """Opacus's DPOptimizer, from `grad_sample` to the noisy sum in `p.grad`; None if it is not installed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from opacus.optimizers import DPOptimizer
    except ImportError:
        return None
    params = [torch.nn.Parameter(torch.zeros(part.shape[1:], device=part.device)) for part in parts]
    optimizer = DPOptimizer(
        torch.optim.SGD(params, lr=0.0),
        noise_multiplier=noise_multiplier,
        max_grad_norm=max_grad_norm,
        expected_batch_size=parts[0].shape[0],
    )

    def step() -> list[Tensor]:
        for param, part in zip(params, parts, strict=True):
            param.grad_sample, param.summed_grad = part.detach(), None
        optimizer.clip_and_accumulate()
        optimizer.add_noise()
        return [param.grad for param in params]

    return step


def opacus_sampler(layer: torch.nn.Module, norms: bool = False) -> Callable[[Tensor, Tensor], list[Tensor]] | None:
    """From a layer's activations and backprops, for each parameter: Opacus's per-sample gradients, or their norms."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from opacus.grad_sample import GradSampleModule
            from opacus.grad_sample.grad_sample_module_fast_gradient_clipping import (
                GradSampleModuleFastGradientClipping,
            )
    except ImportError:
        return None
    known = GradSampleModuleFastGradientClipping.NORM_SAMPLERS if norms else GradSampleModule.GRAD_SAMPLERS
    sampler = known[type(layer)]
    return lambda activations, backprops: list(sampler(layer, [activations], backprops).values())
