"""Lower bounds on epsilon: never above the truth but with the stated probability, near it, and above false claims."""

from __future__ import annotations

import math

import dp_accounting
import numpy as np
import pytest
from scipy import stats

from adamix.audit.bounds import Game, bound, gaussian_epsilon, model_free_epsilon, rate_above, rate_below
from adamix.errors import InputError
from adamix.privacy import calibrate

DELTA, CONFIDENCE = 1e-5, 0.999


def simulated(game: Game, canaries: int, chance: np.random.Generator, noise: float = 1.0) -> tuple[float, float]:
    """Both bounds of a mechanism with `noise` times the noise it states."""
    present = chance.random(canaries) < 0.5
    taken = present & (chance.random((game.steps, canaries)) < game.sample_rate)
    releases = taken + chance.normal(0, noise * game.noise_multiplier, taken.shape)
    found = bound(game, game.log_likelihood_ratio(releases), present, CONFIDENCE)
    return found.lower, found.model_free


def game_at(epsilon: float, steps: int = 1, sample_rate: float = 1.0) -> Game:
    return Game(calibrate(epsilon, delta=DELTA, steps=steps, sample_rate=sample_rate), steps, sample_rate, DELTA)


def false_alarms(game: Game, epsilon: float, canaries: int, repetitions: int) -> int:
    chance = np.random.default_rng(repetitions)
    return sum(max(simulated(game, canaries, chance)) > epsilon for _ in range(repetitions))


@pytest.mark.parametrize("mu", [1e-3, 0.27, 0.92, 3.0, 30.0])
@pytest.mark.parametrize("delta", [1e-5, 1e-9])
def test_epsilon_of_gaussian_dp(mu: float, delta: float) -> None:
    assert gaussian_epsilon(mu, delta) == pytest.approx(dp_accounting.get_epsilon_gaussian(1 / mu, delta), rel=1e-6)


def test_clopper_pearson() -> None:
    for hits, trials in ((0, 7), (3, 7), (7, 7), (60, 1000)):
        exact = stats.binomtest(hits, trials).proportion_ci(0.998, method="exact")
        assert (rate_above(hits, trials, 1e-3), rate_below(hits, trials, 1e-3)) == pytest.approx(
            (exact.low, exact.high)
        )


@pytest.mark.parametrize(("epsilon", "canaries"), [(1.0, 1_000_000), (4.0, 100_000), (8.0, 100_000)])
def test_full_batches_come_near_the_theory(epsilon: float, canaries: int) -> None:
    """At epsilon 1 the best test, of the difference of means, expects 0.92 from 100,000: it takes more canaries."""
    lower, model_free = simulated(game_at(epsilon), canaries, np.random.default_rng(1))
    assert 0.93 * epsilon <= lower <= epsilon
    assert 0 < model_free < lower


@pytest.mark.parametrize("epsilon", [1.0, 4.0])
def test_no_false_alarms(epsilon: float) -> None:
    assert false_alarms(game_at(epsilon), epsilon, 10_000, 60) == 0


def test_no_false_alarms_with_poisson_batches() -> None:
    game = Game(1.2, 3, 0.3, DELTA)
    assert false_alarms(game, game.epsilon(1.2), 5_000, 4) == 0


@pytest.mark.slow
@pytest.mark.parametrize("epsilon", [1.0, 4.0, 8.0])
@pytest.mark.parametrize(("steps", "sample_rate"), [(1, 1.0), (5, 0.2)])
def test_no_false_alarms_in_200(epsilon: float, steps: int, sample_rate: float) -> None:
    """Each comes with probability 0.001: more than 3 in 200 would have 6e-5."""
    assert false_alarms(game_at(epsilon, steps, sample_rate), epsilon, 100_000, 200) <= 3


def test_a_bound_can_be_above_the_claim() -> None:
    """95 % of the noise, so 4.3 in place of 4, with a million canaries; half of it with a thousand."""
    chance = np.random.default_rng(3)
    assert simulated(game_at(4.0), 1_000_000, chance, noise=0.95)[0] > 4
    assert simulated(game_at(4.0), 1_000, chance, noise=0.5)[0] > 4
    poisson = Game(1.2, 3, 0.3, DELTA)
    assert simulated(poisson, 20_000, chance, noise=0.5)[0] > poisson.epsilon(1.2)


def test_a_rare_leak_is_seen_without_a_model() -> None:
    """Three rows in a hundred are released in the clear: hardly more guesses are right, but those are certain."""
    chance, game = np.random.default_rng(4), game_at(4.0)
    present = chance.random(200_000) < 0.5
    releases = present + chance.normal(0, game.noise_multiplier, (1, len(present)))
    releases[:, present & (chance.random(len(present)) < 0.03)] = 100.0
    found = bound(game, game.log_likelihood_ratio(releases), present, CONFIDENCE)
    assert found.lower < 4.3 and found.model_free > 4.7


def test_nothing_to_see_is_zero() -> None:
    chance, game = np.random.default_rng(5), Game(2.0, 2, 0.2, DELTA)
    scores, present = chance.normal(size=1000), chance.random(1000) < 0.5
    assert bound(game, scores, present, CONFIDENCE).lower == 0
    assert model_free_epsilon(scores, present, DELTA, 1e-3) == 0
    assert gaussian_epsilon(0.0, DELTA) == 0 and math.isinf(gaussian_epsilon(math.inf, DELTA))


def test_few_canaries_are_refused() -> None:
    with pytest.raises(InputError, match="canaries: 99 are too few"):
        bound(game_at(1.0), np.zeros(99), np.zeros(99, bool), CONFIDENCE)


def test_the_advantage_is_the_best_there_is() -> None:
    """Of the stated score, measured; so a bound on it cannot be beaten by another score."""
    game, chance = Game(1.3, 3, 0.4, DELTA), np.random.default_rng(6)
    present = np.arange(400_000) % 2 == 0
    taken = present & (chance.random((3, len(present))) < 0.4)
    scores = game.log_likelihood_ratio(taken + chance.normal(0, game.noise_multiplier, taken.shape)) > 0
    measured = scores[present].mean() - scores[~present].mean()
    assert measured == pytest.approx(game.advantage(game.noise_multiplier), abs=5e-3)
