"""Attaches the compiled CPU kernels of embeddings and of affine parts as the backend "cpp"."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from adamix_kernels.memory import plain
from adamix_kernels.native import CPU, compiled, dtype_of, register
from adamix_kernels.ops._numerics import sum_dtype
from adamix_kernels.ops.embedding import embedding_clip_sum, embedding_norm_sq
from adamix_kernels.ops.scale_shift import ScaleShiftSum, scale_shift_clip_sum, scale_shift_norm_sq


def _sizes(x: Tensor) -> tuple[int, int, int]:
    """Samples, positions and columns of `[B, *, D]`."""
    return x.shape[0], math.prod(x.shape[1:-1]), x.shape[-1]


@register(embedding_norm_sq, "indices", "backprops")
def _embedding_norm_sq(indices: Tensor, backprops: Tensor, padding_idx: int | None = None) -> Tensor:
    ids, g = plain(indices.long()), plain(backprops)
    out = torch.empty(len(g), dtype=torch.float32, device=CPU)
    described = (ids.data_ptr(), g.data_ptr(), dtype_of(g.dtype), *_sizes(g), padding_idx)
    compiled().embedding_norm_sq(*described, out.data_ptr(), torch.get_num_threads())
    return out


@register(embedding_clip_sum, "indices", "backprops", "coef")
def _embedding_clip_sum(
    indices: Tensor, backprops: Tensor, coef: Tensor, num_embeddings: int, padding_idx: int | None = None
) -> Tensor:
    ids, g, factors = plain(indices.long()), plain(backprops), plain(coef)
    out = torch.empty(num_embeddings, g.shape[-1], dtype=sum_dtype(g), device=CPU)
    compiled().embedding_clip_sum(
        *(ids.data_ptr(), g.data_ptr(), dtype_of(g.dtype), *_sizes(g), padding_idx),
        *(factors.data_ptr(), dtype_of(factors.dtype), num_embeddings, out.data_ptr(), torch.get_num_threads()),
    )
    return out


def _layer(activations: Tensor, backprops: Tensor) -> tuple[Tensor, Tensor, tuple[Any, ...]]:
    """Both as the narrowest type that holds the values of either, and what a kernel is told of them.

    Channels may lie before the positions, as they do where a convolution's output is normalised.
    """
    dtype = torch.promote_types(activations.dtype, backprops.dtype)
    a, g, sizes = activations.to(dtype), backprops.to(dtype), _sizes(backprops)
    first = a.dim() > 2 and not a.is_contiguous() and a.movedim(-1, 1).is_contiguous()
    a, g = (plain(x.movedim(-1, 1) if first else x) for x in (a, g))
    return a, g, (a.data_ptr(), g.data_ptr(), dtype_of(dtype), *sizes, first)


@register(scale_shift_norm_sq, "activations", "backprops")
def _scale_shift_norm_sq(activations: Tensor, backprops: Tensor, bias: bool = True) -> Tensor:
    _a, g, described = _layer(activations, backprops)
    out = torch.empty(len(g), dtype=torch.float32, device=CPU)
    compiled().scale_shift_norm_sq(*described, bias, out.data_ptr(), torch.get_num_threads())
    return out


@register(scale_shift_clip_sum, "activations", "backprops", "coef")
def _scale_shift_clip_sum(activations: Tensor, backprops: Tensor, coef: Tensor, bias: bool = True) -> ScaleShiftSum:
    _a, g, described = _layer(activations, backprops)
    factors = plain(coef)
    weight, shift = (torch.empty(backprops.shape[-1], dtype=sum_dtype(g), device=CPU) for _ in range(2))
    compiled().scale_shift_clip_sum(
        *(*described, factors.data_ptr(), dtype_of(factors.dtype)),
        *(weight.data_ptr(), shift.data_ptr() if bias else 0, torch.get_num_threads()),
    )
    return ScaleShiftSum(weight, shift if bias else None)
