"""Arithmetic the references share: float64 accumulation, and rounding that cannot under-estimate a norm."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

#: Columns upcast to float64 at a time, so that the copy stays small beside the gradients.
_BLOCK = 1 << 18

#: Float32's smallest normal number. Below it nothing is to be relied on: the processor may flush it to 0.
TINY = torch.finfo(torch.float32).tiny


def check_number(name: str, value: Any, scalar_tensor: bool = False) -> None:
    """TypeError or ValueError unless `value` is a real number, or where it may be, a real scalar tensor `[]`.

    To compare anything else raises too, but in words that name no argument.
    """
    if isinstance(value, float):
        return
    wanted = "a number" + " or a scalar tensor []" * scalar_tensor
    if isinstance(value, Real):
        try:
            float(value)
        except OverflowError:
            raise ValueError(f"{name} is an int beyond all floats; pass {wanted}") from None
        return
    if not scalar_tensor or not isinstance(value, Tensor):
        raise TypeError(f"{name} is {type(value).__name__}; pass {wanted}")
    if value.dim() != 0:
        raise ValueError(f"{name} has shape {list(value.shape)}; pass {wanted}")
    if value.is_complex() or value.dtype is torch.bool or value.layout is not torch.strided:
        raise TypeError(f"{name} is a {value.dtype} tensor, {value.layout}; pass {wanted}, real and dense")


def as_list(tensors: Tensor | Sequence[Tensor]) -> list[Tensor]:
    return [tensors] if isinstance(tensors, Tensor) else list(tensors)


def rows(x: Tensor) -> Tensor:
    """`[B, *]` as `[B, P]`, for empty ones too."""
    return x.reshape(x.shape[0], math.prod(x.shape[1:]))


def sum_sq(x: Tensor) -> Tensor:
    """Float64 sum of squares of each row of `[B, *]`."""
    return torch.stack([block.double().square().sum(1) for block in rows(x).split(_BLOCK, dim=1)]).sum(0)


def round_up(x: Tensor, terms: int) -> Tensor:
    """Float32 of float64 sums of `terms` non-negative terms, never below the exact sum, nor TINY; NaN becomes Inf.

    Any order of n float64 multiplications and additions errs by less than n 2^-52 of the sum, and by what underflows:
    squares of float64 numbers below 1e-154, and all denormals where the processor flushes them. TINY is far above
    that, so a row whose squares vanish is clipped as if its norm were sqrt(TINY) = 1e-19, not let through as if 0.
    """
    upper = x * (1 + (terms + 1) * 2.0**-52)
    y = upper.float()
    y = torch.where(y.double() < upper, torch.nextafter(y, torch.full_like(y, torch.inf)), y)
    return torch.nan_to_num(y, nan=torch.inf, posinf=torch.inf).clamp(min=TINY)


def round_down(x: Tensor) -> Tensor:
    """Float32 of non-negative float64, never above it; 0 below TINY, where the comparison may see a flushed number."""
    y = x.float()
    y = torch.where(y.double() > x, torch.nextafter(y, torch.zeros_like(y)), y)
    return y.where(y >= TINY, 0.0)


def weighted_sum(x: Tensor, coef: Tensor) -> Tensor:
    """Float64 `[*]`: the sum over b of coef[b] x[b]. Rows with coef 0 are left out, whatever they hold."""
    keep = coef > 0
    factors = coef.double().where(keep, 0.0)
    blocks = [factors @ block.double().where(keep[:, None], 0.0) for block in rows(x).split(_BLOCK, dim=1)]
    return torch.cat(blocks).reshape(x.shape[1:])


def sum_dtype(*inputs: Tensor) -> torch.dtype:
    """Sums are float32, or float64 if an input is."""
    return torch.float64 if any(x.dtype == torch.float64 for x in inputs) else torch.float32
