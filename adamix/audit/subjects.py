"""What is audited, run as a user runs it: `DPEngine` in a plain loop, and `AdaMix.fit`.

Whoever attacks here has chosen the rows and sees every release (a white box): the noisy gradient of each step of the
engine, the weights after each step of the trainer. Everything is read from public attributes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from adamix.mechanism import Mechanism
from adamix.private_phase import Step
from adamix.rows import Rows
from adamix.trainer import AdaMix
from adamix_kernels import DPEngine, Noise, PoissonSampler

Array = NDArray[np.float64]
Present = NDArray[np.bool_]

#: Gradients of canaries are so many times the threshold: what they add must be cut to it.
_LOUD = 3.0
#: Not 1, so that a threshold left out of a product is noticed.
_THRESHOLD = 0.7
_LEARNING_RATE = 1e-3
_MICRO_BATCHES = 2
_SHARDS = 2


def _source(mode: str, seed: int | None = None) -> Noise | None:
    """None is fast noise with a key of its own, the default of engine and sampler: then that is what is audited."""
    return None if (mode, seed) == ("fast", None) else Noise(seed, mode)


class Canaries(nn.Module):
    """Sample b has one coordinate to itself in each of `shards` tables of `count` numbers."""

    def __init__(self, count: int, shards: int = _SHARDS) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(count, 1) for _ in range(shards))

    def forward(self, index: Tensor) -> Tensor:
        """`[B]` -> `[B, 1]`."""
        return torch.cat([table(index) for table in self.tables], 1).sum(1, keepdim=True)


class EngineRun:
    """`DPEngine` on a `Canaries` model; `step(index)` is one step of the loop."""

    def __init__(
        self, count: int, noise_multiplier: float, expected: float, strategy: str = "auto", noise: Noise | None = None
    ) -> None:
        self.model = Canaries(count)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=_LEARNING_RATE)
        self.dp = DPEngine(
            self.model,
            self.optimizer,
            max_grad_norm=_THRESHOLD,
            noise_multiplier=noise_multiplier,
            expected_batch_size=expected,
            strategy=strategy,
            noise=noise,
        )

    def step(self, index: Tensor) -> list[Array]:
        """What the step releases of each shard, as a sum over samples in units of the threshold: `[count]` each."""
        for part in index.chunk(_MICRO_BATCHES) if len(index) else [index]:
            self.dp.backward((_LOUD * self.model(part)).mean())
        self.optimizer.step()
        grads = [p.grad for p in self.model.parameters() if p.grad is not None]
        self.optimizer.zero_grad()
        return [g.flatten().double().numpy() * (self.dp.expected_batch_size / _THRESHOLD) for g in grads]


def engine_releases(
    present: Present,
    noise_multiplier: float,
    steps: int,
    sample_rate: float,
    strategy: str = "auto",
    mode: str = "fast",
    seed: int | None = None,
) -> Array:
    """Train on the canaries that are present; the releases along each canary `[steps, canaries]`, over the threshold.

    Canary b's gradient has the same value in each shard, so its direction is their mean: with one shard it is one-hot.
    """
    members = torch.from_numpy(np.flatnonzero(present))
    expected = max(1.0, sample_rate * len(present) / 2)  # a planned figure, not a count
    seeds = (None, None) if seed is None else (2 * seed, 2 * seed + 1)
    run = EngineRun(len(present), noise_multiplier, expected, strategy, _source(mode, seeds[0]))
    if sample_rate == 1:
        batches = [members] * steps
    else:
        sampler = PoissonSampler(len(members), sample_rate, steps=steps, noise=_source(mode, seeds[1]))
        batches = [members[torch.tensor(batch, dtype=torch.int64)] for batch in sampler]
    return np.stack([sum(run.step(batch), np.zeros(len(present))) / math.sqrt(_SHARDS) for batch in batches])


def engine_noise(count: int, steps: int, mode: str = "fast") -> tuple[list[list[Array]], list[Array]]:
    """The releases of `steps` empty batches by shard `[steps][shards]`, in units of the stated noise, and of the first
    shard in the steps of two runs that are resumed there."""
    noise_multiplier, nobody = 1.3, torch.zeros(0, dtype=torch.int64)
    first = EngineRun(count, noise_multiplier, 50.0, noise=_source(mode))
    released = [[part / noise_multiplier for part in first.step(nobody)] for _ in range(steps)]
    others = []
    for _ in range(2):
        resumed = EngineRun(count, noise_multiplier, 50.0, noise=_source(mode))
        resumed.dp.load_state_dict(first.dp.state_dict())
        others.append(resumed.step(nobody)[0] / noise_multiplier)
    return released, others


def trainer_releases(present: Present, settings: dict[str, Any]) -> tuple[Array, float]:
    """`AdaMix.fit` on the canaries that are present: releases along each `[steps, canaries]`, over the threshold, and
    the noise multiplier.

    Private row b is a feature vector with its own feature alone, of class 1 of 2, loud enough to be clipped; public
    rows have the last feature. A row's gradient is then (1, -1) in its feature, and the weights tell the release.
    """
    count = len(present)
    rows = torch.zeros(count, count + 1)
    rows[torch.arange(count), torch.arange(count)] = 2 * _LOUD
    private = rows[torch.from_numpy(present)]
    released, noise_multiplier = _fit(private, torch.ones(len(private), dtype=torch.int64), settings)
    along = (released[:, 0, :count] - released[:, 1, :count]) / math.sqrt(2)
    return along, noise_multiplier


def trainer_noise(width: int, settings: dict[str, Any]) -> list[list[Array]]:
    """The releases of each step of `AdaMix.fit` without private rows, by class, in units of the stated noise."""
    released, noise_multiplier = _fit(torch.zeros(0, width + 1), torch.zeros(0, dtype=torch.int64), settings)
    return [list(step[:, :width] / noise_multiplier) for step in released]


def _fit(x: Tensor, y: Tensor, settings: dict[str, Any]) -> tuple[Array, float]:
    """All releases `[steps, 2, features]` over the threshold of their step, by the weights before and after."""
    public = torch.zeros(2, x.shape[1])
    public[:, -1] = 1.0
    head = nn.Linear(x.shape[1], 2, bias=False)
    nn.init.zeros_(head.weight)
    steps: list[Step] = []
    weights: list[Tensor] = []

    def watch(step: Step) -> None:
        steps.append(step)
        weights.append(head.weight.detach().double().clone())

    expected = max(1, round(0.5 * x.shape[1] * settings.get("sample_rate", 1.0)))
    trainer = AdaMix(
        head,
        expected_batch_size=expected,
        geometry=None,
        public_weight=0.0,
        learning_rate=_LEARNING_RATE,
        anchor=0.0,
        warm_start=False,
        **settings,
    )
    result = trainer.fit(public=(public, torch.tensor([0, 1])), private=(x, y), on_step=watch)
    before = [torch.zeros_like(weights[0]), *weights[:-1]]
    moves = [(b - a) / (step.step_size * step.thresholds[0]) for a, b, step in zip(weights, before, steps, strict=True)]
    return torch.stack(moves).numpy() * expected, result.noise_multiplier


def taken_by_sampler(rows: int, steps: int, sample_rate: float, mode: str = "fast") -> Present:
    """`[steps, rows]`: which rows the batches of a `PoissonSampler` hold."""
    sampler = PoissonSampler(rows, sample_rate, steps=steps, noise=_source(mode))
    return _table(rows, steps, iter(sampler).__next__)


def taken_by_mechanism(rows: int, steps: int, sample_rate: float, mode: str = "fast") -> Present:
    """The same of the batches that the trainer draws."""
    mechanism = Mechanism(1.0, Noise(mode=mode))
    numbered = Rows(torch.arange(rows)[:, None].double(), torch.arange(rows))

    def draw() -> list[int]:
        return mechanism.sample(numbered, sample_rate).y.tolist()

    return _table(rows, steps, draw)


def _table(rows: int, steps: int, draw: Callable[[], list[int]]) -> Present:
    taken = np.zeros((steps, rows), dtype=np.bool_)
    for step in range(steps):
        taken[step, draw()] = True
    return taken
