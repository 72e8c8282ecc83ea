"""Every method of the comparison, as settings of the same code, and its table.

The paragon and the search for hyper-parameters read labelled rows without noise: they are for public benchmark data.
The search sees the validation rows only; the test rows are read once, for the figure in the table.
"""

from __future__ import annotations

import random
import statistics
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from adamix.config import PRESETS
from adamix.data import Split
from adamix.geometry import Whiten
from adamix.models import error_rate, trainable
from adamix.public_phase import fit_public
from adamix.rows import Rows
from adamix.trainer import AdaMix

Settings = dict[str, Any]

CONVENTIONAL, PAPER = PRESETS["conventional"], PRESETS["paper"]

#: What a search may choose from, for methods with a fixed and with an adaptive threshold. `learning_rate` is in units
#: of 1 / tau, so the rate of the conventional update is learning_rate / max_grad_norm.
_FIXED_GRID: dict[str, Sequence[Any]] = {
    "max_grad_norm": (0.1, 0.3, 1.0),
    "learning_rate": (3.0, 10.0, 30.0, 100.0, 300.0),
    "public_weight": (0.3, 1.0, 5.0, 20.0),
}
_ADAPTIVE_GRID: dict[str, Sequence[Any]] = {
    "quantile": (0.75, 0.9, 1.0),
    "logit_noise": (0.3, 0.5, 0.8, 1.1, 1.5),
    "public_weight": (0.3, 1.0, 5.0, 20.0),
}


@dataclass(frozen=True)
class Method:
    """A row of the table: `settings` over the defaults, and the `grid` of a search for them, if tuned."""

    name: str
    settings: Settings = field(default_factory=dict)
    grid: Mapping[str, Sequence[Any]] | None = None


METHODS = (
    Method("fully private DP-GD", {**CONVENTIONAL, "public_weight": 0.0}),
    Method("fully private DP-GD, tuned", {**CONVENTIONAL, "public_weight": 0.0}, _FIXED_GRID),
    Method("conventional mixed DP-GD", CONVENTIONAL),
    Method("conventional mixed DP-GD, tuned", CONVENTIONAL, _FIXED_GRID),
    Method("AdaMix as in the paper", PAPER),
    Method("- no subspace", {**PAPER, "subspace_energy": None}),
    Method("- no subspace, tuned", {**PAPER, "subspace_energy": None}, _ADAPTIVE_GRID),
    Method("AdaMix"),
    Method("AdaMix, tuned", {}, _ADAPTIVE_GRID),
    Method("- no adaptive threshold", {"quantile": None, "max_grad_norm": 1.0}),
    Method("- no pull", {"anchor": 0.0}),
    Method("- cold start", {"warm_start": False}),
    Method("- no public rows in the update", {"public_weight": 0.0}),
    Method("- no geometry", {"geometry": None}),
    Method("- with a subspace", {"subspace_energy": 0.95}),
)


@dataclass(frozen=True)
class Row:
    """One method on one setting: test errors in percent, one per seed, and the settings a search chose."""

    method: str
    errors: list[float]
    chosen: Settings | None = None

    @property
    def mean(self) -> float:
        return statistics.fmean(self.errors)

    @property
    def spread(self) -> float:
        """Standard deviation over the seeds."""
        return statistics.stdev(self.errors) if len(self.errors) > 1 else 0.0


def compare(
    splits: Sequence[Split],
    *,
    epsilon: float,
    delta: float,
    methods: Sequence[Method] = METHODS,
    searches: int = 24,
    on_run: Callable[[], None] = lambda: None,
) -> Iterator[Row]:
    """The table's rows for one setting: public only, every method, and the paragon. One split per seed."""

    def train(split: Split, settings: Settings, rows: Rows, seed: int) -> tuple[float, float]:
        on_run()
        assert split.expected_batch_size is not None  # benchmarks state theirs
        trainer = AdaMix(
            epsilon=epsilon,
            delta=delta,
            expected_batch_size=split.expected_batch_size,
            **{"noise_seed": seed, **settings},
        )
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "noise_seed")  # a benchmark on public data, made to be repeated
            result = trainer.fit(public=split.public, private=split.private, test=rows)
        assert result.test_error is not None and result.public_error is not None
        return result.public_error, result.test_error

    seeds = range(len(splits))
    for name, geometry in (("public only", None), ("public only, whitened", "whiten")):
        settings = {"geometry": geometry, "steps": 1}
        yield Row(name, [train(splits[s], settings, splits[s].test, s)[0] for s in seeds])
    for method in methods:
        chosen = None
        if method.grid is not None:

            def validation_error(settings: Settings, base: Settings = method.settings) -> float:
                return statistics.fmean(
                    train(splits[s], {**base, **settings}, splits[s].validation, s)[1] for s in seeds
                )

            chosen = min(candidates(method, searches), key=validation_error)
        settings = {**method.settings, **(chosen or {})}
        yield Row(method.name, [train(splits[s], settings, splits[s].test, s)[1] for s in seeds], chosen)
    yield Row("non-private on all data (paragon)", [paragon_error(split) for split in splits])


def candidates(method: Method, count: int) -> list[Settings]:
    """`count` random points of the method's grid, the same for every setting; a fixed choice of the method stays."""
    draw = random.Random(method.name)
    fixed = {"public_weight"} if method.settings.get("public_weight") == 0 else set()
    grid = {name: values for name, values in (method.grid or {}).items() if name not in fixed}
    return [{name: draw.choice(values) for name, values in grid.items()} for _ in range(count)]


def runs_per_setting(methods: Sequence[Method], seeds: int, searches: int) -> int:
    """How often `compare` calls `on_run`."""
    return seeds * (2 + len(methods) + searches * sum(method.grid is not None for method in methods))


def paragon_error(split: Split) -> float:
    """Test error in percent without privacy, on public and private rows; L2 and geometry by the validation rows."""
    rows = Rows(torch.cat([split.public.x, split.private.x]), torch.cat([split.public.y, split.private.y]))
    outcomes: list[tuple[float, float]] = []  # error on the rows to judge by, error on the test rows
    for geometry in (nn.Identity(), Whiten(rows.x, rows.y)):
        for l2 in (1e-5, 1e-4, 1e-3, 1e-2):
            head = nn.Linear(rows.x.shape[1], len(split.class_names), device=rows.x.device)
            nn.init.zeros_(head.weight)
            nn.init.zeros_(head.bias)
            with torch.no_grad():
                inside = Rows(geometry(rows.x), rows.y)
            fit_public(trainable(head), inside, l2=l2, steps=500)
            model = nn.Sequential(geometry, head)
            judge = split.validation if len(split.validation.y) else rows
            outcomes.append((error_rate(model, judge), error_rate(model, split.test)))
    return min(outcomes, key=lambda pair: pair[0])[1]


def error_increase(error: float, paragon: float) -> float | None:
    """By how many percent `error` is above the paragon's; None if that is 0."""
    return 100 * (error / paragon - 1) if paragon else None
