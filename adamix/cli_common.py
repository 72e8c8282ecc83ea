"""What the commands of the command line share."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.progress import Progress

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
