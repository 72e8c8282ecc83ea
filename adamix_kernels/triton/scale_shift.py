"""Affine parts of normalisation layers: norms and clipped sums of their gradients, in float64."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from adamix_kernels.memory import plain
from adamix_kernels.ops._factored import positions_axis, weight_and_bias
from adamix_kernels.ops._numerics import sum_dtype
from adamix_kernels.ops.scale_shift import ScaleShiftSum
from adamix_kernels.triton._partials import add, finish, split
from adamix_kernels.triton.launch import config, layers, on
from adamix_kernels.triton.norm import wide


@triton.jit
def _channels(a, g, count, width, col, BIAS: tl.constexpr, ROWS: tl.constexpr):
    """Float64 `[WIDTH]`, over the first `count` positions of a sample: the sums of a g and |a g|; of g and |g|."""
    row = tl.arange(0, ROWS).to(tl.int64)
    weight = tl.zeros([ROWS, col.shape[0]], tl.float64)
    weight_length, bias, bias_length = weight, weight, weight
    for start in range(0, count.to(tl.int64), ROWS):
        t = (start + row)[:, None]
        mask = (t < count) & (col < width)[None, :]
        y = wide(tl.load(g + t * width + col[None, :], mask, 0.0)).to(tl.float64)
        x = wide(tl.load(a + t * width + col[None, :], mask, 0.0)).to(tl.float64) * y
        weight += x
        weight_length += tl.abs(x)
        if BIAS:
            bias += y
            bias_length += tl.abs(y)
    return tl.sum(weight, axis=0), tl.sum(weight_length, axis=0), tl.sum(bias, axis=0), tl.sum(bias_length, axis=0)


@triton.jit(do_not_specialize=["positions", "parts"])
def channel_norms(a, g, partials, positions, width, parts, BIAS: tl.constexpr, ROWS: tl.constexpr,
                  WIDTH: tl.constexpr):  # fmt: skip
    """Squares of WIDTH channels of one sample, each above what any float64 sum of it may be."""
    program = tl.program_id(0)
    first = (program // parts).to(tl.int64) * positions * width
    col = (program % parts) * WIDTH + tl.arange(0, WIDTH)
    weight, weight_length, bias, bias_length = _channels(a + first, g + first, positions, width, col, BIAS, ROWS)
    twice = (positions + 2).to(tl.float64) * 4.440892098500626e-16  # 2 * own_error: 2^-51
    weight = tl.abs(weight) + twice * weight_length
    bias = tl.abs(bias) + twice * bias_length
    tl.store(partials + program, tl.sum(weight * weight + bias * bias))


@triton.jit(do_not_specialize=["samples", "share", "positions", "parts"])
def channel_sums(a, g, coef, out, samples, share, positions, width, parts, BIAS: tl.constexpr, ROWS: tl.constexpr,
                 WIDTH: tl.constexpr):  # fmt: skip
    """A program sums WIDTH channels of `share` samples into its own part of `out [splits, (1 + BIAS) width]`."""
    program = tl.program_id(0)
    col = (program % parts) * WIDTH + tl.arange(0, WIDTH)
    split = (program // parts).to(tl.int64)
    weight_total = tl.zeros([WIDTH], tl.float64)
    bias_total = weight_total
    for sample in range(split * share, tl.minimum(split * share + share, samples)):
        c = wide(tl.load(coef + sample)).to(tl.float64)
        count = tl.where(c > 0, positions, 0)  # what is clipped away is not read
        first = sample * positions * width
        weight, _, bias, _ = _channels(a + first, g + first, count, width, col, BIAS, ROWS)
        weight_total += tl.where(c > 0, c, 0.0) * weight
        bias_total += tl.where(c > 0, c, 0.0) * bias
    place = out + split * width * (1 + BIAS) + col
    tl.store(place, weight_total.to(out.dtype.element_ty), col < width)
    if BIAS:
        tl.store(place + width, bias_total.to(out.dtype.element_ty), col < width)


def _launch(a: Tensor) -> tuple[int, dict[str, int]]:
    """Programs per sample or split, and the options, for `[B, T, D]`."""
    sizes = layers(a.device)
    width = min(triton.next_power_of_2(a.shape[2]), sizes.channel_tile)
    rows = max(1, min(triton.next_power_of_2(a.shape[1]), sizes.channel_tile // width))
    options = config(a.device).options(sizes.channel_warps)
    return triton.cdiv(a.shape[2], width), {"ROWS": rows, "WIDTH": width, **options}


def scale_shift_norm_sq(activations: Tensor, backprops: Tensor, bias: bool = True) -> Tensor:
    a, g = positions_axis(plain(activations)), positions_axis(plain(backprops))
    samples, positions, width = a.shape
    parts, options = _launch(a)
    partials = torch.empty(samples, parts, dtype=torch.float64, device=a.device)
    if partials.numel():
        with on(a.device):
            channel_norms[(samples * parts,)](a, g, partials, positions, width, parts, BIAS=bias, **options)
    return finish(partials, terms=2 * width + 16)


def scale_shift_clip_sum(activations: Tensor, backprops: Tensor, coef: Tensor, bias: bool = True) -> ScaleShiftSum:
    a, g, factors = positions_axis(plain(activations)), positions_axis(plain(backprops)), plain(coef)
    samples, positions, width = a.shape
    parts, options = _launch(a)
    out = torch.empty(1 + bias, width, dtype=sum_dtype(a, g), device=a.device)
    if width:
        splits = split(samples, parts, out.numel(), a.device)
        share = triton.cdiv(samples, splits)
        scratch = out if splits == 1 else torch.empty(splits, out.numel(), dtype=torch.float64, device=a.device)
        with on(a.device):
            channel_sums[(splits * parts,)](
                a, g, factors, scratch, samples, share, positions, width, parts, BIAS=bias, **options
            )
        if splits > 1:
            add(scratch, out)
    return ScaleShiftSum(*weight_and_bias(out.unbind()))
