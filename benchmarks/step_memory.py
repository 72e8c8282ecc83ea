"""Prints the MiB that a contender's training step takes at its peak: step_memory.py WORK CONTENDER."""

from __future__ import annotations

import gc
import sys
from pathlib import Path

import torch
from step_models import WORKS, Work
from step_peers import Step, contenders
from torch import Tensor


def resident(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def main(name: str, label: str) -> None:
    torch.manual_seed(0)
    work, tiny = WORKS[name], WORKS["CNN 28x28, B=128"]
    step_of(label, tiny, *(part[:2] for part in tiny.batch()))()  # code and libraries that the first call loads
    before = resident("VmRSS")
    x, y = work.batch()
    step = step_of(label, work, x, y)
    step()
    gc.collect()  # the contenders that were made before this one
    Path("/proc/self/clear_refs").write_text("5")
    for _ in range(3):
        step()
    print(resident("VmHWM") - before)


def step_of(label: str, work: Work, x: Tensor, y: Tensor) -> Step:
    """Contenders are made one after the other: the others are dropped."""
    return next(step for found, (_, step) in contenders(work, x, y, 1.0, True) if found == label)


if __name__ == "__main__":
    main(*sys.argv[1:])
