"""One audit: every subject at every budget, and the checks of noise and sampling."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np

from adamix.audit import checks, subjects
from adamix.audit.bounds import Bound, Game, bound
from adamix.audit.checks import Check
from adamix.errors import InputError
from adamix.privacy import calibrate

NOISE_MODES = ("fast", "secure")
#: Canaries of one run; more are made in several runs. The trainer's rows are as wide as there are of them, and so are
#: the per-sample gradients that the engine makes in secure mode.
_ENGINE_RUN, _TRAINER_RUN = {"fast": 100_000, "secure": 1_000}, 1_000
#: The trainer is slower: its share of the canaries.
_TRAINER_SHARE = 5
#: Two subjects, two modes, two kinds of batches.
ROWS_PER_EPSILON = 8
_NOISE_COUNT, _NOISE_STEPS = 125_000, 4
#: Noise that comes again after some steps shows in few coordinates as well.
_NARROW_COUNT, _NARROW_STEPS = 1_000, 100
_SAMPLER_ROWS, _SAMPLER_STEPS, _SAMPLER_RATE = 5_000, 400, 0.1


@dataclass(frozen=True)
class Row:
    """One subject at one claimed budget; `theory` is the budget of the noise multiplier it used, by formulas other
    than its own: less than claimed where calibration had to stay on the safe side."""

    subject: str
    batches: str
    claimed: float
    theory: float
    bound: Bound

    @property
    def spent(self) -> float:
        """At least this much, by whatever shows the most."""
        return max(self.bound.lower, self.bound.model_free, self.theory * (1 - 1e-6))

    @property
    def passed(self) -> bool:
        return self.spent <= self.claimed


@dataclass(frozen=True)
class Report:
    """What an audit found."""

    delta: float
    confidence: float
    rows: list[Row]
    checks: list[Check]

    @property
    def failures(self) -> list[str]:
        """One line for each row and check that failed."""
        rows = [
            f"{row.subject}, {row.batches}, epsilon {row.claimed:g}: at least {row.spent:.3f} is spent"
            for row in self.rows
            if not row.passed
        ]
        return rows + [f"{check.name}: {check.measured}" for check in self.checks if not check.passed]


def audit(
    epsilons: Sequence[float] = (1.0, 4.0, 8.0),
    *,
    delta: float = 1e-5,
    canaries: int = 100_000,
    steps: int = 5,
    sample_rate: float = 0.2,
    strategy: str = "auto",
    confidence: float = 0.999,
    seed: int | None = None,
    on_part: Callable[[str], None] | None = None,
) -> Report:
    """Audit `DPEngine` and `AdaMix`, with fast and with secure noise, with full and with Poisson batches.

    Args:
        epsilons: claimed budgets; the noise of each is what `calibrate` gives.
        canaries: for the engine, a fifth of it for the trainer; at most 100,000 (1,000) of them in one run. The gap
            between bound and theory falls with its square root. At epsilon 1 no test whatsoever can expect more than
            0.92 of theory from 100,000: pass more.
        steps: of each run, composed.
        sample_rate: of the Poisson batches, in (0, 1).
        strategy: of the engine; "auto" where it is "two_pass", which secure mode does not do.
        confidence: that no bound of an honest mechanism is above its budget; all rows share the error.
        seed: None draws membership and noise from the operating system. A number repeats the rows, for tests; but
            not secure noise, which takes none.
        on_part: called with the name of what begins.

    Raises:
        InputError: an argument is out of range.
    """
    _check_arguments(epsilons, delta, canaries, steps, sample_rate, confidence)
    tell = on_part or (lambda _: None)
    of_each = 1 - (1 - confidence) / (ROWS_PER_EPSILON * len(epsilons))
    plan = Plan(delta, steps, canaries, of_each, strategy, np.random.default_rng(seed), seed)
    rows = []
    for rate, batches in ((1.0, "full"), (sample_rate, f"Poisson {sample_rate:g}")):
        for epsilon in epsilons:
            for mode, (subject, run) in product(NOISE_MODES, (("DPEngine", plan.engine), ("AdaMix", plan.trainer))):
                tell(f"{subject} {mode}, {batches} batches, epsilon {epsilon:g}")
                rows.append(run(epsilon, rate, batches, mode))
    tell("noise and sampling")
    return Report(delta, confidence, rows, list(all_checks()))


@dataclass(frozen=True)
class Plan:
    """The settings that all rows share; `confidence` is that of one row."""

    delta: float
    steps: int
    canaries: int
    confidence: float
    strategy: str
    chance: np.random.Generator
    seed: int | None

    def engine(self, epsilon: float, sample_rate: float, batches: str, mode: str = "fast") -> Row:
        noise_multiplier = calibrate(epsilon, delta=self.delta, steps=self.steps, sample_rate=sample_rate)
        strategy = "auto" if (mode, self.strategy) == ("secure", "two_pass") else self.strategy

        def releases(present: subjects.Present) -> tuple[subjects.Array, float]:
            settings = noise_multiplier, self.steps, sample_rate, strategy, mode, self._seed(mode)
            return subjects.engine_releases(present, *settings), noise_multiplier

        return self._row(f"DPEngine {mode}", epsilon, sample_rate, batches, releases, self.canaries, _ENGINE_RUN[mode])

    def trainer(self, epsilon: float, sample_rate: float, batches: str, mode: str = "fast") -> Row:
        def releases(present: subjects.Present) -> tuple[subjects.Array, float]:
            settings = {"epsilon": epsilon, "delta": self.delta, "steps": self.steps, "sample_rate": sample_rate}
            noise = {"noise_mode": mode, "noise_seed": self._seed(mode)}
            return subjects.trainer_releases(present, settings | noise)

        count = max(100, self.canaries // _TRAINER_SHARE)
        return self._row(f"AdaMix {mode}", epsilon, sample_rate, batches, releases, count, _TRAINER_RUN)

    def _row(
        self,
        subject: str,
        epsilon: float,
        sample_rate: float,
        batches: str,
        releases: Callable[[subjects.Present], tuple[subjects.Array, float]],
        canaries: int,
        in_one_run: int,
    ) -> Row:
        runs = math.ceil(canaries / in_one_run)
        scores, presence = [], []
        for size in [canaries // runs + (run < canaries % runs) for run in range(runs)]:
            present = self.chance.random(size) < 0.5
            released, noise_multiplier = releases(present)
            game = Game(noise_multiplier, self.steps, sample_rate, self.delta)
            scores.append(game.log_likelihood_ratio(released))
            presence.append(present)
        found = bound(game, np.concatenate(scores), np.concatenate(presence), self.confidence)
        return Row(subject, batches, epsilon, game.epsilon(game.noise_multiplier), found)

    def _seed(self, mode: str) -> int | None:
        return None if self.seed is None or mode == "secure" else int(self.chance.integers(2**62))


def all_checks(count: int = _NOISE_COUNT, sampler_steps: int = _SAMPLER_STEPS) -> Iterator[Check]:
    """Of the noise in `count` coordinates of each shard, and of the samplers over so many steps."""
    for mode in NOISE_MODES:
        steps, resumed = subjects.engine_noise(count, _NOISE_STEPS, mode)
        yield from noise_checks(f"DPEngine {mode}", steps, resumed)
        settings = {"epsilon": 4.0, "steps": _NOISE_STEPS, "noise_mode": mode}
        first, second = (subjects.trainer_noise(count, settings) for _ in range(2))
        yield from noise_checks(f"AdaMix {mode}", first, [second[0][0]])
        long, _ = subjects.engine_noise(_NARROW_COUNT, _NARROW_STEPS, mode)
        longer = subjects.trainer_noise(_NARROW_COUNT, settings | {"steps": _NARROW_STEPS})
        for name, steps in (("DPEngine", long), ("AdaMix", longer)):
            label = f"noise of {name} {mode}: difference of {_NARROW_STEPS} steps"
            yield checks.reuse(label, [step[0] for step in steps])
        for name, table in (("PoissonSampler", subjects.taken_by_sampler), ("AdaMix", subjects.taken_by_mechanism)):
            taken = table(_SAMPLER_ROWS, sampler_steps, _SAMPLER_RATE, mode)
            yield from checks.sampling(f"sampling of {name} {mode}", taken, _SAMPLER_RATE)


def noise_checks(name: str, steps: list[list[checks.Array]], others: list[checks.Array]) -> list[Check]:
    """Of releases on empty batches, by step and shard, and the first shards of runs that came later."""
    return [
        checks.standard_deviation(f"noise of {name}: standard deviation", [part for step in steps for part in step]),
        checks.reuse(f"noise of {name}: difference of steps", [step[0] for step in steps]),
        checks.reuse(f"noise of {name}: difference of shards", steps[0]),
        checks.reuse(f"noise of {name}: difference of runs", [*(step[0] for step in steps), *others]),
    ]


def _check_arguments(
    epsilons: Sequence[float], delta: float, canaries: int, steps: int, sample_rate: float, confidence: float
) -> None:
    for name, value, holds, remedy in (
        ("epsilon", list(epsilons), len(epsilons) > 0 and all(0 < e <= 50 for e in epsilons), "numbers in (0, 50]"),
        ("delta", delta, 0 < delta < 1, "a number in (0, 1)"),
        ("canaries", canaries, canaries >= 500, "a whole number, at least 500"),
        ("steps", steps, 1 <= steps <= 1000, "a whole number in [1, 1000]"),
        ("sample_rate", sample_rate, 0 < sample_rate < 1, "a number in (0, 1); full batches are audited as well"),
        ("confidence", confidence, 0.5 <= confidence < 1, "a number in [0.5, 1)"),
    ):
        if not holds:
            raise InputError(f"{name}: {value} is not valid here; pass {remedy}")
