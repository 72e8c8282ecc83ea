"""Clip, sum and noise beside one plain reading of the same bytes, plain torch, torch.compile and Opacus.

pytest benchmarks/test_one_pass.py --benchmark-enable            on the CPU; -s shows the tables
pytest benchmarks/test_one_pass.py --benchmark-enable -m gpu     on a GPU
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import peers
import pytest
import torch
from interleaved import medians, show
from torch import Tensor

import adamix_kernels as kernels

MAX_GRAD_NORM, NOISE_MULTIPLIER = 1.0, 1.1
COMPILED = ("256 x 1e+06 float32", "ResNet-18, B=32")  # on a GPU, where compiling for every size would take minutes


def resnet18() -> list[tuple[int, ...]]:
    """The shapes of torchvision's resnet18 parameters."""
    shapes: list[tuple[int, ...]] = [(64, 3, 7, 7), (64,), (64,)]
    before = 64
    for stage, width in enumerate((64, 128, 256, 512)):
        for block in range(2):
            shapes += [(width, before, 3, 3), (width,), (width,), (width, width, 3, 3), (width,), (width,)]
            if block == 0 and stage > 0:
                shapes += [(width, before, 1, 1), (width,), (width,)]
            before = width
    return [*shapes, (1000, 512), (1000,)]


def works(device: str) -> list[Any]:
    """(batch size, shapes, dtype), and how often: the largest on a GPU is 16 GB."""
    million = 1_000_000
    cpu = [
        ("64 x 1e6", 64, [(million,)], torch.float32),
        ("256 x 2.5e5", 256, [(million // 4,)], torch.float32),
        ("ResNet-18, B=32", 32, resnet18(), torch.float32),
        ("256 x 2.5e5 bf16", 256, [(million // 4,)], torch.bfloat16),
    ]
    gpu = [
        (f"{size} x {cols:.3g} {str(dtype)[6:]}", size, [(cols,)], dtype)
        for dtype in (torch.float32, torch.bfloat16)
        for size, cols in [(32, million), (256, million), (1024, million), (1024, 4 * million), (32, 60 * million)]
    ]
    gpu += [("ResNet-18, B=32", 32, resnet18(), torch.float32), ("ResNet-18, B=256", 256, resnet18(), torch.float32)]
    marks = [pytest.mark.gpu] if device == "cuda" else []
    return [pytest.param(device, *work, id=f"{device}-{work[0]}", marks=marks) for work in (gpu if marks else cpu)]


def check(name: str, noisy: list[Tensor], expected: list[Tensor]) -> None:
    """What is added to the clipped sum is noise of the standard deviation asked for, to six standard errors."""
    z = torch.cat([(one - other).flatten() for one, other in zip(noisy, expected, strict=True)]).double()
    error = abs(float(z.std()) / (NOISE_MULTIPLIER * MAX_GRAD_NORM) - 1)
    assert error < 6 / math.sqrt(2 * len(z)) + 1e-5, f"{name}: its noise is off by {error:.2%}"


def on(backend: str, *arguments: Any) -> list[Tensor]:
    with kernels.use_backend(backend):
        return kernels.clip_sum_noise(*arguments).sum


@pytest.mark.parametrize(("device", "name", "size", "shapes", "dtype"), [*works("cpu"), *works("cuda")])
def test_clip_sum_noise(
    benchmark: Any, capsys: Any, device: str, name: str, size: int, shapes: list[tuple[int, ...]], dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    parts = [torch.randn(size, *shape, device=device).to(dtype) for shape in shapes]
    arguments = (parts, MAX_GRAD_NORM, NOISE_MULTIPLIER)
    source = kernels.Noise(seed=0)
    secure = kernels.Noise(mode="secure")
    quiet = kernels.clip_sum_noise(parts, MAX_GRAD_NORM)
    expected = [torch.zeros_like(part) for part in quiet.sum]
    for rows in range(0, size, 16):  # the definition, a few samples at a time
        some = [part[rows : rows + 16].double() for part in parts]
        norm = torch.stack([part.flatten(1).square().sum(1) for part in some]).sum(0).sqrt()
        torch.testing.assert_close(quiet.norm_sq[rows : rows + 16].double(), norm**2, rtol=1e-6, atol=0)
        for total, part in zip(expected, some, strict=True):
            total.add_(torch.einsum("b,b...->...", (MAX_GRAD_NORM / norm).clamp(max=1.0), part))
    torch.testing.assert_close(quiet.sum, expected, rtol=1e-4, atol=1e-5)
    noisy: dict[str, Callable[[], list[Tensor]]] = {
        "adamix_kernels": lambda: kernels.clip_sum_noise(*arguments, source).sum,
        "the same in secure mode": lambda: kernels.clip_sum_noise(*arguments, secure).sum,
        "torch eager": lambda: peers.eager(*arguments),
    }
    if device == "cuda":
        for backend in ("cuda", "triton"):
            if kernels.grad_norm_sq.why_not(backend) is None:
                noisy[f"adamix_kernels, {backend}"] = lambda backend=backend: on(backend, *arguments, source)
    if device == "cpu" or name in COMPILED:
        noisy["torch.compile"] = peers.compiled(*arguments)
    if dtype == torch.float32 and (theirs := peers.opacus(*arguments)) is not None:
        noisy["Opacus DPOptimizer"] = theirs
    for contender, run in noisy.items():
        check(contender, run(), expected)
    contenders: dict[str, Callable[[], Any]] = {
        "one reading (torch.sum)": lambda: [part.sum() for part in parts],
        **noisy,
        "ours without noise": lambda: kernels.clip_sum_noise(parts, MAX_GRAD_NORM),
    }
    if device == "cuda":
        copy = [torch.empty_like(part) for part in parts]
        contenders["one copy"] = lambda: [out.copy_(part) for out, part in zip(copy, parts, strict=True)]
    times = medians(contenders, device, rounds=9 if device == "cpu" else 15)
    mine, reading = times["adamix_kernels"], times["one reading (torch.sum)"]
    total = sum(part.numel() * part.element_size() for part in parts)
    with capsys.disabled():
        show(f"{device} {name}: {total / 1e9:.3g} GB", times, {"one reading": reading, "ours": mine})
        if device == "cuda":
            print(f"  share of the copy's bandwidth, counting one reading: {times['one copy'] / (2 * mine):.1%}")
    benchmark.group = f"clip_sum_noise {device}"
    benchmark.extra_info.update(bytes=total, device=device, work=name, seconds=times)
    benchmark.pedantic(contenders["adamix_kernels"], rounds=3)
