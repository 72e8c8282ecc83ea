"""The command `adamix budget`, what a ledger says was spent and what is left; and the flags of `train` for ledgers."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from rich.markup import escape

from adamix.cli_common import Commands, add_command, console_of, table_of
from adamix.errors import InputError
from adamix.ledger import Ledger
from adamix.ledger_records import UNITS, Book, Run, read_ledger
from adamix.privacy import spent_together


def add_budget(commands: Commands) -> None:
    parser = add_command(commands, "budget", run_budget, "Show what a ledger says was spent, and what is left.")
    parser.add_argument("ledger", help="the ledger file of a private data set; it may be in use")


def run_budget(arguments: argparse.Namespace) -> dict[str, Any]:
    """Verify the ledger and show its runs."""
    book = read_ledger(arguments.ledger)
    runs = [_record(run, book) for run in book.runs.values()]
    summary = {
        "method": "budget",
        "data_set": book.data_set,
        "unit": book.unit,
        "delta": book.delta,
        "budget": book.epsilon,
        "spent": book.spent(),
        "left": book.left(),
        "runs": runs,
    }
    table = table_of(
        f"{escape(book.data_set)}: protects one {book.unit}, delta {book.delta:g}",
        ("run", "started", "noise multiplier", "sample rate", "steps", "epsilon", ""),
        ("run", "started", ""),
    )
    for run in runs:
        table.add_row(
            run["run"][:8],
            run["started"],
            f"{run['noise_multiplier']:.4g}",
            f"{run['sample_rate']:g}",
            f"{run['charged']} of {run['planned']}",
            f"{run['epsilon']:.4g}",
            "ended" if run["ended"] else "not ended",
        )
    console = console_of(arguments)
    console.print(table)
    console.print(f"Spent in all: epsilon {summary['spent']:.6g} (of steps composed, not the sum of the column).")
    if book.epsilon is not None:
        console.print(f"Budget: epsilon {book.epsilon:g}. Left: a full-batch run of epsilon {summary['left']:.4g}.")
    return summary


def _record(run: Run, book: Book) -> dict[str, Any]:
    return {
        "run": run.id,
        "started": run.started,
        "noise_multiplier": run.noise_multiplier,
        "sample_rate": run.sample_rate,
        "charged": run.charged,
        "planned": run.planned,
        "ended": run.ended,
        "epsilon": spent_together([run.cost()], delta=book.delta),
    }


def add_ledger_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("ledger and checkpoints")
    group.add_argument("--ledger", help="ledger of the private rows: every step is charged in it before its noise")
    group.add_argument("--new-ledger", metavar="NAME", help="make the ledger, for private rows of this (public) name")
    group.add_argument("--budget-epsilon", type=float, help="with --new-ledger: what all runs together may spend")
    group.add_argument("--budget-delta", type=float, help="with --new-ledger: at this delta; default: --delta")
    group.add_argument("--unit", choices=UNITS, help="with --new-ledger: what the guarantee protects; default: record")
    group.add_argument("--checkpoint", metavar="FOLDER", help="where to go on from after an interruption")
    group.add_argument("--checkpoint-every", type=int, default=1, help="steps between two checkpoints")
    group.add_argument("--resume", action="store_true", help="go on with the interrupted run of --checkpoint")


def check_ledger_flags(arguments: argparse.Namespace) -> None:
    """Before the data are loaded: the flags fit together, and the ledger is in order and where it should be."""
    if arguments.new_ledger is None:
        for name in ("budget_epsilon", "budget_delta", "unit"):
            if getattr(arguments, name) is not None:
                raise InputError(f"{name}: belongs to a new ledger and never changes; pass --new-ledger NAME too")
        if arguments.ledger is not None:
            read_ledger(arguments.ledger)
    elif arguments.ledger is None or arguments.resume:
        raise InputError("new_ledger: pass --ledger FILE with it, and no --resume")
    elif Path(arguments.ledger).exists():
        raise InputError(f"ledger: {arguments.ledger} exists already; drop --new-ledger to go on with it")


def make_new_ledger(arguments: argparse.Namespace) -> None:
    """If one was asked for."""
    if arguments.new_ledger is not None:
        Ledger.create(arguments.ledger, **_asked_for(arguments)).close()


def new_ledger_was_made(arguments: argparse.Namespace) -> bool:
    """The ledger is there, with the name, budget and unit of the new one that was asked for."""
    if None in (arguments.new_ledger, arguments.ledger) or not Path(arguments.ledger).exists():
        return False
    book = read_ledger(arguments.ledger)
    return all(getattr(book, name) == value for name, value in _asked_for(arguments).items())


def _asked_for(arguments: argparse.Namespace) -> dict[str, Any]:
    return {
        "data_set": arguments.new_ledger,
        "epsilon": arguments.budget_epsilon,
        "delta": arguments.delta if arguments.budget_delta is None else arguments.budget_delta,
        "unit": arguments.unit or "record",
    }
