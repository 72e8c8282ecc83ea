"""Loads the compiled CPU kernels on first use and attaches them as the backend "cpp"."""

from __future__ import annotations

import functools
import importlib.util
import math
import warnings
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from adamix_kernels.ops._numerics import as_list
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


def _no_memory(grad_sample: Tensor | Sequence[Tensor]) -> str | None:
    """Kernels read memory by its address: tensors without any, or that only stand for others, are not for them."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return "tensor operations are being traced or replaced here; this backend runs outside of them"
    for part in as_list(grad_sample):
        if part.device.type != "cpu":
            return f"grad_sample is on {part.device}; this backend takes CPU tensors"
        if type(part) not in (Tensor, torch.nn.Parameter):
            return f"grad_sample is a {type(part).__name__}; this backend takes plain tensors"
        if torch._C._functorch.is_functorch_wrapped_tensor(part) or part._is_zerotensor():
            return "grad_sample is inside a torch.func transform or has no storage; this backend takes plain tensors"
    return None


@grad_norm_sq.register("cpp", unavailable=unavailable, refuses=_no_memory)
def _grad_norm_sq(grad_sample: Tensor | Sequence[Tensor]) -> Tensor:
    module = load()
    assert isinstance(module, ModuleType)  # dispatch has asked `unavailable`
    parts = [part.detach().contiguous() for part in as_list(grad_sample)]
    out = torch.empty(parts[0].shape[0], dtype=torch.float32, device="cpu")  # whatever the default device
    described = [
        (p.data_ptr(), math.prod(p.shape[1:]), getattr(module.DType, str(p.dtype).removeprefix("torch.")))
        for p in parts
    ]
    module.grad_norm_sq(described, len(out), out.data_ptr(), torch.get_num_threads())
    return out
