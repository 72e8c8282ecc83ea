"""A step of AdaMix on a whole model, public rows included, beside an ordinary step on the same rows, and how both grow.

pytest benchmarks/test_mixed_training.py --benchmark-enable -s
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from interleaved import medians, show
from step_models import Work, language_model
from step_peers import NOISE_MULTIPLIER, RATE, plain
from torch import Tensor, nn

from adamix_kernels import DPEngine, PublicQuantile

QUANTILE = 0.9
#: A quarter of the rows is public, at the head of the batch.
SHARE = 4
#: Times of an ordinary step that a mixed one may take.
GOALS = {"auto": 1.6, "per_layer": 1.3}
#: By how much that ratio may rise from the smallest size to one eight times as large.
GROWTH = 1.1
SIZES = {
    "B": [(samples, 64) for samples in (4, 8, 16, 32)],
    "T": [(8, positions) for positions in (32, 64, 128, 256)],
}


def transformer(samples: int, positions: int) -> Work:
    return language_model(1000, 256, 4, 4, positions, samples)


def mixed(
    work: Work, x: Tensor, y: Tensor, strategy: str, noise: float = NOISE_MULTIPLIER, every: int = 1
) -> tuple[nn.Module, Callable[[], None]]:
    model, public = work.model(), slice(0, len(x) // SHARE)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    dp = DPEngine(
        model,
        optimizer,
        max_grad_norm=PublicQuantile(QUANTILE, every=every),
        noise_multiplier=noise,
        expected_batch_size=len(x) - public.stop,
        strategy=strategy,
    )

    def step() -> None:
        optimizer.zero_grad()
        with dp.mixed(public):
            work.loss(model(x), y).backward()
        optimizer.step()

    return model, step


def exact(work: Work, model: nn.Module, x: Tensor, y: Tensor, strategy: str) -> dict[str, Tensor]:
    """The definition, in float64, one sample at a time; both weights are those of a row."""
    model = model.double()
    names = [name for name, _ in model.named_parameters()]
    grads = [
        torch.autograd.grad(work.loss(model(a[None]), b[None]), list(model.parameters()))
        for a, b in zip(x, y, strict=True)
    ]
    layers = {name: name.rpartition(".")[0] if strategy == "per_layer" else "" for name in names}
    public = len(x) // SHARE
    total = {name: torch.zeros_like(g) for name, g in zip(names, grads[0], strict=True)}
    for layer in set(layers.values()):
        own = [i for i, name in enumerate(names) if layers[name] == layer]
        norms = [math.hypot(*(float(row[i].norm()) for i in own)) for row in grads]
        tau = sorted(norms[:public])[math.ceil(public * QUANTILE) - 1]
        for b, (row, norm) in enumerate(zip(grads, norms, strict=True)):
            factor = 1.0 if b < public else min(1.0, tau / norm)
            for i in own:
                total[names[i]] += factor / len(x) * row[i]
    return total


def check(work: Work, x: Tensor, y: Tensor, strategy: str) -> None:
    """A step without noise against the definition."""
    model, step = mixed(work, x, y, strategy, noise=0.0)
    start = {name: p.clone() for name, p in model.state_dict().items()}
    step()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    again = work.model()
    again.load_state_dict(start)
    truth = exact(work, again, x, y, strategy)
    for name, g in truth.items():
        error = float((found[name] - g).norm()) / float(g.norm())
        assert error < 3e-4, f"{strategy}, {name}: off by {error:.3g} of its norm"


def contenders(samples: int, positions: int) -> dict[str, Callable[[], None]]:
    work = transformer(samples, positions)
    x, y = work.batch()
    return {
        "not private": plain(work, x, y)[1],
        **{strategy: mixed(work, x, y, strategy)[1] for strategy in GOALS},
        "per_layer, every 10 steps": mixed(work, x, y, "per_layer", every=10)[1],
    }


@pytest.mark.parametrize("strategy", GOALS)
def test_mixed_steps_are_the_definition(strategy: str) -> None:
    torch.manual_seed(2)
    work = transformer(16, 64)
    check(work, *work.batch(), strategy)


def test_mixed_step(benchmark: Any, capsys: Any) -> None:
    """Checked first; one step of the 4-layer transformer, d=256, T=64, B=16."""
    torch.manual_seed(2)
    for strategy in GOALS:
        test_mixed_steps_are_the_definition(strategy)
    steps = contenders(16, 64)
    times = medians(steps, "cpu", 21, loop=True)
    with capsys.disabled():
        show("mixed step, transformer 4 x 256, T=64, B=16", times, {"not private": times["not private"]})
    benchmark.group = "mixed step cpu"
    benchmark.extra_info.update(device="cpu", seconds=times)
    benchmark.pedantic(steps["auto"], rounds=3)
    assert all(times[strategy] <= goal * times["not private"] for strategy, goal in GOALS.items())


@pytest.mark.parametrize("axis", SIZES)
def test_growth(benchmark: Any, capsys: Any, axis: str) -> None:
    """A mixed step grows as an ordinary one does: their ratio rises by at most a tenth over an eightfold range."""
    torch.manual_seed(2)
    ratios: dict[str, list[float]] = {strategy: [] for strategy in GOALS}
    seconds = {}
    for size in SIZES[axis]:
        times = seconds[str(size)] = medians(contenders(*size), "cpu", 9, loop=True)
        with capsys.disabled():
            show(f"mixed step, B={size[0]}, T={size[1]}", times, {"not private": times["not private"]})
        for strategy, of_sizes in ratios.items():
            of_sizes.append(times[strategy] / times["not private"])
    benchmark.group = "growth of a mixed step cpu"
    benchmark.extra_info.update(device="cpu", seconds=seconds)
    benchmark.pedantic(lambda: None, rounds=1)
    for strategy, (first, *_, last) in ratios.items():
        assert last <= GROWTH * first, f"{strategy}: {first:.2f} x an ordinary step, then {last:.2f} x"
