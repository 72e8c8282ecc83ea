"""Squared norms of stored per-sample gradients, rounded up, and the factors that clip them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from adamix_kernels.device_lists import Group, groups
from adamix_kernels.memory import plain
from adamix_kernels.triton._random import double as joined
from adamix_kernels.triton.launch import config, double, on, scaled

# The bound. Float32 squares of narrower inputs, at most four in a float32 sum: five roundings (products, additions),
# so the sum of n of them is low by less than 5 2^-24 of itself and by 2^-149 for each square that underflows. The
# additions in float64, in whatever order, and those of the bound itself: by less than (n + 1) 2^-52.


@triton.jit
def round_up(total):
    """Float32 of a float64 bound: not below it, nor below the smallest normal number; Inf beyond range and for NaN."""
    y = total.to(tl.float32)
    above = (y.to(tl.int32, bitcast=True) + 1).to(tl.float32, bitcast=True)
    y = tl.where(y.to(tl.float64) < total, above, y)
    y = tl.where(total <= 3.4028234663852886e38, y, float("inf"))
    return tl.where(total <= 1.1754943508222875e-38, 1.1754943508222875e-38, y)


@triton.jit
def coefficient(norm_sq, threshold):
    """Float32 `min(1, threshold / norm)`, rounded down; 0 for NaN, an infinite norm, and below the smallest normal."""
    c = threshold / tl.sqrt(norm_sq)
    c = tl.where(c > 1.0, 1.0, c)
    y = c.to(tl.float32)
    below = (y.to(tl.int32, bitcast=True) - 1).to(tl.float32, bitcast=True)
    y = tl.where(y.to(tl.float64) > c, below, y)
    return tl.where(c >= 1.1754943508222875e-38, y, 0.0)  # an infinite norm made c 0, or NaN


@triton.jit
def scale(factor, low, high):
    """A host's number, times one on the device if its address is given."""
    value = joined(low, high)
    if factor is not None:
        value *= tl.load(factor)
    return value


@triton.jit
def aligned(address, cols, first, DTYPE: tl.constexpr):
    """Whether every row can be read 16 bytes at a time, from column `first` on."""
    return (address | ((cols | first) * (DTYPE.primitive_bitwidth // 8))) % 16 == 0


@triton.jit
def view(address, cols, first, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """The pointer to column `first` and the number of columns; if `aligned`, in a form that tells the compiler so."""
    data = address.to(tl.pointer_type(DTYPE))
    if ALIGNED:
        per: tl.constexpr = 128 // DTYPE.primitive_bitwidth
        data, cols, first = tl.multiple_of(data, 16), cols // per * per, first // per * per
    return data + first, cols


@triton.jit
def columns(cols, first, WIDTH: tl.constexpr):
    """Which of the WIDTH columns from `first` on there are, from .. to. In 32 bits, like the offsets of the lanes."""
    return tl.maximum(-first, 0).to(tl.int32), tl.minimum(cols - first, WIDTH).to(tl.int32)


@triton.jit
def wide(x):
    """In the type that squares are made in."""
    return x if x.dtype == tl.float64 else x.to(tl.float32)


@triton.jit
def _squares(address, cols, first, row, rows, DTYPE: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr,
             ALIGNED: tl.constexpr):  # fmt: skip
    """Float64 `[R]`: the sum of squares of BLOCK columns of each row."""
    data, cols = view(address, cols, first, DTYPE, ALIGNED)
    _, stop = columns(cols, first, BLOCK)
    if ALIGNED:
        stop = stop // (128 // DTYPE.primitive_bitwidth) * (128 // DTYPE.primitive_bitwidth)
    base = data + row[:, None] * cols
    inside = (row < rows)[:, None]
    total = tl.zeros([row.shape[0], WIDTH], tl.float64)
    lane = tl.arange(0, WIDTH)[None, :]
    for start in range(0, stop, 4 * WIDTH):
        col = start + lane
        x0 = wide(tl.load(base + col, inside & (col < stop), 0.0))
        x1 = wide(tl.load(base + (col + WIDTH), inside & (col + WIDTH < stop), 0.0))
        x2 = wide(tl.load(base + (col + 2 * WIDTH), inside & (col + 2 * WIDTH < stop), 0.0))
        x3 = wide(tl.load(base + (col + 3 * WIDTH), inside & (col + 3 * WIDTH < stop), 0.0))
        total += (x0 * x0 + x1 * x1 + x2 * x2 + x3 * x3).to(tl.float64)
    return tl.sum(total, axis=1)


@triton.jit
def _finish(total, row, rows, norm_sq, coef, factor, growth, floor, low, high):
    bound = round_up(total * growth + floor)
    tl.store(norm_sq + row, bound, row < rows)
    if coef is not None:
        tl.store(coef + row, coefficient(bound.to(tl.float64), scale(factor, low, high)), row < rows)


@triton.jit(
    do_not_specialize=[
        "entries", "per", "parts", "stride", "column", "rows", "growth0", "growth1", "floor0", "floor1", "low", "high"
    ],
    do_not_specialize_on_alignment=["factor"],
)  # fmt: skip
def partial_norms(
    table, blocks, partials, norm_sq, coef, factor, entries, per, parts, stride, column, rows,
    growth0, growth1, floor0, floor1, low, high,
    DTYPE: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Rows of one chunk, `per` entries of the table: into `partials [rows, stride]`, or if that is None, finished."""
    program = tl.program_id(0)
    part = program % parts
    row = (program // parts).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    total = tl.zeros([ROWS], tl.float64)
    for entry in range(part * per, tl.minimum(part * per + per, entries)):
        tensor = table + 4 * tl.load(blocks + 2 * entry)
        first = tl.load(blocks + 2 * entry + 1).to(tl.int64) * BLOCK
        address, cols = tl.load(tensor), tl.load(tensor + 1)
        if aligned(address, cols, first, DTYPE):
            total += _squares(address, cols, first, row, rows, DTYPE, BLOCK, WIDTH, True)
        else:
            total += _squares(address, cols, first, row, rows, DTYPE, BLOCK, WIDTH, False)
    if partials is not None:
        tl.store(partials + row * stride + column + part, total, row < rows)
    else:
        growth, floor = joined(growth0, growth1), joined(floor0, floor1)
        _finish(total, row, rows, norm_sq, coef, factor, growth, floor, low, high)


@triton.jit(
    do_not_specialize=["stride", "rows", "growth0", "growth1", "floor0", "floor1", "low", "high"],
    do_not_specialize_on_alignment=["factor"],
)
def finish_norms(
    partials, norm_sq, coef, factor, stride, rows, growth0, growth1, floor0, floor1, low, high,
    ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Add the partial sums of each row, in a fixed order."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    total = tl.zeros([ROWS, WIDTH], tl.float64)
    for start in range(0, stride, WIDTH):
        column = start + tl.arange(0, WIDTH)
        mask = (row < rows)[:, None] & (column < stride)[None, :]
        total += tl.load(partials + row[:, None] * stride + column[None, :], mask, 0.0)
    growth, floor = joined(growth0, growth1), joined(floor0, floor1)
    _finish(tl.sum(total, axis=1), row, rows, norm_sq, coef, factor, growth, floor, low, high)


@triton.jit(do_not_specialize=["rows", "low", "high"], do_not_specialize_on_alignment=["norm_sq", "factor"])
def coefficients(norm_sq, coef, factor, rows, low, high, WIDTH: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * WIDTH + tl.arange(0, WIDTH)
    n = wide(tl.load(norm_sq + row, row < rows, 1.0)).to(tl.float64)
    tl.store(coef + row, coefficient(n, scale(factor, low, high)), row < rows)


def grad_norm_sq(grad_sample: Tensor | Sequence[Tensor]) -> Tensor:
    parts = [grad_sample] if isinstance(grad_sample, Tensor) else grad_sample
    return norms([plain(part) for part in parts], None)[0]


def clip_coef(norm_sq: Tensor, max_grad_norm: float | Tensor) -> Tensor:
    sizes, values, rows = config(norm_sq.device), plain(norm_sq), norm_sq.numel()
    coef = torch.empty(rows, dtype=torch.float32, device=norm_sq.device)
    factor, number = scaled(1.0, max_grad_norm)
    if rows:
        with on(norm_sq.device):
            grid = (triton.cdiv(rows, sizes.finish_tile),)
            coefficients[grid](
                values, coef, factor, rows, *number, WIDTH=sizes.finish_tile, **sizes.options(sizes.finish_warps)
            )
    return coef


def norms(parts: Sequence[Tensor], max_grad_norm: float | Tensor | None) -> tuple[Tensor, Tensor | None]:
    """`norm_sq [B]` of contiguous tensors and, with a threshold, `coef [B]`."""
    rows, device = parts[0].shape[0], parts[0].device
    sizes = config(device)
    norm_sq = torch.empty(rows, dtype=torch.float32, device=device)
    coef = None if max_grad_norm is None else torch.empty_like(norm_sq)
    if not rows:
        return norm_sq, coef
    factor, number = (None, (0, 0)) if max_grad_norm is None else scaled(1.0, max_grad_norm)
    found = groups(parts, sizes.norm_block)
    shares = [_shares(group, rows) for group in found]
    columns = [-(-len(group.blocks) // share) for group, share in zip(found, shares, strict=True)]
    stride = sum(columns)
    # One program has the whole row: it can finish. No column at all: there is nothing to add, but a result to write.
    partials = None if stride == 1 else torch.empty(rows, stride, dtype=torch.float64, device=device)
    bound = _bound(sum(g.columns for g in found), all(g.dtype == torch.float64 for g in found))
    column = 0
    with on(device):
        for group, share, count in zip(found, shares, columns, strict=True):
            if not count:
                continue
            width = sizes.norm_width if 2 * group.widest > sizes.norm_width else sizes.norm_width // 8
            height = max(1, sizes.norm_tile // width // (2 if group.dtype == torch.float64 else 1))
            # fmt: off
            partial_norms[(count * triton.cdiv(rows, height),)](
                group.table, group.blocks, partials, norm_sq, coef, factor, len(group.blocks), share, count, stride,
                column, rows, *bound, *number, DTYPE=TYPES[group.dtype], BLOCK=sizes.norm_block, ROWS=height,
                WIDTH=width, **sizes.options(sizes.norm_warps),
            )
            # fmt: on
            column += count
        if partials is not None:
            width = sizes.finish_tile if 16 * stride > sizes.finish_tile else sizes.finish_tile // 16
            height = sizes.finish_tile // width
            finish_norms[(triton.cdiv(rows, height),)](
                partials, norm_sq, coef, factor, stride, rows, *bound, *number,
                ROWS=height, WIDTH=width, **sizes.options(sizes.finish_warps),
            )  # fmt: skip
    return norm_sq, coef


TYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float64: tl.float64,
}


def _shares(group: Group, rows: int) -> int:
    """Entries of the table per program, so that the partial sums take no more than P / 2 floats (or B doubles)."""
    entries = len(group.blocks)
    return max(1, -(-entries // max(1, min(entries, group.columns // (4 * rows)))))


def _bound(terms: int, only_float64: bool) -> tuple[int, int, int, int]:
    growth, floor = 1 + (terms + 1) * 2.0**-52, 0.0
    if not only_float64:
        growth, floor = growth + 5 * 2.0**-24, terms * 2.0**-149
    return *double(growth), *double(floor)
