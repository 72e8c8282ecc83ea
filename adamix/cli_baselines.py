"""The command `adamix baselines`: the comparison as tables, Markdown and JSON."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from rich.table import Table

from adamix import baselines
from adamix.cli_common import Commands, add_command, console_of, progress_bar, table_of
from adamix.config import Config
from adamix.data import DEFAULT_SOURCE, load_split
from adamix.datasets import BENCHMARKS
from adamix.errors import InputError
from adamix.storage import one_line


def add_baselines(commands: Commands) -> None:
    parser = add_command(commands, "baselines", run_baselines, "Compare AdaMix, its ablations and the baselines.")
    parser.add_argument("--data", default=DEFAULT_SOURCE, choices=list(BENCHMARKS), help="a built-in public set")
    parser.add_argument("--epsilon", type=float, nargs="+", default=[1.0, 3.0])
    parser.add_argument("--delta", type=float, default=1e-5)
    parser.add_argument("--shots", type=int, nargs="+", default=[5], help="public rows per class")
    parser.add_argument("--private-rows", type=int, nargs="+", default=[None], help="private rows in all")
    parser.add_argument("--seeds", type=int, default=3, help="random splits per setting")
    parser.add_argument(
        "--searches", type=int, default=24, help="candidates tried for each tuned row; 0: no tuned rows"
    )
    parser.add_argument("--out", help="new file for the table as Markdown")


def run_baselines(arguments: argparse.Namespace) -> dict[str, Any]:
    """The whole table; the hyper-parameters of tuned rows are chosen on validation rows."""
    for name in ("seeds", "searches"):
        if getattr(arguments, name) < (name == "seeds"):
            raise InputError(f"{name}: {getattr(arguments, name)} is too few; pass a number >= {int(name == 'seeds')}")
    out = None if arguments.out is None else _new_file(arguments.out)
    methods = [m for m in baselines.METHODS if arguments.searches or m.grid is None]
    grid = [(s, n, e) for s in arguments.shots for n in arguments.private_rows for e in arguments.epsilon]
    for shots, private_rows, epsilon in grid:  # all of it is tried before any of it is trained
        Config(epsilon=epsilon, delta=arguments.delta, expected_batch_size=1)
        load_split(arguments.data, shots=shots, private_rows=private_rows)
    console, records, markdown = console_of(arguments), [], []
    total = len(grid) * baselines.runs_per_setting(methods, arguments.seeds, arguments.searches)
    with progress_bar() as progress:
        task = progress.add_task(f"{arguments.data}: training", total=total)
        for shots, private_rows, epsilon in grid:
            splits = [
                load_split(arguments.data, shots=shots, private_rows=private_rows, seed=seed)
                for seed in range(arguments.seeds)
            ]
            rows = list(
                baselines.compare(
                    splits,
                    epsilon=epsilon,
                    delta=arguments.delta,
                    methods=methods,
                    searches=arguments.searches,
                    on_run=lambda: progress.advance(task),
                )
            )
            setting = {
                "data": arguments.data,
                "shots": shots,
                "private_rows": len(splits[0].private.y),
                "epsilon": epsilon,
                "delta": arguments.delta,
                "seeds": arguments.seeds,
            }
            records.append({**setting, "rows": _row_records(rows)})
            console.print(_table(records[-1]))
            markdown.append(_markdown(records[-1]))
    if out is not None:
        out.write_text("\n".join(markdown), encoding="utf-8")
    return {"method": "baselines", "settings": records}


def _new_file(name: str) -> Path:
    """The file, which must not exist and can be written; found out before anything is trained."""
    path = Path(name)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("x").close()
        path.unlink()
    except FileExistsError as error:
        raise InputError(f"out: {path} exists already; name a new file, nothing is overwritten") from error
    except (OSError, ValueError) as error:
        raise InputError(f"out: {name!r} cannot be written ({one_line(error)}); name a file that can") from error
    return path


def _row_records(rows: list[baselines.Row]) -> list[dict[str, Any]]:
    paragon = rows[-1].mean
    return [
        {
            "method": row.method,
            "test_error": row.mean,
            "spread": row.spread,
            "error_increase": baselines.error_increase(row.mean, paragon),
            "chosen": row.chosen,
        }
        for row in rows
    ]


def _title(record: dict[str, Any]) -> str:
    return (
        f"{record['data']}: {record['shots']} public rows per class, {record['private_rows']} private rows, "
        f"epsilon {record['epsilon']:g}, delta {record['delta']:g}, {record['seeds']} seeds"
    )


def _cells(record: dict[str, Any]) -> list[tuple[str, str, str]]:
    return [
        (row["method"], f"{row['test_error']:.1f} +- {row['spread']:.1f}", _percent(row["error_increase"]))
        for row in record["rows"]
    ]


def _percent(increase: float | None) -> str:
    return "-" if increase is None else f"{increase:.0f}"


_COLUMNS = ("method", "test error %", "increase over the paragon %")


def _table(record: dict[str, Any]) -> Table:
    table = table_of(_title(record), _COLUMNS, _COLUMNS[:1])
    for cells in _cells(record):
        table.add_row(*cells)
    return table


def _markdown(record: dict[str, Any]) -> str:
    lines = [f"**{_title(record)}**", "", "| " + " | ".join(_COLUMNS) + " |", "|---|--:|--:|"]
    return "\n".join(lines + ["| " + " | ".join(cells) + " |" for cells in _cells(record)]) + "\n"
