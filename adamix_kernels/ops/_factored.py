"""Norms and clipped sums of per-sample gradients in factors, sum_t g_t a_t^T: what the factored ops share.

The helpers work on a `[B, N, T, I]` and g `[B, N, T, O]`: N independent groups of T positions. A linear layer has one
group, a convolution its channel groups.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Generator, Tensor
from torch.nn.functional import pad

from adamix_kernels.ops._cases import rand, scaled_rows, with_bad_rows
from adamix_kernels.ops._numerics import round_up, sum_dtype
from adamix_kernels.spec import Case, Cost

#: Doubles in the largest temporary.
_LIMIT = 1 << 24
#: 2^52 times the smallest normal float64: what underflows is less than a rounding of it.
_VANISHING = 2.0**-970

#: What method "auto" of a backend goes by: the cost of a multiply-addition of positions with positions, each pair
#: counted once, over one of inputs with outputs. The reference makes both halves of the symmetric products. Of cpp the
#: two methods run at the same rate (190 multiply-additions per ns at T = 512 and 1024, I = O = 768, on AVX-512); for
#: triton that is assumed, not measured on a GPU.
GRAM_COST = {"torch": 2.0, "cpp": 1.0, "triton": 1.0}


def by_gram(backend: str, positions: int, inner: int, outer: int) -> bool:
    return GRAM_COST[backend] * positions * (inner + outer) < 2 * inner * outer


def blocks(size: int, unit: int) -> Iterator[slice]:
    """Slices that cover `range(size)`, each so short that its items of `unit` doubles stay within the limit."""
    step = max(1, _LIMIT // max(1, unit))
    return (slice(start, start + step) for start in range(0, max(size, 1), step))


def positions_axis(x: Tensor) -> Tensor:
    """`[B, *, D]` as `[B, T, D]`, for empty ones too."""
    return x.reshape(x.shape[0], math.prod(x.shape[1:-1]), x.shape[-1])


def own_error(length: Tensor, positions: int) -> Tensor:
    """How far a gradient computed in float64 may be from the exact one, in Frobenius norm: (T + 2) 2^-52 R.

    `length` is R = sum over t of |a_t| |g_t|. Any order of float64 operations, fused or not, gives each entry of
    sum_t g_t a_t^T to (T + 2) 2^-53 sum_t |g_to| |a_ti|: T roundings for the products and the sum, one for a
    float64 coefficient, one for second-order terms. The matrix sum_t |g_t| |a_t|^T has a norm of at most R. The other
    factor 2 is slack, for the rounding of R itself.
    """
    return (positions + 2) * 2.0**-52 * length


def sum_error(length: Tensor, positions: int, dtype: torch.dtype) -> Tensor:
    """The same for the gradients that a backend sums: e, what the norms below leave room for.

    A sample's norm may come from one backend and its sum from another, so e is the same for all. For float64 inputs all
    compute in float64. For others they may add up to 128 products in float32, or 64 on tensor cores, which truncate
    sums of 16 terms, and then such sums in float32 again: at most (min(T, 64) + 16 + T / 128) 2^-23 R.

    This is how the norms bound what a sample contributes. Its sum is computed from a gradient whose norm is at most
    n + e, n being exact. So the squared norm that goes to `clip_coef` is that of n + e or more, and the factor
    C / (n + e) leaves at most C, whatever cancels. A sample of several positions shares no float32 sum with another:
    its large terms would stand in the other's rounding. The inflation e / n is about sqrt(T) times the factor of R on
    ordinary inputs.
    """
    return own_error(length, positions) if dtype == torch.float64 else float32_error(positions) * length


def float32_error(positions: int) -> float:
    """The `sum_error` of sums that are not float64, over R."""
    return (min(positions, 64) + 16 + positions / 128) * 2.0**-23


def factored_norm_sq(a: Tensor, g: Tensor, bias: bool, method: str = "auto") -> Tensor:
    """`[B]` float32, not below (n + e)^2 added up over the groups, nor TINY; n the exact norm, e the `sum_error`."""
    samples, groups, positions, inner = a.shape
    outer = g.shape[-1]
    gram = method == "gram" or (method == "auto" and by_gram("torch", positions, inner, outer))
    unit = groups * max(positions * (inner + outer + 1), positions**2 if gram else (inner + 1) * outer)
    bound = _gram if gram else _direct
    dtype = sum_dtype(a, g)
    parts = [bound(_widen(a[b], bias), g[b].double(), dtype) for b in blocks(samples, unit)]
    return round_up(torch.cat(parts), terms=groups * outer * (inner + 1) + 16)


def factored_sum(a: Tensor, g: Tensor, coef: Tensor, bias: bool) -> Tensor:
    """Float64 `[N, O, I]`, or `[N, O, I + 1]` with the bias last: the sum over b of coef[b] g[b]^T a[b].

    Each sample is summed over its positions before it meets another, else the rounding of one whose large terms cancel
    would fall on all. With one position nothing cancels, and the samples are the positions of one product.
    """
    samples, groups, positions, inner = a.shape
    outer, width = g.shape[-1], inner + bias
    total = torch.zeros(groups, outer, width, dtype=torch.float64, device=a.device)
    result = 0 if positions == 1 else outer * width
    for b in blocks(samples, groups * max(positions * (width + outer), result)):
        scale = coef[b].double().reshape(-1, 1, 1, 1)
        wide, scaled = _widen(a[b], bias).where(scale > 0, 0.0), (g[b] * scale).where(scale > 0, 0.0)
        if positions == 1:
            wide, scaled = wide.transpose(0, 2), scaled.transpose(0, 2)
        for o in blocks(outer, wide.shape[0] * groups * width):
            total[:, o] += (scaled[..., o].mT @ wide).sum(0)
    return total


def split_bias(total: Tensor, bias: bool) -> list[Tensor]:
    """The sums of the weight and, if there is one, of the bias, from the last axis of `factored_sum`."""
    return [total[..., :-1].contiguous(), total[..., -1].contiguous()] if bias else [total]


def weight_and_bias(sums: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
    return sums[0], sums[1] if len(sums) > 1 else None


def _widen(a: Tensor, bias: bool) -> Tensor:
    """In float64; a bias is one more input feature, always 1."""
    return pad(a.double(), (0, 1), value=1.0) if bias else a.double()


def _length(a: Tensor, g: Tensor) -> Tensor:
    """R, or a little above: factors whose squares underflow count, as their partners may be large.

    With each square raised by 2^-970, the roundings of R^2 that `_gram` adds cover its underflowing dot products too.
    """
    sizes = [x.square().sum(-1) + x.shape[-1] * _VANISHING for x in (a, g)]
    return (sizes[0] * sizes[1]).sqrt().sum(-1)


def _direct(a: Tensor, g: Tensor, dtype: torch.dtype) -> Tensor:
    """From the gradient's entries. They are computed too, so n is at most their norm and their own error."""
    total = torch.zeros(a.shape[:2], dtype=torch.float64, device=a.device)
    for o in blocks(g.shape[-1], a.shape[0] * a.shape[1] * a.shape[3]):
        total += (g[..., o].mT @ a).square().sum((2, 3))
    length, positions = _length(a, g), a.shape[2]
    above = total.sqrt() + own_error(length, positions) + sum_error(length, positions, dtype)
    return above.square().sum(1)


def _gram(a: Tensor, g: Tensor, dtype: torch.dtype) -> Tensor:
    """n^2 = sum over t, s of (a_t.a_s)(g_t.g_s).

    By rows, then over rows: I + O + 2T + 4 roundings on terms of at most |a_t||a_s||g_t||g_s|, which sum to R^2.
    """
    total = torch.zeros(a.shape[:2], dtype=torch.float64, device=a.device)
    for t in blocks(a.shape[2], a.shape[0] * a.shape[1] * a.shape[2]):
        total += ((a[:, :, t] @ a.mT) * (g[:, :, t] @ g.mT)).sum(3).sum(2)
    length, roundings = _length(a, g), a.shape[3] + g.shape[3] + 2 * a.shape[2] + 4
    above = (total + roundings * 2.0**-52 * length.square()).clamp(min=0.0)
    return (above.sqrt() + sum_error(length, a.shape[2], dtype)).square().sum(1)


def check_flags(bias: bool, method: str = "auto", **_: Any) -> None:
    if not isinstance(bias, bool):
        raise TypeError(f"bias is {type(bias).__name__}; pass True if the layer has a trainable bias, else False")
    if not isinstance(method, str) or method not in ("auto", "gram", "direct"):
        raise ValueError(f"method is {method!r}; pass 'auto', 'gram' or 'direct'")


def always(value: Any) -> Callable[[Generator, int], Any]:
    return lambda g, size: value


def half_coef(g: Generator, size: int) -> Tensor:
    """Factors in [0, 1], exactly 0 in every other row, where `with_bad_rows` puts NaN and Inf."""
    coef = rand(g, size)
    coef[1::2] = 0.0
    return coef


def layer_case(
    name: str,
    size: int,
    layer: tuple[Callable[..., Tensor], Callable[..., Tensor]],
    extra: Mapping[str, Callable[[Generator, int], Any]],
    *,
    change: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = lambda a, g: (a, g),
    strided: bool = False,
) -> Case:
    """B = `size` samples of a layer, which makes activations and backprops from the generator and B."""

    def build(g: Generator) -> dict[str, Any]:
        a, b = change(layer[0](g, size), layer[1](g, size))
        return {"activations": a, "backprops": b, **{key: make(g, size) for key, make in extra.items()}}

    return Case(name, build, strided)


def layer_cases(*layer: Callable[..., Tensor], **extra: Callable[[Generator, int], Any]) -> list[Case]:
    """The awkward values that every factored op meets."""
    pair = (layer[0], layer[1])
    return [
        layer_case("plain", 6, pair, extra),
        layer_case("empty batch", 0, pair, extra),
        layer_case("one sample", 1, pair, extra),
        layer_case("strided", 4, pair, extra, strided=True),
        layer_case("zero backprops", 3, pair, extra, change=lambda a, g: (a, 0 * g)),
        layer_case("magnitudes", 5, pair, extra, change=lambda a, g: (scaled_rows(a).roll(1, 0), g)),
        layer_case("nan and inf activations", 5, pair, extra, change=lambda a, g: (with_bad_rows(a), g)),
        layer_case("nan and inf backprops", 5, pair, extra, change=lambda a, g: (a, with_bad_rows(g))),
    ]


def layer_cost(activations: Tensor, backprops: Tensor, flops: int, outputs: int) -> Cost:
    return Cost(sum(x.numel() * x.element_size() for x in (activations, backprops)) + 4 * outputs, flops)
