"""Attaches the Triton kernels as the backend "triton". Triton itself is imported by the first call.

With `TRITON_INTERPRET=1` in the environment the kernels run on CPU tensors, slowly: that is for tests.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from adamix_kernels import native
from adamix_kernels.ops._numerics import as_list
from adamix_kernels.ops.clip import clip_coef, clip_sum, clip_sum_noise
from adamix_kernels.ops.noise import Noise, add_gaussian_noise_
from adamix_kernels.ops.norm import grad_norm_sq
from adamix_kernels.ops.quantile import norm_quantile
from adamix_kernels.triton.launch import interpreting


@functools.cache
def unavailable() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    return None if interpreting() or torch.cuda.is_available() else "torch finds no GPU"


@functools.cache
def _too_old(device: torch.device) -> str | None:
    if device.type != "cuda" or torch.version.hip or torch.cuda.get_device_capability(device) >= (8, 0):
        return None
    return f"{device} is older than compute capability 8.0"


def _no_memory(*given: Any) -> str | None:
    tensors = [x for x in given if isinstance(x, Tensor)]
    first = tensors[0].device
    for x in tensors:
        if x.device != first:
            return f"tensors are on {first} and {x.device}"
    return native._no_memory(tensors, "cpu" if interpreting() else "cuda") or _too_old(first)


def _no_noise(tensor: Any, std: float | Tensor, noise: Noise) -> str | None:
    parts = as_list(tensor)
    if torch.is_grad_enabled() and any(part.requires_grad for part in parts):
        return "a tensor requires grad; add noise under torch.no_grad()"
    return _no_memory(*parts, std) or _overlap(parts)


def _overlap(parts: Sequence[Tensor]) -> str | None:
    """One launch writes all parts, in no order."""
    if len(parts) > 1:
        spans = sorted((x.data_ptr(), x.data_ptr() + _extent(x) * x.element_size()) for x in parts if x.numel())
        if any(right[0] < left[1] for left, right in itertools.pairwise(spans)):
            return "tensors of the list share memory or lie in one another's gaps"
    return None


def _extent(x: Tensor) -> int:
    return 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))


def _attach(op: Any, module: str, refuses: Callable[..., str | None]) -> None:
    """`adamix_kernels.triton.<module>` has a function of the op's name."""

    @functools.cache
    def kernel() -> Callable[..., Any]:
        return getattr(importlib.import_module(f"adamix_kernels.triton.{module}"), op.name)

    @op.register("triton", unavailable=unavailable, refuses=refuses)
    def run(**arguments: Any) -> Any:
        return kernel()(**arguments)


_attach(grad_norm_sq, "norm", lambda grad_sample: _no_memory(*as_list(grad_sample)))
_attach(clip_coef, "norm", lambda **given: _no_memory(*given.values()))
_attach(clip_sum, "clip", lambda grad_sample, coef: _no_memory(*as_list(grad_sample), coef))
_attach(
    clip_sum_noise,
    "clip",
    lambda grad_sample, max_grad_norm, **_: _no_memory(*as_list(grad_sample), max_grad_norm),
)
_attach(add_gaussian_noise_, "noise", _no_noise)
_attach(norm_quantile, "quantile", lambda **given: _no_memory(*given.values()))
