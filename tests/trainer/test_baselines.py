"""The comparison: tuned rows see validation rows only, and equal effort is equal."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from adamix import baselines
from adamix.config import Config
from adamix.data import Split, load_split
from adamix.models import Trainable
from adamix.rows import Rows
from adamix.trainer import AdaMix


@pytest.fixture
def split() -> Split:
    pytest.importorskip("sklearn")
    return load_split("digits", private_rows=200, validation_rows=100)


def test_every_method_is_a_valid_configuration() -> None:
    for method in baselines.METHODS:
        for candidate in [{}, *baselines.candidates(method, 50)]:
            Config(**{"epsilon": 1.0, "expected_batch_size": 10, **method.settings, **candidate})


def test_searches_are_of_equal_size_and_repeat() -> None:
    tuned = [method for method in baselines.METHODS if method.grid]
    assert len(tuned) >= 3
    for method in tuned:
        assert len(baselines.candidates(method, 24)) == 24
        assert baselines.candidates(method, 24) == baselines.candidates(method, 24)
    private = next(m for m in tuned if m.settings.get("public_weight") == 0)
    assert all("public_weight" not in c for c in baselines.candidates(private, 24)), "it stays fully private"


def test_a_search_never_sees_the_test_rows(split: Split, monkeypatch: pytest.MonkeyPatch) -> None:
    """Spoilt test labels change no choice."""
    method = baselines.Method("tuned", baselines.CONVENTIONAL, {"learning_rate": (0.1, 3.0), "steps": (2, 10)})
    chosen = []
    for test in (split.test, Rows(split.test.x, (split.test.y + 1) % 10)):
        splits = [Split(**{**split.__dict__, "test": test})]
        rows = list(baselines.compare(splits, epsilon=3.0, delta=1e-5, methods=[method], searches=4))
        chosen.append(rows[2].chosen)
    assert chosen[0] == chosen[1] is not None


def with_wrong(rows: Rows) -> Rows:
    return Rows(rows.x, (rows.y + 1) % 10)


def test_the_figures_are_those_of_the_test_rows(split: Split) -> None:
    method = baselines.Method("plain", {"steps": 2, "noise_seed": 0})

    def errors(**changes: Rows) -> list[float]:
        splits = [replace(split, **changes)]
        return [row.mean for row in baselines.compare(splits, epsilon=3.0, delta=1e-5, methods=[method])]

    plain = errors()
    assert errors(validation=with_wrong(split.validation))[:3] == plain[:3]
    assert all(spoilt > 80 for spoilt in errors(test=with_wrong(split.test)))


def test_the_paragon_learns_from_all_rows_and_is_chosen_by_validation(
    split: Split, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []

    def fit_nothing(model: Trainable, rows: Rows, *, l2: float, steps: int) -> None:
        """The smallest L2 predicts class 0 always, the others class 1."""
        sizes.append(len(rows.y))
        with torch.no_grad():
            model.module.bias[0 if l2 == 1e-5 else 1] = 1.0  # type: ignore[index]

    monkeypatch.setattr(baselines, "fit_public", fit_nothing)
    ones, zeros = torch.ones_like(split.validation.y), torch.zeros_like(split.test.y)
    mixed = replace(split, validation=Rows(split.validation.x, ones), test=Rows(split.test.x, zeros))
    assert baselines.paragon_error(mixed) == 100, "the test rows would have chosen the other one"
    assert set(sizes) == {len(split.public.y) + len(split.private.y)}


def test_the_counter_of_runs_is_right(split: Split) -> None:
    calls: list[None] = []
    methods = [baselines.METHODS[0], baselines.Method("tuned", {}, {"steps": (1, 2)})]
    splits = [split, load_split("digits", private_rows=200, validation_rows=100, seed=1)]
    rows = list(
        baselines.compare(
            splits, epsilon=1.0, delta=1e-5, methods=methods, searches=3, on_run=lambda: calls.append(None)
        )
    )
    assert len(calls) == baselines.runs_per_setting(methods, 2, 3)
    assert [len(row.errors) for row in rows] == [2] * 5
    assert rows[-1].mean <= min(row.mean for row in rows) + 2


def test_public_only_is_phase_one(split: Split) -> None:
    def error(**settings: Any) -> float | None:
        trainer = AdaMix(epsilon=1.0, expected_batch_size=200, steps=1, geometry=None, **settings)
        return trainer.fit(public=split.public, private=split.private, test=split.test).public_error

    rows = list(baselines.compare([split], epsilon=1.0, delta=1e-5, methods=[]))
    assert [row.method for row in rows] == ["public only", "public only, whitened", "non-private on all data (paragon)"]
    assert rows[0].errors == [error()]


def test_error_increase() -> None:
    assert baselines.error_increase(15.0, 10.0) == pytest.approx(50.0)
    assert baselines.error_increase(15.0, 0.0) is None
    assert baselines.Row("x", [1.0, 3.0]).mean == 2 and baselines.Row("x", [1.0]).spread == 0
    assert baselines.Row("x", [1.0, 3.0]).spread == pytest.approx(torch.tensor([1.0, 3.0]).std())
