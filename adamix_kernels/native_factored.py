"""The compiled CPU kernels on factored gradients: backend "cpp" of the ops on layers and on the softmax head."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from adamix_kernels.memory import plain
from adamix_kernels.native import CPU, compiled, dtype_of
from adamix_kernels.native import register as register_all
from adamix_kernels.ops._factored import by_gram
from adamix_kernels.ops._numerics import as_list
from adamix_kernels.ops.conv import ConvSum, conv_axes, conv_clip_sum, conv_norm_sq
from adamix_kernels.ops.conv_clip import ConvClippedSum, conv_norm_clip_sum
from adamix_kernels.ops.conv_grad import ConvGrad, conv_grad_sample
from adamix_kernels.ops.head import HeadSum, softmax_head_clip_sum_noise
from adamix_kernels.ops.head_variants import softmax_head_coordinates
from adamix_kernels.ops.linear import LinearSum, linear_clip_sum, linear_norm_sq
from adamix_kernels.ops.noise import Noise

#: The kernels here compute in float32.
register = functools.partial(register_all, dtypes=(torch.float32, torch.bfloat16, torch.float16))


def address(x: Tensor) -> tuple[int, Any]:
    return x.data_ptr(), dtype_of(x.dtype)


def draw(noise: Noise | None, std: float) -> tuple[list[int], int, float] | None:
    """What a kernel is told of the noise, for which it takes a draw."""
    return None if noise is None else (noise._key, noise.next_draw(), std)


def _layer(activations: Tensor, backprops: Tensor) -> tuple[Tensor, Tensor, tuple[int, int, int, int]]:
    """Both as plain memory, and B, T, I, O."""
    a, g = plain(activations), plain(backprops)
    return a, g, (a.shape[0], math.prod(a.shape[1:-1]), a.shape[-1], g.shape[-1])


@register(linear_norm_sq, "activations", "backprops")
def _linear_norm_sq(activations: Tensor, backprops: Tensor, bias: bool, method: str) -> Tensor:
    a, g, sizes = _layer(activations, backprops)
    gram = by_gram("cpp", *sizes[1:]) if method == "auto" else method == "gram"
    out = torch.empty(len(a), dtype=torch.float32, device=CPU)
    compiled().linear_norm_sq(address(a), address(g), *sizes, bias, gram, out.data_ptr(), torch.get_num_threads())
    return out


@register(linear_clip_sum, "activations", "backprops", "coef", "std")
def _linear_clip_sum(
    activations: Tensor,
    backprops: Tensor,
    coef: Tensor,
    bias: bool,
    noise: Noise | None,
    std: float | Tensor,
) -> LinearSum:
    a, g, sizes = _layer(activations, backprops)
    factors, (inputs, outputs) = plain(coef), sizes[2:]
    weight = torch.empty(outputs, inputs, dtype=torch.float32, device=CPU)
    shift = torch.empty(outputs, dtype=torch.float32, device=CPU) if bias else None
    compiled().linear_clip_sum(
        address(a),
        address(g),
        address(factors),
        *sizes,
        weight.data_ptr(),
        0 if shift is None else shift.data_ptr(),
        draw(noise if isinstance(std, Tensor) or std else None, float(std)),
        torch.get_num_threads(),
    )
    return LinearSum(weight, shift)


def _conv(
    activations: Tensor, backprops: Tensor, kernel_size: Any, stride: Any, padding: Any, dilation: Any, groups: int
) -> tuple[tuple[Any, ...], int, int]:
    """A convolution in three axes, as its kernels take it; positions; inputs of a window."""
    axes = conv_axes(kernel_size, stride, padding, dilation)
    missing = [1] * (3 - len(axes))
    sizes, outs = [*missing, *activations.shape[2:]], [*missing, *backprops.shape[2:]]
    kernel = [*missing, *(axis.kernel for axis in axes)]
    strides, dilations = [*missing, *(axis.stride for axis in axes)], [*missing, *(axis.dilation for axis in axes)]
    before = [*(0 for _ in missing), *(axis.before for axis in axes)]
    inputs, outputs = activations.shape[1], backprops.shape[1]
    shape = (inputs, outputs, groups, sizes, outs, kernel, strides, before, dilations)
    return shape, math.prod(outs), inputs // groups * math.prod(kernel)


@register(conv_norm_sq, "activations", "backprops")
def _conv_norm_sq(activations: Tensor, backprops: Tensor, *, groups: int, bias: bool, **settings: Any) -> Tensor:
    a, g = plain(activations), plain(backprops)
    shape, positions, window = _conv(a, g, groups=groups, **settings)
    out = torch.empty(len(a), dtype=torch.float32, device=CPU)
    gram = by_gram("cpp", positions, window, g.shape[1] // groups)
    compiled().conv_norm_sq(address(a), address(g), len(a), shape, bias, gram, out.data_ptr(), torch.get_num_threads())
    return out


@register(conv_clip_sum, "activations", "backprops", "coef")
def _conv_clip_sum(
    activations: Tensor, backprops: Tensor, coef: Tensor, *, groups: int, bias: bool, **settings: Any
) -> ConvSum:
    a, g, factors = plain(activations), plain(backprops), plain(coef)
    shape, _, _ = _conv(a, g, groups=groups, **settings)
    outputs = g.shape[1]
    weight = torch.empty(outputs, a.shape[1] // groups, *settings["kernel_size"], dtype=torch.float32, device=CPU)
    shift = torch.empty(outputs, dtype=torch.float32, device=CPU) if bias else None
    compiled().conv_clip_sum(
        address(a),
        address(g),
        address(factors),
        len(a),
        shape,
        weight.data_ptr(),
        0 if shift is None else shift.data_ptr(),
        torch.get_num_threads(),
    )
    return ConvSum(weight, shift)


@register(conv_grad_sample, "activations", "backprops")
def _conv_grad_sample(activations: Tensor, backprops: Tensor, *, groups: int, bias: bool, **settings: Any) -> ConvGrad:
    a, g = plain(activations), plain(backprops)
    shape, _, _ = _conv(a, g, groups=groups, **settings)
    samples, outputs = g.shape[:2]
    size = (samples, outputs, a.shape[1] // groups, *settings["kernel_size"])
    weight = torch.empty(size, dtype=torch.float32, device=CPU)
    shift = torch.empty(samples, outputs, dtype=torch.float32, device=CPU) if bias else None
    compiled().conv_grad_sample(
        address(a),
        address(g),
        samples,
        shape,
        weight.data_ptr(),
        0 if shift is None else shift.data_ptr(),
        torch.get_num_threads(),
    )
    return ConvGrad(weight, shift)


@register(
    conv_norm_clip_sum,
    *("activations", "backprops", "norm_sq", "max_grad_norm"),
    computes_in=("activations", "backprops"),
)
def _conv_norm_clip_sum(
    activations: Tensor,
    backprops: Tensor,
    norm_sq: Tensor | Sequence[Tensor],
    max_grad_norm: float | Tensor,
    *,
    groups: int,
    bias: bool,
    **settings: Any,
) -> ConvClippedSum:
    a, g = plain(activations), plain(backprops)
    shape, _, _ = _conv(a, g, groups=groups, **settings)
    if not compiled().conv_by_samples(shape):
        with torch.no_grad():
            return conv_norm_clip_sum.reference(a, g, norm_sq, max_grad_norm, groups=groups, bias=bias, **settings)
    outputs, others = g.shape[1], [plain(part) for part in as_list(norm_sq)]
    total = torch.empty(len(a), dtype=torch.float64, device=CPU)
    weight = torch.empty(outputs, a.shape[1] // groups, *settings["kernel_size"], dtype=torch.float32, device=CPU)
    shift = torch.empty(outputs, dtype=torch.float32, device=CPU) if bias else None
    compiled().conv_norm_clip_sum(
        address(a),
        address(g),
        [address(part) for part in others],
        len(a),
        shape,
        float(max_grad_norm),
        total.data_ptr(),
        weight.data_ptr(),
        0 if shift is None else shift.data_ptr(),
        torch.get_num_threads(),
    )
    return ConvClippedSum(weight, shift, total)


def _head(
    features: Tensor, labels: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[tuple[Any, ...], list[Tensor | None]]:
    """A head as its kernels take it, and the memory that must outlive the call."""
    x, y, w = plain(features), plain(labels.long()), plain(weight.float())
    b = None if bias is None else plain(bias.float())
    described = (address(x), y.data_ptr(), w.data_ptr(), 0 if b is None else b.data_ptr(), *x.shape, len(w))
    return described, [x, y, w, b]


@register(softmax_head_clip_sum_noise, "features", "labels", "weight", "bias", "max_grad_norm")
def _softmax_head_clip_sum_noise(
    features: Tensor,
    labels: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    max_grad_norm: float | Tensor,
    noise_multiplier: float,
    noise: Noise | None,
) -> HeadSum:
    described, _alive = _head(features, labels, weight, bias)
    threshold = float(max_grad_norm)
    sums = torch.empty(weight.shape, dtype=torch.float32, device=CPU)
    shift = None if bias is None else torch.empty(len(bias), dtype=torch.float32, device=CPU)
    norm_sq = torch.empty(len(features), dtype=torch.float32, device=CPU)
    loss = compiled().softmax_head(
        *described,
        threshold,
        sums.data_ptr(),
        0 if shift is None else shift.data_ptr(),
        norm_sq.data_ptr(),
        draw(noise if noise_multiplier else None, noise_multiplier * threshold),
        torch.get_num_threads(),
    )
    return HeadSum(sums, shift, norm_sq, torch.tensor(loss, dtype=torch.float32, device=CPU))


@register(softmax_head_coordinates, "features", "labels", "weight", "bias", "basis")
def _softmax_head_coordinates(
    features: Tensor, labels: Tensor, weight: Tensor, basis: Tensor, bias: Tensor | None
) -> Tensor:
    described, _alive = _head(features, labels, weight, bias)
    directions = plain(basis.float())
    out = torch.empty(len(features), len(basis), dtype=torch.float32, device=CPU)
    compiled().softmax_head_coordinates(
        *described, directions.data_ptr(), len(basis), out.data_ptr(), torch.get_num_threads()
    )
    return out
