"""Privacy first, for the CUDA kernels on their emulator: what one sample can add to a sum is bounded."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction
from typing import Any

import pytest
import torch
from emulated_cuda import device
from hypothesis import given, settings
from hypothesis import strategies as st
from test_bounds import SLACK, dtypes, gradients, never_below, norm, reaches, rounding, thresholds, unlucky_rows
from torch import Tensor

from adamix_kernels import Noise, clip_coef, clip_sum, clip_sum_noise, cuda, grad_norm_sq

TINY = torch.finfo(torch.float32).tiny
both_versions = pytest.mark.parametrize("resident", [True, False], ids=["resident", "two readings"])


def clipped(parts: Any, threshold: float, resident: bool) -> Any:
    """Their sum, and that it was made by the version asked for."""
    with device(shared=100 << 10) as emulated:
        out = cuda._clip_sum_noise(parts, threshold, resident=resident)
        assert bool(emulated.cooperative_launches) == resident
    return out


def exact_norm_sq(row: Tensor) -> Fraction:
    return sum((Fraction(x) ** 2 for x in row.double().flatten().tolist()), Fraction(0))


@both_versions
def test_norms_of_unlucky_rows_are_not_below_the_exact_ones(resident: bool) -> None:
    for row in (row for row in unlucky_rows() if row.shape[1] <= 1024 or not resident):  # what fits the small device
        rows = torch.cat([row, torch.zeros(9, row.shape[1])])
        assert never_below(clipped(rows, 1.0, resident).norm_sq[0], row)


@both_versions
@settings(max_examples=120, deadline=None)
@given(seed=st.integers(0, 10**6), width=st.integers(1, 300), reach=reaches, threshold=thresholds, dtype=dtypes)
def test_one_sample_adds_at_most_the_threshold(
    resident: bool, seed: int, width: int, reach: float, threshold: float, dtype: torch.dtype
) -> None:
    row = gradients(seed, (1, width), reach, dtype)
    rows = torch.cat([row, torch.zeros(9, width, dtype=dtype)])  # zeros add nothing
    out = clipped(rows, threshold, resident)
    if math.isfinite(out.norm_sq[0]):
        assert Fraction(float(out.norm_sq[0])) >= exact_norm_sq(row) * (1 - Fraction(1, 10**14))
    assert norm(out.sum) <= threshold * SLACK + rounding(out.sum)


@both_versions
@settings(max_examples=80, deadline=None)
@given(seed=st.integers(0, 10**6), size=st.integers(6, 40), reach=reaches, threshold=st.floats(1e-3, 1e3), dtype=dtypes)
def test_adding_a_sample_moves_the_sum_by_at_most_the_threshold(
    resident: bool, seed: int, size: int, reach: float, threshold: float, dtype: torch.dtype
) -> None:
    parts = [gradients(seed + i, (size + 1, *shape), 0.0, dtype) for i, shape in enumerate([(3, 5), (1,), (7,)])]
    for i, part in enumerate(parts):
        part[-1] = gradients(seed + 9 + i, tuple(part.shape[1:]), reach, dtype)
    more = clipped(parts, threshold, resident).sum
    fewer = clipped([p[:-1] for p in parts], threshold, resident).sum
    moved = norm([a.double() - b.double() for a, b in zip(more, fewer, strict=True)])
    assert moved <= threshold * SLACK + 2**-23 * (norm(more) + norm(fewer))


@both_versions
def test_bad_samples_add_exactly_nothing(resident: bool) -> None:
    rows = gradients(0, (9, 300), 0.5, torch.float32)
    spoilt = rows.clone()
    spoilt[1, 299], spoilt[4, 0], spoilt[5, 128] = torch.nan, torch.inf, -torch.inf
    kept = rows.clone()
    kept[[1, 4, 5]] = 0
    assert torch.equal(clipped(spoilt, 0.5, resident).sum, clipped(kept, 0.5, resident).sum)


@both_versions
def test_no_element_escapes_the_norm(resident: bool) -> None:
    """One large element in an otherwise small row, at every column: each must be seen, tails included."""
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        for width in (131, 264):
            rows = torch.full((width, width), 1e-3, dtype=dtype)
            rows.fill_diagonal_(100.0)
            assert (clipped(rows, 1.0, resident).norm_sq >= 10_000).all()


@both_versions
def test_tiny_and_huge_rows_of_float64(resident: bool) -> None:
    values = [5e-324, 1e-310, 1e-200, 1e-170, 1e-162, 1e-160, 1e-150, 1e-100, 1e-20, 1e150, 1e200, 1e300]
    rows = torch.tensor(values, dtype=torch.float64)
    for threshold in [1e-300, 1e-180, 1e-56, 1e-54, 1e-30, 1.0, 1e300]:
        for i, value in enumerate(values):
            alone = torch.zeros(12, 4, dtype=torch.float64)
            alone[i] = rows[i]
            got = norm(clipped(alone, threshold, resident).sum)
            assert got <= threshold * SLACK, f"{value} adds {got / threshold:.3g} of the threshold {threshold}"


def test_tiny_rows_of_float32() -> None:
    for value, c in [(1e-21, 1e-25), (1e-30, 1e-33), (1e-42, 1e-50), (1e-19, 1e-21), (1e-19, 1e-35), (3e-23, 1e-24)]:
        for resident in (True, False):
            alone = torch.zeros(12, 40)
            alone[7] = value
            got = norm(clipped(alone, c, resident).sum)
            assert got <= c * SLACK, f"{value} adds {got / c:.3g} of the threshold {c}"


def test_no_norm_is_below_the_smallest_normal_number() -> None:
    rows = torch.tensor([[0.0], [5e-324], [1e-170], [1e-23], [1e-19], [1.0842021e-19]], dtype=torch.float64)
    with device():
        for x in (rows, torch.zeros(2, 0), torch.zeros(2, 0, dtype=torch.float64)):
            assert (grad_norm_sq(x) == TINY).all()
        narrow = grad_norm_sq(rows.float())
        assert (narrow >= TINY).all() and (narrow <= TINY * (1 + 1e-6)).all()


def test_denormal_squares_are_made_good() -> None:
    """Squares just below 2^-150 vanish: without the term for them, 2^20 columns would be missing 2^-130."""
    row = torch.full((1, 1 << 20), 2.0**-75 * 0.99)
    row[0, 0] = 1.1 * 2.0**-63
    with device():
        reported = Fraction(float(grad_norm_sq(row)))
    assert reported >= (len(row[0]) - 1) * Fraction(float(row[0, 1])) ** 2 + Fraction(float(row[0, 0])) ** 2


def test_factors_are_rounded_down() -> None:
    generator = torch.Generator().manual_seed(0)
    for c in (1.0, 0.1, 0.7, 3e-7, 123.456, math.pi * 1e12):
        size = 10 ** (torch.rand(400, generator=generator, dtype=torch.float64) * 8 - 2)
        norm_sq = (size * c**2).float()
        with device():
            coefs = clip_coef(norm_sq, c)
            # The same arithmetic inside the sums: a column of ones gives the factors' sum.
            single = [clip_sum(torch.ones(1, 1, dtype=torch.float64), coefs[i : i + 1]).item() for i in (0, 1)]
        assert single == coefs[:2].tolist()
        for coef, n in zip(coefs.tolist(), norm_sq.tolist(), strict=True):
            assert Fraction(coef) ** 2 * Fraction(n) <= Fraction(c) ** 2 * (1 + Fraction(1, 2**50))


@both_versions
def test_factors_inside_the_sum_are_those_of_clip_coef(resident: bool) -> None:
    rows = gradients(3, (40, 50), 0.0, torch.float64)
    norm_sq = clipped(rows, 0.7, resident).norm_sq
    with device():
        coefs = clip_coef(norm_sq, 0.7)
    for i in range(0, 40, 7):
        alone = torch.zeros_like(rows)
        alone[i] = rows[i]
        expected = coefs[i].double() * rows[i]
        torch.testing.assert_close(clipped(alone, 0.7, resident).sum, expected, rtol=1e-15, atol=0)


def test_factors_are_normal_numbers_or_zero() -> None:
    for c, expected in [(TINY * 1.5, TINY * 1.5), (TINY, TINY), (TINY * 0.99, 0.0), (1e-45, 0.0), (1e-300, 0.0)]:
        with device():
            assert clip_coef(torch.ones(1), c).item() == expected


def test_thresholds_in_device_memory() -> None:
    rows = gradients(5, (12, 60), 0.0, torch.float32)
    for value, dtype in itertools.product([0.0, 0.75, -1.0, math.nan, math.inf], [torch.float32, torch.bfloat16]):
        threshold = torch.tensor(value, dtype=dtype)
        expected = clip_sum_noise.reference(rows, threshold).sum
        for resident in (True, False):
            with device(shared=100 << 10):
                got = cuda._clip_sum_noise(rows, threshold, resident=resident).sum
            torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)
    with device():
        noisy = clip_sum_noise(rows[:0], torch.tensor(0.75), 2.0, Noise(seed=1)).sum
    torch.testing.assert_close(noisy, (1.5 * Noise(seed=1).normal(0, 0, 60)).float())
