"""The adaptive threshold: a quantile of public per-sample gradient norms."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from adamix_kernels.ops._cases import randn
from adamix_kernels.ops._numerics import check_number
from adamix_kernels.spec import Case, Cost, Out, define_op


def rank_of(count: int, q: float) -> int:
    """How many of `count` values must lie at or below the quantile; 0.9 * 10 counts as 9 despite rounding."""
    return max(1, math.ceil(count * q * (1 - 1e-12)))


def _cases() -> list[Case]:
    def case(name: str, size: int, q: float) -> Case:
        return Case(name, lambda g: {"norm_sq": randn(g, size) ** 2, "q": q})

    return [
        case("one", 1, 0.9),
        case("ten", 10, 0.9),
        case("odd", 101, 0.37),
        case("smallest", 50, 0.0),
        case("largest", 50, 1.0),
        Case("nan", lambda g: {"norm_sq": torch.tensor([2.0, torch.nan, 1.0, torch.nan, 3.0]).double(), "q": 0.6}),
        Case("ties", lambda g: {"norm_sq": torch.tensor([1.0, 2.0, 2.0, 2.0, 3.0]).double(), "q": 0.5}),
    ]


def _check(norm_sq: Tensor, q: float) -> None:
    check_number("q", q)
    if not 0 <= q <= 1:
        raise ValueError(f"q is {q}; pass a fraction in [0, 1]")
    if norm_sq.numel() == 0:
        raise ValueError("norm_sq is empty; a quantile needs at least one (public) sample")


@define_op(
    shapes={"norm_sq": "N"},
    returns=[Out("norm", "", rtol=1e-6)],
    oracle=lambda norm_sq, q: norm_sq.sort().values[rank_of(norm_sq.numel(), q) - 1].sqrt(),
    cases=_cases,
    cost=lambda norm_sq, q: Cost(4 * norm_sq.numel(), norm_sq.numel()),
    validate=_check,
)
def norm_quantile(norm_sq: Tensor, q: float) -> Tensor:
    """The smallest norm that at least a fraction `q` of the samples do not exceed.

    For public samples only: a quantile of private norms is itself private.

    Args:
        norm_sq: squared norms `[N]`, N >= 1, as `grad_norm_sq` gives them.
        q: the fraction, in [0, 1]; 1 gives the largest norm.

    Returns:
        Scalar float32 on the same device, without waiting for it: one of the norms, not interpolated.
    """
    return norm_sq.double().kthvalue(rank_of(norm_sq.numel(), q)).values.sqrt().float()
