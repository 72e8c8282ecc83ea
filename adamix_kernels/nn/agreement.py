"""What the ranks of a job tell each other before each step, which they must take alike or not at all."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from adamix_kernels.nn.clipping import Limit
from adamix_kernels.nn.errors import PrivacyError

if TYPE_CHECKING:
    from adamix_kernels.nn.ranks import Ranks
    from adamix_kernels.nn.sums import StepSums


def agree(sums: StepSums, ranks: Ranks, trained: Sequence[tuple[str, Tensor]], limit: Limit) -> Limit:
    """The largest threshold of all ranks, after they were found to draw the same noise on the same parameters.

    A rank that finds a reason to stop must not leave the others waiting: all see the numbers of all, and raise
    together.
    """
    engine, grid = sums._engine, sums.grid
    by_layer = sums.adaptive is not None and engine.strategy == "per_layer"
    if by_layer and grid is not None:
        raise PrivacyError(
            "max_grad_norm: a PublicQuantile with 'per_layer' and secure noise is not supported over several ranks; "
            "pass strategy='auto'"
        )
    named = [] if engine.shards is not None else engine._attached.stepped  # frozen ones too: rows must be equally long
    public = [p.grad is not None and p.requires_grad for _, p in named]
    waits = isinstance(limit, Tensor) and limit.device.type != "cpu" and not by_layer
    equal = {
        "optimizer.step(): steps taken": engine.steps,
        "noise: draws": engine.noise._draws,
        "noise_multiplier": engine.noise_multiplier,
        "expected_batch_size": engine.expected_batch_size,
        "parameters that are trained (checksum)": zlib.crc32("\n".join(name for name, _ in trained).encode()),
        "max_grad_norm: whether on a device": waits,
        "max_grad_norm: by public rows": float(limit) if by_layer else -1.0,
    }
    of_grid = [0, 0.0] if grid is None else [grid.rows, grid.step if sums.totals else 0.0]
    row = [*equal.values(), *of_grid, sums.public.weight, 0.0 if waits else float(limit), *public]
    ranks.meet("optimizer.step()", 0.0)
    found = ranks.rows_of_all(row)
    for i, name in enumerate(equal):
        if len(values := {other[i] for other in found}) > 1:
            raise PrivacyError(f"{name}: differs between ranks, {sorted(values)}; all ranks must take the same steps")
    rows, grids, weights, limits, *grads = zip(*(other[len(equal) :] for other in found), strict=True)
    if grid is not None:
        grid.join(sum(int(x) for x in rows), {x for x in grids if x})
    if sums.users is not None:
        ranks.check_disjoint(sums.users.seen)
    ranks.average(named, [any(of_parameter) for of_parameter in grads])
    if any(weights):
        sums.public.join(ranks, trained, sum(weights))
    if isinstance(limit, Tensor) and waits:
        return ranks.greatest(limit)
    return max(limits)
