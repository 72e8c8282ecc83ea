"""Clipped sums of the gradients of linear layers, and Gaussian noise on them."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from adamix_kernels.memory import plain
from adamix_kernels.ops._factored import positions_axis
from adamix_kernels.ops.linear import LinearSum
from adamix_kernels.ops.noise import Noise
from adamix_kernels.triton._dots import balanced, outer_products, product, tile
from adamix_kernels.triton._random import normals
from adamix_kernels.triton.launch import NO_DRAW, Draw, config, draw, matrix, on, scaled
from adamix_kernels.triton.linear_norm import lengths
from adamix_kernels.triton.noise import _STREAM
from adamix_kernels.triton.norm import scale, wide

# What a sample's part of the sum may be off by is in its norm, see `sum_error`: its products are added in chains, which
# meet in float64. Samples of one position, which are no larger than they are clipped to, share chains; longer ones do
# not, even if a dot's depth is then mostly empty: large terms that cancel must not stand where another is rounded.

#: Positions between two additions in float64, which cost as much as some dots.
_SPAN = 512


@triton.jit
def _place(program, tiles, across, ROWS: tl.constexpr, COLS: tl.constexpr):
    """The tile's rows and columns, and which split of the samples."""
    part = program % tiles
    o, i = part // across * ROWS + tl.arange(0, ROWS), part % across * COLS + tl.arange(0, COLS)
    return o, i, (program // tiles).to(tl.int64)


@triton.jit
def _store(out, total, o, outer, i, inner):
    inside = (o < outer)[:, None] & (i < inner)[None, :]
    tl.store(out + o.to(tl.int64)[:, None] * inner + i[None, :], total.to(out.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["samples", "positions", "tiles", "share", "size"],
            do_not_specialize_on_alignment=["coef"])  # fmt: skip
def sample_sums(
    a, g, coef, out, samples, positions, inner, outer, tiles, share, size,
    ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr, CHAIN: tl.constexpr,
):  # fmt: skip
    """A program sums `share` samples into its part of `out [splits, size]`, a chain having positions of one only.

    So the operands go to the tensor cores as they are, and the factor falls on a chain. One that is not above 0 takes
    nothing of it, whatever it holds.
    """
    o, i, split = _place(tl.program_id(0), tiles, tl.cdiv(inner, COLS), ROWS, COLS)
    chains = tl.cdiv(positions, CHAIN)
    total = tl.zeros([ROWS, COLS], tl.float64)
    first_link = split.to(tl.int32) * share * chains
    for link in range(first_link, tl.minimum(first_link + share * chains, samples * chains)):
        sample, first = (link // chains).to(tl.int64), link % chains * CHAIN
        c = tl.load(coef + sample)
        own_a, own_g = a + sample * positions * inner, g + sample * positions * outer
        chain = outer_products(own_a, inner, i, own_g, outer, o, first, positions, DEPTH, CHAIN)
        total = tl.where(c > 0, total + c.to(tl.float64) * chain.to(tl.float64), total)
    _store(out + split * size, total, o, outer, i, inner)


@triton.jit(do_not_specialize=["rows", "positions", "tiles", "share", "size"],
            do_not_specialize_on_alignment=["coef"])  # fmt: skip
def position_sums(
    a, g, coef, length, out, rows, positions, inner, outer, tiles, share, size,
    ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr, SPAN: tl.constexpr, MORE: tl.constexpr,
):  # fmt: skip
    """A program sums `share` rows of `a [rows, inner]` and `g [rows, outer]`; each sample has `positions` of them.

    The factor goes to the rows of g, in float32. On tensor cores a dot is a chain; in multiply-adds SPAN positions are.
    `MORE`: `out` holds a sum already.
    """
    o, i, split = _place(tl.program_id(0), tiles, tl.cdiv(inner, COLS), ROWS, COLS)
    total = tl.zeros([ROWS, COLS], tl.float64)
    last = tl.minimum(split * share + share, rows)
    for start in range(split * share, last, SPAN):
        part = tl.zeros([ROWS, COLS], tl.float32)
        for first in range(start, tl.minimum(start + SPAN, last), DEPTH):
            row = first + tl.arange(0, DEPTH)
            c = tl.load(coef + row // positions, row < last, 0.0)
            c = tl.where(c > 0, c, 0.0)
            row = tl.where(c > 0, row, last)  # one that is clipped away is not read
            left, right = balanced(c, tl.load(length + row, row < last, 1.0))
            x, y = tile(g, row, last, o, outer).to(tl.float32), tile(a, row, last, i, inner)
            x = tl.trans(x * left[:, None])
            if a.dtype.element_ty == tl.bfloat16:
                y = (y.to(tl.float32) * right[:, None]).to(tl.bfloat16)
                part += product(x, y, tl.zeros([ROWS, COLS], tl.float32))
            else:
                part = product(x, y * right[:, None], part)
        total += part.to(tl.float64)
    if MORE:
        inside = (o < outer)[:, None] & (i < inner)[None, :]
        total += tl.load(out + split * size + o.to(tl.int64)[:, None] * inner + i[None, :], inside, 0.0)
    _store(out + split * size, total, o, outer, i, inner)


@triton.jit(do_not_specialize=["rows", "positions", "blocks", "share", "size"],
            do_not_specialize_on_alignment=["coef", "out"])  # fmt: skip
def bias_sums(
    g, coef, out, rows, positions, outer, blocks, share, size,
    ROWS: tl.constexpr, COLS: tl.constexpr, MORE: tl.constexpr,
):  # fmt: skip
    """The same for the bias, in float64."""
    block, split = tl.program_id(0) % blocks, (tl.program_id(0) // blocks).to(tl.int64)
    o = block * COLS + tl.arange(0, COLS)
    total = tl.zeros([ROWS, COLS], tl.float64)
    last = tl.minimum(split * share + share, rows)
    for first in range(split * share, last, ROWS):
        row = first + tl.arange(0, ROWS)
        c = tl.load(coef + row // positions, row < last, 0.0).to(tl.float64)
        inside = ((row < last) & (c > 0))[:, None] & (o < outer)[None, :]
        x = wide(tl.load(g + row.to(tl.int64)[:, None] * outer + o[None, :], inside, 0.0)).to(tl.float64)
        total += tl.where(c > 0, c, 0.0)[:, None] * x
    column = tl.sum(total, axis=0)
    place = out + split * size + o
    if MORE:
        column += tl.load(place, o < outer, 0.0)
    tl.store(place, column.to(out.dtype.element_ty), o < outer)


@triton.jit(do_not_specialize=["splits", "size", "low", "high", *_STREAM], do_not_specialize_on_alignment=["factor"])
def finish_sums(
    scratch, out, factor, splits, size, low, high, k0, k1, k2, k3, k4, k5, k6, k7, draw0, draw1,
    WIDTH: tl.constexpr, UNIT: tl.constexpr, NOISE: tl.constexpr,
):  # fmt: skip
    """Add the splits of `scratch [splits, size]`, in order, and the noise."""
    first = tl.program_id(0).to(tl.int64) * WIDTH
    element = first + tl.arange(0, WIDTH)
    total = tl.zeros([WIDTH], tl.float64)
    part = scratch + element
    for _ in range(splits):
        total += tl.load(part, element < size, 0.0)
        part += size
    if NOISE:
        z = normals(k0, k1, k2, k3, k4, k5, k6, k7, draw0, draw1, first, WIDTH, UNIT)
        total += z * scale(factor, low, high)
    tl.store(out + element, total.to(tl.float32), element < size)


class WeightedSum:
    """Sum over samples of `coef` times the gradients of a layer's weight `[O, I]` and bias `[O]`, as one vector.

    The samples are split where the tiles are few. The parts of several splits, or of several `add`s unless `once`, are
    float64 in memory of their own; `finish` adds them up, and the noise.
    """

    def __init__(self, device: torch.device, outer: int, inner: int, bias: bool, once: bool = True) -> None:
        self.sizes, self.outer, self.inner, self.bias, self.once = matrix(device), outer, inner, bias, once
        self.out = torch.empty(outer * (inner + bias), dtype=torch.float32, device=device)
        self.parts: Tensor | None = None

    def add(self, a: Tensor, g: Tensor, coef: Tensor, length: Tensor | None = None) -> None:
        """Of `a [B, T, I]` and `g [B, T, O]`, the largest B first; `length [B, T]` is that of the rows of g."""
        samples, positions, _ = a.shape
        rows, size, sums = samples * positions, len(self.out), self.sizes.sums
        whole = positions > 1
        if not (whole and a.dtype == g.dtype) and (whole or a.dtype != torch.bfloat16):
            a, g = a.float(), g.float()
        kinds = (a.dtype, g.dtype) if whole else (torch.float32, a.dtype)
        tile = sums.of(*kinds).fit(self.outer, self.inner, positions if whole else rows)
        tiles = triton.cdiv(self.outer, tile.rows) * triton.cdiv(self.inner, tile.cols)
        more = self.parts is not None
        if self.parts is None:
            wanted = triton.cdiv(self.sizes.programs, max(1, tiles))
            splits = max(1, min(wanted, samples, rows // self.sizes.share))
            self.parts = self.out
            if splits > 1 or not self.once:
                self.parts = torch.empty(splits, size, dtype=torch.float64, device=a.device)
        splits = self.parts.numel() // max(1, size)
        share = triton.cdiv(samples, max(1, splits))
        if tiles and whole:
            sample_sums[(tiles * splits,)](
                a, g, coef, self.parts, samples, positions, self.inner, self.outer, tiles, share, size,
                **tile.constants(), **tile.options(),
            )  # fmt: skip
        elif tiles:
            position_sums[(tiles * splits,)](
                a, g, coef, lengths(g, self.sizes) if length is None else length, self.parts, rows, positions,
                self.inner, self.outer, tiles, share * positions, size,
                ROWS=tile.rows, COLS=tile.cols, DEPTH=tile.depth,
                SPAN=_SPAN if a.dtype == torch.bfloat16 else tile.chain, MORE=more, **tile.options(),
            )  # fmt: skip
        blocks = triton.cdiv(self.outer, self.sizes.bias_cols) if self.bias else 0
        if blocks:
            bias_sums[(blocks * splits,)](
                g, coef, self.parts.view(-1)[self.outer * self.inner :], rows, positions, self.outer, blocks,
                share * positions, size, ROWS=self.sizes.bias_rows, COLS=self.sizes.bias_cols, MORE=more,
                num_warps=self.sizes.row_warps, num_stages=1,
            )  # fmt: skip

    def finish(self, drawn: Draw = NO_DRAW, std: float = 0.0, by: float | Tensor = 1.0) -> tuple[Tensor, Tensor | None]:
        """The weight's and the bias's sums with noise of standard deviation `std * by`, if anything was drawn."""
        assert self.parts is not None
        noisy, size, sizes = drawn is not NO_DRAW, len(self.out), config(self.out.device)
        if size and (noisy or self.parts is not self.out):
            factor, number = scaled(std, by) if noisy else (None, (0, 0))
            finish_sums[(triton.cdiv(size, sizes.noise_width),)](
                self.parts, self.out, factor, self.parts.numel() // size, size, *number, *drawn.words,
                WIDTH=sizes.noise_width, UNIT=drawn.unit, NOISE=noisy, **sizes.options(sizes.noise_warps),
            )  # fmt: skip
        cut = self.outer * self.inner
        return self.out[:cut].view(self.outer, self.inner), self.out[cut:] if self.bias else None


def linear_clip_sum(
    activations: Tensor,
    backprops: Tensor,
    coef: Tensor,
    bias: bool = False,
    noise: Noise | None = None,
    std: float | Tensor = 0.0,
) -> LinearSum:
    a, g = plain(positions_axis(activations)), plain(positions_axis(backprops))
    # First, as it may refuse.
    drawn = draw(noise, a.device) if noise is not None and (isinstance(std, Tensor) or std) else NO_DRAW
    with on(a.device):
        total = WeightedSum(a.device, g.shape[2], a.shape[2], bias)
        total.add(a, g, plain(coef.float()))
        return LinearSum(*total.finish(drawn, 1.0, std))
