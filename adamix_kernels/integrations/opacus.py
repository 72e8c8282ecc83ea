"""Opacus's `PrivacyEngine` on this backend, for code written for Opacus 1.6: change one import.

    from adamix_kernels.integrations.opacus import PrivacyEngine  # was: from opacus import PrivacyEngine

The loop stays as it is, and so do Opacus's validator, accountants, Poisson loader, `BatchMemoryManager`, schedulers of
noise and threshold, checkpoints and the "_module." in the names of the state_dict. What is different:

* There is no `p.grad_sample` and no `p.summed_grad`: per-sample gradients are never made.
* Every `grad_sample_mode` is the engine's book-keeping, one backward pass; "ghost" returns its criterion, whose losses
  are plain tensors.
* Noise does not follow `torch.manual_seed`: pass a `noise_generator` for a run that can be repeated.
* `secure_mode` needs no torchcsprng: noise is ChaCha20, Poisson batches are drawn by the operating system.
* Refused: adaptive clipping, `batch_first=False`, `rand_on_empty`, distributed modules; trainable parameters that the
  optimizer does not hold.
"""

from __future__ import annotations

import math
import os
import warnings
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
from adamix_kernels.ops.noise import Noise

MODES = ("hooks", "functorch", "ew", "ghost")


# --- what make_private returns -----------------------------------------------------------------------------------


class _Hooks(AbstractGradSampleHooks):
    """Of a model that is not wrapped: `cleanup()` takes the engine off."""

    def remove_hooks(self) -> None:
        detach(self._module)


class GradSampleModule(AbstractGradSampleModule):
    """Opacus's wrapper, which only passes on: the engine sees what the model `_module` does."""

    def remove_hooks(self) -> None:
        detach(self._module)

    def zero_grad(self, set_to_none: bool = False) -> None:
        super().zero_grad(set_to_none)
        engine = engine_of(self._module)
        if engine is not None and isinstance(engine._passes, _Passes):
            engine._passes.drop()


def engine_of(module: nn.Module) -> DPEngine | None:
    return next((p._dp_engine for p in module.parameters() if isinstance(p, PrivateParameter)), None)


def detach(module: nn.Module) -> None:
    engine = engine_of(module)
    if engine is not None:
        engine.detach()


class DPOptimizer(opacus.optimizers.DPOptimizer):
    """Opacus's optimizer on an engine, which adds the noise within the wrapped optimizer's own step."""

    def __init__(self, optimizer: torch.optim.Optimizer, engine: DPEngine, passes: _Passes, **settings: Any) -> None:
        self.engine, self._passes = engine, passes
        self._uncleared = False
        super().__init__(optimizer, **settings)
        engine._handles.append(optimizer.register_step_pre_hook(self._account))

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
        self.engine._zero_grad(set_to_none)
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


# --- what the engine does differently for it ---------------------------------------------------------------------


class _Passes(Passes):
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

    def _records(self, targets: Sequence[Tensor], build: Callable[[], Factors]) -> list[Record]:
        records = super()._records(targets, build)
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


class _SystemSampler(UniformWithReplacementSampler):
    """Poisson batches drawn by the operating system's generator."""

    def __iter__(self) -> Iterator[list[int]]:
        for _ in range(self.steps):
            words = np.frombuffer(os.urandom(8 * self.num_samples), np.uint64)
            yield np.flatnonzero((words >> 11) * 2.0**-53 < self.sample_rate).tolist()


# --- the engine --------------------------------------------------------------------------------------------------


class PrivacyEngine(opacus.PrivacyEngine):
    """`opacus.PrivacyEngine` whose `make_private` attaches a `DPEngine`; see there and in this module's docstring."""

    def __init__(self, *, accountant: str = "prv", secure_mode: bool = False) -> None:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Secure RNG turned off")
            super().__init__(accountant=accountant)
        self.secure_mode = secure_mode

    def make_private(
        self,
        *,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        criterion: Any = None,
        data_loader: Any,
        noise_multiplier: float,
        max_grad_norm: float | Sequence[float],
        batch_first: bool = True,
        loss_reduction: str = "mean",
        poisson_sampling: bool = True,
        clipping: str = "flat",
        noise_generator: torch.Generator | None = None,
        grad_sample_mode: str = "hooks",
        wrap_model: bool = True,
        rand_on_empty: bool = False,
        **kwargs: Any,  # for get_noise_multiplier
    ) -> Any:
        """As Opacus's: `(module, optimizer, data_loader)`, with "ghost" `(module, optimizer, criterion, data_loader)`.

        With `clipping="per_layer"` `max_grad_norm` is a list with the threshold of each trainable parameter.

        Raises:
            NotImplementedError: for what this backend does not do; the message says what to do instead.
            ValueError: as Opacus does, and for lists of thresholds that do not fit.
        """
        if noise_generator is not None and self.secure_mode:
            raise ValueError("noise_generator: passing a seed is prohibited in secure mode")
        self._check_supported(module, batch_first, clipping, grad_sample_mode, rand_on_empty, poisson_sampling)
        if isinstance(optimizer, opacus.optimizers.DPOptimizer):
            optimizer = optimizer.original_optimizer
        if isinstance(module, GradSampleModule):
            module = module._module
        detach(module)  # made private before: for another data set, or with other settings
        if {p for group in optimizer.param_groups for p in group["params"]} - set(module.parameters()):
            raise ValueError("Module parameters are different than optimizer Parameters")
        self.validate(module=module, optimizer=optimizer, data_loader=data_loader)
        limits = _limits(module, optimizer, max_grad_norm, clipping)

        data_loader = self._loader(data_loader, poisson_sampling)
        sample_rate = 1 / len(data_loader)
        private = self._attach(module, optimizer, noise_multiplier, limits, loss_reduction, noise_generator)
        private._passes = passes = _Passes(private, accumulates=not poisson_sampling)
        wrapper = (GradSampleModule if wrap_model else _Hooks)(module, loss_reduction=loss_reduction)
        made = DPOptimizer(
            optimizer,
            private,
            passes,
            noise_multiplier=noise_multiplier,
            max_grad_norm=math.hypot(*limits.values()) if isinstance(limits, Mapping) else limits,
            expected_batch_size=int(len(data_loader.dataset) * sample_rate),
            loss_reduction=loss_reduction,
            secure_mode=self.secure_mode,
        )
        made.attach_step_hook(self.accountant.get_optimizer_hook_fn(sample_rate=sample_rate))
        if grad_sample_mode == "ghost":
            criterion = nn.CrossEntropyLoss(reduction=loss_reduction) if criterion is None else criterion
            return wrapper, made, Criterion(wrapper, made, criterion, loss_reduction), data_loader
        return wrapper, made, data_loader

    def _check_supported(
        self, module: nn.Module, batch_first: bool, clipping: str, mode: str, rand_on_empty: bool, poisson: bool
    ) -> None:
        known = {
            "grad_sample_mode": (mode in MODES, f"is {mode!r}; pass one of {', '.join(map(repr, MODES))}"),
            "clipping": (
                clipping in ("flat", "per_layer"),
                f"is {clipping!r}; pass 'flat' or 'per_layer'. A threshold that follows private gradients spends "
                "budget of its own: set optimizer.max_grad_norm from public ones, or train with opacus.PrivacyEngine",
            ),
            "batch_first": (batch_first, "is False; the batch must be dimension 0: transpose the inputs in forward()"),
            "rand_on_empty": (
                not rand_on_empty,
                "puts a made-up sample where one private sample would stand, whose effect is then up to 2 "
                "max_grad_norm; leave it off, empty batches are ordinary here",
            ),
            "module": (
                not isinstance(module, AbstractGradSampleModule) or isinstance(module, GradSampleModule),
                "is wrapped by Opacus; pass the plain module, module.to_standard_module()",
            ),
            "poisson_sampling": (
                poisson or not self.secure_mode,
                "is False in secure mode, which draws Poisson batches only; switch one of the two",
            ),
        }
        for name, (fits, message) in known.items():
            if not fits:
                raise NotImplementedError(f"{name}: {message}")
        if isinstance(module, nn.parallel.DistributedDataParallel) or type(module).__name__ in ("DPDDP", "FSDPModule"):
            raise NotImplementedError("module: is distributed, which this adapter does not do; pass the plain module")

    def _loader(self, data_loader: Any, poisson: bool) -> Any:
        loader = self._prepare_data_loader(data_loader, poisson_sampling=poisson, distributed=False)
        if self.secure_mode:
            loader.batch_sampler.__class__ = _SystemSampler
        return loader

    def _attach(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        noise_multiplier: float,
        limits: float | dict[str, float],
        loss_reduction: str,
        generator: torch.Generator | None,
    ) -> DPEngine:
        seed = None
        if generator is not None:
            seed = int(torch.randint(2**63 - 1, (), generator=generator, device=generator.device))
        engine = DPEngine(
            module,
            optimizer,
            max_grad_norm=1.0,
            noise_multiplier=noise_multiplier,
            expected_batch_size=1,  # set in each step
            strategy="per_layer" if isinstance(limits, Mapping) else "book_keeping",
            loss_reduction=loss_reduction,
            noise=Noise(seed, "secure" if self.secure_mode else "fast"),
        )
        if isinstance(limits, Mapping):
            engine.layers = {name: name for name in engine.layers}
        engine.max_grad_norm = limits
        return engine


def _limits(
    module: nn.Module, optimizer: torch.optim.Optimizer, max_grad_norm: Any, clipping: str
) -> float | dict[str, float]:
    """The threshold, or that of each trainable parameter by name, in the optimizer's order."""
    many = isinstance(max_grad_norm, list | tuple)
    if many != (clipping == "per_layer"):
        raise ValueError(
            f"max_grad_norm: is {'a list' if many else 'one number'} with clipping={clipping!r}; pass a list with one "
            "number for each trainable parameter if that is 'per_layer', else a number"
        )
    if not many:
        return float(max_grad_norm)
    stepped = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    if len(stepped) != len(max_grad_norm):
        raise ValueError(
            f"max_grad_norm: has {len(max_grad_norm)} numbers for {len(stepped)} trainable parameters; pass one for "
            "each"
        )
    names = {id(p): name for name, p in module.named_parameters()}
    return {names[id(p)]: float(limit) for p, limit in zip(stepped, max_grad_norm, strict=True)}
