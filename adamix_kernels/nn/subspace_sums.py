"""Clipped sums of private gradients of a step in a subspace, and what the step releases of them.

`adamix_kernels.nn.subspace` says why that is private.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from adamix_kernels.nn.basis import Group, floats, names_of
from adamix_kernels.nn.clipping import Limit, factors, larger
from adamix_kernels.nn.errors import PrivacyError
from adamix_kernels.nn.factors import Factors
from adamix_kernels.nn.metrics import Metrics
from adamix_kernels.nn.parameter import PrivateParameter
from adamix_kernels.ops._numerics import sum_dtype
from adamix_kernels.ops.clip import clip_sum
from adamix_kernels.ops.grid import MOST_ROWS, grid_clip_sum, grid_for, grid_release
from adamix_kernels.ops.noise import add_gaussian_noise_
from adamix_kernels.ops.norm import grad_norm_sq

if TYPE_CHECKING:
    from adamix_kernels.nn.engine import DPEngine
    from adamix_kernels.nn.subspace import PublicSubspace

Record = tuple[tuple[PrivateParameter, ...], Factors]


@dataclass
class _Pass:
    """Clipped sums of one backward pass, or of several, by group."""

    limits: dict[Group, Limit] = field(default_factory=dict)
    sums: dict[Group, dict[str, Tensor]] = field(default_factory=dict)
    grids: dict[Group, float] = field(default_factory=dict)  # in secure mode, whose sums are int64
    groups: int = 0
    samples: int = 0

    def add(self, group: Group, name: str, total: Tensor) -> None:
        own = self.sums.setdefault(group, {})
        own[name] = own[name].add_(total) if name in own else total


class SubspaceSums:
    """Of whole backward passes: coordinates by group, as "", or sums by parameter outside of the subspace."""

    def __init__(self, engine: DPEngine, subspace: PublicSubspace) -> None:
        self._engine, self._subspace = engine, subspace
        self.forget()

    @property
    def pending(self) -> bool:
        """Whether a backward pass waits for its step."""
        return bool(self._passes)

    def forget(self) -> None:
        """Those since the last step."""
        self._staged, self._step = _Pass(), _Pass()  # of the pass that runs now, and of the whole ones before
        self._passes: list[dict[Group, Limit]] = []

    # --- a backward pass -----------------------------------------------------------------------------------------

    def begin_pass(self) -> None:
        self._staged = _Pass()

    def take(self, groups: Mapping[Group, list[Record]], samples: int) -> Tensor:
        """Clip and add; squared norms `[B]` of what is clipped, as the loss scales it."""
        self._staged.samples = samples
        trained = self._subspace.trained()
        self._staged.groups = max(self._staged.groups, len(trained))
        # also of a group that no sample of this pass reaches: one that is added may
        self._staged.limits |= {group: self._subspace.limit(group) for group in trained}
        scale = self._engine._sums.scale(samples)
        return torch.stack([self._clip(group, own) for group, own in groups.items()]).sum(0) * scale**2

    def end_pass(self) -> None:
        """Count it, now that it has ended well."""
        self._step.samples += self._staged.samples
        self._step.groups = max(self._step.groups, self._staged.groups)
        if self._engine._sums.grid is not None and self._step.samples > MOST_ROWS:
            raise PrivacyError(f"backward(): {self._step.samples} samples since the last step; 2^36 are the most")
        for group, sums in self._staged.sums.items():
            for name, total in sums.items():
                self._step.add(group, name, total)
        self._step.grids |= self._staged.grids
        self._passes.append(self._staged.limits)
        self._staged = _Pass()

    def _clip(self, group: Group, parts: list[Record]) -> Tensor:
        sums, limit = self._engine._sums, self._subspace.limit(group)
        users = sums.users
        if sums.grid is not None and any(p.get(group, limit) != limit for p in self._passes):
            raise PrivacyError(
                "max_grad_norm: was changed between the backward passes of one step, whose integer sums are of one "
                "grid in secure mode; change it after the step, or pass Noise(mode='fast')"
            )
        samples = parts[0][1].samples
        if group.projected:
            if group not in self._subspace.bases:  # no public row reaches these parameters
                return torch.zeros(samples, dtype=torch.float64, device=floats(parts[0][1])[0].device)
            named = {names_of(ps): part for ps, part in parts}
            found = self._subspace.bases[group].coordinates(named, samples) / sums.scale(samples)
            grads, names = [found if users is None else users.folded(found)], [""]
        else:
            whole = parts if users is None else users.summed(parts)
            names = [p._dp_name for ps, _ in parts for p in ps]
            scale = sums.scale(samples)
            if users is None and sums.grid is None:  # they need not be made
                norm_sq = torch.stack([part.norm_sq().double() for _, part in whole]).sum(0) / scale**2
                coef = self._coef(norm_sq, limit)
                totals = [total / scale for _, part in whole for total in part.clip_sum(coef)]
                for name, total in zip(names, totals, strict=True):
                    self._staged.add(group, name, total)
                return norm_sq
            grads = [grad.double() / scale for _, part in whole for grad in part.grad_sample()]
        norm_sq = grad_norm_sq(grads)
        coef = self._coef(norm_sq, limit)
        if sums.grid is None:
            totals = clip_sum(grads, coef)
        else:
            grid = self._step.grids.get(group) or grid_for(
                float(limit), float(self._std(limit, len(self._subspace.trained())))
            )
            self._staged.grids[group] = grid
            totals = grid_clip_sum(grads, coef, float(limit), grid)
        for name, total in zip(names, totals, strict=True):
            self._staged.add(group, name, total)
        return norm_sq.double()

    def _coef(self, norm_sq: Tensor, limit: Limit) -> Tensor:
        return factors(norm_sq, limit, 1.0, self._engine.clipping == "automatic")

    def _std(self, limit: Limit, groups: int) -> Limit:
        """Of the noise on a group's sum; the vector of all sums over their thresholds has sensitivity sqrt(groups)."""
        return limit * (self._engine.noise_multiplier * math.sqrt(groups))

    # --- the step ------------------------------------------------------------------------------------------------

    def release(self, trained: Sequence[tuple[str, Tensor]]) -> list[Tensor]:
        """Noisy sums over the expected batch size, of parameters by name."""
        self._subspace.check_current()
        if not self._passes:  # a sample would have been clipped by what it is now
            self._engine._sums.threshold = self._engine._sums._threshold_now()
        groups = self._subspace.trained()
        count = max(len(groups), self._step.groups)
        grads: dict[str, Tensor] = {}
        shown: list[tuple[Tensor, Limit]] = []  # sums, and the deviation of their noise
        for group in sorted(groups, key=str):
            limits = [p[group] for p in self._passes if group in p] or [self._subspace.limit(group)]
            limit = functools.reduce(larger, limits)
            std = self._std(limit, count)
            sums = self._sums_of(group, trained)
            grid = self._step.grids.get(group, 1.0)
            shown += [(total * grid, std) for total in sums.values()]
            released = dict(zip(sums, self._noisy(list(sums.values()), group, limit, std), strict=True))
            if not group.projected:
                grads |= released
            elif released:
                grads |= self._subspace.bases[group].lift(released[""])
        self._measure(shown)
        divisor = self._engine.expected_batch_size
        return [grads[n].div_(divisor) if n in grads else torch.zeros_like(p, requires_grad=False) for n, p in trained]

    def _sums_of(self, group: Group, trained: Sequence[tuple[str, Tensor]]) -> dict[str, Tensor]:
        """Without noise: coordinates, as "", or by parameter; zeros where no gradient came."""
        sums = self._step.sums.get(group, {})
        integers = self._engine._sums.grid is not None
        if group.projected:
            basis = self._subspace.bases.get(group)
            if basis is None:
                return {}
            zeros = basis.matrix.new_zeros(len(basis.matrix), dtype=torch.int64 if integers else torch.float64)
            return {"": sums.get("", zeros)}
        by_layer, layers = group.layer is not None, self._engine.layers
        own = {n: p for n, p in trained if not self._subspace.inside(n) and (not by_layer or layers[n] == group.layer)}
        return {
            n: sums[n] if n in sums else torch.zeros_like(p, dtype=torch.int64 if integers else sum_dtype(p))
            for n, p in own.items()
        }

    def _noisy(self, sums: list[Tensor], group: Group, limit: Limit, std: Limit) -> list[Tensor]:
        engine = self._engine
        if engine._sums.grid is not None:
            grid = self._step.grids.get(group) or grid_for(float(limit), float(std))
            return list(grid_release(sums, float(std), grid, engine.noise)) if sums else []
        if engine.noise_multiplier and sums:
            add_gaussian_noise_(sums, std, engine.noise)
        return sums

    def _measure(self, shown: Sequence[tuple[Tensor, Limit]]) -> None:
        sums, engine = [total for total, _ in shown], self._engine
        whole = [math.fsum(float(limit) ** 2 for limit in p.values()) ** 0.5 for p in self._passes]
        power = math.fsum(float(std) ** 2 * total.numel() for total, std in shown)
        std = (power / max(1, sum(total.numel() for total in sums))) ** 0.5
        engine._sums.metrics = Metrics(engine._sums.norm_sq, whole, sums, std, engine.measure_signal)
