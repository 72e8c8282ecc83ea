"""The engine: a model, an optimizer and a plain loop become private."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from adamix_kernels.nn import rules_layers as _rules_layers  # noqa: F401  attaches the rules
from adamix_kernels.nn.checks import check_free, check_modules, check_parameters
from adamix_kernels.nn.clipping import factors, scaled
from adamix_kernels.nn.errors import PrivacyError
from adamix_kernels.nn.parameter import PrivateParameter
from adamix_kernels.nn.passes import Passes
from adamix_kernels.nn.probe import tell_apart
from adamix_kernels.nn.rules import Rules
from adamix_kernels.ops.noise import Noise, add_gaussian_noise_

STRATEGIES = ("auto", "book_keeping", "two_pass", "per_layer", "materialize")
CLIPPINGS = ("flat", "automatic")
REDUCTIONS = ("mean", "sum")


class _Hook:
    """A hook that copies of the model do not inherit."""

    def __init__(self, method: Callable[..., Any] | None) -> None:
        self._method = method

    def __call__(self, *args: Any) -> Any:
        return self._method(*args) if self._method is not None else None

    def __deepcopy__(self, memo: Any) -> _Hook:
        return _Hook(None)

    def __reduce__(self) -> Any:
        return _Hook, (None,)


class DPEngine:
    """Trains a model privately in its own loop: every backward pass is clipped per sample, every step gets noise.

    Args:
        model: any module whose inputs have the batch in dimension 0. It keeps its class, forward and state_dict.
        optimizer: holds all trainable parameters of the model and no other.
        max_grad_norm: the threshold C of a sample's gradient, above 0; with `strategy="per_layer"` a number is spread
            evenly, C / sqrt(layers) each, and a dict gives each layer (a module's name) its own. May be set anew before
            each backward pass, also to a scalar tensor on the device, as `dp.max_grad_norm`.
        noise_multiplier: standard deviation of the noise over the threshold, on the sum; 0 adds none.
        expected_batch_size: what the noisy sum is divided by, a public constant: sample_rate times the data set's size,
            never the size of a batch.
        strategy: "book_keeping" keeps activations and backprops of every layer until the norms are known: one
            backward pass. "two_pass" needs the least memory and a second pass: call `dp.backward(loss)`. "per_layer"
            clips each layer by itself, within the backward pass. "materialize" makes all per-sample gradients.
            "auto" is "book_keeping".
        clipping: "flat" clips samples above the threshold; "automatic" normalises every sample (Bu et al. 2022).
        loss_reduction: "mean" if the loss is the mean over the samples of a batch, "sum" if their sum. A mean over
            something else, such as the tokens that are not padding, depends on other samples: use a sum.
        loss_scale: what the loss was multiplied with before backward(), for float16; a power of 2.
        noise: its source; None takes a key of the operating system.

    The privacy of a step is that of one Gaussian mechanism with `noise_multiplier`, for adding or removing one sample.
    Between two steps each sample may take part in one backward pass. Micro-batches simply call backward() more often.

    Raises:
        PrivacyError: at once, or in the forward or backward pass, for what cannot be made private, with the remedy.
        TypeError, ValueError: names the argument that does not fit.

    Source: Abadi et al. 2016 (arXiv 1607.00133); Bu et al. 2023 (arXiv 2210.00038) for one backward pass.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        max_grad_norm: float | Tensor | dict[str, float],
        noise_multiplier: float,
        expected_batch_size: float,
        strategy: str = "auto",
        clipping: str = "flat",
        loss_reduction: str = "mean",
        loss_scale: float = 1.0,
        noise: Noise | None = None,
    ) -> None:
        for name, value, known in (
            ("strategy", strategy, STRATEGIES),
            ("clipping", clipping, CLIPPINGS),
            ("loss_reduction", loss_reduction, REDUCTIONS),
        ):
            if value not in known:
                raise ValueError(f"{name}: is {value!r}; pass one of {', '.join(map(repr, known))}")
        for name, number, least in (
            ("noise_multiplier", noise_multiplier, 0.0),
            ("expected_batch_size", expected_batch_size, None),
            ("loss_scale", loss_scale, None),
        ):
            if not isinstance(number, int | float):
                raise TypeError(f"{name}: is {type(number).__name__}; pass a number")
            if not (math.isfinite(number) and (number > 0 or number == least)):
                raise ValueError(f"{name}: is {number}; pass a finite number above 0{', or 0' * (least is not None)}")
        check_free(model)
        check_modules(model)
        check_parameters(model, optimizer)
        self.model, self.optimizer = model, optimizer
        self.noise_multiplier, self.expected_batch_size = float(noise_multiplier), float(expected_batch_size)
        self.strategy = "book_keeping" if strategy == "auto" else strategy
        self.clipping, self.loss_reduction, self.loss_scale = clipping, loss_reduction, float(loss_scale)
        self.noise = Noise() if noise is None else noise
        self.steps = 0
        self.layers = {name: name.rpartition(".")[0] for name, _ in model.named_parameters()}
        self.max_grad_norm = max_grad_norm
        self.batch_size: int | None = None
        self.forward_number: int | None = None
        self.input_storages: set[int] = set()
        self._forwards = 0
        self._public = 0
        self._pulls = 0
        self._sums: dict[str, Tensor] = {}
        self._limit: float | Tensor | None = None  # the largest threshold since the last step
        self._active: set[str] = set()  # layers that are trained now
        self._owned: list[tuple[str, PrivateParameter]] = []
        self._norm_sq: list[Tensor] = []
        self._rules, self._passes = Rules(self), Passes(self)
        self._handles: list[Any] = []
        self._attach()

    # --- attaching -----------------------------------------------------------------------------------------------

    def _attach(self) -> None:
        for name, parameter in self.model.named_parameters():
            parameter.__class__ = PrivateParameter
            assert isinstance(parameter, PrivateParameter)
            parameter._dp_engine, parameter._dp_name = self, name
            self._owned.append((name, parameter))
        self._watch()
        self._handles += [
            self.model.register_forward_pre_hook(_Hook(self._before_forward), with_kwargs=True),
            self.model.register_forward_hook(_Hook(self._after_forward), with_kwargs=True, always_call=True),
            self.optimizer.register_step_pre_hook(_Hook(self._before_step)),
            self.optimizer.register_step_post_hook(_Hook(self._after_step)),
        ]
        self._zero_grad = self.optimizer.zero_grad
        self.optimizer.zero_grad = self.zero_grad  # type: ignore[method-assign]

    def detach(self) -> None:
        """Take the engine off: the model and the optimizer are as they were. Sums of an unfinished step are lost."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for _, parameter in self._owned:
            parameter.__class__ = nn.Parameter  # type: ignore[assignment]
            for mark in ("_dp_engine", "_dp_name", "_dp_guarded"):
                vars(parameter).pop(mark, None)
        self._owned.clear()
        if "zero_grad" in vars(self.optimizer):
            del self.optimizer.zero_grad
        self._sums.clear()
        self._passes.forget()

    def _watch(self) -> None:
        """An ordinary gradient that reaches a private parameter came by a way without a rule."""
        for name, parameter in self._owned:
            parameter.__class__ = PrivateParameter  # where a step failed it is not
            if parameter.requires_grad and not parameter._dp_guarded:
                self._handles.append(parameter.register_hook(_Hook(functools.partial(self._refuse, name))))
                parameter._dp_guarded = True

    def _refuse(self, name: str, grad: Tensor | None) -> None:
        if grad is not None and not (self._public or self._pulls):
            raise PrivacyError(
                f"parameter {name!r} gets an ordinary gradient, which no rule has clipped. If the rows are public, run "
                "forward() and backward() within public(); if it is used by a compiled function or through indexing, "
                "use it in a torch function that has a rule, or freeze it"
            )

    # --- forward and backward ------------------------------------------------------------------------------------

    @property
    def is_public(self) -> bool:
        return self._public > 0

    @contextmanager
    def public(self) -> Iterator[None]:
        """Forward and backward passes inside are ordinary: for rows that are public. Their gradients are not clipped;
        they are in `.grad`, to which the step adds the noisy private mean."""
        self._public += 1
        try:
            yield
        finally:
            self._public -= 1

    @contextmanager
    def _pulling(self) -> Iterator[None]:
        self._pulls += 1
        try:
            with torch.enable_grad():
                yield
        finally:
            self._pulls -= 1

    @property
    def keeps_factors(self) -> bool:
        """Whether gradients wait for the norms of all layers."""
        return self.strategy in ("book_keeping", "materialize")

    def _before_forward(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if not torch.is_grad_enabled() or self.is_public:
            return
        check_modules(self.model)
        self._watch()
        found = [x for x in tree_leaves((args, dict(kwargs))) if isinstance(x, Tensor) and x.dim() > 0]
        self.batch_size = found[0].shape[0] if found else None
        self.input_storages = {x.untyped_storage().data_ptr() for x in found if x.shape[0] == self.batch_size}
        self._forwards += 1
        self.forward_number = self._forwards

    def _after_forward(self, module: nn.Module, args: Any, kwargs: Any, outputs: Any) -> None:
        began, self.forward_number = self.forward_number, None
        if began is not None and outputs is not None:
            tell_apart(self, module, args, kwargs)

    def backward(self, loss: Tensor) -> None:
        """`loss.backward()`, twice where the strategy is "two_pass": for the norms, then for the clipped sums."""
        if self.strategy != "two_pass":
            loss.backward()
            return
        self._passes.twice = True
        try:
            loss.backward(retain_graph=True)
            self._passes.again()
            loss.backward()
        finally:
            self._passes.twice, self._passes.coef = False, None

    def _scale(self, samples: int) -> float:
        """What per-sample gradients are multiplied with by the loss."""
        return self.loss_scale / (samples if self.loss_reduction == "mean" else 1)

    def threshold(self, layer: str | None) -> float | Tensor:
        """Of a layer, or of the whole gradient."""
        limit = self.max_grad_norm
        if isinstance(limit, dict):
            return limit[layer] if layer is not None else math.hypot(*(limit[name] for name in self._active))
        return limit if layer is None else scaled(limit, 1 / math.sqrt(len(self._active)))

    def _coef(self, norm_sq: Tensor, layer: str | None) -> Tensor:
        samples = max(len(norm_sq), 1)
        return factors(norm_sq, self.threshold(layer), self._scale(samples), self.clipping == "automatic")

    def _add(self, parameter: PrivateParameter, total: Tensor, samples: int) -> None:
        """Add a clipped sum to what the step releases."""
        total = total.mul_(1 / self._scale(max(samples, 1)))
        name = parameter._dp_name
        self._sums[name] = self._sums[name].add_(total) if name in self._sums else total

    def _begin_pass(self) -> None:
        self._active = {self.layers[name] for name, p in self._owned if p.requires_grad}

    def _end_pass(self, norm_sq: Tensor) -> None:
        limit = self.threshold(None)
        self._limit = limit if self._limit is None else _larger(self._limit, limit)
        self._norm_sq.append(norm_sq / self._scale(max(len(norm_sq), 1)) ** 2)

    # --- the step ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        check_parameters(self.model, optimizer, {id(p) for _, p in self._owned})
        if any(callable(x) for x in (*args, *kwargs.values())):
            raise PrivacyError(
                "optimizer.step(closure): backward passes within a step have no noise; call step() alone"
            )
        if self._limit is None:
            self._begin_pass()
            self._limit = self.threshold(None)
        trained = [(name, p) for name, p in self._owned if p.requires_grad]
        with torch._C.DisableTorchFunctionSubclass():
            sums = [self._sums.get(name, _zeros(p)) for name, p in trained]
            if self.noise_multiplier and sums:
                add_gaussian_noise_(sums, self._limit * self.noise_multiplier, self.noise)
            for (_, p), total in zip(trained, sums, strict=True):
                grad = total.div_(self.expected_batch_size).to(p.dtype)
                p.grad = grad if p.grad is None else p.grad.add_(grad)
        self._forget()
        self.steps += 1
        for _, p in self._owned:
            p.__class__ = nn.Parameter  # type: ignore[assignment]  # an optimizer is fast on these

    def _after_step(self, *args: Any) -> None:
        for _, p in self._owned:
            p.__class__ = PrivateParameter

    def zero_grad(self, set_to_none: bool = True) -> None:
        """The optimizer's own, which also drops the sums of backward passes since the last step."""
        self._zero_grad(set_to_none)
        self._forget()

    def _forget(self) -> None:
        self._sums.clear()
        self._limit = None
        self._norm_sq = []
        self._passes.forget()

    # --- what it knows -------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Steps taken and settings; never the key of the noise: a resumed run draws a fresh one."""
        return {
            "steps": self.steps,
            "max_grad_norm": self.max_grad_norm,
            "noise_multiplier": self.noise_multiplier,
            "expected_batch_size": self.expected_batch_size,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        self.steps = int(state["steps"])
        self.max_grad_norm = state["max_grad_norm"]
        self.noise_multiplier = float(state["noise_multiplier"])
        self.expected_batch_size = float(state["expected_batch_size"])

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "DPEngine: cannot be pickled or copied, two would share a model and repeat noise; save "
            "dp.state_dict(), and make a new engine of the loaded model"
        )


def _zeros(parameter: Tensor) -> Tensor:
    dtype = torch.float64 if parameter.dtype == torch.float64 else torch.float32
    return torch.zeros(parameter.shape, dtype=dtype, device=parameter.device)


def _larger(x: float | Tensor, y: float | Tensor) -> float | Tensor:
    if isinstance(x, Tensor) or isinstance(y, Tensor):
        device = next(z.device for z in (x, y) if isinstance(z, Tensor))
        return torch.maximum(*(torch.as_tensor(z, dtype=torch.float64, device=device) for z in (x, y)))
    return max(x, y)
