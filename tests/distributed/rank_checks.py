"""What runs on each rank: the same loop as on one process, and what must be refused."""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch._dynamo.utils
import torch._functorch.config
import torch.distributed as dist
import torch.nn.functional as F
from spawned import device_of
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from adamix import distributed
from adamix.errors import InputError
from adamix.ledger import Ledger
from adamix_kernels import DPEngine, Noise, PrivacyError, PublicQuantile

SIGMA, LIMIT, EXPECTED, ROWS, STEPS = 0.8, 0.5, 16.0, 40, 5
KINDS = ("plain", "ddp", "fsdp")


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Model(nn.Module):
    """Rows of every parameter do not divide by 4: shards are uneven, some are empty."""

    def __init__(self, recompute: bool = False, width: int = 6) -> None:
        super().__init__()
        self.recompute = recompute
        self.words = nn.Embedding(11, width)
        self.places = nn.Parameter(torch.randn(5, width) * 0.1)
        self.blocks = nn.ModuleList(Block(width) for _ in range(2))
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.words(x) + self.places
        for block in self.blocks:
            h = checkpoint(block, h, use_reentrant=False) if self.recompute else block(h)
        return self.head(h.mean(1))


def data() -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(3)
    return torch.randint(0, 11, (ROWS, 5), generator=g), torch.randint(0, 3, (ROWS,), generator=g)


def whole(x: Tensor) -> Tensor:
    return (x.full_tensor() if isinstance(x, DTensor) else x).detach().cpu().clone()


def spread(model: nn.Module, kind: str, **options: Any) -> nn.Module:
    if kind == "ddp":
        return DistributedDataParallel(model)
    if kind == "fsdp":
        for part in model.children():
            for block in part if isinstance(part, nn.ModuleList) else []:
                fully_shard(block, **options)
        fully_shard(model, **options)
    return model


def noise_of(mode: str) -> Noise:
    return Noise(seed=4) if mode == "fast" else Noise._with_key(bytes(range(32)), "secure")


def attached(
    kind: str,
    model: nn.Module | None = None,
    mode: str = "fast",
    options: dict[str, Any] | None = None,
    **settings: Any,
) -> tuple[nn.Module, DPEngine]:
    """The model as the loop calls it, and its engine; `kind` "local" is one process by itself."""
    if model is None:
        torch.manual_seed(0)
        model = Model()
    model = model.to(device_of(dist.get_rank()))
    called = spread(model, kind, **(options or {}))
    settings = {"max_grad_norm": LIMIT, "noise_multiplier": SIGMA, "expected_batch_size": EXPECTED, **settings}
    group = {"plain": dist.group.WORLD, "local": "local"}.get(kind)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
    return called, DPEngine(called, optimizer, noise=noise_of(mode), process_group=group, **settings)


def own_rows(kind: str, rows: list[int]) -> list[int]:
    """Of a global batch those of this rank."""
    return rows if kind == "local" else [i for i in rows if i % dist.get_world_size() == dist.get_rank()]


def batches() -> Iterator[list[int]]:
    """Global batches; the third leaves ranks without a row."""
    g = torch.Generator().manual_seed(7)
    for step in range(STEPS):
        yield torch.randperm(ROWS, generator=g)[: 1 if step == 2 else 16].tolist()


def backward(called: nn.Module, engine: DPEngine, rows: list[int]) -> None:
    x, y = (t[torch.tensor(rows, dtype=torch.long)].to(device_of(dist.get_rank())) for t in data())
    out = called(x)
    engine.backward(F.cross_entropy(out, y) if rows else out.sum())


def train(kind: str, micro: int = 1, **settings: Any) -> dict[str, Tensor]:
    called, engine = attached(kind, **settings)
    for batch in batches():
        mine = own_rows(kind, batch)
        for part in range(micro):
            backward(called, engine, mine[part::micro])
        engine.optimizer.step()
        engine.optimizer.zero_grad()
    return {name: whole(p) for name, p in engine.model.named_parameters()}


@functools.cache
def reference(**settings: Any) -> dict[str, Tensor]:
    return train("local", **settings)


def farthest(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    assert found.keys() == expected.keys()
    return max(float((found[name] - expected[name]).abs().max()) for name in expected)


def same_weights(kind: str, strategy: str, mode: str, recompute: bool, micro: int) -> float:
    torch.manual_seed(0)
    model = Model(recompute)
    found = train(kind, micro, model=model, strategy=strategy, mode=mode)
    return farthest(found, reference(strategy=strategy, mode=mode))


def compiled_ddp(strategy: str, inside: bool) -> float:
    """The model that torch.compile gets is DistributedDataParallel's own, or the one around it."""
    torch.manual_seed(0)
    called, engine = attached("ddp", Model(), strategy=strategy)
    run = torch.compile(engine.model if inside else called, backend="aot_eager")
    with torch.compiler.set_stance("force_eager"):
        run(data()[0][:6])  # as many as a width: compiled code cannot be asked which dimension is the batch
    for batch in batches():
        backward(run, engine, own_rows("ddp", batch))
        engine.optimizer.step()
        engine.optimizer.zero_grad()
    found = {name: whole(p) for name, p in engine.model.named_parameters()}
    return farthest(found, reference(strategy=strategy, mode="fast"))


def released(kind: str, mode: str, width: int) -> dict[str, Tensor]:
    """Of a second step without a sample."""
    torch.manual_seed(0)
    _, engine = attached(kind, Model(width=width), mode)
    for _ in range(2):
        engine.optimizer.zero_grad()
        engine.optimizer.step()
    return {name: whole(p.grad) for name, p in engine.model.named_parameters() if p.grad is not None}


def noise_of_a_step(kind: str, mode: str) -> tuple[bool, float]:
    """Whether it is bit for bit that of one process, and its standard deviation over what it should be."""
    found, expected = released(kind, mode, 96), released("local", mode, 96)
    equal = found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)
    flat = torch.cat([x.flatten() for x in found.values()]).double()
    return equal, float(flat.std()) / (SIGMA * LIMIT / EXPECTED)


def a_large_bucket_is_many(kind: str) -> bool:
    """With buckets of 100 numbers the noise of a step is the same."""
    from adamix_kernels.nn import ranks, sharded

    before = ranks.BUCKET
    ranks.BUCKET = sharded.BUCKET = 100
    try:
        found = train(kind)
    finally:
        ranks.BUCKET = sharded.BUCKET = before
    return farthest(found, reference(strategy="auto", mode="fast")) < 1e-6


def micro_batches_on_one_rank(kind: str) -> float:
    """Rank 0 goes through two backward passes in a step, the others through none."""
    called, engine = attached(kind, noise_multiplier=0.0)
    if dist.get_rank() == 0:
        backward(called, engine, [0, 1, 2])
        backward(called, engine, [3, 4])
    engine.optimizer.step()
    found = {name: whole(p.grad) for name, p in engine.model.named_parameters()}
    called, engine = attached("local", noise_multiplier=0.0)
    backward(called, engine, [0, 1, 2, 3, 4])
    engine.optimizer.step()
    return farthest(found, {name: whole(p.grad) for name, p in engine.model.named_parameters()})


def public_rows(kind: str) -> float:
    """Public gradients are averaged over ranks, as by DistributedDataParallel; a rank may have none if not sharded."""
    grads = []
    ranks = range(dist.get_world_size())
    for now in (kind, "local"):
        called, engine = attached(now, noise_multiplier=0.0)
        with engine.public():
            for rank in ranks if now == "local" else [dist.get_rank()]:
                x, y = (t[[rank, 10 + rank]].to(device_of(dist.get_rank())) for t in data())
                loss = F.cross_entropy(called(x), y) / (len(ranks) if now == "local" else 1)
                if kind == "fsdp" or rank:
                    loss.backward()
        for part in ([20], [21, 22]):  # a private pass after it, and one more
            backward(called, engine, own_rows(now, part))
        engine.optimizer.step()
        grads.append({name: whole(p.grad) for name, p in engine.model.named_parameters()})
    return farthest(*grads)


def doubt_on_one_rank() -> float:
    """Rank 0 has as many samples as positions, so that its layers are run again: the others must join."""
    called, engine = attached("fsdp", noise_multiplier=0.0)
    rows = list(range(5)) if dist.get_rank() == 0 else [5 + dist.get_rank()]
    backward(called, engine, rows)
    assert "places" in {name for name, _ in engine._rules.told} or dist.get_rank()
    engine.optimizer.step()
    found = {name: whole(p.grad) for name, p in engine.model.named_parameters()}
    called, engine = attached("local", noise_multiplier=0.0)
    backward(called, engine, [*range(5), *(5 + rank for rank in range(1, dist.get_world_size()))])
    engine.optimizer.step()
    return farthest(found, {name: whole(p.grad) for name, p in engine.model.named_parameters()})


def sharded(strategy: str, **options: Any) -> float:
    found = train("fsdp", options=options, strategy=strategy)
    return farthest(found, reference(strategy=strategy, mode="fast"))


def hybrid(strategy: str, mode: str, recompute: bool, micro: int) -> tuple[float, bool]:
    """Two replicas of two shards: weights, and whether noise is that of one process."""
    mesh = init_device_mesh(device_of(0).type, (2, 2), mesh_dim_names=("replicate", "shard"))
    torch.manual_seed(0)
    found = train("fsdp", micro, model=Model(recompute), mode=mode, strategy=strategy, options={"mesh": mesh})
    off = farthest(found, reference(strategy=strategy, mode=mode))
    _, engine = attached("fsdp", mode=mode, options={"mesh": mesh})
    engine.optimizer.step()
    found = {name: whole(p.grad) for name, p in engine.model.named_parameters()}
    _, engine = attached("local", mode=mode)
    engine.optimizer.step()
    return off, all(torch.equal(found[name], whole(p.grad)) for name, p in engine.model.named_parameters())


def low_precision(kind: str, strategy: str) -> tuple[set[str], float]:
    """Layers in bfloat16: types of the sums, and how far off they are, over the threshold."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    found = []
    for now in (kind, "local"):
        torch.manual_seed(0)
        model = Model() if kind == "fsdp" else Model().bfloat16()
        options = {"mp_policy": policy} if now == "fsdp" else {}
        called, engine = attached(now, model, options=options, noise_multiplier=0.0, strategy=strategy)
        backward(called, engine, own_rows(now, list(range(16))))
        kinds = {str(total.dtype) for total in engine._sums.totals.values()}
        engine.optimizer.step()
        grads = torch.cat([whole(p.grad).float().flatten() for p in engine.model.parameters()])
        found.append((kinds, grads))
    (kinds, grads), (_, expected) = found
    return kinds, float((grads - expected).norm() / expected.norm())


def compiled(kind: str, strategy: str, mode: str) -> tuple[float, int]:
    """torch.compile of what the loop calls, for two steps, without a compiler of C++; how many frames it compiled."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    weights = []
    for now in (kind, "local"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(11, 23), nn.Flatten(), nn.Linear(115, 3))
        called, engine = attached(now, model, mode=mode, strategy=strategy)
        run = called if now == "local" else torch.compile(called, backend="aot_eager")
        for batch in ([*range(16)], [*range(16, 32)]):
            backward(run, engine, own_rows(now, batch))
            engine.optimizer.step()
            engine.optimizer.zero_grad()
        weights.append({name: whole(p) for name, p in engine.model.named_parameters()})
    return farthest(*weights), torch._dynamo.utils.counters["frames"]["ok"]


def compiled_ways(kind: str, strategy: str, mode: str, recompute: bool) -> tuple[float, int]:
    """The same of a model of several layers, whose sharded ones may be replicated or recomputed."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    options: dict[str, Any] = {}
    if kind == "hybrid":
        options["mesh"] = init_device_mesh(device_of(0).type, (2, 2), mesh_dim_names=("replicate", "shard"))
    weights = []
    for now in ("fsdp" if kind == "hybrid" else kind, "local"):
        torch.manual_seed(0)
        model = Model(recompute and now != "local")
        called, engine = attached(now, model, mode=mode, strategy=strategy, options=options)
        run = called if now == "local" else torch.compile(called, backend="aot_eager")
        with torch._functorch.config.patch(donated_buffer=strategy != "two_pass"):
            for batch in ([*range(16)], [*range(16, 32)]):
                backward(run, engine, own_rows(now, batch))
                engine.optimizer.step()
                engine.optimizer.zero_grad()
        weights.append({name: whole(p) for name, p in engine.model.named_parameters()})
    return farthest(*weights), torch._dynamo.utils.counters["frames"]["ok"]


def by_user(kind: str, strategy: str, mode: str) -> float:
    """Two steps of two passes on users of several rows, of which each rank has its own; one pass has a rank's none."""
    weights = []
    for now in (kind, "local"):
        called, engine = attached(now, mode=mode, strategy=strategy, unit="user", loss_reduction="sum")
        for step in range(2):
            for users in (range(5), [8 + step]):
                owners = [user for user in own_rows(now, list(users)) for _ in range(2 + user % 2)]
                x = torch.tensor([[(3 * user + 2 * i + step) % 11 for i in range(5)] for user in owners]).view(-1, 5)
                with engine.users(owners):
                    out = called(x.long().to(device_of(dist.get_rank())))
                    engine.backward(out.square().sum() + out.sum())
            engine.optimizer.step()
            engine.optimizer.zero_grad()
        weights.append({name: whole(p) for name, p in engine.model.named_parameters()})
    return farthest(*weights)


def evaluated(*reshard: Any) -> float:
    """Forward passes without gradients between backward pass and step, and between steps: weights are not old ones."""
    weights = []
    for kind in ("fsdp", "local"):
        options = {"reshard_after_forward": reshard[0]} if kind == "fsdp" and reshard else {}
        called, engine = attached(kind, options=options)
        for batch in itertools.islice(batches(), 2):
            backward(called, engine, own_rows(kind, batch))
            for act in (engine.optimizer.step, engine.optimizer.zero_grad):
                with torch.no_grad():
                    called(data()[0][:3].to(device_of(dist.get_rank())))
                act()
        weights.append({name: whole(p) for name, p in engine.model.named_parameters()})
    return farthest(*weights)


def frozen_and_thawed() -> float:
    weights = []
    for kind in ("fsdp", "local"):
        called, engine = attached(kind)
        for parameter in (engine.model.words.weight, engine.model.head.bias):
            parameter.requires_grad_(False)
        for step, batch in enumerate(batches()):
            if step == 3:
                engine.model.head.bias.requires_grad_(True)
            backward(called, engine, own_rows(kind, batch))
            engine.optimizer.step()
            engine.optimizer.zero_grad()
        weights.append({name: whole(p) for name, p in engine.model.named_parameters()})
    return farthest(*weights)


def shared_table() -> float:
    """A weight that is an embedding's and a layer's."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.out = nn.Embedding(11, 4), nn.Linear(4, 11, bias=False)
            self.out.weight = self.words.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.out(torch.tanh(self.words(x))).mean(1)[:, :3]

    weights = []
    for kind in ("fsdp", "local"):
        torch.manual_seed(1)
        weights.append(train(kind, model=Tied()))
    return farthest(*weights)


def detached(kind: str) -> bool:
    """What the engine changed is as it was."""
    torch.manual_seed(0)
    called, engine = attached(kind, Model())
    backward(called, engine, own_rows(kind, list(range(8))))
    engine.detach()
    backward_plain = called(data()[0][:4].to(device_of(dist.get_rank())))
    backward_plain.sum().backward()
    plain = all(p.grad is not None and type(p) in (nn.Parameter, DTensor) for p in engine.model.parameters())
    return plain and (kind != "ddp" or called.require_backward_grad_sync) and "zero_grad" not in vars(called)


def gathered() -> list[float]:
    engine = attached("plain")[1]
    return engine.gather(torch.arange(dist.get_rank() * 2.0)).tolist()


def mixed(kind: str, strategy: str, mode: str, quantile: float | None) -> tuple[float, Any]:
    """Five steps on public and private rows, each rank with its own of both: weights and thresholds."""
    found = []
    limit = LIMIT if quantile is None else PublicQuantile(quantile)
    options: dict[str, Any] = {}
    if kind == "hybrid":
        options["mesh"] = init_device_mesh(device_of(0).type, (2, 2), mesh_dim_names=("replicate", "shard"))
    for now in ("fsdp" if kind == "hybrid" else kind, "local"):
        settings = {"strategy": strategy, "mode": mode, "loss_reduction": "sum", "options": options}
        called, engine = attached(now, max_grad_norm=limit, **settings)
        for step, batch in enumerate(batches()):
            private = own_rows(now, [i for i in batch if i >= 6])
            public = own_rows(now, [0, 1, 2, 3, 4, 5] if step else [0, 1])  # of some ranks none
            x, y = (t[public + private].to(device_of(dist.get_rank())) for t in data())
            with engine.mixed(slice(0, len(public)), weight=0.5):
                engine.backward(F.cross_entropy(called(x), y, reduction="sum"))
            engine.optimizer.step()
            engine.optimizer.zero_grad()
        weights = {name: whole(p) for name, p in engine.model.named_parameters()}
        found.append((weights, engine.thresholds))
    (weights, thresholds), (expected, expected_thresholds) = found
    return farthest(weights, expected), (thresholds, expected_thresholds)


def saved(kind: str, folder: Path) -> dict[str, Tensor]:
    """Weights and momentum two steps after a checkpoint of step 3, without noise."""
    called, engine = attached(kind, noise_multiplier=0.0)
    for step, batch in enumerate(batches(), start=1):
        backward(called, engine, own_rows(kind, batch))
        engine.optimizer.step()
        engine.optimizer.zero_grad()
        if step == 3:
            distributed.save(folder, engine, "run", step)
    return {name: whole(p) for name, p in engine.model.named_parameters()}


def resumed(kind: str, folder: Path) -> tuple[float, int, int]:
    """How far the weights are from those of a run that was not interrupted; the steps of the checkpoint."""
    torch.manual_seed(5)
    model = Model().to(device_of(dist.get_rank()))
    called = spread(model, kind)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
    found = distributed.load(folder, called, optimizer)
    assert found is not None
    group = dist.group.WORLD if kind == "plain" else None
    settings = {"max_grad_norm": 9.0, "noise_multiplier": 0.0, "expected_batch_size": EXPECTED}
    engine = DPEngine(called, optimizer, process_group=group, **settings)
    engine.load_state_dict(found.engine)
    for batch in itertools.islice(batches(), found.finished, None):
        backward(called, engine, own_rows(kind, batch))
        engine.optimizer.step()
        engine.optimizer.zero_grad()
    weights = {name: whole(p) for name, p in engine.model.named_parameters()}
    return farthest(weights, reference(noise_multiplier=0.0)), found.finished, engine.steps


def one_ledger(folder: Path) -> list[Any]:
    """Rank 0 writes it: what the others are told of a charge, of one too many, and of a ledger that is not there."""
    path = folder / f"rows-{dist.get_world_size()}.ledger"
    if dist.get_rank() == 0:
        Ledger.create(path, data_set="rows of a test").close()
    ledger = distributed.RankLedger(path)
    run = ledger.start_run(noise_multiplier=1.0, sample_rate=1.0, steps=1, delta=1e-5)
    found = [ledger.charge(run), refusal(lambda: ledger.charge(run)), ledger.place()]
    ledger.close()
    return [*found, refusal(lambda: distributed.RankLedger(folder / "no.ledger"))]


def damaged(folder: Path) -> str:
    """A checkpoint whose metadata is another one is not unpickled."""
    called, engine = attached("plain", noise_multiplier=0.0)
    distributed.save(folder, engine, "run", 1)
    if dist.get_rank() == 0:
        (folder / "step-0000001" / ".metadata").write_bytes(b"no metadata")
    dist.barrier()
    engine.detach()
    return refusal(lambda: distributed.load(folder, called, engine.optimizer))


def stateless() -> bool:
    """torch makes the state of an optimizer that has none by a step, which is no private one."""
    torch.manual_seed(0)
    model = Model()
    engine = DPEngine(
        model, torch.optim.SGD(model.parameters(), lr=0.1), max_grad_norm=1.0, noise_multiplier=1.0,
        expected_batch_size=4.0, process_group=dist.group.WORLD,
    )  # fmt: skip
    before = copy.deepcopy(model.state_dict())
    from torch.distributed.checkpoint.state_dict import get_state_dict

    message = refusal(lambda: get_state_dict(model, engine.optimizer))
    engine.optimizer.zero_grad()
    with engine.restoring():
        get_state_dict(model, engine.optimizer)
    same = all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    backward(model, engine, [dist.get_rank()])
    with engine.restoring():
        stepped = refusal(engine.optimizer.step)
    return (
        same and engine.steps == 0 and engine.noise._draws == 0 and "restoring()" in message and "restoring" in stepped
    )


# --- refusals -----------------------------------------------------------------------------------------------------


def refusal(action: Callable[[], Any]) -> str:
    try:
        action()
    except (PrivacyError, InputError, ValueError, TypeError) as error:
        return f"{type(error).__name__}: {error}"
    raise AssertionError("it was not refused")


def refusals() -> dict[str, str]:
    """By name, the message of each on this rank."""
    rank, mesh = dist.get_rank(), init_device_mesh(device_of(0).type, (dist.get_world_size(),))
    found: dict[str, str] = {}

    def engine_of(model: nn.Module, **settings: Any) -> DPEngine:
        given = {"max_grad_norm": 1.0, "noise_multiplier": 1.0, "expected_batch_size": 8.0, **settings}
        return DPEngine(model, torch.optim.SGD(model.parameters(), lr=0.1), **given)

    def linear() -> nn.Module:
        torch.manual_seed(0)
        return nn.Linear(4, 4)

    world = dist.group.WORLD
    found["no group"] = refusal(lambda: engine_of(linear()))
    found["no group at all"] = refusal(lambda: engine_of(linear(), process_group=3))
    found["signal"] = refusal(lambda: engine_of(linear(), process_group=world, measure_signal=True))
    for name, value in {
        "noise_multiplier": 1.0 + rank,
        "max_grad_norm": 1.0 + rank,
        "expected_batch_size": 8.0 + rank,
    }.items():
        found[name] = refusal(lambda name=name, value=value: engine_of(linear(), process_group=world, **{name: value}))
    found["strategy"] = refusal(
        lambda: engine_of(linear(), process_group=world, strategy="per_layer" if rank else "auto")
    )
    torch.manual_seed(rank)
    found["weights"] = refusal(lambda: engine_of(nn.Linear(4, 4), process_group=world))
    engine = engine_of(linear(), process_group=world)
    if rank:
        engine.noise.next_draw()
    found["draws"] = refusal(engine.optimizer.step)
    engine = engine_of(linear(), process_group=world)
    engine.model.bias.requires_grad_(rank > 0)
    found["trained"] = refusal(engine.optimizer.step)
    engine = engine_of(linear(), process_group=world, unit="user")
    with engine.users([7, rank]):
        F.cross_entropy(engine.model(torch.randn(2, 4)), torch.tensor([0, 1])).backward()
    found["users"] = refusal(engine.optimizer.step)
    engine = engine_of(linear(), process_group=world, noise=Noise(mode="secure"))
    engine.max_grad_norm = 1.0 + 3 * rank
    F.cross_entropy(engine.model(torch.randn(2, 4)), torch.tensor([0, 1])).backward()
    found["grids"] = refusal(engine.optimizer.step)
    engine = engine_of(linear(), process_group=world, noise=Noise(mode="secure"))
    F.cross_entropy(engine.model(torch.randn(2, 4)), torch.tensor([0, 1])).backward()
    engine._sums.grid.rows = 2**35 + rank
    found["rows"] = refusal(engine.optimizer.step)
    nested = nn.Sequential(linear(), linear())
    fully_shard(nested[0])
    found["root"] = refusal(lambda: engine_of(nested))
    odd = fully_shard(linear(), shard_placement_fn=lambda p: Shard(p.dim() - 1))
    found["dimension"] = refusal(lambda: engine_of(odd))
    parallel = parallelize_module(nn.Sequential(linear()), mesh, {"0": ColwiseParallel()})
    found["tensor parallel"] = refusal(lambda: engine_of(parallel))
    model = fully_shard(linear())
    found["group of shards"] = refusal(lambda: engine_of(model, process_group=world))
    engine = engine_of(model)
    found["validate"] = refusal(lambda: engine.validate(torch.randn(3, 4)))
    wrapped = DistributedDataParallel(linear())
    inner = DistributedDataParallel(torch.compile(linear(), backend="aot_eager"))
    found["compiled inside ddp"] = refusal(lambda: engine_of(inner))
    found["group of ddp"] = refusal(lambda: engine_of(wrapped, process_group=dist.new_group()))
    return found


def refused_models() -> dict[str, str]:
    """Models that are spread in a way that cannot be made private: the message of each."""
    device = device_of(0).type
    found: dict[str, str] = {}

    def engine_of(model: nn.Module) -> DPEngine:
        given = {"max_grad_norm": 1.0, "noise_multiplier": 1.0, "expected_batch_size": 8.0}
        return DPEngine(model, torch.optim.SGD(model.parameters(), lr=0.1), **given)

    def linear() -> nn.Module:
        torch.manual_seed(0)
        return nn.Linear(4, 4).to(device_of(dist.get_rank()))

    found["first fsdp"] = refusal(
        lambda: engine_of(FullyShardedDataParallel(linear(), device_id=device_of(dist.get_rank())))
    )
    wrapped = DistributedDataParallel(linear())
    wrapped.mixed_precision = object()  # torch makes it with a GPU alone
    found["mixed precision"] = refusal(lambda: engine_of(wrapped))
    found["compiled"] = refusal(lambda: engine_of(DistributedDataParallel(torch.compile(linear()))))
    scalar = nn.Module()
    scalar.scale = nn.Parameter(torch.tensor(1.0))
    found["scalar"] = refusal(lambda: fully_shard(scalar))
    ignoring = linear()
    fully_shard(ignoring, ignored_params={ignoring.bias})
    found["ignored"] = refusal(lambda: engine_of(ignoring))
    size = dist.get_world_size()
    cube = init_device_mesh(device, (2, 1, size // 2), mesh_dim_names=("other", "replicate", "shard"))
    part = fully_shard(linear(), mesh=cube["replicate", "shard"])
    found["part of the ranks"] = refusal(lambda: engine_of(part))
    several = nn.Sequential(linear(), linear())
    fully_shard(several[0], mesh=cube["shard"])
    fully_shard(several)
    found["meshes"] = refusal(lambda: engine_of(several))
    return found


def refused_passes() -> dict[str, str]:
    """Ranks that do not do the same in a step: the message of each on this rank."""
    rank = dist.get_rank()
    found: dict[str, str] = {}

    def broken(kind: str, act: Callable[[nn.Module, DPEngine], None], **settings: Any) -> str:
        called, engine = attached(kind, **settings)

        def go() -> None:
            act(called, engine)
            engine.optimizer.step()

        return refusal(go)

    def on_first(called: nn.Module, engine: DPEngine) -> None:
        """Public rows on rank 0 alone."""
        if rank:
            backward(called, engine, [8, 9])
        else:
            with engine.mixed(slice(0, 1)):
                backward(called, engine, [8, 9])

    def none_but_first(called: nn.Module, engine: DPEngine) -> None:
        loss = called(data()[0][8:10].to(device_of(rank))).sum()
        if not rank:
            with engine.mixed(slice(0, 1)):
                engine.backward(loss)

    def thawed(called: nn.Module, engine: DPEngine) -> None:
        engine.model.head.bias.requires_grad_(rank > 0)
        backward(called, engine, [8, 9])

    def other_size(called: nn.Module, engine: DPEngine) -> None:
        engine.expected_batch_size = EXPECTED * (1 + rank)
        backward(called, engine, [8, 9])
        engine.expected_batch_size = EXPECTED

    adaptive = {"max_grad_norm": PublicQuantile(0.7, start=1.0)}
    found["a pass"] = broken("plain", none_but_first, **adaptive)
    found["a quantile"] = broken("ddp", on_first, **adaptive)
    found["a quantile of shards"] = broken("fsdp", on_first, **adaptive)
    found["public rows of shards"] = broken("fsdp", on_first)
    found["a pass of shards"] = broken("fsdp", none_but_first, options={"reshard_after_forward": False})
    found["trained shards"] = broken("fsdp", thawed)
    found["the divisor of shards"] = broken("fsdp", other_size)
    if dist.get_world_size() > 2:
        mine: dict[str, Any] = {"options": {"reshard_after_forward": 2}}
        found["some ranks"] = broken("fsdp", lambda called, engine: backward(called, engine, [8, 9]), **mine)
    layers = {"strategy": "per_layer", "mode": "secure", "loss_reduction": "sum"}
    found["layers"] = broken("plain", lambda called, engine: None, **layers, **adaptive)
    return found


def thresholds_differ() -> float:
    """The noise is that of the largest threshold of all ranks."""
    _, engine = attached("plain", Model(width=96))
    engine.max_grad_norm = LIMIT * (1 + dist.get_rank())
    engine.optimizer.step()
    flat = torch.cat([whole(p.grad).flatten() for p in engine.model.parameters()]).double()
    return float(flat.std()) / (SIGMA * LIMIT / EXPECTED)


def key_is_shared() -> list[Any]:
    engine = DPEngine(
        spread(fresh := Model(), "ddp"), torch.optim.SGD(fresh.parameters(), lr=0.1), max_grad_norm=1.0,
        noise_multiplier=1.0, expected_batch_size=4.0, noise=Noise(mode="secure"),
    )  # fmt: skip
    return list(engine.noise._key)
