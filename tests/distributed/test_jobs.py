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

from adamix.ledger import Ledger

HERE = Path(__file__).parent


def launch(folder: Path, kind: str, ranks: int, dies_at: int, shared: bool = False) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command += ["--max-restarts=1", str(HERE / "job.py"), str(folder), kind, str(dies_at)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "0" if shared else "1"
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
    with Ledger(tmp_path / "rows.ledger") as ledger:
        assert ledger.runs[0].charged == 6 and ledger.runs[0].ended
    assert sorted(p.name for p in (tmp_path / "run").glob("*.json")) == ["step-0000004.json", "step-0000005.json"]


@pytest.mark.slow
def test_restarts_that_cannot_work_are_refused(tmp_path: Path) -> None:
    done = launch(tmp_path, "fsdp", 2, dies_at=9, shared=True)
    assert done.returncode and "set it for torchrun" in done.stderr


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
        clean = all(p.grad is None for _, p in engine._stepped)
        (folder / f"left-{rank}").write_text(f"{time.monotonic()} {same and clean}")
        raise


@pytest.mark.parametrize(("how", "timeout"), [(signal.SIGKILL, 60.0), (signal.SIGSTOP, 5.0)])
def test_ranks_leave_when_one_is_gone(tmp_path: Path, how: int, timeout: float) -> None:
    """At once where the connection breaks, after the timeout where a rank only stands still; no gradient is left."""
    context: Any = multiprocessing.get_context("forkserver")
    ranks = [context.Process(target=_leave, args=(rank, 4, tmp_path, how, timeout)) for rank in range(4)]
    for process in ranks:
        process.start()
    for process in ranks[:-1]:
        process.join(120)
    assert ranks[-1].pid is not None
    if how == signal.SIGSTOP:
        os.kill(ranks[-1].pid, signal.SIGKILL)
    ranks[-1].join(10)
    assert all(process.exitcode for process in ranks)
    for rank in range(3):
        began = float((tmp_path / f"began-{rank}").read_text())
        left, clean = (tmp_path / f"left-{rank}").read_text().split()
        assert float(left) - began < timeout + 25 and clean == "True"
