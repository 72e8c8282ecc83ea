"""What `adamix plan` estimates beside what steps take here: rates are measured, then each step is planned and run.

pytest benchmarks/test_plan.py --benchmark-enable -s

A step's time is the median of interleaved rounds. Its memory is what torch's allocator has given out at its peak.
All planned times share one measurement of rates: if the machine's load changes between that and the steps, all are off
by the same factor, and rows that agree together are no independent evidence. Run it on a quiet machine, more than once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from interleaved import medians
from step_models import WORKS

from adamix.plan import Job, Rates, Setting, Work
from adamix.plan.allocated import peak_allocated
from adamix.plan.measure import measure
from adamix.plan.steps import attach

STRATEGIES: dict[str, dict[str, Any]] = {
    "not private": {"strategy": None},
    "flat": {},
    "per_layer": {"strategy": "per_layer"},
    "two_pass": {"strategy": "two_pass"},
}
#: A quarter of the rows is public, in the same pass.
OPTIONS: dict[str, dict[str, Any]] = {
    "not private": {"strategy": None},
    "public rows": {"public_rows": 4},
    "public rows, per_layer": {"strategy": "per_layer", "public_rows": 4},
    "secure": {"noise_mode": "secure"},
    "not private, autocast": {"strategy": None, "precision": "autocast"},
    "autocast": {"precision": "autocast"},
}


@pytest.fixture(scope="module")
def rates() -> Rates:
    return measure(torch.device("cpu"))


def step_of(work: Work, setting: Setting, rows: int) -> tuple[Callable[[], None], int]:
    """And the bytes that stay from one step to the next."""
    torch.manual_seed(0)
    model, (x, y) = work.build(), work.batch(rows)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    engine = attach(model, optimizer, setting, rows)

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=setting.precision == "autocast"):
            loss = work.loss(model, x, y)
        if engine is None:
            loss.backward()
        elif setting.public_rows:
            with engine.mixed(slice(0, setting.public_rows)):
                engine.backward(loss)
        else:
            engine.backward(loss)
        optimizer.step()

    return step, sum(t.untyped_storage().nbytes() for t in [*(p.detach() for p in model.parameters()), x, y])


def compare(benchmark: Any, capsys: Any, name: str, rates: Rates, chosen: dict[str, dict[str, Any]]) -> None:
    made = WORKS[name]
    rows = len(made.batch()[0])
    work = Work(name, made.model, lambda _: made.batch(), lambda model, x, y: made.loss(model(x), y))
    settings = {label: Setting(optimizer="sgd", device="cpu", **given) for label, given in chosen.items()}
    found = {label: step_of(work, setting, rows) for label, setting in settings.items()}
    times = medians({label: step for label, (step, _) in found.items()}, "cpu", made.rounds, loop=True)
    lines, planned, held, worst = [], {}, {}, 1.0
    for label, setting in settings.items():
        private = rows - setting.public_rows
        estimate = Job(work, setting, private).estimate(private, rates)
        step, stays = found[label]
        memory, seconds = stays + peak_allocated(step), times[label]
        planned[label], held[label] = estimate.time.total, [estimate.memory.total, memory]
        errors = estimate.time.total / seconds, estimate.memory.total / memory
        worst = max(worst, errors[0], 1 / errors[0])
        lines.append(
            f"  {label:26s}{estimate.time.total * 1e3:9.2f} ms planned{seconds * 1e3:9.2f} ms measured{errors[0]:6.2f}"
            f"{estimate.memory.total / 2**20:9.1f} MiB planned{memory / 2**20:9.1f} MiB measured{errors[1]:6.2f}"
        )
    with capsys.disabled():
        print("\n".join([f"\nplan, {name}", *lines]))
    benchmark.group = "plan cpu"
    benchmark.extra_info.update({"device": "cpu", "seconds": times, "planned": planned, "bytes planned, held": held})
    benchmark.pedantic(lambda: None, rounds=1)
    assert worst < 2, "adamix plan is off by more than a factor of 2 in time"


@pytest.mark.parametrize("name", WORKS)
def test_plan(benchmark: Any, capsys: Any, name: str, rates: Rates) -> None:
    compare(benchmark, capsys, name, rates, STRATEGIES)


def test_plan_of_options(benchmark: Any, capsys: Any, rates: Rates) -> None:
    compare(benchmark, capsys, "transformer 4 x 256, T=64, B=16", rates, OPTIONS)
