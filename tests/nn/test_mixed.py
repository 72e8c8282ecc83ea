"""Public and private rows in one backward pass: what a step releases, against one sample at a time in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from plain_loop import STRATEGIES, assert_same, batch, classifier, clipped, engine, per_sample, step
from torch import Tensor, nn
from zoo import ZOO, inputs, losses, model, one_by_one

from adamix_kernels import DPEngine, Noise, PublicQuantile

N, WEIGHT = 3.0, 0.5
PREFIX = slice(0, 4)
MASK = torch.tensor([0, 1, 0, 0, 1, 1, 0, 1, 0, 0]).bool()
MIDDLE = torch.tensor([0, 0, 1, 1, 1, 0, 0, 0, 0, 0]).bool()
ALL = torch.ones(10, dtype=torch.bool)
SPLITS = {"first": PREFIX, "last": slice(6, None), "mask": MASK, "middle": MIDDLE, "none": ~ALL, "all": ALL}


def public_of(rows: Any, samples: int = 10) -> list[int]:
    return list(range(samples))[rows] if isinstance(rows, slice) else rows.nonzero().flatten().tolist()


def norm(row: dict[str, Tensor], layers: dict[str, str], layer: str | None = None) -> float:
    parts = [g.double().norm() for name, g in row.items() if layer is None or layers[name] == layer]
    return float(torch.stack(parts).norm()) if parts else 0.0


def quantile(values: list[float], q: float) -> float:
    return sorted(values)[max(1, math.ceil(len(values) * q)) - 1]


def taus(rows: list[dict[str, Tensor]], public: list[int], dp: DPEngine, q: float) -> dict[str, float] | float:
    """By the definition: of the public rows' norms."""
    if dp.strategy != "per_layer":
        return quantile([norm(rows[b], dp.layers) for b in public], q)
    return {at: quantile([norm(rows[b], dp.layers, at) for b in public], q) for at in set(dp.layers.values())}


def mixed(
    rows: list[dict[str, Tensor]], public: list[int], limit: dict[str, float] | float, weight: float = WEIGHT
) -> dict[str, Tensor]:
    """(clipped private sum + weight * public sum) / (N + weight * public rows)."""
    private = [row for b, row in enumerate(rows) if b not in public]
    by_layer = limit if isinstance(limit, dict) else None
    sums = clipped(private, 0.0 if by_layer else limit, by_layer)  # type: ignore[arg-type]
    whole = N + weight * len(public)
    zeros = {name: torch.zeros_like(g).double() for name, g in rows[0].items()}
    exact = {name: sum((rows[b][name].double() for b in public), z) for name, z in zeros.items()}
    return {name: (sums.get(name, 0) + weight * exact[name]) / whole for name in zeros}


def rows_of(module: nn.Module, data: tuple[Tensor, Tensor]) -> list[dict[str, Tensor]]:
    x, y = data
    return per_sample(module, lambda m, b: F.cross_entropy(m(x[b : b + 1]), y[b : b + 1]), len(x))


def run(dp: DPEngine, data: tuple[Tensor, Tensor], rows: Any, weight: float = WEIGHT) -> None:
    with dp.mixed(rows, weight=weight):
        dp.backward(F.cross_entropy(dp.model(data[0]), data[1], reduction=dp.loss_reduction))


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_step_is_the_clipped_private_and_the_exact_public_sum(strategy: str, split: str) -> None:
    module, data = classifier(), batch()
    rows, public = rows_of(module, data), public_of(SPLITS[split])
    dp = engine(module, strategy=strategy, expected_batch_size=N)
    run(dp, data, SPLITS[split])
    layers = set(dp.layers.values())
    limit = dict.fromkeys(layers, 0.7 / len(layers) ** 0.5) if strategy == "per_layer" else 0.7
    assert_same(step(dp), mixed(rows, public, limit))


@pytest.mark.parametrize("q", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("rows", [PREFIX, MASK, ALL], ids=["first", "mask", "all"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_public_norms_set_the_threshold(strategy: str, rows: Any, q: float) -> None:
    module, data = classifier(), batch()
    truth, public = rows_of(module, data), public_of(rows)
    dp = engine(module, strategy=strategy, max_grad_norm=PublicQuantile(q), expected_batch_size=N)
    limit = taus(truth, public, dp, q)
    run(dp, data, rows)
    assert_same(step(dp), mixed(truth, public, limit))
    found = dp.thresholds
    pairs = [(found[at], limit[at]) for at in limit] if isinstance(limit, dict) else [(found, limit)]
    assert all(isinstance(tau, Tensor) and math.isclose(float(tau), want, rel_tol=1e-6) for tau, want in pairs)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_micro_batches_have_the_thresholds_of_the_first(strategy: str) -> None:
    module, data = classifier(), batch()
    truth = rows_of(module, data)
    dp = engine(module, strategy=strategy, max_grad_norm=PublicQuantile(0.5), expected_batch_size=N)
    limit = taus(truth[:5], [0, 1, 2], dp, 0.5)
    run(dp, (data[0][:5], data[1][:5]), slice(0, 3))
    run(dp, (data[0][5:7], data[1][5:7]), slice(0, 0))
    run(dp, (data[0][7:], data[1][7:]), torch.tensor([False, False, True]))
    assert_same(step(dp), mixed(truth, [0, 1, 2, 9], limit))


def test_weights_of_micro_batches_are_their_own() -> None:
    module, data = classifier(), batch()
    truth = rows_of(module, data)
    dp = engine(module, expected_batch_size=N, loss_reduction="sum")
    run(dp, (data[0][:5], data[1][:5]), slice(0, 2), weight=2.0)
    run(dp, (data[0][5:], data[1][5:]), slice(0, 1), weight=0.25)
    got = step(dp)
    private = clipped([row for b, row in enumerate(truth) if b not in (0, 1, 5)], 0.7)
    for name, total in private.items():
        exact = 2 * (truth[0][name] + truth[1][name]) + 0.25 * truth[5][name]
        torch.testing.assert_close(got[name], (total + exact) / (N + 4.25), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("settings", [{"clipping": "automatic"}, {"loss_reduction": "sum"}], ids=str)
def test_other_clipping_and_sums(strategy: str, settings: dict[str, str]) -> None:
    """Against the same private rows alone, at the threshold that the public ones set, and the public ones alone."""
    data = batch()
    dp = engine(classifier(), strategy=strategy, max_grad_norm=PublicQuantile(0.5), expected_batch_size=N, **settings)
    run(dp, data, PREFIX)
    got, found = step(dp), dp.thresholds
    limit = {name: float(tau) for name, tau in found.items()} if isinstance(found, dict) else float(found)
    alone = engine(classifier(), strategy=strategy, max_grad_norm=limit, expected_batch_size=N, **settings)
    alone.backward(F.cross_entropy(alone.model(data[0][4:]), data[1][4:], reduction=alone.loss_reduction))
    want = step(alone)
    public = rows_of(classifier(), data)[:4]
    for name, g in got.items():
        total = want[name] * N + WEIGHT * sum(row[name] for row in public)
        torch.testing.assert_close(g, total / (N + 4 * WEIGHT), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("rows", [slice(0, 2), torch.tensor([0, 1, 0, 1, 0, 0]).bool()], ids=["first", "mask"])
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", [name for name in ZOO if name != "control flow"])
def test_every_rule_splits_its_rows(name: str, strategy: str, rows: Any) -> None:
    """All kinds of layers: two of six rows are public and set the threshold of the whole, or of each layer."""
    entry = ZOO[name]
    module, data = model(entry, torch.float64), inputs(entry, 6, torch.float64)
    truth, public = one_by_one(module, data), public_of(rows, 6)
    dp = engine(
        module,
        strategy=strategy,
        max_grad_norm=PublicQuantile(0.5),
        expected_batch_size=N,
        loss_reduction="sum",
        joint_forwards=True,
    )
    first = next(iter(truth[0]))
    layers = {key: (first if key in entry.joined else key).rpartition(".")[0] for key in truth[0]}
    with dp.mixed(rows, weight=WEIGHT):
        dp.backward(losses(module(*data)).sum())
    got = step(dp)
    sums: dict[str, Tensor] = {}
    for at in set(layers.values()) if strategy == "per_layer" else [None]:
        sizes = [norm(row, layers, at) for row in truth]
        tau = quantile([sizes[b] for b in public], 0.5)
        factors = [WEIGHT if b in public else min(1.0, tau / size) if size else 0.0 for b, size in enumerate(sizes)]
        for key in [key for key in truth[0] if at in (None, layers[key])]:
            sums[key] = sum(c * row[key] for c, row in zip(factors, truth, strict=True)) / (N + 2 * WEIGHT)
    assert_same(got, sums, rtol=1e-5)


@pytest.mark.parametrize("strategy", [s for s in STRATEGIES if s != "two_pass"])
def test_secure_sums_are_the_same_up_to_the_grid(strategy: str) -> None:
    data, truth = batch(), rows_of(classifier(), batch())
    dp = engine(
        classifier(),
        strategy=strategy,
        max_grad_norm=PublicQuantile(0.5),
        expected_batch_size=N,
        noise=Noise(mode="secure"),
        loss_reduction="sum",
    )
    limit = taus(truth, public_of(MASK), dp, 0.5)
    run(dp, data, MASK)
    assert_same(step(dp), mixed(truth, public_of(MASK), limit), rtol=1e-5)


@pytest.mark.parametrize("mode", ["fast", "secure"])
@pytest.mark.parametrize("strategy", [s for s in STRATEGIES if s != "two_pass"])
def test_public_rows_have_no_user(strategy: str, mode: str) -> None:
    """The ids are those of the private rows; the gradients of a user are added before they are clipped."""
    data, truth, ids = batch(), rows_of(classifier(), batch()), [5, 8, 5, 5, 8, 1]
    dp = engine(
        classifier(),
        strategy=strategy,
        max_grad_norm=PublicQuantile(0.9),
        expected_batch_size=N,
        unit="user",
        noise=Noise(mode=mode),
        loss_reduction="sum",
    )
    with dp.users(ids):
        run(dp, data, PREFIX)
    users = [
        {name: sum(row[name] for row, i in zip(truth[4:], ids, strict=True) if i == user) for name in truth[0]}
        for user in set(ids)
    ]
    want = mixed([*truth[:4], *users], [0, 1, 2, 3], taus(truth, [0, 1, 2, 3], dp, 0.9))
    assert_same(step(dp), want, rtol=1e-5)
    assert dp.metrics().samples.reveal() == 3


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_scale_of_the_loss_is_undone(strategy: str) -> None:
    data, results = batch(), []
    for scale in (1.0, 1024.0):
        dp = engine(
            classifier(),
            strategy=strategy,
            max_grad_norm=PublicQuantile(0.5),
            expected_batch_size=N,
            loss_scale=scale,
        )
        with dp.mixed(MASK, weight=WEIGHT):
            dp.backward(F.cross_entropy(dp.model(data[0]), data[1]) * scale)
        results.append(step(dp))
    assert_same(*results, rtol=1e-9)
    assert_same(results[1], mixed(rows_of(classifier(), data), public_of(MASK), taus_of(dp)))


def taus_of(dp: DPEngine) -> Any:
    found = dp.thresholds
    return {name: float(tau) for name, tau in found.items()} if isinstance(found, dict) else float(found)
