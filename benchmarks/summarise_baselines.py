"""The README's table, from the JSON that `adamix baselines --json` printed for each data set.

    adamix baselines --data fashion-mnist --shots 2 5 --private-rows 1000 3000 --seeds 5 --json \
        | tail -n 1 > benchmarks/results/baselines_fashion-mnist.json
    adamix baselines --data letter --shots 2 5 --private-rows 520 1300 --seeds 3 --json \
        | tail -n 1 > benchmarks/results/baselines_letter.json
    python benchmarks/summarise_baselines.py
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
#: As the methods are called in the README; the rest is in the full tables.
SHOWN = {
    "public only": "public only",
    "public only, whitened": "public only, whitened",
    "fully private DP-GD": "fully private DP-GD, default (C=1, lr=1)",
    "fully private DP-GD, tuned": "fully private DP-GD, tuned",
    "conventional mixed DP-GD": "conventional mixed, default (C=1, lr=1)",
    "conventional mixed DP-GD, tuned": "conventional mixed, tuned",
    "AdaMix as in the paper": "AdaMix as in the paper (with a subspace)",
    "- no subspace": "the same without the subspace",
    "AdaMix": "**AdaMix, default**",
    "AdaMix, tuned": "AdaMix, tuned",
    "non-private on all data (paragon)": "not private (paragon)",
}


def table(record: dict[str, Any]) -> str:
    """One data set: methods down, settings across, test error and in brackets the increase over the paragon."""
    settings = record["settings"]
    heads = [f"{s['shots']} / {s['private_rows']}, eps {s['epsilon']:g}" for s in settings]
    lines = [
        f"| {settings[0]['data']} | " + " | ".join(heads) + " | mean increase |",
        "|---|" + "--:|" * (len(heads) + 1),
    ]
    for method, title in SHOWN.items():
        rows = [next(row for row in setting["rows"] if row["method"] == method) for setting in settings]
        cells = [f"{row['test_error']:.1f} ({row['error_increase']:.0f})" for row in rows]
        increase = statistics.fmean(row["error_increase"] for row in rows)
        lines.append(f"| {title} | " + " | ".join(cells) + f" | {increase:.0f} |")
    return "\n".join(lines)


def main() -> None:
    for name in ("fashion-mnist", "letter"):
        print(table(json.loads((RESULTS / f"baselines_{name}.json").read_text())) + "\n")


if __name__ == "__main__":
    main()
