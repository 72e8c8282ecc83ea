"""What `make_private` returns: Opacus's classes, whose work an engine does."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

import numpy as np
import opacus
import torch
from opacus.grad_sample import AbstractGradSampleModule
from opacus.grad_sample.gsm_base import AbstractGradSampleHooks
from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping
from opacus.utils.uniform_sampler import UniformWithReplacementSampler
from torch import Tensor, nn

from adamix_kernels.nn.engine import DPEngine
from adamix_kernels.nn.factors import ConvFactors, Factors, LinearFactors, PerSample, ScaleShiftFactors
from adamix_kernels.nn.parameter import PrivateParameter
from adamix_kernels.nn.passes import Passes, Record, _Pass
from adamix_kernels.ops._factored import positions_axis


class GradSampleHooks(AbstractGradSampleHooks):
    """Of a model that is not wrapped: `cleanup()` takes the engine off."""

    def remove_hooks(self) -> None:
        detach(self._module)


class GradSampleModule(AbstractGradSampleModule):
    """Opacus's wrapper, which only passes on: the engine sees what the model `_module` does."""

    def remove_hooks(self) -> None:
        detach(self._module)

    def zero_grad(self, set_to_none: bool = False) -> None:
        with torch._C.DisableTorchFunctionSubclass():
            super().zero_grad(set_to_none)
        engine = engine_of(self._module)
        if engine is not None and isinstance(engine._passes, CountedPasses):
            engine._passes.drop()


def engine_of(module: nn.Module) -> DPEngine | None:
    return next((p._dp_engine for p in module.parameters() if isinstance(p, PrivateParameter)), None)


def detach(module: nn.Module) -> None:
    engine = engine_of(module)
    if engine is not None:
        engine.detach()


class DPOptimizer(opacus.optimizers.DPOptimizer):
    """Opacus's optimizer on an engine, which adds the noise within the wrapped optimizer's own step."""

    def __init__(
        self, optimizer: torch.optim.Optimizer, engine: DPEngine, passes: CountedPasses, **settings: Any
    ) -> None:
        self.engine, self._passes = engine, passes
        self._uncleared = False
        super().__init__(optimizer, **settings)
        engine._attached.handles.append(optimizer.register_step_pre_hook(self._account))

    @property
    def noise_multiplier(self) -> float:
        return self.engine.noise_multiplier

    @noise_multiplier.setter
    def noise_multiplier(self, value: float) -> None:
        self.engine.noise_multiplier = float(value)

    @property
    def max_grad_norm(self) -> Any:
        limit = self.engine.max_grad_norm
        return math.hypot(*limit.values()) if isinstance(limit, Mapping) else limit

    @max_grad_norm.setter
    def max_grad_norm(self, value: Any) -> None:
        limit = self.engine.max_grad_norm
        if isinstance(limit, Mapping):
            scale = value / self.max_grad_norm
            self.engine.max_grad_norm = {name: x * scale for name, x in limit.items()}
        else:
            self.engine.max_grad_norm = value

    @property
    def max_grad_norms(self) -> list[float]:
        """With per_layer clipping: of each parameter."""
        limit = self.engine.max_grad_norm
        if not isinstance(limit, Mapping):
            raise AttributeError("max_grad_norms: this optimizer has one max_grad_norm; pass clipping='per_layer'")
        return list(limit.values())

    @property
    def accumulated_iterations(self) -> int:
        return max(1, self._passes.count)

    @property
    def grad_samples(self) -> list[Tensor]:
        raise NotImplementedError(
            "grad_samples: this backend never makes per-sample gradients; their clipped sum is all that a step needs"
        )

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        if closure is not None:
            with torch.enable_grad():
                closure()
        if self._uncleared:
            raise ValueError("Gradients haven't been cleared since the last optimizer step; call zero_grad() after it")
        if self._check_skip_next_step():
            self._passes.skipped, self._passes.count = True, 0
            result = None
        else:
            mean = self.loss_reduction == "mean"
            self.engine.expected_batch_size = self.expected_batch_size * self.accumulated_iterations if mean else 1.0
            result = self.original_optimizer.step()
            self._passes.skipped = False
        self._uncleared = True
        return result

    def zero_grad(self, set_to_none: bool = False) -> None:
        with torch._C.DisableTorchFunctionSubclass():  # after a skipped step the sum stays
            self.engine._attached.zero_grad(set_to_none)
        self._passes.drop()
        self._uncleared = False

    def _account(self, *_: Any) -> None:
        if self.step_hook:
            self.step_hook(self)

    def _refuse(self, *_: Any, **__: Any) -> Any:
        raise NotImplementedError("the engine clips in backward() and adds noise in step(): call these alone")

    clip_and_accumulate = add_noise = scale_grad = pre_step = _refuse


class Criterion(DPLossFastGradientClipping):
    """The criterion of "ghost": losses of samples, reduced, as a plain tensor for one ordinary backward pass."""

    def __call__(self, *args: Any, shape: Any = None, **kwargs: Any) -> Tensor:
        losses = super().__call__(*args, shape=shape, **kwargs).loss_per_sample
        return losses.mean(0) if self.loss_reduction == "mean" else losses.sum(0)


class CountedPasses(Passes):
    """Passes that are counted, as Opacus allows one or more a step, and whose layers are single parameters."""

    def __init__(self, engine: DPEngine, accumulates: bool) -> None:
        super().__init__(engine)
        self.accumulates = accumulates
        self.skipped = False  # the last step
        self.count = 0  # since the last step, skipped or not

    def drop(self) -> None:
        """zero_grad(): what came since the last step is thrown away. After a skipped one the sum must stay."""
        if not self.skipped:
            self._engine._forget()
        elif self.count:
            raise ValueError(
                "zero_grad() after a skipped step and a backward pass: the pass is part of the sum already; call "
                "step() before it, which may be skipped too"
            )
        self.count = 0

    def _enter(self, task: int) -> _Pass:
        number = self._number
        now = super()._enter(task)
        self.count += self._number - number
        if self.count > 1 and not self.accumulates:
            raise ValueError(
                "Poisson sampling is not compatible with grad accumulation: call optimizer.step() and zero_grad() "
                "after every backward pass, or use a BatchMemoryManager"
            )
        return now

    def _records(self, targets: Sequence[Tensor], build: Callable[[], Factors], lent: Sequence[Tensor]) -> list[Record]:
        records = super()._records(targets, build, lent)
        return list(chain(*(map(_apart, records)))) if self._engine.strategy == "per_layer" else records


def _apart(record: Record) -> list[Record]:
    """A record of several parameters as one for each."""
    parameters, factors = record
    if len(parameters) == 1:
        return [record]
    if isinstance(factors, LinearFactors):
        bias = positions_axis(factors.backprops).sum(1)
    elif isinstance(factors, ConvFactors):
        bias = factors.backprops.flatten(2).sum(2)
    elif isinstance(factors, ScaleShiftFactors):
        bias = positions_axis(factors.backprops).sum(1).view(-1, *factors.shape)
    else:
        return [((p,), PerSample([grads])) for p, grads in zip(parameters, factors.grad_sample(), strict=True)]
    return [(parameters[:1], replace(factors, bias=False)), (parameters[1:], PerSample([bias]))]


class SystemSampler(UniformWithReplacementSampler):
    """Poisson batches drawn by the operating system's generator."""

    def __iter__(self) -> Iterator[list[int]]:
        for _ in range(self.steps):
            words = np.frombuffer(os.urandom(8 * self.num_samples), np.uint64)
            yield np.flatnonzero((words >> 11) * 2.0**-53 < self.sample_rate).tolist()
