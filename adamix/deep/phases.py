"""Both phases on minibatches: public rows alone, then public and private rows in one backward pass."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from adamix.deep.compiling import is_compiled
from adamix.deep.config import DeepConfig
from adamix.deep.data import Data, PublicBatches, secret_generators
from adamix.deep.losses import Loss
from adamix.deep.ranks import Ranks
from adamix.deep.weights import Training, traces_of
from adamix.errors import InputError
from adamix.private_phase import Step
from adamix_kernels import DPEngine, FastNoiseWarning, Noise, PoissonSampler, PrivacyError, PublicQuantile

#: The least threshold: below it noise and sums would leave float32's range.
_LEAST = 1e-12


@dataclass(frozen=True)
class Task:
    """What both phases work on. `by_row`: the loss gives one number a row, `[N]`, not their sum. `called` is the model
    itself, or compiled."""

    model: nn.Module
    called: nn.Module
    loss: Loss
    by_row: bool
    public: PublicBatches
    context: Callable[[], AbstractContextManager[Any]]  # of every forward pass
    device: torch.device
    ranks: Ranks

    def losses(self, batch: Any) -> Tensor:
        with self.context():
            return self.loss(self.called, batch)


def public_phase(task: Task, training: Training, config: DeepConfig, on_step: Callable[[int], None]) -> None:
    """Phase 1: minimise the mean loss of public rows. It costs nothing.

    Raises:
        InputError: the weights do not stay finite.
    """
    optimizer = training.optimizer
    for step in range(1, config.public_steps + 1):
        rows = task.public.rows(1, step)
        if own := task.ranks.share(rows):
            loss = task.losses(task.public.data.batch(list(own))).sum() / len(rows)
            (loss * task.ranks.averaged).backward()
        task.ranks.add_gradients(list(training.named.values()))
        optimizer.step()
        optimizer.zero_grad()
        on_step(step)
    if not task.ranks.all(bool(training.weights().isfinite().all())):
        raise InputError("public: phase 1 gives weights that are not finite; lower public_learning_rate")


def make_engine(
    task: Task,
    optimizer: torch.optim.Optimizer,
    config: DeepConfig,
    noise_multiplier: float,
    noise: Noise,
    alone: bool = False,
) -> DPEngine:
    """The engine of phase 2, over all ranks unless it is to be `alone`, which a sharded model cannot be.

    Raises:
        InputError: the model or the settings are nothing for it.
    """
    limit: Any = config.max_grad_norm
    if config.quantile is not None:
        limit = PublicQuantile(config.quantile, every=config.threshold_every, least=_LEAST)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FastNoiseWarning)  # the trainer has said so
            return DPEngine(
                task.model,
                optimizer,
                max_grad_norm=limit,
                noise_multiplier=noise_multiplier,
                expected_batch_size=config.expected_batch_size,
                strategy=config.strategy,
                loss_reduction="sum",
                noise=noise,
                process_group=None if task.ranks.sharded else "local" if alone else task.ranks.group,
            )
    except (PrivacyError, ValueError, TypeError) as error:
        raise InputError(f"model: the private engine does not take it: {error}") from error


def ask_uncompiled(task: Task, config: DeepConfig) -> None:
    """A forward pass of public rows, as long as all others, by which the engine finds which dimension is the batch:
    compiled code cannot be asked."""
    if config.compile or is_compiled(task.model):
        rows = task.public.rows(1, 0)[:1] * config.rows_per_pass(task.ranks.size)
        with torch.compiler.set_stance("force_eager"):
            task.losses(task.public.data.batch(rows))


def try_on_public_rows(task: Task, optimizer: torch.optim.Optimizer, config: DeepConfig) -> None:
    """A step's passes with public rows in the place of private ones, and no step: what the engine refuses is found
    before anything is charged.

    Raises:
        InputError: the engine refuses the model, or a forward pass leaves something of the rows in it.
    """
    engine = make_engine(task, optimizer, config, 0.0, Noise(0), alone=True)
    rows = task.public.rows(1, 0)
    try:
        ask_uncompiled(task, config)
        before = traces_of(task.model)
        few = range(min(len(rows), max(1, config.rows_per_pass(task.ranks.size) - len(rows))))
        for batch in _passes(task, rows, task.public.data, few, config):
            _backward(task, engine, batch, config.public_weight)
        if found := before.changed(traces_of(task.model)):
            raise InputError(
                f"model: a forward pass changes {found}, so that something of private rows would stay in it; keep it "
                "out of the model, or fixed in eval mode"
            )
    except PrivacyError as error:
        raise InputError(f"model: the private engine does not take it: {error}") from error
    finally:
        optimizer.zero_grad()
        engine.detach()


def mixed_phase(
    task: Task,
    training: Training,
    private: Data,
    config: DeepConfig,
    engine: DPEngine,
    *,
    anchor: Tensor,
    charge: Callable[[], None],
    finished: int,
    last: int,
) -> Iterator[Step]:
    """Phase 2, from step `finished + 1` to `last`; yields after each.

    Args:
        private: rows seen only through `engine`.
        anchor: the phase-1 weights `[P]`.
        charge: called in each step before its batch is drawn; what it raises ends the run with nothing drawn.
    """
    ranks, sampler = task.ranks, None
    if len(private):
        sampler = PoissonSampler(
            len(private), config.sample_rate, noise=engine.noise, rank=ranks.rank, world_size=ranks.size
        )
    ask_uncompiled(task, config)
    fixed = traces_of(task.model)
    for number in range(finished + 1, last + 1):
        charge()
        chosen = [] if sampler is None else sampler.draw()
        public_rows = task.public.rows(2, number)
        with secret_generators(task.device):
            losses = None
            for batch in _passes(task, public_rows, private, chosen, config):
                found = _backward(task, engine, batch, config.public_weight)
                losses = found if losses is None else losses
        if changed := fixed.changed(traces_of(task.model)):
            raise InputError(f"model: a forward pass on private rows changed {changed}; the step was not taken")
        if losses is not None:
            losses = engine.gather(losses)
        training.optimizer.step()
        training.optimizer.zero_grad()
        training.pull(anchor, training.rate * config.anchor)
        yield Step(
            number,
            _numbers(engine, config),
            math.nan if losses is None else float(losses.mean()),
            math.nan,
            None,
            training.rate,
        )


@dataclass(frozen=True)
class _Batch:
    """Of one backward pass: `public` rows, then private ones, `count` together, then rows that count nothing."""

    first: bool  # of the step
    rows: Any
    public: int
    count: int


def _passes(
    task: Task, public_rows: list[Any], private: Data, chosen: Sequence[int], config: DeepConfig
) -> Iterator[_Batch]:
    """The batches of a step: this rank's public rows are in the first, private ones are loaded as they come.

    Where the loss is by row, all have the same number of rows, whatever was drawn. A sum of floats may end otherwise
    where a batch is a row longer: so the public gradients and thresholds, which have no noise, do not tell how many
    private rows there are. Of a sharded model all ranks take as many passes, some without a row that counts.
    """
    size, public = config.rows_per_pass(task.ranks.size), task.ranks.share(public_rows)
    own = max(1, math.ceil((len(public) + len(chosen)) / size))
    for number in range(task.ranks.passes(own)):
        first = public if number == 0 else []
        start, stop = (max(0, i * size - len(public)) for i in (number, number + 1))
        rows = [*first, *private.rows(chosen[start:stop])]
        filled = rows + [public_rows[0]] * (size - len(rows) if task.by_row else not rows)
        yield _Batch(number == 0, task.public.data.batch(filled), len(first), len(rows))


def _backward(task: Task, engine: DPEngine, batch: _Batch, weight: float) -> Tensor | None:
    """The losses of the public rows, which are public too; None where the loss is a sum over all."""
    with engine.mixed(slice(0, batch.public), weight) if batch.first else nullcontext():
        losses = task.losses(batch.rows)
        engine.backward(losses[: batch.count].sum() if task.by_row else losses * bool(batch.count))
    return _public_losses(losses, batch) if task.by_row and batch.first else None


def _public_losses(losses: Tensor, batch: _Batch) -> Tensor:
    return losses[: batch.public].detach()


def _numbers(engine: DPEngine, config: DeepConfig) -> tuple[float, ...]:
    if config.quantile is None:
        return (float(config.max_grad_norm or 0),)
    found = engine.thresholds
    values = list(found.values()) if isinstance(found, dict) else [found]
    return tuple(torch.stack([x.to(values[0].device) for x in values]).tolist())
