"""A plain loop under the engine: losses, micro-batches, mixed precision, recomputation, noise, public rows."""

from __future__ import annotations

import copy
import io
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from plain_loop import STRATEGIES, assert_same, batch, classifier, engine, expected, run, step
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from adamix_kernels import DPEngine, Noise

# --- losses and micro-batches ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_step_is_the_clipped_sum(strategy: str, reduction: str) -> None:
    want = expected(classifier(), batch(), strategy=strategy)
    dp = engine(classifier(), strategy=strategy, loss_reduction=reduction)
    run(dp, batch(), reduction)
    assert_same(step(dp), want)


def test_losses_without_reduction() -> None:
    x, y = batch()
    want = expected(classifier(), (x, y))
    dp = engine(classifier(), loss_reduction="sum")
    F.cross_entropy(dp.model(x), y, reduction="none").sum().backward()
    assert_same(step(dp), want)
    F.cross_entropy(dp.model(x), y, reduction="none").backward(torch.ones(len(x), dtype=x.dtype))
    assert_same(step(dp), want)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("parts", [1, 2, 5])
def test_micro_batches_change_nothing(strategy: str, parts: int) -> None:
    x, y = batch()
    want = expected(classifier(), (x, y), strategy=strategy)
    noise = Noise(seed=0)
    dp = engine(classifier(), strategy=strategy, noise=noise, noise_multiplier=1e-12)
    for data in zip(x.chunk(parts), y.chunk(parts), strict=True):
        run(dp, data)
    assert noise.next_draw() == 0, "a backward pass draws no noise"
    assert_same(step(dp), want)
    assert noise.next_draw() == 2, "a step draws once"


def test_ragged_micro_batches() -> None:
    x, y = batch()
    dp = engine(classifier())
    for data in zip(x.split([1, 7, 2]), y.split([1, 7, 2]), strict=True):
        run(dp, data)
    assert_same(step(dp), expected(classifier(), (x, y)))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_zero_grad_drops_what_no_step_has_used(strategy: str) -> None:
    x, y = batch()
    dp = engine(classifier(), strategy=strategy)
    run(dp, (x * 5, y))
    dp.optimizer.zero_grad()
    run(dp, (x, y))
    assert_same(step(dp), expected(classifier(), (x, y), strategy=strategy))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_zero_grad_may_come_between_forward_and_backward(strategy: str) -> None:
    x, y = batch()
    dp = engine(classifier(), strategy=strategy)
    for _ in range(2):
        loss = F.cross_entropy(dp.model(x), y)
        dp.optimizer.zero_grad()
        dp.backward(loss)
        dp.optimizer.step()
    grads = {name: p.grad for name, p in dp.model.named_parameters()}
    assert_same(grads, expected(classifier(), (x, y), strategy=strategy))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_an_empty_batch_is_noise_alone(strategy: str) -> None:
    x, y = batch()
    dp = engine(classifier(), strategy=strategy, noise_multiplier=1.0)
    run(dp, (x[:0], y[:0]))
    empty = step(dp)
    assert all(g.isfinite().all() and g.any() for g in empty.values())
    dp.noise_multiplier = 0.0
    run(dp, (x[:0], y[:0]))
    assert not any(g.any() for g in step(dp).values())


def test_nested_and_dict_batches() -> None:
    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = classifier()

        def forward(self, inputs: dict[str, Any], *, labels: Tensor) -> Any:
            logits = self.inner(inputs["x"][0])
            return SimpleNamespace(loss=F.cross_entropy(logits, labels), logits=logits)

    x, y = batch()
    dp = engine(Nested())
    dp.model({"x": [x]}, labels=y).loss.backward()
    want = {f"inner.{name}": g for name, g in expected(classifier(), (x, y)).items()}
    assert_same(step(dp), want)


# --- precision -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_autocast_bf16_clips_to_the_threshold(strategy: str) -> None:
    x, y = batch(16, torch.float32)
    dp = engine(classifier(torch.float32), strategy=strategy, max_grad_norm=0.05)
    with torch.autocast("cpu", torch.bfloat16):
        loss = F.cross_entropy(dp.model(x), y)
    dp.backward(loss)
    got = step(dp)
    want = expected(classifier(torch.float32), (x, y), 0.05, strategy)
    for name, g in got.items():
        assert g.dtype == torch.float32
        assert (g - want[name]).norm() <= 0.05 * 16 * 0.03, name
    for b in range(16):
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(dp.model(x[b : b + 1]), y[b : b + 1])
        dp.backward(loss)
        norm = torch.stack([g.double().norm() for g in step(dp).values()]).norm()
        assert 0.05 * 0.99 < norm <= 0.05 * (1 + 1e-6)


def test_autocast_norms_are_float32() -> None:
    x, y = batch(16, torch.float32)
    dp = engine(classifier(torch.float32))
    with torch.autocast("cpu", torch.bfloat16):
        run(dp, (x, y))
    step(dp)
    assert all(n.dtype in (torch.float32, torch.float64) for n in dp.metrics()._norm_sq)


def test_float16_with_a_scaled_loss() -> None:
    x, y = batch(8, torch.float32)
    want = expected(classifier(torch.float32), (x, y), 1e-3)
    dp = engine(classifier(torch.float16), loss_scale=2.0**12, max_grad_norm=1e-3)
    (F.cross_entropy(dp.model(x.half()).float(), y) * 2.0**12).backward()
    got = step(dp)
    assert all(g.dtype == torch.float16 for g in got.values())
    assert_same(got, want, 1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_of_half_parameters_are_float32(dtype: torch.dtype) -> None:
    model = nn.Linear(4, 1, bias=False).to(dtype)
    dp = engine(model, max_grad_norm=1.0, loss_reduction="sum", expected_batch_size=4096.0)
    for _ in range(64):  # in bf16 the sum would stop growing at 256
        dp.model(torch.full((64, 4), 0.5, dtype=dtype)).sum().backward()
    assert dp._sums.totals["weight"].dtype == torch.float32
    torch.testing.assert_close(step(dp)["weight"], torch.full((1, 4), 0.5, dtype=dtype), rtol=1e-2, atol=0)


# --- recomputation ---------------------------------------------------------------------------------------------------


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.inner, self.reentrant = classifier(), reentrant

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner[0](x)
        for part in self.inner[1:]:
            x = checkpoint(part, x, use_reentrant=self.reentrant)
        return x


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(strategy: str, reentrant: bool) -> None:
    x, y = batch()
    dp = engine(Checkpointed(reentrant), strategy=strategy)
    for _ in range(2):
        for data in zip(x.chunk(2), y.chunk(2), strict=True):
            run(dp, data)
        want = expected(classifier(), (x, y), strategy=strategy)
        assert_same(step(dp), {f"inner.{name}": g for name, g in want.items()})


# --- public rows, detaching, copies ----------------------------------------------------------------------------------


def test_public_gradients_are_ordinary() -> None:
    x, y = batch()
    plain = classifier()
    F.cross_entropy(plain(x), y).backward()
    dp = engine(classifier())
    with dp.public():
        F.cross_entropy(dp.model(x), y).backward()
    for (name, p), q in zip(dp.model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, msg=name)


def test_public_and_private_rows_in_one_step() -> None:
    x, y = batch()
    plain = classifier()
    F.cross_entropy(plain(x[:4]), y[:4]).backward()
    private = expected(classifier(), (x[4:], y[4:]))
    dp = engine(classifier(), expected_batch_size=6.0)
    with dp.public():
        F.cross_entropy(dp.model(x[:4]), y[:4]).backward()
    run(dp, (x[4:], y[4:]))
    want = {name: p.grad + private[name] / 6 for name, p in plain.named_parameters()}
    assert_same(step(dp), want)


def snapshot(thing: Any) -> dict[str, Any]:
    return {key: dict(value) if isinstance(value, dict) else value for key, value in vars(thing).items()}


def traces(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Any]:
    parameters = [(type(p), dict(vars(p)), p._backward_hooks, p.requires_grad) for p in model.parameters()]
    modules = [snapshot(module) for module in model.modules()]
    state = {key: value for key, value in snapshot(optimizer).items() if key not in ("state", "param_groups")}
    return [parameters, modules, state]


def test_detach_leaves_no_trace() -> None:
    model = classifier()
    optimizer = torch.optim.Adam(model.parameters())
    before, keys = traces(model, optimizer), list(model.state_dict())
    dp = DPEngine(model, optimizer, max_grad_norm=1.0, noise_multiplier=1.0, expected_batch_size=1.0)
    x, y = batch()
    assert list(model.state_dict()) == keys
    torch.testing.assert_close(model(x), classifier()(x), rtol=0, atol=0)
    run(dp, (x, y))
    optimizer.step()
    run(dp, (x, y))
    optimizer.zero_grad()
    dp.detach()
    dp.detach()
    after = traces(model, optimizer)
    assert after[0] == before[0] and after[2] == before[2]
    for now, then in zip(after[1], before[1], strict=True):
        now.pop("_parameters"), then.pop("_parameters")  # compared above, and tensors have no ==
        assert now == then
    loss = F.cross_entropy(model(x), y)
    loss.backward()
    plain = copy.deepcopy(model)
    plain.zero_grad()
    F.cross_entropy(plain(x), y).backward()
    torch.testing.assert_close([p.grad for p in model.parameters()], [p.grad for p in plain.parameters()])
    model.zero_grad()
    engine(model)  # and another may come


def test_an_own_zero_grad_of_the_optimizer_returns() -> None:
    model = classifier()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    own = optimizer.zero_grad
    optimizer.zero_grad = own
    dp = DPEngine(model, optimizer, max_grad_norm=1.0, noise_multiplier=1.0, expected_batch_size=1.0)
    dp.detach()
    assert vars(optimizer)["zero_grad"] == own


def through_file(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, through_file])
def test_copies_of_the_model_are_plain(duplicate: Any) -> None:
    x, y = batch()
    dp = engine(classifier())
    run(dp, (x, y))
    twin = duplicate(dp.model)
    assert all(type(p) is nn.Parameter and not vars(p) for p in twin.parameters())
    F.cross_entropy(twin(x), y).backward()
    plain = classifier()
    F.cross_entropy(plain(x), y).backward()
    torch.testing.assert_close([p.grad for p in twin.parameters()], [p.grad for p in plain.parameters()])
    assert_same(step(dp), expected(classifier(), (x, y)))


def test_state_dict_of_the_engine() -> None:
    dp = engine(classifier(), strategy="per_layer", max_grad_norm={"0": 1.0, "2": 2.0, "3": 3.0})
    run(dp, batch())
    step(dp)
    file = io.BytesIO()
    torch.save(dp.state_dict(), file)
    file.seek(0)
    other = engine(classifier(), strategy="per_layer")
    other.load_state_dict(torch.load(file))
    assert other.steps == 1
    assert other.max_grad_norm == {"0": 1.0, "2": 2.0, "3": 3.0}
    assert other.state_dict() == dp.state_dict()


def test_resuming_a_run() -> None:
    x, y = batch()
    model = classifier()
    optimizer = torch.optim.Adam(model.parameters())
    dp = DPEngine(model, optimizer, max_grad_norm=1.0, noise_multiplier=0.0, expected_batch_size=10.0)
    run(dp, (x, y))
    optimizer.step()
    twin = classifier()
    other = torch.optim.Adam(twin.parameters())
    twin.load_state_dict(model.state_dict())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    again = DPEngine(twin, other, max_grad_norm=1.0, noise_multiplier=0.0, expected_batch_size=10.0)
    again.load_state_dict(dp.state_dict())
    for one in (dp, again):
        one.optimizer.zero_grad()
        run(one, (x, y))
        one.optimizer.step()
    torch.testing.assert_close(model.state_dict(), twin.state_dict())
    assert again.steps == dp.steps == 2
