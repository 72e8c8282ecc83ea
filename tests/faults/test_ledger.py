"""The ledger by itself: what it counts, what it refuses, who may use it."""

from __future__ import annotations

import json
import math
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import dp_accounting
import numpy as np
import pytest
from dp_accounting.pld import PLDAccountant

from adamix import InputError, durable, locks, spent, spent_together
from adamix.ledger import Ledger
from adamix.ledger_records import Book, head_path, read_ledger

FULL: dict[str, Any] = {"noise_multiplier": 8.0, "sample_rate": 1.0, "steps": 4, "delta": 1e-5}


def new(path: Path, **settings: Any) -> Ledger:
    return Ledger.create(path / "rows.ledger", data_set="test rows", **settings)


def test_runs_add_up(tmp_path: Path) -> None:
    with new(tmp_path, delta=1e-6) as ledger:
        for noise in (8.0, 5.0):
            run = ledger.start_run(**{**FULL, "noise_multiplier": noise})
            assert [ledger.charge(run) for _ in range(3)] == [1, 2, 3]
        mu = math.sqrt(3 / 8**2 + 3 / 5**2)
        assert ledger.spent() == pytest.approx(spent(1 / mu, delta=1e-6, steps=1), rel=1e-12)
        kept = ledger.spent(), ledger.count, ledger.head
    with Ledger(tmp_path / "rows.ledger") as again:
        assert (again.spent(), again.count, again.head) == kept
    assert read_ledger(tmp_path / "rows.ledger").spent() == kept[0]


def test_composition() -> None:
    """One kind of run as ever; several by their loss distributions; without noise there is no guarantee."""
    assert spent_together([], delta=1e-5) == 0
    assert spent_together([(5.0, 1.0, 3), (5.0, 1.0, 4)], delta=1e-5) == spent(5.0, delta=1e-5, steps=7)
    assert spent_together([(1.0, 0.1, 7)], delta=1e-5) == spent(1.0, delta=1e-5, steps=7, sample_rate=0.1)
    assert spent_together([(5.0, 1.0, 3), (0.0, 1.0, 1)], delta=1e-5) == math.inf
    assert spent_together([(5.0, 1.0, 3), (0.0, 1.0, 0)], delta=1e-5) == spent(5.0, delta=1e-5, steps=3)
    accountant = PLDAccountant(dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE)
    for event, count in (
        (dp_accounting.GaussianDpEvent(5.0), 2),
        (dp_accounting.GaussianDpEvent(4.0), 1),
        (dp_accounting.PoissonSampledDpEvent(0.1, dp_accounting.GaussianDpEvent(1.0)), 7),
    ):
        accountant.compose(dp_accounting.SelfComposedDpEvent(event, count))
    together = spent_together([(5.0, 1.0, 2), (1.0, 0.1, 7), (4.0, 1.0, 1)], delta=1e-5)
    assert together == pytest.approx(accountant.get_epsilon(1e-5), rel=2e-3)
    assert together > spent(1.0, delta=1e-5, steps=7, sample_rate=0.1)
    # Too little noise for the distributions: the bound by full batches.
    bound = dp_accounting.get_epsilon_gaussian(1 / math.sqrt(1 / 0.05**2 + 7), 1e-5)
    assert spent_together([(0.05, 1.0, 1), (1.0, 0.1, 7)], delta=1e-5) == pytest.approx(bound)


@pytest.mark.parametrize("sample_rate", [1.0, 0.2])
def test_the_budget_holds_and_what_is_left_fits(tmp_path: Path, sample_rate: float) -> None:
    with new(tmp_path, epsilon=2.0) as ledger:
        assert ledger.left() == pytest.approx(2.0, rel=1e-9)
        run = ledger.start_run(noise_multiplier=2.0, sample_rate=sample_rate, steps=1, delta=1e-5)
        for _ in range(1):
            ledger.charge(run)
        ledger.end_run(run)
        left = ledger.left()
        assert left is not None and 0.1 < left < 2.0
        noise = dp_accounting.get_sigma_gaussian(left, 1e-5)
        ledger.check(noise * 1.000001, 1.0, 1)
        count = ledger.count
        with pytest.raises(InputError, match=r"above the budget of 2 at delta 1e-05; start a run with epsilon <= "):
            ledger.start_run(noise_multiplier=0.97 * noise, sample_rate=1.0, steps=1, delta=1e-5)
        assert ledger.count == count, "a refused run leaves nothing"


def test_runs_of_one_process_reserve_what_they_plan(tmp_path: Path) -> None:
    with new(tmp_path, epsilon=3.0) as ledger:
        ledger.start_run(**{**FULL, "steps": 20})
        with pytest.raises(InputError, match="above the budget"):
            ledger.start_run(**{**FULL, "steps": 20})


def test_a_run_that_was_cut_off_goes_on_if_others_have_left_room(tmp_path: Path) -> None:
    """Only runs of this opening have kept room: what the other one plans is checked again with its first charge."""
    with new(tmp_path, epsilon=3.0) as ledger:
        first = ledger.start_run(**{**FULL, "steps": 20})
        ledger.charge(first)
    with Ledger(ledger.path) as ledger:
        assert ledger.charge(first) == 2
        with pytest.raises(InputError, match="above the budget"):
            ledger.start_run(**{**FULL, "steps": 18})
    with Ledger(ledger.path) as ledger:
        second = ledger.start_run(**{**FULL, "steps": 18})
        with pytest.raises(InputError, match=r"18 steps .* above the budget of 3 .*; resume with steps=\d"):
            ledger.charge(first)
        assert [ledger.charge(second) for _ in range(18)] and ledger.spent() <= 3


def test_threads_cannot_use_the_same_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check = Book.check

    def slow_check(*given: Any, **named: Any) -> None:
        check(*given, **named)
        time.sleep(0.2)

    def begin(_: int) -> bool:
        try:
            ledger.start_run(**{**FULL, "steps": 20})
        except InputError:
            return False
        return True

    monkeypatch.setattr(Book, "check", slow_check)
    with new(tmp_path, epsilon=3.0) as ledger, ThreadPoolExecutor(2) as pool:
        assert sorted(pool.map(begin, range(2))) == [False, True]


@pytest.mark.parametrize("wrong", [{"delta": math.nan}, {"steps": 0}, {"run": b"x"}, {"steps": "4"}, {"steps": 1.5}])
def test_what_cannot_be_written_leaves_nothing(tmp_path: Path, wrong: dict[str, Any]) -> None:
    with new(tmp_path) as ledger:
        with pytest.raises(InputError, match="; pass"):
            ledger.start_run(**{**FULL, **wrong})
        assert not ledger.runs
        ledger.charge(ledger.start_run(**{**FULL, "steps": np.int64(2), "delta": np.float32(1e-5)}))
    assert [run.charged for run in read_ledger(ledger.path).runs.values()] == [1]


def test_a_run_cannot_take_more_than_it_planned(tmp_path: Path) -> None:
    with new(tmp_path) as ledger:
        run = ledger.start_run(**{**FULL, "steps": 1})
        ledger.charge(run)
        with pytest.raises(InputError, match="charged all 1 steps that it planned"):
            ledger.charge(run)
        ledger.resume_run(run, 1)
        assert ledger.charge(run) == 2
        ledger.end_run(run)
        for call in (ledger.charge, ledger.end_run):
            with pytest.raises(InputError, match="has ended; start a new run"):
                call(run)
        with pytest.raises(InputError, match="is not in it"):
            ledger.charge("another")
        for wrong in ({"noise_multiplier": math.nan}, {"noise_multiplier": -1.0}, {"sample_rate": 1.5}, {"steps": -1}):
            with pytest.raises(InputError, match="are no run; pass"):
                ledger.start_run(**{**FULL, **wrong})


def test_no_row_of_the_data_can_be_told_from_it(tmp_path: Path) -> None:
    new(tmp_path, epsilon=1.0).close()
    header = json.loads((tmp_path / "rows.ledger").read_text())
    assert set(header) == {
        "kind", "format", "id", "data_set", "unit", "neighbours", "epsilon", "delta", "number", "previous", "sha256",
    }  # fmt: skip


def test_a_charge_is_on_the_disk_and_counted_before_it_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The order of the calls: line, sync, new head, sync, its name, sync of the folder."""
    calls: list[str] = []

    class Watching:
        def __getattr__(self, name: str) -> Any:
            calls.append(name)
            return getattr(os, name)

    with new(tmp_path) as ledger:
        run = ledger.start_run(**FULL)
        monkeypatch.setattr(durable, "_os", Watching())
        ledger.charge(run)
    assert calls == "write fsync open write fsync close replace open fsync close".split()


def test_one_process_at_a_time(tmp_path: Path) -> None:
    def other_process() -> str:
        """What it is told."""
        child = os.fork()
        if child == 0:
            try:
                Ledger(tmp_path / "rows.ledger")
                (tmp_path / "told").write_text("nothing")
            except InputError as error:
                (tmp_path / "told").write_text(str(error))
            finally:
                os._exit(0)
        os.waitpid(child, 0)
        return (tmp_path / "told").read_text()

    with new(tmp_path) as ledger:
        holder = f"process {os.getpid()}" if Path("/proc/locks").exists() else "another process"
        assert f"is in use by {holder}; wait until that has ended" in other_process()
        with pytest.raises(InputError, match="is in use by"):
            Ledger(ledger.path)
        assert read_ledger(ledger.path).data_set == "test rows", "looking is allowed"
    assert other_process() == "nothing"


def test_a_fork_cannot_spend(tmp_path: Path) -> None:
    with new(tmp_path) as ledger:
        run = ledger.start_run(**FULL)
        child = os.fork()
        if child == 0:
            try:
                ledger.charge(run)
            except InputError:
                os._exit(7)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


def test_without_locks_it_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    new(tmp_path).close()
    monkeypatch.setattr(locks, "fcntl", None)
    with pytest.raises(InputError, match=r"cannot be locked \(this system has no flock\); keep it on a disk that can"):
        Ledger(tmp_path / "rows.ledger")


def test_a_ledger_replaced_or_changed_while_in_use_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.ledger"
    with new(tmp_path) as ledger:
        run = ledger.start_run(**FULL)
        content = path.read_bytes()
        path.write_bytes(content[:-1])
        with pytest.raises(InputError, match="was replaced or changed while in use"):
            ledger.charge(run)
        path.unlink()
        with pytest.raises(InputError, match="cannot be written"):
            ledger.charge(run)
        path.write_bytes(content)
        with pytest.raises(InputError, match="was replaced or changed while in use"):
            ledger.charge(run)


def test_after_a_failed_write_only_a_new_opening_helps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        def __getattr__(self, name: str) -> Any:
            return self.refuse if name == "fsync" else getattr(os, name)

        def refuse(self, _: int) -> None:
            raise OSError(28, "No space left on device")

    with new(tmp_path) as ledger:
        run = ledger.start_run(**FULL)
        with monkeypatch.context() as patch:
            patch.setattr(durable, "_os", Full())
            with pytest.raises(InputError, match=r"No space left on device.*no step was taken; mend that and resume"):
                ledger.charge(run)
        with pytest.raises(InputError, match="could not be written to before"):
            ledger.charge(run)
    with pytest.raises(InputError, match="is closed; open it again"):
        ledger.charge(run)
    with Ledger(tmp_path / "rows.ledger") as ledger:
        assert ledger.charge(run) == 2, "the line that was not synced counts"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"data_set": " "}, "data_set: ' ' given; pass a name"),
        ({"epsilon": 0.0}, "epsilon: 0.0 is not valid"),
        ({"epsilon": math.nan}, "epsilon: nan is not valid"),
        ({"delta": 1.0}, "delta: 1.0 is not valid"),
        ({"unit": "house"}, "unit: 'house' is not valid"),
    ],
)
def test_bad_headers(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Ledger.create(tmp_path / "rows.ledger", **{"data_set": "x", **settings})
    assert not list(tmp_path.iterdir())


def test_missing_and_existing_files(tmp_path: Path) -> None:
    path = tmp_path / "rows.ledger"
    with pytest.raises(InputError, match=r"does not exist; check the path, or make one"):
        Ledger(path)
    with pytest.raises(InputError, match="cannot be opened"):
        Ledger(tmp_path)
    with pytest.raises(InputError, match="cannot be made"):
        Ledger.create(tmp_path / "no" / "folder", data_set="x")
    with new(tmp_path) as ledger:
        ledger.start_run(**FULL)
    with pytest.raises(InputError, match="exists already; open it, or name a new file"):
        new(tmp_path)
    content = path.read_bytes()
    path.unlink()
    for call in (lambda: new(tmp_path), lambda: Ledger(path), lambda: read_ledger(path)):
        with pytest.raises(InputError, match=r"is missing, but its .head file is there; restore"):
            call()
    path.write_bytes(content)
    head_path(path).unlink()
    with pytest.raises(InputError, match=r"head is missing; restore"):
        Ledger(path)
