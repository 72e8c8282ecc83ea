"""Whole jobs: started by torchrun, and left by one of their ranks."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import rank_checks as checks
import spawned
import torch

from adamix import distributed
from adamix.errors import InputError
from adamix.ledger import Ledger

HERE = Path(__file__).parent
TIMEOUT = distributed.TIMEOUT.total_seconds()


def launch(folder: Path, kind: str, ranks: int, dies_at: int) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command += ["--max-restarts=1", str(HERE / "job.py"), str(folder), kind, str(dies_at)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    return subprocess.run(command, capture_output=True, text=True, timeout=280, check=False, env=environment)


@pytest.mark.parametrize("kind", ["fsdp", pytest.param("ddp", marks=pytest.mark.slow)])
def test_torchrun_goes_on_after_a_rank_was_killed(tmp_path: Path, kind: str) -> None:
    """Rank 1 is killed between backward pass and step: all start again from the last checkpoint, with another key."""
    Ledger.create(tmp_path / "rows.ledger", data_set="rows of a test").close()
    done = launch(tmp_path, kind, 2, dies_at=2)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["life"], result["finished"], result["steps"]) == (1, 2, 5)
    assert result["charged"] == 6  # the step that was broken off twice
    keys = [[(tmp_path / f"key-{life}-{rank}").read_text() for rank in (0, 1)] for life in (0, 1)]
    assert keys[0][0] == keys[0][1] != keys[1][0] == keys[1][1]
    with Ledger(tmp_path / "rows.ledger") as ledger:
        assert ledger.runs[0].charged == 6 and ledger.runs[0].ended
    assert sorted(p.name for p in (tmp_path / "run").glob("*.json")) == ["step-0000004.json", "step-0000005.json"]


def test_restarts_that_cannot_work_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "1")
    monkeypatch.delenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", raising=False)
    with pytest.raises(InputError, match="TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"):
        distributed.start("gloo")


def _leave(rank: int, size: int, folder: Path, how: int, timeout: float) -> None:
    spawned.start(rank, size, folder, "gloo", timeout)
    called, engine = checks.attached("fsdp" if how == signal.SIGKILL else "ddp")
    checks.backward(called, engine, checks.own_rows("ddp", list(range(16))))
    before = [checks.whole(p) for p in engine.model.parameters()] if how != signal.SIGKILL else []
    (folder / f"began-{rank}").write_text(str(time.monotonic()))
    if rank == size - 1:
        os.kill(os.getpid(), how)
    try:
        engine.optimizer.step()
    except RuntimeError:
        same = all(torch.equal(old, p.detach()) for old, p in zip(before, engine.model.parameters(), strict=False))
        clean = all(p.grad is None for _, p in engine._attached.stepped)
        (folder / f"left-{rank}").write_text(f"{same and clean}")
        raise


@pytest.mark.parametrize(
    ("how", "timeout", "limit"),
    [
        (signal.SIGKILL, TIMEOUT, 60.0),
        (signal.SIGSTOP, 5.0, 20.0),
        pytest.param(signal.SIGSTOP, TIMEOUT, 60.0, marks=pytest.mark.slow),
    ],
)
def test_ranks_leave_when_one_is_gone(tmp_path: Path, how: int, timeout: float, limit: float) -> None:
    """At once where the connection breaks, after the timeout where a rank only stands still; no gradient is left."""
    context: Any = multiprocessing.get_context("forkserver")
    ranks = [context.Process(target=_leave, args=(rank, 4, tmp_path, how, timeout)) for rank in range(4)]
    for process in ranks:
        process.start()
    for process in ranks[:-1]:
        process.join(120)
    ended = time.monotonic()
    assert ranks[-1].pid is not None
    if how == signal.SIGSTOP:
        os.kill(ranks[-1].pid, signal.SIGKILL)
    ranks[-1].join(10)
    assert all(process.exitcode for process in ranks)
    died = float((tmp_path / "began-3").read_text())
    assert ended - died < limit
    assert all((tmp_path / f"left-{rank}").read_text() == "True" for rank in range(3))
