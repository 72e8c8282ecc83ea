"""The models of the training-step benchmarks, each with a batch and its loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass
class Work:
    """`loss` is the mean over samples: equal lengths, no padding."""

    model: Callable[[], nn.Module]
    batch: Callable[[], tuple[Tensor, Tensor]]
    loss: Callable[[Tensor, Tensor], Tensor]
    rounds: int


def cnn() -> nn.Module:
    """The classifier of Opacus's MNIST example, with one channel of 28 x 28."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 8, 2, padding=3),
        nn.ReLU(),
        nn.MaxPool2d(2, 1),
        nn.Conv2d(16, 32, 4, 2),
        nn.ReLU(),
        nn.MaxPool2d(2, 1),
        nn.Flatten(),
        nn.Linear(512, 32),
        nn.ReLU(),
        nn.Linear(32, 10),
    )


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(784, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 10))


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        samples, positions, width = x.shape
        qkv = self.qkv(self.norm1(x)).view(samples, positions, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(*qkv, is_causal=True).transpose(1, 2)
        x = x + self.proj(mixed.reshape(samples, positions, width))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    """A causal language model; positions come as `[B, T]`, for the peers' sake."""

    def __init__(self, vocabulary: int, width: int, heads: int, layers: int, positions: int) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(positions, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        places = torch.arange(ids.shape[1], device=ids.device).repeat(len(ids), 1)
        return self.head(self.norm(self.blocks(self.tokens(ids) + self.positions(places))))


def of_tokens(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def language_model(vocabulary: int, width: int, heads: int, layers: int, positions: int, samples: int) -> Work:
    return Work(
        lambda: Transformer(vocabulary, width, heads, layers, positions),
        lambda: tuple(torch.randint(vocabulary, (samples, positions)) for _ in range(2)),
        of_tokens,
        15,
    )


WORKS = {
    "CNN 28x28, B=128": Work(
        cnn, lambda: (torch.randn(128, 1, 28, 28), torch.randint(10, (128,))), F.cross_entropy, 61
    ),
    "MLP 784-1024-1024-10, B=256": Work(
        mlp, lambda: (torch.randn(256, 784), torch.randint(10, (256,))), F.cross_entropy, 41
    ),
    "transformer 4 x 256, T=64, B=16": language_model(1000, 256, 4, 4, 64, 16),
}

#: The shape of GPT-2 medium.
GPU_WORKS = {"GPT-2 medium, T=512, B=16": language_model(50257, 1024, 16, 24, 512, 16)}
