"""Tests of what the guarantee is made of: the size of the noise, its freshness, and who is sampled.

Each gives a p-value under "all is as stated" and a verdict at `LEVEL`, small enough that a whole audit hardly ever
raises a false alarm, and many standard errors from the faults they look for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Array = NDArray[np.float64]

#: A check fails below this p-value.
LEVEL = 1e-4


@dataclass(frozen=True)
class Check:
    """One test: what was measured, and how likely that is if all is well."""

    name: str
    measured: str
    p_value: float

    @property
    def passed(self) -> bool:
        return self.p_value >= LEVEL  # False for NaN


def standard_deviation(name: str, noise: Sequence[Array]) -> Check:
    """Two-sided, chi-square: `noise` in units of its stated standard deviation.

    With 10^6 numbers a deviation by 1 % is 14 standard errors.
    """
    values = np.concatenate([np.ravel(part) for part in noise])
    total = float(np.square(values).sum())
    p = 2 * min(float(stats.chi2.cdf(total, len(values))), float(stats.chi2.sf(total, len(values))))
    measured = f"{math.sqrt(total / len(values)):.5f} x stated (+- {1 / math.sqrt(2 * len(values)):.5f})"
    return Check(name, measured, min(1.0, p))


def reuse(name: str, noise: Sequence[Array]) -> Check:
    """Whether two of the vectors in units of their standard deviation share numbers: at the same place, where a weak
    correlation is seen too, or shifted by any distance. Also each with itself shifted.

    Steps, shards or runs that share noise can be subtracted, and what is left has none.
    """
    vectors = [np.ravel(part) for part in noise]
    size = 2 * max(map(len, vectors))
    spectra = [np.fft.rfft(vector, size) for vector in vectors]
    pairs = [*combinations(range(len(vectors)), 2), *((i, i) for i in range(len(vectors)))]
    together, shifted = 0.0, 0.0
    for i, j in pairs:
        products = np.fft.irfft(spectra[i] * spectra[j].conj(), size)
        products /= math.sqrt(min(len(vectors[i]), len(vectors[j])))
        if i != j:
            together = max(together, abs(float(products[0])))
        shifted = max(shifted, float(np.abs(products[1:]).max()))
    places = sum(i != j for i, j in pairs)
    p = 2 * min(places * _tail(together), len(pairs) * size * _tail(shifted))
    measured = f"correlation z {together:.1f} in place, {shifted:.1f} shifted, {places} pairs"
    return Check(name, measured, min(1.0, p))


def sampling(name: str, taken: NDArray[np.bool_], sample_rate: float) -> list[Check]:
    """Whether rows are taken as by independent coins.

    Args:
        taken: `[steps, rows]`, whether a step took a row.
        sample_rate: the stated probability, in (0, 1).
    """
    steps, rows = taken.shape
    variance = sample_rate * (1 - sample_rate)
    centred: Array = taken.astype(np.float64) - sample_rate
    hits = int(taken.sum())
    rate = Check(
        f"{name}: rate",
        f"{hits / taken.size:.5f}, stated {sample_rate:g}",
        float(stats.binomtest(hits, taken.size, sample_rate).pvalue),
    )
    return [
        rate,
        _dispersion(f"{name}: batch sizes", centred.sum(1), rows * variance, variance),
        _dispersion(f"{name}: times a row is taken", centred.sum(0), steps * variance, variance),
        _product(f"{name}: step after step", centred[1:], centred[:-1], variance),
        _product(f"{name}: row beside row", centred[:, 1:], centred[:, :-1], variance),
    ]


def _dispersion(name: str, sums: Array, stated: float, variance: float) -> Check:
    """The variance of centred binomial counts: fixed sizes have none, rows that stick together too much.

    Chi-square, with the degrees of freedom that give it its true variance: of few sums it is far from normal.
    """
    ratio = float(np.square(sums).mean()) / stated
    freedom = 2 * len(sums) / (2 + (1 - 6 * variance) / stated)
    p = 2 * min(float(stats.chi2.cdf(ratio * freedom, freedom)), float(stats.chi2.sf(ratio * freedom, freedom)))
    return Check(name, f"variance {ratio:.3f} x binomial (+- {math.sqrt(2 / freedom):.3f})", min(1.0, p))


def _product(name: str, left: Array, right: Array, variance: float) -> Check:
    z = float((left * right).sum()) / (variance * math.sqrt(left.size))
    return Check(name, f"correlation z {z:.1f}", _tail(abs(z)))


def _tail(z: float) -> float:
    return 2 * float(stats.norm.sf(z))
