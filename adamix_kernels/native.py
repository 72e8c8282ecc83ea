"""Loads the compiled CPU kernels on first use and attaches them as the backend "cpp"."""

from __future__ import annotations

import functools
import importlib.util
import math
import warnings
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from adamix_kernels.ops._numerics import as_list, sum_dtype
from adamix_kernels.ops.clip import clip_sum
from adamix_kernels.ops.noise import Noise, add_gaussian_noise_
from adamix_kernels.ops.norm import grad_norm_sq


@functools.cache
def load() -> ModuleType | str:
    """The compiled module, or why there is none. A module that is there but broken warns, once."""
    if importlib.util.find_spec("adamix_kernels._cpu") is None:
        return "the compiled CPU kernels were not built; install again with a C++17 compiler at hand"
    try:
        from adamix_kernels import _cpu  # type: ignore[attr-defined]
    except ImportError as error:
        reason = f"the compiled CPU kernels do not load: {error}; install again to rebuild them"
        warnings.warn(f"adamix_kernels: {reason}. Falling back to torch.", RuntimeWarning, stacklevel=2)
        return reason
    return _cpu


def unavailable() -> str | None:
    module = load()
    return module if isinstance(module, str) else None


def _no_memory(tensors: Sequence[Tensor], device: str = "cpu") -> str | None:
    """Kernels read memory by its address: tensors without any, or that only stand for others, are not for them."""
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() or torch._C._len_torch_dispatch_stack():
        return "tensor operations are being traced or replaced here; this backend runs outside of them"
    for part in tensors:
        if part.device.type != device:
            return f"a tensor is on {part.device}; this backend takes {device.upper()} tensors"
        if type(part) not in (Tensor, torch.nn.Parameter):
            return f"a tensor is a {type(part).__name__}; this backend takes plain tensors"
        if torch._C._functorch.is_functorch_wrapped_tensor(part) or part._is_zerotensor():
            return "a tensor is inside a torch.func transform or has no storage; this backend takes plain tensors"
    return None


def _module() -> ModuleType:
    module = load()
    assert isinstance(module, ModuleType)  # dispatch has asked `unavailable`
    return module


def _described(x: Tensor, elements: int) -> tuple[int, int, Any]:
    return x.data_ptr(), elements, getattr(_module().DType, str(x.dtype).removeprefix("torch."))


@grad_norm_sq.register("cpp", unavailable=unavailable, refuses=lambda grad_sample: _no_memory(as_list(grad_sample)))
def _grad_norm_sq(grad_sample: Tensor | Sequence[Tensor]) -> Tensor:
    parts = [part.detach().contiguous() for part in as_list(grad_sample)]
    out = torch.empty(parts[0].shape[0], dtype=torch.float32, device="cpu")  # whatever the default device
    described = [_described(p, math.prod(p.shape[1:])) for p in parts]
    _module().grad_norm_sq(described, len(out), out.data_ptr(), torch.get_num_threads())
    return out


@clip_sum.register(
    "cpp",
    unavailable=unavailable,
    refuses=lambda grad_sample, coef: _no_memory([*as_list(grad_sample), coef]),
)
def _clip_sum(grad_sample: Tensor | Sequence[Tensor], coef: Tensor) -> Any:
    factors = coef.detach().double().contiguous()
    sums = []
    for part in as_list(grad_sample):
        rows = part.detach().contiguous()
        out = torch.empty(rows.shape[1:], dtype=sum_dtype(rows), device="cpu")
        data, cols, dtype = _described(rows, out.numel())
        _module().clip_sum(data, dtype, len(factors), cols, factors.data_ptr(), out.data_ptr(), torch.get_num_threads())
        sums.append(out)
    return sums[0] if isinstance(grad_sample, Tensor) else sums


def _no_noise(tensor: Any, std: float | Tensor, noise: Noise) -> str | None:
    parts = as_list(tensor)
    if torch.is_grad_enabled() and any(part.requires_grad for part in parts):
        return "a tensor requires grad; add noise under torch.no_grad()"
    return _no_memory([*parts, std] if isinstance(std, Tensor) else parts)


@add_gaussian_noise_.register("cpp", unavailable=unavailable, refuses=_no_noise)
def _add_gaussian_noise_(tensor: Any, std: float | Tensor, noise: Noise) -> Any:
    draw, offset = noise.next_draw(), 0
    for part in as_list(tensor):
        with torch.no_grad():
            flat = (part if part.dtype == torch.float64 else part.float()).contiguous()
            data, count, dtype = _described(flat, flat.numel())
            _module().add_gaussian_noise(
                data, dtype, count, float(std), noise._key, draw, offset, torch.get_num_threads()
            )
            if flat is not part:
                part.copy_(flat)
            torch.autograd.graph.increment_version(part)  # it was written behind torch's back
        offset += part.numel()
    return tensor
