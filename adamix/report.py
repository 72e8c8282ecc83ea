"""What a run leaves behind: a folder with config, metrics, weights and a plot, made whole or not at all."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import save_file

from adamix.deep import DeepResult
from adamix.errors import InputError
from adamix.private_metrics import PrivateMetrics
from adamix.storage import one_line
from adamix.trainer import Result
from adamix_kernels import Private


def check_out(out: str | Path) -> Path:
    """The run folder, which must not hold anything yet and can be made; found out before anything is trained."""
    path = Path(out)
    try:
        if path.is_symlink() or (path.exists() and (not path.is_dir() or any(path.iterdir()))):
            raise InputError(f"out: {path} exists already; name a new folder, nothing is overwritten")
        missing = [parent for parent in path.parents if not parent.exists()]
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent)).rmdir()
        finally:
            for parent in missing:
                if parent.exists():
                    parent.rmdir()
    except InputError:  # a ValueError as well
        raise
    except (OSError, ValueError) as error:
        raise _cannot_write(path, error) from error
    return path


def _cannot_write(path: Path, error: Exception) -> InputError:
    return InputError(f"out: {str(path)!r} cannot be written ({one_line(error)}); name a folder that can")


def write_run(
    out: str | Path,
    result: Result | DeepResult,
    summary: dict[str, Any],
    private_metrics: Sequence[PrivateMetrics] = (),
    weights: Path | None = None,
) -> None:
    """Write `config.json`, `summary.json`, `metrics.jsonl`, `weights.safetensors`, `public_weights.safetensors`
    and `run.png` into the new folder `out`; all of it may be published.

    `private_metrics`, where they were asked for, go to a file of their own, `PRIVATE_metrics.jsonl`, which may not. The
    weights of a sharded model come from the folder `weights`, where its ranks have put them.
    Everything is written beside it first and moved at the end, so that `out` is never half a run.
    """
    path = check_out(out)
    staging = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
        _write_json(staging / "config.json", dataclasses.asdict(result.config))
        _write_json(staging / "summary.json", summary)
        with (staging / "metrics.jsonl").open("w") as file:
            for record in step_records(result):
                file.write(to_json(record) + "\n")
        if private_metrics:
            lines = [to_json(metrics.revealed()) + "\n" for metrics in private_metrics]
            (staging / "PRIVATE_metrics.jsonl").write_text("".join(lines))
        for name, state in (("weights", result.trained_state), ("public_weights", lambda: result.public_state)):
            if weights is None:
                save_file(state(), staging / f"{name}.safetensors")
            else:
                shutil.move(weights / f"{name}.safetensors", staging)
        plot_run(result, staging / "run.png")
        staging.chmod(0o755)
        staging.replace(path)  # an empty folder may stand there
    except OSError as error:
        raise _cannot_write(path, error) from error
    finally:
        if staging is not None:
            shutil.rmtree(staging, ignore_errors=True)  # moved away by now, unless something failed
        if weights is not None:
            shutil.rmtree(weights, ignore_errors=True)


def step_records(result: Result | DeepResult) -> list[dict[str, Any]]:
    """Per step, what costs no privacy: threshold(s), public loss, clipped share of public rows, epsilon so far."""
    return [
        {**dataclasses.asdict(step), "epsilon": epsilon}
        for step, epsilon in zip(result.steps, result.epsilons, strict=True)
    ]


def to_json(value: Any, indent: int | None = None) -> str:
    """JSON text; it has no infinities and NaN, so the texts "inf", "-inf" and "nan" stand for them.

    Raises TypeError for a `Private` value.
    """

    def finite(item: Any) -> Any:
        if isinstance(item, dict):
            return {key: finite(inner) for key, inner in item.items()}
        if isinstance(item, list | tuple):
            return [finite(inner) for inner in item]
        if isinstance(item, Private):
            item.refuse("it cannot be written as JSON")
        return str(item) if isinstance(item, float) and not math.isfinite(item) else item

    return json.dumps(finite(value), indent=indent, allow_nan=False)


def plot_run(result: Result | DeepResult, path: Path) -> None:
    """Threshold, public loss, clipped share of the public rows and epsilon against the step, as a PNG."""
    from matplotlib.figure import Figure  # slow to import, and no display is needed

    numbers = [step.number for step in result.steps]
    panels: list[tuple[str, list[Any]]] = [
        ("threshold tau_t", [step.thresholds for step in result.steps]),
        ("public loss", [step.public_loss for step in result.steps]),
        ("clipped share of public rows", [step.public_clipped for step in result.steps]),
    ]
    panels = [(title, values) for title, values in panels if not np.isnan(values).all()]
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
    path.write_text(to_json(value, indent=2) + "\n")
