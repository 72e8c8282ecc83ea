"""The command line: `adamix train|finetune|budget|baselines|features|audit|plan|info`, also `python -m adamix`."""

from __future__ import annotations

import argparse
import re
import sys
import warnings
from collections.abc import Sequence
from typing import Any, NoReturn

from adamix import cli, cli_audit, cli_baselines, cli_budget, cli_finetune, cli_plan
from adamix.errors import InputError
from adamix.report import to_json


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, as for every other bad input."""
        self.exit(2, f"{self.prog}: error: {message}\n")


def parser() -> argparse.ArgumentParser:
    root = _Parser(prog="adamix", description="Differentially private training with a little public data (AdaMix).")
    root.add_argument("--version", action="version", version=cli.version())
    commands = root.add_subparsers(dest="command", required=True, parser_class=_Parser)
    for add in (
        cli.add_train,
        cli_finetune.add_finetune,
        cli_budget.add_budget,
        cli_baselines.add_baselines,
        cli.add_features,
        cli_audit.add_audit,
        cli_plan.add_plan,
        cli.add_info,
    ):
        add(commands)
    return root


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; bad input ends with one line and exit code 2, an audit that fails with 1."""
    arguments = parser().parse_args(argv)
    with warnings.catch_warnings():
        warnings.showwarning = _one_line_warning  # type: ignore[assignment]
        try:
            result: dict[str, Any] = arguments.run(arguments)
        except InputError as error:
            # The loader's argument is called --data here.
            message = re.sub(r"^source: ", "data: ", str(error)) if arguments.command == "train" else str(error)
            print(f"adamix {arguments.command}: error: {message}", file=sys.stderr)
            return 2
    if arguments.json:
        print(to_json(result))
    return 1 if result.get("failed") else 0


def _one_line_warning(message: Warning | str, category: type[Warning], *_: object) -> None:
    print(f"warning: {message}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
