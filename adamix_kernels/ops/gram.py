"""Inner products of per-sample gradients: of stored ones, and of layers whose gradients are never stored whole.

They are what a subspace of public gradients needs: its basis U is a combination of the N public gradients, so that
coordinates U g are a combination of inner products with them, and lifting is a weighted sum of them. U, of rank times
parameters numbers, is never made.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor

from adamix_kernels.ops._cases import randn, with_bad_rows
from adamix_kernels.ops._factored import blocks
from adamix_kernels.ops._numerics import as_list, rows, sum_dtype
from adamix_kernels.spec import Case, Cost, Out, define_op


def _scaled(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows over their largest entry, so that products stay in range, and that entry `[N]` float64.

    It is Inf, and the row 0, where an entry is not finite.
    """
    wide = rows(x).to(sum_dtype(x))
    largest = wide.abs().amax(1).double() if wide.shape[1] else wide.new_zeros(len(wide), dtype=torch.float64)
    finite = largest.isfinite()
    scale = largest.where(largest > 0, 1.0).where(finite, 1.0)
    return (wide / scale.to(wide.dtype)[:, None]).where(finite[:, None], 0.0), scale.where(finite, torch.inf)


def _unscaled(products: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Products of rows with these scales, float64; Inf where one is."""
    scale = x[:, None] * y
    return (products.double() * scale).where(scale.isfinite(), torch.inf)


def row_products(x: Tensor, y: Tensor) -> Tensor:
    """Float64 `[N, M]`: inner products of the rows of `[N, *]` and `[M, *]`, Inf for rows that are not finite."""
    own, own_scale = _scaled(x)
    other, other_scale = (own, own_scale) if y is x else _scaled(y)
    return _unscaled(own @ other.T, own_scale, other_scale)


def finished(total: Tensor, alike: bool) -> Tensor:
    """Exactly symmetric if both sides are the same; where products on the way overflow, Inf."""
    total = total.nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=torch.inf)
    return (total + total.T) / 2 if alike else total


def products_oracle(own: Sequence[Tensor], other: Sequence[Tensor]) -> Tensor:
    """One pair of samples at a time."""
    x, y = (torch.cat([rows(part) for part in parts], 1) for parts in (own, other))
    total = torch.zeros(len(x), len(y), dtype=torch.float64)
    for i in range(len(x)):
        for j in range(len(y)):
            total[i, j] = (x[i] * y[j]).sum() if x[i].isfinite().all() and y[j].isfinite().all() else torch.inf
    return total


# --- gradients that are there ----------------------------------------------------------------------------------------


def _check_grads(grad_sample: Tensor | Sequence[Tensor], other: Tensor | Sequence[Tensor]) -> None:
    own, others = as_list(grad_sample), as_list(other)
    for i in range(max(len(own), len(others))):
        shapes = [list(parts[i].shape[1:]) if i < len(parts) else None for parts in (others, own)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"other: its part {i} has gradients of shape {shapes[0]}; pass {shapes[1]} as in grad_sample"
            )


def _grad_cases() -> list[Case]:
    def case(
        name: str, own: int, other: int, *shapes: tuple[int, ...], change: Any = None, strided: bool = False
    ) -> Case:
        def build(g: Generator) -> dict[str, Any]:
            x, y = ([randn(g, size, *shape) for shape in shapes] for size in (own, other))
            if change is not None:
                x = [change(part) for part in x]
            return {"grad_sample": x, "other": y} if len(shapes) > 1 else {"grad_sample": x[0], "other": y[0]}

        return Case(name, build, strided)

    return [
        case("plain", 6, 4, (130,)),
        case("ragged list", 3, 5, (3, 5), (1,), (2, 3, 7), ()),
        case("no own sample", 0, 4, (9,)),
        case("no other sample", 4, 0, (9,)),
        case("no parameters", 3, 2, (0,)),
        case("one number", 3, 2, ()),
        case("strided", 5, 3, (4, 9), strided=True),
        case("magnitudes", 3, 2, (40,), change=lambda x: x * torch.tensor([[1e12], [1e-12], [0.0]])),
        case("nan and inf rows", 5, 3, (40,), change=with_bad_rows),
    ]


@define_op(
    shapes={"grad_sample": "N *[]", "other": "M *[]"},
    returns=[Out("gram", "N M", rtol=1e-5, of_max=True)],
    oracle=lambda grad_sample, other: products_oracle(as_list(grad_sample), as_list(other)),
    cases=_grad_cases,
    cost=lambda grad_sample, other: Cost(
        sum(x.numel() * x.element_size() for x in [*as_list(grad_sample), *as_list(other)]),
        2 * sum(x.numel() for x in as_list(grad_sample)) * len(as_list(other)[0]),
    ),
    validate=_check_grads,
)
def grad_gram(grad_sample: Tensor | Sequence[Tensor], other: Tensor | Sequence[Tensor]) -> Tensor:
    """Inner products of per-sample gradients with those of other samples.

    Args:
        grad_sample: `[N, *]`, or a list of such tensors, which is one vector for each sample.
        other: `[M, *]`, or a list, of the same shapes but for the number of samples.

    Returns:
        `[N, M]` float64, of products in float32 (float64 for float64 inputs); exactly symmetric if `other` is
        `grad_sample`. Inf for a sample that holds a NaN or Inf. It bounds no sensitivity.

    Raises:
        TypeError, ValueError: names the argument that does not fit, what was given and what to pass.
    """
    own, others = as_list(grad_sample), as_list(other)
    total = torch.zeros(len(own[0]), len(others[0]), dtype=torch.float64, device=own[0].device)
    for x, y in zip(own, others, strict=True):
        for c in blocks(rows(x).shape[1], len(x) + len(y)):
            part = rows(x)[:, c]
            total += row_products(part, part if y is x else rows(y)[:, c])
    return finished(total, other is grad_sample)


# --- factors ---------------------------------------------------------------------------------------------------------


@dataclass
class Side:
    """Factors `[N, T, *]` of one side, each sample over its largest entry, so that products stay in range."""

    factors: tuple[Tensor, ...]
    scale: Tensor  # [N] float64, by which the products of all factors are too small; Inf where one is not finite

    @classmethod
    def of(cls, *factors: Tensor, kind: torch.dtype) -> Side:
        scaled = [_scaled(x.to(kind)) for x in factors]
        scale = torch.stack([size for _, size in scaled]).prod(0)
        return cls(tuple(x.view(y.shape) for (x, _), y in zip(scaled, factors, strict=True)), scale)

    def unscaled(self, products: Tensor, other: Side) -> Tensor:
        return _unscaled(products, self.scale, other.scale)


def position_products(own: Side, other: Side, ids: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """From pairs of positions: the product of those of all factors, where ids `[N, T]` and `[M, S]` are equal."""
    (samples, positions), (others, other_positions) = (side.factors[0].shape[:2] for side in (own, other))
    total = own.scale.new_zeros(samples, others)
    for i in blocks(samples, 2 * positions * others * other_positions):
        for j in blocks(others, 2 * positions * other_positions):
            pairs = _pairs(own.factors[0][i], other.factors[0][j])
            for x, y in zip(own.factors[1:], other.factors[1:], strict=True):
                pairs *= _pairs(x[i], y[j])
            if ids is not None:
                pairs = pairs.where(ids[0][i].reshape(-1, 1) == ids[1][j].reshape(-1), 0.0)
            shaped = pairs.view(len(own.scale[i]), positions, len(other.scale[j]), other_positions)
            total[i, j] = shaped.sum((1, 3), dtype=torch.float64)
    return own.unscaled(total, other)


def _pairs(x: Tensor, y: Tensor) -> Tensor:
    """`[n T, m S]`: inner products of positions `[n, T, D]` and `[m, S, D]`."""
    return x.reshape(len(x) * x.shape[1], x.shape[2]) @ y.reshape(len(y) * y.shape[1], y.shape[2]).T


def entry_products(own: Side, other: Side) -> Tensor:
    """From the gradients' entries, made for some outputs at a time, of two factors: activations and backprops."""
    (a, g), (b, h) = own.factors, other.factors
    total = own.scale.new_zeros(len(a), len(b))
    room = 16 if g.device.type == "cpu" else 1  # there a part stays in the caches
    for o in blocks(g.shape[2], room * (len(a) + len(b)) * a.shape[2]):
        x = torch.bmm(g[..., o].mT, a).flatten(1)
        y = x if other is own else torch.bmm(h[..., o].mT, b).flatten(1)
        total += x @ y.T
    return own.unscaled(total, other)
