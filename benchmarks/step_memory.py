"""Prints the MiB that a contender's training step takes at its peak: step_memory.py WORK CONTENDER."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from step_models import WORKS
from step_peers import contenders, plain


def resident(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def main(name: str, label: str) -> None:
    torch.manual_seed(0)
    work = WORKS[name]
    tiny = next(iter(WORKS.values()))
    plain(tiny, *(part[:2] for part in tiny.batch()))[1]()  # libraries take their own memory at the first call
    if label.startswith("Opacus"):
        import opacus.grad_sample  # noqa: F401  its imports are not the step's
    before = resident("VmRSS")
    x, y = work.batch()
    step = next(step for found, (_, step) in _only(work, x, y, label) if found == label)
    step()
    Path("/proc/self/clear_refs").write_text("5")
    for _ in range(3):
        step()
    print(resident("VmHWM") - before)


def _only(work, x, y, label):  # type: ignore[no-untyped-def]
    """Contenders are made one after the other: stop at the wanted one and drop the others."""
    for found, contender in contenders(work, x, y, 1.0, True):
        if found == label:
            yield found, contender


if __name__ == "__main__":
    main(*sys.argv[1:])
