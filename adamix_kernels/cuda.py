"""Attaches the CUDA kernels as the backend "cuda".

Nothing here waits for the device: a threshold in device memory is read there.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from ctypes import CDLL
from typing import Any

import torch
from torch import Tensor

from adamix_kernels.cuda_library import DTYPES, Call, Drawn, List, Number, Plan, number, refused, unavailable
from adamix_kernels.device_lists import Group, groups, results
from adamix_kernels.memory import not_writable, overlap, plain
from adamix_kernels.ops._numerics import as_list
from adamix_kernels.ops.clip import ClippedSum, clip_coef, clip_sum, clip_sum_noise
from adamix_kernels.ops.noise import Noise, add_gaussian_noise_
from adamix_kernels.ops.norm import grad_norm_sq
from adamix_kernels.ops.quantile import norm_quantile, rank_of

_BLOCK = 1024  # columns of a block of a list: kBlock in csrc/cuda/common.cuh
_WARPS = 128  # that should share the reading of norms, per multiprocessor: two turns of all it can hold
_MOST_SLICES = 4096  # of a row, that one warp adds in the end


def _rows(grad_sample: Tensor | Sequence[Tensor]) -> list[Tensor]:
    return [plain(part) for part in as_list(grad_sample)]


def _list(group: Group, rows: int) -> List:
    return List(group.table.data_ptr(), group.blocks.data_ptr(), len(group.blocks), rows)


def _columns(parts: Sequence[Tensor]) -> float:
    return float(sum(math.prod(part.shape[1:]) for part in parts))


def _norms(call: Call, parts: Sequence[Tensor], found: Sequence[Group], out: Tensor) -> None:
    """Rows are cut so that there is work for all warps, while the partial sums take no more memory than a sum."""
    rows = len(out)
    if not rows:
        return
    wanted = min(_MOST_SLICES, -(-call.multiprocessors() * _WARPS // rows))
    slices = [max(1, min(wanted, len(group.blocks), group.size // (2 * rows))) for group in found]
    total, terms, first = sum(slices), _columns(parts), 0
    whole = total == 1
    partials = None if whole else call.empty(rows, total, dtype=torch.float64)
    for group, count in zip(found, slices, strict=True):
        call(
            "partial_norms",
            DTYPES[group.dtype],
            _list(group, rows),
            count,
            first,
            total,
            partials.data_ptr() if partials is not None else None,
            terms,
            out.data_ptr() if whole else None,
        )
        first += count
    if partials is not None:
        narrow = any(group.dtype != torch.float64 for group in found)
        call("finish_norms", partials.data_ptr(), rows, total, terms, narrow, out.data_ptr())


def _empty_sums(call: Call, group: Group) -> Tensor:
    return call.empty(group.size, dtype=torch.float64 if group.dtype == torch.float64 else torch.float32)


def _shaped(grad_sample: Any, parts: Sequence[Tensor], found: Sequence[Group], flat: Sequence[Tensor]) -> Any:
    """Views of the groups' flat sums, in the order of the list."""
    sums: list[Any] = [None] * len(parts)
    for group, whole in zip(found, flat, strict=True):
        for member, view in zip(group.members, results(parts, group, whole), strict=True):
            sums[member] = view
    return sums[0] if isinstance(grad_sample, Tensor) else sums


def _sums(
    call: Call,
    found: Sequence[Group],
    rows: int,
    norm_sq: Tensor | None,
    given: Tensor | None,
    limit: Number,
    noise: Drawn,
) -> list[Tensor]:
    flat = [_empty_sums(call, group) for group in found]
    few = 8 * call.multiprocessors()
    for group, out in zip(found, flat, strict=True):
        chunks = len(group.blocks) * 2 * group.dtype.itemsize  # that a warp takes: 512 bytes of a row
        call(
            "clip_sum",
            DTYPES[group.dtype],
            _list(group, rows),
            norm_sq.data_ptr() if norm_sq is not None else None,
            given.data_ptr() if given is not None else None,
            limit,
            noise,
            chunks < few and rows >= 64,
            out.data_ptr(),
        )
    return flat


@grad_norm_sq.register(
    "cuda", device="cuda", unavailable=unavailable, refuses=lambda grad_sample: refused(*as_list(grad_sample))
)
def _grad_norm_sq(grad_sample: Tensor | Sequence[Tensor]) -> Tensor:
    parts = _rows(grad_sample)
    call = Call("grad_norm_sq", parts[0].device)
    out = call.empty(parts[0].shape[0])
    _norms(call, parts, groups(parts, _BLOCK), out)
    return out


def _numbers(values: Tensor) -> Tensor:
    """As float32 or float64, contiguous."""
    return plain(values if values.dtype == torch.float64 else values.float())


@clip_coef.register(
    "cuda",
    device="cuda",
    unavailable=unavailable,
    refuses=lambda **given: refused(*given.values()),
)
def _clip_coef(norm_sq: Tensor, max_grad_norm: float | Tensor) -> Tensor:
    call, values = Call("clip_coef", norm_sq.device), _numbers(norm_sq)
    limit, _memory = number(max_grad_norm)
    out = call.empty(len(values))
    call("clip_factors", DTYPES[values.dtype], values.data_ptr(), len(values), limit, out.data_ptr())
    return out


@clip_sum.register(
    "cuda",
    device="cuda",
    unavailable=unavailable,
    refuses=lambda grad_sample, coef: refused(*as_list(grad_sample), coef),
)
def _clip_sum(grad_sample: Tensor | Sequence[Tensor], coef: Tensor) -> Any:
    parts, factors = _rows(grad_sample), plain(coef.double())
    call, found = Call("clip_sum", parts[0].device), groups(parts, _BLOCK)
    flat = _sums(call, found, len(factors), None, factors, Number(), Drawn())
    return _shaped(grad_sample, parts, found, flat)


@functools.lru_cache(maxsize=256)
def _plan(index: int, dtype: int, blocks: int, rows: int, library: CDLL) -> Plan:
    plan = Plan()
    error = library.adamix_clip_sum_plan(index, dtype, blocks, rows, plan)
    if error:  # not kept: the next call may find memory
        raise RuntimeError(f"clip_sum_noise: CUDA error: {library.adamix_error(error).decode()}")
    return plan


@clip_sum_noise.register(
    "cuda",
    device="cuda",
    unavailable=unavailable,
    refuses=lambda grad_sample, max_grad_norm, **_: refused(*as_list(grad_sample), max_grad_norm),
)
def _clip_sum_noise(
    grad_sample: Tensor | Sequence[Tensor],
    max_grad_norm: float | Tensor,
    noise_multiplier: float = 0.0,
    noise: Noise | None = None,
    resident: bool = True,
) -> ClippedSum:
    """With `resident` the gradients are read once where they can be: of one dtype, and no more columns than fit."""
    parts = _rows(grad_sample)
    rows, found = parts[0].shape[0], groups(parts, _BLOCK)
    call = Call("clip_sum_noise", parts[0].device)
    norm_sq = call.empty(rows)
    limit, _memory = number(max_grad_norm)
    drawn = call.noise(noise, noise_multiplier, limit)
    if resident and len(found) == 1:
        group, dtype = found[0], DTYPES[found[0].dtype]
        plan = _plan(call.index, dtype, len(group.blocks), rows, call.lib)
        if plan.grid:
            flat, scratch = _empty_sums(call, group), call.empty(plan.scratch, dtype=torch.float64)
            terms, at = _columns(parts), (scratch.data_ptr(), norm_sq.data_ptr(), flat.data_ptr())
            call("clip_sum_resident", dtype, _list(group, rows), plan, limit, drawn, terms, *at)
            return ClippedSum(_shaped(grad_sample, parts, found, [flat]), norm_sq)
    _norms(call, parts, found, norm_sq)
    sums = _sums(call, found, rows, norm_sq, None, limit, drawn)
    return ClippedSum(_shaped(grad_sample, parts, found, sums), norm_sq)


@add_gaussian_noise_.register(
    "cuda",
    device="cuda",
    unavailable=unavailable,
    refuses=lambda tensor, std, **_: not_writable(tensor) or refused(*as_list(tensor), std) or overlap(tensor),
)
def _add_gaussian_noise_(tensor: Any, std: float | Tensor, noise: Noise, offsets: Sequence[int] | None = None) -> Any:
    parts = as_list(tensor)
    flat = _rows(parts)
    call = Call("add_gaussian_noise_", flat[0].device)
    unit, _memory = number(std)
    drawn = call.noise(noise, 1.0, unit)
    for group in groups([part.view(1, part.numel()) for part in flat], _BLOCK, offsets=offsets):
        call("add_noise", DTYPES[group.dtype], _list(group, 1), drawn)
    with torch.no_grad():
        for part, noisy in zip(parts, flat, strict=True):
            if noisy is part:
                torch.autograd.graph.increment_version(part)  # it was written behind torch's back
            else:
                part.copy_(noisy)
    return tensor


@norm_quantile.register(
    "cuda", device="cuda", unavailable=unavailable, refuses=lambda **given: refused(*given.values())
)
def _norm_quantile(norm_sq: Tensor, q: float) -> Tensor:
    call, values = Call("norm_quantile", norm_sq.device), _numbers(norm_sq)
    out = call.empty()
    count = len(values)
    call("norm_quantile", DTYPES[values.dtype], values.data_ptr(), count, rank_of(count, q), out.data_ptr())
    return out
