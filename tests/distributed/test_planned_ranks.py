"""What a plan says that ranks send and hold, against the collectives and tensors of real ranks."""

from __future__ import annotations

from collections import Counter
from typing import Any

import planned_checks as checks
import pytest
import spawned

from adamix.plan import Job, Setting, Work, preset

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
HELD: list[Cell] = [(kind, strategy, "fast", False, 1) for kind in ("ddp", "fsdp") for strategy in (None, "auto", "per_layer")]
_COLLECTIVES = {"all-gather": "_allgather_base_", "reduce-scatter": "_reduce_scatter_base_", "all-reduce": "allreduce_"}


def job_of(cell: Cell, size: int) -> tuple[Job, int]:
    """And the rows of its passes."""
    kind, strategy, mode, public, micro = cell
    work = Work("ranks", checks.wide, checks.rows_of, checks.loss_of)
    setting = Setting(strategy, device="cpu", noise_mode=mode, public_rows=checks.PUBLIC // size if public else 0)
    sharding = {"plain": "ddp"}.get(kind, kind)
    return Job(work, setting, checks.ROWS, size, sharding, 2 if kind == "hsdp" else None), checks.ROWS // size // micro


def cells_of(size: int) -> list[Cell]:
    return CELLS + (HYBRID if size == 4 else [])


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Any]]]:
    """Results by size, rank and check."""
    folder = tmp_path_factory.mktemp("planned")
    return {
        size: spawned.run(
            size,
            folder,
            [(f"sent {cell}", checks.sent, cell) for cell in cells_of(size)]
            + [(f"held {cell}", checks.held, cell) for cell in HELD + [c for c in HYBRID if size == 4 and not c[3]]],
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
    communication = job.estimate(micro, LINKED).communication
    for sent in results(jobs[size], f"sent {cell}"):
        found: Counter[str] = Counter()
        for (collective, group, dtype), count in sent.items():
            if collective == "allreduce_":
                assert count % group == 0
                count //= group
            found["agreement" if dtype == "torch.float64" else collective] += count
        planned: Counter[str] = Counter()
        for what, count in communication.parts.items():
            if what == "reduce-scatter and all-gather of public sums":
                planned["_reduce_scatter_base_"] += count // 2
                planned["_allgather_base_"] += count // 2
            else:
                planned[_COLLECTIVES.get(what.split(" ")[0], what.split(" ")[0])] += count
        assert planned == found


LINKED = preset("h200")
NOTHING = 0
