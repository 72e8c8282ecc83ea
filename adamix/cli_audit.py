"""The command `adamix audit`: a table of bounds, one of checks, and exit code 1 if one of them fails."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from typing import Any

from rich.console import Console

from adamix.audit import Report, audit
from adamix.audit.audit import ROWS_PER_EPSILON
from adamix.cli_common import Commands, add_command, console_of, progress_bar, table_of


def add_audit(commands: Commands) -> None:
    parser = add_command(commands, "audit", run_audit, "Measure the guarantee: canaries, noise and sampling.")
    parser.add_argument("--epsilon", type=float, nargs="+", default=[1.0, 4.0, 8.0], help="claimed budgets")
    parser.add_argument("--delta", type=float, default=1e-5)
    parser.add_argument(
        "--canaries", type=int, default=100_000, help="rows that are in or out by chance; more: tighter bounds"
    )
    parser.add_argument("--steps", type=int, default=5, help="private steps of each run")
    parser.add_argument("--sample-rate", type=float, default=0.2, help="of the Poisson batches")
    parser.add_argument("--confidence", type=float, default=0.999, help="of all bounds together")


def run_audit(arguments: argparse.Namespace) -> dict[str, Any]:
    """The report; `failed` lists what failed, and makes the exit code 1."""
    with progress_bar() as progress:
        task = progress.add_task("auditing", total=ROWS_PER_EPSILON * len(arguments.epsilon) + 1)

        def on_part(name: str) -> None:
            progress.update(task, advance=1, description=name)

        report = audit(
            arguments.epsilon,
            delta=arguments.delta,
            canaries=arguments.canaries,
            steps=arguments.steps,
            sample_rate=arguments.sample_rate,
            confidence=arguments.confidence,
            on_part=on_part,
        )
    _show(console_of(arguments), report)
    for line in report.failures:
        print(f"adamix audit: FAILED: {line}", file=sys.stderr)
    return {
        "method": "audit",
        "delta": report.delta,
        "confidence": report.confidence,
        "bounds": [
            {**{k: v for k, v in dataclasses.asdict(row).items() if k != "bound"}, **dataclasses.asdict(row.bound)}
            for row in report.rows
        ],
        "checks": [{**dataclasses.asdict(check), "passed": check.passed} for check in report.checks],
        "failed": report.failures,
    }


def _show(console: Console, report: Report) -> None:
    bounds = table_of(
        f"epsilon at delta {report.delta:g}, bounds at {100 * report.confidence:g} % confidence together",
        ("", "canaries", "claimed", "theory", "lower bound", "any mechanism", "verdict"),
        ("", "verdict"),
    )
    for row in report.rows:
        figures = (row.claimed, row.theory, row.bound.lower, row.bound.model_free)
        cells = [f"{value:.3f}" for value in figures]
        bounds.add_row(f"{row.subject}, {row.batches}", str(row.bound.trials), *cells, _verdict(row.passed))
    columns = ("check", "measured", "p", "verdict")
    checks = table_of("noise and sampling", columns, columns)
    for check in report.checks:
        checks.add_row(check.name, check.measured, f"{check.p_value:.2g}", _verdict(check.passed))
    console.print(bounds)
    console.print(checks)


def _verdict(passed: bool) -> str:
    return "holds" if passed else "FAILED"
