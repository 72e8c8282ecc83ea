"""What a step really takes in memory, to hold a plan against."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

from torch.profiler import ProfilerActivity, profile


def peak_allocated(run: Callable[[], Any]) -> int:
    """Bytes that torch's CPU allocator has given out where `run` holds most, beside what there was before, by torch's
    profiler. What is freed that was there before counts below zero."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watch:
        run()
    assert watch.profiler is not None
    events = [e for e in watch.profiler.kineto_results.events() if e.name() == "[memory]"]
    return max(itertools.accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())))
