"""Loops that once released more of a sample than the threshold, without an error."""

from __future__ import annotations

import copy
import io
import threading
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from plain_loop import STRATEGIES, batch, classifier, engine, step
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from adamix_kernels import DPEngine, PrivacyError


def norm(grads: dict[str, Tensor]) -> float:
    return float(torch.cat([g.flatten() for g in grads.values()]).norm())


def loss(dp: DPEngine, x: Tensor) -> Tensor:
    return 100 * dp.model(x).sum()


class Recomputed(nn.Module):
    """All of it is computed again in the backward pass."""

    def __init__(self, *parts: nn.Module, **how: Any) -> None:
        super().__init__()
        self.net, self.how = nn.Sequential(*parts), how

    def forward(self, x: Tensor) -> Any:
        return checkpoint(self.net, x, **self.how)


@pytest.mark.parametrize("strategy", ["book_keeping", "per_layer", "materialize"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_a_second_backward_pass_that_recomputes(strategy: str, reentrant: bool) -> None:
    dp = engine(Recomputed(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3), use_reentrant=reentrant), strategy=strategy)
    out = dp.model(torch.randn(1, 5, requires_grad=True))
    (100 * out[:, 0].sum()).backward(retain_graph=True)
    with pytest.raises(PrivacyError, match=r"a second backward\(\) goes through one forward pass"):
        (100 * out.sum()).backward()
    assert norm(step(dp)) <= 0.7 * (1 + 1e-5)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("reentrant", [True, False])
def test_two_forward_passes_that_are_recomputed_in_one_backward_pass(strategy: str, reentrant: bool) -> None:
    """The rows b of other samples would be clipped as one."""
    dp = engine(Recomputed(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3), use_reentrant=reentrant), strategy=strategy)
    a, b = (torch.randn(4, 5, requires_grad=True) for _ in range(2))
    with pytest.raises(PrivacyError, match=r"one backward\(\) goes through several forward passes"):
        dp.backward(loss(dp, a) + loss(dp, b))
    for x in (a, b):  # apart they may wait for each other
        dp.backward(loss(dp, x))


def test_recomputed_forward_passes_may_wait_for_each_other() -> None:
    dp = engine(Recomputed(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3), use_reentrant=True))
    waiting = [loss(dp, torch.randn(4, 5, requires_grad=True)) for _ in range(2)]
    for each in waiting:
        each.backward()
    assert norm(step(dp)) > 0


@pytest.mark.parametrize("preserves", [True, False])
@pytest.mark.parametrize("reentrant", [True, False])
def test_two_passes_that_recompute_something_else(preserves: bool, reentrant: bool) -> None:
    """Norms of the first do not bound the sums of the second."""
    torch.manual_seed(0)
    parts = nn.Linear(5, 64), nn.Dropout(0.5), nn.Linear(64, 3)
    dp = engine(Recomputed(*parts, use_reentrant=reentrant, preserve_rng_state=preserves), strategy="two_pass")
    refused = 0
    for _ in range(8):
        try:
            dp.backward(loss(dp, torch.randn(1, 5, requires_grad=True)))
        except PrivacyError as error:
            assert "strategy 'two_pass': samples have larger gradients in the second backward pass" in str(error)
            refused += 1
        assert norm(step(dp)) <= 0.7 * (1 + 1e-5)
    assert (refused > 0) != preserves


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_gradients_that_are_thrown_away_through_the_model(strategy: str) -> None:
    dp, (x, _) = engine(classifier(), strategy=strategy), batch(1)
    for drop in (
        dp.model.zero_grad,
        lambda: [setattr(p, "grad", None) for p in dp.model.parameters()],
        lambda: [delattr(p, "grad") for p in dp.model.parameters()],
    ):
        dp.backward(loss(dp, x))
        drop()
        dp.backward(loss(dp, x))
        assert norm(step(dp)) <= 0.7 * (1 + 1e-5)


def test_zero_grad_of_a_copy_is_its_own() -> None:
    model = classifier()
    dp, (x, _), file = engine(model), batch(), io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loss(dp, x).backward()
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        other(x).sum().backward()
        other.zero_grad()
        assert all(p.grad is None for p in other.parameters())
    assert norm(step(dp)) > 0
    dp.detach()
    assert "zero_grad" not in vars(model)


def test_gradients_that_are_there_before_the_engine() -> None:
    model = classifier()
    model(batch()[0]).sum().backward()
    with pytest.raises(PrivacyError, match=r"parameter '0.weight' has a gradient already.*zero_grad\(\)"):
        engine(model)
    model.zero_grad()
    engine(model)


class Product(torch.autograd.Function):
    """Without a rule: its weight gradient is an ordinary one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x @ weight.T

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return None, grad.T @ ctx.saved_tensors[0]


@pytest.mark.parametrize("by_method", [True, False])
def test_a_parameter_that_is_thawed_and_used_at_once(by_method: bool) -> None:
    model = classifier()
    model[0].weight.requires_grad_(False)
    dp, (x, _) = engine(model), batch()
    if by_method:
        model.requires_grad_(True)
    else:
        model[0].weight.requires_grad = True
    with pytest.raises(PrivacyError, match=r"parameter '0.weight' gets an ordinary gradient"):
        Product.apply(x, model[0].weight).sum().backward()
    assert model[0].weight.grad is None
    assert norm(step(dp)) == 0


def test_parts_that_are_called_after_the_model() -> None:
    """They belong to the forward pass before them; after a step there is none."""
    dp, (x, _) = engine(classifier()), batch(1)
    loss(dp, x).backward()
    with pytest.raises(PrivacyError, match=r"a second backward\(\) goes through one forward pass"):
        dp.model[0](x).sum().backward()
    assert norm(step(dp)) <= 0.7 * (1 + 1e-5)
    with pytest.raises(PrivacyError, match="used while the size of the batch is not known"):
        dp.model.forward(x)


def test_a_part_of_the_loss() -> None:
    dp, (x, y) = engine(nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 5)).double()), batch()
    h = dp.model(x)
    F.cross_entropy(F.linear(h, dp.model[2].weight.T), y).backward()
    assert norm(step(dp)) > 0


def test_backward_passes_at_the_same_time() -> None:
    """Each sample is clipped once, or its backward pass fails."""
    model = nn.Sequential(*[nn.Linear(5, 5) for _ in range(20)])
    dp, failed = engine(model, loss_reduction="sum"), []

    def run(x: Tensor) -> None:
        try:
            (1e6 * model(x).sum()).backward()
        except Exception as error:  # whatever breaks first
            failed.append(error)

    threads = [threading.Thread(target=run, args=(torch.randn(1, 5),)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert norm(step(dp)) <= 0.7 * (8 - len(failed)) * (1 + 1e-5)


def test_a_gradient_from_elsewhere_is_not_stepped() -> None:
    """As torch.func.grad or a hand would leave it: nothing has clipped it."""
    dp = engine(classifier(), noise_multiplier=1.0)
    name, parameter = next(iter(dp.model.named_parameters()))
    parameter.grad = torch.ones_like(parameter)
    with pytest.raises(PrivacyError, match=f"{name!r} has a .grad that came neither"):
        dp.optimizer.step()
    dp.optimizer.zero_grad()
    with dp.public():
        parameter.grad = torch.ones_like(parameter)
    dp.optimizer.step()
    x, y = batch()
    F.cross_entropy(dp.model(x), y).backward()
    dp.optimizer.step()  # onto the released gradient of the step before, as without an engine
