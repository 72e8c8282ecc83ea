"""Training on the ranks of a job: one ledger for all of them, checkpoints of sharded models, and starting again.

A script that `TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 torchrun --max-restarts=3` starts:

    distributed.start()                                     # init_process_group, with a timeout
    model, optimizer = ...                                  # wrapped or sharded, without an engine yet
    ledger = distributed.RankLedger("rows.ledger")
    found = distributed.load("run1", model, optimizer, ledger)     # None at the first start
    engine = DPEngine(model, optimizer, ...)                # a fresh key of the noise
    if found is None:
        run, finished = ledger.start_run(...), 0
    else:
        run, finished = found.run, found.finished
        engine.load_state_dict(found.engine)
        ledger.resume_run(run, steps - finished)
    for step in range(finished, steps):
        ledger.charge(run)                                  # before the batch is drawn and before the noise
        ...
        distributed.save("run1", engine, run, step + 1, ledger)
    ...                                                     # behind the function that did all this:
    distributed.stop()                                      # destroy_process_group

When a rank dies the others cannot go on: a collective fails at once where the connection breaks, and after `TIMEOUT`
where it does not. Nothing without noise leaves a process; the step that was interrupted was charged and is charged
again. A rank must not catch the error and go on alone. Groups that a mesh of two dimensions makes do not take on that
timeout but have torch's: there a rank that stands still, with its connections open, holds the others for 10 to 30
minutes, unless `init_device_mesh(backend_override=)` gives them another.
"""

from __future__ import annotations

import gc
import os
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from adamix.errors import InputError
from adamix.ledger import Ledger
from adamix.parts import load_parts, newest, on_first, save_parts
from adamix_kernels import DPEngine

#: A rank that waits for one that is gone fails within it. torch's own is 10 to 30 minutes.
TIMEOUT = timedelta(seconds=45)


def start(backend: str | None = None, timeout: timedelta = TIMEOUT) -> None:
    """`torch.distributed.init_process_group` in a script that torchrun started.

    Args:
        backend: None takes gloo for tensors of the host and NCCL for those of a GPU, where there are any.
        timeout: after which a rank that waits for another fails. A longest pause, such as loading data on rank 0 alone,
            must fit in it.

    Raises:
        InputError: torchrun may restart the ranks, and would then send them to addresses of dead ones: a store is kept
            from life to life (pytorch issue 135712). The message says what to set.
    """
    restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0"))
    if restarts and os.environ.get("TORCH_DISABLE_SHARE_RDZV_TCP_STORE") != "1":
        raise InputError(
            f"torchrun: --max-restarts={restarts} without TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in the environment: "
            "restarted ranks would look for dead ones; set it for torchrun"
        )
    dist.init_process_group(backend, timeout=timeout)


def stop() -> None:
    """`torch.distributed.destroy_process_group`, once what used the group is gone.

    Call it where no model, optimizer or engine is left, such as behind the function that trains: sharded models keep
    their group, whose threads must not end after Python does, which aborts the process.
    """
    gc.collect()
    dist.destroy_process_group()


class RankLedger:
    """A `Ledger` that rank 0 alone opens and writes; all ranks make each call, and wait until it is on the disk.

    Raises:
        InputError: on all ranks, what the ledger of rank 0 raises.
    """

    def __init__(self, path: str | Path, group: Any = None) -> None:
        self._group = group
        self._ledger: Ledger | None = None
        on_first(lambda: self._open(path), group)

    def _open(self, path: str | Path) -> None:
        self._ledger = Ledger(path)

    def _call(self, name: str, *args: Any, **kwargs: Any) -> Any:
        return on_first(lambda: getattr(self._ledger, name)(*args, **kwargs), self._group)

    def start_run(self, *, noise_multiplier: float, sample_rate: float, steps: int, delta: float) -> str:
        """As `Ledger.start_run`, once for all ranks."""
        settings = {"noise_multiplier": noise_multiplier, "sample_rate": sample_rate, "steps": steps, "delta": delta}
        return self._call("start_run", **settings)

    def resume_run(self, run: str, steps: int) -> None:
        self._call("resume_run", run, steps)

    def charge(self, run: str) -> int:
        """As `Ledger.charge`: when it returns on any rank, the step is on the disk, and its noise may be drawn."""
        return self._call("charge", run)

    def end_run(self, run: str) -> None:
        self._call("end_run", run)

    def spent(self, delta: float | None = None) -> float:
        return self._call("spent", delta)

    def place(self) -> tuple[int, str]:
        """Its count of lines and the hash of the last."""
        return on_first(lambda: (self._ledger.count, self._ledger.head) if self._ledger else None, self._group)

    def require(self, count: int, head: str) -> None:
        self._call("require", count, head)

    def close(self) -> None:
        if self._ledger is not None:
            self._ledger.close()


@dataclass(frozen=True)
class Progress:
    """What a checkpoint says beside the tensors: `engine` is for `DPEngine.load_state_dict`."""

    run: str
    finished: int
    engine: dict[str, Any]


def save(folder: str | Path, engine: DPEngine, run: str, finished: int, ledger: RankLedger | None = None) -> None:
    """A checkpoint of an engine's model and optimizer after `finished` steps, as `save_parts` makes it.

    No key of the noise is stored. Call it after a step, when weights are released, and after `optimizer.zero_grad()`.

    Raises:
        InputError: see `save_parts`.
    """
    place = ledger.place() if ledger is not None else None
    with engine.restoring():
        model, optimizer = get_state_dict(engine.model, engine.optimizer)
    state = {key: float(x) if isinstance(x, Tensor) else x for key, x in engine.state_dict().items()}
    record = {"run": run, "finished": finished, "engine": state, "ledger": place}
    save_parts(folder, finished, {"model": model, "optimizer": optimizer}, record)


def load(
    folder: str | Path, model: nn.Module, optimizer: torch.optim.Optimizer, ledger: RankLedger | None = None
) -> Progress | None:
    """Put the newest checkpoint into a model and an optimizer that no engine is attached to; None if there is none.

    The number of ranks and the sharding may be others than those that saved it.

    Raises:
        InputError: on all ranks: it is damaged, or the ledger is older.
    """
    record = on_first(lambda: newest(folder, {"run", "finished", "engine", "ledger"}))
    if record is None:
        return None
    if ledger is not None and record["ledger"] is not None:
        ledger.require(*record["ledger"])
    of_model, of_optimizer = get_state_dict(model, optimizer)
    state: dict[str, Any] = {"model": of_model, "optimizer": of_optimizer}
    load_parts(folder, record, state)
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    return Progress(record["run"], record["finished"], record["engine"])
