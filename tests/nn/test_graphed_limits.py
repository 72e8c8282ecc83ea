"""What of a captured pass a replay would not do again, on the host or elsewhere, is refused; nothing else is left."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import zoo
from plain_loop import engine, step
from test_graphed import Model, batch, graphed, loss_fn, pair, recorded, same
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from adamix_kernels import DPEngine, PrivacyError, use_backend
from adamix_kernels.nn import passes
from adamix_kernels.nn.graphed import Graphed
from adamix_kernels.ops import embedding
from adamix_kernels.spec import stand_in


@pytest.fixture(autouse=True)
def reference() -> Iterator[None]:
    with use_backend("torch"):
        yield


# --- what runs on the host -------------------------------------------------------------------------------------------


class FromTheHost(TorchDispatchMode):
    """Refuses what takes numbers of the host to the device, here meta, or waits for it: a capture refuses both."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        found = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, Tensor)]
        host = [x for x in found if x.device.type == "cpu"]
        if len(host) < len(found) and any(x.dim() or "copy" in func.name() for x in host):
            raise AssertionError(f"{func.name()} takes a tensor from the host to the device")
        return out


@pytest.mark.parametrize(
    "name", ["cnn", "biases only", "embedding", "tied head with bias", "vit", "LoRA", "weight norm"]
)
@pytest.mark.parametrize("strategy", ["book_keeping", "per_layer"])
@pytest.mark.parametrize("clipping", ["flat", "automatic"])
def test_nothing_is_taken_to_the_device(
    name: str, strategy: str, clipping: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def capture(device: torch.device, run: Callable[[], Any]) -> Any:
        run()
        with FromTheHost():
            return run(), lambda: None

    def refer(op: Any, bound: dict[str, Any]) -> Any:
        with torch.no_grad():
            return op.reference(**bound)

    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind=None: False)  # knows no device meta
    entry = zoo.ZOO[name]
    dp = engine(zoo.model(entry, torch.float32).to("meta"), strategy=strategy, clipping=clipping, loss_reduction="sum")
    data = [x.to("meta") for x in zoo.inputs(entry, 6, torch.float32)]
    with stand_in(refer, "cuda"):
        Graphed(dp, lambda net, *x: net(*x).square().sum(), data, capture=capture)
    with pytest.raises(AssertionError, match="from the host"), FromTheHost():
        torch.ones(3).to("meta")


class Words(Model):
    """Ids that the model makes itself, and a table that is the last layer's weight too."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.last = nn.Embedding(5, 4), nn.Linear(4, 5)
        self.last.weight = self.words.weight

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        found = self.words((x[..., 0] > 0).long() + (x[..., 1] > 0).long())
        return super().forward(x + found, scale) + self.last(found).mean(1)[:, :3]


@pytest.mark.parametrize("strategy", ["auto", "per_layer"])
def test_tables_that_are_shared(strategy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def runs(key: Tensor, values: Tensor) -> Tensor:
        """As on a device: without looking whether there is a run at all."""
        total = torch.zeros_like(values)
        for t in range(key.shape[1]):
            alike = (key == key[:, t : t + 1]) & (torch.arange(key.shape[1]) <= t)
            total[:, t] = (values * alike[..., None]).sum(1)
        values.copy_(total)
        ends = torch.ones_like(key, dtype=torch.bool)
        ends[:, :-1] = key[:, 1:] != key[:, :-1]
        return ends

    monkeypatch.setattr(embedding, "_sum_runs", runs)
    monkeypatch.setattr(embedding.embedding_clip_sum, "validate", None)  # looks at ids, on the host alone
    monkeypatch.setattr(passes, "smaller", lambda x: x)
    eager, dp = (engine(Words(), strategy=strategy) for _ in range(2))
    dp.model.load_state_dict(eager.model.state_dict())
    run = graphed(dp)
    for seed in range(1, 3):
        run(*batch(seed))
        loss_fn(eager.model, *batch(seed)).backward()
        same(step(dp), step(eager))


def test_a_function_whose_rows_are_compared_is_refused() -> None:
    """On a device the comparison fails within a capture, which is no sign of samples that are mixed."""
    net = nn.Sequential(nn.Linear(4, 5), nn.PReLU())
    dp = engine(net)
    with pytest.raises(PrivacyError, match=r"graphed\(\): '1.weight': prelu\(\) has no rule.*without a graph"):
        graphed(dp, lambda m, x, *_: m(x).square().sum())
    assert not dp._sums.begun


def test_a_constant_as_large_as_the_batch_is_no_way_around() -> None:
    """What eagerly is asked by its rows would here be taken for a constant, which it may not be."""

    class Constant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Parameter(torch.randn(6, 3)), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(x).mean(1) * torch.cdist(torch.ones(6, 3), self.table).sum()

    with pytest.raises(PrivacyError, match=r"graphed\(\): 'table': cdist\(\) has no rule"):
        graphed(engine(Constant()), lambda m, x, *_: m(x).square().sum())


class Labelled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(self.head(x).flatten(0, 1), labels.flatten())


def test_labels_that_no_replay_looks_at_are_refused() -> None:
    """With a mean over positions that are not ignored, a sample's gradient depends on the others."""
    dp = engine(Labelled())
    data = batch(0)[0], torch.randint(3, (6, 8))
    with pytest.raises(PrivacyError, match=r"labels with loss_reduction='mean'"):
        graphed(dp, lambda m, x, y: m(x, labels=y), data)
    run = graphed(engine(Labelled(), loss_reduction="sum"), lambda m, x, y: m(x, labels=y), data)
    assert run(*data).isfinite()


@pytest.mark.parametrize("where", ["loss", "model"])
def test_random_numbers_of_the_host_are_refused(where: str) -> None:
    class Skips(Model):
        def forward(self, x: Tensor, scale: Tensor) -> Tensor:
            h = super().forward(x, scale)
            return h if where == "loss" or random.random() < 0.5 else h.tanh()

    def loss(net: nn.Module, *data: Tensor) -> Tensor:
        return loss_fn(net, *data) * (random.uniform(1, 2) if where == "loss" else 1)

    dp = engine(Skips())
    with pytest.raises(PrivacyError, match="random numbers on the host"):
        graphed(dp, loss)
    assert not dp._sums.begun and not passes.Passes._recording


def test_random_numbers_of_torch_on_the_host_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a model that is elsewhere, here on meta."""
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind=None: False)
    dp = engine(nn.Linear(4, 3).to("meta"))
    with pytest.raises(PrivacyError, match="random numbers on the host"):
        Graphed(
            dp,
            lambda m, x: m(x).square().mean() * float(torch.rand(())),
            [torch.ones(6, 4, device="meta")],
            lambda device, run: (run(), lambda: None),
        )


def test_a_buffer_elsewhere_is_refused() -> None:
    """A number of the host is a constant of a kernel, which replays would not read again."""
    net = Model()
    net.register_buffer("gain", torch.ones((), device="meta"))
    with pytest.raises(PrivacyError, match="'gain' is on meta"):
        graphed(engine(net))


# --- what is not this pass -------------------------------------------------------------------------------------------


def _through_another(dp: DPEngine, other: DPEngine, *data: Tensor) -> Tensor:
    return loss_fn(dp.model, *data) + loss_fn(other.model, *data)


def _steps_another(dp: DPEngine, other: DPEngine, *data: Tensor) -> Tensor:
    other.optimizer.step()
    return loss_fn(dp.model, *data)


def _public_of_another(dp: DPEngine, other: DPEngine, *data: Tensor) -> Tensor:
    with other.public():
        return loss_fn(dp.model, *data) + loss_fn(other.model, *data)


def _zero(dp: DPEngine, other: DPEngine, *data: Tensor) -> Tensor:
    dp.optimizer.zero_grad()
    return loss_fn(dp.model, *data)


def _zero_of_the_model(dp: DPEngine, other: DPEngine, *data: Tensor) -> Tensor:
    dp.model.zero_grad()
    return loss_fn(dp.model, *data)


def _captures_another(dp: DPEngine, other: DPEngine, *data: Tensor) -> Tensor:
    return graphed(other)(*data) + loss_fn(dp.model, *data)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (_through_another, "model of another DPEngine"),
        (_steps_another, r"step\(\): within the loss_fn"),
        (_public_of_another, r"public\(\): within the loss_fn"),
        (_zero, r"zero_grad\(\): within the loss_fn"),
        (_zero_of_the_model, r"zero_grad\(\): within the loss_fn"),
        (_captures_another, "within the loss_fn of another"),
    ],
)
def test_a_loss_that_does_more_is_refused(loss: Callable[..., Tensor], message: str) -> None:
    """Before a sample counts in another engine, which the passes before a capture would make count thrice."""
    dp, other = engine(Model()), engine(Model())
    with dp.public():
        loss_fn(dp.model, *batch(5)).backward()
    with pytest.raises(PrivacyError, match=message):
        graphed(dp, lambda net, *data: loss(dp, other, *data))
    assert not other._sums.begun and not other._sums.totals and not other.steps
    assert dp.model.head.weight.grad is not None
    loss_fn(other.model, *batch(1)).backward()
    alone = engine(Model())
    alone.model.load_state_dict(other.model.state_dict())
    loss_fn(alone.model, *batch(1)).backward()
    same(step(other), step(alone))


def test_gradients_dropped_by_hand_are_dropped_after_a_step_that_failed() -> None:
    """A replay is a pass: as a forward pass does, it looks after parameters that a failed step left ordinary."""
    eager, dp, run = pair()
    update = dp.optimizer.step

    def fails(*_: Any) -> None:
        raise RuntimeError("lost the device")

    handle = dp.optimizer.register_step_pre_hook(fails)
    with pytest.raises(RuntimeError, match="lost the device"):
        update()
    handle.remove()
    dp.optimizer.zero_grad()
    run(*batch(1))
    for p in dp.model.parameters():
        p.grad = None
    assert not dp._sums.totals
    run(*batch(2))
    loss_fn(eager.model, *batch(2)).backward()
    same(step(dp), step(eager))


def test_a_call_in_compiled_code_is_an_ordinary_call() -> None:
    torch._dynamo.reset()
    counters.clear()
    eager, dp, run = pair()
    call = torch.compile(lambda *data: run(*data) * 2, backend="aot_eager")
    for seed in range(3):
        loss = loss_fn(eager.model, *batch(seed))
        loss.backward()
        torch.testing.assert_close(call(*batch(seed)), 2 * loss.detach())
        same(step(dp), step(eager))
    dp.model.head.bias.data = dp.model.head.bias.data.clone()
    with pytest.raises(PrivacyError, match="memory of a parameter"):
        call(*batch(1))
    assert ["never compiled" in text for text in counters["graph_break"]] == [True]


def test_an_engine_of_the_opacus_adapter_is_refused() -> None:
    """It counts backward passes, and divides by how many there were."""
    pytest.importorskip("opacus")
    from adamix_kernels.integrations._opacus_parts import engine_of
    from adamix_kernels.integrations.opacus import PrivacyEngine

    data = torch.utils.data.TensorDataset(*(x for x in batch(0)))
    net = Model()
    PrivacyEngine().make_private(
        module=net,
        optimizer=torch.optim.SGD(net.parameters(), lr=0.1),
        data_loader=torch.utils.data.DataLoader(data, batch_size=3),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
    )
    dp = engine_of(net)
    assert dp is not None
    with pytest.raises(PrivacyError, match="Opacus"):
        Graphed(dp, loss_fn, batch(0), recorded)
