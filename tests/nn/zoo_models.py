"""Models of the zoo that take more than a line."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

Sizes = tuple[int, ...]


class Fn(nn.Module):
    """A forward in one line over named parts: modules, and parameters given by their shape or values."""

    def __init__(self, run: Callable[..., Any], **parts: nn.Module | Sizes | Tensor) -> None:
        super().__init__()
        self.run = run
        for name, part in parts.items():
            if isinstance(part, tuple):
                setattr(self, name, nn.Parameter(torch.randn(part)))
            elif isinstance(part, Tensor):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(self, *args, **kwargs)


def seq(*parts: nn.Module) -> nn.Sequential:
    return nn.Sequential(*parts)


def frozen(module: nn.Module, *names: str) -> nn.Module:
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(not any(name.endswith(end) for end in names))
    return module


class HFRMSNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
        return self.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


class LoRA(nn.Module):
    def __init__(self, inner: int, outer: int, rank: int) -> None:
        super().__init__()
        self.base = nn.Linear(inner, outer).requires_grad_(False)
        self.down, self.up = nn.Linear(inner, rank, bias=False), nn.Linear(rank, outer, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x)) * 0.5


def tied_head(bias: bool) -> nn.Module:
    table, head = nn.Embedding(9, 6), nn.Linear(6, 9, bias=bias)
    head.weight = table.weight
    return seq(table, nn.LayerNorm(6), head)


def shared_linear() -> nn.Module:
    layer = nn.Linear(5, 5)
    return seq(layer, nn.Tanh(), layer, nn.Tanh(), nn.Linear(5, 2))


def vit() -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        tokens = m.patch(x).flatten(2).transpose(1, 2)
        tokens = torch.cat((m.cls.expand(x.shape[0], -1, -1), tokens), 1) + m.pos
        return m.head(m.norm(tokens)[:, 0] + tokens.mean(1))

    parts = {"cls": (1, 1, 6), "pos": (1, 5, 6), "norm": nn.LayerNorm(6), "head": nn.Linear(6, 3)}
    return Fn(run, patch=nn.Conv2d(2, 6, 2, stride=2), **parts)


def shared_positions(m: Any, x: Tensor) -> Tensor:
    places = torch.arange(x.shape[1])
    return m.head(torch.tanh(m.table(x) + m.pos(places) + m.again(places[None])))


def recomputed(reentrant: bool) -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        h = m.first(x)
        return m.last(checkpoint(m.block, h, use_reentrant=reentrant))

    block = seq(nn.Linear(5, 7), nn.GELU(), nn.LayerNorm(7), nn.Linear(7, 5))
    return Fn(run, first=nn.Linear(4, 5), block=block, last=nn.Linear(5, 2))


def branching(m: Any, x: Tensor) -> Tensor:
    for _ in range(1 + x.shape[-1] % 2):
        x = torch.relu(m.layer(x))
    return m.one(x) if bool((x < 1e9).all()) else m.other(x)


def siamese(m: Any, first: Tensor, second: Tensor) -> Tensor:
    return torch.cat((m.body(first) - m.body(second), m.scale * m.body(first * second)), 1)


class Conv1D(nn.Module):
    """As in transformers.pytorch_utils."""

    def __init__(self, outer: int, inner: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(inner, outer)), nn.Parameter(torch.randn(outer))

    def forward(self, x: Tensor) -> Tensor:
        out = torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight)
        return out.view(*x.shape[:-1], out.shape[-1])


def attention(m: Any, x: Tensor) -> Tensor:
    """As GPT-2 and T5: a view of heads into a Conv1D, and a bias by the distance of positions."""
    q, k, v = (y.view(*y.shape[:-1], 2, 2).transpose(1, 2) for y in m.qkv(x).split(4, dim=2))
    places = torch.arange(x.shape[1])
    bias = m.distance((places[:, None] - places[None]) + x.shape[1]).permute(2, 0, 1)[None]
    weights = (q @ k.mT + bias).softmax(-1)
    joined = F.scaled_dot_product_attention(q, k, v).transpose(1, 2) + (weights @ v).transpose(1, 2)
    return m.out(joined.reshape(*x.shape[:-1], 4).contiguous())
