"""Killed at any moment, at any system call, with the power cut: nothing is under-counted, all of it can be resumed."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest
from crash_server import BUDGET, SETTINGS, Run
from faulty_system import DEATHS

from adamix.ledger_records import head_path, read_ledger

STEPS = SETTINGS["steps"]


def draws(folder: Path) -> list[tuple[str, str, str, str]]:
    path = folder / "draws"
    return [tuple(line.split()) for line in path.read_text().splitlines()] if path.exists() else []  # type: ignore[misc]


def check_counts(folder: Path) -> int:
    """The ledger is in order, as it lies there, and covers every noise that was drawn; returns its count."""
    drawn = sum(kind == "noise" for kind, *_ in draws(folder))
    ledger = folder / "rows.ledger"
    if not ledger.exists():
        assert not drawn
        return 0
    charged = sum(run.charged for run in read_ledger(ledger).runs.values())
    assert charged >= drawn, f"{drawn} steps were drawn, {charged} charged"
    return charged


def check_noise(folder: Path) -> None:
    noted = [(key, draw) for _, _, key, draw in draws(folder)]
    assert len(set(noted)) == len(noted), "a pair of key and counter was used twice"
    owners = {(process, key) for _, process, key, _ in draws(folder)}
    assert len({key for _, key in owners}) == len(owners), "two processes shared a key"


def finish(server: Run, folder: Path, crashes: int) -> None:
    """It resumes without anybody's help, and each crash cost one step at most."""
    outcome = server(folder)
    assert outcome["status"] == 0 and outcome.get("steps") == STEPS, outcome
    assert STEPS <= check_counts(folder) <= STEPS + crashes
    assert outcome["ledger_epsilon"] == outcome["epsilon"] <= BUDGET
    check_noise(folder)
    shutil.rmtree(folder)


def crash_at_calls(server: Run, tmp_path: Path, stride: int) -> int:
    """Die at every `stride`-th call of a whole run in each way; then also in the run that resumes one cut off half."""
    whole = tmp_path / "whole"
    whole.mkdir()
    calls = server(whole)["calls"]
    deaths = 0
    for offset, death in enumerate(DEATHS):
        for at in range(1 + offset * stride // len(DEATHS), calls + 1, stride):
            folder = tmp_path / f"{death}-{at}"
            folder.mkdir()
            assert server(folder, fault=death, at=at)["status"] == -9
            check_counts(folder)
            again = server(folder, fault=death, at=max(1, (at * 7) % calls))["status"]
            check_counts(folder)
            deaths += 1 + (again == -9)
            finish(server, folder, 1 + (again == -9))
    return deaths


def test_it_survives_death_at_some_system_calls(server: Run, tmp_path: Path) -> None:
    assert crash_at_calls(server, tmp_path, stride=53) >= 10


@pytest.mark.slow
def test_it_survives_death_at_every_system_call(server: Run, tmp_path: Path) -> None:
    print("deaths:", crash_at_calls(server, tmp_path, stride=1))


def kill_at_random(server: Run, tmp_path: Path, points: int) -> int:
    """SIGKILL from outside, up to three times a run."""
    whole = tmp_path / "whole"
    whole.mkdir()
    seconds = server(whole)["seconds"]
    generator, kills = random.Random(0), 0
    while kills < points:
        folder = tmp_path / "run"
        folder.mkdir()
        crashes = 0
        for _ in range(generator.randint(1, 3)):
            crashes += server(folder, kill_after=generator.uniform(0.1, 1.0) * seconds)["status"] == -9
            check_counts(folder)
        kills += crashes
        finish(server, folder, crashes)
    return kills


def test_it_survives_kills_at_some_moments(server: Run, tmp_path: Path) -> None:
    kill_at_random(server, tmp_path, 5)


@pytest.mark.slow
def test_it_survives_kills_at_300_moments(server: Run, tmp_path: Path) -> None:
    print("kills:", kill_at_random(server, tmp_path, 300))


def test_a_lost_ledger_is_not_replaced_by_an_empty_one(server: Run, tmp_path: Path) -> None:
    """The harness makes a ledger where there is none; after a charge that must be refused."""
    assert server(tmp_path)["status"] == 0
    (tmp_path / "rows.ledger").unlink()
    assert head_path(tmp_path / "rows.ledger").exists()
    assert "is missing, but its .head file is there" in server(tmp_path)["refused"]
