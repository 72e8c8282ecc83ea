"""The models of the training-step benchmarks at sizes for tests, as a plan takes them and as a loop does."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adamix.plan import Work

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
from step_models import Transformer, cnn, mlp, of_tokens


def nothing() -> None:
    """No model."""


def classify(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x), y)


def predict(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return of_tokens(model(x), y)


def rows(*shape: int) -> Callable[[int], tuple[Tensor, Tensor]]:
    return lambda samples: (torch.rand(samples, *shape), torch.zeros(samples, dtype=torch.int64))


def tokens(length: int) -> Callable[[int], tuple[Tensor, Tensor]]:
    return lambda samples: (
        torch.zeros(samples, length, dtype=torch.int64),
        torch.zeros(samples, length, dtype=torch.int64),
    )


#: By name: a work and the rows of a step.
WORKS = {
    "cnn": (Work("cnn", cnn, rows(1, 28, 28), classify), 64),
    "mlp": (Work("mlp", mlp, rows(784), classify), 32),
    "transformer": (Work("transformer", lambda: Transformer(500, 128, 4, 2, 48), tokens(48), predict), 8),
}
