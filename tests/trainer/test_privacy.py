"""Accounting: sigma for a budget, epsilon spent."""

from __future__ import annotations

import math
import warnings

import dp_accounting
import pytest
from dp_accounting.pld import PLDAccountant
from scipy import optimize, stats

from adamix.config import Config
from adamix.privacy import calibrate, dp_event, spent, spent_by_step, spent_on, warn_if_weak
from adamix_kernels import FastNoiseWarning, PoissonSampler, SamplingEvent


def gaussian_delta(mu: float, epsilon: float) -> float:
    """Balle and Wang 2018 (arXiv 1805.06530), Theorem 8."""
    return float(stats.norm.cdf(mu / 2 - epsilon / mu) - math.exp(epsilon) * stats.norm.cdf(-mu / 2 - epsilon / mu))


@pytest.mark.parametrize("epsilon", [0.1, 1.0, 3.0, 8.0])
@pytest.mark.parametrize("steps", [1, 20, 777])
@pytest.mark.parametrize("delta", [1e-5, 1e-9])
def test_full_batch_is_exactly_gaussian(epsilon: float, steps: int, delta: float) -> None:
    sigma = calibrate(epsilon, delta=delta, steps=steps)
    own = spent(sigma, delta=delta, steps=steps)
    assert epsilon - 1e-6 <= own <= epsilon
    closed_form = optimize.brentq(lambda e: gaussian_delta(math.sqrt(steps) / sigma, e) - delta, 1e-9, 100, xtol=1e-12)
    assert own == pytest.approx(closed_form, abs=1e-6)


@pytest.mark.parametrize(("sample_rate", "steps"), [(0.1, 50), (0.5, 20), (0.01, 300)])
def test_poisson_stays_within_the_budget_and_needs_less_noise(sample_rate: float, steps: int) -> None:
    sigma = calibrate(2.0, delta=1e-5, steps=steps, sample_rate=sample_rate)
    own = spent(sigma, delta=1e-5, steps=steps, sample_rate=sample_rate)
    assert 2.0 - 1e-4 <= own <= 2.0
    assert sigma < calibrate(2.0, delta=1e-5, steps=steps)


@pytest.mark.parametrize(
    ("epsilon", "delta", "steps", "sample_rate"),
    [
        (1e-3, 1e-5, 20, 0.9999),
        (1000.0, 1e-5, 20, 0.999),
        (3.0, 1e-300, 20, 0.1),
        (3.0, 1e-5, 1, 1e-6),
        (3.0, 1e-5, 1, 1e-300),
    ],
)
def test_awkward_poisson_budgets_end_and_hold(epsilon: float, delta: float, steps: int, sample_rate: float) -> None:
    sigma = calibrate(epsilon, delta=delta, steps=steps, sample_rate=sample_rate)
    assert spent(sigma, delta=delta, steps=steps, sample_rate=sample_rate) <= epsilon
    assert sigma <= calibrate(epsilon, delta=delta, steps=steps)


@pytest.mark.parametrize(("epsilon", "steps", "sample_rate"), [(8.0, 10, 0.2), (8.0, 5, 0.2), (50.0, 10, 0.9)])
def test_poisson_uses_the_budget_also_with_little_noise(epsilon: float, steps: int, sample_rate: float) -> None:
    sigma = calibrate(epsilon, delta=1e-5, steps=steps, sample_rate=sample_rate)
    assert sigma < 1 and epsilon - 1e-4 <= spent(sigma, delta=1e-5, steps=steps, sample_rate=sample_rate) <= epsilon


def test_poisson_of_rate_one_is_full_batch() -> None:
    assert spent(5.0, delta=1e-5, steps=10, sample_rate=1.0) == spent(5.0, delta=1e-5, steps=10)
    nearly = spent(5.0, delta=1e-5, steps=10, sample_rate=1 - 1e-9)
    assert nearly == pytest.approx(spent(5.0, delta=1e-5, steps=10), abs=1e-2)
    assert nearly >= spent(5.0, delta=1e-5, steps=10) - 1e-6, "the privacy loss distribution rounds up"


@pytest.mark.parametrize("sample_rate", [1.0, 0.3])
def test_epsilon_grows_step_by_step_to_what_was_spent(sample_rate: float) -> None:
    epsilons = spent_by_step(6.0, delta=1e-5, steps=50, sample_rate=sample_rate)
    assert len(epsilons) == 50 and epsilons == sorted(epsilons)
    for step in (1, 7, 50):
        assert epsilons[step - 1] >= spent(6.0, delta=1e-5, steps=step, sample_rate=sample_rate)
    assert epsilons[-1] == spent(6.0, delta=1e-5, steps=50, sample_rate=sample_rate)


def test_fast_noise_says_what_it_is_not() -> None:
    for config in (Config(epsilon=1.0, expected_batch_size=100), Config(epsilon=1.0, expected_batch_size=9, steps=2)):
        with pytest.warns(FastNoiseWarning, match='noise: mode "fast" is not hardened .* use mode "secure"'):
            warn_if_weak(config)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_if_weak(Config(epsilon=1.0, expected_batch_size=100, noise_mode="secure"))


def test_no_noise_is_no_privacy() -> None:
    assert calibrate(math.inf, delta=1e-5, steps=3) == 0
    assert spent(0.0, delta=1e-5, steps=3) == math.inf
    assert spent(0.0, delta=1e-5, steps=0) == 0
    with pytest.warns(UserWarning, match="NO NOISE"):
        warn_if_weak(Config(epsilon=math.inf, expected_batch_size=100))


def test_a_large_delta_is_warned_of() -> None:
    with pytest.warns(UserWarning, match=r"delta: 0.001 is at least 1/N for N = 1000"):
        warn_if_weak(Config(epsilon=1.0, delta=1e-3, expected_batch_size=100, sample_rate=0.1))
    with pytest.warns(UserWarning, match="noise_seed"):
        warn_if_weak(Config(epsilon=1.0, expected_batch_size=100, noise_seed=1))


@pytest.mark.parametrize("event", [SamplingEvent(0.02, 999), SamplingEvent(0.02, 999, 30), SamplingEvent(0.5, 40, 40)])
def test_events_of_a_sampler_cost_what_dp_accounting_says(event: SamplingEvent) -> None:
    own = PLDAccountant(dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE)
    own.compose(dp_accounting.SelfComposedDpEvent(dp_event(event, 1.1), 50))
    # A little more, for what rounding may hide of delta.
    assert own.get_epsilon(1e-5) < spent_on(event, 1.1, delta=1e-5, steps=50) < own.get_epsilon(1e-5 * (1 - 1e-8))


def test_what_a_sampler_mints_is_accounted_and_truncation_costs() -> None:
    plain, cut = PoissonSampler(1000, 0.02).event, PoissonSampler(1000, 0.02, max_batch_size=25).event
    assert spent_on(plain, 1.1, delta=1e-5, steps=50) == spent(1.1, delta=1e-5, steps=50, sample_rate=0.02)
    assert spent_on(plain, 1.1, delta=1e-5, steps=50) < spent_on(cut, 1.1, delta=1e-5, steps=50)
    assert spent_on(SamplingEvent(1.0, 10), 2.0, delta=1e-5, steps=3) == spent(2.0, delta=1e-5, steps=3)
    assert spent_on(cut, 0.0, delta=1e-5, steps=1) == math.inf
    assert spent_on(cut, 1.0, delta=1e-5, steps=0) == 0
    assert spent_on(cut, 0.4, delta=1e-5, steps=2) == spent(0.2, delta=1e-5, steps=2)
