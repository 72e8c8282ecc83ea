"""Embedding layers: gradients of one id add up within a sample before they are squared or clipped."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Generator, Tensor

from adamix_kernels.ops._cases import randn, scaled_rows, with_bad_rows
from adamix_kernels.ops._factored import always, blocks, half_coef, layer_cost, own_error, positions_axis
from adamix_kernels.ops._numerics import round_up, sum_dtype
from adamix_kernels.ops.clip import clip_sum
from adamix_kernels.ops.norm import grad_norm_sq
from adamix_kernels.spec import Case, Cost, Out, define_op


def _sum_runs(key: Tensor, values: Tensor) -> Tensor:
    """Which rows end a run of equal keys `[B, T]`; their values `[B, T, D]` become, in place, the sum over the run.

    Doubling: after each step a row holds the sum of twice as many rows before it. No atomics, no host sync on a GPU.
    """
    step = 1
    while step < key.shape[1]:
        same = key[:, step:] == key[:, :-step]
        if same.device.type == "cpu" and not same.any():
            break
        values[:, step:] += values[:, :-step].where(same[..., None], 0.0)
        step *= 2
    ends = torch.ones_like(key, dtype=torch.bool)
    ends[:, :-1] = key[:, 1:] != key[:, :-1]
    return ends


def _rows(indices: Tensor, backprops: Tensor) -> tuple[Tensor, Tensor]:
    """Ids `[B, T]` and gradients `[B, T, D]`."""
    return positions_axis(indices[..., None])[..., 0].long(), positions_axis(backprops)


def _check(indices: Tensor, padding_idx: int | None, **rest: Any) -> None:
    num_embeddings = rest.get("num_embeddings")  # the norms do without
    if "num_embeddings" in rest:
        if type(num_embeddings) is not int or not 1 <= num_embeddings < 2**31:
            raise ValueError(f"num_embeddings is {num_embeddings!r}; pass an int in [1, 2^31)")
        if indices.device.type == "cpu" and indices.numel():  # on a GPU this would wait for the device
            low, high = int(indices.min()), int(indices.max())
            if low < 0 or high >= num_embeddings:
                wrong = low if low < 0 else high
                raise ValueError(f"indices holds {wrong}; expected 0 <= index < num_embeddings={num_embeddings}")
    if padding_idx is not None and (type(padding_idx) is not int or not 0 <= padding_idx < 2**63):
        raise ValueError(f"padding_idx is {padding_idx!r}; pass an int in [0, 2^63), or None")
    if padding_idx is not None and num_embeddings is not None and padding_idx >= num_embeddings:
        raise ValueError(f"padding_idx is {padding_idx}; expected less than num_embeddings={num_embeddings}")


def _grads(indices: Tensor, backprops: Tensor, padding_idx: int | None, num_embeddings: int) -> Tensor:
    """The gradients themselves, one position at a time."""
    ids, g = _rows(indices, backprops)
    grads = torch.zeros(ids.shape[0], num_embeddings, g.shape[2], dtype=torch.float64)
    for b in range(ids.shape[0]):
        for t, i in enumerate(ids[b].tolist()):
            if i != padding_idx:
                grads[b, i] += g[b, t]
    return grads


def _cases(**extra: Callable[[Generator, int], Any]) -> list[Case]:
    def case(
        name: str,
        *shape: int,
        ids: int = 5,
        padding: int | None = None,
        dtype: torch.dtype = torch.int64,
        change: Callable[[Tensor], Tensor] = lambda x: x,
        strided: bool = False,
    ) -> Case:
        def build(g: Generator) -> dict[str, Any]:
            indices = torch.randint(ids, shape[:-1], generator=g, dtype=dtype)
            backprops = change(randn(g, *shape))
            if padding is not None:  # whatever stands at a padding position is not part of the gradient
                backprops = backprops.masked_fill((indices == padding)[..., None], torch.nan)
            own = {"indices": indices, "backprops": backprops, "padding_idx": padding}
            return {**own, **{key: make(g, shape[0]) for key, make in extra.items()}}

        return Case(name, build, strided)

    return [
        case("duplicates", 6, 9, 7),
        case("one id", 3, 33, 4, ids=1),
        case("padding", 4, 12, 6, padding=2),
        case("only padding", 2, 5, 3, ids=1, padding=0),
        case("no position axis", 7, 10),
        case("two position axes", 3, 4, 5, 6),
        case("no positions", 3, 0, 4),
        case("empty batch", 0, 5, 4),
        case("one sample", 1, 20, 3),
        case("one number", 5, 8, 1),
        case("int32", 4, 6, 5, dtype=torch.int32),
        case("strided", 4, 6, 5, strided=True),
        case("magnitudes", 5, 6, 4, change=lambda x: scaled_rows(x).roll(1, 0)),
        case("nan and inf rows", 5, 6, 4, change=with_bad_rows),
    ]


def _cost(indices: Tensor, backprops: Tensor, num_embeddings: int = 0, **_: Any) -> Cost:
    return layer_cost(indices, backprops, 2 * backprops.numel(), max(num_embeddings, 1) * backprops.shape[-1])


@define_op(
    shapes={"indices": "int:B *", "backprops": "B * D"},
    returns=[Out("norm_sq", "B", rtol=1e-6, never_below=True)],
    oracle=lambda indices, backprops, padding_idx: grad_norm_sq.oracle(_grads(indices, backprops, padding_idx, 5)),
    cases=_cases,
    cost=_cost,
    validate=_check,
)
def embedding_norm_sq(indices: Tensor, backprops: Tensor, padding_idx: int | None = None) -> Tensor:
    """Squared norm of each sample's gradient of an embedding, rounded up.

    Args:
        indices: ids `[B, *]`, int64 or int32.
        backprops: gradients with respect to the embedding's outputs `[B, *, D]`.
        padding_idx: the id that is not trained, as in `torch.nn.Embedding`; its positions are left out.

    Returns:
        `[B]` float32, never below the exact value nor 1.2e-38, Inf where it is not finite; guarded as `linear_norm_sq`.

    Raises:
        TypeError, ValueError: names the argument that does not fit (its dtype, one of float32, bfloat16, float16 and
            float64; its shape; its value), what was given and what to pass.
    """
    ids, g = _rows(indices, backprops)
    keys, order = ids.sort(dim=1, stable=True)
    keep = torch.ones_like(keys, dtype=torch.bool) if padding_idx is None else keys != padding_idx
    samples, positions, width = g.shape
    total = torch.zeros(samples, dtype=torch.float64, device=g.device)
    each = torch.zeros(samples, positions, dtype=torch.float64, device=g.device)  # [B, T] squares of positions
    for d in blocks(width, samples * positions):
        columns = g[..., d]
        values = columns.gather(1, order[..., None].expand_as(columns)).double().where(keep[..., None], 0.0)
        each += values.square().sum(2)
        ends = _sum_runs(keys, values)
        total += values.square().where(ends[..., None], 0.0).sum((1, 2))
    error = own_error(each.sqrt().sum(1), positions)
    return round_up((total.sqrt() + 2 * error).square(), terms=positions * width + 16)


@define_op(
    shapes={"indices": "int:B *", "backprops": "B * D", "coef": "B"},
    returns=[Out("weight", "V D", rtol=1e-6, of_max=True)],
    oracle=lambda indices, backprops, coef, num_embeddings, padding_idx: clip_sum.oracle(
        _grads(indices, backprops, padding_idx, num_embeddings), coef
    ),
    cases=lambda: _cases(coef=half_coef, num_embeddings=always(5)),
    cost=_cost,
    validate=_check,
)
def embedding_clip_sum(
    indices: Tensor, backprops: Tensor, coef: Tensor, num_embeddings: int, padding_idx: int | None = None
) -> Tensor:
    """Sum over samples of `coef[b]` times the gradient of an embedding.

    Args:
        indices: ids `[B, *]`, int64 or int32, each less than `num_embeddings` (checked on the CPU only).
        backprops: gradients with respect to the embedding's outputs `[B, *, D]`.
        coef: factors `[B]`, as `clip_coef` gives them. A sample with factor 0 adds exactly 0, even if it holds NaN.
        num_embeddings: rows V of the embedding.
        padding_idx: the id that is not trained; its row of the sum is 0.

    Returns:
        `[V, D]` float32, float64 if backprops are.

    Raises:
        TypeError, ValueError: names the argument that does not fit (its dtype, one of float32, bfloat16, float16 and
            float64; its shape; its value), what was given and what to pass.
    """
    ids, g = _rows(indices, backprops)
    samples, positions, width = g.shape
    keys, order = ids.reshape(1, -1).sort(dim=1, stable=True)  # by id, then by sample
    sample = order // max(positions, 1)
    scale = coef.double()[sample][..., None]
    keep = scale > 0
    if padding_idx is not None:
        keep &= (keys != padding_idx)[..., None]
    # One spare row, cut off at the end, takes what is not the end of a run.
    total = torch.zeros(num_embeddings + 1, width, dtype=sum_dtype(backprops), device=g.device)
    for d in blocks(width, samples * positions):
        values = (g.flatten(0, 1)[order, d] * scale).where(keep, 0.0)
        ends = _sum_runs(keys * samples + sample, values)  # within a sample first: its terms may cancel
        values = values.where(ends[..., None], 0.0)
        ends = _sum_runs(keys, values)
        total[:, d].index_copy_(0, keys.where(ends, num_embeddings)[0], values[0].to(total.dtype))
    return total[:-1]
