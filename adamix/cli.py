"""The commands of the command line: their arguments, and what they print."""

from __future__ import annotations

import argparse
import dataclasses
import os
import platform
from importlib import metadata
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape

import adamix_kernels
from adamix import baselines, features
from adamix.cli_budget import add_ledger_flags, check_ledger_flags, make_new_ledger
from adamix.cli_common import Commands, add_command, add_settings, console_of, find_device, progress_bar, table_of
from adamix.config import PRESETS, Config
from adamix.data import DEFAULT_SOURCE, Split, load_split
from adamix.datasets import BENCHMARKS, COMPUTED
from adamix.errors import InputError
from adamix.private_metrics import PrivateMetrics
from adamix.report import check_out, write_run
from adamix.rows import UserRows
from adamix.trainer import AdaMix, Result


def version() -> str:
    return f"adamix {metadata.version('adamix')}"


# --- train -----------------------------------------------------------------------------------------------------------


def add_train(commands: Commands) -> None:
    parser = add_command(commands, "train", train, "Train a private classifier with a little public data.")
    data = parser.add_argument_group("data")
    data.add_argument(
        "--data", default=DEFAULT_SOURCE, help=f"{', '.join(BENCHMARKS)}, an .npz file or an image folder"
    )
    for name in ("public", "private", "test"):
        data.add_argument(f"--{name}", help=f"{name} rows: an .npz file with X and y, or a folder of images per class")
    data.add_argument("--shots", type=int, help="public rows per class")
    data.add_argument("--private-rows", type=int, help="private rows of a built-in set")
    data.add_argument("--seed", type=int, default=0, help="draws the rows of a built-in set; never the noise")
    data.add_argument("--backbone", default="efficientnet-lite0", help="network that turns images into features")
    parser.add_argument("--device", help="cpu, cuda, ...; default: a GPU if there is one")
    parser.add_argument("--compare", action="store_true", help="also train without privacy (outside the guarantee)")
    parser.add_argument("--out", help="new folder for config, metrics, weights and plot")
    add_ledger_flags(parser)
    parser.add_argument(
        "--log-private-metrics",
        action="store_true",
        help="also write loss, accuracy and clipped fraction of the private rows, without noise, to "
        "OUT/PRIVATE_metrics.jsonl (outside the guarantee)",
    )
    parser.add_argument("--preset", choices=PRESETS, default="adamix", help="a whole method; the settings go over it")
    budget = {"epsilon": 3.0, "delta": Config.delta, "expected_batch_size": None}  # the others may be the preset's
    add_settings(parser, Config, budget)


def train(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run AdaMix once and show what it gained."""
    if arguments.out is not None:
        check_out(arguments.out)
    elif arguments.log_private_metrics:
        raise InputError("log_private_metrics: there is no folder to write to; pass --out")
    check_ledger_flags(arguments)
    device = find_device(arguments.device)
    given = {f.name: getattr(arguments, f.name) for f in dataclasses.fields(Config) if hasattr(arguments, f.name)}
    settings = PRESETS[arguments.preset] | given
    tried = Config(
        **{**settings, "expected_batch_size": given["expected_batch_size"] or 1}
    )  # before the data are loaded
    split = _to_device(
        load_split(
            arguments.data,
            public=arguments.public,
            private=arguments.private,
            test=arguments.test,
            shots=arguments.shots,
            private_rows=arguments.private_rows,
            seed=arguments.seed,
            backbone=arguments.backbone,
        ),
        device,
    )
    if settings["expected_batch_size"] is None:
        settings["expected_batch_size"] = _expected_batch_size(split, tried.sample_rate)
    trainer = AdaMix(**settings)
    make_new_ledger(arguments)
    seen: list[PrivateMetrics] = []
    with progress_bar() as progress:
        task = progress.add_task("private steps", total=trainer.config.steps)
        result = trainer.fit(
            public=split.public,
            private=split.private,
            test=split.test,
            on_step=lambda step: progress.update(task, completed=step.number),
            ledger=arguments.ledger,
            checkpoint=arguments.checkpoint,
            checkpoint_every=arguments.checkpoint_every,
            resume=arguments.resume,
            private_metrics=seen.append if arguments.log_private_metrics else None,
        )
    summary = summarise(result, split, arguments.seed)
    if split.benchmark or arguments.compare:
        paragon = baselines.paragon_error(split)
        summary |= {
            "paragon_error": paragon,
            "error_increase": baselines.error_increase(summary["test_error"], paragon),
        }
    console = console_of(arguments)
    _show_run(console, summary, split)
    if arguments.out is not None:
        write_run(arguments.out, result, summary, seen)
        console.print(f"Run folder: {arguments.out}", markup=False)
    return summary


def _to_device(split: Split, device: torch.device) -> Split:
    moved: dict[str, Any] = {
        name: type(rows)(*(t.to(device) for t in rows))
        for name in ("public", "private", "validation", "test")
        for rows in [getattr(split, name)]
    }
    return dataclasses.replace(split, **moved)


def _expected_batch_size(split: Split, sample_rate: float) -> int:
    if split.expected_batch_size is None:
        raise InputError(
            "expected_batch_size: missing; for your own rows pass --expected-batch-size, a figure that may be public "
            "(the planned number of private rows, or users, per step), because a count of them is itself private"
        )
    return max(1, round(split.expected_batch_size * sample_rate))


def summarise(result: Result, split: Split, seed: int) -> dict[str, Any]:
    """The figures of a run, errors in percent."""
    return {
        "method": "AdaMix",
        "data": split.name,
        "test_error": result.test_error,
        "public_error": result.public_error,
        "epsilon": result.epsilon,
        "delta": result.delta,
        "unit": "user" if isinstance(split.private, UserRows) else "record",
        "noise_multiplier": result.noise_multiplier,
        "steps": len(result.steps),
        "seed": seed,
        **({} if result.ledger_epsilon is None else {"ledger_epsilon": result.ledger_epsilon}),
    }


def _show_run(console: Console, summary: dict[str, Any], split: Split) -> None:
    size = "" if split.expected_batch_size is None else f", {split.expected_batch_size} private rows"
    title = f"{escape(split.name)}: {len(split.public.y)} public rows{size}"
    table = table_of(title, ("", "test error %", "epsilon", "delta"))
    table.add_row("public only", f"{summary['public_error']:.2f}", "0", "0")
    table.add_row(
        "AdaMix",
        f"[bold]{summary['test_error']:.2f}[/bold]",
        f"{summary['epsilon']:.4g}",
        f"{summary['delta']:g}",
    )
    if "paragon_error" in summary:
        table.add_row("without privacy (paragon)", f"{summary['paragon_error']:.2f}", "inf", "-")
    console.print(table)
    console.print(
        f"noise multiplier {summary['noise_multiplier']:.4g}, {summary['steps']} steps, "
        f"one {summary['unit']} protected. Data: {split.source}.",
        markup=False,
    )
    if "ledger_epsilon" in summary:
        console.print(f"Spent on these private rows in all, by the ledger: epsilon {summary['ledger_epsilon']:.6g}.")
    if "paragon_error" in summary:
        console.print("The paragon reads private rows without noise: it is outside the guarantee.")


# --- features and info -----------------------------------------------------------------------------------------------


def add_features(commands: Commands) -> None:
    parser = add_command(commands, "features", run_features, "Turn images into the features of a pretrained network.")
    parser.add_argument(
        "source", help="a folder with one subfolder of images per class, or fashion-mnist:train / :test"
    )
    parser.add_argument("--out", required=True, help="the .npz file to write: X, y, class_names, digests, meta")
    parser.add_argument("--backbone", default="efficientnet-lite0", help="efficientnet-lite0, or timm/NAME")
    parser.add_argument("--image-size", type=int, help="pixels a side; default: what suits backbone and source")
    parser.add_argument("--batch-size", type=int, default=64)


def run_features(arguments: argparse.Namespace) -> dict[str, Any]:
    found = features.features_to_npz(
        arguments.source,
        arguments.out,
        backbone=arguments.backbone,
        image_size=arguments.image_size,
        batch_size=arguments.batch_size,
    )
    rows, width = found.x.shape
    console_of(arguments).print(
        f"{rows} rows of {width} features, {len(found.class_names)} classes: {arguments.out}", markup=False
    )
    return {"method": "features", "rows": rows, "features": width, "classes": len(found.class_names)}


def add_info(commands: Commands) -> None:
    add_command(commands, "info", run_info, "Show versions, which kernel runs where, and the built-in data.")


def run_info(arguments: argparse.Namespace) -> dict[str, Any]:
    packages = ("adamix", "torch", "numpy", "dp-accounting")
    versions = {"python": platform.python_version()} | {name: metadata.version(name) for name in packages}
    console = console_of(arguments)
    console.print(", ".join(f"{name} {found}" for name, found in versions.items()))
    console.print(f"{os.cpu_count()} processors, {torch.get_num_threads()} threads, cuda: {torch.cuda.is_available()}")
    kernels = adamix_kernels.backends()
    columns = ("op", *next(iter(kernels.values())))
    table = table_of("kernels", columns, columns)
    for op, states in kernels.items():
        table.add_row(op, *("runs" if state == "runs" else "-" for state in states.values()))
    console.print(table)
    for reason in sorted({state for states in kernels.values() for state in states.values()} - {"runs"}):
        console.print(f"-: {reason}")
    data = {}
    for name in BENCHMARKS:
        try:
            data[name] = "computed on first use" if name in COMPUTED else load_split(name).source
        except InputError as error:
            data[name] = f"not available: {error}"
        console.print(f"{name}: {data[name]}")
    return {"method": "info", "versions": versions, "kernels": kernels, "data": data}
