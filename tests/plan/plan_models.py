"""The models of the training-step benchmarks at sizes for tests, as a plan takes them and as a loop does."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adamix.plan import Work


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.qkv, self.proj = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        samples, positions, width = x.shape
        qkv = self.qkv(self.norm(x)).view(samples, positions, 3, 4, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(*qkv, is_causal=True).transpose(1, 2)
        x = x + self.proj(mixed.reshape(samples, positions, width))
        return x + self.down(F.gelu(self.up(x)))


class LanguageModel(nn.Module):
    def __init__(self, width: int = 128, layers: int = 2) -> None:
        super().__init__()
        self.tokens = nn.Embedding(500, width)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(layers)))
        self.head = nn.Linear(width, 500, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.blocks(self.tokens(ids)))


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 8, 2, padding=3),
        nn.ReLU(),
        nn.MaxPool2d(2, 1),
        nn.Conv2d(16, 32, 4, 2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(800, 10),
    )


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10))


def nothing() -> None:
    """No model."""


def classify(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x), y)


def predict(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x).flatten(0, 1), y.flatten())


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
    "mlp": (Work("mlp", mlp, rows(256), classify), 128),
    "transformer": (Work("transformer", LanguageModel, tokens(48), predict), 8),
}
