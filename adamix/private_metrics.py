"""How a step sees the private rows: computed without noise, so outside the guarantee, and only where asked for by name.

Nothing else in this package reads private rows but `adamix.mechanism`; nothing here has an effect on training.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from adamix.mechanism import contributions, parts_of
from adamix.models import Trainable, _generators_kept
from adamix.rows import Rows, UserRows
from adamix_kernels import Private, grad_norm_sq

WARNING = (
    "private metrics: they are computed from private rows without noise, so whoever sees them learns more than "
    "epsilon says: look at them, do not publish them"
)


@dataclass(frozen=True)
class PrivateMetrics:
    """Of all private rows, at the weights that step `number` starts from. The values are marked as `Private`.

    `loss` mean cross-entropy; `accuracy` and `clipped_fraction` in [0, 1]: of rows that are classified well, and of
    rows, or users, with a gradient above the threshold (one of the thresholds). NaN without rows.
    """

    number: int
    loss: Private[float]
    accuracy: Private[float]
    clipped_fraction: Private[float]

    def revealed(self) -> dict[str, Any]:
        """A record for a log file that is itself private."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: v.reveal() if isinstance(v, Private) else v for name, v in values.items()}


def private_metrics(
    number: int, model: Trainable, rows: Rows | UserRows, thresholds: Tensor, basis: Tensor | None = None
) -> PrivateMetrics:
    """Measure the private `rows`, as `Mechanism.release` is about to see them.

    Args:
        number: of the step.
        model: at its present weights; it is left as it was.
        rows: the private rows, all of them, possibly none.
        thresholds: `[L]` one per layer of the model, or `[1]`.
        basis: orthonormal `[K, P]` if clipping takes place in these coordinates.
    """
    parts, _ = parts_of(model, len(thresholds), basis)
    clipped, units = 0, 0
    for coordinates in contributions(model, rows, basis):
        units += len(coordinates)
        norm_sq = torch.stack([grad_norm_sq(coordinates[:, part]) for part in parts])
        clipped += int((norm_sq.double().sqrt() > thresholds.double()[:, None]).any(0).sum())
    loss, right = 0.0, 0
    module = copy.deepcopy(model.module).eval()  # counters and caches of a forward pass stay in the copy
    with torch.no_grad(), _generators_kept():
        for x, y in zip(rows.x.split(4096), rows.y.split(4096), strict=True):
            if len(y):
                logits = module(x)
                loss += float(cross_entropy(logits, y, reduction="sum"))
                right += int((logits.argmax(1) == y).sum())
    return PrivateMetrics(
        number,
        _mean("private loss", loss, len(rows.y)),
        _mean("private accuracy", right, len(rows.y)),
        _mean("private clipped_fraction", clipped, units),
    )


def _mean(name: str, total: float, count: int) -> Private[float]:
    return Private(name, lambda: total / count if count else float("nan"))
