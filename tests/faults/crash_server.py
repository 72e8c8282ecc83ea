"""A warm process that forks one training run per line of standard input, so that a crash costs 50 ms and not 5 s.

A job is a JSON object: `folder` of the run, `settings`; `fault`, `at` and `only` of the `FaultySystem`; `kill_after`
seconds.
The run notes each draw of noise in `draws` of the folder, by a file of its own that no fault touches.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from faulty_system import FaultySystem

from adamix import AdaMix, InputError, durable, privacy
from adamix.ledger import Ledger
from adamix.mechanism import Mechanism
from adamix.models import Trainable
from adamix.rows import Rows
from adamix_kernels import Noise

SETTINGS: dict[str, Any] = {"epsilon": 2.0, "expected_batch_size": 30, "steps": 3, "public_steps": 2, "geometry": None}
BUDGET = 50.0
#: How tests ask for a job.
Run = Callable[..., dict[str, Any]]


def rows(count: int, seed: int) -> Rows:
    y = torch.arange(count) % 3
    return Rows(torch.randn(count, 4, generator=torch.Generator().manual_seed(seed)) + torch.eye(3, 4)[y], y)


PUBLIC, PRIVATE = rows(6, 0), rows(30, 1)


def train(folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """What a user does after a crash: make the ledger if there is none, resume if there is a checkpoint."""
    path, checkpoint = folder / "rows.ledger", folder / "checkpoint"
    if not path.exists():
        Ledger.create(path, data_set="test", epsilon=BUDGET).close()
    resume = any(checkpoint.glob("*.json"))
    result = AdaMix(**{**SETTINGS, **settings}).fit(
        public=PUBLIC, private=PRIVATE, ledger=path, checkpoint=checkpoint, resume=resume
    )
    return {"epsilon": result.epsilon, "ledger_epsilon": result.ledger_epsilon, "steps": len(result.steps)}


def watch(folder: Path) -> None:
    """Each draw, before it is made, with a fingerprint of its key: a hash in this test alone."""
    log = os.open(folder / "draws", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    inside: list[None] = []
    next_draw, release = Noise.next_draw, Mechanism.release

    def noted_draw(self: Noise) -> int:
        draw = next_draw(self)
        os.write(log, f"{'noise' if inside else 'batch'} {os.getpid()} {hash(tuple(self._key))} {draw}\n".encode())
        return draw

    def noted_release(self: Mechanism, model: Trainable, *more: Any) -> torch.Tensor:
        inside.append(None)
        try:
            return release(self, model, *more)
        finally:
            inside.pop()

    Noise.next_draw, Mechanism.release = noted_draw, noted_release  # type: ignore[method-assign, assignment]


def child(job: dict[str, Any]) -> None:
    folder = Path(job["folder"])
    system = FaultySystem(job.get("fault"), job.get("at", 0), job.get("only"))
    durable._os = system  # type: ignore[assignment]
    watch(folder)
    try:
        outcome = train(folder, job.get("settings", {}))
    except InputError as error:
        outcome = {"refused": str(error)}
    (folder / "outcome").write_text(json.dumps({**outcome, "calls": system.count}))


def run(job: dict[str, Any]) -> dict[str, Any]:
    outcome, start = Path(job["folder"]) / "outcome", time.monotonic()
    outcome.unlink(missing_ok=True)
    process = os.fork()
    if process == 0:
        try:
            child(job)
            os._exit(0)
        except BaseException as error:
            sys.stderr.write(f"{job}: {error!r}\n")
        finally:
            os._exit(1)
    if job.get("kill_after") is not None:
        time.sleep(job["kill_after"])
        os.kill(process, signal.SIGKILL)  # it is not waited for yet, so the id is still its own
    status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    found = json.loads(outcome.read_text()) if status == 0 else {}
    return {**found, "status": status, "seconds": time.monotonic() - start}


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    privacy.spent(1.0, delta=1e-5, steps=1)  # what is slow the first time
    AdaMix(**SETTINGS).fit(public=PUBLIC, private=PRIVATE)
    for line in sys.stdin:
        print(json.dumps(run(json.loads(line))), flush=True)
