"""What the backward passes since the last step have added up, and what the step releases of it."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from adamix_kernels.nn.adaptive import PublicQuantile, PublicThresholds
from adamix_kernels.nn.agreement import agree
from adamix_kernels.nn.clipping import Limit, Threshold, factors, larger
from adamix_kernels.nn.errors import PrivacyError
from adamix_kernels.nn.metrics import Metrics
from adamix_kernels.nn.mixed import PublicSums, Split
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
        self.public = PublicSums()
        self.split: Split | None = None  # of the batch of the pass that runs now
        self.adaptive: PublicThresholds | None = None
        self.threshold: Threshold | PublicThresholds = self._threshold_now()

    def forget(self) -> None:
        self.totals.clear()
        self.staged.clear()
        self._limits, self.norm_sq = [], []
        subspace = self._engine._subspace
        coordinates = None if subspace is None else subspace.sums
        for of_step in (self.grid, self.users, self.public, self.adaptive, coordinates):
            if of_step is not None:
                of_step.forget()

    @property
    def thresholds(self) -> Tensor | dict[str, Tensor]:
        """Those in use."""
        threshold, by_layer = self._threshold_now(), self._engine.strategy == "per_layer"
        if self.adaptive is None:
            assert isinstance(threshold, Threshold)
            names = sorted(threshold.layers)
            fixed = {name: torch.as_tensor(threshold.layer(name), dtype=torch.float64) for name in names}
            return fixed if by_layer else torch.as_tensor(threshold.whole, dtype=torch.float64)
        if not self.adaptive.any_known():
            raise RuntimeError("thresholds: none yet; a backward pass within mixed(public_rows) sets them")
        return self.adaptive.by_layer() if by_layer else self.adaptive.known(None)

    def load_thresholds(self, state: Mapping[str, Any]) -> None:
        """Those that public rows set before."""
        self._threshold_now()
        assert self.adaptive is not None  # the engine has the rule
        self.adaptive.load(state)

    def drop(self, name: str) -> None:
        """The sums of one parameter; coordinates in a subspace are of all."""
        self.totals.pop(name, None)
        self.public.drop(name)
        if self._engine._subspace is not None:
            self._engine._subspace.sums.forget()

    @property
    def begun(self) -> bool:
        """Whether backward passes since the last step have left sums."""
        return bool(self._limits)

    # --- a backward pass -----------------------------------------------------------------------------------------

    def begin_pass(self) -> None:
        self.public.begin_pass()
        self.split = None
        self.staged.clear()
        if not self.totals:
            self._divisor = self._engine.expected_batch_size
        if self._engine.shards is not None:
            trained = [name for name, p in self._engine._attached.stepped if p.requires_grad]
            self._engine.shards.begin(trained, self._divisor)
        self.threshold = self._threshold_now()
        if self.grid is not None:
            self.grid.begin_pass(self.threshold)
        if self._engine._subspace is not None:
            self._engine._subspace.sums.begin_pass()

    def _threshold_now(self) -> Threshold | PublicThresholds:
        engine = self._engine
        rule = engine.max_grad_norm
        if isinstance(rule, PublicQuantile):
            if self.adaptive is None or self.adaptive.rule is not rule:
                self.adaptive = PublicThresholds(engine, rule)
            return self.adaptive
        self.adaptive = None
        parameters: Any = engine._attached.stepped or engine.model.named_parameters()
        with torch._C.DisableTorchFunctionSubclass():
            trained = {engine.layers[name] for name, p in parameters if p.requires_grad}
        return Threshold.of(rule, trained)

    def take_split(self, samples: int) -> None:
        """The backward pass is one of so many rows, all of them private outside `mixed`."""
        rows = self._engine.public_rows
        self.split = None if rows is None else rows.split(samples)
        if self.split is not None and self.grid is not None and self._engine.loss_reduction == "mean":
            raise PrivacyError(
                "mixed(): with secure noise and loss_reduction='mean' the last bits of public gradients tell how many "
                "private rows the batch has; pass loss_reduction='sum', and a loss that is a sum"
            )
        if self.split is not None and self.split.weight and self._engine.shards is not None:
            self._engine.shards.expect_public()

    def private_norms(self, norm_sq: Tensor, layer: str | None) -> Tensor:
        """Of squared norms of all rows those of private rows; the public ones set the threshold where it is due."""
        split = self.split
        if split is None:
            return norm_sq
        if self.wants_norms(layer):
            self.set_threshold(norm_sq[split.public], layer)
        return norm_sq[split.private]

    def wants_norms(self, layer: str | None) -> bool:
        """Whether the norms of this pass's public rows set a threshold."""
        public = self.split is not None and (self.split.count > 0 or self._engine.ranks is not None)
        return self.adaptive is not None and public and self.adaptive.due(layer)

    def set_threshold(self, norm_sq: Tensor, layer: str | None) -> None:
        """By squared norms of public rows, those of all ranks."""
        assert self.adaptive is not None  # wants_norms
        scale, ranks = self.scale(len(norm_sq)), self._engine.ranks
        if ranks is not None:
            norm_sq, scale = ranks.gather(norm_sq.double() / scale**2), 1.0
        if len(norm_sq):
            self.adaptive.set(layer, norm_sq, scale)

    def scale(self, samples: int) -> float:
        """What per-sample gradients are multiplied with by the loss, of `samples` rows or of all of a mixed batch."""
        samples = samples if self.split is None else self.split.samples
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

    def public_coef(self, parameter: Tensor) -> Tensor:
        """Factors of the public rows of a pass: its weight, and what undoes the loss's scale."""
        assert self.split is not None
        factor = self.split.weight / self.scale(self.split.samples)
        return torch.full((self.split.count,), factor, dtype=self._dtype, device=parameter.device)

    def add_public(self, name: str, total: Tensor) -> None:
        """Add a sum of public rows to what the step releases."""
        if self._engine.shards is None:
            self.public.add(name, total)
        else:
            self._engine.shards.add_public(name, total)

    def add(self, parameter: PrivateParameter, total: Tensor, layer: str | None) -> None:
        """Add a sum, clipped by the threshold of a layer or the whole, to what the step releases, once this backward
        pass has ended well."""
        name = parameter._dp_name
        if self.adaptive is not None and layer is not None:
            self.adaptive.clips(name, layer)
        total = total if self.grid else total.to(sum_dtype(total))
        if self._engine.shards is None:
            _accumulate(self.staged, name, total)
        else:
            self._engine.shards.add(name, total)

    def end_pass(self, norm_sq: Tensor) -> None:
        """`norm_sq` are those of private rows."""
        subspace = self._engine._subspace
        if subspace is not None and subspace.takes_public_rows:
            return
        true_norm_sq = norm_sq / self.scale(len(norm_sq)) ** 2
        if self.users is not None:
            true_norm_sq = self.users.end_pass(true_norm_sq)
        if subspace is not None:
            subspace.sums.end_pass()
        self._count(true_norm_sq)

    def _count(self, true_norm_sq: Tensor) -> None:
        """What is staged is of a whole backward pass."""
        if self._engine.shards is not None:
            self.staged, public = self._engine.shards.finish(torch.int64 if self.grid else None)
            self.public.stage(public)
        for name, total in self.staged.items():
            _accumulate(self.totals, name, total)
        self.staged.clear()
        self.public.end_pass(self.split)
        self.split = None
        self._limits.append(self.threshold.whole)
        self.norm_sq.append(true_norm_sq)

    def take(self, captured: StepSums) -> None:
        """End a pass with copies of what a replay of a captured one has left, which the next replay writes over."""
        ratio = captured._divisor / self._divisor  # 1 unless expected_batch_size has changed
        copies = torch._foreach_mul(list(captured.totals.values()), ratio)
        self.staged.update(zip(captured.totals, copies, strict=True))
        (true_norm_sq,) = captured.norm_sq
        self._count(true_norm_sq.clone())

    # --- the step ------------------------------------------------------------------------------------------------

    def release(self, trained: Sequence[tuple[str, Tensor]]) -> list[Tensor]:
        """What a step releases of parameters, by name: noisy sums over the expected batch size, and public sums."""
        engine = self._engine
        if (engine.noise.mode == "secure") != (self.grid is not None):
            raise PrivacyError("noise: was replaced by one of another mode; make a new DPEngine with it")
        if engine._subspace is not None:
            return engine._subspace.sums.release(trained)
        sums = [self.totals[name] if name in self.totals else self._none(name, p) for name, p in trained]
        names = [name for name, _ in trained]
        threshold = self._threshold_now()
        if self.adaptive is not None and not self.adaptive.any_known():
            raise PrivacyError(
                "step(): no public row has set a threshold yet, so it is not known how much noise there must be; call "
                "backward() within mixed(public_rows) before, or pass PublicQuantile(start=)"
            )
        if self.grid is None and self.totals and self._divisor != engine.expected_batch_size:
            torch._foreach_mul_(sums, self._divisor / engine.expected_batch_size)
        if self.adaptive is not None and engine.strategy == "per_layer":
            if engine.ranks is not None:
                agree(self, engine.ranks, trained, self.adaptive.whole)
            released = self._release_by_layer(sums, names, self.adaptive)
        else:
            limits = self._limits or [threshold.whole if self.adaptive is None else self.adaptive.known(None)]
            limit = functools.reduce(larger, limits)
            if engine.ranks is not None:
                limit = agree(self, engine.ranks, trained, limit)
            released = self._release_as_one(sums, limits, limit)
        self.public.mix_(released, names, engine.expected_batch_size)
        return released

    def _release_as_one(self, sums: list[Tensor], limits: list[Limit], limit: Limit) -> list[Tensor]:
        """Noise for the largest threshold of the whole gradient."""
        engine = self._engine
        std = limit * engine.noise_multiplier / engine.expected_batch_size
        shown = self.grid.floats(sums) if self.grid is not None and engine.measure_signal else sums
        self.metrics = Metrics(self.norm_sq, limits, shown, std, engine.measure_signal)
        return self._with_noise(sums, std, float(limit) if self.grid is not None else 0.0)

    def _release_by_layer(self, sums: list[Tensor], names: list[str], thresholds: PublicThresholds) -> list[Tensor]:
        """Noise for the vector of L layers' sums, each over its own threshold, whose sensitivity is sqrt(L)."""
        engine = self._engine
        thresholds.check_counted(names)
        std = math.sqrt(len(thresholds.layers)) * engine.noise_multiplier / engine.expected_batch_size
        if self.grid is not None:
            layers = [thresholds.layer_of(name) for name in names]
            shown = self.grid.floats_by_layer(sums, layers, thresholds) if engine.measure_signal else sums
            self.metrics = Metrics(self.norm_sq, self._limits, shown, std, engine.measure_signal)
            return self.grid.release_by_layer(sums, layers, thresholds)
        units = [thresholds.of_parameter(name).to(total.device) for name, total in zip(names, sums, strict=True)]
        torch._foreach_div_(sums, [unit.where(unit > 0, 1.0) for unit in units])  # a threshold of 0 has sums of 0
        self.metrics = Metrics(self.norm_sq, self._limits, sums, std, engine.measure_signal)
        sums = self._with_noise(sums, std, 0.0)
        torch._foreach_mul_(sums, units)
        return sums

    def _with_noise(self, sums: list[Tensor], std: Limit, limit: float) -> list[Tensor]:
        """Over several ranks: of the sums of all, each adding noise to its own part; `limit` is for integer sums."""
        engine, parts, offsets = self._engine, sums, None
        if engine.ranks is not None:
            parts, offsets = engine.ranks.reduce(sums)
        if self.grid is not None:
            parts = self.grid.release(parts, limit, offsets) if parts else []
        elif engine.noise_multiplier and parts:
            add_gaussian_noise_(parts, std, engine.noise, offsets)
        return parts if engine.ranks is None else engine.ranks.collect(parts, sums)

    def _none(self, name: str, parameter: Tensor) -> Tensor:
        """What the step adds for a parameter that no pass came to."""
        if self._engine.shards is None:
            return self.zeros(parameter)
        return self._engine.shards.zeros(name, torch.int64 if self.grid else sum_dtype(parameter), parameter.device)

    def zeros(self, parameter: Tensor) -> Tensor:
        dtype = torch.int64 if self.grid else sum_dtype(parameter)
        return torch.zeros(parameter.shape, dtype=dtype, device=parameter.device)


def _accumulate(sums: dict[str, Tensor], name: str, total: Tensor) -> None:
    sums[name] = sums[name].add_(total) if name in sums else total
