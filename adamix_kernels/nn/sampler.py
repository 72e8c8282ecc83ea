"""Batches by chance: Poisson sampling, which the privacy accounting of small batches rests on."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.data import Sampler, default_collate

from adamix_kernels.ops.noise import Noise, coin_rate


class SamplingEvent(NamedTuple):
    """How the batch of a step was drawn, for an accountant; `adamix.privacy.spent_on` takes it."""

    sample_rate: float
    dataset_size: int
    max_batch_size: int | None = None  # of a truncated batch


class PoissonSampler(Sampler[list[int]]):
    """Each step takes each sample with probability `sample_rate`, by itself and afresh: a `batch_sampler`.

        sampler = PoissonSampler(len(dataset), 0.01)
        loader = DataLoader(dataset, batch_sampler=sampler, collate_fn=sampler.collate(dataset))

    Batches have different sizes and may be empty: a step on an empty one is still due. The engine's
    `expected_batch_size` is `sampler.expected_batch_size`.

    Args:
        num_samples: samples in the data set.
        sample_rate: in (0, 1].
        steps: batches in an epoch; None means ceil(1 / sample_rate).
        max_batch_size: a batch that is larger keeps a random subset of this size; see `pad_batch`. The accounting
            differs, `event` says so.
        noise: source of the draws; None takes a key of the operating system. Whoever knows the draws knows who took
            part, and there is no amplification by sampling.
        rank, world_size: of a job whose ranks train one model. Sample i belongs to rank i % world_size, which alone
            draws it, from its own samples; the batches of all ranks together are one Poisson batch, and as many on
            each. `num_samples`, `expected_batch_size` and `event` are those of the whole. With equal keys on all ranks
            the samples are those that one process draws. `max_batch_size` would be of each rank and is refused.
    """

    def __init__(
        self,
        num_samples: int,
        sample_rate: float,
        *,
        steps: int | None = None,
        max_batch_size: int | None = None,
        noise: Noise | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        for name, count in (("num_samples", num_samples), ("steps", steps), ("max_batch_size", max_batch_size)):
            if count is None and name != "num_samples":
                continue
            if not isinstance(count, int) or isinstance(count, bool):
                raise TypeError(f"{name}: is {type(count).__name__}; pass an int")
            if count < 1:
                raise ValueError(f"{name}: is {count}; pass at least 1")
        if not isinstance(sample_rate, int | float) or isinstance(sample_rate, bool):
            raise TypeError(f"sample_rate: is {type(sample_rate).__name__}; pass a number")
        if not 0 < sample_rate <= 1:
            raise ValueError(f"sample_rate: is {sample_rate}; pass a number above 0, at most 1")
        if noise is not None and not isinstance(noise, Noise):
            raise TypeError(f"noise: is {type(noise).__name__}; pass adamix_kernels.Noise()")
        for name, count in (("rank", rank), ("world_size", world_size)):
            if not isinstance(count, int) or isinstance(count, bool):
                raise TypeError(f"{name}: is {type(count).__name__}; pass an int")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank: is {rank} of world_size {world_size}; pass a rank from 0 to world_size - 1")
        if max_batch_size is not None and world_size > 1:
            raise ValueError("max_batch_size: is not supported over several ranks, whose batches are one; pass None")
        self.rank, self.world_size = rank, world_size
        self.num_samples, self.sample_rate, self.max_batch_size = num_samples, float(sample_rate), max_batch_size
        self.steps = math.ceil(1 / sample_rate) if steps is None else steps
        self._noise = Noise() if noise is None else noise

    @property
    def expected_batch_size(self) -> float:
        """The public constant that a noisy sum is divided by."""
        return self.num_samples * self.sample_rate

    @property
    def event(self) -> SamplingEvent:
        """Of each step."""
        return SamplingEvent(self.sample_rate, self.num_samples, self.max_batch_size)

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[list[int]]:
        for _ in range(self.steps):
            yield self.draw()

    def draw(self) -> list[int]:
        """The next batch."""
        rate = coin_rate(self.sample_rate)
        taken = (self._noise.uniform(self.num_samples) < rate).nonzero().flatten()
        taken = taken[taken % self.world_size == self.rank]  # also of equal keys: ranks must not share their coins
        if self.max_batch_size is not None and len(taken) > self.max_batch_size:
            kept = self._noise.uniform(len(taken)).argsort()[: self.max_batch_size]
            taken = taken[kept].sort().values
        return taken.tolist()

    def collate(self, dataset: Any, collate_fn: Callable[[list[Any]], Any] = default_collate) -> Collate:
        """`collate_fn` that gives an empty batch the form of the others, with 0 rows."""
        return Collate(dataset, collate_fn)


class Collate:
    """Collates batches that may be empty: those are what sample 0 collates to, without its row.

    Nothing of the sample is left in it but the types and the shape behind dimension 0.
    """

    def __init__(self, dataset: Any, collate_fn: Callable[[list[Any]], Any]) -> None:
        self._dataset, self._collate = dataset, collate_fn

    def __call__(self, samples: list[Any]) -> Any:
        if samples:
            return self._collate(samples)
        one = self._collate([self._dataset[0]])
        odd = [x for x in tree_leaves(one) if not (isinstance(x, Tensor) and x.dim() > 0 and x.shape[0] == 1)]
        if odd:
            raise TypeError(
                f"collate_fn: makes a {type(odd[0]).__name__} without a row for each sample; an empty batch needs "
                "tensors alone, with the batch in dimension 0"
            )
        return tree_map(lambda x: x[:0], one)


def pad_batch(batch: Any, size: int) -> tuple[Any, Tensor]:
    """A batch of one fixed size, for compiled code, and its mask.

    The rows that are added are zeros; the mask, float32 `[size]`, is 1 for samples and 0 for them. Their losses must
    count nothing:

        batch, mask = pad_batch(batch, sampler.max_batch_size)
        losses = F.cross_entropy(model(batch["x"]), batch["y"], reduction="none")
        (losses * mask).sum().backward()       # with loss_reduction="sum"

    Args:
        batch: tensors `[B, *]`, nested in tuples, lists and dicts.
        size: at least B.
    """
    if isinstance(batch, Mapping):
        batch = dict(batch)
    leaves = tree_leaves(batch)
    if not leaves or not all(isinstance(x, Tensor) and x.dim() > 0 for x in leaves):
        raise TypeError("batch: must hold tensors alone, with the batch in dimension 0")
    rows = {len(x) for x in leaves}
    if len(rows) > 1 or max(rows) > size:
        raise ValueError(f"batch: has tensors of {sorted(rows)} rows; pass equal numbers of at most size = {size}")
    count = rows.pop()
    padded = tree_map(lambda x: F.pad(x, [0, 0] * (x.dim() - 1) + [0, size - count]), batch)
    return padded, (torch.arange(size, device=leaves[0].device) < count).float()
