"""What the backward passes since the last step have added up, and what the step releases of it."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from adamix_kernels.nn.clipping import Limit, Threshold, factors, larger
from adamix_kernels.nn.errors import PrivacyError
from adamix_kernels.nn.metrics import Metrics
from adamix_kernels.nn.parameter import PrivateParameter
from adamix_kernels.nn.secure import GridSums
from adamix_kernels.nn.users import Users
from adamix_kernels.ops._numerics import sum_dtype
from adamix_kernels.ops.noise import add_gaussian_noise_

if TYPE_CHECKING:
    from adamix_kernels.nn.engine import DPEngine


class StepSums:
    """Clipped sums by parameter, without noise, of whole backward passes; `release` adds the noise.

    A backward pass adds to `staged`, and what is there counts once the pass has ended well.
    """

    def __init__(self, engine: DPEngine, unit: str) -> None:
        self._engine = engine
        self.grid = GridSums(engine, self) if engine.noise.mode == "secure" else None
        self.users = Users() if unit == "user" else None
        self.metrics: Metrics | None = None  # of the last step
        self._dtype = sum_dtype(*engine.model.parameters())
        self.totals: dict[str, Tensor] = {}  # of whole backward passes since the last step, over ..
        self._divisor = engine.expected_batch_size  # .. what it was when the first began
        self.staged: dict[str, Tensor] = {}  # of the one that runs now: if it fails they are dropped
        self._limits: list[Limit] = []  # the threshold of each backward pass since the last step
        self.norm_sq: list[Tensor] = []
        self.threshold = self._threshold_now()

    def forget(self) -> None:
        self.totals.clear()
        self.staged.clear()
        self._limits, self.norm_sq = [], []
        subspace = self._engine._subspace
        for of_step in (self.grid, self.users, None if subspace is None else subspace.sums):
            if of_step is not None:
                of_step.forget()

    def drop(self, name: str) -> None:
        """The sum of one parameter; coordinates in a subspace are of all."""
        self.totals.pop(name, None)
        if self._engine._subspace is not None:
            self._engine._subspace.sums.forget()

    # --- a backward pass -----------------------------------------------------------------------------------------

    def begin_pass(self) -> None:
        self.staged.clear()
        if not self.totals:
            self._divisor = self._engine.expected_batch_size
        self.threshold = self._threshold_now()
        if self.grid is not None:
            self.grid.begin_pass(self.threshold)
        if self._engine._subspace is not None:
            self._engine._subspace.sums.begin_pass()

    def _threshold_now(self) -> Threshold:
        engine = self._engine
        parameters = engine._owned or engine.model.named_parameters()
        with torch._C.DisableTorchFunctionSubclass():
            trained = {engine.layers[name] for name, p in parameters if p.requires_grad}
        return Threshold.of(engine.max_grad_norm, trained)

    def scale(self, samples: int) -> float:
        """What per-sample gradients are multiplied with by the loss."""
        mean = self._engine.loss_reduction == "mean"
        return self._engine.loss_scale / (max(samples, 1) if mean else 1)

    def limit(self, samples: int, layer: str | None) -> Limit:
        """The threshold for gradients as the loss scales them."""
        limit = self.threshold.whole if layer is None else self.threshold.layer(layer)
        return limit * self.scale(samples)

    def coef(self, norm_sq: Tensor, layer: str | None) -> Tensor:
        """Clipping factors `[B]` of gradients with these squared norms, by the threshold of a layer or the whole."""
        samples, automatic = len(norm_sq), self._engine.clipping == "automatic"
        return factors(norm_sq, self.limit(samples, layer), self.scale(samples), automatic)

    def divided(self, samples: int) -> float:
        """By what clipped sums are divided before they are released."""
        return self.scale(samples) * self._divisor

    def released(self, coef: Tensor) -> Tensor:
        """Clipping factors of a pass, for sums that need no scaling afterwards."""
        return coef.to(self._dtype) / self.divided(len(coef))

    def add(self, parameter: PrivateParameter, total: Tensor) -> None:
        """Add a clipped sum to what the step releases, once this backward pass has ended well."""
        _accumulate(self.staged, parameter._dp_name, total if self.grid else total.to(sum_dtype(total)))

    def end_pass(self, norm_sq: Tensor) -> None:
        subspace = self._engine._subspace
        if subspace is not None and subspace.takes_public_rows:
            return
        true_norm_sq = norm_sq / self.scale(len(norm_sq)) ** 2
        if self.users is not None:
            true_norm_sq = self.users.end_pass(true_norm_sq)
        if subspace is not None:
            subspace.sums.end_pass()
        for name, total in self.staged.items():
            _accumulate(self.totals, name, total)
        self.staged.clear()
        self._limits.append(self.threshold.whole)
        self.norm_sq.append(true_norm_sq)

    # --- the step ------------------------------------------------------------------------------------------------

    def release(self, trained: Sequence[tuple[str, Tensor]]) -> list[Tensor]:
        """What a step releases of parameters, by name: noisy sums over the expected batch size."""
        engine = self._engine
        if (engine.noise.mode == "secure") != (self.grid is not None):
            raise PrivacyError("noise: was replaced by one of another mode; make a new DPEngine with it")
        if engine._subspace is not None:
            return engine._subspace.sums.release(trained)
        sums = [self.totals[name] if name in self.totals else self._zeros(p) for name, p in trained]
        limits = self._limits or [self._threshold_now().whole]
        limit = functools.reduce(larger, limits)
        std = limit * engine.noise_multiplier / engine.expected_batch_size
        if self.grid is not None:
            shown = self.grid.floats(sums) if engine.measure_signal else sums
            self.metrics = Metrics(self.norm_sq, limits, shown, std, engine.measure_signal)
            return self.grid.release(sums, float(limit)) if sums else []
        if self.totals and self._divisor != engine.expected_batch_size:
            torch._foreach_mul_(sums, self._divisor / engine.expected_batch_size)
        self.metrics = Metrics(self.norm_sq, limits, sums, std, engine.measure_signal)
        if engine.noise_multiplier and sums:
            add_gaussian_noise_(sums, std, engine.noise)
        return sums

    def _zeros(self, parameter: Tensor) -> Tensor:
        dtype = torch.int64 if self.grid else sum_dtype(parameter)
        return torch.zeros(parameter.shape, dtype=dtype, device=parameter.device)


def _accumulate(sums: dict[str, Tensor], name: str, total: Tensor) -> None:
    sums[name] = sums[name].add_(total) if name in sums else total
