"""A private training step of whole models beside the ordinary one and the peers', and the memory it takes.

pytest benchmarks/test_training_steps.py --benchmark-enable -s             on the CPU
pytest benchmarks/test_training_steps.py --benchmark-enable -s -m gpu      on a GPU
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from interleaved import medians, show
from step_models import GPU_WORKS, WORKS, Work
from step_peers import MAX_GRAD_NORM, contenders
from torch import Tensor, nn

HERE = Path(__file__).parent
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def exact(work: Work, model: nn.Module, x: Tensor, y: Tensor) -> list[Tensor]:
    """The definition, in float64: the mean of clipped gradients, one sample at a time."""
    model = model.double()
    parameters = list(model.parameters())
    total = [torch.zeros_like(p) for p in parameters]
    for i in range(len(x)):
        one = x[i : i + 1].double() if x.is_floating_point() else x[i : i + 1]
        grads = torch.autograd.grad(work.loss(model(one), y[i : i + 1]), parameters)
        norm = torch.stack([g.norm() for g in grads]).norm()
        factor = min(1.0, MAX_GRAD_NORM / float(norm)) / len(x)
        total = [t + factor * g for t, g in zip(total, grads, strict=True)]
    return total


def gradients(contender: Any, start: dict[str, Tensor]) -> list[Tensor]:
    """What one step of a contender without noise applies."""
    model, step = contender
    model.load_state_dict(start)
    step()
    return [p.grad for p in model.parameters()]


def check(work: Work, x: Tensor, y: Tensor, materialise: bool) -> None:
    """Every contender's step without noise, against the definition."""
    model = work.model()
    start = {name: p.clone() for name, p in model.state_dict().items()}
    truth = exact(work, model, x, y)
    scale = max(float(g.abs().max()) for g in truth)
    for name, contender in contenders(work, x, y, 0.0, materialise):
        if name in ("not private", "adamix_kernels, per_layer"):  # they compute something else
            continue
        found = gradients(contender, start)
        error = max(float((f - t).abs().max()) for f, t in zip(found, truth, strict=True)) / scale
        assert error < 2e-4, f"{name} is off by {error:.3g} of the largest element"


@pytest.mark.parametrize("name", WORKS)
def test_training_step(benchmark: Any, capsys: Any, name: str) -> None:
    torch.manual_seed(2)  # with others a ReLU of the MLP is so near 0 that float32 has it on the other side
    work = WORKS[name]
    x, y = work.batch()
    check(work, x, y, True)
    steps = {label: step for label, (_, step) in contenders(work, x, y, 1.0, True)}
    times = medians(steps, "cpu", work.rounds, loop=True)
    with capsys.disabled():
        show(f"training step, {name}", times, {"not private": times["not private"]})
    benchmark.group = "training step cpu"
    benchmark.extra_info.update(device="cpu", seconds=times)
    benchmark.pedantic(steps["adamix_kernels, flat"], rounds=3)


@pytest.mark.parametrize("name", WORKS)
def test_peak_memory(benchmark: Any, capsys: Any, name: str) -> None:
    """Resident memory beyond what the code takes, at its peak in three steps, each contender in its own process.

    The allocator is told to give back what is freed at once, so that this is memory in use, not what it hoards.
    """
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("peak memory is read from /proc, which this system has not")
    labels = [label for label, _ in contenders(WORKS[name], *WORKS[name].batch(), 1.0, True)]
    peaks = {}
    for label in labels:
        command = [sys.executable, str(HERE / "step_memory.py"), name, label]
        done = subprocess.run(command, check=True, capture_output=True, text=True, env={**os.environ, **GIVE_BACK})
        peaks[label] = float(done.stdout) * 2**20
    with capsys.disabled():
        print(f"\npeak memory, {name}")
        for label, peak in peaks.items():
            print(f"  {label:26s}{peak / 2**20:9.1f} MiB{peak / peaks['not private']:8.2f} x not private")
    benchmark.group = "training step memory cpu"
    benchmark.extra_info.update(device="cpu", bytes=peaks)
    benchmark.pedantic(lambda: None, rounds=1)


@pytest.mark.gpu
@pytest.mark.parametrize("name", GPU_WORKS)
def test_training_step_gpu(benchmark: Any, capsys: Any, name: str) -> None:
    torch.manual_seed(0)
    work = GPU_WORKS[name]
    x, y = (part.cuda() for part in work.batch())
    found, peaks = {}, {}
    for label, (_, step) in contenders(work, x, y, 1.0, False):

        def run(step: Any = step) -> None:
            with torch.autocast("cuda", torch.bfloat16):
                step()

        torch.cuda.reset_peak_memory_stats()
        found[label] = medians({label: run}, "cuda", 5)[label]
        peaks[label] = torch.cuda.max_memory_allocated()
    with capsys.disabled():
        show(f"training step, {name}, autocast bf16", found, {"not private": found["not private"]})
        for label, peak in peaks.items():
            print(f"  {label:26s}{peak / 2**30:9.2f} GiB")
    benchmark.group = "training step gpu"
    benchmark.extra_info.update(device="cuda", seconds=found, bytes=peaks)
    benchmark.pedantic(lambda: None, rounds=1)
