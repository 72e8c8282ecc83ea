"""The precision attack (Mironov 2012; Jin et al., arXiv 2112.05307): fast mode falls to it, the grid does not.

A sum v in floating point with noise z added in floating point does not reach every number near it. The spacing of
v + z is that of z or that of v, whichever is coarser; so small outputs carry marks of v in their low bits. For v = 1
an output between -1/2 and 1/2 comes from a z beyond 1/2, and is a multiple of 2^-54; for v = 0 it is of any spacing.
One output that is no multiple of 2^-54 proves that v was not 1: no epsilon covers that.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from adamix_kernels import Noise, add_gaussian_noise_, grid_for, grid_release

SIZES = [200_000, pytest.param(10_000_000, marks=pytest.mark.slow)]
SIGMA = 0.5
GRID = grid_for(1.0, SIGMA)
#: Sums of two data sets that differ by one sample, whose gradient is as large as the threshold, 1.
WITH, WITHOUT = 1.0, 0.0


def floating(value: float, count: int, dtype: torch.dtype, mode: str) -> Tensor:
    return add_gaussian_noise_(torch.full((count,), value, dtype=dtype), SIGMA, Noise(mode=mode))


def on_the_grid(value: float, count: int) -> Tensor:
    return grid_release(torch.full((count,), int(value / GRID)), SIGMA, GRID, Noise(mode="secure"))


def off_the_grid(released: Tensor, grid: float = GRID) -> int:
    """How many are no multiples of the grid: exact, as it is a power of two."""
    steps = released.double() / grid
    return int((steps != steps.round()).sum())


def impossible(released: Tensor) -> int:
    """How many outputs cannot come from the data set with the sample."""
    return off_the_grid(released[released.abs() < 0.5], 2.0**-54)


@pytest.mark.parametrize("count", SIZES)
@pytest.mark.parametrize("mode", ["fast", "secure"])
def test_sums_in_floating_point_are_off_the_grid(mode: str, count: int) -> None:
    """Better random numbers alone do not mend the arithmetic."""
    assert off_the_grid(floating(WITHOUT, count, torch.float32, mode)) > 0.3 * count


@pytest.mark.parametrize("count", SIZES)
@pytest.mark.parametrize("mode", ["fast", "secure"])
def test_their_low_bits_tell_whether_the_sample_took_part(mode: str, count: int) -> None:
    assert impossible(floating(WITHOUT, count, torch.float64, mode)) > 0.2 * count
    assert impossible(floating(WITH, count, torch.float64, mode)) == 0


@pytest.mark.parametrize("count", SIZES)
@pytest.mark.parametrize("value", [WITH, WITHOUT])
def test_nothing_is_off_the_grid_in_secure_mode(value: float, count: int) -> None:
    released = on_the_grid(value, count)
    assert len(released) == count and released.unique().numel() > count / 2
    assert off_the_grid(released) == 0
    assert impossible(released) == 0
