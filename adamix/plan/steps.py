"""One training step on meta tensors, private or ordinary, and what it takes."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from adamix.deep.tuning import tune
from adamix.errors import InputError
from adamix.plan.models import Work
from adamix.plan.trace import Trace
from adamix.storage import one_line
from adamix_kernels import DPEngine, Noise, PrivacyError

STRATEGIES = ("auto", "book_keeping", "two_pass", "per_layer", "materialize")
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": torch.optim.SGD,
    "momentum": lambda parameters, **rest: torch.optim.SGD(parameters, momentum=0.9, **rest),
    "adamw": torch.optim.AdamW,
}
#: Of the steps' parts, those that are repeated for each micro-batch.
PER_MICRO_BATCH = ("private forward", "private backward")
_PURPOSES = {"forward": "activations", "backward": "backprops and temporaries", "update": "temporaries of the update"}


@dataclass(frozen=True)
class Setting:
    """How one device trains.

    Args:
        strategy: one of `STRATEGIES`, or None for the step without privacy.
        tuning: what is trained, a mode of `adamix.deep.tuning.tune`.
        precision: "fp32", or "bf16" parameters and activations; sums are float32 in any case.
        optimizer: one of `OPTIMIZERS`.
        device: "cpu" or "cuda".
        public_rows: rows of each step whose ordinary gradients are added.
    """

    strategy: str | None = "auto"
    tuning: str = "full"
    precision: str = "fp32"
    optimizer: str = "adamw"
    device: str = "cuda"
    public_rows: int = 0
    lora_rank: int = 8


@dataclass(frozen=True)
class Traced:
    """A step as it was written down."""

    trace: Trace
    model: nn.Module
    uses: int  # trained parameters, each of which costs the host a little in a private backward pass


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

    With `accumulate` two micro-batches run, and what is written down is the second: the sums of the first are there.

    Raises:
        InputError: the engine refuses the model, it needs values, or it does not take such inputs.
    """
    model = model_of(work, setting)
    trained = [p for p in model.parameters() if p.requires_grad]
    foreach = {"foreach": setting.device == "cuda"}  # as torch chooses
    optimizer = OPTIMIZERS[setting.optimizer](trained, lr=1e-3, **foreach)
    engine = attach(model, optimizer, setting.strategy, micro_batch)
    trace = Trace(setting.device)
    trace.phase = "private forward"
    trace.hold("parameters", list(model.parameters()), list(model.buffers()))
    if engine is None:
        for p in trained:
            p.register_post_accumulate_grad_hook(lambda p: trace.hold("gradients", p.grad))
    with torch.device("meta"):
        private, public = (_cast(work.batch(n), setting) if n else None for n in (micro_batch, setting.public_rows))
    trace.hold("inputs", private, public)

    def run(rows: Any, name: str) -> None:
        x, y = rows
        with trace.of(f"{name} forward", _PURPOSES["forward"]):
            try:
                loss = work.loss(model, x, y)
            except (InputError, PrivacyError):
                raise
            except Exception as error:
                message = f"model: {work.name} fails on inputs {list(x.shape)} ({one_line(error)}); pass what it takes"
                raise InputError(message) from error
        with trace.of(f"{name} backward", _PURPOSES["backward"]):
            loss.backward() if engine is None or name == "public" else engine.backward(loss)

    def step(repeats: int) -> None:
        for _ in range(repeats):
            trace.calls.clear()  # of the last one they are kept
            run(private, "private")
        if public is not None and engine is not None:
            with engine.public():
                run(public, "public")
        elif public is not None:
            run(public, "public")
        with trace.of("update", _PURPOSES["update"]):
            optimizer.step()
            optimizer.zero_grad()

    try:
        step(1)  # the optimizer makes its state, the engine looks at the shapes
        trace.hold("optimizer", [s for state in optimizer.state.values() for s in state.values()])
        gc.collect()
        trace.peaks.clear()
        step(1 + accumulate)
    except PrivacyError as error:
        raise InputError(f"model: DPEngine refuses it: {error}") from error
    finally:
        if engine is not None:
            engine.detach()
    return Traced(trace, model, len(trained))


def attach(
    model: nn.Module, optimizer: torch.optim.Optimizer, strategy: str | None, expected_batch_size: int
) -> DPEngine | None:
    """The engine of a strategy, for steps that train nothing; None without one."""
    if strategy is None:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nothing is released, so its noise need not be secret
        try:
            return DPEngine(
                model,
                optimizer,
                max_grad_norm=1.0,
                noise_multiplier=1.0,
                expected_batch_size=expected_batch_size,
                strategy=strategy,
                noise=Noise(seed=0),
            )
        except PrivacyError as error:
            raise InputError(f"model: DPEngine refuses it: {error}") from error


def _cast(batch: tuple[Any, Tensor], setting: Setting) -> tuple[Any, Tensor]:
    x, y = batch
    return x.to(PRECISIONS[setting.precision]) if x.is_floating_point() else x, y
