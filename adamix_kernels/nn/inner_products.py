"""Inner products and weighted sums of per-sample gradients as the engine has them, without making all of them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from adamix_kernels.nn.combine import TiedFactors
from adamix_kernels.nn.factors import (
    ConvFactors,
    EmbeddingFactors,
    Factors,
    LinearFactors,
    PerSample,
    StackedFactors,
)
from adamix_kernels.nn.report import held
from adamix_kernels.ops._factored import blocks, positions_axis
from adamix_kernels.ops._numerics import sum_dtype
from adamix_kernels.ops.gram import grad_gram
from adamix_kernels.ops.gram_layers import embedding_gram, linear_gram


def inner_products(own: Factors, other: Factors) -> Tensor:
    """`[N, M]` float64: of the gradients of N samples with those of M others, of the same parameters."""
    if isinstance(own, LinearFactors) and isinstance(other, LinearFactors) and own.transposed == other.transposed:
        return linear_gram(own.activations, own.backprops, other.activations, other.backprops, own.bias)
    if isinstance(own, EmbeddingFactors) and isinstance(other, EmbeddingFactors):
        return embedding_gram(own.indices, own.backprops, other.indices, other.backprops, own.padding_idx)
    if isinstance(own, TiedFactors) and isinstance(other, TiedFactors):
        apart = inner_products(own.linear, other.linear) + inner_products(own.embedding, other.embedding)
        return apart + _tied(own.linear, other.embedding) + _tied(other.linear, own.embedding).T
    if isinstance(own, PerSample) and isinstance(other, PerSample):
        return grad_gram(own.grads, other.grads)
    pairs = _slices(own, other)
    if pairs is not None:
        return torch.stack([inner_products(*pair) for pair in pairs]).sum(0)
    return _by_rows(own, other)


def _slices(own: Factors, other: Factors) -> list[tuple[Factors, Factors]] | None:
    """The same in parts of the parameters, of which each is small enough to be made for all samples."""
    if isinstance(own, StackedFactors) and isinstance(other, StackedFactors):
        if len(own.slices) == len(other.slices):
            return list(zip(own.slices, other.slices, strict=True))
    elif isinstance(own, ConvFactors) and isinstance(other, ConvFactors) and own.shape["groups"] == 1:
        size = (own.samples + other.samples) * own.activations.shape[1] * own.kernel
        channels = list(blocks(own.backprops.shape[1], size))
        if len(channels) > 1:
            return [(_channels(own, o), _channels(other, o)) for o in channels]
    return None


def _channels(conv: ConvFactors, o: slice) -> ConvFactors:
    return dataclasses.replace(conv, backprops=conv.backprops[:, o])


def _by_rows(own: Factors, other: Factors) -> Tensor:
    """For some samples at a time: at least one gradient of either side is made whole."""
    size = max(1, sum(math.prod(x.shape[1:]) for x in _rows(own, slice(0, 1)).grad_sample()))
    parts = []
    for i in blocks(own.samples, 2 * size):
        x = _rows(own, i).grad_sample()
        parts.append([grad_gram(x, _rows(other, j).grad_sample()) for j in blocks(other.samples, 2 * size)])
    return torch.cat([torch.cat(row, 1) for row in parts])


def _tied(linear: LinearFactors, lookup: EmbeddingFactors) -> Tensor:
    """`[N, M]`: of gradients sum_t g_t a_t^T of a table with those that are e_s in row id_s."""
    a, g = positions_axis(linear.activations), positions_axis(linear.backprops)
    e, ids = positions_axis(lookup.backprops), lookup.indices.flatten(1).long()
    if lookup.padding_idx is not None:
        e = e.where((ids != lookup.padding_idx)[..., None], 0.0)
    kind = sum_dtype(a, g, e)
    total = torch.zeros(len(a), len(e), dtype=torch.float64, device=a.device)
    for i in blocks(len(a), 2 * a.shape[1] * ids.numel()):
        for j in blocks(len(e), 2 * a.shape[1] * ids.shape[1]):
            pairs = a[i].flatten(0, 1).to(kind) @ e[j].flatten(0, 1).to(kind).T
            pairs = pairs * g[i].flatten(0, 1)[:, ids[j].flatten()]  # [n T, m S]
            shaped = pairs.view(len(a[i]), a.shape[1], len(e[j]), ids.shape[1])
            total[i, j] = shaped.sum((1, 3), dtype=torch.float64)
    return total


def weighted_sum(factors: Factors, weights: Tensor) -> list[Tensor]:
    """For each parameter the sum over samples of `weights[b]`, which may be negative, times its gradient."""
    largest = weights.abs().max() if len(weights) else weights.new_zeros(())
    scale = largest.where(largest > 0, 1.0)  # factors of the ops are in [0, 1]
    coef = (weights.abs() / scale).to(sum_dtype(*(x for x in held(factors) if x.is_floating_point())))
    signs = weights.sign()

    def signed(name: str, x: Tensor) -> Tensor:
        if name not in ("backprops", "grads"):
            return x
        return x * signs.to(x.dtype).reshape(-1, *[1] * (x.dim() - 1))

    return [total.mul_(scale.to(total.dtype)) for total in _changed(factors, signed).clip_sum(coef)]


def copied(factors: Factors, copies: dict[Any, Tensor]) -> Factors:
    """The same in memory of its own, which nothing writes to later; `copies` are of tensors that were met before."""

    def copy(_: str, x: Tensor) -> Tensor:
        key = x.data_ptr(), x.shape, x.stride(), x.dtype, x._version
        if not x.numel() or key not in copies:
            copies[key if x.numel() else (len(copies),)] = x = x.clone(memory_format=torch.contiguous_format)
            return x
        return copies[key]

    return _changed(factors, copy)


def _rows(factors: Factors, b: slice) -> Factors:
    return _changed(factors, lambda _, x: x[b])


def _changed(factors: Any, change: Callable[[str, Tensor], Tensor]) -> Any:
    """With each tensor, `[B, *]`, replaced."""

    def one(name: str, value: Any) -> Any:
        if isinstance(value, Tensor):
            return change(name, value)
        if dataclasses.is_dataclass(value):
            return _changed(value, change)
        if isinstance(value, Sequence) and any(isinstance(x, Tensor) or dataclasses.is_dataclass(x) for x in value):
            return [one(name, x) for x in value]
        return value

    return dataclasses.replace(
        factors, **{f.name: one(f.name, getattr(factors, f.name)) for f in dataclasses.fields(factors)}
    )
