"""The audit through the public interfaces: canaries arrive with the norm of the threshold, faults make it fail."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import adamix_kernels.nn.secure
import adamix_kernels.nn.sums
from adamix.__main__ import main
from adamix.audit import audit
from adamix.audit.audit import NOISE_MODES, Plan, all_checks
from adamix.audit.subjects import engine_releases, trainer_releases
from adamix.errors import InputError
from adamix_kernels import Noise

STRATEGIES = ("auto", "book_keeping", "two_pass", "per_layer", "materialize")


def present(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random(count) < 0.5


@pytest.mark.parametrize("mode", NOISE_MODES)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_canary_adds_the_whole_threshold_and_no_more(strategy: str, mode: str) -> None:
    if (strategy, mode) == ("two_pass", "secure"):
        pytest.skip("secure mode has no second pass")
    members = present(300)
    releases = engine_releases(members, 1e-4, 2, 1.0, strategy, mode)
    np.testing.assert_allclose(releases, np.stack([members, members]), atol=1e-3)


@pytest.mark.parametrize("mode", NOISE_MODES)
def test_poisson_canaries_come_at_their_rate(mode: str) -> None:
    members = present(4000)
    releases = engine_releases(members, 1e-4, 4, 0.3, mode=mode)
    assert (releases[:, ~members] < 0.01).all()
    assert 0.26 < (releases[:, members] > 0.5).mean() < 0.34  # +- 8 standard errors


@pytest.mark.parametrize("mode", NOISE_MODES)
def test_a_canary_of_the_trainer_adds_the_whole_threshold(mode: str) -> None:
    members = present(200)
    settings = {"epsilon": 1000.0, "steps": 2, "noise_mode": mode}
    releases, noise_multiplier = trainer_releases(members, settings)
    assert noise_multiplier < 0.05
    error = (releases - members) / noise_multiplier
    assert np.abs(error).max() < 5
    assert 0.8 < error.std() < 1.2


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_each_strategy_comes_near_the_theory(strategy: str) -> None:
    """Per-sample gradients as wide as there are canaries need small runs."""
    count = 3_000 if strategy == "materialize" else 60_000
    plan = Plan(1e-5, 2, count, 0.999, strategy, np.random.default_rng(2), 2)
    row = plan.engine(8.0, 1.0, "full")
    assert row.passed
    assert row.bound.lower > (0.75 if strategy == "materialize" else 0.93) * 8


@pytest.mark.parametrize("strategy", ["auto", "two_pass"])
def test_secure_mode_comes_near_the_theory(strategy: str) -> None:
    plan = Plan(1e-5, 2, 25_000, 0.999, strategy, np.random.default_rng(2), None)
    rows = [plan.engine(8.0, 1.0, "full", "secure"), plan.trainer(8.0, 1.0, "full", "secure")]
    assert [row.bound.trials for row in rows] == [25_000, 5_000]
    assert all(row.passed and row.bound.lower > share * 8 for row, share in zip(rows, (0.88, 0.75), strict=True))


def test_the_checks_hold() -> None:
    found = list(all_checks(count=20_000, sampler_steps=200))
    assert len(found) == 40
    assert not [check for check in found if not check.passed]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:noise_seed")
def test_the_whole_audit() -> None:
    report = audit(canaries=1_000_000, seed=3)
    assert not report.failures
    full = [r for r in report.rows if r.subject.startswith("DPEngine") and r.batches == "full"]
    assert len(full) == 6 and all(0.93 * r.claimed <= r.bound.lower for r in full)


def quiet(factor: float) -> Callable[..., Any]:
    true = adamix_kernels.nn.sums.add_gaussian_noise_
    return lambda tensor, std, *rest: true(tensor, factor * std, *rest)


def quiet_grid(factor: float) -> Callable[..., Any]:
    true = adamix_kernels.nn.secure.grid_release
    return lambda sums, std, *rest: true(sums, factor * std, *rest)


@pytest.mark.parametrize("mode", NOISE_MODES)
def test_too_little_noise_fails(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if mode == "fast":
        monkeypatch.setattr(adamix_kernels.nn.sums, "add_gaussian_noise_", quiet(0.5))
    else:
        monkeypatch.setattr(adamix_kernels.nn.secure, "grid_release", quiet_grid(0.5))
    row = Plan(1e-5, 2, 5_000, 0.999, "auto", np.random.default_rng(2), None).engine(4.0, 1.0, "full", mode)
    assert not row.passed and row.bound.lower > 6
    assert [check.name for check in all_checks(20_000, 20) if not check.passed] == [
        f"noise of DPEngine {mode}: standard deviation"
    ]


def test_a_key_that_comes_again_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.urandom", bytes)
    failed = [check.name for check in all_checks(20_000, 20) if not check.passed]
    expected = {f"noise of {s} {mode}: difference of runs" for s in ("DPEngine", "AdaMix") for mode in NOISE_MODES}
    assert expected <= set(failed)


def test_a_draw_that_comes_again_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Noise, "next_draw", lambda self: 0)
    failed = [check.name for check in all_checks(20_000, 20) if not check.passed]
    for mode in NOISE_MODES:
        assert {f"noise of {s} {mode}: difference of steps" for s in ("DPEngine", "AdaMix")} <= set(failed)
        assert {f"sampling of {s} {mode}: step after step" for s in ("PoissonSampler", "AdaMix")} <= set(failed)


def test_draws_that_come_again_after_more_steps_than_a_run_has_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    true = Noise.next_draw
    monkeypatch.setattr(Noise, "next_draw", lambda self: true(self) % 7)
    failed = [check.name for check in all_checks(20_000, 20) if not check.passed]
    for mode in NOISE_MODES:
        assert {f"noise of {s} {mode}: difference of 100 steps" for s in ("DPEngine", "AdaMix")} <= set(failed)
        assert f"noise of DPEngine {mode}: difference of steps" not in failed


ARGUMENTS = ["audit", "--epsilon", "4", "--canaries", "2000", "--steps", "2", "--json"]


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(ARGUMENTS) == 0
    out = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [(b["subject"], b["batches"]) for b in out["bounds"]] == [
        (f"{subject} {mode}", batches)
        for batches in ("full", "Poisson 0.2")
        for mode in NOISE_MODES
        for subject in ("DPEngine", "AdaMix")
    ]
    assert all(0 <= b["lower"] <= b["claimed"] == 4 for b in out["bounds"])
    assert all(math.isclose(b["theory"], 4, rel_tol=1e-5) for b in out["bounds"] if b["batches"] == "full")
    assert out["failed"] == [] and all(check["passed"] for check in out["checks"])


def test_the_command_fails_loudly(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(adamix_kernels.nn.sums, "add_gaussian_noise_", quiet(0.4))
    assert main(ARGUMENTS) == 1
    captured = capsys.readouterr()
    assert "adamix audit: FAILED: DPEngine fast, full, epsilon 4: at least" in captured.err
    assert any("standard deviation" in line for line in json.loads(captured.out.splitlines()[-1])["failed"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epsilons": ()}, "epsilon: "),
        ({"epsilons": (0.0,)}, "epsilon: "),
        ({"delta": 1.0}, "delta: "),
        ({"canaries": 10}, "canaries: 10 "),
        ({"steps": 0}, "steps: 0 "),
        ({"sample_rate": 1.0}, "sample_rate: "),
        ({"confidence": 1.0}, "confidence: "),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        audit(**settings)
