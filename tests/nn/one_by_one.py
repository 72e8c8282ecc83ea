"""What a private step must be: ordinary gradients of one sample at a time."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from adamix_kernels.nn import DPEngine

SEED = 5
STRATEGIES = ("auto", "book_keeping", "per_layer", "materialize", "two_pass")
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
NORM_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4}  # norms are float32, rounded up


def losses(out: Any) -> Tensor:
    """`[B]`: of every entry of every output `[B, *]`, each with a gradient of its own."""
    total: Any = 0
    for x in tree_leaves(out):
        if isinstance(x, Tensor):
            total = total + (x * torch.linspace(-1, 2, x[:1].numel(), dtype=x.dtype).view_as(x[:1])).flatten(1).sum(1)
    return total


def gradients(model: nn.Module, inputs: Sequence[Tensor], call: Callable[..., Any]) -> list[dict[str, Tensor]]:
    found = []
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for b in range(len(inputs[0])):
        loss = losses(call(model, *(x[b : b + 1] for x in inputs))).sum()
        grads = torch.autograd.grad(loss, list(trained.values()), allow_unused=True, materialize_grads=True)
        found.append(dict(zip(trained, grads, strict=True)))
    return found


def plain_call(model: nn.Module, *inputs: Tensor) -> Any:
    return model(*inputs)


def check(
    model: nn.Module, inputs: Sequence[Tensor], call: Callable[..., Any] = plain_call, strategies: Any = STRATEGIES
) -> None:
    """Outputs, norms and clipped sums of a model with dimension 0 for samples in each input."""
    reference = copy.deepcopy(model)
    torch.manual_seed(SEED)
    expected_out = call(reference, *inputs)
    grads = gradients(reference, inputs, call)
    squares = [sum(float(g.double().square().sum()) for g in of_one.values()) for of_one in grads]
    norms = torch.tensor(squares, dtype=torch.float64).sqrt()
    for strategy, threshold in itertools.product(strategies, (float(norms.median()), 1e3 * float(norms.max()) + 1)):
        dtype = next(model.parameters()).dtype
        clips = threshold <= norms.max()
        tolerance = NORM_TOLERANCE[dtype] if clips else TOLERANCE[dtype]
        close = {"rtol": tolerance, "atol": tolerance * float(norms.max())}
        private = copy.deepcopy(model)
        optimizer = torch.optim.SGD(private.parameters(), lr=0.0)
        dp = DPEngine(
            private,
            optimizer,
            max_grad_norm=threshold,
            noise_multiplier=0.0,
            expected_batch_size=3.0,
            strategy=strategy,
            loss_reduction="sum",
        )
        torch.manual_seed(SEED)
        out = call(private, *inputs)
        small = 1e-10 if dtype == torch.float64 else 1e-5
        torch.testing.assert_close(out, expected_out, rtol=small, atol=small)
        dp.backward(losses(out).sum())
        torch.testing.assert_close(dp._sums.norm_sq[0].double().sqrt(), norms, rtol=NORM_TOLERANCE[dtype], atol=1e-15)
        optimizer.step()
        layers = sorted({dp.layers[name] for name in grads[0]}) if strategy == "per_layer" else [None]
        for layer in layers:
            limit = threshold / len(layers) ** 0.5
            names = [name for name in grads[0] if layer in (None, dp.layers[name])]
            sums = {name: torch.zeros_like(grads[0][name]) for name in names}
            for of_one in grads:
                norm = sum(float(of_one[name].double().square().sum()) for name in names) ** 0.5
                for name in names:
                    sums[name] += of_one[name] * min(1.0, limit / max(norm, 1e-30))
            for name in names:
                got = private.get_parameter(name).grad
                torch.testing.assert_close(got.data * 3, sums[name], **close, msg=lambda m, n=name: f"{n}: {m}")
        total = sum(float(p.grad.double().square().sum()) for p in private.parameters() if p.grad is not None)
        assert total**0.5 * 3 <= len(inputs[0]) * threshold * (1 + 1e-6)
