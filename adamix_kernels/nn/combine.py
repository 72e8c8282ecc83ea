"""Several uses of the same parameters: a module called twice, an embedding tied to the last layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from adamix_kernels.nn.factors import EmbeddingFactors, Factors, LinearFactors, PerSample, StackedFactors, Taken
from adamix_kernels.nn.parameter import PrivateParameter
from adamix_kernels.ops._factored import blocks, own_error, positions_axis, sum_error
from adamix_kernels.ops._numerics import round_up

Record = tuple[tuple[PrivateParameter, ...], Factors]


def combine(records: Sequence[Record]) -> list[Record]:
    """The same gradients, each parameter in one record only: the norm is that of the sum over its uses."""
    part_of: dict[int, list[Record]] = {}  # by parameter: the records that it joins, the same list for all of them
    for record in records:
        joined = {id(part): part for p in record[0] if (part := part_of.get(id(p))) is not None}
        part = [*(earlier for part in joined.values() for earlier in part), record]
        part_of.update((id(p), part) for ps, _ in part for p in ps)
    parts = {id(part): part for part in part_of.values()}
    return [part[0] if len(part) == 1 else _join(part) for part in parts.values()]


def gathered(records: Sequence[Record]) -> list[Record]:
    """The same, with all gradients that are there in one record: one call of an op instead of many."""
    there = [(ps, use) for ps, use in records if isinstance(use, PerSample)]
    if len(there) < 2:
        return list(records)
    others = [record for record in records if not isinstance(record[1], PerSample)]
    parameters, uses = zip(*there, strict=True)
    return [*others, (tuple(p for ps in parameters for p in ps), PerSample([g for use in uses for g in use.grads]))]


def _join(part: Sequence[Record]) -> Record:
    parameters = {id(p): p for ps, _ in part for p in ps}
    uses = [factors for _, factors in part]
    if all([id(p) for p in ps] == list(parameters) for ps, _ in part):
        joined = _longer(uses)
        if joined is not None:
            return tuple(parameters.values()), joined
    tied = _tied(part)
    if tied is not None:
        return tied
    sums: dict[int, Tensor] = {}
    for ps, factors in part:
        for p, grads in zip(ps, factors.grad_sample(), strict=True):
            sums[id(p)] = sums[id(p)] + grads if id(p) in sums else grads
    return tuple(parameters.values()), PerSample([sums[key] for key in parameters])


def _longer(uses: Sequence[Factors]) -> Factors | None:
    """Uses of one kind as one use of more positions."""
    first = uses[0]
    if isinstance(first, LinearFactors) and all(isinstance(use, LinearFactors) for use in uses):
        linear = [use for use in uses if isinstance(use, LinearFactors)]
        if all((use.bias, use.transposed) == (first.bias, first.transposed) for use in linear):
            a = torch.cat([positions_axis(use.activations) for use in linear], 1)
            g = torch.cat([positions_axis(use.backprops) for use in linear], 1)
            return LinearFactors(a, g, first.bias, first.transposed)
    if isinstance(first, EmbeddingFactors) and all(isinstance(use, EmbeddingFactors) for use in uses):
        lookups = [use for use in uses if isinstance(use, EmbeddingFactors)]
        if all(use.padding_idx == first.padding_idx for use in lookups):
            ids = torch.cat([use.indices.flatten(1).long() for use in lookups], 1)
            g = torch.cat([positions_axis(use.backprops) for use in lookups], 1)
            return EmbeddingFactors(ids, g, first.num_embeddings, first.padding_idx)
    if isinstance(first, StackedFactors) and all(isinstance(use, StackedFactors) for use in uses):
        return _longer_slices([use for use in uses if isinstance(use, StackedFactors)])
    return None


def _longer_slices(uses: Sequence[StackedFactors]) -> Factors | None:
    """Where all of them are cut at the same rows."""
    cuts = [[part.backprops.shape[-1] for part in use.slices if isinstance(part, LinearFactors)] for use in uses]
    if any(cut != cuts[0] or len(cut) != len(use.slices) for cut, use in zip(cuts, uses, strict=True)):
        return None
    slices = [_longer(parts) for parts in zip(*(use.slices for use in uses), strict=True)]
    whole = [part for part in slices if part is not None]
    return StackedFactors(whole) if len(whole) == len(slices) else None


def _tied(part: Sequence[Record]) -> Record | None:
    """An embedding and a linear layer, perhaps with a bias, that share the weight `[V, D]`."""
    linear = [(ps, use) for ps, use in part if isinstance(use, LinearFactors) and not use.transposed]
    lookups = [(ps, use) for ps, use in part if isinstance(use, EmbeddingFactors)]
    if len(part) != len(linear) + len(lookups) or not linear or not lookups:
        return None
    head = linear[0] if len(linear) == 1 else _join(linear)
    table = lookups[0] if len(lookups) == 1 else _join(lookups)
    if not isinstance(head[1], LinearFactors) or not isinstance(table[1], EmbeddingFactors):
        return None
    return head[0], TiedFactors(head[1], table[1])


@dataclass
class TiedFactors(Taken):
    """Gradients L + E of a weight `[V, D]` that is a linear layer's and an embedding's."""

    linear: LinearFactors
    embedding: EmbeddingFactors

    @property
    def samples(self) -> int:
        return self.linear.samples

    def norm_sq(self) -> Tensor:
        """|L|^2 + |E|^2 + 2 <L, E>, each rounded up, and room for the rounding of both sums, as `linear_norm_sq`.

        <L, E> adds (h_t . e_s) g_t[id_s] over the positions t of the layer, s of the embedding; in float64 each product
        errs by less than (D + 2) 2^-53 |h_t| |e_s| |g_t|, and their sum by one part in 2^53 for each of them.
        """
        own = self.linear.norm_sq().double() + self.embedding.norm_sq().double()
        parts = [self._cross(b) for b in blocks(self.samples, self._unit())]
        cross, length_linear, length_lookup = (torch.cat(part) for part in zip(*parts, strict=True))
        (t, width), s = positions_axis(self.linear.activations).shape[1:], self.embedding.indices[:1].numel()
        total = own + 2 * cross + (width + t * s + 8) * 2.0**-51 * length_linear * length_lookup
        room = sum_error(length_linear, t, self.linear.backprops.dtype) + 2 * own_error(length_lookup, s)
        return round_up((total.clamp(min=0).sqrt() + room).square(), terms=16).where(own.isfinite(), torch.inf)

    def _unit(self) -> int:
        h, e = positions_axis(self.linear.activations), positions_axis(self.embedding.backprops)
        return h.shape[1] * (e.shape[1] + h.shape[2] + 1) + e.shape[1] * e.shape[2]

    def _cross(self, b: slice) -> tuple[Tensor, Tensor, Tensor]:
        h = positions_axis(self.linear.activations)[b].double()
        g = positions_axis(self.linear.backprops)[b]
        e = positions_axis(self.embedding.backprops)[b].double()
        ids = self.embedding.indices[b].flatten(1).long()
        if self.embedding.padding_idx is not None:
            e = e.where((ids != self.embedding.padding_idx)[..., None], 0.0)
        picked = g.gather(2, ids[:, None].expand(-1, g.shape[1], -1)).double()  # [B, T, S]
        cross = (torch.bmm(h, e.mT) * picked).sum((1, 2))
        size = torch.linalg.vector_norm(g, dim=2, dtype=torch.float64)
        linear = (h.norm(dim=2).square() + self.linear.bias).sqrt() * size
        return cross, linear.sum(1), e.norm(dim=2).sum(1)

    def clip_sum(self, coef: Tensor) -> list[Tensor]:
        sums = self.linear.clip_sum(coef)
        sums[0] += self.embedding.clip_sum(coef)[0]
        return sums

    def grad_sample(self) -> list[Tensor]:
        grads = self.linear.grad_sample()
        return [grads[0] + self.embedding.grad_sample()[0], *grads[1:]]
