"""What `adamix plan` estimates beside what steps take here: rates are measured, then each step is planned and run.

pytest benchmarks/test_plan.py --benchmark-enable -s

A step's time is the median of interleaved rounds. Its memory is what torch's allocator has given out at its peak.
All planned times share one measurement of rates: if the machine's load changes between that and the steps, all are off
by the same factor, and rows that agree together are no independent evidence. Run it on a quiet machine, more than once.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from interleaved import medians
from step_models import WORKS
from step_peers import contenders

from adamix.plan import Job, Rates, Setting, Work
from adamix.plan.allocated import peak_allocated
from adamix.plan.measure import measure

STRATEGIES = {
    "not private": None,
    "adamix_kernels, flat": "auto",
    "adamix_kernels, per_layer": "per_layer",
    "adamix_kernels, two_pass": "two_pass",
}


@pytest.fixture(scope="module")
def rates() -> Rates:
    return measure(torch.device("cpu"))


def allocated(step: Any, model: torch.nn.Module, rows: Any) -> int:
    """Bytes at the peak of a step; its gradients, which the loop keeps until the next, are made anew."""
    model.zero_grad()
    peak = peak_allocated(step)
    stays = sum(t.untyped_storage().nbytes() for t in [*(p.detach() for p in model.parameters()), *rows])
    return stays + peak


@pytest.mark.parametrize("name", WORKS)
def test_plan(benchmark: Any, capsys: Any, name: str, rates: Rates) -> None:
    torch.manual_seed(0)
    work = WORKS[name]
    x, y = work.batch()
    found = {label: made for label, made in contenders(work, x, y, 1.0, False) if label in STRATEGIES}
    times = medians({label: step for label, (_, step) in found.items()}, "cpu", work.rounds, loop=True)
    planned = Work(name, work.model, lambda _: work.batch(), lambda model, x, y: work.loss(model(x), y))
    lines, planned_seconds, memories, worst = [], {}, {}, 1.0
    for label, strategy in STRATEGIES.items():
        setting = Setting(strategy, optimizer="sgd", device="cpu")
        estimate = Job(planned, setting, len(x)).estimate(len(x), rates)
        model, step = found[label]
        memory, seconds = allocated(step, model, (x, y)), times[label]
        planned_seconds[label], memories[label] = estimate.time.total, (estimate.memory.total, memory)
        errors = estimate.time.total / seconds, estimate.memory.total / memory
        worst = max(worst, errors[0], 1 / errors[0])
        lines.append(
            f"  {label:26s}{estimate.time.total * 1e3:9.2f} ms planned{seconds * 1e3:9.2f} ms measured{errors[0]:6.2f}"
            f"{estimate.memory.total / 2**20:9.1f} MiB planned{memory / 2**20:9.1f} MiB measured{errors[1]:6.2f}"
        )
    with capsys.disabled():
        print("\n".join([f"\nplan, {name}", *lines]))
    assert worst < 2, "adamix plan is off by more than a factor of 2 in time"
    benchmark.group = "plan cpu"
    benchmark.extra_info.update(device="cpu", seconds=times, planned_seconds=planned_seconds)
    benchmark.extra_info.update({"planned and measured bytes": memories})
    benchmark.pedantic(lambda: None, rounds=1)
