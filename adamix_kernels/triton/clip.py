"""Weighted sums of stored per-sample gradients, and the Gaussian mechanism on them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from adamix_kernels.device_lists import groups, results
from adamix_kernels.memory import plain
from adamix_kernels.ops._numerics import as_list
from adamix_kernels.ops.clip import ClippedSum
from adamix_kernels.ops.noise import Noise
from adamix_kernels.triton._random import normals
from adamix_kernels.triton.launch import NO_DRAW, Draw, config, draw, on, scaled
from adamix_kernels.triton.noise import _STREAM
from adamix_kernels.triton.norm import TYPES, aligned, columns, norms, scale, view, wide

#: Bytes of partial sums, where few columns and many samples call for splitting the samples among programs. From 65,536
#: columns on, nothing is split.
_SCRATCH = 1 << 20
#: Samples that are worth a program of their own.
_FEWEST = 32


@triton.jit
def _term(data, cols, lane, mask, coef, row):
    """Float64 `coef[row] * x[row]`, exactly 0 for a row that is clipped away, whatever it holds."""
    c = wide(tl.load(coef + row)).to(tl.float64)
    x = wide(tl.load(data + row * cols + lane, mask))
    return tl.where(c > 0, c, 0.0) * tl.where(c > 0, x, 0.0).to(tl.float64)


@triton.jit
def _weighted(address, cols, first, coef, start, stop, DTYPE: tl.constexpr, WIDTH: tl.constexpr, WHOLE: tl.constexpr):
    """Float64 `[WIDTH]`: the sum over rows start .. stop, in order, of coef times WIDTH columns.

    `WHOLE`: 16 bytes at a time, all of them the tensor's. Elsewhere the columns that are nobody's hold anything.
    """
    data, cols = view(address, cols, first, DTYPE, WHOLE)
    low, high = columns(cols, first, WIDTH)
    lane = tl.arange(0, WIDTH)
    mask = None if WHOLE else (lane >= low) & (lane < high)
    total = tl.zeros([WIDTH], tl.float64)
    fours = start + (stop - start) // 4 * 4
    for row in range(start, fours, 4):
        t0 = _term(data, cols, lane, mask, coef, row)
        t1 = _term(data, cols, lane, mask, coef, row + 1)
        t2 = _term(data, cols, lane, mask, coef, row + 2)
        t3 = _term(data, cols, lane, mask, coef, row + 3)
        total = total + t0 + t1 + t2 + t3
    for row in range(fours, stop):
        total += _term(data, cols, lane, mask, coef, row)
    return total


@triton.jit
def _block(table, blocks, entry, WIDTH: tl.constexpr, UNIT: tl.constexpr):
    """Of an entry: its tensor's row in the table, its first column, and that column's place in the draw."""
    tensor = table + 4 * tl.load(blocks + 2 * entry)
    offset = tl.load(tensor + 2)
    first = tl.load(blocks + 2 * entry + 1).to(tl.int64) * WIDTH - offset % UNIT
    return tensor, first, offset + first


@triton.jit(
    do_not_specialize=["entries", "rows", "share", "size", "low", "high", *_STREAM],
    do_not_specialize_on_alignment=["coef", "factor"],
)
def weighted_sums(
    table, blocks, coef, out, factor, entries, rows, share, size, low, high,
    k0, k1, k2, k3, k4, k5, k6, k7, draw0, draw1,
    DTYPE: tl.constexpr, WIDTH: tl.constexpr, UNIT: tl.constexpr, NOISE: tl.constexpr,
):  # fmt: skip
    """A program sums `share` rows of WIDTH columns into its own part of `out [splits, size]`."""
    program = tl.program_id(0)
    tensor, first, element = _block(table, blocks, program % entries, WIDTH, UNIT)
    address, cols, start_out = tl.load(tensor), tl.load(tensor + 1), tl.load(tensor + 3)
    split = (program // entries).to(tl.int64)
    start, stop = split * share, tl.minimum(split * share + share, rows)
    if aligned(address, cols, first, DTYPE) & (first >= 0) & (first + WIDTH <= cols):
        total = _weighted(address, cols, first, coef, start, stop, DTYPE, WIDTH, True)
    else:
        total = _weighted(address, cols, first, coef, start, stop, DTYPE, WIDTH, False)
    if NOISE:
        z = normals(k0, k1, k2, k3, k4, k5, k6, k7, draw0, draw1, element, WIDTH, UNIT)
        total += z * scale(factor, low, high)
    lane = tl.arange(0, WIDTH)
    from_lane, to_lane = columns(cols, first, WIDTH)
    place = out + (split * size + start_out + first) + lane
    tl.store(place, total.to(out.dtype.element_ty), (lane >= from_lane) & (lane < to_lane))


@triton.jit(do_not_specialize=["splits", "size", "low", "high", *_STREAM], do_not_specialize_on_alignment=["factor"])
def add_splits(
    table, blocks, scratch, out, factor, splits, size, low, high,
    k0, k1, k2, k3, k4, k5, k6, k7, draw0, draw1,
    WIDTH: tl.constexpr, UNIT: tl.constexpr, NOISE: tl.constexpr,
):  # fmt: skip
    """Add the splits of `scratch [splits, size]`, in order."""
    tensor, first, element = _block(table, blocks, tl.program_id(0), WIDTH, UNIT)
    cols, start_out = tl.load(tensor + 1), tl.load(tensor + 3)
    lane, place = tl.arange(0, WIDTH), start_out + first
    from_lane, to_lane = columns(cols, first, WIDTH)
    mask = (lane >= from_lane) & (lane < to_lane)
    total = tl.zeros([WIDTH], tl.float64)
    for split in range(splits):
        total += tl.load(scratch + (split * size + place) + lane, mask, 0.0)
    if NOISE:
        z = normals(k0, k1, k2, k3, k4, k5, k6, k7, draw0, draw1, element, WIDTH, UNIT)
        total += z * scale(factor, low, high)
    tl.store(out + place + lane, total.to(out.dtype.element_ty), mask)


def clip_sum(grad_sample: Tensor | Sequence[Tensor], coef: Tensor) -> Any:
    sums = _sums([plain(part) for part in as_list(grad_sample)], plain(coef), NO_DRAW)
    return sums[0] if isinstance(grad_sample, Tensor) else sums


def clip_sum_noise(
    grad_sample: Tensor | Sequence[Tensor],
    max_grad_norm: float | Tensor,
    noise_multiplier: float = 0.0,
    noise: Noise | None = None,
) -> ClippedSum:
    parts = [plain(part) for part in as_list(grad_sample)]
    # First, as it may refuse.
    drawn = draw(noise, parts[0].device) if noise_multiplier and noise is not None else NO_DRAW
    norm_sq, coef = norms(parts, max_grad_norm)
    assert coef is not None
    sums = _sums(parts, coef, drawn, noise_multiplier, max_grad_norm)
    return ClippedSum(sums[0] if isinstance(grad_sample, Tensor) else sums, norm_sq)


def _sums(
    parts: Sequence[Tensor],
    coef: Tensor,
    drawn: Draw,
    noise_multiplier: float = 0.0,
    max_grad_norm: float | Tensor = 0.0,
) -> list[Tensor]:
    """With noise if something was drawn. A threshold on the device stays there."""
    device, rows = coef.device, len(coef)
    words, unit = drawn
    noisy = drawn is not NO_DRAW
    factor, number = scaled(noise_multiplier, max_grad_norm) if noisy else (None, (0, 0))
    sizes = config(device)
    width = sizes.sum_width * (2 if any(part.element_size() == 2 for part in parts) else 1)
    shared = sizes.options(sizes.sum_warps)
    sums: list[Any] = [None] * len(parts)
    with on(device):
        for group in groups(parts, width, unit):
            dtype = torch.float64 if group.dtype == torch.float64 else torch.float32
            out = torch.empty(group.size, dtype=dtype, device=device)
            for i, view in zip(group.members, results(parts, group, out), strict=True):
                sums[i] = view
            entries = len(group.blocks)
            if not entries:
                continue
            tables = group.table, group.blocks
            kinds: dict[str, Any] = {"WIDTH": width, "UNIT": unit}
            splits = max(1, min(-(-sizes.sum_programs // entries), rows // _FEWEST, _SCRATCH // (8 * group.size)))
            share = -(-rows // splits)
            # fmt: off
            if splits == 1:
                weighted_sums[(entries,)](
                    *tables, coef, out, factor, entries, rows, rows, 0, *number, *words,
                    DTYPE=TYPES[group.dtype], NOISE=noisy, **kinds, **shared,
                )
                continue
            scratch = torch.empty(splits, group.size, dtype=torch.float64, device=device)
            weighted_sums[(entries * splits,)](
                *tables, coef, scratch, None, entries, rows, share, group.size, 0, 0, *[0] * 10,
                DTYPE=TYPES[group.dtype], NOISE=False, **kinds, **shared,
            )
            add_splits[(entries,)](
                *tables, scratch, out, factor, splits, group.size, *number, *words, NOISE=noisy, **kinds, **shared
            )
            # fmt: on
    return sums
