"""The engine through a user's loop: what gives no gradient, noise, thresholds, metrics."""

from __future__ import annotations

import copy
import math
import warnings
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from plain_loop import STRATEGIES, assert_same, batch, classifier, clipped, engine, expected, per_sample, run, step
from torch import Tensor, nn

from adamix_kernels import DPEngine, FastNoiseWarning, Noise, PrivacyError

pytestmark = pytest.mark.filterwarnings("ignore::adamix_kernels.OutsideGuaranteeWarning")


def test_fast_noise_is_named_where_training_starts() -> None:
    model = nn.Linear(2, 2)
    settings = {"max_grad_norm": 1.0, "expected_batch_size": 2}
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.warns(FastNoiseWarning, match='mode "fast" is not hardened') as caught:
        DPEngine(model, optimizer, noise_multiplier=1.0, **settings).detach()
    assert [w.filename for w in caught] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        DPEngine(model, optimizer, noise_multiplier=0.0, **settings).detach()
        DPEngine(model, optimizer, noise_multiplier=1.0, noise=Noise(mode="secure"), **settings).detach()


# --- passes that give no gradient ------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_evaluation_leaves_nothing_behind(strategy: str) -> None:
    x, y = batch()
    dp = engine(classifier(), strategy=strategy)
    dp.model.eval()
    with torch.no_grad():
        dp.model(x[:3])
    with torch.inference_mode():
        dp.model(x[:3])
    dp.model(x[:3])  # with a graph that is thrown away
    dp.model.train()
    run(dp, (x, y))
    assert_same(step(dp), expected(classifier(), (x, y), strategy=strategy))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_gradients_of_inputs_add_nothing(strategy: str) -> None:
    x, y = batch()
    dp = engine(classifier(), strategy=strategy)
    inputs = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(F.cross_entropy(dp.model(inputs), y), inputs)
    (plain,) = torch.autograd.grad(F.cross_entropy(classifier()(inputs), y), inputs)
    torch.testing.assert_close(grad, plain)
    run(dp, (x, y))
    assert_same(step(dp), expected(classifier(), (x, y), strategy=strategy))


class Fails(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        raise KeyboardInterrupt


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_failed_backward_pass_leaves_nothing(strategy: str) -> None:
    class Breaks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.broken = classifier(), False

        def forward(self, x: Tensor) -> Tensor:
            x = self.inner[0](x)
            return self.inner[1:](Fails.apply(x) if self.broken else x)

    x, y = batch()
    want = {f"inner.{name}": g for name, g in expected(classifier(), (x, y), strategy=strategy).items()}
    dp = engine(Breaks(), strategy=strategy)
    for parts in ([0, 10], [0, 5, 10]):
        for first, last in pairwise(parts):
            dp.model.broken = True
            with pytest.raises(KeyboardInterrupt):
                run(dp, (x[first:last], y[first:last]))
            dp.model.broken = False
            run(dp, (x[first:last], y[first:last]))
        assert_same(step(dp), want)


def test_retaining_the_graph_is_allowed() -> None:
    x, y = batch()
    dp = engine(classifier())
    F.cross_entropy(dp.model(x), y).backward(retain_graph=True)
    assert_same(step(dp), expected(classifier(), (x, y)))


def test_parameters_may_be_frozen_and_thawed() -> None:
    x, y = batch()
    dp = engine(classifier())
    dp.model[0].requires_grad_(False)
    run(dp, (x, y))
    frozen = step(dp)
    assert set(frozen) == {"2.weight", "2.bias", "3.weight", "3.bias"}
    plain = classifier()
    plain[0].requires_grad_(False)
    assert_same(frozen, expected(plain, (x, y)))
    dp.model[0].requires_grad_(True)
    run(dp, (x, y))
    assert_same(step(dp), expected(classifier(), (x, y)))


# --- noise -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("backward", [True, False])
def test_noise_of_a_step_has_its_standard_deviation(strategy: str, backward: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(100, 100), nn.Linear(100, 100))
    dp = engine(model, strategy=strategy, max_grad_norm=0.5, noise_multiplier=3.0, expected_batch_size=8.0)
    if backward:
        dp.backward(dp.model(torch.zeros(0, 100)).mean())
    values = torch.cat([g.flatten() for g in step(dp).values()])
    std = 3.0 * 0.5 / 8
    count = values.numel()
    assert abs(values.mean()) < 4 * std / math.sqrt(count)
    assert abs(values.std() / std - 1) < 4 / math.sqrt(2 * count)


def test_noise_reaches_unused_parameters_and_never_repeats() -> None:
    class Partly(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(5, 3), nn.Linear(40, 40)
            self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    dp = engine(Partly(), noise_multiplier=1.0)
    seen = []
    for _ in range(3):
        run(dp, batch(4, torch.float32))
        grads = step(dp)
        assert set(grads) == {"used.weight", "used.bias", "unused.weight", "unused.bias"}
        seen += [grads["unused.weight"].flatten(), grads["unused.bias"]]
    values = torch.cat(seen)
    assert len(values.unique()) > 0.999 * len(values)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_noise_on_half_parameters(dtype: torch.dtype) -> None:
    dp = engine(nn.Linear(100, 100).to(dtype), noise_multiplier=2.0)
    values = step(dp)["weight"]
    assert values.dtype == dtype
    assert abs(values.double().std() / 1.4 - 1) < 0.03


# --- thresholds ------------------------------------------------------------------------------------------------------


def test_a_threshold_on_the_device_is_set_anew_each_step() -> None:
    x, y = batch()
    dp = engine(classifier())
    for limit in (0.1, 0.9, 0.3):
        dp.max_grad_norm = torch.tensor(limit, dtype=torch.float64)
        run(dp, (x, y))
        assert_same(step(dp), expected(classifier(), (x, y), limit))


@pytest.mark.parametrize("kind", [float, torch.tensor])
def test_noise_is_that_of_the_largest_threshold(kind: Any) -> None:
    torch.manual_seed(0)
    dp = engine(nn.Linear(100, 100), noise_multiplier=1.0)
    for limit in (0.1, 2.0, 0.5):
        dp.max_grad_norm = kind(limit)
        dp.model(torch.zeros(0, 100)).sum().backward()
    dp.max_grad_norm = kind(0.01)
    assert abs(step(dp)["weight"].std() / 2 - 1) < 0.03
    assert abs(step(dp)["weight"].std() / 0.01 - 1) < 0.03, "without a backward pass it is the one of now"


def test_changing_a_threshold_in_place_does_not_shrink_the_noise_of_sums_made_before() -> None:
    torch.manual_seed(0)
    limit = torch.tensor(2.0)
    dp = engine(nn.Linear(100, 100), noise_multiplier=1.0, max_grad_norm=limit)
    dp.model(torch.zeros(0, 100)).sum().backward()
    limit.fill_(0.001)
    assert abs(step(dp)["weight"].std() / 2 - 1) < 0.03


def test_thresholds_by_layer() -> None:
    x, y = batch()
    limits = {"0": 0.1, "2": 0.02, "3": 0.3}
    rows = per_sample(classifier(), lambda m, b: F.cross_entropy(m(x[b : b + 1]), y[b : b + 1]), len(x))
    dp = engine(classifier(), strategy="per_layer", max_grad_norm=limits)
    run(dp, (x, y))
    assert_same(step(dp), clipped(rows, 0, limits))
    wide = engine(nn.Sequential(nn.Linear(100, 100), nn.Linear(100, 100)), strategy="per_layer", noise_multiplier=1.0)
    wide.max_grad_norm = {"0": 3.0, "1": 4.0}
    assert abs(step(wide)["0.weight"].std() / 5 - 1) < 0.03


def test_automatic_clipping_normalises() -> None:
    x, y = batch()
    rows = per_sample(classifier(), lambda m, b: F.cross_entropy(m(x[b : b + 1]), y[b : b + 1]), len(x))
    want: dict[str, Tensor] = {}
    for row in rows:
        norm = torch.stack([g.norm() for g in row.values()]).norm()
        want = {name: want.get(name, 0) + 0.7 / (norm + 0.01) * g for name, g in row.items()}
    dp = engine(classifier(), clipping="automatic")
    run(dp, (x, y))
    assert_same(step(dp), want)


# --- metrics ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_metrics(strategy: str) -> None:
    x, y = batch()
    rows = per_sample(classifier(), lambda m, b: F.cross_entropy(m(x[b : b + 1]), y[b : b + 1]), len(x))
    norms = torch.stack([torch.stack([g.norm() for g in row.values()]).norm() for row in rows])
    limit = float(norms.median())
    dp = engine(classifier(), strategy=strategy, max_grad_norm=limit, noise_multiplier=2.0, measure_signal=True)
    with pytest.raises(RuntimeError, match="no step was taken yet"):
        dp.metrics()
    for data in zip(x.split([3, 7]), y.split([3, 7]), strict=True):
        run(dp, data)
    step(dp)
    metrics = dp.metrics()
    assert metrics.samples.reveal() == 10
    torch.testing.assert_close(metrics.norms.reveal(), norms, rtol=1e-4, atol=0)
    assert metrics.clipped_fraction.reveal() == pytest.approx(float((norms > limit).double().mean()), abs=0.11)
    assert metrics.norm_quantiles([0.0, 0.5, 1.0]).reveal() == pytest.approx(
        [float(norms.min()), limit, float(norms.max())], rel=1e-4
    )
    total = expected(classifier(), (x, y), limit, strategy)
    signal = float(torch.stack([g.norm() for g in total.values()]).norm())
    count = sum(p.numel() for p in dp.model.parameters())
    assert metrics.signal_to_noise.reveal() == pytest.approx(signal / (2 * limit * math.sqrt(count)), rel=1e-4)
    step(dp)
    metrics = dp.metrics()
    assert (metrics.samples.reveal(), metrics.clipped_fraction.reveal(), metrics.signal_to_noise.reveal()) == (0, 0, 0)
    assert math.isnan(metrics.norm_quantiles().reveal()[0])


def test_one_bad_sample_adds_nothing() -> None:
    x, y = batch()
    x[3] = math.nan
    dp = engine(classifier())
    run(dp, (x, y))
    keep = [b for b in range(10) if b != 3]
    assert_same(step(dp), expected(classifier(), (x[keep], y[keep])))
    assert dp.metrics().norms.reveal()[3] == math.inf


def test_data_dependent_control_flow() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(5, 3), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.one(x) if x.sum() > 0 else self.two(x)

    torch.manual_seed(0)
    model = Branches().double()
    x, y = batch()
    x = x.abs()
    dp = engine(copy.deepcopy(model))
    run(dp, (x, y))
    run(dp, (-x, y))
    first, second = expected(model, (x, y)), expected(model, (-x, y))
    assert_same(step(dp), {**first, **second})


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_pairs_of_one_sample_in_two_forward_passes(strategy: str) -> None:
    def pair(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(m(x) + m(-x).square(), y)

    x, y = batch()
    rows = per_sample(classifier(), lambda m, b: pair(m, x[b : b + 1], y[b : b + 1]), len(x))
    even = dict.fromkeys(["0", "2", "3"], 0.7 / 3**0.5) if strategy == "per_layer" else None
    dp = engine(classifier(), strategy=strategy, joint_forwards=True)
    dp.backward(pair(dp.model, x, y))
    assert_same(step(dp), clipped(rows, 0.7, even))


def test_training_goes_on_after_a_step_that_failed() -> None:
    class Fragile(torch.optim.SGD):
        broken = True

        def step(self, closure: Any = None) -> None:
            if self.broken:
                raise OSError
            super().step()

    model = classifier()
    optimizer = Fragile(model.parameters(), lr=0.0)
    dp = DPEngine(model, optimizer, max_grad_norm=0.7, noise_multiplier=0.0, expected_batch_size=1.0)
    run(dp, batch())
    with pytest.raises(OSError):
        optimizer.step()
    optimizer.broken = False
    optimizer.zero_grad()
    run(dp, batch())
    assert_same(step(dp), expected(classifier(), batch()))


def test_a_schedule_of_the_learning_rate() -> None:
    dp = engine(classifier())
    schedule = torch.optim.lr_scheduler.StepLR(dp.optimizer, 1)
    run(dp, batch())
    assert_same(step(dp), expected(classifier(), batch()))
    schedule.step()
    dp.detach()


def test_a_function_that_saves_its_result() -> None:
    class Distances(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.centres = nn.Linear(5, 5), nn.Parameter(torch.randn(3, 5))

        def forward(self, x: Tensor) -> Tensor:
            return torch.cdist(self.first(x), self.centres)

    torch.manual_seed(0)
    model = Distances().double()
    dp = engine(copy.deepcopy(model))
    run(dp, batch())
    assert_same(step(dp), expected(model, batch()))


def test_a_signal_that_was_not_measured() -> None:
    dp = engine(classifier())
    run(dp, batch())
    step(dp)
    with pytest.raises(RuntimeError, match="measure_signal=True"):
        _ = dp.metrics().signal_to_noise


@pytest.mark.gpu
@pytest.mark.parametrize("strategy", [s for s in STRATEGIES if s != "two_pass"])  # which compares its passes
def test_no_step_waits_for_the_device(strategy: str) -> None:
    x, y = (data.cuda() for data in batch(64, torch.float32))
    dp = engine(classifier(torch.float32).cuda(), strategy=strategy, noise_multiplier=1.0, measure_signal=True)
    dp.max_grad_norm = torch.tensor(0.5, device="cuda")
    for waits in ("default", "error"):  # the first step compiles
        torch.cuda.set_sync_debug_mode(waits)
        try:
            run(dp, (x, y))
            step(dp)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert dp.metrics().samples.reveal() == 64 and dp.metrics().signal_to_noise.reveal() > 0
    assert dp.validate((x,)).samples == 64


def test_privacy_error_is_an_error_of_the_loop() -> None:
    assert issubclass(PrivacyError, RuntimeError)
