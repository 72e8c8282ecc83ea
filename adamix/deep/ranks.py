"""The ranks of a job that train one model: each on a share of the rows, with one ledger and one set of checkpoints.

All ranks hold the whole model and step it alike, or each has a shard of it (`fully_shard`); the engine adds their sums
and draws the noise once. Rank 0 charges the ledger and writes the checkpoints, of a sharded model with all others, and
none goes on until that has succeeded.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from adamix.checkpoint import Checkpoint
from adamix.deep import parts
from adamix.deep.config import DeepConfig
from adamix.deep.parts import PartsRecorder
from adamix.deep.sharding import agree, check_mesh, is_sharded
from adamix.deep.weights import Training
from adamix.distributed import start, stop
from adamix.errors import InputError
from adamix.ledger import Ledger
from adamix.parts import on_first
from adamix.privacy import calibrate, spent_by_step
from adamix.private_phase import Step
from adamix.recorder import Recorder, recording

Row = TypeVar("Row")


@dataclass(frozen=True)
class Ranks:
    """This process among those of `group`; one of one where it trains alone."""

    rank: int = 0
    size: int = 1
    group: Any = None
    sharded: bool = False

    @classmethod
    def of(cls, model: nn.Module) -> Ranks:
        """Those of a model in DistributedDataParallel, or sharded; else all processes of the job, if it has several.

        Raises:
            InputError: it is sharded over some of the processes.
        """
        if isinstance(model, nn.parallel.DistributedDataParallel):
            group = model.process_group
            return cls(dist.get_rank(group), dist.get_world_size(group), group)
        if is_sharded(model):
            check_mesh(model)
            return cls(dist.get_rank(), dist.get_world_size(), dist.group.WORLD, sharded=True)
        if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
            return cls()
        return cls(dist.get_rank(), dist.get_world_size(), dist.group.WORLD)

    def share(self, rows: Sequence[Row]) -> Sequence[Row]:
        """This rank's part of rows that all ranks have."""
        return rows[self.rank :: self.size]

    def on_first(self, action: Callable[[], Any]) -> Any:
        """What `action` gives on rank 0, on all of them; it runs there alone, and what it raises is raised by all."""
        return action() if self.size == 1 else on_first(action, self.group)

    def check_equal(self, known: Mapping[str, Any], *, told: bool = True) -> None:
        """Raise on all ranks if they were given different things: one rank's public rows may be another's private ones.

        Args:
            known: by name, what can be compared and pickled.
            told: whether the message has the values: not if they are long, or a hash of private rows.
        """
        if self.size == 1:
            return
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, dict(known), group=self.group)
        for rank, other in enumerate(found):
            for name in found[0] | other:
                first, own = found[0].get(name), other.get(name)
                if first != own:
                    values = f", {first!r} and {own!r}" if told else ""
                    raise InputError(
                        f"{name}: differs between ranks 0 and {rank}{values}; let all ranks call fit() with the same "
                        "model, settings and rows, in one order (seed what shuffles or splits them)"
                    )

    def agree(self, tensors: Sequence[Tensor]) -> None:
        """Those of rank 0 on all ranks."""
        if self.size > 1:
            agree(tensors, self.group)

    def passes(self, own: int) -> int:
        """Passes of a step: as many as this rank needs, or where a pass takes all ranks, as one of them does."""
        if not self.sharded or self.size == 1:
            return own
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, own, group=self.group)
        return max(found)

    def all(self, holds: bool) -> bool:
        """Whether it does on all ranks."""
        if self.size == 1:
            return holds
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, holds, group=self.group)
        return all(found)

    @property
    def averaged(self) -> int:
        """What an ordinary gradient is divided by before `add_gradients`: a sharded model makes the mean over ranks."""
        return self.size if self.sharded else 1

    def add_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Of public rows: the sum over ranks."""
        if self.size > 1 and not self.sharded:
            for p in parameters:
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
                dist.all_reduce(p.grad, group=self.group)


class RankRecorder:
    """A `Recorder` that rank 0 alone has; the others know what it says. All ranks make each call.

    Of a sharded model with checkpoints, in the folder `parts`, all ranks write them.
    """

    def __init__(
        self, ranks: Ranks, recorder: Recorder[DeepConfig] | None, known: tuple[Any, ...], parts: Path | None
    ) -> None:
        self._ranks, self._recorder, self._parts = ranks, recorder, parts
        self.config: DeepConfig
        self.saved: Checkpoint | None
        self.config, self.saved, self.noise_multiplier, self.last, steps = known
        self.steps: list[Step] = list(steps)

    def begin(self, training: Training, *, anchor: Tensor) -> None:
        """As `Recorder.begin`; of a sharded model the anchor is this rank's part."""
        self._anchor = anchor
        self._call("keep", training, anchor=anchor, start=anchor)
        self._write(training)
        self._call("start")

    def charge(self) -> None:
        self._call("charge")

    def finish_step(self, step: Step, training: Training) -> None:
        self.steps.append(step)
        self._call("finish_step", step, training)
        self._write(training)

    def _write(self, training: Training) -> None:
        """A checkpoint that is due, by all ranks."""
        if self._parts is None:
            return
        recorder, due = self._recorder, None
        if isinstance(recorder, PartsRecorder):
            due = recorder.take_due()
        if self._ranks.on_first(lambda: due is not None):
            parts.save(self._parts, due, len(self.steps), training, self._anchor)

    def end(self) -> None:
        self._call("end")

    def epsilons(self) -> list[float]:
        charged = self._call("charged")
        # By all ranks at a time, though rank 0 is asked, which has kept them: others would wait longer than they may.
        spent_by_step(
            self.noise_multiplier, delta=self.config.delta, steps=charged, sample_rate=self.config.sample_rate
        )
        return self._call("epsilons")

    def ledger_epsilon(self) -> float | None:
        return self._call("ledger_epsilon")

    def _call(self, name: str, *args: Any, **kwargs: Any) -> Any:
        return self._ranks.on_first(lambda: getattr(self._recorder, name)(*args, **kwargs))


@contextmanager
def job_of_torchrun(device: torch.device, alone: bool = False) -> Iterator[torch.device]:
    """The process group of a job that `torchrun` started, NCCL for GPUs and gloo otherwise.

    Args:
        alone: whether a process that is alone has a group too, as a sharded model needs; else it has none.

    Yields:
        the device of this rank.
    """
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if not several and not alone:
        yield device
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    if several:
        start(backend)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    try:
        yield device
        dist.barrier()
    finally:
        stop()


@contextmanager
def recording_on(
    ranks: Ranks,
    training: Training,
    config: DeepConfig,
    ledger: Ledger | str | Path | None,
    checkpoint: str | Path | None,
    **kwargs: Any,
) -> Iterator[RankRecorder]:
    """`recording` on rank 0, and what it knows on the others; of a checkpoint of a sharded model each has its part,
    and `training` takes on its weights."""
    if not kwargs["resume"]:  # by all ranks at a time, see `RankRecorder.epsilons`
        calibrate(config.epsilon, delta=config.delta, steps=config.steps, sample_rate=config.sample_rate)
    with ExitStack() as stack:
        found: list[Recorder[DeepConfig]] = []
        kind = PartsRecorder if ranks.sharded else Recorder[DeepConfig]

        def enter() -> tuple[Any, ...]:
            recorder = stack.enter_context(recording(config, ledger, checkpoint, kind=kind, **kwargs))
            found.append(recorder)
            known = recorder.config, recorder.saved, recorder.noise_multiplier, recorder.last, recorder.steps
            folder = Path(checkpoint) if ranks.sharded and checkpoint is not None else None
            return known, folder, recorder.found if isinstance(recorder, PartsRecorder) else None

        known, folder, record = ranks.on_first(enter)
        recorder = RankRecorder(ranks, found[0] if found else None, known, folder)
        if folder is not None and recorder.saved is not None:
            recorder.saved = parts.load(folder, recorder.saved, record, training)
        yield recorder
