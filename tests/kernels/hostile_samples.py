"""Samples of layers, ordinary and adversarial, and what one of them contributes: for the tests of every backend."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from adamix_kernels.ops.clip import clip_coef

BOUND = 1 + 1e-6


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def hostile(seed: int, positions: int, inner: int, outer: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Factors `[T, I]`, `[T, O]` of one sample, ordinary and adversarial; T even."""
    a, g = randn(seed, positions, inner), randn(seed + 1, positions, outer)
    half = positions // 2
    spread = 10.0 ** (18 * torch.rand(positions, 1, generator=generator(seed), dtype=torch.float64))
    magnitudes = [(1, 1), (1e3, 1e3), (1e4, 1e-7), (1e18, 1), (1e18, 1e-18), (1e30, 1e-30), (1e-30, 1), (1e-42, 1e-3)]
    for scale_a, scale_g in magnitudes:
        yield a * scale_a, g * scale_g
    # Float64 alone holds these; squares underflow or overflow where the gradient does neither.
    extremes = [(1e-170, 1), (1e-170, 1e-170), (1e-300, 1e290), (1e200, 1e-200), (1e150, 1e-165), (1e153, 1e-163)]
    for scale_a, scale_g in extremes:
        yield a * scale_a, g * scale_g
        yield a * scale_g, g * scale_a
        yield torch.cat([a[:half], a[:half]]) * scale_a, torch.cat([g[:half], -g[:half]]) * scale_g
    # Opposed: half of the positions take back what the others gave, but for `left` of it.
    for left in (0.0, 2.0**-23, 1e-6, 2.0**-8, 2.0**-11):
        for scale in (1.0, 1e3, 1e10, 1e18):
            pair_a = torch.cat([a[:half], a[:half]]) * scale
            pair_g = torch.cat([g[:half], -g[:half] * (1 + left)])
            yield pair_a, pair_g
            yield pair_a, pair_g * torch.cat([spread[:half], spread[:half]])
            yield pair_a.flip(0), pair_g * torch.cat([spread[:half], spread[:half]])
    # Large terms cancel and swallow a small one.
    swallowed = torch.cat([g[:half], -g[:half]]) * 1e17
    swallowed[half - 1], swallowed[-1] = g[half - 1], 0
    yield torch.cat([a[:half], a[:half]]), swallowed
    # A common direction of activations, and backprops that sum to about nothing.
    for offset in (1e4, 1e12):
        yield 1 + a / offset, g - g.mean(0)
        yield offset * torch.ones_like(a), torch.cat([g[:half] * spread[:half], -g[:half] * spread[:half]])


def flat_norm(sums: Any) -> float:
    parts = [sums] if isinstance(sums, Tensor) else [part for part in sums if part is not None]
    return math.hypot(*(float(part.double().norm()) for part in parts))


def worst_contribution(norm_sq: Tensor, clipped: Callable[[Tensor], Any]) -> float:
    """The largest contribution of one sample over the threshold, for thresholds of every kind."""
    norm = float(norm_sq.sqrt())
    thresholds = [1.0, 1e-3, 1e3, 1e-25] + [norm * f for f in (0.5, 1e-3, 1 - 1e-7) if 1e-30 < norm * f < math.inf]
    return max(flat_norm(clipped(clip_coef(norm_sq, c))) / c for c in thresholds)


SHAPES = [(2, 1, 1), (6, 3, 5), (16, 20, 9), (64, 8, 8), (4, 40, 30), (130, 4, 3)]


def samples(dtype: torch.dtype, shapes: list[tuple[int, int, int]] = SHAPES) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of one; what overflows in `dtype` is no finite input and is left out."""
    for seed, shape in enumerate(shapes):
        for factors in hostile(10 * seed, *shape):
            a, g = (x.to(dtype)[None] for x in factors)
            if a.isfinite().all() and g.isfinite().all():
                yield a, g


def exact_norm_sq(entries: dict[Any, list[tuple[float, float]]]) -> Fraction:
    """Of a gradient whose every entry is a sum of products."""
    return sum(
        (sum((Fraction(x) * Fraction(y) for x, y in e), Fraction(0)) ** 2 for e in entries.values()), Fraction(0)
    )
