"""FSDP2 (`fully_shard`): the gradients of a layer are clipped whole on each rank, and their sums are sharded.

Parameters are sharded as `DTensor`, and plain tensors stand in their place while a layer runs. These are private
parameters; what the optimizer steps are the shards. A sum is sharded once it is due in an order that all ranks have, so
that of the sums of a backward pass few are whole at a time.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate, Shard

from adamix_kernels.nn.errors import PrivacyError
from adamix_kernels.nn.ranks import BUCKET, Ranks, reduce_scatter
from adamix_kernels.ops._numerics import sum_dtype

#: A parameter's name, and whether it is the sum of public rows.
Key = tuple[str, bool]


class Shards(Ranks):
    """The ranks of a model that is sharded, and the sums of a backward pass on their way to the shards."""

    def __init__(self, model: nn.Module) -> None:
        self.shards = self
        if not isinstance(model, FSDPModule):
            raise PrivacyError(
                "model: some parameters are DTensors, but the model itself is not sharded; call fully_shard(model) on "
                "the whole model as well. Tensor parallelism is not supported: norms would need all ranks of a layer"
            )
        self._modules = [module for module in model.modules() if isinstance(module, FSDPModule)]
        self.rest()
        self.named: list[tuple[str, DTensor]] = []  # what the optimizer steps, by name
        for name, p in _tensors(model):
            if not isinstance(p, DTensor):
                raise PrivacyError(
                    f"parameter {name!r} is not sharded; make the DPEngine before the first forward pass, of a model "
                    "all of whose parameters are, without ignored_params"
                )
            self._check_placement(name, p)
            self.named.append((name, p))
        self._mesh = self.named[0][1].device_mesh
        self._slots: dict[
            tuple[nn.Module, str], Tensor
        ] = {  # where a parameter stands, also if it stands in several places
            (module, key): p for module in model.modules() for key, p in module._parameters.items() if p is not None
        }
        super().__init__(self._whole_group(), torch.device(self._mesh.device_type))
        self._place, self._count = self._mesh.get_local_rank(self._mesh.ndim - 1), self._mesh.size(self._mesh.ndim - 1)
        self._parameters = dict(self.named)
        self._shapes = {name: p.shape for name, p in self.named}
        for name, p in self.named:
            if p.to_local().shape[0] != self._rows(name)[1]:
                raise PrivacyError(f"parameter {name!r} is cut otherwise than fully_shard() does; use that alone")
        self.begin([], 0.0)

    @staticmethod
    def _check_placement(name: str, p: DTensor) -> None:
        kinds = [type(x) for x in p.placements]
        if kinds not in ([Shard], [Replicate, Shard]):
            raise PrivacyError(
                f"parameter {name!r} is placed as {p.placements}; only fully_shard() over one mesh dimension, or two "
                "that replicate and shard, is supported, no tensor parallelism: norms would need all ranks of a layer"
            )
        placement = p.placements[-1]
        if isinstance(placement, Shard) and placement.dim != 0:
            raise PrivacyError(
                f"parameter {name!r} is sharded along dimension {placement.dim}; only dimension 0 is supported, leave "
                "shard_placement_fn out"
            )
        if p.to_local().device.type != p.device_mesh.device_type:
            raise PrivacyError(
                f"parameter {name!r} is on {p.to_local().device} and its mesh on {p.device_mesh.device_type!r}; move "
                "the model there, and leave CPUOffloadPolicy out"
            )
        if not p.dim():
            raise PrivacyError(f"parameter {name!r} has no dimension to shard; give it the shape [1]")

    def _whole_group(self) -> Any:
        if any(p.device_mesh != self._mesh for _, p in self.named):
            raise PrivacyError("model: its parameters are on several device meshes; shard all over one")
        if self._mesh.ndim == 1:
            return self._mesh.get_group()
        if self._mesh.size() != dist.get_world_size():
            raise PrivacyError("model: its device mesh has two dimensions but not all ranks; make a mesh of all ranks")
        return dist.group.WORLD

    # --- parameters ----------------------------------------------------------------------------------------------

    def rest(self) -> None:
        """Nothing but shards: what was gathered, as by an evaluation before a step, would be older than a step."""
        for module in self._modules:
            module.reshard()

    def check_placed(self) -> None:
        """After a forward pass all is whole, or cut as before it."""
        for (owner, key), sharded in self._slots.items():
            p = owner._parameters[key]
            if isinstance(p, DTensor) and p is not sharded:
                raise PrivacyError(
                    f"parameter {key!r} is cut otherwise after a forward pass; pass reshard_after_forward=True or "
                    "False to fully_shard(), not a number of ranks"
                )

    @contextmanager
    def gathered(self, model: nn.Module) -> Iterator[None]:
        """What of the model itself is sharded stands whole while its `forward` is called once more."""

        def sharded() -> int:
            return sum(isinstance(owner._parameters[key], DTensor) for owner, key in self._slots)

        before = sharded()
        assert isinstance(model, FSDPModule)
        model.unshard()
        was_whole = sharded() == before
        try:
            yield
        finally:
            if not was_whole:
                model.reshard()

    def unsharded(self) -> list[tuple[str, nn.Parameter]]:
        """The plain parameters that stand in the place of the shards while a layer runs: FSDP makes each once."""
        names = {id(p): name for name, p in self.named}
        found: dict[str, nn.Parameter] = {}
        for module in self._modules:
            module.unshard()
            for (owner, key), sharded in self._slots.items():
                p = owner._parameters[key]
                if p is not None and p is not sharded:
                    found[names[id(sharded)]] = p
            module.reshard()
        lost = [name for name, _ in self.named if name not in found]
        if lost:
            raise PrivacyError(f"parameter {lost[0]!r} is in no module that fully_shard() was called on")
        return [(name, found[name]) for name, _ in self.named]

    def as_grad(self, p: Tensor, part: Tensor) -> Tensor:
        assert isinstance(p, DTensor)
        local = part.to(p.dtype)
        return DTensor.from_local(local, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride())

    def _rows(self, name: str) -> tuple[int, int]:
        """The first row of this rank's shard, and how many it has: as `torch.chunk` cuts, the last fewer or none."""
        rows = self._shapes[name][0]
        width = -(-rows // self._count)
        first = min(self._place * width, rows)
        return first, min(width, rows - first)

    def zeros(self, name: str, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.zeros(self._rows(name)[1], *self._shapes[name][1:], dtype=dtype, device=device)

    # --- a backward pass -----------------------------------------------------------------------------------------

    def begin(self, trained: Sequence[str], divisor: float) -> None:
        """A pass in which sums of these parameters come, over a divisor: about in the reverse of their order."""
        self._divisor, self._agreed = divisor, False
        self._order = [(name, False) for name in reversed(trained)]
        self._next = 0
        self._waiting: dict[Key, Tensor] = {}
        self._buckets: dict[torch.dtype, list[tuple[Key, Tensor]]] = {}
        self._ready: dict[Key, Tensor] = {}

    def expect_public(self) -> None:
        """The pass has public rows, on all ranks: the public sum of a parameter is sharded beside the private one."""
        if not any(public for _, public in self._order):  # the second of two backward passes finds it done
            self._order = [(name, public) for name, _ in self._order for public in (True, False)]

    def add(self, name: str, total: Tensor) -> None:
        """The whole sum of a parameter, which comes once in a pass, after that of public rows."""
        if self._order[self._next :].count((name, False)) != 1 or (name, False) in self._waiting:
            raise PrivacyError(f"parameter {name!r}: a second sum in one backward pass, after the first was sharded")
        self._put((name, False), total)
        if (name, True) in self._order[self._next :] and (name, True) not in self._waiting:
            self.add_public(name, torch.zeros(total.shape, device=total.device))  # this rank has no public row
        self._advance()

    def add_public(self, name: str, total: Tensor) -> None:
        self._put((name, True), total)

    def _put(self, key: Key, total: Tensor) -> None:
        if total.is_floating_point():  # of a model in mixed precision it may be another type
            total = total.to(sum_dtype(self._parameters[key[0]]))
        self._waiting[key] = total

    def _advance(self) -> None:
        while self._next < len(self._order) and self._order[self._next] in self._waiting:
            key = self._order[self._next]
            total = self._waiting.pop(key)
            self._next += 1
            bucket = self._buckets.setdefault(total.dtype, [])
            bucket.append((key, total))
            if sum(x.numel() for _, x in bucket) >= BUCKET:
                self._send(self._buckets.pop(total.dtype))

    def finish(self, dtype: torch.dtype | None) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The shards of all sums, private ones (of a type if it is not the parameters') and public ones.

        All ranks must come here for each pass, also those without a sample: of the other ranks' sums are their shards.
        """
        for key in self._order[self._next :]:
            if key not in self._waiting:
                p = self._parameters[key[0]]
                kind = sum_dtype(p) if key[1] or dtype is None else dtype
                self._waiting[key] = torch.zeros(p.shape, dtype=kind, device=p.device)
        self._advance()
        for _, bucket in sorted(self._buckets.items(), key=lambda item: str(item[0])):
            self._send(bucket)
        self._buckets.clear()
        ready, self._ready = self._ready, {}
        private, public = ({name: x for (name, of), x in ready.items() if of is kind} for kind in (False, True))
        return private, public

    def _send(self, bucket: list[tuple[Key, Tensor]]) -> None:
        """One reduce-scatter of the sums that wait: of each the padded rows of a rank, one behind the other."""
        if not self._agreed:
            self._agree()
        blocks = []
        for (name, _), total in bucket:
            rows = -(-self._shapes[name][0] // self._count) * self._count
            padded = total.new_zeros(rows, *total.shape[1:])
            padded[: len(total)] = total
            blocks.append(padded.view(self._count, -1))
        keys = [key for key, _ in bucket]
        bucket.clear()
        flat = torch.cat(blocks, 1)
        part = flat.new_empty(flat.shape[1])
        reduce_scatter(part, flat.view(-1), self._mesh.get_group(self._mesh.ndim - 1))
        if self._mesh.ndim == 2:
            dist.all_reduce(part, group=self._mesh.get_group(0))
        for key, own in zip(keys, part.split([block.shape[1] for block in blocks]), strict=True):
            shape = torch.Size((self._rows(key[0])[1], *self._shapes[key[0]][1:]))
            self._ready[key] = own[: shape.numel()].view(shape)

    def _agree(self) -> None:
        """Sums are sent without their names: were others sent elsewhere, private ones would be added to public ones."""
        plan = zlib.crc32(repr((self._order, self._divisor)).encode())
        if len(set(self.meet("a backward pass", float(plan)))) > 1:
            raise PrivacyError(
                "backward(): ranks have other parameters that are trained, another expected_batch_size, or are not all "
                "within mixed(), with a weight above 0 or without one; let them be equal, also where rows are none"
            )
        self._agreed = True

    # --- a step --------------------------------------------------------------------------------------------------

    def reduce(self, sums: Sequence[Tensor]) -> tuple[list[Tensor], list[int]]:
        """The shards themselves; each begins in the draw where its rows do in the parameters one behind the other."""
        offsets, base = [], 0
        for name in (name for name, p in self.named if p.requires_grad):
            shape = self._shapes[name]
            offsets.append(base + self._rows(name)[0] * shape[1:].numel())
            base += shape.numel()
        return list(sums), offsets

    def collect(self, parts: Sequence[Tensor], sums: Sequence[Tensor]) -> list[Tensor]:
        return list(parts)


def _tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Its parameters as what they are: a sharded one is a DTensor and no `nn.Parameter` to a type checker."""
    return list(model.named_parameters())
