"""The comparison: tuned rows see validation rows only, and equal effort is equal."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from adamix import baselines
from adamix.config import Config
from adamix.data import Split, load_split
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
    assert baselines.Row("x", [1.0, 3.0]).mean == 2 and baselines.Row("x", [1.0]).spread == 0
    assert baselines.Row("x", [1.0, 3.0]).spread == pytest.approx(torch.tensor([1.0, 3.0]).std())
