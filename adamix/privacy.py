"""Accounting: the noise for a budget, and the budget a run has spent.

The unit is one record, the neighbours add or remove one. Every step is one Gaussian mechanism whose noise has standard
deviation noise_multiplier times its sensitivity, whatever the threshold of that step is. Full batches compose exactly
to Gaussian DP with mu = sqrt(steps) / noise_multiplier (Dong et al. 2019, arXiv 1905.02383); Poisson batches go
through the privacy loss distributions of `dp_accounting`, which round to the pessimistic side (see `_composed`).
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Iterable, Sequence
from numbers import Integral, Real
from typing import Any

import dp_accounting
from dp_accounting.pld import PLDAccountant
from scipy import optimize

from adamix.config import Config
from adamix.errors import InputError
from adamix_kernels import SamplingEvent
from adamix_kernels.ops.noise import warn_if_fast

#: The least noise multiplier for which Poisson batches are accounted as such.
_LEAST = 0.5
#: The same for full batches that are composed with Poisson batches.
_LEAST_FULL = 0.1
#: Nor where the privacy loss has about this standard deviation (epsilon is some 5000): that would take gigabytes.
_MOST_LOSS = 100.0
#: What rounding in the Fourier transforms of a composition may hide of delta, in each step: at most 2e-17 was seen.
_HIDDEN = 2.0**-51


def spent(noise_multiplier: float, *, delta: float, steps: int, sample_rate: float = 1.0) -> float:
    """Epsilon of `steps` steps at `delta`. Inf without noise, 0 before the first step.

    Never below the truth. Sampling never costs more than full batches, so their exact value is an upper bound: it is
    used where it is the smaller, and where there is so little noise that the loss distributions grow beyond memory.

    Raises:
        InputError: names the argument that is no number, or out of range.
    """
    _check("noise_multiplier", noise_multiplier, 0 <= _number(noise_multiplier) < math.inf, "a finite number >= 0")
    _check_rest(delta, steps, sample_rate, least_steps=0)
    return _spent(float(noise_multiplier), float(delta), int(steps), float(sample_rate))


@functools.lru_cache(maxsize=256)  # Poisson batches: up to seconds a value
def _spent(noise_multiplier: float, delta: float, steps: int, sample_rate: float) -> float:
    if steps == 0:
        return 0.0
    full = _spent_on_full_batches(noise_multiplier / math.sqrt(steps), delta)
    if sample_rate == 1 or noise_multiplier < _LEAST:
        return full
    if math.sqrt(_loss_variance(noise_multiplier, sample_rate, steps)) > _MOST_LOSS:
        return full
    return _composed([(_poisson(noise_multiplier, sample_rate), steps)], delta, full)


def _poisson(noise_multiplier: float, sample_rate: float) -> dp_accounting.DpEvent:
    return dp_accounting.PoissonSampledDpEvent(sample_rate, dp_accounting.GaussianDpEvent(noise_multiplier))


def _loss_variance(noise_multiplier: float, sample_rate: float, steps: int) -> float:
    """Of the privacy loss of Poisson batches, in the limit."""
    return sample_rate**2 * steps * math.expm1(1 / noise_multiplier**2)


def _composed(parts: Sequence[tuple[dp_accounting.DpEvent, int]], delta: float, bound: float) -> float:
    """Epsilon of events that happen so often each, by their privacy loss distributions, where `bound` is no smaller.

    The distributions are rounded to the pessimistic side, but their Fourier transforms to either: of a small delta
    after many steps that is a part (2 % of 1e-10 after 10^5), so it is taken off before.
    """
    sure = delta - _HIDDEN * sum(count for _, count in parts)
    if sure <= 0:
        return bound
    accountant = PLDAccountant(dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE)
    for event, count in parts:
        accountant.compose(dp_accounting.SelfComposedDpEvent(event, count))
    return min(bound, float(accountant.get_epsilon(sure)))


def _spent_on_full_batches(sigma: float, delta: float) -> float:
    """Epsilon of one release with that noise multiplier."""
    if sigma < 1e-100:  # where squares leave the range of numbers
        return math.inf
    found = float(dp_accounting.get_epsilon_gaussian(sigma, delta))
    # It is found to 1e-12 and rounding, on either side of the truth; rounding was seen to be 1e-12 too.
    return found * (1 + 1e-12) + 1e-10 if found else 0.0


def _number(value: Any) -> float:
    """NaN, which no range contains, for what is no real number."""
    try:
        return float(value) if isinstance(value, Real) and not isinstance(value, bool) else math.nan
    except OverflowError:
        return math.nan


def _check(name: str, value: Any, holds: bool, remedy: str) -> None:
    if not holds:
        raise InputError(f"{name}: {value!r} is not valid here; pass {remedy}")


def _check_rest(delta: Any, steps: Any, sample_rate: Any, least_steps: int) -> None:
    _check("delta", delta, 0 < _number(delta) < 1, "a number in (0, 1)")
    whole = isinstance(steps, Integral) and least_steps <= _number(steps) <= 1e12
    _check("steps", steps, whole, f"a whole number in [{least_steps}, 1e12]")
    _check("sample_rate", sample_rate, 0 < _number(sample_rate) <= 1, "a probability in (0, 1]")


def dp_event(event: SamplingEvent, noise_multiplier: float) -> dp_accounting.DpEvent:
    """One step on a batch that a `PoissonSampler` drew, as accountants of `dp_accounting` take it.

    A truncated batch is accounted as in arXiv 2508.15089: where one was cut short, one record more may also have
    pushed another one out.
    """
    if event.max_batch_size is not None:
        return dp_accounting.TruncatedSubsampledGaussianDpEvent(
            event.dataset_size, event.sample_rate, event.max_batch_size, noise_multiplier
        )
    gaussian = dp_accounting.GaussianDpEvent(noise_multiplier)
    return gaussian if event.sample_rate == 1 else dp_accounting.PoissonSampledDpEvent(event.sample_rate, gaussian)


@functools.lru_cache(maxsize=256)
def spent_on(event: SamplingEvent, noise_multiplier: float, *, delta: float, steps: int) -> float:
    """Epsilon of `steps` steps at `delta` on batches that a `PoissonSampler` drew: pass its `event`.

    Truncation can double what one record changes, so `spent` with half of the noise bounds it too.
    """
    if event.max_batch_size is None:
        return spent(noise_multiplier, delta=delta, steps=steps, sample_rate=event.sample_rate)
    bound = spent(noise_multiplier / 2, delta=delta, steps=steps)
    if steps == 0 or noise_multiplier < _LEAST:
        return bound
    return _composed([(dp_event(event, noise_multiplier), steps)], delta, bound)


def spent_together(runs: Iterable[tuple[float, float, int]], *, delta: float) -> float:
    """Epsilon at `delta` of several runs on the same rows: each a noise multiplier, a sample rate and steps.

    Full batches: their mu add in squares, exactly. With Poisson batches the privacy loss distributions are composed,
    and their bound by full batches is used where it is the smaller, or where there is too little noise for them.
    """
    steps: dict[tuple[float, float], int] = {}
    for noise_multiplier, sample_rate, count in runs:
        if count:
            steps[noise_multiplier, sample_rate] = steps.get((noise_multiplier, sample_rate), 0) + count
    return _spent_together(tuple(sorted((*mechanism, count) for mechanism, count in steps.items())), delta)


@functools.lru_cache(maxsize=256)
def _spent_together(runs: tuple[tuple[float, float, int], ...], delta: float) -> float:
    if any(noise_multiplier == 0 for noise_multiplier, _, _ in runs):
        return math.inf
    if len(runs) < 2:
        return sum(spent(noise, delta=delta, steps=count, sample_rate=rate) for noise, rate, count in runs)
    bound = _spent_on_full_batches(1 / _mu(runs), delta)
    sampled = [run for run in runs if run[1] < 1 and run[0] >= _LEAST]
    mu = _mu(run for run in runs if run not in sampled)
    too_wide = sum(_loss_variance(*run) for run in sampled) > _MOST_LOSS**2
    if not sampled or mu * _LEAST_FULL > 1 or too_wide:
        return bound
    full = [(dp_accounting.GaussianDpEvent(1 / mu), 1)] if mu else []
    return _composed([*full, *((_poisson(noise, rate), count) for noise, rate, count in sampled)], delta, bound)


def _mu(runs: Iterable[tuple[float, float, int]]) -> float:
    """Of the runs as full batches together; `hypot`, as squares of very little noise leave the range of numbers."""
    return math.hypot(*(math.sqrt(count) / noise for noise, _, count in runs))


def left_of(epsilon: float, runs: Iterable[tuple[float, float, int]], *, delta: float) -> float:
    """What a budget leaves beside `runs`: the largest epsilon of a full-batch run that still fits, 0 if none does.

    Not the difference of the epsilons, which do not add. With Poisson batches it may be 1 % of the budget too low.
    """
    runs = list(runs)
    if spent_together(runs, delta=delta) >= epsilon:
        return 0.0
    largest = 1 / float(dp_accounting.get_sigma_gaussian(epsilon, delta))  # mu of the whole budget

    def excess(mu: float) -> float:
        return spent_together([*runs, (1 / mu, 1.0, 1)] if mu else runs, delta=delta) - epsilon

    if all(rate == 1 for _, rate, _ in runs):
        mu = math.sqrt(max(0.0, largest**2 - _mu(run for run in runs if run[2]) ** 2))
    elif excess(largest) <= 0:
        mu = largest
    else:
        mu = float(optimize.brentq(excess, 0.0, largest, xtol=largest / 200, rtol=1e-3)) - largest / 100
    return min(epsilon, spent(1 / mu, delta=delta, steps=1)) if mu > 0 else 0.0


def spent_by_step(noise_multiplier: float, *, delta: float, steps: int, sample_rate: float = 1.0) -> list[float]:
    """Epsilon after each of `steps` steps. With sampling, where a value is slow to compute, at most 20 of them are
    computed, the last among them, and a step in between is charged as much as the next of these."""
    stride = 1 if sample_rate == 1 else math.ceil(steps / 20)
    marks = [steps - i for i in range(0, steps, stride)][::-1]
    values = {m: spent(noise_multiplier, delta=delta, steps=m, sample_rate=sample_rate) for m in marks}
    return [values[min(m for m in marks if m >= step)] for step in range(1, steps + 1)]


def calibrate(epsilon: float, *, delta: float, steps: int, sample_rate: float = 1.0) -> float:
    """The smallest noise multiplier, rounded up, with which `steps` steps cost at most `epsilon` at `delta`.

    With full batches `spent` of it is within 1e-6 of `epsilon`, never above. With very small sample rates, where less
    noise than half the threshold would do, it may be larger than needed.

    Raises:
        InputError: names the argument that is no number, or out of range.
    """
    _check("epsilon", epsilon, _number(epsilon) > 0, "a number above 0, or inf for no privacy")
    _check_rest(delta, steps, sample_rate, least_steps=1)
    if math.isinf(epsilon):
        return 0.0
    full, growth = _round_up(math.sqrt(steps) * float(dp_accounting.get_sigma_gaussian(epsilon, delta))), 1e-10
    while spent(full, delta=delta, steps=steps) > epsilon:
        full, growth = _round_up(full * (1 + growth)), 2 * growth
    if sample_rate == 1:
        return full

    def excess(noise_multiplier: float) -> float:
        return spent(noise_multiplier, delta=delta, steps=steps, sample_rate=sample_rate) - epsilon

    # `full` is an upper end; the lower one is found by halving, down to where sampling is no longer accounted for.
    low = high = full
    while high > _LEAST and excess(low := max(high / 2, _LEAST)) <= 0:
        high = low
    if high <= _LEAST:
        return high
    found, growth = _round_up(float(optimize.brentq(excess, low, high, rtol=1e-8))), 1e-8
    while excess(found) > 0 and found < high:
        found, growth = min(high, _round_up(found * (1 + growth))), 2 * growth
    return found


def _round_up(noise_multiplier: float) -> float:
    """To ten significant digits, upwards."""
    unit = 10.0 ** (math.floor(math.log10(noise_multiplier)) - 9)
    return math.ceil(noise_multiplier / unit) * unit


def warn_if_weak(config: Config) -> None:
    """Say loudly what a reader of the result must know."""
    if math.isinf(config.epsilon):
        warnings.warn("epsilon: inf, so NO NOISE is added: the result has no privacy guarantee", stacklevel=3)
    else:
        warn_if_fast(config.noise_mode, stacklevel=3)
    if config.delta >= 1 / config.private_rows:
        warnings.warn(
            f"delta: {config.delta:g} is at least 1/N for N = {config.private_rows:g} private rows; a mechanism that "
            "publishes a random row satisfies it: pass a smaller one",
            stacklevel=3,
        )
    if config.noise_seed is not None:
        warnings.warn(
            f"noise_seed: {config.noise_seed} makes the noise known to whoever knows it: for benchmarks only",
            stacklevel=3,
        )
