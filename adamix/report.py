"""What a run leaves behind: a folder with config, metrics, weights and a plot, made whole or not at all."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import tempfile
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from adamix.errors import InputError
from adamix.trainer import Result


def check_out(out: str | Path) -> Path:
    """The run folder, which must not hold anything yet."""
    path = Path(out)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise InputError(f"out: {path} exists already; name a new folder, nothing is overwritten")
    return path


def write_run(out: str | Path, result: Result, summary: dict[str, Any]) -> None:
    """Write `config.json`, `summary.json`, `metrics.jsonl`, `weights.safetensors`, `public_weights.safetensors`
    and `run.png` into the new folder `out`.

    Everything is written beside it first and moved at the end, so that `out` is never half a run.
    """
    path = check_out(out)
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        _write_json(staging / "config.json", dataclasses.asdict(result.config))
        _write_json(staging / "summary.json", summary)
        with (staging / "metrics.jsonl").open("w") as file:
            for record in step_records(result):
                file.write(json.dumps(record) + "\n")
        save_file({k: v.contiguous() for k, v in result.model.state_dict().items()}, staging / "weights.safetensors")
        save_file({k: v.contiguous() for k, v in result.public_state.items()}, staging / "public_weights.safetensors")
        plot_run(result, staging / "run.png")
        staging.chmod(0o755)
        staging.replace(path)  # an empty folder may stand there
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def step_records(result: Result) -> list[dict[str, Any]]:
    """Per step, what costs no privacy: threshold(s), public loss, clipped share of public rows, epsilon so far."""
    return [
        {**dataclasses.asdict(step), "epsilon": finite(epsilon)}
        for step, epsilon in zip(result.steps, result.epsilons, strict=True)
    ]


def finite(epsilon: float) -> float | str:
    """JSON has no infinity: the text "inf" stands for it."""
    return epsilon if math.isfinite(epsilon) else "inf"


def plot_run(result: Result, path: Path) -> None:
    """Threshold, public loss, clipped share of the public rows and epsilon against the step, as a PNG."""
    from matplotlib.figure import Figure  # slow to import, and no display is needed

    numbers = [step.number for step in result.steps]
    panels: list[tuple[str, list[Any]]] = [
        ("threshold tau_t", [step.thresholds for step in result.steps]),
        ("public loss", [step.public_loss for step in result.steps]),
        ("clipped share of public rows", [step.public_clipped for step in result.steps]),
    ]
    if math.isfinite(result.epsilon):
        panels.append(("epsilon so far", result.epsilons))
    figure = Figure(figsize=(10, 6), layout="constrained")
    for axes, (title, values) in zip(figure.subplots(2, 2).flat, panels, strict=False):
        axes.plot(numbers, values, marker=".")
        axes.set_title(title)
        axes.set_xlabel("private step")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    for axes in figure.axes[len(panels) :]:
        axes.remove()
    figure.savefig(path, dpi=120)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    value = {k: finite(v) if isinstance(v, float) else v for k, v in value.items()}
    path.write_text(json.dumps(value, indent=2) + "\n")
