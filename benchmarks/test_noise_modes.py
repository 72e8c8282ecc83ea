"""What noise from ChaCha20 costs a whole private training step, beside noise from Philox: at most 5 %.

pytest benchmarks/test_noise_modes.py --benchmark-enable -s

Only the stream of random words differs. A step of the CNN gets its noise from the op, so that nothing else that a mode
of `DPEngine` may do is timed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from interleaved import medians, show
from step_models import WORKS
from torch import nn

import adamix_kernels as kernels

MODES = {"Philox": "fast", "ChaCha20": "secure"}
GOAL = 1.05


def head_step(rows: int, inputs: int, classes: int, mode: str) -> Callable[[], Any]:
    """The whole of AdaMix's private step: gradient, clipping, noise and update in one op and one addition."""
    torch.manual_seed(0)
    x, y = torch.randn(rows, inputs), torch.randint(classes, (rows,))
    head, noise = nn.Linear(inputs, classes), kernels.Noise(mode=mode)

    def step() -> None:
        with torch.no_grad():
            out = kernels.softmax_head_clip_sum_noise(x, y, head.weight, head.bias, 1.0, 1.0, noise)
            head.weight.sub_(out.weight, alpha=1e-3 / rows)
            head.bias.sub_(out.bias, alpha=1e-3 / rows)

    return step


def cnn_step(mode: str) -> Callable[[], Any]:
    """Forward, backward and step through the engine, whose noise comes from the op."""
    work = WORKS["CNN 28x28, B=128"]
    torch.manual_seed(0)
    model, (x, y) = work.model(), work.batch()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    kernels.DPEngine(model, optimizer, max_grad_norm=1.0, noise_multiplier=0.0, expected_batch_size=len(x))
    noise = kernels.Noise(mode=mode)

    @torch.no_grad()
    def add_noise(*_: Any) -> None:
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        assert len(grads) == len(list(model.parameters()))
        kernels.add_gaussian_noise_(grads, 1.0 / len(x), noise)

    optimizer.register_step_pre_hook(add_noise)  # after the engine's, which makes the gradients

    def step() -> None:
        work.loss(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


STEPS: dict[str, tuple[Callable[[str], Callable[[], Any]], int]] = {
    "head 2000 x 1280 -> 10": (lambda mode: head_step(2000, 1280, 10, mode), 101),
    "head 50000 x 2048 -> 100": (lambda mode: head_step(50_000, 2048, 100, mode), 11),
    "CNN 28x28, B=128": (cnn_step, 201),
}


@pytest.mark.parametrize("name", STEPS)
def test_noise_modes(benchmark: Any, capsys: Any, name: str) -> None:
    make, rounds = STEPS[name]
    steps = {label: make(mode) for label, mode in MODES.items()}
    times = medians(steps, "cpu", rounds, loop=True)
    with capsys.disabled():
        show(name, times, {"Philox": times["Philox"]})
    benchmark.group = "noise modes cpu"
    benchmark.extra_info.update(device="cpu", seconds=times)
    benchmark.pedantic(steps["ChaCha20"], rounds=3)
    assert times["ChaCha20"] <= GOAL * times["Philox"]
