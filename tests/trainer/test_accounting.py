"""Epsilon against other people's mathematics: a closed form for full batches, another accountant for Poisson ones."""

from __future__ import annotations

import importlib.util
import itertools
import json
import math
from pathlib import Path
from typing import Any

import mpmath
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prv_reference import GRID, bounds

from adamix import InputError, calibrate, spent
from adamix.privacy import spent_by_step, spent_on, spent_together
from adamix_kernels import SamplingEvent

pytestmark = pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")  # dp-accounting, at log(0)

RECORDED = json.loads((Path(__file__).parent / "prv_reference.json").read_text())
SIGMAS = [0.3, 0.7, 1.0, 1.7, 3.0, 10.0, 1000.0]
STEPS = [1, 2, 100, 1000, 10**5]
DELTAS = [1e-3, 1e-6, 1e-10, 1e-15]


def smallest(delta_of: Any, delta: float) -> mpmath.mpf:
    """The smallest epsilon with `delta_of(epsilon) <= delta`, by bisection with 40 digits."""
    with mpmath.workdps(40):
        low, high = mpmath.mpf(0), mpmath.mpf(1)
        if delta_of(low) <= delta:
            return low
        while delta_of(high) > delta:
            low, high = high, 2 * high
        for _ in range(80):
            middle = (low + high) / 2
            low, high = (middle, high) if delta_of(middle) > delta else (low, middle)
        return high


def gaussian(sigma: float, steps: int, delta: float) -> mpmath.mpf:
    """Balle and Wang 2018 (arXiv 1805.06530), Theorem 8, of one release with noise sigma / sqrt(steps)."""
    with mpmath.workdps(40):
        mu = mpmath.sqrt(steps) / mpmath.mpf(sigma)

        def delta_of(e: mpmath.mpf) -> mpmath.mpf:
            return mpmath.ncdf(mu / 2 - e / mu) - mpmath.exp(e) * mpmath.ncdf(-mu / 2 - e / mu)

        return smallest(delta_of, delta)


def sampled_once(q: float, sigma: float, delta: float) -> mpmath.mpf:
    """One Poisson batch: the hockey stick of (1 - q) N(0, s^2) + q N(1, s^2) and N(0, s^2), both ways.

    The likelihood ratio 1 - q + q exp((2 x - 1) / 2 s^2) increases with x, so each is a difference of tails.
    """
    with mpmath.workdps(40):
        q, s = mpmath.mpf(q), mpmath.mpf(sigma)

        def threshold(ratio: mpmath.mpf) -> mpmath.mpf:
            return s * s * mpmath.log((ratio - 1 + q) / q) + mpmath.mpf(1) / 2

        def upper(x: mpmath.mpf) -> tuple[mpmath.mpf, mpmath.mpf]:
            none, one = mpmath.ncdf(-x / s), mpmath.ncdf((1 - x) / s)
            return (1 - q) * none + q * one, none

        def delta_of(e: mpmath.mpf) -> mpmath.mpf:
            mixed, plain = upper(threshold(mpmath.exp(e)))
            removed = mixed - mpmath.exp(e) * plain
            if mpmath.exp(-e) <= 1 - q:
                return removed
            mixed, plain = (1 - tail for tail in upper(threshold(mpmath.exp(-e))))
            return max(removed, plain - mpmath.exp(e) * mixed)

        return smallest(delta_of, delta)


def test_full_batches_cost_what_the_closed_form_says() -> None:
    """To 1e-6 (2e-12 of epsilons above 1e6), and never less."""
    for sigma, steps, delta in itertools.product(SIGMAS, STEPS, DELTAS):
        truth, own = gaussian(sigma, steps, delta), spent(sigma, delta=delta, steps=steps)
        assert truth <= own <= truth * (1 + 2e-12) + 1e-6, (sigma, steps, delta)


def test_the_closed_form_is_checked_by_quadrature() -> None:
    """The definition itself: the integral of max(0, p - e^epsilon q)."""
    mu, e = 1.3, 0.8
    excess = mpmath.quad(
        lambda x: max(0, mpmath.npdf(x, mu, 1) - mpmath.exp(e) * mpmath.npdf(x)), [-12, mu / 2 + e / mu, 14]
    )
    assert float(gaussian(1 / mu, 1, float(excess))) == pytest.approx(e, abs=1e-9)
    assert spent(1 / mu, delta=float(excess), steps=1) == pytest.approx(e, abs=1e-9)


@pytest.mark.parametrize(
    ("q", "sigma"), [(0.001, 0.6), (0.01, 1.0), (0.05, 0.5), (0.1, 4.0), (0.5, 3.0), (0.9, 8.0), (0.3, 0.7)]
)
@pytest.mark.parametrize("delta", [1e-5, 1e-9])
def test_one_poisson_batch_costs_what_the_integral_says(q: float, sigma: float, delta: float) -> None:
    truth, own = sampled_once(q, sigma, delta), spent(sigma, delta=delta, steps=1, sample_rate=q)
    assert truth <= own <= truth + 2e-4  # the losses are rounded up to multiples of 1e-4


@pytest.mark.parametrize("case", [pytest.param(c, marks=[pytest.mark.slow] * (i % 6 != 4)) for i, c in enumerate(GRID)])
def test_poisson_batches_are_within_the_bounds_of_another_accountant(case: tuple[float, float, int, float]) -> None:
    q, sigma, steps, delta = case
    known = RECORDED[GRID.index(case)]
    assert (known["sample_rate"], known["noise_multiplier"], known["steps"], known["delta"]) == case
    assert known["upper"] - known["lower"] < 0.025
    own = spent(sigma, delta=delta, steps=steps, sample_rate=q)
    assert known["lower"] <= own <= known["upper"]
    # The bounds are fine enough to see an error: one step in a hundred more, or 1 % less noise, at many steps.
    if steps == 1000 and own > 3:
        assert spent(sigma * 0.99, delta=delta, steps=steps, sample_rate=q) > known["upper"]


def test_rounding_of_the_transforms_hides_nothing_of_a_small_delta() -> None:
    """Rows that take part but for once in 10^12 steps cost what full batches do, to 1e-6."""
    sigma, steps = math.sqrt(10**5) / 2, 10**5
    for delta in (1e-10, 1e-12, 1e-14):
        truth = gaussian(sigma, steps, delta)
        assert spent(sigma, delta=delta, steps=steps, sample_rate=1 - 1e-12) >= truth - 1e-6
        event = SamplingEvent(1 - 1e-12, 10, 1000)
        assert spent_on(event, sigma, delta=delta, steps=steps) >= truth - 1e-6
        runs = [(sigma, 1 - 1e-12, steps), (sigma, 1 - 2e-12, steps)]
        assert spent_together(runs, delta=delta) >= gaussian(sigma, 2 * steps, delta) - 1e-6


def test_full_batches_of_several_runs_cost_what_the_closed_form_says() -> None:
    for sigma, steps, delta in itertools.product(SIGMAS, STEPS, DELTAS):
        runs, truth = [(sigma, 1.0, steps), (2 * sigma, 1.0, 4 * steps)], gaussian(sigma, 2 * steps, delta)
        own = spent_together(runs, delta=delta)
        assert truth <= own <= truth * (1 + 2e-12) + 1e-6, (sigma, steps, delta)


@pytest.mark.skipif(importlib.util.find_spec("prv_accountant") is None, reason="prv-accountant is not installed")
@pytest.mark.parametrize("i", [2, 33])
def test_the_recorded_bounds_are_those_of_the_package(i: int) -> None:
    again = bounds(*GRID[i])
    assert again == pytest.approx(RECORDED[i], rel=1e-6)


@pytest.mark.parametrize("sample_rate", [1.0, 0.1])
def test_no_step_is_charged_less_than_it_cost(sample_rate: float) -> None:
    """What the trainer reports after each step is an upper bound there, and never falls."""
    charged = spent_by_step(4.0, delta=1e-5, steps=50, sample_rate=sample_rate)
    assert charged == sorted(charged) and len(charged) == 50
    for t in (1, 2, 7, 24, 25, 49, 50):
        assert charged[t - 1] >= spent(4.0, delta=1e-5, steps=t, sample_rate=sample_rate)
    if sample_rate == 1:
        assert all(charge >= gaussian(4.0, t + 1, 1e-5) for t, charge in enumerate(charged))


@settings(max_examples=60, deadline=None)
@given(
    epsilon=st.floats(-9, 3).map(lambda e: 10.0**e),
    delta=st.floats(-100, -0.01).map(lambda e: 10.0**e),
    steps=st.integers(1, 10**6),
)
def test_noise_for_a_budget_keeps_it(epsilon: float, delta: float, steps: int) -> None:
    sigma = calibrate(epsilon, delta=delta, steps=steps)
    assert gaussian(sigma, steps, delta) <= spent(sigma, delta=delta, steps=steps) <= epsilon


anything = st.one_of(
    st.floats(),
    st.integers(),
    st.none(),
    st.text(max_size=3),
    st.booleans(),
    st.just([1]),
    st.sampled_from([0.0, -1.0, 1e-320, 1e308, 10**400, math.nan, math.inf, 0.5]),
)


@settings(max_examples=200, deadline=None)
@given(sigma=anything, epsilon=anything, delta=anything, steps=anything, sample_rate=st.one_of(st.just(1.0), anything))
def test_whatever_is_given_the_answer_is_a_number_or_an_input_error(
    sigma: Any, epsilon: Any, delta: Any, steps: Any, sample_rate: Any
) -> None:
    for call in (lambda: spent(sigma, delta=delta, steps=steps, sample_rate=sample_rate),
                 lambda: calibrate(epsilon, delta=delta, steps=steps, sample_rate=sample_rate)):  # fmt: skip
        try:
            assert call() >= 0
        except InputError as error:
            assert str(error).split(":")[0] in ("noise_multiplier", "epsilon", "delta", "steps", "sample_rate")
            assert "pass" in str(error) and "\n" not in str(error)


def test_so_little_noise_that_it_has_no_meaning_is_still_charged_in_time() -> None:
    """Loss distributions of such runs take tens of gigabytes."""
    assert spent(0.5, delta=1e-5, steps=10**6, sample_rate=0.9) == spent(0.5, delta=1e-5, steps=10**6)
    assert spent(1e-200, delta=1e-5, steps=3) == math.inf
    runs = [(0.5, 0.9, 10**6), (0.5, 0.8, 10**6)]
    assert spent_together(runs, delta=1e-5) == pytest.approx(spent(0.5, delta=1e-5, steps=2 * 10**6), rel=1e-9)
    assert spent_together([(1e-200, 0.5, 3), (1.0, 1.0, 2)], delta=1e-5) == math.inf
