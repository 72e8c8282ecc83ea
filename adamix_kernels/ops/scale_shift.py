"""Affine parts of normalisation layers: a scale and a shift per channel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor

from adamix_kernels.ops._cases import randn
from adamix_kernels.ops._factored import (
    always,
    blocks,
    check_flags,
    half_coef,
    layer_case,
    layer_cases,
    layer_cost,
    own_error,
    positions_axis,
    weight_and_bias,
)
from adamix_kernels.ops._numerics import round_up, sum_dtype, weighted_sum
from adamix_kernels.ops.clip import clip_sum
from adamix_kernels.ops.norm import grad_norm_sq
from adamix_kernels.spec import Case, Cost, Out, define_op


class ScaleShiftSum(NamedTuple):
    """`weight`: `[D]`. `bias`: `[D]`, or None."""

    weight: Tensor
    bias: Tensor | None


def _terms(a: Tensor, g: Tensor, bias: bool) -> list[Tensor]:
    """Float64 `[B, T, D]`, for the weight and for the bias; summed over T they are the gradients."""
    product = a.double() * g.double()
    return [product, g.double()] if bias else [product]


def _grads(activations: Tensor, backprops: Tensor, bias: bool) -> list[Tensor]:
    each = [activations * backprops, backprops] if bias else [activations * backprops]
    return [positions_axis(x).sum(1) for x in each]


def _cases(**extra: Callable[[Generator, int], Any]) -> list[Case]:
    def shape(name: str, size: int, *rest: int) -> Case:
        def make(g: Generator, size: int) -> Tensor:
            return randn(g, size, *rest)

        return layer_case(name, size, (make, make), extra)

    def plain(g: Generator, size: int) -> Tensor:
        return randn(g, size, 4, 13)

    return [
        *layer_cases(plain, plain, **extra),
        shape("no position axis", 5, 40),
        shape("no positions", 2, 0, 3),
        shape("two position axes", 3, 6, 5, 8),
        shape("many positions", 2, 300, 2),
        shape("one channel", 4, 7, 1),
    ]


def _both(**extra: Callable[[Generator, int], Any]) -> list[Case]:
    return [
        Case(f"{c.name}{'' if bias else ', no bias'}", c.build, c.strided)
        for bias in (True, False)
        for c in _cases(bias=always(bias), **extra)
    ]


def _cost(activations: Tensor, backprops: Tensor, bias: bool = True, **_: Any) -> Cost:
    return layer_cost(activations, backprops, (2 + bias) * activations.numel(), activations.shape[-1])


@define_op(
    shapes={"activations": "B * D", "backprops": "B * D"},
    returns=[Out("norm_sq", "B", rtol=1e-6, never_below=True)],
    oracle=lambda **layer: grad_norm_sq.oracle(_grads(**layer)),
    cases=_both,
    cost=_cost,
    validate=check_flags,
)
def scale_shift_norm_sq(activations: Tensor, backprops: Tensor, bias: bool = True) -> Tensor:
    """Squared norm of each sample's gradient of a normalisation layer's weight and bias, rounded up.

    Args:
        activations: what the scale multiplies, the normalised input `[B, *, D]`, channels last.
        backprops: gradients with respect to the layer's outputs `[B, *, D]`.
        bias: whether the layer has a trainable bias; its gradient is part of the norm.

    Returns:
        `[B]` float32, never below the exact value nor 1.2e-38, Inf where it is not finite; guarded as `linear_norm_sq`.

    Raises:
        TypeError, ValueError: names the argument that does not fit (its dtype, one of float32, bfloat16, float16 and
            float64; its shape; its value), what was given and what to pass.
    """
    a, g = positions_axis(activations), positions_axis(backprops)
    samples, positions, width = a.shape
    total = torch.zeros(samples, dtype=torch.float64, device=a.device)
    for b in blocks(samples, positions * width):
        for terms in _terms(a[b], g[b], bias):
            # Each channel is a linear layer with one input and one output, so R is the sum of its absolute terms.
            error = own_error(terms.abs().sum(1), positions)
            total[b] += (terms.sum(1).abs() + 2 * error).square().sum(1)
    return round_up(total, terms=2 * width + 16)


@define_op(
    shapes={"activations": "B * D", "backprops": "B * D", "coef": "B"},
    returns=[Out("weight", "D", rtol=1e-6, of_max=True), Out("bias", "D", rtol=1e-6, of_max=True)],
    oracle=lambda coef, **layer: weight_and_bias(clip_sum.oracle(_grads(**layer), coef)),
    cases=lambda: _both(coef=half_coef),
    cost=_cost,
    validate=check_flags,
)
def scale_shift_clip_sum(activations: Tensor, backprops: Tensor, coef: Tensor, bias: bool = True) -> ScaleShiftSum:
    """Sum over samples of `coef[b]` times the gradient of a normalisation layer's weight and bias.

    Args:
        activations: the normalised input `[B, *, D]`, channels last.
        backprops: gradients with respect to the layer's outputs `[B, *, D]`.
        coef: factors `[B]`, as `clip_coef` gives them. A sample with factor 0 adds exactly 0, even if it holds NaN.
        bias: whether to sum the gradient of the bias too.

    Returns:
        `ScaleShiftSum(weight, bias)` float32, float64 if activations or backprops are.

    Raises:
        TypeError, ValueError: names the argument that does not fit (its dtype, one of float32, bfloat16, float16 and
            float64; its shape; its value), what was given and what to pass.
    """
    a, g = positions_axis(activations), positions_axis(backprops)
    samples, positions, width = a.shape
    sums = torch.zeros(1 + bias, width, dtype=torch.float64, device=a.device)
    for b in blocks(samples, positions * width):
        for i, terms in enumerate(_terms(a[b], g[b], bias)):
            sums[i] += weighted_sum(terms.sum(1), coef[b])
    return ScaleShiftSum(*weight_and_bias(sums.to(sum_dtype(activations, backprops)).unbind()))
