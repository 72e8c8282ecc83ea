"""Timing contenders in turn, so that what disturbs the machine disturbs them alike."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch


def medians(
    contenders: Mapping[str, Callable[[], Any]], device: str, rounds: int, loop: bool = False
) -> dict[str, float]:
    """Seconds of each contender: the median over rounds in which each runs once, after one round that is not counted.

    In each round in another order, so that none always finds the caches as one other leaves them. What runs in a loop
    finds them as its own last run left them: with `loop` each runs twice, and the second is counted. On a GPU the time
    between two events on the stream; there one buffer larger than the L2 cache is written before every run, so that no
    contender finds its input in the cache.
    """
    times: dict[str, list[float]] = {name: [] for name in contenders}
    flush = torch.empty(1 << 28, dtype=torch.uint8, device=device) if device == "cuda" else None
    shuffle = random.Random(0)
    for count in range(rounds + 1):
        for name, run in shuffle.sample(list(contenders.items()), len(contenders)):
            if loop:
                run()
            if flush is None:
                start = time.perf_counter()
                run()
                seconds = time.perf_counter() - start
            else:
                flush.zero_()
                first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                first.record()
                run()
                last.record()
                last.synchronize()
                seconds = first.elapsed_time(last) / 1e3
            if count:
                times[name].append(seconds)
    return {name: statistics.median(values) for name, values in times.items()}


def show(title: str, times: Mapping[str, float], against: Mapping[str, float]) -> None:
    """A table of the medians, and of their ratios to some of them."""
    print(f"\n{title}")
    for name, seconds in times.items():
        ratios = "".join(f"{seconds / other:8.2f} x {label}" for label, other in against.items())
        print(f"  {name:26s}{seconds * 1e3:9.2f} ms{ratios}")
