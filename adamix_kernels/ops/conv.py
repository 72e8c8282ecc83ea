"""Convolutions in 1 to 3 dimensions: a linear layer on the windows of the input, one per channel group."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor
from torch.nn.functional import conv1d, conv2d, conv3d, pad

from adamix_kernels.ops._cases import randn
from adamix_kernels.ops._factored import (
    always,
    blocks,
    check_flags,
    factored_norm_sq,
    factored_sum,
    half_coef,
    layer_case,
    layer_cases,
    layer_cost,
    split_bias,
    weight_and_bias,
)
from adamix_kernels.ops._numerics import sum_dtype
from adamix_kernels.ops.clip import clip_sum
from adamix_kernels.ops.norm import grad_norm_sq
from adamix_kernels.spec import Case, Cost, Out, define_op


class ConvSum(NamedTuple):
    """`weight`: `[O, I / groups, *kernel_size]`. `bias`: `[O]`, or None."""

    weight: Tensor
    bias: Tensor | None


class _Axis(NamedTuple):
    """The settings of one spatial axis; padding before and after."""

    kernel: int
    stride: int
    before: int
    after: int
    dilation: int

    def count(self, size: int) -> int:
        """Windows on `size` inputs; 0 or less if not even one fits."""
        return (size + self.before + self.after - self.span) // self.stride + 1

    @property
    def span(self) -> int:
        return self.dilation * (self.kernel - 1) + 1


def _per_axis(name: str, value: Any, axes: int, least: int) -> tuple[int, ...]:
    values = tuple(value) if isinstance(value, tuple | list) else (value,) * axes
    if len(values) != axes or not all(isinstance(v, int) and least <= v < 2**31 for v in values):
        raise ValueError(f"{name} is {value!r}; pass an int >= {least} or a tuple of {axes} of them, as in kernel_size")
    return values


def conv_axes(kernel_size: Any, stride: Any, padding: Any, dilation: Any) -> list[_Axis]:
    """The settings of each spatial axis; asked for several times in a call, and the same for each."""
    given = [tuple(value) if isinstance(value, list) else value for value in (kernel_size, stride, padding, dilation)]
    try:
        return _axes(*given)
    except TypeError:  # not hashable: the message below tells what is wrong
        return _axes.__wrapped__(*given)


@functools.lru_cache(maxsize=256)
def _axes(kernel_size: Any, stride: Any, padding: Any, dilation: Any) -> list[_Axis]:
    if not isinstance(kernel_size, tuple | list) or not 1 <= len(kernel_size) <= 3:
        raise ValueError(f"kernel_size is {kernel_size!r}; pass a tuple of 1 to 3 ints, one per spatial axis")
    count = len(kernel_size)
    kernels = _per_axis("kernel_size", kernel_size, count, 1)
    strides, dilations = _per_axis("stride", stride, count, 1), _per_axis("dilation", dilation, count, 1)
    if isinstance(padding, str) and padding == "same":
        if strides != (1,) * count:
            raise ValueError(f"padding is 'same' with stride {stride!r}; 'same' needs stride 1")
        extra = [d * (k - 1) for k, d in zip(kernels, dilations, strict=True)]
        pads = [(e // 2, e - e // 2) for e in extra]
    elif isinstance(padding, str) and padding != "valid":
        raise ValueError(f"padding is {padding!r}; pass 'same', 'valid', an int or a tuple")
    else:
        pads = [(p, p) for p in _per_axis("padding", 0 if isinstance(padding, str) else padding, count, 0)]
    settings = zip(kernels, strides, pads, dilations, strict=True)
    return [_Axis(k, s, before, after, d) for k, s, (before, after), d in settings]


def validate(
    *,
    activations: Tensor,
    backprops: Tensor,
    kernel_size: Sequence[int],
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: int,
    bias: bool,
    **_: Any,
) -> None:
    check_flags(bias)
    axes = conv_axes(kernel_size, stride, padding, dilation)
    shape, outputs = list(activations.shape), backprops.shape[1]
    if len(shape) != 2 + len(axes):
        raise ValueError(
            f"activations has shape {shape}; expected [B, I] and {len(axes)} spatial axes as in kernel_size"
        )
    most = max(shape[1], outputs, 1)  # else without channels any number would divide them
    if not isinstance(groups, int) or not 1 <= groups <= most or shape[1] % groups or outputs % groups:
        raise ValueError(f"groups is {groups!r}; expected a divisor of I={shape[1]} and of O={outputs}, at most {most}")
    spatial = [axis.count(size) for axis, size in zip(axes, shape[2:], strict=True)]
    if min(spatial) < 1:
        raise ValueError(f"kernel_size is {kernel_size!r}; larger than the padded activations of shape {shape}")
    if list(backprops.shape[2:]) != spatial:
        raise ValueError(
            f"backprops has shape {list(backprops.shape)}; expected {[shape[0], outputs, *spatial]}, the output of "
            f"activations {shape} with kernel_size {kernel_size!r}, stride {stride!r}, padding {padding!r}, "
            f"dilation {dilation!r}"
        )


def _padded(x: Tensor, axes: Sequence[_Axis]) -> Tensor:
    return pad(x, [p for axis in reversed(axes) for p in (axis.before, axis.after)])


def windows(x: Tensor, axes: Sequence[_Axis], groups: int) -> Tensor:
    """`[B, I, *]` as `[B, groups, T, I / groups * kernel]`: the inputs that each output position sees."""
    n = len(axes)
    x = _padded(x, axes)
    for i, axis in enumerate(axes):
        x = x.unfold(2 + i, axis.span, axis.stride)[..., :: axis.dilation]
    x = x.reshape(x.shape[0], groups, x.shape[1] // groups, *x.shape[2:])  # [B, groups, I / groups, *out, *kernel]
    x = x.permute(0, 1, *range(3, 3 + n), 2, *range(3 + n, 3 + 2 * n))
    return x.reshape(*x.shape[:2], math.prod(x.shape[2 : 2 + n]), math.prod(x.shape[2 + n :]))


def grouped(g: Tensor, groups: int) -> Tensor:
    """`[B, O, *]` as `[B, groups, T, O / groups]`."""
    return g.reshape(g.shape[0], groups, g.shape[1] // groups, math.prod(g.shape[2:])).mT


def unit_of(activations: Tensor, backprops: Tensor, kernel_size: Sequence[int]) -> int:
    """Numbers in one sample's windows and backprops."""
    inputs = activations.shape[1] * math.prod(kernel_size)
    return (inputs + backprops.shape[1]) * math.prod(backprops.shape[2:])


def grads_of(
    *,
    activations: Tensor,
    backprops: Tensor,
    kernel_size: Sequence[int],
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: int,
    bias: bool,
) -> list[Tensor]:
    """The gradients themselves, by torch's own backward pass, one sample at a time."""
    conv = (conv1d, conv2d, conv3d)[len(kernel_size) - 1]
    samples, outputs = backprops.shape[:2]
    shape = (outputs, activations.shape[1] // groups, *kernel_size)
    weight = torch.zeros(samples, *shape, dtype=torch.float64)
    x = _padded(activations, conv_axes(kernel_size, stride, padding, dilation))
    for b in range(samples):
        with torch.enable_grad():
            w = torch.zeros(shape, dtype=torch.float64, requires_grad=True)
            y = conv(x[b : b + 1], w, None, stride, 0, dilation, groups)
        (weight[b],) = torch.autograd.grad(y, w, backprops[b : b + 1])
    return [weight, backprops.flatten(2).sum(2)] if bias else [weight]


def small_cases(**extra: Callable[[Generator, int], Any]) -> list[Case]:
    def setting(inputs: tuple[int, ...], outputs: tuple[int, ...], kernel: tuple[int, ...], **settings: Any) -> Any:
        full = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1, "bias": False, "kernel_size": kernel, **settings}
        keywords = {key: always(value) for key, value in full.items()}
        layer = (lambda g, size: randn(g, size, *inputs), lambda g, size: randn(g, size, *outputs))
        return layer, {**keywords, **extra}

    def case(name: str, *shapes: tuple[int, ...], **settings: Any) -> Case:
        layer, keywords = setting(*shapes, **settings)
        return layer_case(name, 3, layer, keywords)

    layer, keywords = setting((4, 6, 5), (3, 4, 3), (3, 3), bias=True)
    return [
        *layer_cases(*layer, **keywords),
        case("1-d, stride", (3, 11), (5, 5), (3,), stride=2),
        case("1-d, one by one", (3, 7), (5, 7), (1,)),
        case("2-d, padding, groups", (4, 5, 6), (6, 3, 6), (3, 3), stride=(2, 1), padding=1, groups=2),
        case("2-d, depthwise", (5, 4, 4), (5, 4, 4), (3, 3), padding=(1, 1), groups=5, bias=True),
        case("2-d, same, even kernel", (2, 5, 7), (3, 5, 7), (2, 4), padding="same", bias=True),
        case("2-d, same, dilation", (2, 6, 7), (3, 6, 7), (3, 2), padding="same", dilation=(2, 3)),
        case("2-d, dilation, unequal", (2, 9, 8), (4, 5, 4), (3, 2), dilation=(2, 1), padding="valid", stride=(1, 2)),
        case("2-d, larger than blocks", (20, 13, 12), (98, 13, 12), (3, 3), padding="same", bias=True),
        case("2-d, one window", (6, 3, 3), (8, 1, 1), (3, 3), bias=True),
        case("3-d", (2, 4, 5, 3), (4, 3, 3, 2), (2, 3, 2), groups=2),
        case("3-d, padding, stride", (2, 4, 4, 4), (3, 2, 2, 3), (3, 3, 2), stride=(2, 2, 2), padding=(1, 1, 1)),
    ]


def flops_of(activations: Tensor, backprops: Tensor, kernel_size: Sequence[int], groups: int) -> tuple[int, int]:
    """Of one sample, all groups: by positions with positions, by inputs with outputs."""
    positions = math.prod(backprops.shape[2:])
    inner, outer = activations.shape[1] // groups * math.prod(kernel_size), backprops.shape[1] // groups
    return groups * positions**2 * (inner + outer), groups * 2 * positions * inner * outer


def _norm_cost(activations: Tensor, backprops: Tensor, kernel_size: Sequence[int], groups: int = 1, **_: Any) -> Cost:
    samples, flops = activations.shape[0], min(flops_of(activations, backprops, kernel_size, groups))
    return layer_cost(activations, backprops, samples * flops, samples)


def _sum_cost(activations: Tensor, backprops: Tensor, kernel_size: Sequence[int], groups: int = 1, **_: Any) -> Cost:
    outputs = backprops.shape[1] * activations.shape[1] // groups * math.prod(kernel_size)
    flops = activations.shape[0] * flops_of(activations, backprops, kernel_size, groups)[1]
    return layer_cost(activations, backprops, flops, outputs)


@define_op(
    shapes={"activations": "B I ...", "backprops": "B O ..."},
    returns=[Out("norm_sq", "B", rtol=1e-3, never_below=True)],
    oracle=lambda **layer: grad_norm_sq.oracle(grads_of(**layer)),
    cases=small_cases,
    cost=_norm_cost,
    validate=validate,
)
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
    """Squared norm of each sample's gradient of a convolution, rounded up.

    Args:
        activations: the layer's inputs `[B, I, *]` with 1 to 3 spatial axes.
        backprops: gradients with respect to its outputs `[B, O, *]`.
        kernel_size, stride, padding, dilation, groups: as in `torch.nn.Conv2d`; the padding is with zeros.
        bias: whether the layer has a trainable bias; its gradient is part of the norm.

    Returns:
        `[B]` float32, never below the exact value nor 1.2e-38, Inf where it is not finite; guarded as `linear_norm_sq`.

    Raises:
        TypeError, ValueError: names the argument that does not fit (its dtype, one of float32, bfloat16, float16 and
            float64; its shape; its value), what was given and what to pass.
    """
    axes = conv_axes(kernel_size, stride, padding, dilation)
    parts = [
        factored_norm_sq(windows(activations[b], axes, groups), grouped(backprops[b], groups), bias)
        for b in blocks(activations.shape[0], unit_of(activations, backprops, kernel_size))
    ]
    return torch.cat(parts)


@define_op(
    shapes={"activations": "B I ...", "backprops": "B O ...", "coef": "B"},
    returns=[Out("weight", "O I/groups kernel", rtol=1e-6, of_max=True), Out("bias", "O", rtol=1e-6, of_max=True)],
    oracle=lambda coef, **layer: weight_and_bias(clip_sum.oracle(grads_of(**layer), coef)),
    cases=lambda: small_cases(coef=half_coef),
    cost=_sum_cost,
    validate=validate,
)
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
    """Sum over samples of `coef[b]` times the gradient of a convolution.

    Args:
        activations: the layer's inputs `[B, I, *]` with 1 to 3 spatial axes.
        backprops: gradients with respect to its outputs `[B, O, *]`.
        coef: factors `[B]`, as `clip_coef` gives them. A sample with factor 0 adds exactly 0, even if it holds NaN.
        kernel_size, stride, padding, dilation, groups: as in `torch.nn.Conv2d`; the padding is with zeros.
        bias: whether to sum the gradient of the bias too.

    Returns:
        `ConvSum(weight, bias)` float32, float64 if activations or backprops are.

    Raises:
        TypeError, ValueError: names the argument that does not fit (its dtype, one of float32, bfloat16, float16 and
            float64; its shape; its value), what was given and what to pass.
    """
    axes = conv_axes(kernel_size, stride, padding, dilation)
    parts = [
        factored_sum(windows(activations[b], axes, groups), grouped(backprops[b], groups), coef[b], bias)
        for b in blocks(activations.shape[0], unit_of(activations, backprops, kernel_size))
    ]
    total = torch.stack(parts).sum(0).to(sum_dtype(activations, backprops)).flatten(0, 1)
    weight, shift = weight_and_bias(split_bias(total, bias))
    return ConvSum(weight.reshape(backprops.shape[1], activations.shape[1] // groups, *kernel_size), shift)
