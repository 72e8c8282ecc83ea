"""Clipping factors of the engine's modes, from squared norms `[B]` that are rounded up."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from adamix_kernels.ops._numerics import round_down
from adamix_kernels.ops.clip import clip_coef

#: Keeps a vanishing gradient from being blown up to the threshold (Bu et al. 2022, gamma).
STABILITY = 0.01


Limit = float | Tensor


def checked(value: Any, strategy: str, layers: set[str], bounded: bool) -> Limit | Mapping[str, float]:
    """`max_grad_norm` as the engine keeps it. A tensor on a device is not read: that would wait."""
    if isinstance(value, Mapping):
        if strategy != "per_layer":
            raise ValueError(f"max_grad_norm: is a dict with strategy={strategy!r}; pass one number, or 'per_layer'")
        unknown = [name for name in value if name not in layers]
        if unknown:
            known = ", ".join(map(repr, sorted(layers)))
            raise ValueError(f"max_grad_norm: {unknown[0]!r} is no module with parameters of its own; they are {known}")
        return MappingProxyType(
            {name: _number(limit, f"max_grad_norm[{name!r}]", True) for name, limit in value.items()}
        )
    if isinstance(value, Tensor):
        if value.dim() or not value.is_floating_point():
            raise ValueError(
                f"max_grad_norm: is a {value.dtype} tensor {list(value.shape)}; pass a floating scalar tensor []"
            )
        if value.device.type == "cpu":
            _number(float(value), "max_grad_norm", bounded)
        return value
    return _number(value, "max_grad_norm", bounded)


def _number(value: Any, name: str, bounded: bool) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise TypeError(f"{name}: is {type(value).__name__}; pass a number, a scalar tensor, or a dict by layer")
    if not value > 0 or (value > sys.float_info.max and (bounded or value != math.inf)):
        raise ValueError(f"{name}: is {value}; pass a {'finite ' * bounded}number above 0")
    return float(value)


@dataclass(frozen=True)
class Threshold:
    """`max_grad_norm` as it stood when a backward pass began: what is done to a tensor later does not change it."""

    value: Limit | Mapping[str, float]
    layers: frozenset[str]  # that are trained

    @classmethod
    def of(cls, value: Limit | Mapping[str, float], layers: set[str]) -> Threshold:
        if isinstance(value, Mapping):
            missing = sorted(layers - set(value))
            if missing:
                raise ValueError(f"max_grad_norm: has no threshold for layer {missing[0]!r}, which is trained; add one")
        if isinstance(value, Tensor):
            value = value.detach().double().abs() + 0.0  # never the tensor itself
        return cls(value, frozenset(layers))

    @property
    def whole(self) -> Limit:
        """Of the whole gradient."""
        if isinstance(self.value, Mapping):
            return math.hypot(*(self.value[name] for name in self.layers))
        return self.value

    def layer(self, name: str) -> Limit:
        if isinstance(self.value, Mapping):
            return self.value[name]
        return self.value / math.sqrt(max(1, len(self.layers)))


def larger(x: Limit, y: Limit) -> Limit:
    if isinstance(x, Tensor) or isinstance(y, Tensor):
        device = next(z.device for z in (x, y) if isinstance(z, Tensor))
        return torch.maximum(*(torch.as_tensor(z, dtype=torch.float64, device=device) for z in (x, y)))
    return max(x, y)


def factors(norm_sq: Tensor, limit: Limit, scale: float, automatic: bool) -> Tensor:
    """`[B]` float32: what each sample is multiplied with, whose gradient is `scale` times what it should be.

    `limit` is the threshold of such gradients. `automatic` normalises every sample, C / (norm + 0.01), instead of
    clipping the large ones (Bu et al. 2022, arXiv 2206.07136, AUTO-S). A sample whose norm is not finite gets 0.
    """
    if not automatic:
        return clip_coef(norm_sq, limit)
    coef = round_down(limit / (norm_sq.double().sqrt() + STABILITY * scale))
    return coef.where(norm_sq.isfinite(), torch.zeros_like(coef))
