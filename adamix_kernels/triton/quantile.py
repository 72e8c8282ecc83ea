"""The adaptive threshold: an order statistic, found bit by bit from counts alone."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from adamix_kernels.memory import plain
from adamix_kernels.ops.quantile import rank_of
from adamix_kernels.triton.launch import config, on
from adamix_kernels.triton.norm import wide


@triton.jit
def _keys(values, at, count):
    """Unsigned integers in the order of the values; NaN last, and past the end too."""
    x = wide(tl.load(values + at, at < count, 0.0))
    if x.dtype == tl.float64:
        bits = x.to(tl.int64, bitcast=True)
        key = (bits ^ ((bits >> 63) | (tl.full([], 1, tl.int64) << 63))).to(tl.uint64, bitcast=True)
        return tl.where((x == x) & (at < count), key, 0xFFFFFFFFFFFFFFFF)  # noqa: PLR0124
    else:
        bits = x.to(tl.int32, bitcast=True)
        key = (bits ^ ((bits >> 31) | (tl.full([], 1, tl.int32) << 31))).to(tl.uint32, bitcast=True)
        return tl.where((x == x) & (at < count), key, 0xFFFFFFFF)  # noqa: PLR0124


@triton.jit
def _value(key):
    """The float64 that has this key."""
    if key.dtype == tl.uint64:
        signed = key.to(tl.int64, bitcast=True)
        bits = signed ^ (~(signed >> 63) | (tl.full([], 1, tl.int64) << 63))
        return bits.to(tl.float64, bitcast=True)
    else:
        signed = key.to(tl.int32, bitcast=True)
        bits = signed ^ (~(signed >> 31) | (tl.full([], 1, tl.int32) << 31))
        return bits.to(tl.float32, bitcast=True).to(tl.float64)


@triton.jit(do_not_specialize=["count", "rank"], do_not_specialize_on_alignment=["values"])
def order_statistic(values, out, count, rank, WIDTH: tl.constexpr, RESIDENT: tl.constexpr):
    """The root of the largest key that fewer than `rank` keys are below: the rank-th smallest."""
    lane = tl.arange(0, WIDTH)
    keys = _keys(values, lane.to(tl.int64), count)
    one = tl.full([], 1, keys.dtype)
    found = one - one
    bit = one << (keys.dtype.primitive_bitwidth - 1)
    for _ in range(keys.dtype.primitive_bitwidth):
        candidate = found | bit
        if RESIDENT:
            below = tl.sum((keys < candidate).to(tl.int32)).to(tl.int64)
        else:
            below = tl.full([], 0, tl.int64)
            for start in range(0, count, WIDTH):
                more = _keys(values, start + lane.to(tl.int64), count)
                below += tl.sum((more < candidate).to(tl.int32)).to(tl.int64)
        found = tl.where(below < rank, candidate, found)
        bit = bit >> 1
    tl.store(out, tl.sqrt(_value(found)).to(tl.float32))


def norm_quantile(norm_sq: Tensor, q: float) -> Tensor:
    values, count = plain(norm_sq), norm_sq.numel()
    sizes = config(norm_sq.device)
    out = torch.empty((), dtype=torch.float32, device=norm_sq.device)
    width = sizes.quantile_width // 16 if count <= sizes.quantile_width // 16 else sizes.quantile_width
    with on(norm_sq.device):
        order_statistic[(1,)](
            values, out, count, rank_of(count, q),
            WIDTH=width, RESIDENT=count <= width, num_warps=sizes.quantile_warps, num_stages=1,
        )  # fmt: skip
    return out
