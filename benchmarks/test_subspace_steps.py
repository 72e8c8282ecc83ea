"""A private step in a subspace of public gradients, beside the one that makes all gradients and the basis.

pytest benchmarks/test_subspace_steps.py --benchmark-enable -s             on the CPU
pytest benchmarks/test_subspace_steps.py --benchmark-enable -s -m gpu      on a GPU
"""

from __future__ import annotations

import gc
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from interleaved import medians, show
from step_memory import resident
from step_models import WORKS, Work, language_model
from torch import Tensor, nn

import adamix_kernels as kernels

PUBLIC_ROWS, RANK = 32, 16
HERE = Path(__file__).parent
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
SHAPE = "transformer 4 x 256, T=64, B=16"
LONG = "transformer 4 x 256, T=256, B=4"
SHAPES = {SHAPE: WORKS[SHAPE], LONG: language_model(1000, 256, 4, 4, 256, 4)}
GPU_SHAPES = {"transformer 12 x 768, T=512, B=16": language_model(50257, 768, 12, 12, 512, 16)}
MADE = "all gradients made (torch.func)"
Step = Callable[[], object]
Rows = tuple[Tensor, Tensor]


def not_private(work: Work, model: nn.Module, private: Rows, public: Rows) -> Step:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)

    def step() -> None:
        for x, y in (private, public):
            work.loss(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def subspace_step(every: int, strategy: str = "auto") -> Callable[[Work, nn.Module, Rows, Rows], Step]:
    def make(work: Work, model: nn.Module, private: Rows, public: Rows) -> Step:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        settings = {"max_grad_norm": 1.0, "noise_multiplier": 1.0, "expected_batch_size": len(private[0])}
        dp = kernels.DPEngine(model, optimizer, strategy=strategy, **settings)
        subspace = dp.public_subspace(rank=RANK, every=every)

        def step() -> object:
            subspace.refresh(lambda: work.loss(model(public[0]), public[1]))
            work.loss(model(private[0]), private[1]).backward()
            optimizer.step()
            optimizer.zero_grad()
            return subspace

        return step

    return make


def made(work: Work, model: nn.Module, private: Rows, public: Rows) -> Step:
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    noise = kernels.Noise()

    def loss(values: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return work.loss(torch.func.functional_call(model, values, (x[None],)), y[None])

    def gradients(x: Tensor, y: Tensor) -> Tensor:
        rows = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(parameters, x, y)
        return torch.cat([g.flatten(1) for g in rows.values()], 1)

    def step() -> Tensor:
        basis = kernels.subspace_basis(gradients(*public), RANK)
        coordinates = kernels.project(gradients(*private), basis)
        return kernels.lift(kernels.clip_sum_noise(coordinates, 1.0, 1.0, noise).sum, basis)

    return step


CONTENDERS = {
    "not private, public rows too": not_private,
    "subspace, computed each step": subspace_step(1),
    "subspace, every 10 steps": subspace_step(10),
    "subspace by layer, each step": subspace_step(1, "per_layer"),
    MADE: made,
}


def rows_of(work: Work, device: str) -> tuple[Rows, Rows]:
    private = tuple(x.to(device) for x in work.batch())
    more = [tuple(x.to(device) for x in work.batch()) for _ in range(math.ceil(PUBLIC_ROWS / len(private[0])))]
    return private, tuple(torch.cat(parts)[:PUBLIC_ROWS] for parts in zip(*more, strict=True))


def contenders(work: Work, device: str) -> dict[str, Step]:
    private, public = rows_of(work, device)
    torch.manual_seed(0)
    start = work.model().to(device)
    found = {}
    for name, make in CONTENDERS.items():
        model = work.model().to(device)
        model.load_state_dict(start.state_dict())
        found[name] = make(work, model, private, public)
    return found


def peak(shape: str, name: str) -> float:
    """MiB of a step, in a process of its own."""
    command = [sys.executable, str(Path(__file__)), shape, name]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | GIVE_BACK, cwd=HERE)
    return float(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("shape", SHAPES)
def test_subspace_step(benchmark: Any, shape: str) -> None:
    steps = contenders(SHAPES[shape], "cpu")
    times = medians(steps, "cpu", 5)
    show(
        f"{shape}, {PUBLIC_ROWS} public rows, rank {RANK}",
        times,
        {"not private": times["not private, public rows too"]},
    )
    memory = {name: peak(shape, name) for name in CONTENDERS}
    for name, size in memory.items():
        print(f"  {name:34s}{size:9.1f} MiB")
    print(f"  {steps['subspace, computed each step']()!r}")
    benchmark.group = "subspace step cpu"
    benchmark.extra_info.update(device="cpu", seconds=times, mebibytes=memory)
    benchmark.pedantic(steps["subspace, computed each step"], rounds=3)
    assert memory["subspace, computed each step"] < memory[MADE] / 2


@pytest.mark.gpu
@pytest.mark.parametrize("shape", GPU_SHAPES)
def test_subspace_step_on_a_gpu(benchmark: Any, shape: str) -> None:
    steps = contenders(GPU_SHAPES[shape], "cuda")
    steps.pop(MADE)  # 32 rows of 163 million numbers, in float64
    times = medians(steps, "cuda", 5)
    show(
        f"{shape}, {PUBLIC_ROWS} public rows, rank {RANK}",
        times,
        {"not private": times["not private, public rows too"]},
    )
    print(f"  {steps['subspace, computed each step']()!r}")
    benchmark.group = "subspace step cuda"
    benchmark.extra_info.update(device="cuda", seconds=times)
    benchmark.pedantic(steps["subspace, computed each step"], rounds=3)


def main(shape: str, name: str) -> None:
    torch.manual_seed(0)
    work = SHAPES[shape]
    private, public = rows_of(work, "cpu")
    step = CONTENDERS[name](work, work.model(), private, public)
    gc.collect()
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    for _ in range(2):
        step()
    print(resident("VmHWM") - before)


if __name__ == "__main__":
    main(*sys.argv[1:])
