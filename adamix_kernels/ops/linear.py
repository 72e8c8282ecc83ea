"""Linear layers: norms and clipped sums of per-sample gradients G_b^T A_b that are never stored whole."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor

from adamix_kernels.ops._cases import randn
from adamix_kernels.ops._factored import (
    always,
    check_flags,
    factored_norm_sq,
    factored_sum,
    half_coef,
    layer_case,
    layer_cases,
    layer_cost,
    positions_axis,
    split_bias,
    weight_and_bias,
)
from adamix_kernels.ops._numerics import sum_dtype
from adamix_kernels.ops.clip import clip_sum
from adamix_kernels.ops.noise import Noise, add_gaussian_noise_, check_noise
from adamix_kernels.ops.norm import grad_norm_sq
from adamix_kernels.spec import Case, Cost, Out, define_op


class LinearSum(NamedTuple):
    """`weight`: `[O, I]`. `bias`: `[O]`, or None."""

    weight: Tensor
    bias: Tensor | None


def _one_group(x: Tensor) -> Tensor:
    return positions_axis(x)[:, None]


def _check_sum(bias: bool, noise: Noise | None, std: float | Tensor, **_: Any) -> None:
    check_flags(bias)
    if not isinstance(std, Tensor | float | int):
        raise TypeError(f"std is {type(std).__name__}; pass a number or a scalar tensor")
    if noise is not None or isinstance(std, Tensor) or std:
        check_noise(None, std, noise)


def _grads(activations: Tensor, backprops: Tensor, bias: bool) -> list[Tensor]:
    """The gradients themselves, one sample at a time: the definition of both ops."""
    a, g = positions_axis(activations), positions_axis(backprops)
    weight = torch.zeros(a.shape[0], g.shape[2], a.shape[2], dtype=torch.float64)
    for b in range(a.shape[0]):
        weight[b] = g[b].T @ a[b]
    return [weight, g.sum(1)] if bias else [weight]


def _sum_oracle(*, coef: Tensor, noise: Noise | None, std: float | Tensor, **layer: Any) -> Any:
    sums = clip_sum.oracle(_grads(**layer), coef)
    return weight_and_bias(add_gaussian_noise_.oracle(sums, std, noise) if noise is not None else sums)


def _shape(
    name: str,
    size: int,
    middle: tuple[int, ...],
    inner: int,
    outer: int,
    extra: Mapping[str, Callable[[Generator, int], Any]],
) -> Case:
    layer = (lambda g, size: randn(g, size, *middle, inner), lambda g, size: randn(g, size, *middle, outer))
    return layer_case(name, size, layer, extra)


def _cases(**extra: Callable[[Generator, int], Any]) -> list[Case]:
    return [
        *layer_cases(lambda g, size: randn(g, size, 3, 11), lambda g, size: randn(g, size, 3, 6), **extra),
        _shape("no position axis", 8, (), 33, 10, extra),
        _shape("one position", 5, (1,), 4, 3, extra),
        _shape("no positions", 3, (0,), 4, 3, extra),
        _shape("two position axes", 3, (4, 5), 6, 7, extra),
        _shape("many positions", 3, (70,), 3, 2, extra),
        _shape("one feature", 4, (6,), 1, 1, extra),
        _shape("no inputs", 3, (4,), 0, 3, extra),
        _shape("no outputs", 3, (4,), 3, 0, extra),
    ]


def _large_cases(**extra: Callable[[Generator, int], Any]) -> list[Case]:
    """Several tiles, chunks and threads in every kernel; the definition of noise is slow for so many numbers."""
    return [
        _shape("larger than blocks", 2, (131,), 70, 101, extra),
        _shape("long rows", 2, (3,), 1601, 5, extra),
    ]


def _norm_cases() -> list[Case]:
    return [
        Case(f"{c.name}, {method}{', bias' * bias}", c.build, c.strided)
        for method, bias in [("auto", False), ("gram", True), ("direct", True)]
        for c in [
            *_cases(bias=always(bias), method=always(method)),
            *_large_cases(bias=always(bias), method=always(method)),
        ]
    ]


def _sum_cases() -> list[Case]:
    def extra(make_noise: Callable[..., Noise | None], std: float, divisor: int) -> Any:
        bias = {"bias": lambda g, size: size % divisor == 0}
        return {"coef": half_coef, **bias, "noise": make_noise, "std": always(std)}

    quiet, noisy = extra(always(None), 0.0, 2), extra(lambda g, size: Noise(seed=size), 0.3, 3)
    named = [Case(f"{c.name}, noise", c.build, c.strided) for c in _cases(**noisy)]
    return [*_cases(**quiet), *_large_cases(**quiet), *named]


def _norm_cost(activations: Tensor, backprops: Tensor, **_: Any) -> Cost:
    (samples, *middle, inner), outer = activations.shape, backprops.shape[-1]
    positions = math.prod(middle)
    flops = samples * positions * min(positions * (inner + outer), 2 * inner * outer)
    return layer_cost(activations, backprops, flops, samples)


@define_op(
    shapes={"activations": "B * I", "backprops": "B * O"},
    returns=[Out("norm_sq", "B", rtol=1e-3, never_below=True)],
    oracle=lambda method, **layer: grad_norm_sq.oracle(_grads(**layer)),
    cases=_norm_cases,
    cost=_norm_cost,
    validate=check_flags,
)
def linear_norm_sq(activations: Tensor, backprops: Tensor, bias: bool = False, method: str = "auto") -> Tensor:
    """Squared norm of each sample's gradient of a linear layer, rounded up.

    Args:
        activations: the layer's inputs `[B, *, I]`, where `*` are positions that share the weight.
        backprops: gradients with respect to its outputs `[B, *, O]`.
        bias: whether the layer has a trainable bias; its gradient is part of the norm.
        method: "gram" multiplies positions with positions, "direct" inputs with outputs; "auto" takes the cheaper.

    Returns:
        `[B]` float32, never below the exact value nor 1.2e-38, as `grad_norm_sq`; Inf where that or a square on the
        way is not finite (in float32 for inputs narrower than float64). It is above by what the rounding of
        `linear_clip_sum` may add on any backend: the norm by e = (min(T, 64) + 16 + T / 128) 2^-23 R with
        R = sum_t |a_t| |g_t|, or 2^-50 (T + 2) R for float64, and by the rounding of the norm itself, which is smaller.
        That is 1e-5 to 1e-3 of ordinary norms and more where positions cancel. So `linear_clip_sum` with `clip_coef`
        of it takes at most max_grad_norm (1 + 1e-6) from a sample, and the rounding of the sum, whatever the input.

    Raises:
        TypeError, ValueError: names the argument that does not fit (its dtype, one of float32, bfloat16, float16 and
            float64; its shape; its value), what was given and what to pass.

    Source: Goodfellow 2015 (arXiv 1510.01799); Li et al. 2022 (arXiv 2110.05679) for T positions.
    """
    return factored_norm_sq(_one_group(activations), _one_group(backprops), bias, method)


@define_op(
    shapes={"activations": "B * I", "backprops": "B * O", "coef": "B"},
    returns=[Out("weight", "O I", rtol=1e-6, of_max=True), Out("bias", "O", rtol=1e-6, of_max=True)],
    oracle=_sum_oracle,
    cases=_sum_cases,
    cost=lambda activations, backprops, **_: layer_cost(
        activations,
        backprops,
        2 * activations.numel() * backprops.shape[-1],
        activations.shape[-1] * backprops.shape[-1],
    ),
    validate=_check_sum,
)
def linear_clip_sum(
    activations: Tensor,
    backprops: Tensor,
    coef: Tensor,
    bias: bool = False,
    noise: Noise | None = None,
    std: float | Tensor = 0.0,
) -> LinearSum:
    """Sum over samples of `coef[b]` times the gradient of a linear layer, and Gaussian noise.

    Args:
        activations: the layer's inputs `[B, *, I]`.
        backprops: gradients with respect to its outputs `[B, *, O]`.
        coef: factors `[B]`, as `clip_coef` gives them. A sample with factor 0 adds exactly 0, even if it holds NaN.
        bias: whether to sum the gradient of the bias too.
        noise: source of the noise; needed unless `std` is 0.
        std: standard deviation of the noise on each element of the sums, or a scalar tensor on the same device.

    Returns:
        `LinearSum(weight, bias)` float32, float64 if activations or backprops are; both share one draw of the noise.

    Raises:
        TypeError, ValueError: names the argument that does not fit (its dtype, one of float32, bfloat16, float16 and
            float64; its shape; its value), what was given and what to pass.
    """
    total = factored_sum(_one_group(activations), _one_group(backprops), coef, bias)[0]
    total = total.to(sum_dtype(activations, backprops))
    sums = split_bias(total, bias)
    if isinstance(std, Tensor) or std:
        assert noise is not None  # _check_sum
        add_gaussian_noise_(sums, std, noise)
    return LinearSum(*weight_and_bias(sums))
