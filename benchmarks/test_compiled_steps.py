"""Private steps of a compiled transformer beside uncompiled ones, and beside ordinary steps of both kinds.

pytest benchmarks/test_compiled_steps.py --benchmark-enable -s
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from interleaved import medians, show
from step_models import WORKS
from step_peers import NOISE_MULTIPLIER, RATE
from torch import Tensor

from adamix_kernels import DPEngine, Noise

NAME = "transformer 4 x 256, T=64, B=16"
STRATEGIES = ("auto", "per_layer")


def stepper(
    strategy: str | None, compiled: bool, x: Tensor, y: Tensor
) -> tuple[Callable[[], None], Callable[[], list[Tensor]]]:
    """A step, and what it leaves in `.grad`; the same weights and noise for all."""
    work = WORKS[NAME]
    torch.manual_seed(0)
    model = work.model()
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    if strategy is not None:
        settings = {"max_grad_norm": 1.0, "noise_multiplier": NOISE_MULTIPLIER, "expected_batch_size": len(x)}
        DPEngine(model, optimizer, strategy=strategy, noise=Noise(seed=1), **settings)
    run = torch.compile(model, fullgraph=True) if compiled else model

    def step() -> None:
        optimizer.zero_grad()
        work.loss(run(x), y).backward()
        optimizer.step()

    return step, lambda: [p.grad.detach().clone() for p in model.parameters() if p.grad is not None]


def test_compiled_steps(benchmark: Any, capsys: Any) -> None:
    x, y = WORKS[NAME].batch()
    steps: dict[str, Callable[[], None]] = {}
    for strategy in (None, *STRATEGIES):
        found = []
        for compiled in (False, True):
            step, grads = stepper(strategy, compiled, x, y)
            step()
            found.append(grads())
            steps[f"{strategy or 'not private'}{', compiled' * compiled}"] = step
        for plain, fused in zip(*found, strict=True):
            torch.testing.assert_close(fused, plain, rtol=1e-4, atol=1e-6)
    times = medians(steps, "cpu", 21, loop=True)
    with capsys.disabled():
        show(NAME, times, {name: times[name] for name in ("not private", "not private, compiled")})
    benchmark.group = "compiled steps cpu"
    benchmark.extra_info.update(device="cpu", seconds=times)
    benchmark.pedantic(steps["auto, compiled"], rounds=3)
