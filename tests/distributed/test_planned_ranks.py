"""What a plan says that ranks send and hold, against the collectives and tensors of real ranks."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

import planned_checks as checks
import pytest
import spawned
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from adamix.plan import Job, Setting, Work, preset

#: A machine on which a process takes nothing before its first tensor.
NOTHING = dataclasses.replace(preset("h200"), reserved=0)
#: kind, strategy, mode of the noise, whether rows are public, passes of a step.
Cell = tuple[str, str | None, str, bool, int]
CELLS: list[Cell] = [
    *((kind, None, "fast", False, micro) for kind in ("ddp", "fsdp") for micro in (1, 2)),
    *((kind, strategy, "fast", False, 1) for kind in ("plain", "ddp", "fsdp") for strategy in ("auto", "per_layer")),
    *((kind, "two_pass", "fast", public, 2) for kind in ("ddp", "fsdp") for public in (False, True)),
    *((kind, strategy, "fast", True, 1) for kind in ("ddp", "fsdp") for strategy in ("auto", "per_layer")),
    *((kind, "auto", "secure", False, 2) for kind in ("ddp", "fsdp")),
]
HYBRID: list[Cell] = [
    *(("hsdp", strategy, "fast", False, 1) for strategy in (None, "auto", "per_layer")),
    ("hsdp", "auto", "fast", True, 2),
]
HELD: list[Cell] = [
    *((kind, strategy, "fast", False, 1) for kind in ("ddp", "fsdp", "hsdp") for strategy in ("auto", "per_layer")),
    *((kind, None, "fast", False, 1) for kind in ("fsdp", "hsdp")),
]
#: Of no process group of torch's that stands in for several does DistributedDataParallel take gradients.
REPLICATED: Cell = ("ddp", None, "fast", False, 1)
_COLLECTIVES = {"all-gather": "_allgather_base_", "reduce-scatter": "_reduce_scatter_base_", "all-reduce": "allreduce_"}


def job_of(cell: Cell, size: int) -> tuple[Job, int]:
    """And the rows of its passes."""
    kind, strategy, mode, public, micro = cell
    work = Work("ranks", checks.wide, checks.rows_of, checks.loss_of)
    setting = Setting(strategy, device="cpu", noise_mode=mode, public_rows=checks.PUBLIC // size if public else 0)
    sharding = {"plain": "ddp"}.get(kind, kind)
    return Job(work, setting, checks.ROWS, size, sharding, 2 if kind == "hsdp" else None), checks.ROWS // size // micro


def cells_of(size: int) -> list[Cell]:
    return [*CELLS, *HYBRID] if size == 4 else [cell for cell in CELLS if cell[0] != "plain" and cell[4] == 1]


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Any]]]:
    """Results by size, rank and check."""
    folder = tmp_path_factory.mktemp("planned")
    return {
        size: spawned.run(
            size,
            folder,
            [(f"sent {cell}", checks.sent, cell) for cell in cells_of(size)] + [("held", checks.held, REPLICATED)],
        )
        for size in (2, 4)
    }


def results(job: list[dict[str, Any]], name: str) -> list[Any]:
    for rank in job:
        for found in rank.values():
            if isinstance(found, AssertionError):
                raise found
    return [rank[name] for rank in job]


SENT = [(size, cell) for size in (2, 4) for cell in cells_of(size)]


@pytest.mark.parametrize(("size", "cell"), SENT, ids=str)
def test_the_planned_bytes_are_sent(jobs: dict[int, list[dict[str, Any]]], size: int, cell: Cell) -> None:
    """To the byte, on every rank; what ranks tell each other to agree, too."""
    job, micro = job_of(cell, size)
    communication = job.estimate(micro, NOTHING).communication
    for sent in results(jobs[size], f"sent {cell}"):
        found: Counter[str] = Counter()
        for (collective, group, dtype), count in sent.items():
            sent_over = group if collective == "allreduce_" else 1
            assert count % sent_over == 0
            found["agreement" if dtype == "torch.float64" else collective] += count // sent_over
        planned: Counter[str] = Counter()
        for what, count in communication.parts.items():
            if what == "reduce-scatter and all-gather of public sums":
                planned["_reduce_scatter_base_"] += count // 2
                planned["_allgather_base_"] += count // 2
            else:
                planned[_COLLECTIVES.get(what.split(" ")[0], what.split(" ")[0])] += count
        assert planned == found


def check_held(found: dict[str, int], cell: Cell, size: int) -> None:
    """What stays is planned exactly; the peak, of which a plan knows no order of small things, not below."""
    job, micro = job_of(cell, size)
    memory = job.memory(micro, NOTHING)
    assert {name: memory.parts[name] for name in ("parameters", "optimizer")} == {
        name: found[name] for name in ("parameters", "optimizer")
    }
    (update,) = (held for held in job.memory_by_phase(micro, NOTHING) if held.phase == "update")
    assert update.parts["gradients" if cell[1] is None else "sums"] == found["gradients"]
    assert 0.99 <= memory.total / found["peak"] <= 1.15


@pytest.mark.parametrize(
    ("size", "cell"), [(size, cell) for size in (2, 4) for cell in HELD if size == 4 or cell[0] != "hsdp"], ids=str
)
def test_the_planned_bytes_are_held(size: int, cell: Cell) -> None:
    """On the first of ranks that torch pretends there are, so that nothing is counted that gloo alone allocates."""
    dist.init_process_group("fake", rank=0, world_size=size, store=FakeStore())
    try:
        check_held(checks.held(*cell), cell, size)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("size", [2, 4])
def test_the_planned_buckets_are_held(jobs: dict[int, list[dict[str, Any]]], size: int) -> None:
    """Those of DistributedDataParallel, on every rank."""
    for found in results(jobs[size], "held"):
        check_held(found, REPLICATED, size)
