"""Convolutions: norms and clipped sums of their gradients, by tiles of inputs and outputs that are never all written.

The windows are not written either: a kernel loads them from where they lie in the activations. An input j of a group is
a channel and a tap of the kernel; with 1 or 2 spatial axes the first ones have size 1.

A tile is a float32 sum over the positions of one sample, in chains of at most 64 products: within the `sum_error` e.
Products below 2^-126 may vanish; tensor cores do not flush what they are given (Fasi et al. 2021).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from adamix_kernels.memory import plain
from adamix_kernels.ops._factored import sum_error
from adamix_kernels.ops.conv import ConvSum, _axes
from adamix_kernels.triton._partials import add, split
from adamix_kernels.triton._random import double as joined
from adamix_kernels.triton.launch import config, double, layers, on
from adamix_kernels.triton.norm import round_up, wide

_GEOMETRY = [
    "size0", "size1", "size2", "out1", "out2", "taps", "kernel1", "kernel2", "stride0", "stride1", "stride2",
    "before0", "before1", "before2", "dilation0", "dilation1", "dilation2",
]  # fmt: skip


@triton.jit
def _corner(t, out1, out2, stride0, stride1, stride2, before0, before1, before2):
    """Where the window of position t begins, on each axis."""
    row = t // out2
    return row // out1 * stride0 - before0, row % out1 * stride1 - before1, t % out2 * stride2 - before2


@triton.jit
def _tap(k, kernel1, kernel2, dilation0, dilation1, dilation2):
    """How far tap k is from there."""
    row = k // kernel2
    return row // kernel1 * dilation0, row % kernel1 * dilation1, k % kernel2 * dilation2


@triton.jit
def _inside(x0, x1, x2, size0, size1, size2, AXES: tl.constexpr):
    """Not in the padding."""
    inside = (x2 >= 0) & (x2 < size2)
    if AXES > 1:
        inside = inside & (x1 >= 0) & (x1 < size1)
    if AXES > 2:
        inside = inside & (x0 >= 0) & (x0 < size0)
    return inside


@triton.jit
def _product(x, y):
    """Float32 `[J, O]` of `[J, T]` and `[O, T]`: exact products, on tensor cores for two bytes of one type."""
    if x.dtype == y.dtype and x.dtype != tl.float32:
        return tl.dot(x, tl.trans(y))
    else:
        return tl.dot(wide(x), tl.trans(wide(y)), input_precision="ieee")


@triton.jit
def _gradient(
    a, g, count, positions, j, inner, o, outer, with_bias,
    size0, size1, size2, out1, out2, taps, kernel1, kernel2, stride0, stride1, stride2,
    before0, before1, before2, dilation0, dilation1, dilation2,
    AXES: tl.constexpr, CHAIN: tl.constexpr,
):  # fmt: skip
    """Float32 `[J, O]` and `[O]`, over the first `count` positions of one group of one sample, which lies at a and g.

    The second is the bias's where it is asked for. Nothing is to be made of what lies beyond `inner` and `outer`.
    """
    v0, v1, v2 = _tap(j % taps, kernel1, kernel2, dilation0, dilation1, dilation2)
    a += ((((j // taps).to(tl.int64) * size0 + v0) * size1 + v1) * size2 + v2)[:, None]
    g += (o.to(tl.int64) * positions)[:, None]
    weight = tl.zeros([j.shape[0], o.shape[0]], tl.float32)
    bias = tl.zeros([o.shape[0]], tl.float32)
    for start in range(0, count, CHAIN):
        t = start + tl.arange(0, CHAIN)
        u0, u1, u2 = _corner(t, out1, out2, stride0, stride1, stride2, before0, before1, before2)
        at = (u0.to(tl.int64) * size1 + u1) * size2 + u2
        there = (t < count)[None, :]
        inside = _inside(
            u0[None, :] + v0[:, None], u1[None, :] + v1[:, None], u2[None, :] + v2[:, None], size0, size1, size2, AXES
        )
        x = tl.load(a + at[None, :], inside & there & (j < inner)[:, None], 0.0)
        y = tl.load(g + t[None, :], there & (o < outer)[:, None], 0.0)
        # Not `+=`, of which the compiler would make one chain, through all positions.
        weight = tl.fma(_product(x, y), 1.0, weight)
        if with_bias:
            bias += tl.sum(wide(y), axis=1)
    return weight, bias


@triton.jit
def _tile(program, inner, outer, INNER: tl.constexpr, OUTER: tl.constexpr):
    """Inputs and outputs of a tile, and what is left of the program's number."""
    tiles_inner, tiles_outer = tl.cdiv(inner, INNER), tl.cdiv(outer, OUTER)
    j = program % tiles_inner * INNER + tl.arange(0, INNER)
    o = program // tiles_inner % tiles_outer * OUTER + tl.arange(0, OUTER)
    return j, o, program // tiles_inner // tiles_outer, tiles_inner * tiles_outer


@triton.jit(do_not_specialize=["inner", "outer", "groups", *_GEOMETRY])
def tile_norms(
    a, g, squares, positions, inner, outer, groups,
    size0, size1, size2, out1, out2, taps, kernel1, kernel2, stride0, stride1, stride2,
    before0, before1, before2, dilation0, dilation1, dilation2,
    AXES: tl.constexpr, BIAS: tl.constexpr, INNER: tl.constexpr, OUTER: tl.constexpr, CHAIN: tl.constexpr,
):  # fmt: skip
    """The sum of squares of one tile of the gradient of one group of one sample: `squares [B, groups, tiles]`."""
    program = tl.program_id(0)
    j, o, block, _ = _tile(program, inner, outer, INNER, OUTER)
    block = block.to(tl.int64)  # of B times groups
    a += block * (inner // taps) * size0 * size1 * size2
    first = BIAS & (program % tl.cdiv(inner, INNER) == 0)
    weight, bias = _gradient(
        a, g + block * outer * positions, positions, positions, j, inner, o, outer, first,
        size0, size1, size2, out1, out2, taps, kernel1, kernel2, stride0, stride1, stride2,
        before0, before1, before2, dilation0, dilation1, dilation2, AXES, CHAIN,
    )  # fmt: skip
    weight = tl.where((j < inner)[:, None] & (o < outer)[None, :], weight, 0.0).to(tl.float64)
    total = tl.sum(weight * weight)
    if BIAS:
        bias = tl.where(o < outer, bias, 0.0).to(tl.float64)
        total += tl.sum(bias * bias)
    tl.store(squares + program, total)


@triton.jit(do_not_specialize=["samples", "share", "size", "inner", "outer", "groups", *_GEOMETRY])
def tile_sums(
    a, g, coef, out, samples, share, size, positions, inner, outer, groups,
    size0, size1, size2, out1, out2, taps, kernel1, kernel2, stride0, stride1, stride2,
    before0, before1, before2, dilation0, dilation1, dilation2,
    AXES: tl.constexpr, BIAS: tl.constexpr, INNER: tl.constexpr, OUTER: tl.constexpr, CHAIN: tl.constexpr,
):  # fmt: skip
    """One tile of the sum over `share` samples, into its own part of `out [splits, size]`: the weight, then the bias.

    Each sample is summed over its positions before its factor and the others, in float64.
    """
    program = tl.program_id(0)
    j, o, rest, _ = _tile(program, inner, outer, INNER, OUTER)
    group, split = (rest % groups).to(tl.int64), (rest // groups).to(tl.int64)
    first = BIAS & (program % tl.cdiv(inner, INNER) == 0)
    weight_total, bias_total = tl.zeros([INNER, OUTER], tl.float64), tl.zeros([OUTER], tl.float64)
    for sample in range(split * share, tl.minimum(split * share + share, samples)):
        c = wide(tl.load(coef + sample)).to(tl.float64)
        count = tl.where(c > 0, positions, 0)  # what is clipped away is not read
        block = sample * groups + group
        weight, bias = _gradient(
            a + block * (inner // taps) * size0 * size1 * size2, g + block * outer * positions, count, positions,
            j, inner, o, outer, first,
            size0, size1, size2, out1, out2, taps, kernel1, kernel2, stride0, stride1, stride2,
            before0, before1, before2, dilation0, dilation1, dilation2, AXES, CHAIN,
        )  # fmt: skip
        c = tl.where(c > 0, c, 0.0)
        weight_total += c * weight.to(tl.float64)
        if BIAS:
            bias_total += c * bias.to(tl.float64)
    out += split * size
    row = group * outer + o
    mask = (j < inner)[:, None] & (o < outer)[None, :]
    tl.store(out + row[None, :] * inner + j[:, None], weight_total.to(out.dtype.element_ty), mask)
    if BIAS:
        tl.store(out + groups * outer * inner + row, bias_total.to(out.dtype.element_ty), first & (o < outer))


@triton.jit(do_not_specialize=["channels", "pixels", "blocks"])
def pixel_squares(a, out, channels, pixels, blocks, WIDTH: tl.constexpr):
    """Float64 `[B, groups, *]`: the sum over a group's channels of the squared activations."""
    program = tl.program_id(0)
    block = (program // blocks).to(tl.int64)
    pixel = (program % blocks).to(tl.int64) * WIDTH + tl.arange(0, WIDTH)
    a += block * channels * pixels + pixel
    total = tl.zeros([WIDTH], tl.float64)
    for channel in range(0, channels.to(tl.int64)):
        x = wide(tl.load(a + channel * pixels, pixel < pixels, 0.0)).to(tl.float64)
        total += x * x
    tl.store(out + block * pixels + pixel, total, pixel < pixels)


@triton.jit(do_not_specialize=["positions", "outer", "blocks", *_GEOMETRY])
def window_lengths(
    squares, g, lengths, positions, outer, blocks,
    size0, size1, size2, out1, out2, taps, kernel1, kernel2, stride0, stride1, stride2,
    before0, before1, before2, dilation0, dilation1, dilation2,
    AXES: tl.constexpr, BIAS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """R = sum over t of |a_t| |g_t|, for WIDTH positions of one group of one sample: `lengths [B, groups, blocks]`."""
    program = tl.program_id(0)
    block = (program // blocks).to(tl.int64)
    t = program % blocks * WIDTH + tl.arange(0, WIDTH)
    there = t < positions
    u0, u1, u2 = _corner(t, out1, out2, stride0, stride1, stride2, before0, before1, before2)
    squares += block * size0 * size1 * size2
    window = tl.full([WIDTH], 1.0 if BIAS else 0.0, tl.float64)  # a bias is one more input, always 1
    for k in range(taps):
        v0, v1, v2 = _tap(k, kernel1, kernel2, dilation0, dilation1, dilation2)
        inside = _inside(u0 + v0, u1 + v1, u2 + v2, size0, size1, size2, AXES)
        at = ((u0 + v0).to(tl.int64) * size1 + (u1 + v1)) * size2 + (u2 + v2)
        window += tl.load(squares + at, there & inside, 0.0)
    g += block * outer * positions + t
    backprop = tl.zeros([WIDTH], tl.float64)
    for o in range(0, outer.to(tl.int64)):
        y = wide(tl.load(g + o * positions, there, 0.0)).to(tl.float64)
        backprop += y * y
    length = tl.sqrt(window * backprop)  # of squares from 2^-298 to 2^256 times their number
    tl.store(lengths + program, tl.sum(tl.where(there, length, 0.0)))


@triton.jit
def _added(parts, group, groups, count, PARTS: tl.constexpr):
    """`[G]` of `parts [groups, count]`."""
    total = tl.zeros([group.shape[0], PARTS], tl.float64)
    for start in range(0, count, PARTS):
        part = start + tl.arange(0, PARTS)
        mask = (group < groups)[:, None] & (part < count)[None, :]
        total += tl.load(parts + group.to(tl.int64)[:, None] * count + part[None, :], mask, 0.0)
    return tl.sum(total, axis=1)


@triton.jit(do_not_specialize=["groups", "tiles", "blocks", "error0", "error1", "growth0", "growth1"])
def finish_groups(
    squares, lengths, norm_sq, groups, tiles, blocks, error0, error1, growth0, growth1,
    GROUPS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """The groups of one sample are gradients of their own: the sum of (n + error R)^2, rounded up."""
    sample = tl.program_id(0).to(tl.int64)
    squares, lengths = squares + sample * groups * tiles, lengths + sample * groups * blocks
    total = tl.zeros([GROUPS], tl.float64)
    for start in range(0, groups, GROUPS):
        group = start + tl.arange(0, GROUPS)
        above = tl.sqrt(_added(squares, group, groups, tiles, PARTS))
        above += joined(error0, error1) * _added(lengths, group, groups, blocks, PARTS)
        total += above * above
    tl.store(norm_sq + sample, round_up(tl.sum(total) * joined(growth0, growth1)))


def _geometry(
    activations: Tensor, backprops: Tensor, kernel_size: Sequence[int], stride: Any, padding: Any, dilation: Any
) -> tuple[int, ...]:
    """As the kernels take it, with three axes."""
    axes = _axes(kernel_size, stride, padding, dilation)
    missing = 3 - len(axes)
    ones, zeros = (1,) * missing, (0,) * missing
    return (
        *ones, *activations.shape[2:], *(ones + backprops.shape[2:])[1:],
        math.prod(kernel_size), *(ones + tuple(kernel_size))[1:],
        *ones, *(axis.stride for axis in axes), *zeros, *(axis.before for axis in axes),
        *ones, *(axis.dilation for axis in axes),
    )  # fmt: skip


def _launch(inner: int, outer: int, positions: int, device: torch.device) -> tuple[int, dict[str, int]]:
    """Tiles of a group, and the options."""
    sizes = layers(device)

    def fit(size: int, most: int) -> int:
        return max(16, min(triton.next_power_of_2(size), most))  # the least that `tl.dot` takes

    tile = {"INNER": fit(inner, sizes.conv_inner), "OUTER": fit(outer, sizes.conv_outer)}
    tiles = triton.cdiv(inner, tile["INNER"]) * triton.cdiv(outer, tile["OUTER"])
    chain = fit(positions, sizes.conv_chain)
    return tiles, {**tile, "CHAIN": chain, "num_warps": sizes.conv_warps, "num_stages": 1}


def conv_norm_sq(
    activations: Tensor,
    backprops: Tensor,
    kernel_size: Sequence[int],
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    bias: bool = False,
) -> Tensor:
    a, g, device = plain(activations), plain(backprops), activations.device
    samples, outputs = g.shape[:2]
    norm_sq = torch.empty(samples, dtype=torch.float32, device=device)
    if not samples:
        return norm_sq
    geometry = _geometry(a, g, kernel_size, stride, padding, dilation)
    channels, outer, positions, pixels = (
        a.shape[1] // groups,
        outputs // groups,
        math.prod(g.shape[2:]),
        a[0, 0].numel(),
    )
    inner, each, flags = channels * math.prod(kernel_size), samples * groups, {"AXES": len(kernel_size), "BIAS": bias}
    tiles, options = _launch(inner, outer, positions, device)
    width, blocks = layers(device).conv_width, triton.cdiv(positions, layers(device).conv_width)
    narrow = {"WIDTH": width, **config(device).options(layers(device).conv_width_warps)}
    squares = torch.empty(each, tiles, dtype=torch.float64, device=device)
    sources = torch.empty(each, pixels, dtype=torch.float64, device=device)
    lengths = torch.empty(each, blocks, dtype=torch.float64, device=device)
    # The computed norm may be off by e, and so may the sum. What vanishes is less than T sqrt(O J) 2^-126 in either,
    # which is to be compared with a norm above 2^-63. The rest are roundings of float64.
    error = 2 * float(sum_error(torch.ones((), dtype=torch.float64), positions, torch.float32))
    terms = outputs * (inner + 1) + 2 * (inner + outer + positions) + 32
    growth = 1 + terms * 2.0**-52 + positions * math.sqrt(outputs * (inner + 1)) * 2.0**-60
    sizes = config(device)
    lanes = min(triton.next_power_of_2(groups), sizes.finish_tile)
    # fmt: off
    with on(device):
        tile_norms[(each * tiles,)](a, g, squares, positions, inner, outer, groups, *geometry, **flags, **options)
        pixel_squares[(each * triton.cdiv(pixels, width),)](
            a, sources, channels, pixels, triton.cdiv(pixels, width), **narrow
        )
        window_lengths[(each * blocks,)](sources, g, lengths, positions, outer, blocks, *geometry, **flags, **narrow)
        finish_groups[(samples,)](
            squares, lengths, norm_sq, groups, tiles, blocks, *double(error), *double(growth),
            GROUPS=lanes, PARTS=sizes.finish_tile // lanes, **sizes.options(sizes.finish_warps),
        )
    # fmt: on
    return norm_sq


def conv_clip_sum(
    activations: Tensor,
    backprops: Tensor,
    coef: Tensor,
    kernel_size: Sequence[int],
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    bias: bool = False,
) -> ConvSum:
    a, g, factors, device = plain(activations), plain(backprops), plain(coef), activations.device
    samples, outputs = g.shape[:2]
    channels, outer, positions = a.shape[1] // groups, outputs // groups, math.prod(g.shape[2:])
    inner, flags = channels * math.prod(kernel_size), {"AXES": len(kernel_size), "BIAS": bias}
    geometry = _geometry(a, g, kernel_size, stride, padding, dilation)
    tiles, options = _launch(inner, outer, positions, device)
    out = torch.empty(outputs * (inner + bias), dtype=torch.float32, device=device)
    if out.numel():
        splits = split(samples, groups * tiles, out.numel(), device)
        share = triton.cdiv(samples, splits)
        scratch = out if splits == 1 else torch.empty(splits, out.numel(), dtype=torch.float64, device=device)
        with on(device):
            tile_sums[(splits * groups * tiles,)](
                a, g, factors, scratch, samples, share, out.numel(), positions, inner, outer, groups,
                *geometry, **flags, **options,
            )  # fmt: skip
        if splits > 1:
            add(scratch, out)
    weight, shift = out[: outputs * inner], out[outputs * inner :]
    return ConvSum(weight.view(outputs, channels, *kernel_size), shift if bias else None)
