"""The ranks of a job that train one model: each on a share of the rows, with one ledger and one set of checkpoints.

All ranks hold the whole model and step it alike; the engine adds their sums and draws the noise once. Rank 0 charges
the ledger and writes the checkpoints, and the others wait until that has succeeded.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from adamix.checkpoint import Checkpoint
from adamix.deep.config import DeepConfig
from adamix.distributed import on_first, start, stop
from adamix.errors import InputError
from adamix.models import Weights
from adamix.private_phase import Step
from adamix.recorder import Recorder, recording

Row = TypeVar("Row")


@dataclass(frozen=True)
class Ranks:
    """This process among those of `group`; one of one where it trains alone."""

    rank: int = 0
    size: int = 1
    group: Any = None

    @classmethod
    def of(cls, model: nn.Module) -> Ranks:
        """All processes of the job, if it has several.

        Raises:
            InputError: the model is spread in a way that this trainer does not know.
        """
        if isinstance(model, nn.parallel.DistributedDataParallel):
            raise InputError("model: is in DistributedDataParallel; pass the model itself, the ranks add their sums")
        if any(hasattr(p, "device_mesh") for p in model.parameters()):
            raise InputError("model: is sharded; DeepAdaMix keeps it whole on each rank. Use DPEngine in a loop for it")
        if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
            return cls()
        return cls(dist.get_rank(), dist.get_world_size(), dist.group.WORLD)

    def share(self, rows: Sequence[Row]) -> Sequence[Row]:
        """This rank's part of rows that all ranks have."""
        return rows[self.rank :: self.size]

    def on_first(self, action: Callable[[], Any]) -> Any:
        """What `action` gives on rank 0, on all of them; it runs there alone, and what it raises is raised by all."""
        return action() if self.size == 1 else on_first(action, self.group)

    def agree(self, tensors: Sequence[Tensor]) -> None:
        """Those of rank 0 on all ranks."""
        if self.size > 1:
            for tensor in tensors:
                dist.broadcast(tensor.detach(), group=self.group, group_src=0)

    def add_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Of public rows: the sum over ranks."""
        if self.size > 1:
            for p in parameters:
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
                dist.all_reduce(p.grad, group=self.group)


class RankRecorder:
    """A `Recorder` that rank 0 alone has; the others know what it says. All ranks make each call."""

    def __init__(self, ranks: Ranks, recorder: Recorder[DeepConfig] | None, known: tuple[Any, ...]) -> None:
        self._ranks, self._recorder = ranks, recorder
        self.config: DeepConfig
        self.saved: Checkpoint | None
        self.config, self.saved, self.noise_multiplier, self.last, steps = known
        self.steps: list[Step] = list(steps)

    def begin(self, view: Weights, *, anchor: Tensor, start: Tensor) -> None:
        self._call("begin", view, anchor=anchor, start=start)

    def charge(self) -> None:
        self._call("charge")

    def finish_step(self, step: Step, view: Weights) -> None:
        self.steps.append(step)
        self._call("finish_step", step, view)

    def end(self) -> None:
        self._call("end")

    def epsilons(self) -> list[float]:
        return self._call("epsilons")

    def ledger_epsilon(self) -> float | None:
        return self._call("ledger_epsilon")

    def _call(self, name: str, *args: Any, **kwargs: Any) -> Any:
        return self._ranks.on_first(lambda: getattr(self._recorder, name)(*args, **kwargs))


@contextmanager
def job_of_torchrun(device: torch.device) -> Iterator[torch.device]:
    """The process group of a job that `torchrun` started, NCCL for GPUs and gloo otherwise; nothing without one.

    Yields:
        the device of this rank.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield device
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    start("nccl" if device.type == "cuda" else "gloo")
    try:
        yield device
        dist.barrier()
    finally:
        stop()


@contextmanager
def recording_on(ranks: Ranks, config: DeepConfig, *args: Any, **kwargs: Any) -> Iterator[RankRecorder]:
    """`recording` on rank 0, and what it knows on the others."""
    with ExitStack() as stack:
        found: list[Recorder[DeepConfig]] = []

        def enter() -> tuple[Any, ...]:
            recorder = stack.enter_context(recording(config, *args, **kwargs))
            found.append(recorder)
            return recorder.config, recorder.saved, recorder.noise_multiplier, recorder.last, recorder.steps

        known = ranks.on_first(enter)
        yield RankRecorder(ranks, found[0] if found else None, known)
