"""Convolutions: norms and clipped sums of their gradients, and what the norms leave room for."""

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
from adamix_kernels.ops.conv import ConvSum, conv_axes
from adamix_kernels.triton._conv_tiles import GEOMETRY, corner, inside_of, tap_at, tile_norms, tile_sums
from adamix_kernels.triton._partials import add, split
from adamix_kernels.triton._random import double as joined
from adamix_kernels.triton.launch import config, double, layers, on
from adamix_kernels.triton.norm import round_up, wide


@triton.jit(do_not_specialize=["channels", "pixels", "blocks"])
def pixel_squares(a, out, channels, pixels, blocks, WIDTH: tl.constexpr):
    """Float64 `[B, groups, *]`: squared activations added up over a group's channels, which all taps then share."""
    program = tl.program_id(0)
    block = (program // blocks).to(tl.int64)
    pixel = (program % blocks).to(tl.int64) * WIDTH + tl.arange(0, WIDTH)
    a += block * channels * pixels + pixel
    total = tl.zeros([WIDTH], tl.float64)
    for channel in range(0, channels.to(tl.int64)):
        x = wide(tl.load(a + channel * pixels, pixel < pixels, 0.0)).to(tl.float64)
        total += x * x
    tl.store(out + block * pixels + pixel, total, pixel < pixels)


@triton.jit(do_not_specialize=["positions", "outer", "blocks", *GEOMETRY])
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
    u0, u1, u2 = corner(t, out1, out2, stride0, stride1, stride2, before0, before1, before2)
    squares += block * size0 * size1 * size2
    window = tl.full([WIDTH], 1.0 if BIAS else 0.0, tl.float64)  # a bias is one more input, always 1
    for k in range(taps):
        v0, v1, v2 = tap_at(k, kernel1, kernel2, dilation0, dilation1, dilation2)
        inside = inside_of(u0 + v0, u1 + v1, u2 + v2, size0, size1, size2, AXES)
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
    axes = conv_axes(kernel_size, stride, padding, dilation)
    missing = 3 - len(axes)
    ones, zeros = (1,) * missing, (0,) * missing
    return (
        *ones, *activations.shape[2:], *(ones + backprops.shape[2:])[1:],
        math.prod(kernel_size), *(ones + tuple(kernel_size))[1:],
        *ones, *(axis.stride for axis in axes), *zeros, *(axis.before for axis in axes),
        *ones, *(axis.dilation for axis in axes),
    )  # fmt: skip


def _launch(channels: int, taps: int, outer: int, positions: int, device: torch.device) -> tuple[int, dict[str, int]]:
    """Tiles of a group, and the options."""
    sizes = layers(device)

    def fit(size: int, most: int) -> int:
        return max(16, min(triton.next_power_of_2(size), most))  # the least that `tl.dot` takes

    one_tap = channels >= 16
    inner = fit(channels, sizes.conv_inner) if one_tap else fit(channels * taps, sizes.conv_mixed)
    outputs, chain = fit(outer, sizes.conv_outer), fit(positions, sizes.conv_chain)
    tiles = taps * triton.cdiv(channels, inner) if one_tap else triton.cdiv(channels * taps, inner)
    tile = {"INNER": inner, "OUTER": outputs, "CHAIN": chain, "STEP": min(chain, sizes.conv_step), "ONE_TAP": one_tap}
    return tiles * triton.cdiv(outer, outputs), {**tile, **sizes.tile_options()}


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
    channels, outer = a.shape[1] // groups, outputs // groups
    positions, pixels = math.prod(g.shape[2:]), math.prod(a.shape[2:])
    inner, each, flags = channels * math.prod(kernel_size), samples * groups, {"AXES": len(kernel_size), "BIAS": bias}
    tiles, options = _launch(channels, math.prod(kernel_size), outer, positions, device)
    width, blocks = layers(device).conv_width, triton.cdiv(positions, layers(device).conv_width)
    narrow = {"WIDTH": width, **config(device).options(layers(device).conv_width_warps)}
    squares = torch.empty(each, tiles, dtype=torch.float64, device=device)
    sources = torch.empty(each, pixels, dtype=torch.float64, device=device)
    lengths = torch.empty(each, blocks, dtype=torch.float64, device=device)
    # The norm computed here may be off by e, and so may the sum. Products below 2^-126 may vanish, in either: T of them
    # in each of O J entries, beside a norm above 2^-63. (What goes into tensor cores is not flushed, nor is it by the
    # instructions for float32: Fasi et al. 2021 on the former.) The rest are roundings of float64.
    error = 2 * float(sum_error(torch.ones((), dtype=torch.float64), positions, torch.float32))
    terms = outputs * (inner + 1) + 2 * (inner + outer + positions) + 32
    growth = 1 + terms * 2.0**-52 + positions * math.sqrt(outputs * (inner + 1)) * 2.0**-60
    sizes = config(device)
    lanes = min(triton.next_power_of_2(groups), sizes.finish_tile // 4)
    # fmt: off
    with on(device):
        tile_norms[(each * tiles,)](a, g, squares, positions, channels, outer, groups, *geometry, **flags, **options)
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
    tiles, options = _launch(channels, math.prod(kernel_size), outer, positions, device)
    out = torch.empty(outputs * (inner + bias), dtype=torch.float32, device=device)
    if out.numel():
        splits = split(samples, groups * tiles, out.numel(), device)
        share = triton.cdiv(samples, splits)
        scratch = out if splits == 1 else torch.empty(splits, out.numel(), dtype=torch.float64, device=device)
        with on(device):
            tile_sums[(splits * groups * tiles,)](
                a, g, factors, scratch, samples, share, out.numel(), positions, channels, outer, groups,
                *geometry, **flags, **options,
            )  # fmt: skip
        if splits > 1:
            add(scratch, out)
    weight, shift = out[: outputs * inner], out[outputs * inner :]
    return ConvSum(weight.view(outputs, channels, *kernel_size), shift if bias else None)
