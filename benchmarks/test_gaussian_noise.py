"""Gaussian noise beside torch's own generator (CPU) and beside a plain addition in place (GPU).

pytest benchmarks/test_gaussian_noise.py --benchmark-enable            on the CPU; -s shows the tables
pytest benchmarks/test_gaussian_noise.py --benchmark-enable -m gpu     on a GPU
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from interleaved import medians, show

import adamix_kernels as kernels


@pytest.mark.parametrize(
    ("device", "count"),
    [pytest.param("cpu", 10_000_000), pytest.param("cuda", 1_000_000_000, marks=pytest.mark.gpu)],
)
def test_noise(benchmark: Any, capsys: Any, device: str, count: int) -> None:
    target = torch.zeros(count, device=device)
    sources = {"fast": kernels.Noise(), "secure": kernels.Noise(mode="secure")}
    for source in sources.values():
        z = kernels.add_gaussian_noise_(torch.zeros(1_000_003, device=device), 2.0, source).cpu().double()
        assert abs(float(z.mean())) < 6 * 2 / math.sqrt(len(z))
        assert abs(float(z.std()) / 2 - 1) < 6 / math.sqrt(2 * len(z))
    contenders: dict[str, Callable[[], Any]] = {
        "torch.randn": lambda: torch.randn(count, device=device),
        "normal_, in place": target.normal_,
        **{name: lambda s=source: kernels.add_gaussian_noise_(target, 1.0, s) for name, source in sources.items()},
    }
    if device == "cuda":
        other = torch.ones_like(target)
        contenders["addition in place"] = lambda: target.add_(other)
    times = medians(contenders, device, rounds=9)
    base = "torch.randn" if device == "cpu" else "addition in place"
    with capsys.disabled():
        show(f"{device}: noise on {count:.0e} elements", times, {base: times[base]})
    benchmark.group = f"add_gaussian_noise_ {device}"
    benchmark.extra_info.update(bytes=8 * count, device=device, seconds=times)
    benchmark.pedantic(contenders["fast"], rounds=3)
