"""Per-sample norms and clipped sums of a linear layer beside the formulas of the peers and one weight gradient.

pytest benchmarks/test_linear_norms.py --benchmark-enable -s             on the CPU
pytest benchmarks/test_linear_norms.py --benchmark-enable -s -m gpu      on a GPU
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from interleaved import medians, show
from torch import Tensor

import adamix_kernels as kernels


def works() -> list[Any]:
    """B, T, I = O, dtype."""
    cpu = [
        (16, 64, 256, torch.float32),
        (8, 512, 768, torch.float32),
        (8, 1024, 768, torch.float32),
        (32, 16, 512, torch.float32),
        (8, 512, 768, torch.bfloat16),
    ]
    gpu = [
        (64, 128, 4096, torch.bfloat16),
        (16, 1024, 4096, torch.bfloat16),
        (8, 2048, 4096, torch.bfloat16),
        (64, 128, 4096, torch.float32),
    ]
    marked = [("cpu", work, []) for work in cpu] + [("cuda", work, [pytest.mark.gpu]) for work in gpu]
    return [
        pytest.param(device, *work, id=f"{device}-{work[0]}x{work[1]}x{work[2]}-{str(work[3])[6:]}", marks=marks)
        for device, work, marks in marked
    ]


def einsum(a: Tensor, g: Tensor) -> Tensor:
    """As Opacus 1.6 computes it."""
    gram_g = torch.einsum("nik,njk->nij", g, g)
    gram_a = torch.einsum("nik,njk->nij", a, a)
    return torch.einsum("n...i,n...i->n", gram_g, gram_a).clamp(min=0)


def materialised(a: Tensor, g: Tensor) -> Tensor:
    return torch.bmm(g.mT, a).square().sum((1, 2))


def weighted(a: Tensor, g: Tensor, coef: Tensor) -> Tensor:
    """The clipped sum as book-keeping computes it: one product of matrices."""
    return (g * coef[:, None, None]).flatten(0, 1).T @ a.flatten(0, 1)


@pytest.mark.parametrize(("device", "samples", "positions", "width", "dtype"), works())
def test_linear(
    benchmark: Any, capsys: Any, device: str, samples: int, positions: int, width: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    a, g = (torch.randn(samples, positions, width, device=device).to(dtype) for _ in range(2))
    coef = torch.rand(samples, device=device)
    exact = torch.stack([(y.double().T @ x.double()).square().sum() for x, y in zip(a, g, strict=True)])
    norms: dict[str, Callable[[], Tensor]] = {
        f"ours, {method}": lambda method=method: kernels.linear_norm_sq(a, g, False, method)
        for method in ("auto", "gram", "direct")
    }
    for name, run in norms.items():
        raised = (run().double() / exact).sqrt() - 1
        assert float(raised.min()) >= 0 and float(raised.mean()) < 1e-3, f"{name}: {raised}"
    theirs = {"Opacus einsum": lambda: einsum(a, g), "materialised": lambda: materialised(a, g)}
    for name, run in theirs.items():
        error = float((run().double() / exact - 1).abs().max())
        assert error < (1e-4 if dtype == torch.float32 else 5e-2), f"{name} is off by {error:.3g}"
    total = torch.einsum("b,bto,bti->oi", coef.double(), g.double(), a.double())
    sums = {
        "clipped sum, ours": lambda: kernels.linear_clip_sum(a, g, coef).weight,
        "clipped sum, torch": lambda: weighted(a, g, coef.to(dtype)),
    }
    for name, run in sums.items():
        error = float((run().double() - total).abs().max() / total.abs().max())
        assert error < (1e-4 if dtype == torch.float32 else 2e-2), f"{name} is off by {error:.3g}"
    contenders = {**norms, **theirs, **sums, "weight gradient": lambda: g.flatten(0, 1).T @ a.flatten(0, 1)}
    times = medians(contenders, device, 15)
    flops = 2 * samples * positions * width * width
    with capsys.disabled():
        against = {"Opacus einsum": times["Opacus einsum"], "weight gradient": times["weight gradient"]}
        show(f"{device} linear B={samples} T={positions} I=O={width} {str(dtype)[6:]}", times, against)
        print(f"  direct reaches {times['weight gradient'] / times['ours, direct']:.1%} of the weight gradient's rate")
    benchmark.group = f"linear {device}"
    benchmark.extra_info.update(device=device, seconds=times, flops=flops)
    benchmark.pedantic(norms["ours, auto"], rounds=3)
