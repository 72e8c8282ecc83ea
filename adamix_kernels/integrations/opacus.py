"""Opacus's `PrivacyEngine` on this backend, for code written for Opacus 1.6: change one import.

    from adamix_kernels.integrations.opacus import PrivacyEngine  # was: from opacus import PrivacyEngine

The loop stays as it is, and so do Opacus's validator, accountants, Poisson loader, `BatchMemoryManager`, schedulers of
noise and threshold, checkpoints and the "_module." in the names of the state_dict. What is different:

* `p.grad_sample` and `p.summed_grad` stay None: per-sample gradients are never made.
* Every `grad_sample_mode` is the engine's book-keeping, one backward pass; "ghost" returns its criterion, whose losses
  are plain tensors.
* Noise does not follow `torch.manual_seed`: pass a `noise_generator` for a run that can be repeated.
* `secure_mode` needs no torchcsprng: noise is ChaCha20, Poisson batches are drawn by the operating system.
* After a skipped step zero_grad() cannot throw a further backward pass away: it is in the sum, and an error says so.
* Refused: adaptive clipping, `batch_first=False`, `rand_on_empty`, distributed modules; trainable parameters that the
  optimizer does not hold.

Opacus 1.6's own tests with this engine in place of its own (6 examples where hypothesis draws them, a stand-in for
torchvision): of privacy_engine, batch_memory_manager, gradient_accumulation, poisson, randomness, dpdataloader and
schedulers, with modules wrapped and not, frozen, tied and custom layers,
  pass: basic, compare_to_vanilla (with closures), checkpoints, noise_changes_every_time, parameters_match,
    get_compatible_module_inaction, model_validator, model_validator_after_fix, make_private_with_epsilon,
    privacy_engine_poisson_accumulation, privacy_engine_zero_grad, batch_splitter_zero_grad, basic and empty_batch of
    the BatchMemoryManager, all of poisson, dpdataloader and schedulers; noise_level too, but without a seed its bound
    of 15 % is missed in every fifth run for the 160 weights of the custom layers;
  pass if noise follows torch.manual_seed: deterministic_run, equivalent_to_one_batch;
  pass if `p.summed_grad` is filled in: flat_clipping, per_layer_clipping;
  cannot: sample_grad_aggregation and privacy_engine_no_poisson_accumulation, which read per-sample gradients;
    global_seed, which seeds after make_private; classes with batch_first=False; those of
    privacy_engine_validation that expect a module not to be supported.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import opacus
import torch
from opacus.distributed import DifferentiallyPrivateDistributedDataParallel
from opacus.grad_sample import AbstractGradSampleModule
from torch import nn
from torch.distributed.fsdp import FSDPModule

from adamix_kernels.integrations._opacus_parts import (
    CountedPasses,
    Criterion,
    DPOptimizer,
    GradSampleHooks,
    GradSampleModule,
    SystemSampler,
    detach,
)
from adamix_kernels.nn.engine import DPEngine
from adamix_kernels.ops.noise import Noise

MODES = ("hooks", "functorch", "ew", "ghost")
DISTRIBUTED = (nn.parallel.DistributedDataParallel, DifferentiallyPrivateDistributedDataParallel, FSDPModule)


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
        private._passes = passes = CountedPasses(private, accumulates=not poisson_sampling)
        wrapper = (GradSampleModule if wrap_model else GradSampleHooks)(module, loss_reduction=loss_reduction)
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
        if isinstance(module, DISTRIBUTED):
            raise NotImplementedError("module: is distributed, which this adapter does not do; pass the plain module")

    def _loader(self, data_loader: Any, poisson: bool) -> Any:
        loader = self._prepare_data_loader(data_loader, poisson_sampling=poisson, distributed=False)
        if self.secure_mode:
            loader.batch_sampler.__class__ = SystemSampler
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
            strategy="per_layer" if isinstance(limits, Mapping) else "auto",
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
