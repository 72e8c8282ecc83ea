"""A layer, or the whole model, all of whose gradients have come: its samples are clipped as one, and summed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from adamix_kernels.nn.factors import ConvFactors
from adamix_kernels.nn.parameter import PrivateParameter

if TYPE_CHECKING:
    from adamix_kernels.nn.engine import DPEngine
    from adamix_kernels.nn.passes import Record


def clip(engine: DPEngine, parts: list[Record], layer: str | None) -> Tensor:
    """Sum gradients, clipped as one by the threshold of a layer or the whole; the squared norms `[B]` of private
    rows."""
    sums, subspace = engine._sums, engine._subspace
    if subspace is not None:
        return subspace.take(parts, layer)
    take_public(engine, parts, layer)
    if sums.users is not None:
        parts = sums.users.summed(parts)
    if sums.grid is not None:
        return sums.grid.clip(parts, layer)
    joined = _take_last(engine, parts)
    norm_sq = [factors.norm_sq() for _, factors in parts]
    if joined is None:
        total = total_norm_sq(norm_sq)
    else:
        parameters, conv = joined
        total, clipped = conv.norm_clip_sum(norm_sq, sums.limit(conv.samples, layer))
        for parameter, clipped_sum in zip(parameters, clipped, strict=True):
            sums.add(parameter, clipped_sum.div_(sums.divided(conv.samples)), layer)
        del joined, conv
    if parts:
        coef = sums.released(sums.coef(total, layer))
    while parts:  # each is freed when it is summed
        add_clipped(engine, [parts.pop()], coef, layer)
    return total


def take_public(engine: DPEngine, parts: list[Record], layer: str | None) -> None:
    """Of a mixed batch: the public rows set the threshold where it is due, and are summed; `parts` lose them."""
    sums = engine._sums
    split = sums.split
    if split is None:
        return
    public = [factors.take(split.public) for _, factors in parts]
    if sums.wants_norms(layer):
        sums.set_threshold(total_norm_sq([factors.norm_sq() for factors in public]), layer)
    for i, (parameters, factors) in enumerate(parts):
        if split.count and split.weight:
            exact = public[i].clip_sum(sums.public_coef(parameters[0]))
            for parameter, total in zip(parameters, exact, strict=True):
                sums.add_public(parameter._dp_name, total)
        parts[i] = parameters, factors.take(split.private)


def _take_last(engine: DPEngine, parts: list[Record]) -> tuple[tuple[PrivateParameter, ...], ConvFactors] | None:
    """The costliest convolution: with the norms of all else its own and its sum are made in one pass."""
    convs = [(use.products, i) for i, (_, use) in enumerate(parts) if isinstance(use, ConvFactors)]
    if not convs or engine.clipping != "flat":
        return None
    parameters, conv = parts.pop(max(convs)[1])
    assert isinstance(conv, ConvFactors)
    return parameters, conv


def add_clipped(engine: DPEngine, parts: Sequence[Record], coef: Tensor, layer: str | None) -> None:
    """To the sums of a step, with coefficients `[B]`."""
    for parameters, factors in parts:
        for parameter, total in zip(parameters, factors.clip_sum(coef), strict=True):
            engine._sums.add(parameter, total, layer)


def total_norm_sq(norm_sq: Sequence[Tensor]) -> Tensor:
    """Squared norms `[B]` of parts as one, in float64."""
    return torch.stack(list(norm_sq)).sum(0, dtype=torch.float64) if len(norm_sq) > 1 else norm_sq[0].double()
