"""What the commands of the command line share."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from adamix.config import Budget
from adamix.errors import InputError
from adamix.storage import one_line

Commands = Any  # argparse keeps the type of a group of subparsers to itself


def add_command(commands: Commands, name: str, run: Callable[[argparse.Namespace], dict[str, Any]], text: str) -> Any:
    parser = commands.add_parser(name, help=text, description=text)
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line of stdout")
    parser.set_defaults(run=run)
    return parser


def console_of(arguments: argparse.Namespace) -> Console:
    """Tables go to stdout, or with --json to stderr."""
    return Console(stderr=arguments.json, highlight=False)


def progress_bar() -> Progress:
    """On stderr, gone at the end, and only where somebody looks."""
    console = Console(stderr=True)
    return Progress(console=console, transient=True, disable=not console.is_terminal)


def table_of(title: str, columns: Iterable[str], words: Collection[str] = ("",)) -> Table:
    """An empty table; columns named in `words` are flush left, those of numbers right."""
    table = Table(title=title)
    for column in columns:
        table.add_column(column, justify="left" if column in words else "right")
    return table


def add_settings(parser: argparse.ArgumentParser, config: type[Budget], defaults: Mapping[str, Any]) -> None:
    """A flag for each field of `config`; one that has no default is left out of the arguments unless it is given."""
    settings = parser.add_argument_group("settings")
    described = _settings_help(config)
    for field in dataclasses.fields(config):
        flag, default = "--" + field.name.replace("_", "-"), defaults.get(field.name, argparse.SUPPRESS)
        given: dict[str, Any] = {"default": default, "help": described[field.name]}
        if field.type == "bool":
            settings.add_argument(flag, action=argparse.BooleanOptionalAction, **given)
        else:
            settings.add_argument(flag, type=_parser_of(str(field.type)), metavar="VALUE", **given)


def _settings_help(config: type[Budget]) -> dict[str, str]:
    """The help of each setting is its entry in the docstring of the class."""
    text = (inspect.getdoc(config) or "").split("Args:")[1].split("Raises:")[0]
    entries = re.split(r"^    (?=\w+: )", text, flags=re.MULTILINE)[1:]
    found = (entry.split(": ", 1) for entry in entries)
    return {name: " ".join(words.split()).replace("%", "%%") for name, words in found}


def _parser_of(annotation: str) -> Callable[[str], Any]:
    kind = {"float": float, "int": int, "str": str}[annotation.removesuffix(" | None")]

    def parse(text: str) -> Any:
        return None if annotation.endswith("None") and text.lower() == "none" else kind(text)

    parse.__name__ = annotation.replace(" | None", " or none")  # argparse names it in its message
    return parse


def find_device(name: str | None) -> torch.device:
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.zeros(1, device=device).sum().item()
    except Exception as error:  # torch says so in many ways
        raise InputError(f"device: {name!r} cannot be used ({one_line(error)}); pass cpu") from error
    return device
