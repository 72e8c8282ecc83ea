"""The processes of a job: what they must agree on, and sums of all of them with noise that is drawn once.

Each rank has samples of its own and whole layers, so that norms and clipping are its own affair; clipped sums are added
over the ranks. All ranks share the key of the noise, and each draws the part that it adds, by its place in the draw:
the noise of a step is bit for bit that of one process with this key. The key crosses the network of the job.
"""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from adamix_kernels.nn.errors import PrivacyError
from adamix_kernels.ops.noise import Noise

if TYPE_CHECKING:
    from adamix_kernels.nn.sharded import Shards

#: Numbers of a sum that are sent at once: 64 MiB of float32.
BUCKET = 1 << 24

#: Where ranks meet.
PLACES = ("optimizer.step()", "a forward pass", "a backward pass", "a gathering of public rows")

Named = Sequence[tuple[str, Tensor]]


def reduce_scatter(out: Tensor, flat: Tensor, group: Any) -> None:
    """Own part `[n]` of a sum over ranks of `[size * n]`."""
    run = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor  # its name before torch 2.13
    run(out, flat, group=group)


def all_gather(out: Tensor, part: Tensor, group: Any) -> None:
    """Parts `[n]` of all ranks, `[size * n]`."""
    run = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    run(out, part, group=group)


class Ranks:
    """A group of processes that train one model."""

    shards: Shards | None = None

    def __init__(self, group: Any, device: torch.device) -> None:
        # Not kept alive: destroy_process_group() must end its threads, which at Python's own end would abort.
        self._group = weakref.ref(group)
        self.size, self.rank = dist.get_world_size(group), dist.get_rank(group)
        # What the host must know is sent between hosts where that can be done, so that nobody waits for a device.
        self._device = torch.device("cpu") if "cpu:" in dist.get_backend_config(group) else device

    @property
    def group(self) -> Any:
        group = self._group()
        if group is None:
            raise PrivacyError("process_group: was destroyed; make a new DPEngine in a new group")
        return group

    # --- at the start --------------------------------------------------------------------------------------------

    def check_equal(self, settings: Mapping[str, Any]) -> None:
        """Raise on all ranks if a setting differs between any two."""
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, dict(settings), group=self.group)
        for name in found[0]:
            for rank, other in enumerate(found):
                if other.get(name) != found[0][name]:
                    raise PrivacyError(
                        f"{name}: is {found[0][name]!r} on rank 0 and {other.get(name)!r} on rank {rank}; make the "
                        "DPEngine with equal settings, of equal models, on all ranks"
                    )

    def shared(self, noise: Noise) -> Noise:
        """The noise of rank 0, its key and its count of draws; on rank 0 the object itself."""
        known: list[Any] = [(noise._key, noise.mode, noise._draws)]
        dist.broadcast_object_list(known, group=self.group, group_src=0)
        return noise if self.rank == 0 else Noise._at(*known[0])

    # --- in each step --------------------------------------------------------------------------------------------

    def rows_of_all(self, row: Sequence[float]) -> list[list[float]]:
        """A row of numbers of each rank, as many on each."""
        mine = torch.tensor(row, dtype=torch.float64, device=self._device)
        found = mine.new_empty(self.size * len(mine))
        all_gather(found, mine, self.group)
        return found.view(self.size, -1).tolist()

    def meet(self, place: str, number: float) -> list[float]:
        """A number of each rank; `place`, of `PLACES`, is where it comes from.

        Before all else that ranks send each other: a rank that is elsewhere would take numbers for what they are not.

        Raises:
            PrivacyError: on all ranks, if they are not all there.
        """
        found = self.rows_of_all([float(PLACES.index(place)), number])
        for rank, (other, _) in enumerate(found):
            if other != found[0][0]:
                raise PrivacyError(
                    f"ranks do not take the same steps: rank 0 is in {PLACES[int(found[0][0])]}, rank {rank} in "
                    f"{PLACES[int(other)]}; let all call the same in the same order, also with batches without a row"
                )
        return [theirs for _, theirs in found]

    def any(self, flag: bool) -> bool:
        return any(self.meet("a forward pass", float(flag)))

    def gather(self, x: Tensor) -> Tensor:
        """`[n]` of each rank, n its own, as one in the order of the ranks."""
        counts = [int(count) for count in self.meet("a gathering of public rows", float(len(x)))]
        padded = x.new_zeros(max(counts))
        padded[: len(x)] = x
        found = x.new_empty(self.size * len(padded))
        if len(padded):
            all_gather(found, padded, self.group)
        return torch.cat([part[:n] for part, n in zip(found.view(self.size, -1), counts, strict=True)])

    def check_disjoint(self, users: set[int]) -> None:
        """A user whose rows are on two ranks would be clipped twice and count twice."""
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, users, group=self.group)
        again = sum(map(len, found)) - len(set().union(*found))
        if again:
            raise PrivacyError(
                f"users: {again} users have rows on several ranks in one step, and would count as often; give all rows "
                "of a user to one rank"
            )

    def check_weights(self, named: Named) -> None:
        """Raise on all ranks if they have other weights."""

    def average(self, trained: Named, wanted: Sequence[bool]) -> None:
        """Gradients of public rows over the ranks, of parameters that some rank has one of."""

    def greatest(self, limit: Tensor) -> Tensor:
        """Of a number on a device, which is not read."""
        limit = limit.clone()
        dist.all_reduce(limit, dist.ReduceOp.MAX, group=self.group)
        return limit

    def added(self, sums: Sequence[Tensor]) -> list[Tensor]:
        """Over all ranks, whole on each."""
        raise NotImplementedError

    def reduce(self, sums: Sequence[Tensor]) -> tuple[list[Tensor], list[int]]:
        """The parts of the sums over all ranks that this rank adds noise to, and where in the draw they begin."""
        raise NotImplementedError

    def collect(self, parts: Sequence[Tensor], sums: Sequence[Tensor]) -> list[Tensor]:
        """Of released parts of all ranks what this rank's parameters need, shaped as `sums`."""
        raise NotImplementedError


class Replicas(Ranks):
    """Ranks that all hold the whole model, which they release the same gradients for."""

    def check_weights(self, named: Named) -> None:
        """Ranks with other weights would train other models. The sum of all bits tells, whatever the order."""
        sums = []
        for _, p in named:
            bits = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[p.element_size()]
            sums.append(p.detach().contiguous().view(bits).sum(dtype=torch.int64))
        digest = hashlib.blake2b(repr([int(x) for x in sums]).encode(), digest_size=8).hexdigest()
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, digest, group=self.group)
        if len(set(found)) > 1:
            raise PrivacyError(
                "model: its weights differ between ranks; wrap it in DistributedDataParallel, which sends those of "
                "rank 0, or seed all ranks alike before it is made"
            )

    def average(self, trained: Named, wanted: Sequence[bool]) -> None:
        """The gradient of a rank that has none is zero."""
        parameters = [p for (_, p), want in zip(trained, wanted, strict=True) if want]
        for bucket in _buckets([p if p.grad is None else p.grad for p in parameters]):
            chosen = [parameters[i] for i in bucket]
            flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1) for p in chosen])
            dist.all_reduce(flat, group=self.group)
            flat /= self.size
            for p, part in zip(chosen, flat.split([p.numel() for p in chosen]), strict=True):
                p.grad = part.view_as(p).clone() if p.grad is None else p.grad.copy_(part.view_as(p))

    def added(self, sums: Sequence[Tensor]) -> list[Tensor]:
        return self.collect(self.reduce(sums)[0], sums)

    def reduce(self, sums: Sequence[Tensor]) -> tuple[list[Tensor], list[int]]:
        parts, offsets, base = [], [], 0
        for bucket in _buckets(sums):
            count = sum(sums[i].numel() for i in bucket)
            width = -(-count // self.size)
            flat = sums[bucket[0]].new_zeros(width * self.size)
            torch.cat([sums[i].reshape(-1) for i in bucket], out=flat[:count])
            part = flat.new_empty(width)
            reduce_scatter(part, flat, self.group)
            first = min(self.rank * width, count)
            parts.append(part[: min(width, count - first)])
            offsets.append(base + first)
            base += count
        return parts, offsets

    def collect(self, parts: Sequence[Tensor], sums: Sequence[Tensor]) -> list[Tensor]:
        found: list[Tensor] = []
        for bucket, part in zip(_buckets(sums), parts, strict=True):
            sizes = [sums[i].numel() for i in bucket]
            width = -(-sum(sizes) // self.size)
            padded = part.new_zeros(width)
            padded[: len(part)] = part
            flat = part.new_empty(width * self.size)
            all_gather(flat, padded, self.group)
            views = flat[: sum(sizes)].split(sizes)
            found += [view.view(sums[i].shape) for view, i in zip(views, bucket, strict=True)]
        return found


def _buckets(tensors: Sequence[Tensor]) -> list[list[int]]:
    """Neighbours of one dtype, to be sent together: the same on all ranks."""
    found: list[list[int]] = []
    size = 0
    for i, x in enumerate(tensors):
        if not found or size >= BUCKET or x.dtype != tensors[i - 1].dtype or x.device != tensors[i - 1].device:
            found.append([])
            size = 0
        found[-1].append(i)
        size += x.numel()
    return found
