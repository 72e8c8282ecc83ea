"""Clipped sums of a step on an integer grid, for noise of mode "secure"; see `adamix_kernels.ops.grid` for why."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from adamix_kernels.nn.adaptive import PublicThresholds
from adamix_kernels.nn.clipping import Threshold
from adamix_kernels.nn.errors import PrivacyError
from adamix_kernels.nn.factors import Factors
from adamix_kernels.nn.parameter import PrivateParameter
from adamix_kernels.ops._numerics import round_down
from adamix_kernels.ops.grid import MOST_ROWS, grid_clip_sum, grid_for, grid_release
from adamix_kernels.ops.norm import grad_norm_sq

if TYPE_CHECKING:
    from adamix_kernels.nn.engine import DPEngine
    from adamix_kernels.nn.sums import StepSums


class GridSums:
    """The grid of a step: one for all parameters, by the threshold of the whole gradient. Sums are int64.

    Where public rows set a threshold for each layer, a layer has its own grid.
    """

    def __init__(self, engine: DPEngine, sums: StepSums) -> None:
        self._engine, self._sums = engine, sums
        self.forget()

    def forget(self) -> None:
        self._limits: list[float] = []  # of the step that has begun
        self._joined = 0.0  # the grid of other ranks
        self._grid = 0.0
        self._layer_grids: dict[str, float] = {}
        self._grid_layers: dict[str, str] = {}  # by parameter: whose grid its sum is of
        self.rows = 0

    def begin_pass(self, threshold: Threshold | PublicThresholds) -> None:
        """The threshold must be the same in all backward passes of a step, as their sums are of one grid."""
        if isinstance(threshold, PublicThresholds):  # which are; but they are not known yet
            if not self._sums.totals:
                self.forget()
            return
        limits = [float(threshold.whole), *(float(threshold.layer(name)) for name in sorted(threshold.layers))]
        if not self._sums.totals:  # the first, or the first that was not broken off
            self._limits, self._grid, self.rows = limits, self._grid_for(limits[0]), 0
        elif limits != self._limits:
            raise PrivacyError(
                "max_grad_norm: was changed between the backward passes of one step, whose integer sums are of one "
                "grid in secure mode; change it after the step, or pass Noise(mode='fast')"
            )

    def _grid_for(self, limit: float, layers: int = 1) -> float:
        return grid_for(limit, self._std(limit, layers))

    def _std(self, limit: float, layers: int) -> float:
        """Of one layer's noise where each of so many has its own threshold."""
        return limit * (self._engine.noise_multiplier * math.sqrt(layers))

    def clip(self, parts: Sequence[tuple[tuple[PrivateParameter, ...], Factors]], layer: str | None) -> Tensor:
        """Add gradients, clipped as one by the threshold of a layer or the whole; their squared norms `[B]`."""
        step = self._sums
        grads = [grad for _, factors in parts for grad in factors.grad_sample()]
        norm_sq = grad_norm_sq(grads)
        self.rows += len(norm_sq)
        self._check_rows(self.rows)
        coef = step.coef(norm_sq, layer).double() / step.scale(len(norm_sq))
        threshold = step.threshold
        limit = float(threshold.whole if layer is None else threshold.layer(layer))
        parameters = [p for ps, _ in parts for p in ps]
        if isinstance(threshold, PublicThresholds):
            grid = self._adaptive_grid(limit, layer, parameters)
        else:
            grid = self._grid
            if len(threshold.layers) > 1 and layer is not None:
                limit *= 1 - 2.0**-50  # so that all layers together are not above the whole by a rounding
        sums = grid_clip_sum(grads, round_down(coef), limit, grid) if limit else [step.zeros(p) for p in parameters]
        for parameter, total in zip(parameters, sums, strict=True):
            step.add(parameter, total, layer)
        return norm_sq.double()

    @property
    def step(self) -> float:
        """Of this rank's sums."""
        return self._grid

    def join(self, rows: int, grids: set[float]) -> None:
        """Sums of all ranks are added: their samples must not overflow together, and they must be of one grid."""
        self._check_rows(rows)
        if len(grids) > 1:
            raise PrivacyError(
                f"max_grad_norm: differs between ranks, whose integer sums are of other grids, {sorted(grids)}; set it "
                "to the same number on all ranks"
            )
        self._joined = next(iter(grids), 0.0)

    @staticmethod
    def _check_rows(rows: int) -> None:
        if rows > MOST_ROWS:
            raise PrivacyError(f"backward(): {rows} samples since the last step; 2^36 are the most that fit")

    def _adaptive_grid(self, limit: float, layer: str | None, parameters: Sequence[PrivateParameter]) -> float:
        if layer is None:
            self._grid = self._grid or (self._grid_for(limit) if limit else 0.0)
            return self._grid
        for p in parameters:
            if self._grid_layers.setdefault(p._dp_name, layer) != layer:
                raise PrivacyError(
                    f"parameter {p._dp_name!r}: is clipped together with layer {layer!r} in one backward pass and "
                    "apart from it in another of the same step, whose integer sums are of two grids; use them alike, "
                    "or strategy='auto'"
                )
        if limit and layer not in self._layer_grids:
            self._layer_grids[layer] = self._grid_for(limit, len(self._sums.threshold.layers))
        return self._layer_grids.get(layer, 0.0)

    def floats(self, sums: Sequence[Tensor]) -> list[Tensor]:
        """Sums without noise, over the expected batch size."""
        return [total * (self._grid / self._engine.expected_batch_size) for total in sums]

    def release(self, sums: Sequence[Tensor], limit: float, offsets: Sequence[int] | None = None) -> list[Tensor]:
        """Noisy sums over the expected batch size: float32, before that division multiples of the grid."""
        engine = self._engine
        if not limit:
            return self._nothing(sums)
        grid = self._grid if self._sums.totals else self._joined
        grid = grid or self._grid_for(limit)  # without a backward pass it is noise alone
        released = grid_release(sums, limit * engine.noise_multiplier, grid, engine.noise, offsets)
        return list(torch._foreach_div(released, engine.expected_batch_size))

    def release_by_layer(
        self, sums: Sequence[Tensor], layers: Sequence[str], thresholds: PublicThresholds
    ) -> list[Tensor]:
        """The same of sums that each belong to a layer with its own threshold: a draw of noise for each layer."""
        engine, released = self._engine, self._nothing(sums)
        for layer in sorted(set(layers)):
            limit = float(thresholds.known(layer))
            if not limit:
                continue
            chosen = [i for i, name in enumerate(layers) if name == layer]
            count = len(thresholds.layers)
            grid = self._layer_grids.get(layer) or self._grid_for(limit, count)
            noisy = grid_release([sums[i] for i in chosen], self._std(limit, count), grid, engine.noise)
            for i, total in zip(chosen, torch._foreach_div(noisy, engine.expected_batch_size), strict=True):
                released[i] = total
        return released

    def floats_by_layer(
        self, sums: Sequence[Tensor], layers: Sequence[str], thresholds: PublicThresholds
    ) -> list[Tensor]:
        """Sums without noise, over the expected batch size, in units of their thresholds."""
        units = [self._layer_grids.get(name, 0.0) / (float(thresholds.known(name)) or 1.0) for name in layers]
        return [total * (unit / self._engine.expected_batch_size) for total, unit in zip(sums, units, strict=True)]

    @staticmethod
    def _nothing(sums: Sequence[Tensor]) -> list[Tensor]:
        """Of thresholds that are 0, where sums and noise are."""
        return [torch.zeros(total.shape, device=total.device) for total in sums]
