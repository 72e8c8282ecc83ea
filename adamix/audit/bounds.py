"""From guesses about canaries to a lower bound on epsilon.

A trial is one canary: a row that is in the data with probability 1/2, independently, and whose gradient is its own
unit direction with the norm of the threshold. Adding or removing it is exactly a pair of neighbours, so every guess
rule obeys TPR <= e^epsilon FPR + delta, for add/remove neighbours. Directions are orthogonal and the noise in them is
independent (which `checks` tests), so the trials of one run are independent as those of many runs would be.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import dp_accounting
import numpy as np
from dp_accounting.pld import PLDAccountant
from numpy.typing import NDArray
from scipy import optimize, special, stats

from adamix.errors import InputError

Array = NDArray[np.float64]

#: Share of the error that the bound for any mechanism may use up; the rest is for the one that knows the Gaussian.
_MODEL_FREE_SHARE = 0.1
#: Grid of the privacy loss while a noise multiplier is searched for; the value at the end is taken on the finer one.
_COARSE, _FINE = 1e-3, 1e-4


@dataclass(frozen=True)
class Game:
    """What one row goes through: `steps` Gaussian mechanisms, in each of them with chance `sample_rate`."""

    noise_multiplier: float
    steps: int
    sample_rate: float
    delta: float

    def epsilon(self, noise_multiplier: float) -> float:
        """The budget of this game with another noise multiplier, by formulas of its own and not those it audits."""
        if self.sample_rate == 1:
            return gaussian_epsilon(math.sqrt(self.steps) / noise_multiplier, self.delta)
        return float(_accountant(noise_multiplier, self.sample_rate, self.steps, _FINE).get_epsilon(self.delta))

    def advantage(self, noise_multiplier: float) -> float:
        """The most by which TPR exceeds FPR, or a little more: the total variation distance, delta at epsilon 0."""
        if self.sample_rate == 1:
            return 2 * float(stats.norm.cdf(math.sqrt(self.steps) / noise_multiplier / 2)) - 1
        return float(_accountant(noise_multiplier, self.sample_rate, self.steps, _COARSE).get_delta(0.0))

    def log_likelihood_ratio(self, releases: Array) -> Array:
        """Of in against out, `[canaries]`, from `releases` `[steps, canaries]` along each canary, over the threshold.

        The best score there is (Neyman and Pearson); above 0 it says in.
        """
        exponent = (releases - 0.5) / self.noise_multiplier**2
        if self.sample_rate == 1:
            return exponent.sum(0)
        return np.logaddexp(math.log1p(-self.sample_rate), math.log(self.sample_rate) + exponent).sum(0)


@dataclass(frozen=True)
class Bound:
    """Lower bounds on epsilon that hold together with the confidence asked for.

    `lower` supposes that the steps are Gaussian mechanisms of one noise multiplier on batches of the stated rate;
    `model_free` supposes nothing.
    """

    lower: float
    model_free: float
    correct: int
    trials: int


def bound(game: Game, scores: Array, present: NDArray[np.bool_], confidence: float) -> Bound:
    """Guess who was present from `scores` `[canaries]` and bound epsilon from below.

    The tight bound: guessing by the sign of a log likelihood ratio is right with probability at most
    (1 + advantage) / 2, whatever the scores are; Clopper-Pearson bounds that probability from below, and the largest
    noise multiplier that allows it gives epsilon. Full batch: mu = 2 Phi^-1 of it (Dong et al. 2019, arXiv 1905.02383).
    """
    if len(scores) < 100:
        raise InputError(f"canaries: {len(scores)} are too few to bound anything; pass at least 100")
    error = 1 - confidence
    correct, trials = int(((scores > 0) == present).sum()), len(scores)
    return Bound(
        lower=_epsilon_of(game, 2 * rate_above(correct, trials, error * (1 - _MODEL_FREE_SHARE)) - 1),
        model_free=model_free_epsilon(scores, present, game.delta, error * _MODEL_FREE_SHARE),
        correct=correct,
        trials=trials,
    )


def _epsilon_of(game: Game, advantage: float) -> float:
    """The budget of the largest noise multiplier whose advantage is no less; 0 if that is any."""
    if advantage <= 0:
        return 0.0
    if game.sample_rate == 1:
        return gaussian_epsilon(2 * float(stats.norm.ppf((1 + advantage) / 2)), game.delta)
    low = game.noise_multiplier / 2  # with less the loss distributions grow large, and the verdict is clear anyway
    if game.advantage(low) <= advantage:
        return game.epsilon(low)
    high = 2 * low
    while game.advantage(high) > advantage:
        high *= 2
        if high > 1000 * game.noise_multiplier:
            return 0.0
    found = optimize.brentq(lambda s: game.advantage(s) - advantage, low, high, xtol=1e-4 * low)
    return game.epsilon(float(found) + 2e-4 * low)  # its error counts against the bound


def model_free_epsilon(scores: Array, present: NDArray[np.bool_], delta: float, error: float) -> float:
    """log((TPR - delta) / FPR), or the same of the negatives, at a threshold chosen on every second canary and judged
    on the others; Clopper-Pearson bounds of both rates, which fail with probability at most `error`."""

    def value(threshold: float, sign: int, half: slice) -> float:
        guess, truth = sign * scores[half] >= sign * threshold, present[half] == (sign > 0)
        positives, negatives = int(truth.sum()), int((~truth).sum())
        hit = rate_above(int((guess & truth).sum()), positives, error / 2) - delta
        miss = rate_below(int((guess & ~truth).sum()), negatives, error / 2)
        return math.log(hit / miss) if hit > miss else 0.0

    grid = np.quantile(scores[::2], special.expit(np.linspace(-8, 8, 61)))  # dense in the tails
    choices = [(float(t), sign) for t in grid for sign in (1, -1)]
    threshold, sign = max(choices, key=lambda choice: value(choice[0], choice[1], slice(0, None, 2)))
    return value(threshold, sign, slice(1, None, 2))


def rate_above(hits: int, trials: int, error: float) -> float:
    """Clopper-Pearson: the rate is above it but for probability `error`."""
    return 0.0 if hits == 0 else float(stats.beta.ppf(error, hits, trials - hits + 1))


def rate_below(hits: int, trials: int, error: float) -> float:
    """Clopper-Pearson: the rate is below it but for probability `error`."""
    return 1.0 if hits == trials else float(stats.beta.isf(error, hits + 1, trials - hits))


def gaussian_epsilon(mu: float, delta: float) -> float:
    """Epsilon of mu-Gaussian DP at `delta`: Balle and Wang 2018 (arXiv 1805.06530), Theorem 8."""

    def excess(epsilon: float) -> float:
        first = stats.norm.cdf(mu / 2 - epsilon / mu)
        return float(first - math.exp(epsilon + stats.norm.logcdf(-mu / 2 - epsilon / mu))) - delta

    if math.isinf(mu):
        return math.inf
    if mu <= 0 or excess(0.0) <= 0:
        return 0.0
    high = 1.0
    while excess(high) > 0:
        high *= 2
    return float(optimize.brentq(excess, 0.0, high, xtol=1e-12))


@functools.lru_cache(maxsize=512)
def _accountant(noise_multiplier: float, sample_rate: float, steps: int, interval: float) -> PLDAccountant:
    accountant = PLDAccountant(
        dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE, value_discretization_interval=interval
    )
    step = dp_accounting.PoissonSampledDpEvent(sample_rate, dp_accounting.GaussianDpEvent(noise_multiplier))
    return accountant.compose(dp_accounting.SelfComposedDpEvent(step, steps))
