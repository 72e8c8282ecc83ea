"""Squared norms of the gradients of linear layers, rounded up. Neither T x T nor O x I numbers are written."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from adamix_kernels.memory import plain
from adamix_kernels.ops._factored import by_gram, float32_error, positions_axis
from adamix_kernels.triton._dots import alike, inner_products, outer_products
from adamix_kernels.triton._random import double as joined
from adamix_kernels.triton.launch import Matrix, double, matrix, on
from adamix_kernels.triton.norm import round_up, wide

# The bound. A norm must not be below n + e, see `sum_error`, where n is exact. Here a dot of K terms is in chains of 32
# or 64, added in float32: right to own(K) 2^-23 of the lengths' product, own(K) = min(K, 64) + 16 + K / 64.
# direct: each entry is a dot over T, so n <= computed + own(T) 2^-23 R.
# gram: with dots x and y of two positions that are off by at most p and q, the product is off by at most
# p (|y| + q) + q |x|. That is added tile by tile, and is far less than own(I) + own(O) times R^2.
# Lengths are rounded up. What underflows in `direct` is far below the root of the smallest normal number, as no norm
# is; `gram` allows for it.


@triton.jit(do_not_specialize=["rows"])
def row_lengths(x, out, rows, cols, ROWS: tl.constexpr, WIDTH: tl.constexpr, BIAS: tl.constexpr):
    """Float32 norms of rows, not below the exact ones; of activations with the bias's 1 behind."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    total = tl.zeros([ROWS, WIDTH], tl.float64)
    for start in range(0, cols, WIDTH):
        col = start + tl.arange(0, WIDTH)
        inside = (row < rows)[:, None] & (col < cols)[None, :]
        value = wide(tl.load(x + row[:, None] * cols + col[None, :], inside, 0.0)).to(tl.float64)
        total += value * value
    length = tl.sqrt(tl.sum(total, axis=1) + (1.0 if BIAS else 0.0))
    # Above by 2^-22 of itself and 2^-149: more than all roundings and that to a float32 that may be denormal.
    tl.store(out + row, (length * 1.0000002384185791 + 1.401298464324817e-45).to(tl.float32), row < rows)


@triton.jit(do_not_specialize=["positions", "tiles", "stride"])
def direct_norms(
    a, g, partials, positions, inner, outer, tiles, stride,
    ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr, CHAIN: tl.constexpr,
):  # fmt: skip
    """A program squares ROWS x COLS entries of one sample's gradient `[O, I]`."""
    program = tl.program_id(0)
    part, sample = program % tiles, (program // tiles).to(tl.int64)
    across = tl.cdiv(inner, COLS)
    o, i = part // across * ROWS + tl.arange(0, ROWS), part % across * COLS + tl.arange(0, COLS)
    a += sample * positions * inner
    g += sample * positions * outer
    total = tl.zeros([ROWS, COLS], tl.float32)
    for first in range(0, positions, CHAIN):
        total += outer_products(a, inner, i, g, outer, o, first, positions, DEPTH, CHAIN)
    entry = total.to(tl.float64)
    tl.store(partials + sample * stride + part, tl.sum(tl.sum(entry * entry, axis=1)))


@triton.jit(do_not_specialize=["positions", "blocks", "stride", "column"])
def bias_norms(g, partials, positions, outer, blocks, stride, column, ROWS: tl.constexpr, COLS: tl.constexpr):
    """The squares of COLS entries of one sample's gradient of the bias, in float64."""
    program = tl.program_id(0)
    block, sample = program % blocks, (program // blocks).to(tl.int64)
    o = block * COLS + tl.arange(0, COLS)
    g += sample * positions * outer
    total = tl.zeros([ROWS, COLS], tl.float64)
    for first in range(0, positions, ROWS):
        t = first + tl.arange(0, ROWS)
        inside = (t < positions)[:, None] & (o < outer)[None, :]
        total += wide(tl.load(g + t.to(tl.int64)[:, None] * outer + o[None, :], inside, 0.0)).to(tl.float64)
    entry = tl.sum(total, axis=0)
    tl.store(partials + sample * stride + column + block, tl.sum(entry * entry))


@triton.jit(do_not_specialize=["positions", "pairs"])
def gram_norms(
    a, g, a_length, g_length, partials, positions, inner, outer, pairs, a_error, g_error, a_floor, g_floor,
    BIAS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr, CHAIN: tl.constexpr,
):  # fmt: skip
    """A program takes ROWS x ROWS pairs of positions of one sample, on or below the diagonal; COLS = ROWS."""
    program = tl.program_id(0)
    pair, sample = program % pairs, (program // pairs).to(tl.int64)
    down = ((tl.sqrt(pair.to(tl.float64) * 8.0 + 1.0) - 1.0) * 0.5).to(tl.int32)
    across = pair - down * (down + 1) // 2
    t, s = down * ROWS + tl.arange(0, ROWS), across * COLS + tl.arange(0, COLS)
    a += sample * positions * inner
    g += sample * positions * outer
    x = inner_products(a, t, positions, a, s, positions, inner, DEPTH, CHAIN)
    if BIAS:
        x += 1.0
    y = inner_products(g, t, positions, g, s, positions, outer, DEPTH, CHAIN)
    a_length += sample * positions
    g_length += sample * positions
    at, gt = tl.load(a_length + t, t < positions, 0.0), tl.load(g_length + t, t < positions, 0.0)
    as_, gs = tl.load(a_length + s, s < positions, 0.0), tl.load(g_length + s, s < positions, 0.0)
    p = a_error * at[:, None] * as_[None, :] + a_floor
    q = g_error * gt[:, None] * gs[None, :] + g_floor
    error = p * (tl.abs(y) + q) + q * tl.abs(x)
    # 4096 roundings of this sum of float32, and those of its terms: less than 2^-10.
    bound = tl.sum(tl.sum((x * y).to(tl.float64), axis=1)) + tl.sum(tl.sum(error, axis=1)).to(tl.float64) * 1.0009765625
    tl.store(partials + sample * pairs + pair, bound if down == across else 2.0 * bound)


@triton.jit(do_not_specialize=["positions", "stride", "rise0", "rise1", "growth0", "growth1", "floor0", "floor1"])
def finish_factored(
    partials, a_length, g_length, norm_sq, positions, stride, rise0, rise1, growth0, growth1, floor0, floor1,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """The root of one sample's partial sums, in order, and `rise` times R, squared."""
    sample = tl.program_id(0).to(tl.int64)
    total, length = tl.zeros([WIDTH], tl.float64), tl.zeros([WIDTH], tl.float64)
    for start in range(0, stride, WIDTH):
        column = start + tl.arange(0, WIDTH)
        total += tl.load(partials + sample * stride + column, column < stride, 0.0)
    for start in range(0, positions, WIDTH):
        t = start + tl.arange(0, WIDTH)
        la = tl.load(a_length + sample * positions + t, t < positions, 0.0)
        lg = tl.load(g_length + sample * positions + t, t < positions, 0.0)
        length += la.to(tl.float64) * lg.to(tl.float64)
    square = tl.sum(total) + joined(floor0, floor1)
    above = tl.sqrt(tl.where(square < 0, 0.0, square)) + joined(rise0, rise1) * tl.sum(length)  # NaN stays NaN
    tl.store(norm_sq + sample, round_up(above * above * joined(growth0, growth1)))


def lengths(x: Tensor, sizes: Matrix, bias: bool = False) -> Tensor:
    """Float32 `[*]` of `[*, D]`."""
    *shape, cols = x.shape
    out = torch.empty(shape, dtype=torch.float32, device=x.device)
    rows, width = out.numel(), min(sizes.row_width, max(16, triton.next_power_of_2(cols)))
    if rows:
        height = sizes.row_tile // width
        row_lengths[(triton.cdiv(rows, height),)](
            x, out, rows, cols, ROWS=height, WIDTH=width, BIAS=bias, num_warps=sizes.row_warps, num_stages=1
        )
    return out


def linear_norm_sq(activations: Tensor, backprops: Tensor, bias: bool = False, method: str = "auto") -> Tensor:
    a, g = plain(positions_axis(activations)), plain(positions_axis(backprops))
    samples, positions, inner = a.shape
    outer, sizes = g.shape[2], matrix(a.device)
    norm_sq = torch.empty(samples, dtype=torch.float32, device=a.device)
    if not samples:
        return norm_sq
    if method == "auto":
        method = "gram" if by_gram("triton", positions, inner, outer) else "direct"
    with on(a.device):
        a_length, g_length = lengths(a, sizes, bias), lengths(g, sizes)
        floor, rise = 0.0, float32_error(positions)
        if positions < 2:  # the norm is a product of two
            # No columns: a kernel that is given None does not compile, even where it would read nothing.
            partials, rise = torch.empty(samples, 0, dtype=torch.float64, device=a.device), 1 + rise
        elif method == "gram":
            partials = _gram(a, g, a_length, g_length, bias, sizes)
            floor = positions**2 * 2.0**-147  # of products and errors that underflow
        else:
            partials, rise = _direct(a, g, bias, sizes), rise + _own_error(positions)
        growth = 1 + (outer * (inner + 1) + 16) * 2.0**-52
        finish_factored[(samples,)](
            partials, a_length, g_length, norm_sq, positions, partials.shape[1],
            *double(rise), *double(growth), *double(floor), WIDTH=sizes.row_width, num_warps=1, num_stages=1,
        )  # fmt: skip
    return norm_sq


def _direct(a: Tensor, g: Tensor, bias: bool, sizes: Matrix) -> Tensor:
    (samples, positions, inner), outer = a.shape, g.shape[2]
    a, g = alike(a, g)
    tile = sizes.direct.of(a.dtype, g.dtype).fit(outer, inner, positions)
    tiles = triton.cdiv(outer, tile.rows) * triton.cdiv(inner, tile.cols)
    blocks = triton.cdiv(outer, sizes.bias_cols) if bias else 0
    partials = torch.empty(samples, tiles + blocks, dtype=torch.float64, device=a.device)
    if tiles:
        direct_norms[(samples * tiles,)](
            a, g, partials, positions, inner, outer, tiles, tiles + blocks, **tile.constants(), **tile.options(),
        )  # fmt: skip
    if blocks:
        bias_norms[(samples * blocks,)](
            g, partials, positions, outer, blocks, tiles + blocks, tiles,
            ROWS=sizes.bias_rows, COLS=sizes.bias_cols, num_warps=sizes.row_warps, num_stages=1,
        )  # fmt: skip
    return partials


def _gram(a: Tensor, g: Tensor, a_length: Tensor, g_length: Tensor, bias: bool, sizes: Matrix) -> Tensor:
    (samples, positions, inner), outer = a.shape, g.shape[2]
    tile = sizes.gram.of(a.dtype, g.dtype).fit(positions, positions, max(inner, outer))
    side = triton.cdiv(positions, tile.rows)
    pairs = side * (side + 1) // 2
    partials = torch.empty(samples, pairs, dtype=torch.float64, device=a.device)
    gram_norms[(samples * pairs,)](
        a, g, a_length, g_length, partials, positions, inner, outer, pairs,
        _own_error(inner + 1), _own_error(outer), (inner + 4) * 2.0**-149, (outer + 4) * 2.0**-149,
        BIAS=bias, **tile.constants(), **tile.options(),
    )  # fmt: skip
    return partials


def _own_error(terms: int) -> float:
    return (min(terms, 64) + 16 + terms / 64) * 2.0**-23
