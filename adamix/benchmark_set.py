"""A public benchmark set: rows to draw splits from, and test rows that no draw changes."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from adamix.errors import InputError

TEST_SPLIT_SEED = 20220611  # the held-out test rows never change with the user's seed


class Benchmark(NamedTuple):
    """A benchmark set without duplicate rows: a pool to draw from, fixed test rows, and the default draw."""

    x: NDArray[np.float32]  # [N, d]
    y: NDArray[np.int64]  # [N]
    x_test: NDArray[np.float32]  # [M, d]
    y_test: NDArray[np.int64]  # [M]
    class_names: tuple[str, ...]
    source: str
    private_rows: int
    validation_rows: int
    stratified: bool  # private and validation rows balanced over the classes
    groups: NDArray[np.int64] | None = None  # [N] of the pool: rows of one group never fall into two parts of a split


def drop_duplicates(x: NDArray[Any], y: NDArray[np.int64]) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """The first of every group of equal rows of x, [N, d], in the old order: else copies would fall into two splits."""
    first = np.sort(np.unique(x, axis=0, return_index=True)[1])
    return x[first], y[first]


def hold_out(
    x: NDArray[np.float32], y: NDArray[np.int64], test_rows: int, class_names: tuple[str, ...], source: str, **draw: Any
) -> Benchmark:
    """All rows with `test_rows` of them held out.

    Raises:
        InputError: there are too few.
    """
    if len(y) <= test_rows:
        raise InputError(f"{source}: {len(y)} distinct rows, too few to hold out {test_rows}; use the complete file")
    order = np.random.default_rng(TEST_SPLIT_SEED).permutation(len(y))
    test, pool = order[:test_rows], order[test_rows:]
    return Benchmark(x[pool], y[pool], x[test], y[test], class_names, source, **draw)
