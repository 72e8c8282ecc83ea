"""Small models, one for each way in which parameters meet samples, and the loop that says what is right for them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torch.utils._pytree import tree_leaves, tree_map
from zoo_models import (
    Conv1D,
    Fn,
    HFRMSNorm,
    LoRA,
    Sizes,
    attention,
    branching,
    frozen,
    recomputed,
    seq,
    shared_linear,
    shared_positions,
    siamese,
    tied_head,
    vit,
)


@dataclass(frozen=True)
class Entry:
    make: Callable[[], nn.Module]
    inputs: Sizes | Callable[[int], Any]  # a sample's shape, or the inputs of so many samples
    joined: tuple[str, ...] = ()  # parameters that are used together with the first one, and so in its layer


def floats(*sizes: Sizes) -> Callable[[int], Any]:
    return lambda samples: tuple(torch.randn(samples, *size) for size in sizes)


def ids(entries: int, *size: int) -> Callable[[int], Any]:
    return lambda samples: (torch.randint(entries, (samples, *size)),)


def nested(samples: int) -> Any:
    return ({"x": torch.randn(samples, 4), "more": [torch.randn(samples, 3)]},)


def positions_ids(samples: int) -> Any:
    return (torch.randint(7, (samples, 5)),)


LINEAR_CONV: dict[str, Entry] = {
    "linear": Entry(lambda: seq(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)), (6,)),
    "linear 3-D": Entry(lambda: seq(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)), (7, 6)),
    "linear 4-D": Entry(lambda: seq(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)), (3, 2, 4)),
    "linear no bias": Entry(lambda: seq(nn.Linear(6, 5, bias=False), nn.Tanh(), nn.Linear(5, 3, bias=False)), (6,)),
    "linear inner sum": Entry(
        lambda: Fn(lambda m, x: m.b(m.a(x).sum(1)), a=nn.Linear(6, 5), b=nn.Linear(5, 3)), (9, 6)
    ),
    "conv1d": Entry(lambda: seq(nn.Conv1d(3, 4, 3, stride=2, padding=1), nn.Tanh(), nn.Conv1d(4, 2, 2)), (3, 9)),
    "conv2d": Entry(
        lambda: seq(nn.Conv2d(2, 4, 3, padding="same"), nn.ReLU(), nn.Conv2d(4, 2, 3, stride=2)), (2, 7, 6)
    ),
    "conv2d groups": Entry(
        lambda: seq(nn.Conv2d(4, 6, 3, groups=2, dilation=2, padding=2, bias=False), nn.Tanh()), (4, 6, 5)
    ),
    "conv2d depthwise": Entry(lambda: seq(nn.Conv2d(3, 3, 3, groups=3), nn.Tanh(), nn.Conv2d(3, 2, 1)), (3, 6, 6)),
    "conv2d reflect": Entry(lambda: seq(nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"), nn.Tanh()), (2, 5, 5)),
    "conv3d": Entry(lambda: seq(nn.Conv3d(2, 3, 2, stride=(1, 2, 1)), nn.Tanh()), (2, 4, 5, 4)),
    "conv_transpose1d": Entry(
        lambda: seq(nn.ConvTranspose1d(3, 4, 3, stride=2), nn.Tanh(), nn.Conv1d(4, 2, 2)), (3, 5)
    ),
    "conv_transpose2d": Entry(
        lambda: seq(nn.Conv2d(2, 4, 2), nn.Tanh(), nn.ConvTranspose2d(4, 2, 3, bias=False)), (2, 4, 4)
    ),
    "cnn": Entry(
        lambda: seq(
            nn.Conv2d(1, 4, 3),
            nn.GroupNorm(2, 4),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(16, 3),
        ),
        (1, 6, 6),
    ),
    "HF Conv1D": Entry(lambda: seq(Conv1D(8, 6), nn.Tanh(), Conv1D(3, 8)), (4, 6)),
    "frozen first": Entry(lambda: seq(frozen(nn.Linear(6, 5), "weight", "bias"), nn.Tanh(), nn.Linear(5, 3)), (6,)),
    "biases only": Entry(
        lambda: frozen(
            seq(nn.Conv2d(2, 3, 3), nn.GroupNorm(3, 3), nn.Flatten(), nn.Linear(12, 4), nn.LayerNorm(4)), "weight"
        ),
        (2, 4, 4),
    ),
    "weights only": Entry(
        lambda: frozen(
            seq(nn.Conv2d(2, 3, 3), nn.GroupNorm(3, 3), nn.Flatten(), nn.Linear(12, 4), nn.LayerNorm(4)), "bias"
        ),
        (2, 4, 4),
    ),
    "LoRA": Entry(lambda: seq(LoRA(6, 5, 2), nn.Tanh(), LoRA(5, 3, 2)), (4, 6)),
    "recomputed": Entry(lambda: recomputed(False), (4,)),
    "recomputed reentrant": Entry(lambda: recomputed(True), (4,)),
    "in place": Entry(
        lambda: seq(nn.Linear(6, 5), nn.ReLU(inplace=True), nn.Linear(5, 4), nn.ReLU(inplace=True), nn.Linear(4, 2)),
        (6,),
    ),
}

NORM_TABLE: dict[str, Entry] = {
    "embedding": Entry(lambda: seq(nn.Embedding(5, 4, padding_idx=2), nn.Linear(4, 3)), ids(5, 8)),
    "embedding one id": Entry(lambda: seq(nn.Embedding(5, 4), nn.Tanh(), nn.Linear(4, 3)), ids(5)),
    "positions": Entry(
        lambda: Fn(
            shared_positions,
            table=nn.Embedding(7, 4),
            pos=nn.Embedding(8, 4),
            again=nn.Embedding(8, 4),
            head=nn.Linear(4, 3),
        ),
        positions_ids,
    ),
    "layer norm": Entry(lambda: seq(nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 2), nn.LayerNorm((3, 2))), (3, 6)),
    "rms norm": Entry(lambda: seq(nn.Linear(6, 5), nn.RMSNorm(5), nn.Linear(5, 2)), (3, 6)),
    "HF rms norm": Entry(lambda: seq(nn.Linear(6, 5), HFRMSNorm(5), nn.Linear(5, 2)), (3, 6)),
    "group norm": Entry(lambda: seq(nn.Conv1d(3, 4, 2), nn.GroupNorm(2, 4), nn.Tanh(), nn.GroupNorm(1, 4)), (3, 6)),
    "instance norm": Entry(lambda: seq(nn.Conv2d(3, 4, 2), nn.InstanceNorm2d(4, affine=True), nn.Tanh()), (3, 5, 5)),
    "batch norm eval": Entry(lambda: seq(nn.Linear(6, 5), nn.BatchNorm1d(5).eval(), nn.Linear(5, 2)), (6,)),
    "vit": Entry(vit, (2, 4, 4)),
    "tied head": Entry(lambda: tied_head(False), ids(9, 5)),
    "tied head with bias": Entry(lambda: tied_head(True), ids(9, 5), joined=("2.bias",)),
}

USES: dict[str, Entry] = {
    "scales": Entry(
        lambda: Fn(
            lambda m, x: (m.lin(x) * m.scale + m.shift) * m.gain.exp() - m.prompt,
            lin=nn.Linear(4, 5),
            scale=(5,),
            shift=(1, 3, 5),
            gain=(),
            prompt=(3, 1),
        ),
        (3, 4),
    ),
    "scale of inputs": Entry(lambda: Fn(lambda m, x: m.lin(x * m.scale), lin=nn.Linear(4, 3), scale=(4,)), (4,)),
    "added in place": Entry(
        lambda: Fn(lambda m, x: m.lin(x).add_(m.b).mul_(m.scale), lin=nn.Linear(4, 3), b=(3,), scale=(3,)), (4,)
    ),
    "used twice": Entry(shared_linear, (5,)),
    "siamese parts": Entry(lambda: Fn(siamese, body=seq(nn.Linear(4, 3), nn.Tanh()), scale=(3,)), floats((4,), (4,))),
    "unused": Entry(lambda: Fn(lambda m, x: m.used(x), used=nn.Linear(4, 3), idle=nn.Linear(4, 3), loose=(2,)), (4,)),
    "masked weight": Entry(
        lambda: Fn(lambda m, x: F.linear(x, m.w * m.mask, m.b), w=(3, 4), b=(3,), mask=torch.tensor([[1.0, 0, 1, 1]])),
        (4,),
    ),
    "masked weight of the batch's size": Entry(
        lambda: Fn(lambda m, x: F.linear(x, m.w * m.mask), w=(6, 4), mask=torch.ones(6, 4).tril()), (4,)
    ),
    "scaled buffer of the batch's size": Entry(
        lambda: Fn(lambda m, x: F.linear(x, m.scale * m.fixed), scale=(1, 4), fixed=torch.randn(6, 4)), (4,)
    ),
    "transposed weight": Entry(lambda: Fn(lambda m, x: torch.tanh(x @ m.w.T) @ m.v, w=(5, 4), v=(5, 3)), (2, 4)),
    "weight norm": Entry(lambda: seq(weight_norm(nn.Linear(4, 5)), nn.Tanh(), weight_norm(nn.Linear(5, 2))), (3, 4)),
    "einsum": Entry(
        lambda: Fn(lambda m, x: torch.einsum("bti,oi->bto", x, m.w).tanh() @ m.v, w=(5, 4), v=(5,)), (3, 4)
    ),
    "bilinear": Entry(lambda: Fn(lambda m, x, y: m.bi(x, y), bi=nn.Bilinear(4, 3, 2)), floats((4,), (3,))),
    "prelu": Entry(lambda: seq(nn.Linear(4, 5), nn.PReLU(5), nn.Linear(5, 3), nn.PReLU()), (4,)),
    "latent queries": Entry(
        lambda: Fn(
            lambda m, x: m.out(F.scaled_dot_product_attention(m.q(m.latent).expand(len(x), -1, -1), m.k(x), m.v(x))),
            latent=(1, 2, 4),
            q=nn.Linear(4, 4),
            k=nn.Linear(3, 4),
            v=nn.Linear(3, 4),
            out=nn.Linear(4, 2),
        ),
        (5, 3),
        joined=("q.weight", "q.bias"),
    ),
    "distances": Entry(
        lambda: Fn(lambda m, x: torch.cdist(m.lin(x), m.centres), lin=nn.Linear(4, 3), centres=(7, 3)), (4,)
    ),
    "attention": Entry(
        lambda: Fn(attention, qkv=Conv1D(12, 4), out=Conv1D(4, 4), distance=nn.Embedding(12, 2)), (5, 4)
    ),
    "control flow": Entry(
        lambda: Fn(branching, layer=nn.Linear(5, 5), one=nn.Linear(5, 3), other=nn.Linear(5, 3)), (5,)
    ),
    "nested": Entry(
        lambda: Fn(
            lambda m, batch: {"a": [m.one(batch["x"])], "b": m.two(batch["more"][0])},
            one=nn.Linear(4, 3),
            two=nn.Linear(3, 2),
        ),
        nested,
    ),
}

ZOO: dict[str, Entry] = {**LINEAR_CONV, **NORM_TABLE, **USES}


def inputs(entry: Entry, samples: int, dtype: torch.dtype) -> Any:
    torch.manual_seed(samples)
    made = entry.inputs(samples) if callable(entry.inputs) else (torch.randn(samples, *entry.inputs),)
    return tree_map(lambda x: x.to(dtype) if x.is_floating_point() else x, made)


def losses(outputs: Any) -> Tensor:
    """`[B]`, not the same for all samples: some are clipped, some are not."""
    rows = [x.flatten(1) for x in tree_leaves(outputs)]
    weights = [torch.linspace(-1, 2, x.shape[1], dtype=x.dtype) for x in rows]
    parts = [(x * w).sum(1) + 0.3 * x.square().sum(1) for x, w in zip(rows, weights, strict=True)]
    return torch.stack(parts).sum(0)


def model(entry: Entry, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(7)
    return entry.make().to(dtype)


def one_by_one(module: nn.Module, batch: Any) -> list[dict[str, Tensor]]:
    """The gradient of each sample, alone, by ordinary autograd."""
    module = copy.deepcopy(module)
    found = []
    for b in range(tree_leaves(batch)[0].shape[0]):
        module.zero_grad()
        losses(module(*tree_map(lambda x, b=b: x[b : b + 1], batch))).sum().backward()
        trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
        found.append({n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in trained.items()})
    return found
