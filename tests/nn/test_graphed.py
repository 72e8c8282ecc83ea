"""A captured private pass: replays are ordinary passes, each counted once, with the noise and threshold of now.

Here a graph is a record of ATen operations that are run again on the same memory; those marked gpu capture in CUDA.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from plain_loop import engine, step
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from adamix_kernels import BackendError, DPEngine, Noise, PrivacyError, use_backend
from adamix_kernels.nn import factors, passes
from adamix_kernels.nn.adaptive import PublicQuantile
from adamix_kernels.nn.graphed import Graphed

STRATEGIES = ["auto", "book_keeping", "per_layer"]


class Recorder(TorchDispatchMode):
    """Operations and the memory of their results, which a replay fills again; what waits for a device is refused."""

    WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "is_nonzero", "equal")

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, list[Tensor]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        masks = func.name() == "aten::index.Tensor" and any(i is not None and i.dtype == torch.bool for i in args[1])
        if masks or func.name().split("::")[1].split(".")[0] in self.WAITS:
            raise RuntimeError(f"{func.name()} waits for the device, which a capture cannot")
        seen = tree_map(_alias, (args, kwargs))  # whose shapes no later operation changes in place
        out = func(*args, **kwargs)
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        made = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        own = [x for x in made if x.untyped_storage()._cdata not in given]
        if func._schema.is_mutable or own or not made:
            self.calls.append((func, seen[0], seen[1], [_alias(x) for x in own]))
        self.kept = [*getattr(self, "kept", []), out]  # memory that is used once is not used again
        return out

    @torch.no_grad()
    def replay(self) -> None:
        for func, args, kwargs, own in self.calls:
            found = func(*args, **kwargs)
            if own and not func._schema.is_mutable and "empty" not in func.name():
                made = [x for x in tree_leaves(found) if isinstance(x, Tensor)]
                for static, x in zip(own, made, strict=True):
                    static.copy_(x)


def _alias(x: Any) -> Any:
    return x.detach() if isinstance(x, Tensor) else x


def recorded(device: torch.device, run: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
    run()
    with Recorder() as recorder:
        left = run()
    return left, recorder.replay


@pytest.fixture(autouse=True)
def reference() -> Iterator[None]:
    """Backends with kernels of their own leave no ATen operations to record."""
    with use_backend("torch"):
        yield


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.conv = nn.Linear(4, 4), nn.Conv1d(4, 5, 3)
        self.norm, self.head = nn.LayerNorm(5), nn.Linear(5, 3)

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        h = self.conv((self.inner(x) * scale[:, None, None]).mT).mT.tanh()
        return self.head(self.norm(h)).mean(1)


def model() -> nn.Module:
    torch.manual_seed(0)
    return Model()


def batch(seed: int, samples: int = 6, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    x, y = torch.randn(samples, 8, 4, generator=g), torch.randint(3, (samples,), generator=g)
    return x.to(device), torch.randn(samples, generator=g).to(device), y.to(device)


def loss_fn(net: nn.Module, x: Tensor, scale: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(net(x, scale), y)


def sum_fn(net: nn.Module, x: Tensor, scale: Tensor, y: Tensor, weight: Tensor) -> Tensor:
    return (F.cross_entropy(net(x, scale), y, reduction="none") * weight).sum()


def graphed(dp: DPEngine, loss: Callable[..., Tensor] = loss_fn, example: Any = None) -> Graphed:
    return Graphed(dp, loss, example or batch(0), capture=recorded)


def pair(strategy: str = "book_keeping", **settings: Any) -> tuple[DPEngine, DPEngine, Graphed]:
    """Two engines of equal models, and the captured pass of the second."""
    net = model()
    eager = engine(copy.deepcopy(net), strategy=strategy, **settings)
    settings = {**settings, "noise": Noise(seed=3)} if "noise" in settings else settings
    dp = engine(net, strategy=strategy, **settings)
    return eager, dp, graphed(dp)


def same(got: dict[str, Tensor], want: dict[str, Tensor], rtol: float = 2e-6, atol: float = 1e-7) -> None:
    assert got.keys() == want.keys()
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=rtol, atol=atol)


@pytest.mark.parametrize("clipping", ["flat", "automatic"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_replays_are_ordinary_passes(strategy: str, clipping: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of other batches, other thresholds (numbers and tensors), and one or more passes a step."""
    monkeypatch.setattr(passes, "smaller", lambda x: x)  # as in a capture: its norms have other roundings
    eager, dp, run = pair(strategy, clipping=clipping, noise_multiplier=0.3, noise=Noise(seed=3))
    assert not dp._sums.totals and not dp._sums.begun and not dp._sums.norm_sq, "a capture leaves nothing"
    limits = [0.7, 0.05, 3.0, torch.tensor(0.2)]
    for number, limit in enumerate(limits):
        for seed in range(1 + number % 3):
            eager.max_grad_norm = dp.max_grad_norm = limit / (1 + seed)  # the noise is that of the largest
            data = batch(10 * number + seed)
            loss = loss_fn(eager.model, *data)
            loss.backward()
            torch.testing.assert_close(run(*data), loss.detach())
        same(dp._sums.totals, eager._sums.totals)
        assert all(x.any() for x in dp._sums.totals.values())
        same(step(dp), step(eager))
        torch.testing.assert_close(dp.metrics().norms.reveal(), eager.metrics().norms.reveal(), rtol=1e-5, atol=0)
        assert dp.metrics().samples.reveal() == 6 * (1 + number % 3)
        assert dp.metrics().clipped_fraction.reveal() == eager.metrics().clipped_fraction.reveal()


def test_weights_of_now_are_trained_with_the_noise_of_each_step() -> None:
    eager, dp, run = pair(noise_multiplier=0.8, noise=Noise(seed=3))
    for each in (eager, dp):
        each.optimizer.param_groups[0]["lr"] = 0.5
    seen = []
    for _ in range(4):
        data = batch(0)
        loss_fn(eager.model, *data).backward()
        run(*data)
        got, want = step(dp), step(eager)
        same(got, want)
        seen.append(got["head.bias"])
        same(dict(dp.model.named_parameters()), dict(eager.model.named_parameters()))
    assert all(not torch.equal(seen[0], other) for other in seen[1:])


def test_autocast_within_the_loss_sees_the_weights_of_now() -> None:
    def half(net: nn.Module, *data: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return loss_fn(net, *data).float()

    eager, dp = (engine(model(), strategy="book_keeping") for _ in range(2))
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(PrivacyError, match="within autocast"):
        graphed(dp)
    run = graphed(dp, half)
    for each in (eager, dp):
        each.optimizer.param_groups[0]["lr"] = 0.5
    for seed in range(3):
        half(eager.model, *batch(seed)).backward()
        run(*batch(seed))
        same(step(dp), step(eager))


def test_public_gradients_are_added_as_ever() -> None:
    eager, dp, run = pair()
    for each in (eager, dp):
        with each.public():
            loss_fn(each.model, *batch(5)).backward()
    loss_fn(eager.model, *batch(1)).backward()
    run(*batch(1))
    same(step(dp), step(eager))


def test_the_noise_of_a_step_is_fresh_though_the_batch_is_not() -> None:
    _, dp, run = pair(noise_multiplier=0.8, noise=Noise(seed=3))
    released = []
    for _ in range(2):
        run(*batch(1))
        released.append(step(dp)["head.bias"])
    assert (released[0] - released[1]).abs().min() > 0


def test_a_step_without_a_replay_is_noise_alone() -> None:
    eager, dp, _ = pair(noise_multiplier=0.8, noise=Noise(seed=3))
    same(step(dp), step(eager))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_no_sample_of_a_replay_adds_more_than_the_threshold(strategy: str) -> None:
    """Each sample alone has a weight other than 0 in a batch of hostile rows, at thresholds that change."""
    dp = engine(model(), strategy=strategy, loss_reduction="sum")
    run = graphed(dp, sum_fn, (*batch(0), torch.ones(6)))
    x, scale, y = batch(1)
    scale = scale * torch.tensor([1.0, 1e3, 1e-3, 1e8, torch.inf, 0.0])
    for limit in (1e-3, 0.3, 7.0):
        dp.max_grad_norm = limit
        sizes = []
        for row in range(6):
            run(x, scale, y, 1e6 * torch.eye(6)[row])
            sizes.append(float(torch.stack([x.double().square().sum() for x in step(dp).values()]).sum().sqrt()))
        assert max(sizes) <= limit * (1 + 1e-6), sizes
        assert max(sizes) > 0.99 * limit


def test_rows_of_weight_0_are_none() -> None:
    """A batch that is padded to the captured shape: as a smaller one in an ordinary pass."""
    eager, dp = (engine(model(), strategy="book_keeping", loss_reduction="sum") for _ in range(2))
    run = graphed(dp, sum_fn, (*batch(0), torch.ones(6)))
    data = batch(1)
    run(*data, torch.tensor([1.0, 1, 1, 1, 0, 0]))
    sum_fn(eager.model, *(x[:4] for x in data), torch.ones(4)).backward()
    same(step(dp), step(eager))


def test_the_expected_batch_size_of_now_divides() -> None:
    """Also where replays and ordinary passes meet in one step."""
    eager, dp, run = pair(expected_batch_size=5.0)
    for size in (5.0, 8.0, 3.0):
        eager.expected_batch_size = dp.expected_batch_size = size
        loss_fn(eager.model, *batch(1)).backward()
        run(*batch(1))
        for each in (eager, dp):
            loss_fn(each.model, *batch(2, 9)).backward()
            each.expected_batch_size = 2 * size
        loss_fn(eager.model, *batch(3)).backward()
        run(*batch(3))
        same(step(dp), step(eager))


class Tokens(Model):
    """With a class token and positions, whose gradients are there one by one."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.places = (nn.Parameter(torch.ones(1, n, 4)) for n in (1, 9))

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        x = torch.cat((self.token.expand(len(x), -1, -1), x), 1) + self.places
        return super().forward(x, scale)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_gradients_that_are_there_one_by_one(strategy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passes, "smaller", lambda x: x)
    eager, dp = (engine(Tokens(), strategy=strategy) for _ in range(2))
    dp.model.load_state_dict(eager.model.state_dict())
    run = graphed(dp)
    for seed in range(1, 3):
        run(*batch(seed))
        loss_fn(eager.model, *batch(seed)).backward()
        same(step(dp), step(eager))


def test_lists_are_not_sent_to_kernels_in_a_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here by what stands for a kernel that cannot be captured: one that refuses where operations are recorded."""
    there, coef = factors.PerSample([torch.randn(5, 3), torch.randn(5, 2, 2)]), torch.rand(5)
    want = there.norm_sq(), there.clip_sum(coef)
    with use_backend("cpp"), Recorder():
        with pytest.raises(BackendError):
            there.norm_sq()
        with pytest.raises(BackendError):
            there.clip_sum(coef)
        monkeypatch.setattr(factors, "capturing", lambda: True)
        got = there.norm_sq(), there.clip_sum(coef)
    torch.testing.assert_close(got, want)


def test_a_pass_that_waits_for_its_step_is_not_lost_in_a_capture() -> None:
    eager, dp = (engine(model(), strategy="book_keeping") for _ in range(2))
    for each in (eager, dp):
        loss_fn(each.model, *batch(4)).backward()
    graphed(dp)
    same(step(dp), step(eager))


def test_buffers_are_as_before_the_capture() -> None:
    class Counts(Model):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor, scale: Tensor) -> Tensor:
            self.calls.add_(1)
            return super().forward(x, scale)

    dp = engine(Counts(), strategy="book_keeping")
    run = graphed(dp)
    assert dp.model.calls == 0
    run(*batch(1))
    assert dp.model.calls == 1


# --- what fails or is refused ----------------------------------------------------------------------------------------


def test_a_call_that_fails_leaves_nothing() -> None:
    eager, dp, run = pair()
    replay = run._replay

    def fails() -> None:
        replay()
        raise RuntimeError("lost the device")

    run._replay = fails
    with pytest.raises(RuntimeError, match="lost the device"):
        run(*batch(1))
    run._replay = replay
    assert not dp._sums.begun and not dp._sums.totals and not dp._sums.staged
    run(*batch(2))
    loss_fn(eager.model, *batch(2)).backward()
    same(step(dp), step(eager))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: [x[0][:4], x[1][:4], x[2][:4]], "was captured"),
        (lambda x: [x[0].double(), x[1], x[2]], "was captured"),
        (lambda x: [x[0].to("meta"), x[1], x[2]], "is on meta"),
        (lambda x: [x[0], x[1], 3], "pass tensors"),
        (lambda x: x[:2], "was captured"),
    ],
)
def test_other_batches_are_refused(change: Callable[[Any], Any], message: str) -> None:
    _, dp, run = pair()
    with pytest.raises((TypeError, ValueError), match=message):
        run(*change(batch(1)))
    assert not dp._sums.begun


def _replace(dp: DPEngine) -> None:
    dp.model.head.bias.data = dp.model.head.bias.data.clone()


CHANGES: dict[str, tuple[Callable[[DPEngine], Any], str]] = {
    "frozen": (lambda dp: dp.model.head.bias.requires_grad_(False), "which parameters are trained"),
    "replaced": (_replace, "memory of a parameter"),
    "strategy": (lambda dp: setattr(dp, "strategy", "per_layer"), "strategy changed"),
    "clipping": (lambda dp: setattr(dp, "clipping", "automatic"), "clipping changed"),
    "loss_scale": (lambda dp: setattr(dp, "loss_scale", 2.0), "loss_scale changed"),
    "loss_reduction": (lambda dp: setattr(dp, "loss_reduction", "sum"), "loss_reduction changed"),
    "eval": (lambda dp: dp.model.eval(), "eval"),
    "quantile": (lambda dp: setattr(dp, "max_grad_norm", PublicQuantile(0.5)), "PublicQuantile"),
    "subspace": (lambda dp: dp.public_subspace(rank=2), "subspace"),
    "ranks": (lambda dp: setattr(dp, "ranks", object()), "over several ranks"),
    "detached": (lambda dp: dp.detach(), "detached"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_a_graph_does_not_see_is_refused(change: str) -> None:
    _, dp, run = pair()
    make, message = CHANGES[change]
    make(dp)
    with pytest.raises(PrivacyError, match=message):
        run(*batch(1))
    assert not dp._sums.begun


def test_a_call_within_another_capture_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    _, dp, run = pair()
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(PrivacyError, match="another CUDA graph"):
        run(*batch(1))
    assert not dp._sums.begun


def test_public_and_mixed_replays_are_refused() -> None:
    _, dp, run = pair()
    with dp.public(), pytest.raises(PrivacyError, match=r"within public\(\)"):
        run(*batch(1))
    with dp.mixed(slice(0, 2)), pytest.raises(PrivacyError, match=r"within mixed\(\)"):
        run(*batch(1))
    assert not dp._sums.begun


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"strategy": "two_pass"}, "two_pass"),
        ({"strategy": "materialize"}, "materialize"),
        ({"noise": Noise(mode="secure")}, "secure"),
        ({"unit": "user"}, "user"),
        ({"max_grad_norm": PublicQuantile(0.5)}, "PublicQuantile"),
        ({"strategy": "per_layer", "max_grad_norm": dict.fromkeys(["inner", "conv", "norm", "head"], 1.0)}, "a dict"),
    ],
)
def test_engines_that_are_not_captured(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(PrivacyError, match=message):
        graphed(engine(model(), **settings))


def test_a_model_on_the_cpu_is_refused() -> None:
    with pytest.raises(PrivacyError, match="needs a CUDA device"):
        engine(model()).graphed(loss_fn, *batch(0))


def _reads(dp: DPEngine, *data: Tensor) -> Tensor:
    loss = loss_fn(dp.model, *data)
    return loss * 2 if loss.item() > 0 else loss


def _public(dp: DPEngine, *data: Tensor) -> Tensor:
    with dp.public():
        return loss_fn(dp.model, *data)


def _steps(dp: DPEngine, *data: Tensor) -> Tensor:
    dp.optimizer.step()
    return loss_fn(dp.model, *data)


def _sets(dp: DPEngine, *data: Tensor) -> Tensor:
    dp.max_grad_norm = 5.0
    return loss_fn(dp.model, *data)


def _twice(dp: DPEngine, *data: Tensor) -> Tensor:
    loss_fn(dp.model, *data).backward()
    return loss_fn(dp.model, *data)


def _again(dp: DPEngine, *data: Tensor) -> Tensor:
    return graphed(dp)(*data)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (_reads, "waits for the device"),
        (_public, r"public\(\): within the loss_fn"),
        (_steps, r"step\(\): within the loss_fn"),
        (_sets, "sets max_grad_norm"),
        (_twice, "2 private backward passes"),
        (_again, "within the loss_fn of another"),
    ],
)
def test_a_loss_that_cannot_be_captured(loss: Callable[..., Tensor], message: str) -> None:
    """The engine is as it was, and trains on."""
    eager, dp = (engine(model(), strategy="book_keeping") for _ in range(2))
    with pytest.raises(RuntimeError, match=message):
        graphed(dp, lambda net, *data: loss(dp, *data))
    assert not dp._sums.begun and dp.steps == 0 and dp.max_grad_norm == 0.7
    for each in (eager, dp):
        loss_fn(each.model, *batch(1)).backward()
    same(step(dp), step(eager))


def test_a_compiled_model_is_refused() -> None:
    dp = engine(model(), strategy="book_keeping")
    compiled = torch.compile(dp.model, backend="aot_eager")
    with pytest.raises(PrivacyError, match="model is compiled"):
        graphed(dp, lambda _, *data: loss_fn(compiled, *data), batch(0, 7))


# --- a graph of CUDA -------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("make", [Model, Tokens])
def test_replays_of_a_cuda_graph_are_ordinary_passes(
    make: type[Model], strategy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(passes, "smaller", lambda x: x)
    with use_backend("auto"):
        torch.manual_seed(0)
        net = make().cuda()
        eager, dp = (
            engine(each, strategy=strategy, noise_multiplier=0.5, noise=Noise(seed=3))
            for each in (net, copy.deepcopy(net))
        )
        run = dp.graphed(loss_fn, *batch(0, device="cuda"))
        assert not dp._sums.begun
        for each in (eager, dp):
            each.optimizer.param_groups[0]["lr"] = 0.1
        for number, limit in enumerate([0.7, 0.05, torch.tensor(0.2, device="cuda")]):
            eager.max_grad_norm = dp.max_grad_norm = limit
            for seed in range(1 + number):
                data = batch(10 * number + seed, device="cuda")
                loss_fn(eager.model, *data).backward()
                run(*data)
            same(step(dp), step(eager), rtol=1e-5, atol=1e-6)  # convolutions there add up in any order
            torch.testing.assert_close(dp.metrics().norms.reveal(), eager.metrics().norms.reveal(), rtol=1e-4, atol=0)


@pytest.mark.gpu
def test_dropout_of_a_cuda_graph_draws_anew() -> None:
    def dropped(net: nn.Module, *data: Tensor) -> Tensor:
        return loss_fn(lambda x, scale: F.dropout(net(x, scale)), *data)

    with use_backend("auto"):
        dp = engine(model().cuda(), strategy="book_keeping")
        run = dp.graphed(dropped, *batch(0, device="cuda"))
        assert len({float(run(*batch(0, device="cuda"))) for _ in range(3)}) == 3


@pytest.mark.gpu
def test_a_cuda_graph_without_graphed_is_refused() -> None:
    with use_backend("auto"):
        dp = engine(model().cuda(), strategy="book_keeping")
        data = batch(0, device="cuda")
        loss_fn(dp.model, *data).backward()
        dp.optimizer.zero_grad()
        run = dp.graphed(loss_fn, *data)
        with pytest.raises(PrivacyError, match="another CUDA graph"), torch.cuda.graph(torch.cuda.CUDAGraph()):
            run(*data)
        assert not dp._sums.begun
