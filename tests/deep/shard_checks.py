"""What runs on each rank of a job: `DeepAdaMix` on models that are sharded, or in DistributedDataParallel."""

from __future__ import annotations

import contextlib
import copy
import itertools
import os
import pickle
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from small import PRIVATE, TEST, blobs, fit
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import Subset

from adamix import InputError, Ledger, distributed
from adamix.deep import DeepResult, tune
from adamix.deep.ranks import Ranks
from adamix.deep.sharding import blocks_of, digest_of_all
from adamix.ledger_records import read_ledger
from adamix.parts import save_parts
from adamix_kernels import Noise, PrivacyError
from adamix_kernels.nn import sharded

#: With noise; the key of the noise is known, so that runs can be compared.
NOISY: dict[str, Any] = {"epsilon": 2.0, "delta": 1e-3, "noise_seed": 3, "public_steps": 2, "anchor": 0.5}
NOISY |= {"learning_rate": 1e-2, "test": TEST}
#: Without noise; batches are drawn from a key of each run, so all rows are in each.
RESUMED: dict[str, Any] = {"steps": 5, "anchor": 0.5, "learning_rate": 1e-2, "test": TEST}


class Block(nn.Module):
    def __init__(self, inner: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(32), nn.Linear(32, inner), nn.Linear(inner, 32)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Net(nn.Module):
    """Rows of its parameters do not divide by 4; four blocks hold nearly all of it."""

    def __init__(self, seed: int = 0, inner: int = 30) -> None:
        torch.manual_seed(seed)
        super().__init__()
        self.first = nn.Conv2d(1, 2, 3, padding=1)
        self.blocks = nn.ModuleList(Block(inner) for _ in range(4))
        self.head = nn.Linear(32, 3)
        self.register_buffer("scale", torch.tensor([1.0 + seed]))

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x * self.scale).flatten(1)
        for block in self.blocks:
            h = block(h)
        return self.head(h)


def spread(kind: str, model: nn.Module) -> nn.Module:
    """As a caller would before `fit`."""
    if kind == "ddp":
        return DistributedDataParallel(model)
    if kind in ("fsdp", "hybrid"):
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard")) if kind == "hybrid" else None
        for block in blocks_of(model):
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    return model


def whole(result: DeepResult) -> dict[str, Tensor]:
    named = {**result.trained_state(), **{f"public {name}": x for name, x in result.public_state.items()}}
    return {name: x.full_tensor() if isinstance(x, DTensor) else x for name, x in named.items()}


def run(kind: str, model: nn.Module | None = None, **given: Any) -> DeepResult:
    """`kind` "setting" is sharded by the trainer itself."""
    settings = {"sharding": "fsdp"} if kind == "setting" else {}
    return fit(spread(kind, Net() if model is None else model), **settings, **given)


def sum_loss(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], reduction="sum")


#: Adam would make much of the last bits of a gradient.
EXACT: dict[str, Any] = {"epsilon": float("inf"), "optimizer": "sgd"}
#: Settings beside `NOISY`, by name.
RUNS: dict[str, dict[str, Any]] = {
    "per layer": {},
    "one threshold": {"strategy": "auto", "optimizer": "sgd"},
    "secure": {"strategy": "auto", "noise_mode": "secure", "noise_seed": None, **EXACT},
    "several passes": {"micro_batch_size": 5, "public_batch_size": 4, "sample_rate": 0.45, **EXACT},
    "a sum": {"micro_batch_size": 5, "public_batch_size": 4, "sample_rate": 0.45, **EXACT, "loss": sum_loss},
    "bias": {"tune": "bias"},
    "head": {"tune": "head"},
    "autocast": {"precision": "autocast", **EXACT},
    "bfloat16": {"precision": "bfloat16", **EXACT},
}


def result_of(kind: str, name: str) -> dict[str, Any]:
    """What a run gives, in plain numbers."""
    needed: list[int] = []
    passes = Ranks.passes

    def told(self: Ranks, own: int) -> int:
        needed.append(own)
        return passes(self, own)

    Ranks.passes = told  # type: ignore[method-assign]
    try:
        result = run(kind, **{**NOISY, **RUNS[name]})
    finally:
        Ranks.passes = passes  # type: ignore[method-assign]
    return {
        "passes": needed,
        "weights": whole(result),
        "steps": [(step.thresholds, step.public_loss) for step in result.steps],
        "figures": (result.test_error, result.public_error, result.epsilon, result.tuned.count, result.tuned.total),
        "losses": (result.test_loss, result.public_loss),
    }


def with_adapters(kind: str) -> dict[str, Tensor]:
    """Adapters come before the model is sharded: by the caller, or by the trainer."""
    model = Net()
    torch.manual_seed(5)
    if kind == "fsdp":
        tune(model, "lora", lora_rank=2)
    return whole(run(kind, model, **{**NOISY, "tune": "lora", "lora_rank": 2}))


def noise_alone(kind: str) -> dict[str, Tensor]:
    """No row counts: weights move by the noise of one step."""
    settings = {"quantile": None, "max_grad_norm": 0.5, "public_weight": 0.0, "public_steps": 0, "anchor": 0.0}
    return whole(run(kind, **{**NOISY, **settings, "steps": 1, "optimizer": "sgd", "private": []}))


def other_weights(kind: str) -> dict[str, Tensor]:
    """Each rank comes with its own weights: those of rank 0 are trained, or of shards those of the first replica."""
    seed = dist.get_rank() if kind == "setting" else dist.get_rank() // 2
    return whole(run(kind, Net(seed), **{**NOISY, "steps": 1}))


# --- ledger and checkpoints ------------------------------------------------------------------------------------------


class CrashError(Exception):
    pass


class Place:
    """Ledger and checkpoints under a folder, in `name` a copy of those in `of`."""

    def __init__(self, folder: Path, name: str, of: str = "") -> None:
        self.folder = folder / name
        if dist.get_rank() == 0:
            if of:
                shutil.copytree(folder / of, self.folder)
            else:
                self.folder.mkdir()
                Ledger.create(self.folder / "rows.ledger", data_set="test").close()
        dist.barrier()

    def fit(self, kind: str, model: nn.Module | None = None, *, stop: int = 99, **given: Any) -> DeepResult:
        def stop_at(step: Any) -> None:
            if step.number == stop:
                raise CrashError

        places = {"ledger": self.folder / "rows.ledger", "checkpoint": self.folder / "run"}
        return run(kind, model, on_step=stop_at, **places, **given)

    def interrupt(self, kind: str, stop: int = 2, **given: Any) -> None:
        with contextlib.suppress(CrashError):
            self.fit(kind, stop=stop, **given)
            raise AssertionError("it was not interrupted")

    def charged(self) -> int:
        dist.barrier()
        return sum(run.charged for run in read_ledger(self.folder / "rows.ledger").runs.values())

    def names(self) -> list[str]:
        return sorted(p.name for p in (self.folder / "run").iterdir())


def interrupted(kind: str, folder: Path, name: str) -> list[str]:
    place = Place(folder, name)
    place.interrupt(kind, **RESUMED)
    return place.names()


def resumed(kind: str, folder: Path, name: str, of: str) -> dict[str, Any]:
    """From a copy of what other ranks left, with another start, which the checkpoint replaces."""
    place = Place(folder, name, of)
    result = place.fit(kind, resume=True, **RESUMED)
    found = {"weights": whole(result), "steps": [step.thresholds for step in result.steps], "charged": place.charged()}
    return {**found, "names": place.names(), "errors": (result.public_error, result.test_error)}


def lost_step(folder: Path) -> dict[str, Any]:
    """The last checkpoint has no record, as after a crash while it was written: its step is charged and taken again,
    twice, with another noise each time."""
    noisy = {"epsilon": 2.0, "delta": 1e-3, "steps": 3, "learning_rate": 1e-2}
    place = Place(folder, f"lost-{dist.get_world_size()}")
    place.interrupt("fsdp", **noisy)
    ends, charged = [], [place.charged()]
    for _ in range(2):
        dist.barrier()
        if dist.get_rank() == 0:
            (place.folder / "run" / "step-0000002.json").unlink()
        dist.barrier()
        model = Net()
        with contextlib.suppress(CrashError):
            place.fit("fsdp", model, stop=2, resume=True, **noisy)
        ends.append(torch.cat([p.full_tensor().detach().flatten() for p in model.parameters()]))
        charged.append(place.charged())
    result = place.fit("fsdp", resume=True, **noisy)
    return {
        "apart": float((ends[0] - ends[1]).abs().max()),
        "charged": [*charged, place.charged()],
        "epsilon": result.epsilon,
    }


def order_of_a_step(folder: Path) -> list[str]:
    """What happens on the disk and to the noise, on rank 0."""
    from adamix import parts
    from adamix.deep.ranks import RankRecorder

    events: list[str] = []
    with contextlib.ExitStack() as stack:
        for owner, name in ((RankRecorder, "charge"), (Noise, "next_draw"), (parts, "dcp_save"), (Ledger, "start_run")):
            before = getattr(owner, name)

            def told(*args: Any, name: str = name, before: Any = before, **kwargs: Any) -> Any:
                found = before(*args, **kwargs)
                events.append(name)
                return found

            setattr(owner, name, told)
            stack.callback(setattr, owner, name, before)
        Place(folder, f"order-{dist.get_world_size()}").fit("fsdp", epsilon=2.0, delta=1e-3, steps=2)
    return events


# --- memory ----------------------------------------------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """The most numbers in a floating tensor that is made."""

    most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and not isinstance(x, DTensor) and x.is_floating_point():
                self.most = max(self.most, x.numel())
        return out


def memory(kind: str, folder: Path) -> tuple[float, float, float]:
    """The largest tensor that a rank makes, what it tells the others, and its file of a checkpoint: shares of all."""
    told: list[int] = []
    broadcast, gather = dist.broadcast_object_list, dist.all_gather_object
    model = spread(kind, Net(inner=900))  # activations are few beside its parameters
    total = sum(p.numel() for p in model.parameters())

    def counted(send: Callable[..., Any], which: int) -> Callable[..., Any]:
        def go(*args: Any, **kwargs: Any) -> Any:
            told.append(len(pickle.dumps(args[which] if len(args) > which else kwargs["object_list"])))
            return send(*args, **kwargs)

        return go

    place = Place(folder, f"memory-{dist.get_world_size()}-{kind}")
    dist.broadcast_object_list, dist.all_gather_object = counted(broadcast, 0), counted(gather, 1)
    bucket, sharded.BUCKET = sharded.BUCKET, 1000  # sums wait in buckets of a fixed size, larger than this model
    try:
        with Largest() as largest:
            settings = {**RESUMED, "steps": 2}
            fit(
                model,
                sharding="fsdp" if kind == "setting" else "none",
                ledger=place.folder / "rows.ledger",
                checkpoint=place.folder / "run",
                **settings,
            )
    finally:
        dist.broadcast_object_list, dist.all_gather_object = broadcast, gather
        sharded.BUCKET = bucket
    file = max((place.folder / "run" / "step-0000002").glob("*.distcp"), key=lambda p: p.stat().st_size)
    return largest.most / total, max(told) / (4 * total), file.stat().st_size / (4 * 4 * total)  # of four tensors


def digests_agree() -> tuple[bool, bool, bool]:
    """A digest of shards is that of the whole, and tells rows that change places and other values."""
    model = Net()
    tensors = [*model.parameters(), *model.buffers()]
    expected = digest_of_all(tensors)
    other = Net()
    with torch.no_grad():
        other.head.weight.copy_(other.head.weight.flip(0))
    apart = digest_of_all([*other.parameters(), *other.buffers()]) != expected
    with torch.no_grad():
        other.head.weight.copy_(model.head.weight)
        other.first.bias[0] += 1e-7
    apart &= digest_of_all([*other.parameters(), *other.buffers()]) != expected
    spread("fsdp", model)
    hybrid = True
    if dist.get_world_size() == 4:
        replicas = spread("hybrid", Net())
        hybrid = digest_of_all([*replicas.parameters(), *replicas.buffers()]) == expected
    return digest_of_all([*model.parameters(), *model.buffers()]) == expected, apart, hybrid


# --- refusals --------------------------------------------------------------------------------------------------------


def refusal(action: Callable[[], Any]) -> str:
    try:
        action()
    except (PrivacyError, InputError) as error:
        return str(error)
    raise AssertionError("it was not refused")


class Odd(torch.optim.SGD):
    """Keeps sums over rows, which are no shards."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["sum"] = p.detach().sum()
        return super().step(closure)


def refusals(folder: Path) -> dict[str, str]:
    """By name, the message of each on this rank."""
    rank, size, found = dist.get_rank(), dist.get_world_size(), dict[str, str]()
    quick = {"public_steps": 0, "steps": 1}
    found["adapters"] = refusal(lambda: run("fsdp", tune="lora", **quick))
    found["adapters in ddp"] = refusal(lambda: run("ddp", tune="lora", **quick))
    found["tied"] = refusal(lambda: fit(Tied(), sharding="fsdp", **quick))
    found["ddp"] = refusal(lambda: fit(spread("ddp", Net()), sharding="fsdp", **quick))
    if size == 4:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("other", "shard"))
        part = Net()
        fully_shard(part, mesh=mesh["shard"])
        found["part of the ranks"] = refusal(lambda: fit(part, **quick))
        return found
    rootless = Net()
    fully_shard(rootless.blocks[0])
    found["root"] = refusal(lambda: fit(rootless, **quick))
    place = Place(folder, "no-run")
    found["no run"] = refusal(lambda: place.fit("fsdp", resume=True, **quick))
    place = Place(folder, "replicas")
    place.interrupt("plain", stop=1, **RESUMED)
    found["of replicas"] = refusal(lambda: place.fit("fsdp", resume=True, **RESUMED))
    place = Place(folder, "shards")
    place.interrupt("fsdp", stop=1, **RESUMED)
    found["of shards"] = refusal(lambda: place.fit("plain", resume=True, **RESUMED))
    found["begun"] = refusal(lambda: place.fit("fsdp", **RESUMED))
    other = Net()
    other.head.requires_grad_(False)
    frozen = {**RESUMED, "tune": "*blocks* first*"}
    found["other parts"] = refusal(lambda: place.fit("fsdp", other, resume=True, **frozen))
    changed = Net(1)  # another buffer
    found["other buffers"] = refusal(lambda: place.fit("fsdp", changed, resume=True, **RESUMED))
    if rank == 0:
        file = max((place.folder / "run" / "step-0000001").glob("*.distcp"), key=lambda p: p.stat().st_size)
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    dist.barrier()
    found["a bit"] = refusal(lambda: place.fit("fsdp", resume=True, **RESUMED))
    place = Place(folder, "of-another-program")
    save_parts(place.folder / "run", 1, {"x": torch.ones(3)}, {"run": "1", "finished": 1, "engine": {}, "ledger": None})
    found["program"] = refusal(lambda: place.fit("fsdp", resume=True, **RESUMED))
    place = Place(folder, "of-this-program")
    place.interrupt("fsdp", stop=1, **RESUMED)
    model = spread("fsdp", Net())
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    found["the other program"] = refusal(lambda: distributed.load(place.folder / "run", model, optimizer))
    place = Place(folder, "odd")
    odd = {"optimizer": lambda p: Odd(p, lr=0.1), **RESUMED}
    found["optimizer"] = refusal(lambda: place.fit("fsdp", **odd))
    return found


class Tied(Net):
    """Two blocks share a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks[2].up.weight = self.blocks[0].up.weight


#: What a rank may be given otherwise, by name: of rank 0, and of rank 1.
UNEQUAL: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "public and private changed": ({"public": blobs(20, 5)}, {"private": blobs(20, 5)}),
    "order of private rows": ({}, {"private": Subset(PRIVATE, range(len(PRIVATE) - 1, -1, -1))}),
    "more private rows": ({}, {"private": blobs(60, 2)}),
    "test rows": ({}, {"test": TEST}),
    "a setting": ({"steps": 1}, {"steps": 2}),
    "trained parts": ({"tune": "full"}, {"tune": "head"}),
    "sharding": ({"sharding": "fsdp"}, {"sharding": "none"}),
    "model": ({"model": Net()}, {"model": Net(inner=31)}),
    "resume": ({"resume": True}, {"resume": False}),
}


def unequal(kind: str) -> dict[str, str]:
    """By name, the message of each on this rank."""
    quick = {"public_steps": 0, "steps": 1}
    found = {}
    for name, given in UNEQUAL.items():
        own: dict[str, Any] = {**quick, **given[dist.get_rank()]}
        model = copy.deepcopy(own.pop("model", None)) or Net()
        found[name] = refusal(lambda model=model, own=own: fit(spread(kind, model), **own))  # type: ignore[misc]
    return found


def longest_wait(kind: str) -> float:
    """Seconds that other ranks wait for rank 0 at most, where a value of the accounting takes a third of one."""
    from adamix import privacy
    from adamix.deep import ranks

    waits, composed, on_first = [0.0], privacy._composed, ranks.on_first

    def slow(*args: Any) -> float:
        time.sleep(1 / 3)
        return composed(*args)

    def timed(action: Callable[[], Any], group: Any = None) -> Any:
        def go() -> Any:
            began = time.monotonic()
            found = action()
            waits.append(time.monotonic() - began)
            return found

        return on_first(go, group)

    privacy._composed, ranks.on_first = slow, timed
    try:
        run(kind, epsilon=2.0, delta=1e-3, sample_rate=0.4321, steps=5)
    finally:
        privacy._composed, ranks.on_first = composed, on_first
    return max(waits)


def folders(folder: Path) -> dict[str, Any]:
    """What ranks do that have not the same folder, and with a checkpoint that has another's name."""
    place, rank = Place(folder, "apart"), dist.get_rank()
    found: dict[str, Any] = {}
    own = place.folder / f"of-{rank}"  # as on disks of two machines
    found["disks"] = refusal(lambda: save_parts(own, 1, {"x": torch.ones(3), f"of {rank}": torch.ones(3)}, {}))
    found["sealed"] = [p.name for p in own.glob("*.json")]
    given = place.folder / "run" if rank == 0 else None  # as the ledger, those of rank 0 count
    result = run("fsdp", ledger=place.folder / "rows.ledger", checkpoint=given, **{**RESUMED, "steps": 2})
    found["of the first"], found["steps"] = place.names(), len(result.steps)
    dist.barrier()
    if rank == 0:
        step = place.folder / "run" / "step-0000001"
        shutil.copytree(step, step.with_name("step-0000009"))
        shutil.copy(step.with_suffix(".json"), step.with_name("step-0000009.json"))
    dist.barrier()
    found["renamed"] = refusal(lambda: place.fit("fsdp", resume=True, **{**RESUMED, "steps": 2}))
    return found


def dies(rank: int, size: int, folder: Path, start: Callable[..., Any]) -> None:
    """The last rank is killed in the midst of a step; the others write when they left, and whether nothing was left."""
    from adamix.deep import phases

    start(rank, size, folder, "gloo", 45.0)
    model, backward, passes = spread("fsdp", Net()), phases._backward, itertools.count()

    def killed(*args: Any) -> Any:
        found = backward(*args)
        if next(passes) == 2 and rank == size - 1:  # of step 2: the first was of public rows alone
            (folder / "died").write_text(str(time.time()))
            os.kill(os.getpid(), signal.SIGKILL)
        return found

    phases._backward = killed  # type: ignore[assignment]
    try:
        fit(model, ledger=folder / "rows.ledger", checkpoint=folder / "run", epsilon=2.0, delta=1e-3)
    finally:
        clean = all(p.grad is None for p in model.parameters())
        (folder / f"left-{rank}").write_text(f"{time.time()} {clean}")


def plan(size: int, folder: Path) -> Iterator[tuple[str, Callable[..., Any], tuple[Any, ...]]]:
    """All checks of one job, so that processes start once."""
    kinds = ["fsdp", "setting", "ddp"] if size == 2 else ["fsdp", "hybrid"] if size == 4 else ["fsdp"]
    for kind in kinds:
        few = {4: ["per layer"] if kind == "hybrid" else ["several passes"], 1: ["per layer"]}
        for name in RUNS if (kind, size) == ("fsdp", 2) else few.get(size, ["per layer", "several passes"]):
            yield f"same {kind} {name}", result_of, (kind, name)
        yield f"noise {kind}", noise_alone, (kind,)
        if size == 2 and kind != "ddp":
            yield f"adapters {kind}", with_adapters, (kind,)
    if size == 2:
        yield "interrupted 2", interrupted, ("fsdp", folder, "of-2")
        yield "other weights setting", other_weights, ("setting",)
        yield "lost", lost_step, (folder,)
        yield "order", order_of_a_step, (folder,)
    if size == 4:
        yield "interrupted 4", interrupted, ("hybrid", folder, "of-4")
        yield "other weights hybrid", other_weights, ("hybrid",)
    if size > 1:
        yield "memory", memory, ("fsdp", folder)
        yield "digests", digests_agree, ()
        yield "refusals", refusals, (folder,)
    if size == 2:
        yield "unequal plain", unequal, ("plain",)
        yield "unequal fsdp", unequal, ("fsdp",)
        yield "folders", folders, (folder,)
        yield "waits", longest_wait, ("fsdp",)
