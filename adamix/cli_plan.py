"""The command `adamix plan`: memory, time, communication and budget of a training run, before it starts."""

from __future__ import annotations

import argparse
import dataclasses
import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape

from adamix.cli_common import Commands, add_command, console_of, progress_bar, table_of
from adamix.deep.tuning import MODES
from adamix.errors import InputError
from adamix.plan import PRESETS, SHAPES, Accounting, Estimate, Job, Rates, Setting, account, preset, resolve
from adamix.plan.measure import measure
from adamix.plan.rates import default_path
from adamix.plan.sharding import SHARDINGS
from adamix.plan.steps import NOISE_MODES, OPTIMIZERS, PRECISIONS, STRATEGIES

_GIB, _MIB = 2**30, 2**20


def add_plan(commands: Commands) -> None:
    parser = add_command(commands, "plan", run_plan, "Estimate memory, time, communication and epsilon of a run.")
    model = parser.add_argument_group("model")
    model.add_argument("--model", help=f"{', '.join(SHAPES)}; a transformers config or its folder; or module:function")
    model.add_argument("--sequence-length", type=int, help="tokens of a sample; default: 1024")
    model.add_argument("--image-size", type=int, help="pixels a side; default: the configuration's")
    model.add_argument("--input-shape", help="of one sample of a module:function, such as 3,32,32")
    model.add_argument("--tune", default="full", help=f"what is trained: {', '.join(MODES)}, or patterns of names")
    model.add_argument("--lora-rank", type=int, default=8)
    step = parser.add_argument_group("step")
    step.add_argument("--batch", type=int, default=256, help="private rows of a step, of all devices together")
    step.add_argument("--micro-batch", type=int, help="rows at a time on a device; default: as many as fit")
    step.add_argument(
        "--public-batch-size", type=int, default=0, help="public rows of a step, of all devices, in the same pass"
    )
    step.add_argument("--strategy", choices=STRATEGIES, default="auto", help="of DPEngine")
    step.add_argument(
        "--precision", choices=tuple(PRECISIONS), default="bfloat16", help="of parameters and activations, or autocast"
    )
    step.add_argument("--optimizer", choices=tuple(OPTIMIZERS), default="adamw")
    step.add_argument(
        "--checkpointing", action="store_true", help="compute activations again in the backward pass (transformers)"
    )
    step.add_argument("--noise-mode", choices=NOISE_MODES, default="fast", help="secure: sums on an integer grid")
    step.add_argument("--compile", action="store_true", help="not modelled: refused")
    machine = parser.add_argument_group("machine")
    machine.add_argument("--gpus", type=int, default=1, help="devices")
    machine.add_argument("--sharding", choices=SHARDINGS, help="default: none on one device, else ddp")
    machine.add_argument("--replicas", type=int, help="copies of the model, each sharded; with --sharding hsdp")
    machine.add_argument("--rates", help=f"{', '.join(PRESETS)} (data sheets), or a file; default: those of --measure")
    machine.add_argument("--measure", action="store_true", help="measure this machine's rates first, and keep them")
    machine.add_argument("--device", choices=("cpu", "cuda"), help="whose rates; default: a GPU if there is one")
    machine.add_argument("--memory", type=float, help="GiB of a device; default: what the rates say")
    machine.add_argument("--bandwidth", type=float, help="GB/s and direction between devices, instead of the rates'")
    budget = parser.add_argument_group("privacy")
    budget.add_argument("--private-rows", type=int, help="N; without it nothing is accounted")
    budget.add_argument("--steps", type=int)
    budget.add_argument("--epochs", type=float)
    budget.add_argument("--epsilon", type=float, help="gives the noise multiplier")
    budget.add_argument("--noise-multiplier", type=float, help="gives epsilon")
    budget.add_argument("--delta", type=float, default=1e-5)


def run_plan(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure rates, plan a run, or both."""
    console = console_of(arguments)
    if arguments.model is None and not arguments.measure:
        raise InputError("model: there is nothing to plan; pass --model, or --measure to measure this machine")
    rates = _rates(arguments)
    if arguments.measure:
        console.print(f"Rates of {rates.name} measured: {default_path(rates.device)}", markup=False)
    if arguments.model is None:
        return {"method": "plan", "rates": _origin(rates)}
    accounting = _accounting(arguments)
    job = _job(arguments, rates)
    if arguments.memory is not None and not 1 / _GIB <= arguments.memory < math.inf:
        raise InputError(f"memory: {arguments.memory} is not valid here; pass GiB above 0")
    memory = rates.memory if arguments.memory is None else int(arguments.memory * _GIB)
    with progress_bar() as progress:
        progress.add_task("running a step without data", total=None)
        most = job.largest_micro_batch(memory, rates)
        rows = arguments.micro_batch or min(job.rows, max(1, most))
        estimate = job.estimate(rows, rates)
        ordinary = job.without_privacy().estimate(rows, rates)
    for message in _warnings(estimate, memory, rates, job.setting):
        warnings.warn(message, stacklevel=1)
    _show(console, job, estimate, ordinary, memory, most, rates)
    if accounting is not None:
        _show_accounting(console, accounting)
    return {
        "method": "plan",
        "model": job.work.name,
        "setting": dataclasses.asdict(job.setting),
        "batch": job.batch,
        "public_batch_size": arguments.public_batch_size,
        "devices": job.devices,
        "sharding": job.sharding,
        "replicas": job.replicas,
        "memory": memory,
        "largest_micro_batch": most,
        "fits": estimate.memory.total <= memory,
        "private": _record(estimate),
        "ordinary": _record(ordinary),
        "time_ratio": estimate.time.total / ordinary.time.total,
        "memory_ratio": estimate.memory.total / ordinary.memory.total,
        "rates": _origin(rates),
        "accounting": None if accounting is None else dataclasses.asdict(accounting),
        "estimated": True,
    }


def _rates(arguments: argparse.Namespace) -> Rates:
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if arguments.measure:
        if arguments.rates is not None:
            raise InputError("rates: measures are kept where they belong; drop --rates or --measure")
        if device == "cuda" and not torch.cuda.is_available():
            raise InputError("device: torch finds no CUDA device to measure; pass --device cpu")
        with progress_bar() as progress:
            task = progress.add_task("measuring", total=None)
            rates = measure(torch.device(device), lambda part: progress.update(task, description=part))
        rates.save(default_path(device))
    elif arguments.rates in PRESETS:
        rates = preset(arguments.rates)
    elif arguments.rates is not None:
        rates = Rates.load(Path(arguments.rates))
    elif default_path(device).exists():
        rates = Rates.load(default_path(device))
    else:
        raise InputError(
            f"rates: those of this machine's {device} were not measured yet; run adamix plan --measure, or pass "
            f"--rates {'|'.join(PRESETS)} (data sheets) or a file"
        )
    if arguments.bandwidth is not None:
        if not arguments.bandwidth > 0:
            raise InputError(f"bandwidth: {arguments.bandwidth} is not valid here; pass GB/s above 0")
        rates = dataclasses.replace(rates, link=arguments.bandwidth * 1e9, network=arguments.bandwidth * 1e9)
    return rates


def _accounting(arguments: argparse.Namespace) -> Accounting | None:
    if arguments.private_rows is None:
        for name in ("steps", "epochs", "epsilon", "noise_multiplier"):
            if getattr(arguments, name) is not None:
                raise InputError(f"{name}: nothing can be accounted without the number of rows; pass --private-rows")
        return None
    found = account(
        private_rows=arguments.private_rows,
        batch=arguments.batch,
        delta=arguments.delta,
        steps=arguments.steps,
        epochs=arguments.epochs,
        epsilon=arguments.epsilon,
        noise_multiplier=arguments.noise_multiplier,
    )
    if found.delta >= 1 / found.private_rows:
        warnings.warn(
            f"delta: {found.delta:g} is at least 1/N for N = {found.private_rows} private rows; a mechanism that "
            "publishes a random row satisfies it: pass a smaller one",
            stacklevel=1,
        )
    return found


def _job(arguments: argparse.Namespace, rates: Rates) -> Job:
    shape = None
    if arguments.input_shape is not None:
        try:
            shape = tuple(int(n) for n in arguments.input_shape.split(","))
        except ValueError:
            shape = ()
        if not shape or min(shape) < 1:
            raise InputError(f"input_shape: {arguments.input_shape!r} is not valid here; pass sizes such as 3,32,32")
    if arguments.compile:
        raise InputError(
            "compile: what torch.compile makes of a step is not modelled; drop it to plan the same step uncompiled, "
            "which sends the same"
        )
    for name, least in (("gpus", 1), ("public_batch_size", 0), ("lora_rank", 1), ("micro_batch", 1)):
        value = getattr(arguments, name)
        if value is not None and value < least:
            raise InputError(f"{name}: {value} is not valid here; pass a whole number of at least {least}")
    work = resolve(
        arguments.model,
        sequence_length=arguments.sequence_length,
        image_size=arguments.image_size,
        input_shape=shape,
    )
    setting = Setting(
        strategy=arguments.strategy,
        tuning=arguments.tune,
        precision=arguments.precision,
        optimizer=arguments.optimizer,
        device=rates.device,
        public_rows=math.ceil(arguments.public_batch_size / arguments.gpus),
        lora_rank=arguments.lora_rank,
        checkpointing=arguments.checkpointing,
        noise_mode=arguments.noise_mode,
    )
    sharding = arguments.sharding or ("none" if arguments.gpus == 1 else "ddp")
    return Job(work, setting, arguments.batch, arguments.gpus, sharding, arguments.replicas)


def _warnings(estimate: Estimate, memory: int, rates: Rates, setting: Setting) -> list[str]:
    found = []
    if estimate.memory.total > memory:
        found.append(
            f"memory: {estimate.memory.total / _GIB:.1f} GiB do not fit into {memory / _GIB:.1f} GiB; pass a smaller "
            "--micro-batch, --tune lora, --sharding fsdp or --strategy per_layer"
        )
    if rates.measured and estimate.missing:
        found.append(f"rates: none is known of {', '.join(estimate.missing)}; products or copies stand for them")
    if rates.measured and setting.precision != "float32" and not any(key.endswith("bfloat16") for key in rates.curves):
        found.append("rates: none was measured in bfloat16, which is slow here; those of float32 stand for them")
    return found


def _record(estimate: Estimate) -> dict[str, Any]:
    return dataclasses.asdict(estimate) | {"communication_bytes": estimate.communication.total}


def _origin(rates: Rates) -> dict[str, Any]:
    """Where the rates are from, without the curves."""
    return {
        name: getattr(rates, name) for name in ("name", "source", "measured", "device", "memory", "made", "versions")
    }


def _show(
    console: Console, job: Job, estimate: Estimate, ordinary: Estimate, memory: int, most: int, rates: Rates
) -> None:
    setting = job.setting
    batches = f"{estimate.micro_batches} x {estimate.micro_batch} rows" if estimate.micro_batches > 1 else "at once"
    machine = f"{job.devices} x {escape(rates.name)}"
    table = table_of(
        f"{escape(job.work.name)}: a step of {job.batch} private rows on {machine}, estimated",
        ("", f"private, {setting.strategy}", "not private", "ratio"),
    )

    def row(name: str, private: float, other: float, unit: float) -> None:
        ratio = f"{private / other:.2f}" if other else ""
        table.add_row(name, f"{private / unit:.2f}", f"{other / unit:.2f}", ratio)

    def parts(of: str, both: Sequence[Mapping[str, int]]) -> tuple[str, int]:
        """A row for each, and the unit that suits their sum."""
        unit, size = ("GiB", _GIB) if max(sum(one.values()) for one in both) >= _GIB else ("MiB", _MIB)
        for name in dict.fromkeys(name for one in both for name in one):
            row(f"{unit} {of}{name}", both[0].get(name, 0), both[1].get(name, 0), size)
        return unit, size

    unit, size = parts("", [estimate.memory.parts, ordinary.memory.parts])
    row(f"[bold]{unit} in all[/bold]", estimate.memory.total, ordinary.memory.total, size)
    table.add_section()
    for field, name in _TIMES.items():
        row(f"ms {name}", getattr(estimate.time, field), getattr(ordinary.time, field), 1e-3)
    if job.devices > 1:
        row("ms in all, all communication hidden", estimate.time.overlapped, ordinary.time.overlapped, 1e-3)
        table.add_section()
        parts("sent, ", [estimate.communication.parts, ordinary.communication.parts])
    console.print(table)
    options = [
        *([f"{setting.public_rows} public rows on a device in the same pass"] if setting.public_rows else []),
        *(["activations computed again"] if setting.checkpointing else []),
        *(["secure noise"] if setting.noise_mode == "secure" else []),
    ]
    console.print(
        f"{estimate.parameters / 1e6:.4g} M parameters, {estimate.trained / 1e6:.4g} M trained ({setting.tuning}), "
        f"{', '.join([setting.precision, setting.optimizer, *options])}, {job.sharding} sharding; "
        f"a device's {estimate.rows} private rows "
        f"{batches}. Of {memory / _GIB:.4g} GiB the largest micro-batch is {most or 'none: one row is too many'}.",
        markup=False,
    )
    console.print(f"Rates: {rates.source}{f' ({rates.made})' if rates.made else ''}. All above is estimated from them.")


_TIMES = {
    "compute": "bound by arithmetic",
    "memory": "bound by memory",
    "host": "of the host",
    "communication": "of communication",
    "norms_and_sums": "  of which norms and clipped sums",
    "noise": "  of which noise",
    "total": "in all",
}


def _show_accounting(console: Console, found: Accounting) -> None:
    batches = "full batches" if found.sample_rate == 1 else f"Poisson batches at rate {found.sample_rate:.4g}"
    console.print(
        f"{found.steps} steps on {batches} of N = {found.private_rows} private rows with noise multiplier "
        f"{found.noise_multiplier:.4g}: epsilon {found.epsilon:.4g} at delta {found.delta:g} "
        f"(full batches: {found.full_batches:.4g})."
    )
