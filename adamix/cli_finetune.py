"""The command `adamix finetune`: a recipe for a large model, on the rows of a user."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from adamix.checkpoint import holds_a_run
from adamix.cli_budget import add_ledger_flags, check_ledger_flags, make_new_ledger, new_ledger_was_made
from adamix.cli_common import Commands, add_command, add_settings, console_of, find_device, progress_bar, table_of
from adamix.deep import DeepAdaMix, DeepConfig, DeepResult
from adamix.deep.ranks import Ranks, job_of_torchrun
from adamix.deep.recipes import RECIPES, Job, load_recipe, prepare
from adamix.errors import InputError
from adamix.parts import write_whole
from adamix.report import check_out, write_run

_NAMES = {
    "vit": "images, a folder with one subfolder per class",
    "lm": "lines of text, a file or a folder of .txt files",
}


def add_finetune(commands: Commands) -> None:
    text = "Train a large model on public and private rows, by a recipe (adamix/recipes)."
    parser = add_command(commands, "finetune", finetune, text)
    parser.add_argument("recipe", choices=RECIPES, help="; ".join(f"{name}: {what}" for name, what in _NAMES.items()))
    for name in ("public", "private", "test"):
        parser.add_argument(f"--{name}", metavar="PATH", help=f"{name} rows")
    parser.add_argument("--model", metavar="FOLDER", help="pretrained weights of transformers; default: random ones")
    parser.add_argument("--tokenizer", metavar="FOLDER", help="lm: of transformers; default: the model's, else bytes")
    parser.add_argument(
        "--tiny", action="store_true", help="a tiny model that runs in seconds, on made-up rows or yours"
    )
    parser.add_argument("--device", help="cpu, cuda, ...; default: a GPU if there is one")
    parser.add_argument("--out", help="new folder for config, metrics, trained weights and plot")
    add_ledger_flags(parser)
    add_settings(parser, DeepConfig, {})


def finetune(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run a recipe once and show what it gained; on the ranks of a job if `torchrun` started one.

    Where `torchrun` started it again, after a rank died, it goes on from the checkpoint.
    """
    shape, settings = load_recipe(arguments.recipe, tiny=arguments.tiny)
    settings |= {key: value for key, value in vars(arguments).items() if key in DeepConfig.__dataclass_fields__}
    if "expected_batch_size" not in settings:
        raise InputError(
            "expected_batch_size: missing; pass --expected-batch-size, the planned number of private rows per step: a "
            "figure that may be public, because a count of them is itself private"
        )
    sharded = DeepConfig(**settings).sharding == "fsdp"  # settings are wrong before the data are loaded
    with job_of_torchrun(find_device(arguments.device), alone=sharded) as device:
        ranks, result, job, weights = _run(arguments, shape, settings, device)
    summary = _summarise(result, arguments.recipe, ranks.size)
    arguments.json &= ranks.rank == 0
    if ranks.rank == 0:  # after the others were let go: large weights take their time
        _leave(arguments, summary, result, job, weights)
    return summary


def _run(
    arguments: argparse.Namespace, shape: dict[str, Any], settings: dict[str, Any], device: torch.device
) -> tuple[Ranks, DeepResult, Job, Path | None]:
    """Also the folder of the weights of a sharded model, which rank 0 alone could not write."""
    arguments.delta = settings["delta"]  # of a new ledger too
    paths = {name: getattr(arguments, name) for name in ("public", "private", "test")}
    job = prepare(
        arguments.recipe, shape, paths, model=arguments.model, tokenizer=arguments.tokenizer, tiny=arguments.tiny
    )
    sharded = settings.get("sharding") == "fsdp"  # then it goes to the device in parts
    trainer = DeepAdaMix(job.model if sharded else job.model.to(device), loss=job.loss, **settings)
    ranks = Ranks.of(job.model)

    def make_files() -> bool:
        _go_on(arguments)
        if arguments.out is not None:
            check_out(arguments.out)
        check_ledger_flags(arguments)
        make_new_ledger(arguments)
        return arguments.resume

    resume = ranks.on_first(make_files)
    with progress_bar() as progress:
        progress.disable |= ranks.rank > 0
        first = progress.add_task("public steps", total=trainer.config.public_steps)
        second = progress.add_task("private steps", total=trainer.config.steps)
        result = trainer.fit(
            **job.data,
            on_public_step=lambda step: progress.update(first, completed=step),
            on_step=lambda step: progress.update(second, completed=step.number),
            ledger=arguments.ledger,
            checkpoint=arguments.checkpoint,
            checkpoint_every=arguments.checkpoint_every,
            resume=resume,
        )
    weights = None
    if sharded and arguments.out is not None:
        out = Path(arguments.out)
        weights = out.with_name(f".{out.name}.weights")
        write_whole(weights, {"weights": result.trained_state(), "public_weights": result.public_state})
    return ranks, result, job, weights


def _go_on(arguments: argparse.Namespace) -> None:
    """On rank 0: what is otherwise where torchrun starts the ranks again."""
    if not int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")):
        return
    if arguments.checkpoint is None:
        raise InputError(
            "checkpoint: missing, and torchrun was given --max-restarts: ranks that are started again would begin anew "
            "and be charged for all steps again; pass --checkpoint FOLDER and --ledger FILE, or --max-restarts 0"
        )
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")):
        arguments.resume |= holds_a_run(arguments.checkpoint)  # before the first one nothing was charged
        if new_ledger_was_made(arguments):  # another one is still refused
            arguments.new_ledger = arguments.budget_epsilon = arguments.budget_delta = arguments.unit = None


def _leave(
    arguments: argparse.Namespace, summary: dict[str, Any], result: DeepResult, job: Job, weights: Path | None
) -> None:
    console = console_of(arguments)
    _show(console, summary, result, job)
    if arguments.out is not None:
        write_run(arguments.out, result, summary, weights=weights)
        console.print(f"Run folder: {arguments.out}", markup=False)


def _summarise(result: DeepResult, recipe: str, ranks: int) -> dict[str, Any]:
    return {
        "method": "DeepAdaMix",
        "recipe": recipe,
        "test_error": result.test_error,
        "public_error": result.public_error,
        "test_loss": result.test_loss,
        "public_loss": result.public_loss,
        "epsilon": result.epsilon,
        "delta": result.delta,
        "unit": "record",
        "noise_multiplier": result.noise_multiplier,
        "steps": len(result.steps),
        "ranks": ranks,
        "sharding": result.config.sharding,
        "tune": result.tuned.mode,
        "trained_parameters": result.tuned.count,
        "parameters": result.tuned.total,
        **({} if result.ledger_epsilon is None else {"ledger_epsilon": result.ledger_epsilon}),
    }


def _show(console: Console, summary: dict[str, Any], result: DeepResult, job: Job) -> None:
    columns = ("", "test error %", "test loss", "epsilon", "delta")
    table = table_of(f"{summary['recipe']}: {result.tuned}", columns)
    for name, key, cost in (
        ("public only", "public", ("0", "0")),
        ("AdaMix", "test", (f"{summary['epsilon']:.4g}", f"{summary['delta']:g}")),
    ):
        figures = [summary[f"{key}_error"], summary[f"{key}_loss"]]
        table.add_row(name, *("-" if x is None else f"{x:.4g}" for x in figures), *cost)
    console.print(table)
    console.print(
        f"noise multiplier {summary['noise_multiplier']:.4g}, {summary['steps']} steps, one record protected. "
        f"Data: {job.source}.",
        markup=False,
    )
    if "ledger_epsilon" in summary:
        console.print(f"Spent on these private rows in all, by the ledger: epsilon {summary['ledger_epsilon']:.6g}.")
