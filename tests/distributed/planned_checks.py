"""Steps on each rank whose collectives and memory are written down, for a plan to be compared with."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from rank_checks import Model, noise_of, spread
from spawned import device_of
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from adamix.plan.allocated import peak_allocated
from adamix_kernels import DPEngine, PublicQuantile

ROWS, PUBLIC = 16, 8  # of all ranks, in a step

#: Collectives that move what tells its name: the argument whose bytes are those of a rank's part, or of the whole.
_PARTS = {"_allgather_base_": 1, "_reduce_scatter_base_": 0}


class Collectives(TorchDispatchMode):
    """Bytes that this rank sends by collective and size of the group, where it runs over a ring."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: Counter[tuple[str, int, str]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._schema.name
        if name.startswith("c10d::"):
            self._note(name.removeprefix("c10d::"), args)
        return out

    def _note(self, name: str, args: Any) -> None:
        group = next(x for x in args if isinstance(x, torch.ScriptObject) and "ProcessGroup" in str(x._type()))
        size = dist.ProcessGroup.unbox(group).size()
        if name in _PARTS:
            part = args[_PARTS[name]]
            self.sent[name, size, str(part.dtype)] += (size - 1) * part.numel() * part.element_size()
        elif name == "allreduce_":
            (x,) = args[0]
            self.sent[name, size, str(x.dtype)] += 2 * (size - 1) * x.numel() * x.element_size()  # over `size`
        else:
            raise AssertionError(f"{name} is not planned for")


def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x), y)


def rows_of(samples: int) -> tuple[Tensor, Tensor]:
    return torch.arange(samples * 5).reshape(samples, 5) % 11, torch.arange(samples) % 3


def wide() -> Model:
    """Large beside what a step makes of its rows, so that its peak is that of parameters, sums and gradients."""
    return Model(width=128)


def made(kind: str, strategy: str | None, mode: str, public: bool) -> tuple[nn.Module, Any, DPEngine | None]:
    torch.manual_seed(0)
    model = wide().to(device_of(dist.get_rank()))
    options = {}
    if kind == "hsdp":
        options["mesh"] = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    called = spread(model, "fsdp" if kind == "hsdp" else kind, **options)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, foreach=False)
    if strategy is None:
        return called, optimizer, None
    engine = DPEngine(
        called,
        optimizer,
        max_grad_norm=PublicQuantile(0.9) if public else 1.0,
        noise_multiplier=1.0,
        expected_batch_size=float(ROWS),
        strategy=strategy,
        noise=noise_of(mode),
        process_group=dist.group.WORLD if kind == "plain" else None,
    )
    return called, optimizer, engine


def step(called: nn.Module, optimizer: Any, engine: DPEngine | None, public: bool, micro: int) -> None:
    own = ROWS // dist.get_world_size() // micro
    for part in range(micro):
        more = PUBLIC // dist.get_world_size() if public and not part else 0
        x, y = rows_of(own + more)
        last = part == micro - 1
        if engine is None and hasattr(called, "no_sync") and not last:
            with called.no_sync():
                loss_of(called, x, y).backward()
        elif engine is None:
            loss_of(called, x, y).backward()
        elif more:
            with engine.mixed(slice(0, more)):
                engine.backward(loss_of(called, x, y))
        else:
            engine.backward(loss_of(called, x, y))
    optimizer.step()
    optimizer.zero_grad()


def sent(kind: str, strategy: str | None, mode: str, public: bool, micro: int) -> dict[tuple[str, int, str], int]:
    """In a step after two others, in which torch and the engine set themselves up."""
    job = made(kind, strategy, mode, public)
    for _ in range(2):
        step(*job, public, micro)
    with Collectives() as collectives:
        step(*job, public, micro)
    return dict(collectives.sent)


def held(kind: str, strategy: str | None, mode: str, public: bool, micro: int) -> dict[str, int]:
    """Bytes that stay on this rank, and those that torch's allocator has given out at the peak of a step."""
    called, optimizer, engine = made(kind, strategy, mode, public)
    for _ in range(2):
        step(called, optimizer, engine, public, micro)
    peak = peak_allocated(lambda: step(called, optimizer, engine, public, micro))
    step_of = optimizer.step
    gradients: list[int] = []
    optimizer.step = lambda: (step_of(), gradients.append(sum(_bytes(p.grad) for p in called.parameters())))
    step(called, optimizer, engine, public, micro)
    stays = 0
    if engine is None and hasattr(called, "no_sync"):  # the buckets of DistributedDataParallel
        stays = sum(_bytes(p) for p in called.parameters())
    found = {
        "parameters": sum(_bytes(p) for p in called.parameters()),
        "optimizer": sum(_bytes(s) for state in optimizer.state.values() for s in state.values() if s.dim()),
        "gradients": gradients[0],
    }
    return found | {"peak": peak + stays + found["parameters"] + found["optimizer"]}


def _bytes(x: Tensor) -> int:
    local = x.to_local() if isinstance(x, DTensor) else x
    return math.prod(local.shape) * local.element_size()
