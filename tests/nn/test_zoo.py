"""Every strategy gives what ordinary autograd gives one sample at a time, clipped; and the model stays as it is."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map
from zoo import ZOO, inputs, losses, model, one_by_one

from adamix_kernels import DPEngine

STRATEGIES = ("auto", "book_keeping", "two_pass", "materialize", "per_layer")
SAMPLES = 6
#: Clipping factors are float32: of a float64 sum no more can be asked once a sample is clipped.
FACTOR = 2.0**-22

Grads = dict[str, Tensor]


@functools.cache
def expected(name: str, dtype: torch.dtype) -> list[Grads]:
    return one_by_one(model(ZOO[name], dtype), inputs(ZOO[name], SAMPLES, dtype))


def layer_of(name: str, parameter: str) -> str:
    first = next(iter(expected(name, torch.float64)[0]))
    return (first if parameter in ZOO[name].joined else parameter).rpartition(".")[0]


def norms(grads: list[Grads], keep: Callable[[str], bool] = lambda name: True) -> Tensor:
    sizes = [[g.double().norm() for name, g in one.items() if keep(name)] for one in grads]
    return torch.tensor([math.hypot(*row) for row in sizes], dtype=torch.float64)


def thresholds(name: str, dtype: torch.dtype, strategy: str) -> Any:
    """About half of the samples are clipped, in each layer where layers are clipped."""
    grads = expected(name, dtype)
    if strategy != "per_layer":
        return float(norms(grads).median()) or 1.0
    layers = {p.rpartition(".")[0] for p, _ in model(ZOO[name], dtype).named_parameters()}
    parts = {layer: norms(grads, lambda p, layer=layer: layer_of(name, p) == layer) for layer in layers}
    return {layer: float(part.median()) or 1.0 for layer, part in parts.items()}


def clipped_sum(name: str, dtype: torch.dtype, limit: Any) -> Grads:
    grads = [{n: g.double() for n, g in one.items()} for one in expected(name, dtype)]
    total = {n: torch.zeros_like(g) for n, g in grads[0].items()}
    for parameter, into in total.items():
        layer = layer_of(name, parameter)
        apart = isinstance(limit, dict)
        sizes = norms(grads, (lambda p, layer=layer: layer_of(name, p) == layer) if apart else lambda p: True).tolist()
        bound = limit[layer] if apart else limit
        for one, size in zip(grads, sizes, strict=True):
            into.add_(one[parameter] * min(1.0, bound / size if size else 1.0))
    return total


def step(module: Any, batch: Any, **options: Any) -> tuple[Grads, Tensor, Any]:
    """The un-noised sum and the norms of a step that leaves the parameters as they are, and the outputs."""
    optimizer = torch.optim.SGD(module.parameters(), lr=0.0)
    optimizer.zero_grad()  # what a step before has left
    dp = DPEngine(module, optimizer, noise_multiplier=0.0, expected_batch_size=1, loss_reduction="mean", **options)
    optimizer.zero_grad()
    outputs = module(*batch)
    loss = losses(outputs)
    dp.backward(loss.mean() if len(loss) else loss.sum())
    found = torch.stack(dp._sums.norm_sq).sum(0).double().sqrt() if dp._sums.norm_sq else torch.zeros(0)
    during = module.state_dict()
    optimizer.step()
    sums = {name: p.grad.clone() for name, p in module.named_parameters() if p.requires_grad}
    dp.detach()
    assert list(during) == list(module.state_dict())
    return sums, found, outputs


def assert_close(found: Grads, wanted: Grads, tolerance: float) -> None:
    largest = max(float(g.abs().max()) for g in wanted.values() if g.numel())
    assert found.keys() == wanted.keys()
    for name, g in found.items():
        error = float((g.double() - wanted[name]).abs().max())
        assert error <= tolerance * largest, f"{name}: off by {error / largest} of {largest}"


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", ZOO)
def test_float64_sums_and_norms_are_the_loops(name: str, strategy: str) -> None:
    dtype = torch.float64
    module, batch = model(ZOO[name], dtype), inputs(ZOO[name], SAMPLES, dtype)
    before, alone = {n: x.clone() for n, x in module.state_dict().items()}, module(*batch)
    exact = norms(expected(name, dtype))
    nothing = dict.fromkeys(thresholds(name, dtype, "per_layer"), 1e30) if strategy == "per_layer" else 1e30
    sums, found, outputs = step(module, batch, max_grad_norm=nothing, strategy=strategy)
    assert_close(sums, clipped_sum(name, dtype, nothing), 1e-9)
    assert (found >= exact * (1 - 1e-9)).all()
    assert (found <= exact * (1 + 2 * FACTOR) + 1e-12).all()  # norms are float32, rounded up
    for x, y in zip(tree_leaves(outputs), tree_leaves(alone), strict=True):
        assert torch.equal(x, y)
    limit = thresholds(name, dtype, strategy)
    sums, _, _ = step(module, batch, max_grad_norm=limit, strategy=strategy)
    assert_close(sums, clipped_sum(name, dtype, limit), FACTOR)
    assert all(torch.equal(x, y) for x, y in zip(tree_leaves(module(*batch)), tree_leaves(alone), strict=True))
    after = module.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[n], before[n]) for n in before)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", ZOO)
def test_float32_sums_and_norms_are_the_loops(name: str, strategy: str) -> None:
    dtype = torch.float32
    limit, exact = thresholds(name, dtype, strategy), norms(expected(name, dtype))
    sums, found, _ = step(
        model(ZOO[name], dtype), inputs(ZOO[name], SAMPLES, dtype), max_grad_norm=limit, strategy=strategy
    )
    assert_close(sums, clipped_sum(name, dtype, limit), 1e-4)
    assert (found >= exact * (1 - 1e-5)).all() and (found <= exact * (1 + 2e-3) + 1e-12).all()


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", ZOO)
@pytest.mark.parametrize("samples", [0, 1])
def test_batches_of_none_and_of_one(name: str, strategy: str, samples: int) -> None:
    dtype = torch.float64
    module, batch = model(ZOO[name], dtype), inputs(ZOO[name], samples, dtype)
    grads = one_by_one(module, batch)
    sums, found, _ = step(module, batch, max_grad_norm=1e30, strategy=strategy)
    wanted = grads[0] if grads else {n: torch.zeros_like(p) for n, p in module.named_parameters() if p.requires_grad}
    assert len(found) == samples or not samples
    assert_close(sums, wanted, 1e-9)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", [name for name in ZOO if name != "distances"])  # torch.cdist has no bfloat16
def test_bfloat16_sums_and_norms_are_as_near_as_the_loop(name: str, strategy: str) -> None:
    """Against the float64 loop over the same numbers.

    A sample's bfloat16 gradient is off by e_b alone, in Frobenius norm over all parameters. In a batch other kernels
    round at the same places in another order: at most as much again, and 2^-8 of it for each rounding of one sum, of
    which two are allowed for. The norm is off by no more, so the factor changes c_b g_b by no more. The sum is rounded
    once.
    """
    dtype = torch.bfloat16
    module, batch = model(ZOO[name], dtype), inputs(ZOO[name], SAMPLES, dtype)
    wide = tree_map(lambda x: x.double() if x.is_floating_point() else x, batch)
    exact = one_by_one(model(ZOO[name], dtype).double(), wide)
    sizes = norms(exact)
    off = [
        {n: one[n].double() - g for n, g in best.items()}
        for one, best in zip(expected(name, dtype), exact, strict=True)
    ]
    bound = 2 * norms(off) + 2 * 2.0**-8 * sizes
    limit = float(sizes.median()) * (100.0 if strategy == "per_layer" else 1.0)  # no layer is clipped
    sums, found, _ = step(module, batch, max_grad_norm=limit, strategy=strategy)
    coef = torch.ones_like(sizes) if strategy == "per_layer" else (limit / sizes).clamp(max=1.0)
    assert (found >= sizes - bound).all() and (found <= sizes * (1 + 2e-3) + bound).all()
    for parameter, total in sums.items():
        wanted = torch.stack([c * one[parameter] for c, one in zip(coef, exact, strict=True)]).sum(0)
        error = (total.double() - wanted).norm()
        assert error <= 2 * (coef * bound).sum() + 2.0**-8 * wanted.norm(), parameter


def test_later_unfrozen_and_frozen_parameters() -> None:
    """What is trained is read at each step; what is frozen gets nothing."""
    module = model(ZOO["cnn"], torch.float64)
    batch = inputs(ZOO["cnn"], SAMPLES, torch.float64)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.0)
    dp = DPEngine(module, optimizer, max_grad_norm=1e30, noise_multiplier=0.0, expected_batch_size=1)
    for trained in (("5.weight", "5.bias"), ("0.bias", "5.weight"), ("0.weight", "0.bias", "1.weight", "1.bias")):
        for n, p in module.named_parameters():
            p.requires_grad_(n in trained)
        optimizer.zero_grad()
        losses(module(*batch)).mean().backward()
        optimizer.step()
        wanted = clipped_sum("cnn", torch.float64, 1e30)
        assert {n for n, p in module.named_parameters() if p.grad is not None} == set(trained)
        assert_close({n: module.get_parameter(n).grad for n in trained}, {n: wanted[n] for n in trained}, 1e-9)
    dp.detach()
