"""Tensors of every kind an op may be handed: values, types, layouts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from random import Random
from typing import Any

import torch
from torch import Tensor

FLOATS = [torch.float32, torch.float32, torch.bfloat16, torch.float16, torch.float64]
_SIZES = [0, 1, 1, 2, 2, 3, 4, 5, 7, 8, 9, 12, 15, 16, 17, 31, 33]
_LARGE = [64, 65, 127, 257, 1000, 4099]


def size(r: Random, least: int = 0, large: bool = False) -> int:
    """Mostly small and often ragged; empty and large ones now and then."""
    return max(least, r.choice(_LARGE if large and r.random() < 0.1 else _SIZES))


def dims(r: Random, most: int = 3) -> list[int]:
    return [size(r) for _ in range(r.randrange(most))]


def floats(r: Random, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Of one kind: ordinary, near the ends of the type's range, spread over it, with NaN and Inf, opposed, zero."""
    generator = torch.Generator().manual_seed(r.randrange(2**32))
    shape = tuple(shape)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    kind = r.choice(["plain", "plain", "scaled", "spread", "spoilt", "opposed", "zero", "rows"])
    reach = 300 if dtype == torch.float64 else 44
    if kind == "scaled":
        x *= 10.0 ** r.choice([-reach, -38, -20, -3, 10, 18, 37, reach - 6 if reach > 44 else 38])
    elif kind == "spread":
        x *= 10 ** ((torch.rand(shape, generator=generator, dtype=torch.float64) * 2 - 1) * reach)
    elif kind == "opposed" and x.dim() > 1 and x.shape[1] > 1:
        half = x.shape[1] // 2
        x[:, half : 2 * half] = -x[:, :half] * (1 + r.choice([0.0, 2**-23, 1e-6, 1e-3]))
    elif kind == "zero":
        x *= torch.rand(shape, generator=generator) < 0.1
    elif kind == "rows" and x.dim() and len(x):
        x *= 10 ** (torch.linspace(-1, 1, len(x), dtype=torch.float64) * reach).view(-1, *[1] * (x.dim() - 1))
    limit = torch.finfo(dtype).max
    x = x.clamp(-limit, limit).to(dtype)
    if kind == "spoilt" and x.numel():
        for value in (math.nan, math.inf, -math.inf):
            if r.random() < 0.5:
                x.view(-1)[r.randrange(x.numel())] = value
    return x


def integers(r: Random, shape: Sequence[int], limit: int) -> Tensor:
    generator = torch.Generator().manual_seed(r.randrange(2**32))
    dtype = r.choice([torch.int64, torch.int32])
    return torch.randint(0, max(1, min(limit, 2**31 - 1)), tuple(shape), generator=generator, dtype=dtype)


def laid_out(r: Random, x: Tensor) -> Tensor:  # noqa: PLR0911  a table
    """The same values, or of the first row for an expanded one, in some layout."""
    kind = r.choice(["plain", "plain", "transposed", "gaps", "offset", "expanded", "negative", "leaf", "reversed axes"])
    if kind == "transposed" and x.dim() > 1:
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if kind == "reversed axes":
        order = list(range(x.dim()))[::-1]
        return x.permute(order).contiguous().permute(order)
    if kind == "gaps" and x.dim():
        around = x.new_full((*(2 * n + 1 for n in x.shape),), 77)
        part = around[tuple(slice(1, 2 * n + 1, 2) for n in x.shape)]
        return part.copy_(x)
    if kind == "offset":  # not on the boundary that wide loads would like
        return torch.cat([x.new_zeros(1), x.reshape(-1)])[1:].view(x.shape)
    if kind == "expanded" and x.dim() and len(x):
        return x[:1].expand(x.shape)
    if kind == "negative" and x.is_floating_point():
        return torch._neg_view(-x)
    if kind == "leaf" and x.is_floating_point():
        return x.clone().requires_grad_()
    return x


def described(value: Any) -> str:
    if isinstance(value, Tensor):
        if value.layout is not torch.strided:
            return f"{value.layout} {list(value.shape)}"
        marks = " negative" * value.is_neg() + " leaf" * value.requires_grad
        return f"{value.dtype} {list(value.shape)} stride {value.stride()}{marks} {value.device}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(described, value)) + "]"
    return repr(value)[:60]


def norm(parts: Any) -> float:
    """Exact enough: float64, scaled so that no square leaves the range."""
    tensors = [parts] if isinstance(parts, Tensor) else [p for p in parts if p is not None]
    flat = torch.cat([t.detach().double().reshape(-1) for t in tensors])
    top = float(flat.abs().max()) if flat.numel() else 0.0
    if not math.isfinite(top):
        return math.inf
    return top * float((flat / top).norm()) if top else 0.0


def rounding(parts: Any) -> float:
    """Of numbers so small that they are rounded to a multiple of the smallest denormal."""
    tensors = [parts] if isinstance(parts, Tensor) else [p for p in parts if p is not None]
    return sum(math.sqrt(t.numel()) * (2.0**-1074 if t.dtype == torch.float64 else 2.0**-149) for t in tensors)
