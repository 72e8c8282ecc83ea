"""Clipping per-sample gradients to a threshold, summing them, and the noise on the sum."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from adamix_kernels.ops._cases import grad_cases, rand, randn
from adamix_kernels.ops._numerics import as_list, check_number, round_down, sum_dtype, weighted_sum
from adamix_kernels.ops.noise import Noise, add_gaussian_noise_
from adamix_kernels.ops.norm import grad_norm_sq
from adamix_kernels.spec import Case, Cost, Out, define_op


class ClippedSum(NamedTuple):
    """`sum`: noisy, shaped as one sample's gradient or list of them. `norm_sq`: `[B]` before clipping, private."""

    sum: Any
    norm_sq: Tensor


def check_mechanism(
    max_grad_norm: float | Tensor, noise_multiplier: float = 0.0, noise: Noise | None = None, **_: Any
) -> None:
    """The checks of every op that clips and adds noise. A threshold on the device is not read: that would wait."""
    check_number("max_grad_norm", max_grad_norm, scalar_tensor=True)
    check_number("noise_multiplier", noise_multiplier)
    if not isinstance(max_grad_norm, Tensor):
        if not max_grad_norm > 0:
            raise ValueError(f"max_grad_norm is {max_grad_norm}; pass a number above 0")
        if math.isinf(max_grad_norm) and noise_multiplier:
            raise ValueError(
                f"max_grad_norm is inf with noise_multiplier {noise_multiplier}; noise needs a finite threshold"
            )
    if not 0 <= noise_multiplier < math.inf:
        raise ValueError(f"noise_multiplier is {noise_multiplier}; pass a finite number >= 0")
    if (
        noise_multiplier
        and not isinstance(max_grad_norm, Tensor)
        and math.isinf(float(noise_multiplier) * max_grad_norm)
    ):
        raise ValueError(f"noise_multiplier is {noise_multiplier}; times max_grad_norm {max_grad_norm} it is infinite")
    if noise_multiplier and not isinstance(noise, Noise):
        raise ValueError(f"noise is {noise!r} with noise_multiplier {noise_multiplier}; pass adamix_kernels.Noise()")


def add_mechanism_noise_(
    sums: Any, max_grad_norm: float | Tensor, noise_multiplier: float, noise: Noise | None
) -> None:
    """Noise of standard deviation `noise_multiplier * max_grad_norm`; a bf16 threshold must not round it down."""
    if noise_multiplier:
        assert noise is not None  # check_mechanism
        threshold = max_grad_norm.double() if isinstance(max_grad_norm, Tensor) else max_grad_norm
        add_gaussian_noise_(sums, float(noise_multiplier) * threshold, noise)


def clip_oracle(norm_sq: Tensor, max_grad_norm: float | Tensor) -> Tensor:
    threshold = float(max_grad_norm)
    values = [min(1.0, threshold / math.sqrt(n)) if n > 0 else 1.0 for n in norm_sq.tolist()]
    usable = [math.isfinite(n) and n <= torch.finfo(torch.float32).max for n in norm_sq.tolist()]
    return torch.tensor([v if ok else 0.0 for v, ok in zip(values, usable, strict=True)], dtype=torch.float64)


def sum_oracle(part: Tensor, coef: Tensor) -> Tensor:
    total = torch.zeros(part.shape[1:], dtype=torch.float64)
    for row, c in zip(part, coef.tolist(), strict=True):
        if c > 0:
            total = total + c * row
    return total


def _coef_cases() -> list[Case]:
    values = [0.0, 1e-40, 1e-6, 0.25, 0.2500001, 1.0, 1e12, 3e38, math.inf, math.nan]
    fixed = torch.tensor(values, dtype=torch.float64)
    return [
        Case("awkward values", lambda g: {"norm_sq": fixed, "max_grad_norm": 0.5}),
        Case("random", lambda g: {"norm_sq": randn(g, 50) ** 2, "max_grad_norm": 0.7}),
        Case("threshold tensor", lambda g: {"norm_sq": rand(g, 9), "max_grad_norm": torch.tensor(0.3).double()}),
        Case("no threshold", lambda g: {"norm_sq": rand(g, 9), "max_grad_norm": math.inf}),
        Case("empty batch", lambda g: {"norm_sq": rand(g, 0), "max_grad_norm": 1.0}),
    ]


@define_op(
    shapes={"norm_sq": "B"},
    returns=[Out("coef", "B", rtol=1e-6)],
    oracle=clip_oracle,
    cases=_coef_cases,
    cost=lambda norm_sq, max_grad_norm: Cost(8 * norm_sq.numel(), 3 * norm_sq.numel()),
    validate=check_mechanism,
)
def clip_coef(norm_sq: Tensor, max_grad_norm: float | Tensor) -> Tensor:
    """Factors `min(1, max_grad_norm / norm)`, rounded down, that clip each sample.

    Args:
        norm_sq: squared norms `[B]`, as `grad_norm_sq` gives them.
        max_grad_norm: the threshold, above 0 (`inf`: no clipping), or a scalar tensor on the same device.

    Returns:
        `[B]` float32 in [0, 1]; exactly 0 where `norm_sq` is not finite, or where it would be below 1.2e-38.

    Source: Abadi et al. 2016 (arXiv 1607.00133), Algorithm 1.
    """
    threshold = max_grad_norm.double() if isinstance(max_grad_norm, Tensor) else float(max_grad_norm)
    coef = round_down((threshold / norm_sq.double().sqrt()).clamp(max=1.0))
    # 0 / 0 (threshold and norm both 0) is NaN: such a sample has nothing to give.
    return coef.where(norm_sq.isfinite() & ~coef.isnan(), 0.0)


@define_op(
    shapes={"grad_sample": "B *[]", "coef": "B"},
    returns=[Out("sum", "*", rtol=1e-6, of_max=True)],
    oracle=lambda grad_sample, coef: [sum_oracle(p, coef) for p in as_list(grad_sample)],
    cases=lambda: grad_cases(coef=lambda g, size: (rand(g, size) * 1.2 - 0.2).clamp(min=0) * _usable(size)),
    cost=lambda grad_sample, coef: grad_norm_sq.cost(grad_sample),
)
def clip_sum(grad_sample: Tensor | Sequence[Tensor], coef: Tensor) -> Any:
    """Sum over samples of `coef[b] * grad_sample[b]`.

    Args:
        grad_sample: per-sample gradients `[B, *]`, or a list of such tensors.
        coef: factors `[B]`, as `clip_coef` gives them. A sample with factor 0 adds exactly 0, even if it holds NaN.

    Returns:
        `[*]` (or a list), each float32, or float64 if its own input is. A sum, not a mean; zeros for an empty batch.
    """
    sums = [weighted_sum(p, coef).to(sum_dtype(p)) for p in as_list(grad_sample)]
    return sums[0] if isinstance(grad_sample, Tensor) else sums


def _usable(size: int) -> Tensor:
    """Zero for the rows that `with_bad_rows` spoils, as `clip_coef` would give."""
    usable = torch.ones(size, dtype=torch.float64)
    usable[[i for i in (1, 3) if i < size]] = 0.0
    return usable


def _fused_oracle(
    grad_sample: Any, max_grad_norm: float | Tensor, noise_multiplier: float, noise: Noise | None
) -> tuple[list[Tensor], Tensor]:
    norm_sq = grad_norm_sq.oracle(grad_sample)
    coef = clip_oracle(norm_sq, max_grad_norm)
    sums = [sum_oracle(p, coef) for p in as_list(grad_sample)]
    if noise_multiplier and noise is not None:
        add_gaussian_noise_.oracle(sums, noise_multiplier * float(max_grad_norm), noise)
    return sums, norm_sq


def _fused_cases() -> list[Case]:
    def fixed(value: Any) -> Any:
        return lambda g, size: value

    quiet = grad_cases(max_grad_norm=fixed(1.0), noise_multiplier=fixed(0.0), noise=fixed(None))
    noisy = grad_cases(
        max_grad_norm=fixed(torch.tensor(0.8, dtype=torch.float64)),
        noise_multiplier=fixed(1.3),
        noise=lambda g, size: Noise(seed=size),
    )
    return quiet + [Case(f"{c.name}, noise", c.build, c.strided) for c in noisy]


@define_op(
    shapes={"grad_sample": "B *[]"},
    returns=[Out("sum", "*", rtol=2e-6, of_max=True), Out("norm_sq", "B", rtol=1e-6, never_below=True)],
    oracle=_fused_oracle,
    cases=_fused_cases,
    cost=lambda grad_sample, **_: grad_norm_sq.cost(grad_sample),
    validate=check_mechanism,
)
def clip_sum_noise(
    grad_sample: Tensor | Sequence[Tensor],
    max_grad_norm: float | Tensor,
    noise_multiplier: float = 0.0,
    noise: Noise | None = None,
) -> ClippedSum:
    """The Gaussian mechanism on per-sample gradients: clip each to `max_grad_norm`, sum, add noise.

    Args:
        grad_sample: per-sample gradients `[B, *]`, or a list of such tensors; the norm is over the whole list.
        max_grad_norm: the threshold tau, or a scalar tensor on the same device (it is not read on the host).
        noise_multiplier: noise standard deviation over tau, on the sum; 0 adds none.
        noise: source of the noise; needed unless `noise_multiplier` is 0.

    Returns:
        `ClippedSum(sum, norm_sq)`, as `clip_sum` and `grad_norm_sq` give them. Adding or removing one sample moves the
        sum, before its noise, by at most tau (1 + 1e-6) and its rounding; a sample with a NaN or Inf contributes 0. An
        empty batch gives noise alone.

    Source: Abadi et al. 2016 (arXiv 1607.00133), Algorithm 1.
    """
    norm_sq = grad_norm_sq(grad_sample)
    sums = clip_sum(grad_sample, clip_coef(norm_sq, max_grad_norm))
    add_mechanism_noise_(sums, max_grad_norm, noise_multiplier, noise)
    return ClippedSum(sums, norm_sq)
