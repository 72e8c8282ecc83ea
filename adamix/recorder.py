"""One run's ledger and checkpoints, as the trainer uses them: what is charged when, and where a resumed run goes on."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import uuid
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from adamix.checkpoint import Checkpoint, check_unused, load_checkpoint, save_checkpoint
from adamix.config import Budget
from adamix.errors import InputError
from adamix.ledger import Ledger
from adamix.models import Trainable, Weights
from adamix.privacy import calibrate, spent, spent_by_step
from adamix.private_phase import Step
from adamix.rows import Rows

Settings = TypeVar("Settings", bound=Budget)


@contextmanager
def recording(
    config: Settings,
    ledger: Ledger | str | Path | None,
    checkpoint: str | Path | None,
    *,
    every: int,
    resume: bool,
    fixed: dict[str, Any],
    unit: str = "record",
    kind: type[Recorder[Settings]] | None = None,
) -> Iterator[Recorder[Settings]]:
    """A `Recorder` for one run; a ledger given as a path is open and locked inside the block only.

    Args:
        fixed: what besides `config` a resumed run must find as it was, as JSON.
        unit: what one neighbour more or less is in this run.
        kind: of recorder; None: one that writes the checkpoints by itself.

    Raises:
        InputError: see `AdaMix.fit`.
    """
    _check_arguments(config, ledger, checkpoint, every, resume)
    opened = Ledger(ledger) if isinstance(ledger, str | Path) else ledger
    try:
        if opened is not None and opened.book.unit != unit:
            raise InputError(f"ledger: its unit is one {opened.book.unit}, this run protects one {unit}; name another")
        made = Recorder[Settings] if kind is None else kind
        yield made(config, opened, None if checkpoint is None else Path(checkpoint), every, resume, fixed)
    finally:
        if opened is not None and opened is not ledger:
            opened.close()


class Recorder(Generic[Settings]):
    """Without a ledger it does nothing but count.

    `config`: the settings the run began with, on which step sizes rest; `last`: the step to stop after, fewer if a
    resumed run was given fewer; `saved`: where it goes on; `steps`: those finished.
    """

    def __init__(
        self,
        config: Settings,
        ledger: Ledger | None,
        folder: Path | None,
        every: int,
        resume: bool,
        fixed: dict[str, Any],
    ) -> None:
        self.config, self.last, self.steps = config, config.steps, list[Step]()
        self._ledger, self._folder, self._every, self._fixed = ledger, folder, every, fixed
        self._charged = 0
        self.saved: Checkpoint | None = None
        if not resume:
            if folder is not None:
                check_unused(folder)
            self.noise_multiplier = calibrate(
                config.epsilon, delta=config.delta, steps=config.steps, sample_rate=config.sample_rate
            )
            self._run = uuid.uuid4().hex
            if ledger is not None:
                ledger.check(self.noise_multiplier, config.sample_rate, config.steps)
            return
        assert ledger is not None and folder is not None  # by _check_arguments
        saved = self.saved = self._load(folder)
        ledger.require(saved.ledger_count, saved.ledger_head)
        _check_same(saved, config, fixed)
        self.config = dataclasses.replace(config, steps=saved.config["steps"])
        self.noise_multiplier, self._run = saved.noise_multiplier, saved.run
        self.steps = [_step(metrics) for metrics in saved.metrics]
        if (run := ledger.book.runs.get(self._run)) is not None:
            self._charged = run.charged
            if run.ended and not self.finished:
                raise InputError(f"resume: run {run.id} has ended in the ledger; start a new run")
        if not self.finished:
            ledger.check(
                self.noise_multiplier,
                config.sample_rate,
                self._remaining,
                run.id if run else None,
                finished=len(self.steps),
            )
            self._warn_of_extra_steps()

    @property
    def finished(self) -> bool:
        """All steps were taken before."""
        return len(self.steps) >= self.last

    @property
    def _remaining(self) -> int:
        return self.last - len(self.steps)

    def begin(self, view: Weights, *, anchor: Tensor, start: Tensor) -> None:
        """Before the first step of this process: the checkpoint that a run is resumed from, then its line."""
        self.keep(view, anchor=anchor, start=start)
        self.start()

    def keep(self, view: Weights, *, anchor: Tensor, start: Tensor) -> None:
        """The first half of `begin`."""
        self._anchor, self._start = anchor, start
        if self.saved is None and self._folder is not None:
            self._save(view)

    def start(self) -> None:
        """The second half."""
        if self._ledger is None or self.finished:
            return
        if self._run in self._ledger.book.runs:
            self._ledger.resume_run(self._run, self._remaining)
        else:
            self._ledger.start_run(
                noise_multiplier=self.noise_multiplier,
                sample_rate=self.config.sample_rate,
                steps=self._remaining,
                delta=self.config.delta,
                run=self._run,
            )

    def charge(self) -> None:
        """Called before the batch of a step is drawn: returns when the step is safely charged."""
        self._charged = self._charged + 1 if self._ledger is None else self._ledger.charge(self._run)

    def finish_step(self, step: Step, view: Weights) -> None:
        self.steps.append(step)
        if self._folder is not None and (self.finished or len(self.steps) % self._every == 0):
            self._save(view)

    def end(self) -> None:
        if self._ledger is not None and not self._ledger.book.runs[self._run].ended:
            self._ledger.end_run(self._run)

    def charged(self) -> int:
        """Steps, those that were lost and taken again among them."""
        return self._charged

    def epsilons(self) -> list[float]:
        """The run's epsilon after each finished step. Steps charged twice count from the first step on: when each of
        them was lost is not known, and this is never too low."""
        values = spent_by_step(
            self.noise_multiplier, delta=self.config.delta, steps=self._charged, sample_rate=self.config.sample_rate
        )
        return values[self._charged - len(self.steps) :]

    def ledger_epsilon(self) -> float | None:
        """Of all runs in the ledger, at its own delta."""
        return None if self._ledger is None else self._ledger.spent()

    def _load(self, folder: Path) -> Checkpoint:
        return load_checkpoint(folder)

    def _save(self, view: Weights) -> None:
        assert self._folder is not None
        optimizer, state = view.optimizer_state()
        save_checkpoint(
            self._folder,
            Checkpoint(
                **self._record(),
                weights=view.weights(),
                anchor=self._anchor,
                start=self._start,
                optimizer=optimizer,
                optimizer_state=state,
            ),
        )

    def _record(self) -> dict[str, Any]:
        """What a checkpoint says beside tensors."""
        assert self._ledger is not None
        return {
            "run": self._run,
            "finished": len(self.steps),
            "config": _plain(dataclasses.asdict(self.config)),
            "noise_multiplier": self.noise_multiplier,
            "fixed": self._fixed,
            "metrics": [_plain(dataclasses.asdict(step)) for step in self.steps],
            "ledger_count": self._ledger.count,
            "ledger_head": self._ledger.head,
        }

    def _warn_of_extra_steps(self) -> None:
        extra = self._charged + self._remaining - self.config.steps
        if extra > 0 and self.noise_multiplier:
            epsilon = spent(
                self.noise_multiplier,
                delta=self.config.delta,
                steps=self.config.steps + extra,
                sample_rate=self.config.sample_rate,
            )
            warnings.warn(
                f"resume: interrupted steps are charged again, {extra} in all, so the run costs epsilon {epsilon:.6g} "
                f"instead of {self.config.epsilon:g}; pass fewer steps to stay within it",
                stacklevel=6,
            )


def fixed_parts(view: Trainable, public: Rows, classes: int) -> dict[str, Any]:
    """What a resumed run must find as it was, as JSON. Of public data only: a hash of private rows would tell."""
    trained = {name for name, p in view.module.named_parameters(remove_duplicate=False) if p.requires_grad}
    rest = [tensor for name, tensor in view.module.state_dict().items() if name not in trained]
    return {
        "shape of a row": list(public.x.shape[1:]),
        "classes": classes,
        "trained parameters": view.size,
        "public rows": digest_of(public.x, public.y),
        "frozen parameters and buffers": digest_of(*(tensor for tensor in rest if isinstance(tensor, Tensor))),
    }


def digest_of(*tensors: Tensor) -> str:
    """A hash of their types, shapes and values."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(bytes(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()))
    return digest.hexdigest()


def _check_arguments(config: Budget, ledger: Any, checkpoint: Any, every: Any, resume: bool) -> None:
    if ledger is not None and not isinstance(ledger, Ledger | str | Path):
        raise InputError(f"ledger: is {type(ledger).__name__}; pass the path of a ledger, or a Ledger")
    if checkpoint is not None and not isinstance(checkpoint, str | Path):
        raise InputError(f"checkpoint: is {type(checkpoint).__name__}; pass the path of a folder")
    if checkpoint is not None and ledger is None:
        raise InputError("checkpoint: given without a ledger, which counts the steps that a crash interrupts; pass one")
    if resume and checkpoint is None:
        raise InputError("resume: given without a checkpoint; pass the folder and the ledger of the interrupted run")
    if isinstance(every, bool) or not isinstance(every, int) or every < 1:
        raise InputError(f"checkpoint_every: {every!r} is not valid here; pass a whole number >= 1")
    if ledger is not None and config.noise_seed is not None:
        raise InputError(
            "noise_seed: given with a ledger; runs of one seed share their noise, which no sum covers: drop it"
        )


def _check_same(saved: Checkpoint, config: Budget, fixed: dict[str, Any]) -> None:
    """Refuse to go on with anything else than what the run began with; fewer steps are allowed."""
    given = _plain(dataclasses.asdict(config))
    for name in given | saved.config:
        before, now = saved.config.get(name), given.get(name)
        if name == "steps":
            if not saved.finished <= now <= before:
                raise InputError(
                    f"steps: {now} given to resume a run of {before} that finished {saved.finished}; pass a number "
                    "from the one to the other, the same or fewer"
                )
        elif before != now:
            raise InputError(
                f"{name}: the run to resume has {before!r}, given {now!r}; pass the same, or start a new run"
            )
    for name, now in fixed.items():
        if saved.fixed.get(name) != now:
            raise InputError(
                f"resume: the {name} differ from those of the run to resume; pass the same, or start a new run"
            )


def _plain(value: Any) -> Any:
    """As JSON can hold it: NumPy's numbers become Python's, infinities and NaN texts, which `float` reads."""
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, Real) and not isinstance(value, bool):
        value = int(value) if isinstance(value, Integral) else float(value)
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _step(metrics: dict[str, Any]) -> Step:
    numbers = {name: float(metrics[name]) for name in ("public_loss", "public_clipped", "step_size")}
    return Step(**{**metrics, **numbers, "thresholds": tuple(float(tau) for tau in metrics["thresholds"])})
