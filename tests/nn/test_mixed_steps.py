"""Steps of mixed batches one after another: when thresholds are set and kept, what fails, what is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from plain_loop import STRATEGIES, assert_same, batch, classifier, engine, run, step
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from adamix_kernels import DPEngine, Noise, PrivacyError, PublicQuantile

PUBLIC = slice(0, 4)


def mixed(dp: DPEngine, rows: Any = PUBLIC, shift: float = 0.0, weight: float = 1.0) -> None:
    x, y = batch()
    with dp.mixed(rows, weight=weight):
        run(dp, (x + shift, y), dp.loss_reduction)


def taus(dp: DPEngine) -> list[float]:
    found = dp.thresholds
    return [float(tau) for tau in (found.values() if isinstance(found, dict) else [found])]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_thresholds_are_kept_between_computations(strategy: str) -> None:
    """Steps 0 and 3 set them; in between they hold, with or without public rows, and public norms are not made."""
    dp = engine(classifier(), strategy=strategy, max_grad_norm=PublicQuantile(0.5, every=3))
    seen = []
    for number in range(5):
        if number == 2:
            run(dp, batch())
        else:
            mixed(dp, shift=float(number))
        step(dp)
        seen.append(taus(dp))
    assert seen[0] == seen[1] == seen[2] != seen[3] == seen[4]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_start_holds_until_public_rows_come(strategy: str) -> None:
    started = engine(classifier(), strategy=strategy, max_grad_norm=PublicQuantile(0.5, start=0.3))
    fixed = engine(classifier(), strategy=strategy, max_grad_norm=0.3)
    run(started, batch()), run(fixed, batch())
    assert_same(step(started), step(fixed))
    mixed(started)
    assert min(taus(started)) > 0.3 / 3**0.5


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_start_that_clipped_a_row_holds_for_the_step(strategy: str) -> None:
    """The noise of the step is for one threshold."""
    dp = engine(classifier(), strategy=strategy, max_grad_norm=PublicQuantile(0.5, start=0.3))
    run(dp, batch())
    before = taus(dp)
    mixed(dp, shift=1.0)
    assert taus(dp) == before
    step(dp)
    mixed(dp)
    assert min(after / tau for after, tau in zip(taus(dp), before, strict=True)) > 1


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_no_threshold_is_below_the_least(strategy: str) -> None:
    dp = engine(classifier(), strategy=strategy, max_grad_norm=PublicQuantile(0.5, least=50.0))
    mixed(dp)
    assert sum(tau**2 for tau in taus(dp)) ** 0.5 == pytest.approx(50.0)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_without_public_rows_a_due_threshold_is_an_error(strategy: str) -> None:
    for backward in (lambda dp: run(dp, batch()), lambda dp: mixed(dp, slice(0, 0))):
        dp = engine(classifier(), strategy=strategy, max_grad_norm=PublicQuantile(0.5))
        with pytest.raises(PrivacyError, match=r"threshold.*due.*public rows"):
            backward(dp)
        dp.optimizer.zero_grad()
        with pytest.raises(PrivacyError, match="no public row has set a threshold"):
            dp.optimizer.step()
        mixed(dp)
        step(dp)
        with pytest.raises(PrivacyError, match=r"due.*every"):
            backward(dp)


@pytest.mark.parametrize("mode", ["fast", "secure"])
@pytest.mark.parametrize("strategy", ["auto", "per_layer"])
def test_a_step_without_rows_is_noise_of_the_kept_thresholds(strategy: str, mode: str) -> None:
    """An empty Poisson batch is not to be told from others."""
    settings = {"noise_multiplier": 1.0, "noise": Noise(mode=mode), "loss_reduction": "sum"}
    model = nn.Linear(50, 40)
    dp = engine(model, strategy=strategy, max_grad_norm=PublicQuantile(0.5), **settings)
    with dp.mixed(slice(0, 4)):
        model(torch.randn(9, 50)).sum().backward()
    step(dp)
    grads = step(dp)
    values = torch.cat([g.flatten() for g in grads.values()])
    assert abs(float(values.square().mean().sqrt()) / taus(dp)[0] - 1) < 0.1


@pytest.mark.parametrize("strategy", ["auto", "per_layer", "two_pass"])
def test_a_failed_backward_pass_leaves_no_public_sum(strategy: str) -> None:
    dp = engine(classifier(), strategy=strategy, max_grad_norm=0.7)
    again = engine(classifier(), strategy=strategy, max_grad_norm=0.7)
    x, y = batch()

    def fail(_: Tensor) -> None:
        raise RuntimeError("planted")

    hook = dp.model[0].register_forward_hook(lambda module, args, out: out.register_hook(fail) and None)
    with pytest.raises(RuntimeError, match="planted"), dp.mixed(PUBLIC):
        dp.backward(F.cross_entropy(dp.model(x), y))
    hook.remove()
    mixed(dp), mixed(again)
    assert_same(step(dp), step(again), rtol=1e-12)


def test_zero_grad_drops_public_sums_too() -> None:
    dp = engine(classifier(), max_grad_norm=0.7)
    mixed(dp)
    dp.optimizer.zero_grad()
    run(dp, batch())
    alone = engine(classifier(), max_grad_norm=0.7)
    run(alone, batch())
    assert_same(step(dp), step(alone), rtol=1e-12)


def test_outside_of_mixed_all_rows_are_private() -> None:
    """Also where the forward pass was within."""
    dp, alone = engine(classifier()), engine(classifier())
    x, y = batch()
    with dp.mixed(PUBLIC):
        loss = F.cross_entropy(dp.model(x), y)
    loss.backward()
    run(alone, batch())
    assert_same(step(dp), step(alone), rtol=1e-12)
    with pytest.raises(PrivacyError, match="within public"), dp.public(), dp.mixed(PUBLIC):
        pass


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("strategy", ["auto", "book_keeping", "per_layer"])
def test_checkpointed_parts(strategy: str, reentrant: bool) -> None:
    """What is recomputed within the backward pass is split as the rest is."""

    class Parts(nn.Module):
        def __init__(self, recompute: bool) -> None:
            super().__init__()
            self.inner, self.recompute = classifier(), recompute

        def forward(self, x: Tensor) -> Tensor:
            hidden = torch.tanh(self.inner[0](x))
            rest = self.inner[1:]
            return checkpoint(rest, hidden, use_reentrant=reentrant) if self.recompute else rest(hidden)

    results = []
    for recompute in (False, True):
        dp = engine(Parts(recompute), strategy=strategy, max_grad_norm=PublicQuantile(0.5))
        mixed(dp)
        results.append(step(dp))
    assert_same(*results)


def test_public_gradients_of_another_pass_are_added_as_ever() -> None:
    dp, alone = engine(classifier()), engine(classifier())
    x, y = batch()
    with dp.public():
        F.cross_entropy(dp.model(x), y).backward()
    exact = {name: p.grad.clone() for name, p in dp.model.named_parameters()}
    mixed(dp), mixed(alone)
    want = {name: g + exact[name] for name, g in step(alone).items()}
    assert_same(step(dp), want, rtol=1e-9)


@pytest.mark.parametrize("strategy", ["auto", "per_layer"])
def test_a_resumed_engine_has_the_thresholds(strategy: str) -> None:
    rule = PublicQuantile(0.5, every=4, least=0.01)
    dp = engine(classifier(), strategy=strategy, max_grad_norm=rule)
    mixed(dp)
    step(dp)
    resumed = engine(classifier(), strategy=strategy, max_grad_norm=1.0)
    resumed.load_state_dict(copy.deepcopy(dp.state_dict()))
    assert resumed.max_grad_norm == rule and taus(resumed) == taus(dp)
    run(dp, batch()), run(resumed, batch())
    assert_same(step(resumed), step(dp), rtol=1e-12)


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_a_state_whose_thresholds_are_none_is_refused(value: float) -> None:
    dp = engine(classifier(), strategy="per_layer", max_grad_norm=PublicQuantile(0.5))
    mixed(dp)
    step(dp)
    state = copy.deepcopy(dp.state_dict())
    state["public_quantile"]["values"][0][1] = value
    with pytest.raises(ValueError, match="state: the threshold of layer"):
        dp.load_state_dict(state)


def test_validate_leaves_the_thresholds() -> None:
    dp = engine(classifier(), max_grad_norm=PublicQuantile(0.5, every=9))
    mixed(dp)
    before, sums = taus(dp), {name: total.clone() for name, total in dp._sums.totals.items()}
    with dp.mixed(PUBLIC):
        assert "here it was 1" in str(dp.validate(batch()[0]))
    assert taus(dp) == before and isinstance(dp.max_grad_norm, PublicQuantile)
    assert all(torch.equal(total, dp._sums.totals[name]) for name, total in sums.items())


def test_the_kind_of_threshold_changes_between_steps_only() -> None:
    dp = engine(classifier(), max_grad_norm=PublicQuantile(0.5))
    mixed(dp)
    for value in (1.0, PublicQuantile(0.9)):
        with pytest.raises(PrivacyError, match="between the backward passes"):
            dp.max_grad_norm = value
    step(dp)
    dp.max_grad_norm = 0.7
    run(dp, batch())
    with pytest.raises(PrivacyError, match="between the backward passes"):
        dp.max_grad_norm = PublicQuantile(0.5)
    step(dp)
    with pytest.raises(RuntimeError, match="none yet"):
        dp.max_grad_norm = PublicQuantile(0.5)
        _ = dp.thresholds


@pytest.mark.parametrize(
    ("rows", "error", "match"),
    [
        (torch.ones(9, dtype=torch.bool), PrivacyError, "mask of 9 rows for a batch of 10"),
        (slice(0, 11), PrivacyError, "batch of 10 rows"),
        (slice(11, None), PrivacyError, "batch of 10 rows"),
        (slice(0, 8, 2), PrivacyError, "batch of 10 rows"),
        (slice(-11, None), PrivacyError, "batch of 10 rows"),  # all of them: rows before the public ones are private
        (slice(None, -11), PrivacyError, "batch of 10 rows"),
        (slice(0.5, 2), TypeError, "public_rows: is slice.*pass a slice of ints"),
        (torch.ones(10), TypeError, "dtype torch.float32"),
        (torch.ones(2, 5, dtype=torch.bool), ValueError, r"shape \[2, 5\]"),
        ("first", TypeError, "public_rows: is str"),
        ([0, 1, 1], TypeError, "torch.int64"),
    ],
)
@pytest.mark.parametrize("strategy", ["auto", "per_layer"])
def test_public_rows_that_do_not_fit(strategy: str, rows: Any, error: type[Exception], match: str) -> None:
    dp = engine(classifier(), strategy=strategy)
    with pytest.raises(error, match=match):
        mixed(dp, rows)


def test_settings_that_do_not_fit() -> None:
    dp = engine(classifier())
    for weight, error in ((-1.0, ValueError), (float("nan"), ValueError), (float("inf"), ValueError), ("1", TypeError)):
        with pytest.raises(error, match="weight"):
            mixed(dp, weight=weight)  # type: ignore[arg-type]
    for settings, error in (
        ({"q": 1.1}, ValueError),
        ({"q": "0.5"}, TypeError),
        ({"q": float("nan")}, ValueError),
        ({"every": 0}, ValueError),
        ({"every": 1.5}, TypeError),
        ({"start": 0.0}, ValueError),
        ({"least": -1.0}, ValueError),
        ({"least": None}, TypeError),
    ):
        with pytest.raises(error, match=next(iter(settings))):
            PublicQuantile(**{"q": 0.5, **settings})


def test_secure_mixed_batches_need_a_sum() -> None:
    """The factor 1 / B of a mean would be in the last bits of public gradients, and so in what is released."""
    dp = engine(classifier(), noise=Noise(mode="secure"))
    with pytest.raises(PrivacyError, match="loss_reduction='sum'"):
        mixed(dp)


def test_a_mask_is_copied() -> None:
    rows = torch.zeros(10, dtype=torch.bool)
    rows[:4] = True
    dp, same = engine(classifier()), engine(classifier())
    x, y = batch()
    with dp.mixed(rows):
        rows[:] = True
        run(dp, (x, y))
    mixed(same)
    assert_same(step(dp), step(same), rtol=1e-12)


class Waits(TorchDispatchMode):
    """Counts what a host would wait for a device in."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        waits = (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero, torch.ops.aten.equal, torch.ops.aten.item)
        self.count += func.overloadpacket in waits
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("rows", [PUBLIC, torch.arange(10) % 3 == 0], ids=["slice", "mask"])
@pytest.mark.parametrize("strategy", ["auto", "book_keeping", "per_layer", "materialize"])
def test_no_backward_pass_or_step_waits_for_a_device(strategy: str, rows: Any) -> None:
    """The second pass: which dimension is the batch may be asked once."""
    dp = engine(classifier(), strategy=strategy, max_grad_norm=PublicQuantile(0.5), noise_multiplier=1.0)
    mixed(dp, rows)
    dp.optimizer.step()
    x, y = batch()
    with dp.mixed(rows):
        loss = F.cross_entropy(dp.model(x), y)
        with Waits() as waits:
            loss.backward()
            dp.optimizer.step()
    assert waits.count == 0
    with Waits() as waits:
        torch.ones(3)[0].item()
    assert waits.count == 1
