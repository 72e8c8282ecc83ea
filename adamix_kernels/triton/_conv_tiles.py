"""Tiles of the gradients of convolutions, which are never all written; nor are the windows.

A kernel loads the windows from where they lie in the activations. An input of a group is a channel and a tap of the
kernel; with 1 or 2 spatial axes the first ones have size 1. A tile is a float32 sum over the positions of one sample,
in chains of at most 64 products: within the `sum_error` e.
"""

from __future__ import annotations

import triton
import triton.language as tl

from adamix_kernels.triton.norm import wide

GEOMETRY = [
    "size0", "size1", "size2", "out1", "out2", "taps", "kernel1", "kernel2", "stride0", "stride1", "stride2",
    "before0", "before1", "before2", "dilation0", "dilation1", "dilation2",
]  # fmt: skip


@triton.jit
def corner(t, out1, out2, stride0, stride1, stride2, before0, before1, before2):
    """Where the window of position t begins, on each axis."""
    row = t // out2
    return row // out1 * stride0 - before0, row % out1 * stride1 - before1, t % out2 * stride2 - before2


@triton.jit
def tap_at(k, kernel1, kernel2, dilation0, dilation1, dilation2):
    """How far tap k is from there."""
    row = k // kernel2
    return row // kernel1 * dilation0, row % kernel1 * dilation1, k % kernel2 * dilation2


@triton.jit
def inside_of(x0, x1, x2, size0, size1, size2, AXES: tl.constexpr):
    """Not in the padding."""
    inside = (x2 >= 0) & (x2 < size2)
    if AXES > 1:
        inside = inside & (x1 >= 0) & (x1 < size1)
    if AXES > 2:
        inside = inside & (x0 >= 0) & (x0 < size0)
    return inside


@triton.jit
def _product(x, y, total):
    """Float32 `[J, O]` of `[J, T]` and `[O, T]`: exact products, on tensor cores for two bytes of one type."""
    if x.dtype == y.dtype and x.dtype != tl.float32:
        return tl.dot(x, tl.trans(y), total)
    else:
        return tl.dot(wide(x), tl.trans(wide(y)), total, input_precision="ieee")


@triton.jit
def _tile(program, channels, taps, outer, INNER: tl.constexpr, OUTER: tl.constexpr, ONE_TAP: tl.constexpr):
    """Of a program: the channels and taps `[J]` and the outputs `[O]` of its tile, and what is left of its number.

    `ONE_TAP`: all inputs of a tile are of one tap, a scalar. It takes fewer registers, and 16 channels at least.
    """
    if ONE_TAP:
        tiles = taps * tl.cdiv(channels, INNER)
        tile = program % tiles
        channel, tap = tile // taps * INNER + tl.arange(0, INNER), tile % taps
    else:
        tiles = tl.cdiv(channels * taps, INNER)
        tile = program % tiles
        j = tile * INNER + tl.arange(0, INNER)
        channel, tap = j // taps, j % taps
    outputs = tl.cdiv(outer, OUTER)
    o = program // tiles % outputs * OUTER + tl.arange(0, OUTER)
    return channel, tap, o, tile == 0, program // tiles // outputs


@triton.jit
def _gradient(
    a, g, count, positions, channel, channels, tap, o, outer, with_bias,
    size0, size1, size2, out1, out2, kernel1, kernel2, stride0, stride1, stride2,
    before0, before1, before2, dilation0, dilation1, dilation2,
    AXES: tl.constexpr, CHAIN: tl.constexpr, STEP: tl.constexpr, ONE_TAP: tl.constexpr,
):  # fmt: skip
    """Float32 `[J, O]`, over the first `count` positions of one group of one sample, which lies at a and g.

    And float64 `[O]` of the bias, where it is asked for.
    """
    v0, v1, v2 = tap_at(tap, kernel1, kernel2, dilation0, dilation1, dilation2)
    if not ONE_TAP:
        v0, v1, v2 = v0[:, None], v1[:, None], v2[:, None]
    a += channel.to(tl.int64)[:, None] * size0 * size1 * size2 + ((v0 * size1 + v1).to(tl.int64) * size2 + v2)
    g += (o.to(tl.int64) * positions)[:, None]
    weight = tl.zeros([channel.shape[0], o.shape[0]], tl.float32)
    bias = tl.zeros([o.shape[0]], tl.float64)
    for first in range(0, count, CHAIN):
        chain = tl.zeros_like(weight)
        for start in range(first, tl.minimum(first + CHAIN, count), STEP):
            t = start + tl.arange(0, STEP)[None, :]
            u0, u1, u2 = corner(t, out1, out2, stride0, stride1, stride2, before0, before1, before2)
            inside = inside_of(u0 + v0, u1 + v1, u2 + v2, size0, size1, size2, AXES) & (t < count)
            at = (u0 * size1 + u1).to(tl.int64) * size2 + u2
            x = tl.load(a + at, inside & (channel < channels)[:, None], 0.0)
            y = tl.load(g + t, (t < count) & (o < outer)[:, None], 0.0)
            chain = _product(x, y, chain)
            if with_bias:
                bias += tl.sum(wide(y), axis=1).to(tl.float64)
        weight += chain
    return weight, bias


@triton.jit(do_not_specialize=["channels", "outer", "groups", *GEOMETRY])
def tile_norms(
    a, g, squares, positions, channels, outer, groups,
    size0, size1, size2, out1, out2, taps, kernel1, kernel2, stride0, stride1, stride2,
    before0, before1, before2, dilation0, dilation1, dilation2,
    AXES: tl.constexpr, BIAS: tl.constexpr, INNER: tl.constexpr, OUTER: tl.constexpr, CHAIN: tl.constexpr,
    STEP: tl.constexpr, ONE_TAP: tl.constexpr,
):  # fmt: skip
    """The sum of squares of one tile of the gradient of one group of one sample: `squares [B, groups, tiles]`."""
    program = tl.program_id(0)
    channel, tap, o, first, block = _tile(program, channels, taps, outer, INNER, OUTER, ONE_TAP)
    block = block.to(tl.int64)  # of B times groups
    weight, bias = _gradient(
        a + block * channels * size0 * size1 * size2, g + block * outer * positions, positions, positions,
        channel, channels, tap, o, outer, BIAS & first,
        size0, size1, size2, out1, out2, kernel1, kernel2, stride0, stride1, stride2,
        before0, before1, before2, dilation0, dilation1, dilation2, AXES, CHAIN, STEP, ONE_TAP,
    )  # fmt: skip
    weight = weight.to(tl.float64)  # beyond the channels and outputs 0, or NaN, but then R is not finite either
    tl.store(squares + program, tl.sum(weight * weight) + tl.sum(bias * bias))


@triton.jit(do_not_specialize=["samples", "share", "size", "channels", "outer", "groups", *GEOMETRY])
def tile_sums(
    a, g, coef, out, samples, share, size, positions, channels, outer, groups,
    size0, size1, size2, out1, out2, taps, kernel1, kernel2, stride0, stride1, stride2,
    before0, before1, before2, dilation0, dilation1, dilation2,
    AXES: tl.constexpr, BIAS: tl.constexpr, INNER: tl.constexpr, OUTER: tl.constexpr, CHAIN: tl.constexpr,
    STEP: tl.constexpr, ONE_TAP: tl.constexpr,
):  # fmt: skip
    """One tile of the sum over `share` samples, into its own part of `out [splits, size]`: the weight, then the bias.

    Each sample is summed over its positions before its factor and the others, in float64.
    """
    program = tl.program_id(0)
    channel, tap, o, first, rest = _tile(program, channels, taps, outer, INNER, OUTER, ONE_TAP)
    group, split = (rest % groups).to(tl.int64), (rest // groups).to(tl.int64)
    weight_total, bias_total = tl.zeros([INNER, OUTER], tl.float64), tl.zeros([OUTER], tl.float64)
    for sample in range(split * share, tl.minimum(split * share + share, samples)):
        c = wide(tl.load(coef + sample)).to(tl.float64)
        count = tl.where(c > 0, positions, 0)  # what is clipped away is not read
        block = sample * groups + group
        weight, bias = _gradient(
            a + block * channels * size0 * size1 * size2, g + block * outer * positions, count, positions,
            channel, channels, tap, o, outer, BIAS & first,
            size0, size1, size2, out1, out2, kernel1, kernel2, stride0, stride1, stride2,
            before0, before1, before2, dilation0, dilation1, dilation2, AXES, CHAIN, STEP, ONE_TAP,
        )  # fmt: skip
        c = tl.where(c > 0, c, 0.0)
        weight_total += c * weight.to(tl.float64)
        bias_total += c * bias
    row = group * outer + o
    place = out + split * size + row[None, :] * (channels * taps) + (channel * taps + tap)[:, None]
    mask = (channel < channels)[:, None] & (o < outer)[None, :]
    tl.store(place, weight_total.to(out.dtype.element_ty), mask)
    if BIAS:
        place = out + split * size + groups * outer * channels.to(tl.int64) * taps + row
        tl.store(place, bias_total.to(out.dtype.element_ty), first & (o < outer))
