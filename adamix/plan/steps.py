"""One training step on meta tensors, private or ordinary, and what it takes."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from adamix.deep.memory import recompute_activations
from adamix.deep.tuning import tune
from adamix.errors import InputError
from adamix.plan.functions import again, autocast
from adamix.plan.models import Work
from adamix.plan.trace import Trace
from adamix.storage import one_line
from adamix_kernels import DPEngine, Noise, PrivacyError, PublicQuantile

STRATEGIES = ("auto", "book_keeping", "two_pass", "per_layer", "materialize")
#: Of parameters and inputs; with autocast products are made in bfloat16 all the same.
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "autocast": torch.float32}
NOISE_MODES = ("fast", "secure")
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": torch.optim.SGD,
    "momentum": lambda parameters, **rest: torch.optim.SGD(parameters, momentum=0.9, **rest),
    "adamw": torch.optim.AdamW,
}
_PURPOSES = {"forward": "activations", "backward": "backprops and temporaries", "update": "temporaries of the update"}


#: The quantile of public norms that sets thresholds: which one, costs the same.
_QUANTILE = 0.9


@dataclass(frozen=True)
class Setting:
    """How one device trains.

    Args:
        strategy: one of `STRATEGIES`, or None for the step without privacy.
        tuning: what is trained, a mode of `adamix.deep.tuning.tune`.
        precision: one of `PRECISIONS`, as of `DeepAdaMix`; sums are float32 or integers in any case.
        optimizer: one of `OPTIMIZERS`.
        device: "cpu" or "cuda".
        public_rows: public rows of a step, in the first backward pass beside private ones (`DPEngine.mixed`); their
            norms set the thresholds. With secure noise the plan takes a fixed threshold, which saves a quantile of
            these norms.
        lora_rank: of adapters.
        checkpointing: whether activations are computed again in the backward pass, of models of transformers.
        noise_mode: "fast", or "secure": ChaCha20, and sums of all per-sample gradients on an integer grid.

    Raises:
        InputError: names the field, what was given and what to pass.
    """

    strategy: str | None = "auto"
    tuning: str = "full"
    precision: str = "float32"
    optimizer: str = "adamw"
    device: str = "cuda"
    public_rows: int = 0
    lora_rank: int = 8
    checkpointing: bool = False
    noise_mode: str = "fast"

    def __post_init__(self) -> None:
        for name, known in (
            ("strategy", (None, *STRATEGIES)),
            ("precision", tuple(PRECISIONS)),
            ("optimizer", tuple(OPTIMIZERS)),
            ("device", ("cpu", "cuda")),
            ("noise_mode", NOISE_MODES),
        ):
            if getattr(self, name) not in known:
                raise InputError(
                    f"{name}: {getattr(self, name)!r} is not valid here; pass one of {', '.join(map(str, known))}"
                )


@dataclass(frozen=True)
class Traced:
    """A step as it was written down."""

    trace: Trace
    model: nn.Module

    @property
    def trained(self) -> list[str]:
        """Names of parameters, each of which costs the host a little in a private backward pass."""
        return [name for name, p in self.model.named_parameters() if p.requires_grad]


def model_of(work: Work, setting: Setting) -> nn.Module:
    """On the meta device, with what is not trained frozen."""
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            model = work.build()
            tune(model, setting.tuning, lora_rank=setting.lora_rank)
        except NotImplementedError as error:
            raise InputError(f"model: cannot be built on the meta device ({error})") from error
    model = model.to(PRECISIONS[setting.precision])
    return model.train()


def trace_step(work: Work, setting: Setting, micro_batch: int, accumulate: bool = False) -> Traced:
    """Run a step of `micro_batch` private rows, and the public ones, on meta tensors.

    With `accumulate` there is another micro-batch, which finds the sums of the first. Of public rows the passes are
    called "mixed", of private ones alone "private"; of several alike the calls of one are kept.

    Raises:
        InputError: the engine refuses the model, it needs values, or it does not take such inputs.
    """
    model = model_of(work, setting)
    trained = [p for p in model.parameters() if p.requires_grad]
    foreach = {"foreach": setting.device == "cuda"}  # as torch chooses
    optimizer = OPTIMIZERS[setting.optimizer](trained, lr=1e-3, **foreach)
    engine = attach(model, optimizer, setting, micro_batch)
    trace = Trace(setting.device)
    trace.phase = "private forward"
    trace.hold("parameters", list(model.parameters()))
    trace.hold("buffers", list(model.buffers()))
    if engine is None:
        for p in trained:
            p.register_post_accumulate_grad_hook(lambda p: trace.hold("gradients", p.grad))
    with torch.device("meta"):
        first = _cast(work.batch(micro_batch + setting.public_rows), setting)
        private = _cast(work.batch(micro_batch), setting) if setting.public_rows and accumulate else first
    trace.hold("inputs", first, private)

    def run(rows: Any, name: str) -> None:
        _run_pass(trace, work, setting, model, engine, rows, name)

    def step(again: bool) -> None:
        if setting.public_rows:
            with nullcontext() if engine is None else engine.mixed(slice(0, setting.public_rows)):
                run(first, "mixed")
        else:
            run(first, "private")
        if again:
            run(private, "private")
        with trace.of("update", _PURPOSES["update"]):
            optimizer.step()
            optimizer.zero_grad()

    try:
        lower = setting.precision == "autocast"
        contexts = {"context_fn": lambda: (nullcontext(), again(setting.device, lower))}
        with recompute_activations(model, setting.checkpointing, **contexts):
            step(False)  # the optimizer makes its state, the engine looks at the shapes
            trace.hold("optimizer", [s for state in optimizer.state.values() for s in state.values()])
            gc.collect()
            trace.peaks.clear()
            trace.calls.clear()
            step(accumulate)
    except PrivacyError as error:
        raise InputError(f"model: DPEngine refuses it: {error}") from error
    finally:
        if engine is not None:
            engine.detach()
    return Traced(trace, model)


def _run_pass(
    trace: Trace, work: Work, setting: Setting, model: nn.Module, engine: DPEngine | None, rows: Any, name: str
) -> None:
    """Forward and backward; what was written down of another of that name is dropped."""
    x, y = rows
    phases = f"{name} forward", f"{name} backward"
    for call in [call for call in trace.calls if call.phase in phases]:
        del trace.calls[call]
    lower = setting.precision == "autocast"
    with trace.of(phases[0], _PURPOSES["forward"]), autocast(setting.device, lower):
        try:
            loss = work.loss(model, x, y)
        except (InputError, PrivacyError):
            raise
        except Exception as error:
            message = f"model: {work.name} fails on inputs {list(x.shape)} ({one_line(error)}); pass what it takes"
            raise InputError(message) from error
    with trace.of(phases[1], _PURPOSES["backward"]):
        loss.backward() if engine is None else engine.backward(loss)


def attach(
    model: nn.Module, optimizer: torch.optim.Optimizer, setting: Setting, expected_batch_size: int
) -> DPEngine | None:
    """The engine of a setting, for steps that train nothing; None without a strategy."""
    if setting.strategy is None:
        return None
    secure = setting.noise_mode == "secure"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nothing is released, so its noise need not be secret
        try:
            return DPEngine(
                model,
                optimizer,
                max_grad_norm=PublicQuantile(_QUANTILE) if setting.public_rows and not secure else 1.0,
                noise_multiplier=1.0,
                expected_batch_size=expected_batch_size,
                strategy=setting.strategy,
                loss_reduction="sum" if secure and setting.public_rows else "mean",  # which the engine insists on
                noise=Noise(mode="secure") if secure else Noise(seed=0),
                process_group="local",  # whatever ranks this process may be one of
            )
        except (PrivacyError, ValueError) as error:
            raise InputError(f"model: DPEngine refuses it: {error}") from error


def _cast(batch: tuple[Any, Tensor], setting: Setting) -> tuple[Any, Tensor]:
    x, y = batch
    return x.to(PRECISIONS[setting.precision]) if x.is_floating_point() else x, y
