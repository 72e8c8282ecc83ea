"""The slow definition of what the engine does, and small models to do it to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adamix_kernels import DPEngine

STRATEGIES = ["auto", "book_keeping", "two_pass", "per_layer", "materialize"]


def classifier(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.LayerNorm(7), nn.Linear(7, 3)).to(dtype)


def batch(samples: int = 10, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    return torch.randn(samples, 5, generator=g, dtype=dtype) * 3, torch.randint(0, 3, (samples,), generator=g)


def engine(model: nn.Module, **settings: Any) -> DPEngine:
    """Without noise, the gradient after a step is the clipped sum."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    return DPEngine(
        model, optimizer, **{"max_grad_norm": 0.7, "noise_multiplier": 0.0, "expected_batch_size": 1.0, **settings}
    )


def run(dp: DPEngine, data: tuple[Tensor, Tensor], reduction: str = "mean") -> None:
    dp.backward(F.cross_entropy(dp.model(data[0]), data[1], reduction=reduction))


def step(dp: DPEngine) -> dict[str, Tensor]:
    """What a step releases."""
    dp.optimizer.step()
    grads = {name: p.grad.detach().clone() for name, p in dp.model.named_parameters() if p.grad is not None}
    dp.optimizer.zero_grad()
    return grads


def per_sample(model: nn.Module, loss: Callable[[nn.Module, int], Tensor], samples: int) -> list[dict[str, Tensor]]:
    """Gradients of `loss(model, b)` for each sample b, by torch alone: on a model without an engine."""
    rows = []
    for b in range(samples):
        model.zero_grad()
        loss(model, b).backward()
        rows.append({n: p.grad.detach().clone() for n, p in model.named_parameters() if p.grad is not None})
    model.zero_grad()
    return rows


def clipped(
    rows: list[dict[str, Tensor]], limit: float, per_layer: dict[str, float] | None = None
) -> dict[str, Tensor]:
    sums: dict[str, Tensor] = {}
    for row in rows:
        groups = {name: name.rpartition(".")[0] if per_layer else "" for name in row}
        for group in set(groups.values()):
            part = {name: g for name, g in row.items() if groups[name] == group}
            norm = float(torch.stack([g.double().norm() for g in part.values()]).norm())
            coef = min(1.0, (per_layer[group] if per_layer else limit) / norm) if norm else 1.0
            for name, g in part.items():
                sums[name] = sums.get(name, 0) + coef * g.double()
    return sums


def expected(
    model: nn.Module, data: tuple[Tensor, Tensor], limit: float = 0.7, strategy: str = ""
) -> dict[str, Tensor]:
    """The clipped sum of the classifier's cross entropy."""
    x, y = data
    rows = per_sample(model, lambda m, b: F.cross_entropy(m(x[b : b + 1]), y[b : b + 1]), len(x))
    layers = {name.rpartition(".")[0] for name, _ in model.named_parameters()}
    even = dict.fromkeys(layers, limit / len(layers) ** 0.5) if strategy == "per_layer" else None
    return clipped(rows, limit, even)


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor], rtol: float = 1e-6) -> None:
    """To within the rounding up of norms."""
    assert got.keys() >= want.keys()
    for name, g in got.items():
        reference = want.get(name, torch.zeros_like(g))
        assert (g.double() - reference).norm() <= rtol * max(1.0, float(reference.norm())), name
