"""The softmax classifier's private step, and its per-sample gradients in a subspace."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from adamix_kernels.memory import plain
from adamix_kernels.ops.head import HeadSum
from adamix_kernels.ops.noise import Noise
from adamix_kernels.triton._dots import alike, inner_products, tile
from adamix_kernels.triton._random import _log_fraction
from adamix_kernels.triton._random import double as joined
from adamix_kernels.triton.launch import NO_DRAW, double, draw, matrix, on, scaled
from adamix_kernels.triton.linear_sum import WeightedSum
from adamix_kernels.triton.norm import coefficient, round_up, scale, wide

# Some rows at a time: their logits, then in the same memory their residuals softmax - onehot with norms and factors,
# then the sum over them, which reads the features again. The norm is that of the float32 residual which is summed.


@triton.jit
def _exp(x):
    """Float64 e^x for x <= 0, by Taylor's series about multiples of log 2; below -700 it is that of -700."""
    x = tl.where(x < -700.0, -700.0, x)  # NaN stays NaN
    n = (x * 1.44269504088896338700 - 0.5).to(tl.int64)  # towards 0: to the nearest
    k = n.to(tl.float64)
    r = (x - k * 6.93147180369123816490e-01) - k * 1.90821492927058770002e-10
    y = r * 1.6059043836821613e-10 + 2.08767569878681e-09
    y = y * r + 2.505210838544172e-08
    y = y * r + 2.755731922398589e-07
    y = y * r + 2.7557319223985893e-06
    y = y * r + 2.48015873015873e-05
    y = y * r + 1.984126984126984e-04
    y = y * r + 1.3888888888888889e-03
    y = y * r + 8.333333333333333e-03
    y = y * r + 4.1666666666666664e-02
    y = y * r + 1.6666666666666666e-01
    y = y * r + 0.5
    y = y * r + 1.0
    y = y * r + 1.0
    return y * ((n + 1023) << 52).to(tl.float64, bitcast=True)


@triton.jit(do_not_specialize=["rows"])
def head_scores(
    x, weight, bias, scores, rows, inner, classes,
    ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr, CHAIN: tl.constexpr,
):  # fmt: skip
    """Float32 logits of ROWS samples and COLS classes."""
    across = tl.cdiv(classes, COLS)
    row = (tl.program_id(0) // across).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    o = tl.program_id(0) % across * COLS + tl.arange(0, COLS)
    total = inner_products(x, row, rows, weight, o, classes, inner, DEPTH, CHAIN)
    if bias is not None:
        total += wide(tl.load(bias + o, o < classes, 0.0))[None, :]
    tl.store(scores + row[:, None] * classes + o[None, :], total, (row < rows)[:, None] & (o < classes)[None, :])


@triton.jit(do_not_specialize=["rows", "low", "high", "growth0", "growth1"],
            do_not_specialize_on_alignment=["labels", "norm_sq", "coef", "length", "losses", "factor"])  # fmt: skip
def head_residuals(
    x, scores, labels, norm_sq, coef, length, losses, factor, rows, inner, classes, low, high, growth0, growth1,
    BIAS: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """The residuals of ROWS samples in place of their logits and, if asked for, what clips them and their loss."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    label = tl.load(labels + row, row < rows, 0)
    known = (label >= 0) & (label < classes)
    lane = tl.arange(0, WIDTH)
    top, size, own = (
        tl.full([ROWS], float("-inf"), tl.float64),
        tl.zeros([ROWS], tl.float64),
        tl.zeros([ROWS], tl.float64),
    )
    for start in range(0, classes, WIDTH):
        o = start + lane
        inside = (row < rows)[:, None] & (o < classes)[None, :]
        score = tl.load(scores + row[:, None] * classes + o[None, :], inside, 0.0).to(tl.float64)
        higher = tl.maximum(top, tl.max(tl.where(inside, score, float("-inf")), axis=1))
        higher = tl.where(row < rows, higher, 0.0)
        size = size * _exp(top - higher) + tl.sum(tl.where(inside, _exp(score - higher[:, None]), 0.0), axis=1)
        own += tl.sum(tl.where(o[None, :] == label[:, None], score, 0.0), axis=1)
        top = higher
    tl.debug_barrier()  # all logits have been read before any is overwritten
    rest, square = tl.zeros([ROWS], tl.float64), tl.zeros([ROWS], tl.float64)
    for start in range(0, classes, WIDTH):
        o = start + lane
        inside = (row < rows)[:, None] & (o < classes)[None, :] & (o[None, :] != label[:, None])
        place = scores + row[:, None] * classes + o[None, :]
        p = _exp(tl.load(place, inside, 0.0).to(tl.float64) - top[:, None]) / size[:, None]
        p = tl.where(inside, p, 0.0)
        residual = p.to(tl.float32)
        tl.store(place, residual, inside)
        rest += tl.sum(p, axis=1)
        square += tl.sum(residual.to(tl.float64) * residual.to(tl.float64), axis=1)
    # Softmax - 1 without cancellation. A label that is none, which nothing has checked here, makes the row a bad one.
    residual = (-rest).to(tl.float32)
    tl.store(scores + row * classes + label, residual, (row < rows) & known)
    square = tl.where(known, square + residual.to(tl.float64) * residual.to(tl.float64), float("nan"))
    if norm_sq is not None:
        total = tl.zeros([ROWS, WIDTH], tl.float64)
        for start in range(0, inner, WIDTH):
            col = start + lane
            inside = (row < rows)[:, None] & (col < inner)[None, :]
            value = wide(tl.load(x + row[:, None] * inner + col[None, :], inside, 0.0)).to(tl.float64)
            total += value * value
        feature = tl.sum(total, axis=1) + (1.0 if BIAS else 0.0)
        bound = round_up(square * feature * joined(growth0, growth1))
        c = coefficient(bound.to(tl.float64), scale(factor, low, high))
        tl.store(norm_sq + row, bound, row < rows)
        tl.store(coef + row, c, row < rows)
        tl.store(length + row, tl.sqrt(square).to(tl.float32), row < rows)
        loss = top - _log_fraction(1.0 / size) - own
        tl.store(losses + tl.program_id(0), tl.sum(tl.where((c > 0) & (row < rows), loss, 0.0)))


@triton.jit(do_not_specialize=["rows", "blocks"])
def head_coordinates(
    x, residual, basis, out, rows, inner, classes, width, rank, blocks,
    BIAS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr, CHAIN: tl.constexpr,
):  # fmt: skip
    """One coordinate of ROWS samples: the residual times the direction's matrix times the features."""
    k = (tl.program_id(0) // blocks).to(tl.int64)
    row = (tl.program_id(0) % blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    basis += k * width
    total = tl.zeros([ROWS], tl.float64)
    for start in range(0, classes, COLS):
        o = start + tl.arange(0, COLS)
        pulled = inner_products(x, row, rows, basis, o, classes, inner, DEPTH, CHAIN)
        if BIAS:
            pulled += wide(tl.load(basis + (width - classes) + o, o < classes, 0.0))[None, :]
        total += tl.sum(pulled * tile(residual, row, rows, o, classes), axis=1).to(tl.float64)
    tl.store(out + row * rank + k, total.to(tl.float32), row < rows)


def _blocks(features: Tensor, classes: int) -> Iterator[slice]:
    """Rows whose residuals stay in the cache."""
    rows = max(64, matrix(features.device).residuals // (4 * max(1, classes)) // 64 * 64)
    return (slice(start, start + rows) for start in range(0, len(features), rows))


def _residuals(
    x: Tensor, y: Tensor, w: Tensor, b: Tensor | None, clipped: tuple[Tensor, ...] | None, factor: Tensor | None,
    number: tuple[int, int],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Float32 `[N, O]`, and the parts of the loss. `clipped`: norm_sq, coef and length `[N]`, which are written."""
    x, w = alike(x, w)
    (rows, inner), classes, sizes = x.shape, len(w), matrix(x.device)
    shape = sizes.scores.of(x.dtype, w.dtype).fit(rows, classes, inner)
    scores = torch.empty(rows, classes, dtype=torch.float32, device=x.device)
    head_scores[(triton.cdiv(rows, shape.rows) * triton.cdiv(classes, shape.cols),)](
        x, w, b, scores, rows, inner, classes, **shape.constants(), **shape.options()
    )
    width = min(sizes.row_width, max(16, triton.next_power_of_2(classes)))
    height = sizes.row_tile // width
    programs = triton.cdiv(rows, height)
    losses = torch.empty(programs, dtype=torch.float64, device=x.device)
    growth = double(1 + (2 * (classes + inner) + 16) * 2.0**-52)
    head_residuals[(programs,)](
        x, scores, y, *(clipped or (None,) * 3), losses, factor, rows, inner, classes, *number, *growth,
        BIAS=b is not None, ROWS=height, WIDTH=width, num_warps=sizes.row_warps, num_stages=1,
    )  # fmt: skip
    return scores, losses


def softmax_head_clip_sum_noise(
    features: Tensor,
    labels: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    max_grad_norm: float | Tensor = math.inf,
    noise_multiplier: float = 0.0,
    noise: Noise | None = None,
) -> HeadSum:
    device, rows, (classes, inner) = features.device, len(features), weight.shape
    # First, as it may refuse.
    drawn = draw(noise, device) if noise_multiplier and noise is not None else NO_DRAW
    x, y, w, b = plain(features), plain(labels), plain(weight), None if bias is None else plain(bias)
    norm_sq, coef, length = (torch.empty(rows, dtype=torch.float32, device=device) for _ in range(3))
    blocks, losses = list(_blocks(x, classes)), [torch.zeros(1, dtype=torch.float64, device=device)]
    with on(device):
        factor, number = scaled(1.0, max_grad_norm)
        total = WeightedSum(device, classes, inner, bias is not None, once=len(blocks) < 2)
        for block in blocks or [slice(0, 0)]:
            clipped = norm_sq[block], coef[block], length[block]
            residual = torch.empty(0, classes, dtype=torch.float32, device=device)
            if len(x[block]):
                residual, loss = _residuals(x[block], y[block], w, b, clipped, factor, number)
                losses.append(loss)
            total.add(x[block][:, None], residual[:, None], clipped[1], clipped[2])
        sums = total.finish(drawn, noise_multiplier, max_grad_norm)
    return HeadSum(*sums, norm_sq, torch.cat(losses).sum().float())


def softmax_head_coordinates(
    features: Tensor, labels: Tensor, weight: Tensor, basis: Tensor, bias: Tensor | None = None
) -> Tensor:
    x, y, w, u, b = plain(features), plain(labels), plain(weight), plain(basis), None if bias is None else plain(bias)
    (rows, inner), classes, (rank, width) = x.shape, len(w), u.shape
    out = torch.empty(rows, rank, dtype=torch.float32, device=x.device)
    wide_x, u = alike(x, u)
    shape = matrix(x.device).scores.of(wide_x.dtype, u.dtype).fit(rows, classes, inner)
    with on(x.device):
        for block in _blocks(x, classes) if rank else ():
            residual, _ = _residuals(x[block], y[block], w, b, None, None, (0, 0))
            blocks = triton.cdiv(len(residual), shape.rows)
            head_coordinates[(blocks * rank,)](
                wide_x[block], residual, u, out[block], len(residual), inner, classes, width, rank, blocks,
                BIAS=bias is not None, **shape.constants(), **shape.options(),
            )  # fmt: skip
    return out
