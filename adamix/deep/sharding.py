"""Models that `fully_shard` (FSDP2) spreads over the ranks of a job: which parts, and what of them a rank has."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from adamix.errors import InputError


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """What is sharded one by one: the members of the module list that holds most parameters; else the model."""
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList | nn.Sequential) and len(m) > 1]
    if not lists:
        return [model]
    largest = max(lists, key=lambda m: (sum(p.numel() for p in m.parameters()), -len(m)))
    return list(largest)


def device_of_job(device: torch.device) -> torch.device:
    """Where a model on `device` is sharded: NCCL knows none but GPUs."""
    if dist.is_initialized() and dist.get_backend() == "nccl" and device.type == "cpu":
        return torch.device("cuda", torch.cuda.current_device())
    return device


def shard(model: nn.Module, device: torch.device) -> None:
    """Shard a model over all ranks, those of rank 0 its weights; block by block, so that a device never has all of it.

    Raises:
        InputError: there is no job, or the blocks are not apart.
    """
    if is_sharded(model):
        return
    if isinstance(model, nn.parallel.DistributedDataParallel):
        raise InputError("sharding: 'fsdp' given, and a model in DistributedDataParallel; pass the model itself")
    if not dist.is_available() or not dist.is_initialized():
        raise InputError(
            "sharding: 'fsdp' given, but torch.distributed is not initialised; start with torchrun, or call "
            "adamix.distributed.start()"
        )
    _check_blocks_alone(model)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for module in dict.fromkeys([*blocks_of(model), model]):
        left = [p for p in module.parameters() if not isinstance(p, DTensor)]
        for x in [*left, *module.buffers()]:
            x.data = x.data.to(device)
            dist.broadcast(x.detach(), src=0)
        if left or module is model:  # the engine asks for the whole as well
            fully_shard(module, mesh=mesh)


def _check_blocks_alone(model: nn.Module) -> None:
    """A parameter of a block and of something else would be sharded in one place and stay whole in the other."""
    everywhere = _places(model)
    for block in blocks_of(model):
        inside = _places(block)
        for name, p in block.named_parameters():
            if inside[id(p)] != everywhere[id(p)]:
                raise InputError(
                    f"sharding: 'fsdp' given, and parameter {name!r} of a block that is sharded by itself is shared "
                    "with another part of the model; call fully_shard([one, other]) on these parts and "
                    "fully_shard(model) before, or pass 'none'"
                )


def _places(module: nn.Module) -> Counter[int]:
    """In how many modules each parameter is."""
    return Counter(id(p) for inner in module.modules() for p in inner._parameters.values() if p is not None)


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel, or itself."""
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model


def is_sharded(model: nn.Module) -> bool:
    rest(model)
    return any(isinstance(p, DTensor) for p in _tensors(model))


def rest(model: nn.Module) -> None:
    """A module that a forward pass has left whole is sharded again: its parameters are what an optimizer steps."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def check_mesh(model: nn.Module) -> None:
    """Of a sharded model.

    Raises:
        InputError: it is not of all ranks.
    """
    found = next(p for p in _tensors(model) if isinstance(p, DTensor))
    if found.device_mesh.size() != dist.get_world_size():
        raise InputError(
            f"model: is sharded over {found.device_mesh.size()} of {dist.get_world_size()} processes; shard it over "
            "all of them, which train it together"
        )


def local(x: Tensor) -> Tensor:
    """What this rank has of it: of a sharded parameter the rows of its shard, which share its memory."""
    return x.to_local() if isinstance(x, DTensor) else x


def placed_as(p: Tensor, part: Tensor) -> Tensor:
    """This rank's part of a tensor that is shaped and placed as a parameter."""
    if not isinstance(p, DTensor):
        return part
    return DTensor.from_local(part, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride())


def agree(tensors: Sequence[Tensor], group: Any) -> None:
    """Those of rank 0 on all ranks; of shards those of the first replica: each is on one rank of it alone."""
    for x in tensors:
        if not isinstance(x, DTensor):
            dist.broadcast(x.detach(), group=group, group_src=0)
        elif x.device_mesh.ndim == 2:
            dist.broadcast(local(x.detach()), group=x.device_mesh.get_group(0), group_src=0)


def digest_of_all(tensors: Sequence[Tensor]) -> str:
    """A hash of their types, shapes and values, which is the same however they are spread over ranks.

    Of each tensor the hashes of its rows are added, each with its number; so ranks add what they have.
    """
    sums = [_sum_of_rows(x) for x in tensors]
    if any(isinstance(x, DTensor) for x in tensors):
        found: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(found, sums)
        sums = [
            sum(others) if isinstance(x, DTensor) else others[0] for x, *others in zip(tensors, *found, strict=True)
        ]
    digest = hashlib.sha256()
    for x, total in zip(tensors, sums, strict=True):
        digest.update(f"{x.dtype} {list(x.shape)} {total % 2**256:x}".encode())
    return digest.hexdigest()


def _sum_of_rows(x: Tensor) -> int:
    own, first = local(x.detach()), 0
    if isinstance(x, DTensor):
        mesh = x.device_mesh
        if mesh.ndim == 2 and mesh.get_local_rank(0):
            return 0  # a replica of what others add
        first = mesh.get_local_rank(mesh.ndim - 1) * -(-x.shape[0] // mesh.size(mesh.ndim - 1))
    if not own.numel():
        return 0
    copy = own.to("cpu", copy=True).contiguous()  # NumPy would keep FSDP from freeing the original
    rows = copy.reshape(len(own) if own.dim() else 1, -1).view(torch.uint8).numpy()
    hashes = (
        hashlib.blake2b(memoryview(row), salt=number.to_bytes(8, "little"), digest_size=32).digest()
        for number, row in enumerate(rows, start=first)
    )
    return sum(int.from_bytes(found, "little") for found in hashes)


def _tensors(model: nn.Module) -> list[Tensor]:
    """Its parameters as what they are: a sharded one is no `nn.Parameter` to a type checker."""
    return list(model.parameters())
