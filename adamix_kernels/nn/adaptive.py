"""Thresholds that public rows set: a quantile of their per-sample norms, in the backward pass that they are in."""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from adamix_kernels.nn.errors import PrivacyError
from adamix_kernels.ops.quantile import norm_quantile

if TYPE_CHECKING:
    from adamix_kernels.nn.engine import DPEngine

#: A squared norm below this, as the loss scales it, is that of a gradient of zeros: the ops' norms are never 0.
_NOTHING = 1e-30


@dataclass(frozen=True)
class PublicQuantile:
    """A `max_grad_norm` that follows the public rows of `DPEngine.mixed`, at no privacy cost.

    The threshold of a step is the smallest norm that at least a share `q` of the public rows of its first backward pass
    do not exceed; with `strategy="per_layer"` each layer has its own, of the norms of its part of the gradient. It
    holds for all backward passes of the step.

    Args:
        q: in [0, 1]; 1 gives the largest norm.
        every: steps from one computation to the next; in between thresholds are kept, and need no public rows.
        start: a threshold for as long as no public row has come, above 0; None: that is an error.
        least: no threshold is below it.
        `start` and `least` are spread evenly over the layers with "per_layer", C / sqrt(layers) each.

    A row whose gradient is not finite counts as larger than all others, and never is the threshold: that is the largest
    finite norm then, or `least` where there is none. A threshold may be 0, as where public rows have no gradient: then
    private rows add exactly 0, and the noise is 0.

    Source: Golatkar et al. 2022 (arXiv 2203.11481), adaptive clipping.
    """

    q: float
    every: int = 1
    start: float | None = None
    least: float = 0.0

    def __post_init__(self) -> None:
        for name, value, low, high in (
            ("q", self.q, 0.0, 1.0),
            ("every", self.every, 1, sys.maxsize),
            ("start", self.start, sys.float_info.min, sys.float_info.max),
            ("least", self.least, 0.0, sys.float_info.max),
        ):
            if value is None and name == "start":
                continue
            kind = int if name == "every" else (int, float)
            if not isinstance(value, kind) or isinstance(value, bool):
                raise TypeError(f"{name}: is {type(value).__name__}; pass {'an int' if kind is int else 'a number'}")
            if not low <= value <= high:
                raise ValueError(f"{name}: is {value}; pass one in [{low:.3g}, {high:.3g}]")


class PublicThresholds:
    """The thresholds of an engine with a `PublicQuantile`, by layer; that of the whole gradient is of None.

    Within a step a threshold is one number: once a private row has been clipped by it, or it was set, it stays.
    """

    def __init__(self, engine: DPEngine, rule: PublicQuantile) -> None:
        self._engine, self.rule = engine, rule
        self._values: dict[str | None, Tensor] = {}  # scalar, float64, on the device of the norms
        self._set_at: dict[str | None, int] = {}  # in which step
        self._fixed: set[str | None] = set()  # in the step that has begun
        self._layer_of: dict[str, str] = {}  # by whose threshold a parameter was clipped last ..
        self._layers_of: dict[str, set[str]] = {}  # .. and all those since the last step

    def forget(self) -> None:
        """Another step begins."""
        self._fixed.clear()
        self._layers_of.clear()

    # --- as `Threshold` ------------------------------------------------------------------------------------------

    @property
    def whole(self) -> Tensor:
        """Of the whole gradient."""
        if self._engine.strategy != "per_layer":
            return self.layer(None)
        known = list(self.by_layer().values()) or [self.known(None)]
        return torch.stack([value.to(known[0].device) for value in known]).norm()

    def layer(self, name: str | None) -> Tensor:
        """For clipping the gradients of a layer now."""
        if self.due(name) and (self.rule.start is None or name in self._values):
            where = "" if name is None else f" of layer {name!r}"
            raise PrivacyError(
                f"max_grad_norm: the threshold{where} is due to be set by public rows, and this backward pass has "
                "none; have them in the first one of a step, within mixed(public_rows), or pass "
                f"{'a larger PublicQuantile(every=)' if name in self._values else 'PublicQuantile(start=)'}"
            )
        self._fixed.add(name)
        return self.known(name)

    @property
    def layers(self) -> frozenset[str]:
        """Those that are trained."""
        with torch._C.DisableTorchFunctionSubclass():
            return frozenset(self._engine.layers[name] for name, p in self._engine._attached.stepped if p.requires_grad)

    # --- what is known -------------------------------------------------------------------------------------------

    def known(self, name: str | None) -> Tensor:
        """The present threshold; 0 of a layer that no gradient has reached yet."""
        if name in self._values:
            return self._values[name]
        return self._scalar(self._share(self.rule.start or 0.0, name))

    def any_known(self) -> bool:
        return bool(self._values) or self.rule.start is not None

    def by_layer(self) -> dict[str, Tensor]:
        """Of each trained layer that has one."""
        every = self.rule.start is not None
        return {name: self.known(name) for name in sorted(self.layers) if every or name in self._values}

    def due(self, name: str | None) -> bool:
        """Whether the next public rows set it."""
        last = self._set_at.get(name)
        return name not in self._fixed and (last is None or self._engine.steps - last >= self.rule.every)

    def set(self, name: str | None, norm_sq: Tensor, scale: float) -> None:
        """By squared norms `[n]` of public gradients, which are `scale` times what they should be."""
        norm_sq = norm_sq.double()
        norm_sq = norm_sq.where(norm_sq >= _NOTHING, 0.0).where(norm_sq.isfinite(), torch.inf)
        found = norm_quantile(norm_sq, self.rule.q)
        largest = norm_sq.where(norm_sq.isfinite(), 0.0).max().sqrt()
        tau = found.double().where(found.isfinite(), largest) / scale
        self._values[name] = tau.clamp(min=self._share(self.rule.least, name))
        self._set_at[name] = self._engine.steps
        self._fixed.add(name)

    def _scalar(self, value: float) -> Tensor:
        return torch.tensor(value, dtype=torch.float64, device=next(p.device for _, p in self._engine._attached.owned))

    def _share(self, value: float, name: str | None) -> float:
        return value / math.sqrt(max(1, len(self.layers))) if value and name is not None else value

    # --- by parameter: used together with others, it may be clipped in another layer than its own ------------------

    def clips(self, parameter: str, layer: str) -> None:
        """The threshold of a layer clips gradients of a parameter."""
        self._layer_of[parameter] = layer
        self._layers_of.setdefault(parameter, set()).add(layer)

    def layer_of(self, parameter: str) -> str:
        """Where it was clipped last, or would be."""
        return self._layer_of.get(parameter, self._engine.layers[parameter])

    def of_parameter(self, parameter: str) -> Tensor:
        """The largest threshold that clipped its gradients since the last step, or would clip them."""
        layers = self._layers_of.get(parameter) or {self.layer_of(parameter)}
        return functools.reduce(torch.maximum, [self.known(layer) for layer in sorted(layers)])

    def check_counted(self, parameters: Sequence[str]) -> None:
        """The layers that clipped these parameters' gradients since the last step are among those whose number the
        noise is for."""
        clipped = {layer for name in parameters for layer in self._layers_of.get(name, ())}
        if gone := sorted(clipped - self.layers):
            raise PrivacyError(
                f"layer {gone[0]!r}: was frozen between backward() and step(), and parameters of another layer were "
                "clipped together with it; freeze it after the step, or call zero_grad() first"
            )

    # --- to resume -----------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Plain numbers: thresholds are free to publish."""
        rule = self.rule
        return {
            "rule": {"q": rule.q, "every": rule.every, "start": rule.start, "least": rule.least},
            "values": [[name, float(value), self._set_at[name]] for name, value in self._values.items()],
            "layers": dict(self._layer_of),
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Take over what `state` gave, for the same rule."""
        for name, value, _ in state["values"]:
            if not 0 <= value <= sys.float_info.max:
                raise ValueError(f"state: the threshold of layer {name!r} is {value}; load what state_dict() gave")
        for name, value, set_at in state["values"]:
            self._values[name] = self._scalar(value)
            self._set_at[name] = set_at
        self._layer_of.update(state["layers"])
