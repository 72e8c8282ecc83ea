"""Directions of public gradients as combinations of them: their factors are kept, the directions never made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from adamix_kernels.nn.errors import PrivacyError
from adamix_kernels.nn.factors import Factors
from adamix_kernels.nn.inner_products import inner_products, weighted_sum
from adamix_kernels.nn.parameter import PrivateParameter
from adamix_kernels.nn.report import held
from adamix_kernels.ops.subspace import directions

Parts = dict[tuple[str, ...], Factors]  # by the names of the parameters


@dataclass(frozen=True)
class Group:
    """Parameters that are clipped as one: of a layer, or of the whole model if `layer` is None."""

    layer: str | None
    projected: bool


@dataclass
class Basis:
    """Public rows of one group, some at a time, and the combinations M of their gradients that are the directions."""

    chunks: list[Parts] = field(default_factory=list)
    scales: list[Tensor] = field(default_factory=list)  # [N] each: what the loss multiplies the gradients with
    matrix: Tensor = field(default_factory=lambda: torch.zeros(0, 0, dtype=torch.float64))  # M, [k, N]
    energy: float = 0.0
    usable: Tensor = field(
        default_factory=lambda: torch.zeros(0, dtype=torch.bool)
    )  # [N] rows whose gradient is finite
    norm_sq: Tensor = field(default_factory=lambda: torch.zeros(0))  # [N] of the usable rows' own coordinates

    def compute(self, rank: int | None, energy: float | None) -> None:
        gram = torch.cat([torch.cat([between(x, y) for y in self.chunks], 1) for x in self.chunks])
        scale = torch.cat(self.scales).to(gram.device)
        gram = gram / (scale[:, None] * scale)
        double = all(x.dtype == torch.float64 for parts in self.chunks for f in parts.values() for x in floats(f))
        found, self.energy = directions(gram, rank, energy, double)
        coordinates = found @ gram.nan_to_num(0.0, 0.0, 0.0)
        self.usable = gram.diagonal().isfinite()
        self.norm_sq = coordinates.square().sum(0)[self.usable]
        self.matrix = found / scale

    def coordinates(self, parts: Parts, samples: int) -> Tensor:
        """`[B, k]` float64."""
        total = self.matrix.new_zeros(len(self.matrix), samples)
        usable = self._by_chunk(self.usable[None])
        for chunk, matrix, (own,) in zip(self.chunks, self._by_chunk(self.matrix), usable, strict=True):
            products = between(chunk, parts).to(total.device)
            total += matrix @ products.where(own[:, None], 0.0)  # 0 times Inf would make every sample NaN
        return total.T

    def lift(self, coordinates: Tensor) -> dict[str, Tensor]:
        """Gradients by parameter of coordinates `[k]`."""
        grads: dict[str, Tensor] = {}
        weights = (coordinates.double() @ self.matrix)[None]
        for chunk, (weight,) in zip(self.chunks, self._by_chunk(weights), strict=True):
            for names, part in chunk.items():
                for name, grad in zip(names, weighted_sum(part, weight), strict=True):
                    grads[name] = grads[name].add_(grad) if name in grads else grad
        return grads

    def _by_chunk(self, x: Tensor) -> Sequence[Tensor]:
        return x.split([len(scale) for scale in self.scales], dim=1)


def names_of(parameters: Sequence[PrivateParameter]) -> tuple[str, ...]:
    return tuple(p._dp_name for p in parameters)


def floats(part: Factors) -> list[Tensor]:
    return [x for x in held(part) if x.is_floating_point()]


def between(own: Parts, other: Parts) -> Tensor:
    """`[N, M]`: inner products over all parameters; gradients of those that one side lacks are 0."""
    known = {name: names for names in own for name in names}
    for names in other:
        for name in names:
            if known.get(name, names) != names:
                raise PrivacyError(
                    f"subspace: parameter {name!r} is used together with {names} in one backward pass, and with "
                    f"{known[name]} in that of the public rows; call the model on both in the same way"
                )
    (size,), (other_size,) = ({part.samples for part in side.values()} for side in (own, other))
    device = next(iter(floats(next(iter(own.values()))))).device
    total = torch.zeros(size, other_size, dtype=torch.float64, device=device)
    for names, part in own.items():
        if names in other:
            total += inner_products(part, other[names])
    return total
