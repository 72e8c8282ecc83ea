"""A small task: three blobs as 1 x 4 x 4 images, and models of all kinds for them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from adamix.deep import DeepAdaMix, DeepResult


def blobs(count: int, seed: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(count) % 3
    return TensorDataset(
        torch.randn(count, 1, 4, 4, generator=generator) + 2 * torch.eye(3, 16)[y].view(-1, 1, 4, 4), y
    )


PUBLIC, TEST, PRIVATE = blobs(12, 0), blobs(30, 1), blobs(40, 2)


def conv_net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))


#: No noise, full batches: what is tested then is exact, and needs no slow accounting.
EXACT: dict[str, Any] = {
    "epsilon": float("inf"),
    "expected_batch_size": 40,
    "steps": 3,
    "public_steps": 2,
    "public_batch_size": 8,
    "micro_batch_size": 60,
}


def plain_steps(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """The step is the gradient."""
    return torch.optim.SGD(parameters, lr=1.0)


def fit(model: nn.Module | None = None, *, private: Any = PRIVATE, public: Any = PUBLIC, **given: Any) -> DeepResult:
    """A run on the small task; `given` are settings, or arguments of `fit`."""
    of_fit = {"test", "ledger", "checkpoint", "checkpoint_every", "resume", "on_step", "on_public_step"}
    settings = {**EXACT, **{key: value for key, value in given.items() if key not in of_fit}}
    trainer = DeepAdaMix(conv_net() if model is None else model, **settings)
    return trainer.fit(public=public, private=private, **{k: v for k, v in given.items() if k in of_fit})


def vector(result: DeepResult) -> Tensor:
    return torch.cat([p.detach().flatten() for p in result.model.parameters()])
