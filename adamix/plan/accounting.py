"""What a planned run costs: epsilon for a noise multiplier, or the noise multiplier for an epsilon."""

from __future__ import annotations

import math
from dataclasses import dataclass

from adamix.errors import InputError
from adamix.privacy import calibrate, spent


@dataclass(frozen=True)
class Accounting:
    """Of `steps` Poisson batches (full ones where `sample_rate` is 1) of `private_rows` rows, neighbours by one row."""

    private_rows: int
    sample_rate: float
    steps: int
    delta: float
    noise_multiplier: float
    epsilon: float
    full_batches: float  # epsilon if nothing were gained by sampling


def account(
    *,
    private_rows: int,
    batch: int,
    delta: float,
    steps: int | None = None,
    epochs: float | None = None,
    epsilon: float | None = None,
    noise_multiplier: float | None = None,
) -> Accounting:
    """Through `adamix.privacy`.

    Args:
        private_rows: N, a public number.
        batch: the expected batch size: rows are sampled with the rate batch / N.
        delta: of the guarantee.
        steps, epochs: one of both; an epoch is N / batch steps, and the last step is a whole one.
        epsilon, noise_multiplier: one of both; the other is computed, to the safe side.

    Raises:
        InputError: names the argument that is missing, too many or out of range.
    """
    if private_rows < 1 or batch > private_rows:
        raise InputError(f"private_rows: {private_rows} is not valid here; pass at least the batch, {batch}")
    if (steps is None) == (epochs is None):
        raise InputError("steps: pass either steps or epochs, to tell how often the private rows are used")
    if (epsilon is None) == (noise_multiplier is None):
        raise InputError("epsilon: pass either epsilon or noise_multiplier; the other is computed")
    if epochs is not None:
        if not 0 < epochs < math.inf:
            raise InputError(f"epochs: {epochs} is not valid here; pass a number above 0")
        steps = math.ceil(epochs * private_rows / batch)
    assert steps is not None
    rate = batch / private_rows
    if noise_multiplier is None:
        assert epsilon is not None
        noise_multiplier = calibrate(epsilon, delta=delta, steps=steps, sample_rate=rate)
    return Accounting(
        private_rows=private_rows,
        sample_rate=rate,
        steps=steps,
        delta=delta,
        noise_multiplier=noise_multiplier,
        epsilon=spent(noise_multiplier, delta=delta, steps=steps, sample_rate=rate),
        full_batches=spent(noise_multiplier, delta=delta, steps=steps),
    )
