"""What kernels that are handed addresses need to know of tensors: whether there is memory, and whose."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from adamix_kernels.ops._numerics import as_list

_PLAIN = {Tensor, torch.nn.Parameter}


def plain(x: Tensor) -> Tensor:
    """`x` as memory that holds its values in order: itself, or a copy."""
    return x if x.is_contiguous() and not x.is_neg() else x.resolve_neg().contiguous()


def scalar(x: Tensor) -> Tensor:
    """A number on the device as float64 in memory of its own: not that of a tensor a kernel is about to write."""
    return x.detach().resolve_neg().to(torch.float64, copy=True)


def capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured on the current stream of `device`, which need not be the current one."""
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


def none_behind(tensors: Sequence[Any], device: str) -> str | None:
    """Why there is no memory of a `device` behind some of these; what is no tensor is passed over.

    Tensors that only stand for others, or are being traced, are not for kernels.
    """
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() or torch._C._len_torch_dispatch_stack():
        return "tensor operations are being traced or replaced here; this backend runs outside of them"
    first = None
    for part in tensors:
        if not isinstance(part, Tensor):
            continue
        place = part.device
        if place != first:
            if place.type != device:
                return f"a tensor is on {place}; this backend takes {device.upper()} tensors"
            if first is not None:
                return f"tensors are on {first} and {place}"
            first = place
        if type(part) not in _PLAIN:
            return f"a tensor is a {type(part).__name__}; this backend takes plain tensors"
        if torch._C._functorch.is_functorch_wrapped_tensor(part) or part._is_zerotensor():
            return "a tensor is inside a torch.func transform or has no storage; this backend takes plain tensors"
    return _too_old(first) if first is not None and device == "cuda" else None


def not_writable(tensor: Any) -> str | None:
    """Why a tensor or list may not be written in place behind autograd's back."""
    if torch.is_grad_enabled() and any(part.requires_grad for part in as_list(tensor)):
        return "a tensor requires grad; add noise under torch.no_grad()"
    return None


def overlap(tensor: Any) -> str | None:
    """Why one launch, which writes a list in no order, cannot take it: where two share memory, one's noise is lost."""
    spans = []
    for part in as_list(tensor):
        if part.numel():
            last = sum((size - 1) * stride for size, stride in zip(part.shape, part.stride(), strict=True))
            spans.append((part.data_ptr(), part.data_ptr() + (last + 1) * part.element_size()))
    spans.sort()
    if any(second[0] < first[1] for first, second in itertools.pairwise(spans)):
        return "tensors of the list share memory or lie in one another's gaps; this backend writes them all at once"
    return None


@functools.cache
def _too_old(device: torch.device) -> str | None:
    if device.type != "cuda" or torch.version.hip or torch.cuda.get_device_capability(device) >= (8, 0):
        return None
    return f"{torch.cuda.get_device_name(device)} is older than compute capability 8.0"
