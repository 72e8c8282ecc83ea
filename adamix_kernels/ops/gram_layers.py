"""Inner products of the per-sample gradients of linear layers and embeddings, which are never stored whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Generator, Tensor

from adamix_kernels.ops._cases import randn, with_bad_rows
from adamix_kernels.ops._factored import check_flags, positions_axis
from adamix_kernels.ops._numerics import rows, sum_dtype
from adamix_kernels.ops.gram import Side, entry_products, finished, position_products, products_oracle, row_products
from adamix_kernels.spec import Case, Cost, Out, define_op

#: What method "auto" goes by, measured on the CPU (one thread, AVX-512, float32; other devices run the same reference,
#: not measured): a pair of positions also costs what so many multiply-additions do, for its two products are written,
#: multiplied and added; what is made of a gradient's entries is written and read, and runs at 1 / 1.7 of the speed.
_PAIR, _ENTRY = 64, 1.7


def _check_pair(positions: dict[str, tuple[Tensor, Tensor]]) -> None:
    for name, (x, g) in positions.items():
        if x.shape[1:] != g.shape[1:-1]:
            raise ValueError(
                f"{name}: has positions {list(g.shape[1:-1])}; pass {list(x.shape[1:])} as its activations or indices"
            )


def _check_linear(
    activations: Tensor, backprops: Tensor, other_activations: Tensor, other_backprops: Tensor, bias: bool, method: str
) -> None:
    check_flags(bias, method)
    pairs = {"backprops": (activations, backprops), "other_backprops": (other_activations, other_backprops)}
    _check_pair({name: (a[..., 0] if a.shape[-1] else a.sum(-1), g) for name, (a, g) in pairs.items()})


def _linear_grads(a: Tensor, g: Tensor, bias: bool) -> list[Tensor]:
    a, g = positions_axis(a), positions_axis(g)
    return (
        [torch.stack([y.T @ x for x, y in zip(a, g, strict=True)]), g.sum(1)][: 1 + bias]
        if len(a)
        else [a.new_zeros(0, g.shape[2] * a.shape[2])]
    )


def _linear_oracle(
    activations: Tensor, backprops: Tensor, other_activations: Tensor, other_backprops: Tensor, bias: bool, method: str
) -> Tensor:
    pair = [
        _linear_grads(a, g, bias and len(activations) > 0 and len(other_activations) > 0)
        for a, g in ((activations, backprops), (other_activations, other_backprops))
    ]
    total = products_oracle(*pair)
    bad = [
        ~(rows(a).isfinite().all(1) & rows(g).isfinite().all(1))
        for a, g in ((activations, backprops), (other_activations, other_backprops))
    ]
    return total.masked_fill(bad[0][:, None] | bad[1], torch.inf)


def _linear_cases() -> list[Case]:
    def case(
        name: str,
        own: tuple[int, ...],
        other: tuple[int, ...],
        inner: int,
        outer: int,
        change: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = lambda a, g: (a, g),
        strided: bool = False,
    ) -> list[Case]:
        def made(bias: bool, method: str) -> Case:
            def build(g: Generator) -> dict[str, Any]:
                a, b = change(randn(g, *own, inner), randn(g, *own, outer))
                x, y = randn(g, *other, inner), randn(g, *other, outer)
                named = {"activations": a, "backprops": b, "other_activations": x, "other_backprops": y}
                return {**named, "bias": bias, "method": method}

            return Case(f"{name}, {method}{', bias' * bias}", build, strided)

        return [made(False, "auto"), made(True, "gram"), made(True, "direct")]

    shrunk = torch.tensor([1e12, 1e-12, 1.0, 0.0], dtype=torch.float64)[:, None, None]
    return [
        *case("plain", (6, 3), (4, 3), 11, 6),
        *case("no position axis", (5,), (7,), 33, 10),
        *case("one position", (5, 1), (2, 1), 4, 3),
        *case("other positions", (4, 9), (3, 5), 6, 7),
        *case("two position axes", (3, 4, 5), (2, 6), 6, 7),
        *case("no positions", (3, 0), (2, 0), 4, 3),
        *case("no own sample", (0, 3), (2, 3), 4, 3),
        *case("no other sample", (2, 3), (0, 3), 4, 3),
        *case("no inputs", (3, 4), (2, 4), 0, 3),
        *case("no outputs", (3, 4), (2, 4), 3, 0),
        *case("many positions", (3, 70), (2, 70), 13, 12),
        *case("strided", (4, 5), (3, 5), 6, 7, strided=True),
        *case("magnitudes", (4, 3), (3, 3), 6, 5, lambda a, g: (a * shrunk, g * shrunk.flip(0))),
        *case("nan and inf activations", (5, 3), (3, 3), 6, 5, lambda a, g: (with_bad_rows(a), g)),
        *case("nan and inf backprops", (5, 3), (3, 3), 6, 5, lambda a, g: (a, with_bad_rows(g))),
    ]


def by_gram(own: tuple[int, int], other: tuple[int, int], inner: int, outer: int, alike: bool = False) -> bool:
    """Whether positions with positions are cheaper than the gradients; sides are (samples, positions)."""
    (samples, positions), (others, other_positions) = own, other
    made = samples * positions + (0 if alike else others * other_positions)
    direct = (made + samples * others) * inner * outer
    return samples * others * positions * other_positions * (inner + outer + _PAIR) < _ENTRY * direct


def _linear_cost(activations: Tensor, backprops: Tensor, other_activations: Tensor, **_: Any) -> Cost:
    a, b = positions_axis(activations), positions_axis(other_activations)
    inner, outer = a.shape[2], backprops.shape[-1]
    gram = len(a) * len(b) * a.shape[1] * b.shape[1] * (inner + outer)
    direct = (len(a) * a.shape[1] + len(b) * b.shape[1] + len(a) * len(b)) * inner * outer
    size = sum(len(x) * x.shape[1] for x in (a, b)) * (inner + outer) * a.element_size()
    return Cost(size + 8 * len(a) * len(b), 2 * min(gram, direct))


@define_op(
    shapes={
        "activations": "N ... I",
        "backprops": "N ... O",
        "other_activations": "M ... I",
        "other_backprops": "M ... O",
    },
    returns=[Out("gram", "N M", rtol=1e-5, of_max=True)],
    oracle=_linear_oracle,
    cases=_linear_cases,
    cost=_linear_cost,
    validate=_check_linear,
)
def linear_gram(
    activations: Tensor,
    backprops: Tensor,
    other_activations: Tensor,
    other_backprops: Tensor,
    bias: bool = False,
    method: str = "auto",
) -> Tensor:
    """Inner products of a linear layer's per-sample gradients with those of other samples, without storing them.

    Args:
        activations: the layer's inputs `[N, *, I]`, where `*` are positions that share the weight.
        backprops: gradients with respect to its outputs `[N, *, O]`.
        other_activations: of the other samples `[M, *, I]`; their positions may be others.
        other_backprops: `[M, *, O]`.
        bias: whether the layer has a trainable bias; its gradient is part of the products.
        method: "gram" multiplies positions with positions, sum over t, s of (a_t . b_s) (g_t . h_s); "direct" makes
            the gradients of all samples for some outputs at a time; "auto" takes the cheaper. Temporaries of both are
            bounded, by 128 MiB in float64.

    Returns:
        `[N, M]` float64, of products in float32 (float64 for float64 inputs); exactly symmetric if the others are the
        same tensors. Inf for a sample whose factors hold a NaN or Inf. It bounds no sensitivity: clip what is made of
        it.

    Raises:
        TypeError, ValueError: names the argument that does not fit, what was given and what to pass.

    Source: Gram form of PCA (Golatkar et al. 2022, arXiv 2203.11481, section 4), by the factors of Goodfellow 2015
    (arXiv 1510.01799).
    """
    a, g = positions_axis(activations), positions_axis(backprops)
    b, h = positions_axis(other_activations), positions_axis(other_backprops)
    alike = other_activations is activations and other_backprops is backprops
    kind = sum_dtype(a, g, b, h)
    own = Side.of(a, g, kind=kind)
    other = own if alike else Side.of(b, h, kind=kind)
    gram = by_gram((len(a), a.shape[1]), (len(b), b.shape[1]), a.shape[2], g.shape[2], alike)
    total = (position_products if method == "gram" or (method == "auto" and gram) else entry_products)(own, other)
    if bias:
        total += row_products(g.sum(1, dtype=kind), h.sum(1, dtype=kind))
    return finished(total, alike)


# --- embeddings ------------------------------------------------------------------------------------------------------


def _check_embedding(
    indices: Tensor, backprops: Tensor, other_indices: Tensor, other_backprops: Tensor, padding_idx: int | None
) -> None:
    _check_pair({"backprops": (indices, backprops), "other_backprops": (other_indices, other_backprops)})
    if padding_idx is not None and (type(padding_idx) is not int or not 0 <= padding_idx < 2**63):
        raise ValueError(f"padding_idx is {padding_idx!r}; pass an int in [0, 2^63), or None")


def _table_grads(indices: Tensor, backprops: Tensor, padding_idx: int | None) -> Tensor:
    ids, g = positions_axis(indices[..., None])[..., 0], positions_axis(backprops)
    grads = torch.zeros(len(ids), 5, g.shape[2], dtype=torch.float64)
    for b in range(len(ids)):
        for t, i in enumerate(ids[b].tolist()):
            if i != padding_idx:
                grads[b, i] += g[b, t]
    return grads


def _embedding_cases() -> list[Case]:
    def case(name: str, own: tuple[int, ...], other: tuple[int, ...], padding: int | None = None, **how: Any) -> Case:
        change, strided = how.get("change", lambda x: x), how.get("strided", False)

        def build(g: Generator) -> dict[str, Any]:
            made: dict[str, Any] = {"padding_idx": padding}
            for prefix, shape in (("", own), ("other_", other)):
                ids = torch.randint(how.get("ids", 5), shape[:-1], generator=g, dtype=how.get("dtype", torch.int64))
                grads = randn(g, *shape) if prefix else change(randn(g, *shape))
                if padding is not None:
                    grads = grads.masked_fill((ids == padding)[..., None], torch.nan)
                made |= {f"{prefix}indices": ids, f"{prefix}backprops": grads}
            return made

        return Case(name, build, strided)

    return [
        case("duplicates", (6, 9, 7), (4, 5, 7)),
        case("one id", (3, 33, 4), (2, 8, 4), ids=1),
        case("padding", (4, 12, 6), (3, 12, 6), padding=2),
        case("no position axis", (7, 10), (3, 10)),
        case("two position axes", (3, 4, 5, 6), (2, 3, 6)),
        case("no positions", (3, 0, 4), (2, 0, 4)),
        case("no other sample", (3, 5, 4), (0, 5, 4)),
        case("int32", (4, 6, 5), (2, 6, 5), dtype=torch.int32),
        case("strided", (4, 6, 5), (3, 6, 5), strided=True),
        case("nan and inf rows", (5, 6, 4), (3, 6, 4), change=with_bad_rows),
    ]


@define_op(
    shapes={
        "indices": "int:N ...",
        "backprops": "N ... D",
        "other_indices": "int:M ...",
        "other_backprops": "M ... D",
    },
    returns=[Out("gram", "N M", rtol=1e-5, of_max=True)],
    oracle=lambda indices, backprops, other_indices, other_backprops, padding_idx: products_oracle(
        [_table_grads(indices, backprops, padding_idx)], [_table_grads(other_indices, other_backprops, padding_idx)]
    ),
    cases=_embedding_cases,
    cost=lambda indices, backprops, other_indices, other_backprops, padding_idx: Cost(
        sum(x.numel() * x.element_size() for x in (indices, backprops, other_indices, other_backprops)),
        2 * backprops.numel() * other_indices.numel(),
    ),
    validate=_check_embedding,
)
def embedding_gram(
    indices: Tensor,
    backprops: Tensor,
    other_indices: Tensor,
    other_backprops: Tensor,
    padding_idx: int | None = None,
) -> Tensor:
    """Inner products of an embedding's per-sample gradients with those of other samples, without storing them.

    Args:
        indices: ids `[N, *]`, int64 or int32.
        backprops: gradients with respect to the embedding's outputs `[N, *, D]`.
        other_indices: of the other samples `[M, *]`; their positions may be others.
        other_backprops: `[M, *, D]`.
        padding_idx: the id that is not trained; its positions are left out.

    Returns:
        `[N, M]` float64, as `linear_gram`.

    Raises:
        TypeError, ValueError: names the argument that does not fit, what was given and what to pass.
    """
    alike = other_indices is indices and other_backprops is backprops
    kind = sum_dtype(backprops, other_backprops)
    ids = [positions_axis(x[..., None])[..., 0].long() for x in (indices, other_indices)]
    grads = [positions_axis(x) for x in (backprops, other_backprops)]
    if padding_idx is not None:
        grads = [g.where((own != padding_idx)[..., None], 0.0) for own, g in zip(ids, grads, strict=True)]
    sides = [Side.of(g, kind=kind) for g in grads]
    return finished(position_products(sides[0], sides[1], (ids[0], ids[1])), alike)
