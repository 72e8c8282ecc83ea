"""Through the public API no sample moves the sum by more than the threshold, whatever it holds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map
from zoo import ZOO, inputs, losses, model

from adamix_kernels import DPEngine

C = 0.7
SLACK = 1 + 1e-5
MODES = [
    {"strategy": "auto"},
    {"strategy": "book_keeping"},
    {"strategy": "two_pass"},
    {"strategy": "materialize"},
    {"strategy": "per_layer"},
    {"strategy": "book_keeping", "clipping": "automatic"},
]
#: "control flow" looks at the values of all samples: what one holds changes the function of the others.
NAMES = [name for name in ZOO if name != "control flow"]


def cancelling(x: Tensor) -> Tensor:
    """Large numbers in pairs along the first axis, so that sums over positions are small beside their terms."""
    y = x * 1e6
    y[1::2] = -y[: y.shape[0] - y.shape[0] % 2 : 2]
    return y + x


def spread(x: Tensor) -> Tensor:
    return x * 10 ** torch.linspace(-18, 18, x.numel(), dtype=x.dtype).view_as(x)


def one_bad(value: float) -> Callable[[Tensor], Tensor]:
    def spoil(x: Tensor) -> Tensor:
        y = x.clone()
        y.view(-1)[y.numel() // 2] = value
        return y

    return spoil


#: What becomes of a sample's numbers, and the factor of its loss.
HOSTILE: list[tuple[Callable[[Tensor], Tensor], float]] = [
    (lambda x: x * 1e15, 1.0),
    (lambda x: x, -1e18),
    (cancelling, 1e3),
    (spread, 1.0),
    (torch.zeros_like, 1e30),
    (one_bad(torch.nan), 1.0),
    (one_bad(torch.inf), 1.0),
    (lambda x: x, torch.nan),
]


def total(name: str, batch: Any, weights: Tensor, mode: dict[str, str]) -> Tensor:
    """The un-noised sum over the samples of a batch, all parameters in one vector."""
    module = model(ZOO[name], weights.dtype)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.0)
    dp = DPEngine(
        module, optimizer, max_grad_norm=C, noise_multiplier=0.0, expected_batch_size=1, loss_reduction="sum", **mode
    )
    dp.backward((losses(module(*batch)) * weights).sum())
    optimizer.step()
    return torch.cat([p.grad.double().view(-1) for p in module.parameters() if p.requires_grad])


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: " ".join(mode.values()))
@pytest.mark.parametrize("name", NAMES)
def test_a_sample_moves_the_sum_by_no_more_than_the_threshold(name: str, mode: dict[str, str]) -> None:
    """Added to others in float64, where their rounding is small beside the slack; alone in float32."""
    others = inputs(ZOO[name], 3, torch.float64)
    without = total(name, others, torch.ones(3, dtype=torch.float64), mode)
    for spoil, factor in HOSTILE:
        extra = tree_map(
            lambda x, spoil=spoil: spoil(x[0])[None] if x.is_floating_point() else x,
            inputs(ZOO[name], 1, torch.float64),
        )
        joined = [torch.cat([x, y]) for x, y in zip(tree_leaves(others), tree_leaves(extra), strict=True)]
        rows = iter(joined)
        batch = tree_map(lambda _, rows=rows: next(rows), others)
        weights = torch.tensor([1.0, 1.0, 1.0, factor], dtype=torch.float64)
        moved = total(name, batch, weights, mode) - without
        assert moved.norm() <= C * SLACK
        alone = tree_map(lambda x: x.float() if x.is_floating_point() else x, extra)
        assert total(name, alone, torch.tensor([factor]), mode).norm() <= C * SLACK
