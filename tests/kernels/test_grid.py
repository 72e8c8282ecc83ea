"""The mechanism on whole numbers: what a sample adds is bounded exactly, and sums do not depend on any order."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from fractions import Fraction
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from adamix_kernels import (
    Noise,
    clip_coef,
    grad_norm_sq,
    grid_clip_sum,
    grid_for,
    grid_release,
    native,
    use_backend,
)

BACKENDS = [b for b in ("torch", "cpp") if grid_clip_sum.why_not(b) is None]
KEY = bytes(range(32))
thresholds = st.one_of(st.floats(1e-12, 1e12), st.floats(-17, 17).map(lambda e: 10.0**e))
dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64])


@pytest.fixture
def module() -> Iterator[ModuleType]:
    found = native.load()
    if isinstance(found, str):
        pytest.skip(found)
    yield found
    found.use_isa(found.best_isa())


def gradients(seed: int, *shape: int, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    spread = 10 ** (torch.rand(shape, generator=generator, dtype=torch.float64) * 6 - 3)
    x = torch.randn(shape, generator=generator, dtype=torch.float64) * spread * scale
    limit = torch.finfo(dtype).max
    return x.clamp(-limit, limit).to(dtype)


def clipped(grads: Any, limit: float, grid: float) -> Any:
    return grid_clip_sum(grads, clip_coef(grad_norm_sq(grads), limit), limit, grid)


def square(sums: Any) -> int:
    """Exact."""
    return sum(q * q for part in (sums if isinstance(sums, list) else [sums]) for q in part.flatten().tolist())


def within(sums: Any, limit: float, grid: float) -> bool:
    """|grid q| <= limit in rational numbers."""
    return square(sums) * Fraction(grid) ** 2 <= Fraction(limit) ** 2


# --- what one sample can add -----------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(
    seed=st.integers(0, 2**20),
    cols=st.integers(1, 300),
    limit=thresholds,
    reach=st.floats(-1, 1),
    std=st.floats(0, 300),
    dtype=dtypes,
    backend=st.sampled_from(BACKENDS),
)
def test_no_sample_adds_more_than_the_threshold(
    seed: int, cols: int, limit: float, reach: float, std: float, dtype: torch.dtype, backend: str
) -> None:
    """From denormals to the largest numbers of each type; all of them by whole numbers, compared exactly."""
    scale = 10.0 ** (reach * (300 if dtype == torch.float64 else 38))
    row, grid = gradients(seed, 1, cols, scale=scale, dtype=dtype), grid_for(limit, min(std * limit, 2.0**60))
    with use_backend(backend):
        added = clipped([row[:, : cols // 2], row[:, cols // 2 :]], limit, grid)
    assert within(added, limit, grid)


@settings(max_examples=200, deadline=None)
@given(
    seed=st.integers(0, 2**20),
    factor=st.one_of(st.floats(0, 3), st.floats(0, 2.0**127), st.sampled_from([math.inf, math.nan, 1e-45])),
    limit=st.floats(0.01, 100),
    backend=st.sampled_from(BACKENDS),
)
def test_a_wrong_factor_cannot_break_the_bound(seed: int, factor: float, limit: float, backend: str) -> None:
    row, grid = gradients(seed, 1, 40), grid_for(limit, limit)
    with use_backend(backend):
        assert within(grid_clip_sum(row, torch.tensor([factor]), limit, grid), limit, grid)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_bound_is_that_of_whole_numbers(backend: str) -> None:
    """3, 4 has norm 5: let through at a threshold of 5 grids, and not at one of a hair less."""
    row, one = torch.tensor([[3.0, -4.0]]), torch.ones(1)
    with use_backend(backend):
        assert grid_clip_sum(row, one, 5.0, 1.0).tolist() == [3, -4]
        assert grid_clip_sum(row, one, math.nextafter(5.0, 0), 1.0).tolist() == [0, 0]
        parts = [torch.full((1, 20_000), 7.0), torch.full((1, 1), 1.0)]
        root = math.isqrt(20_000 * 49)
        assert not any(part.any() for part in grid_clip_sum(parts, one, float(root), 1.0)), "over all parts"
        assert square(grid_clip_sum(parts, one, float(root + 1), 1.0)) == 20_000 * 49 + 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_norm_that_wraps_around_64_bits_is_seen(backend: str) -> None:
    """2^14 columns of almost 2^25 fill 64 bits; a few blocks more would start again from 0."""
    most = float(2**25 - 1)
    for cols in (4096, 16_384, 16_385, 65_536, 70_000):
        with use_backend(backend):
            assert not grid_clip_sum(torch.full((1, cols), most, dtype=torch.float64), torch.ones(1), most, 1.0).any()
    with use_backend(backend):
        one = torch.full((1, 1), -most, dtype=torch.float64)
        assert grid_clip_sum(one, torch.ones(1), most, 1.0).tolist() == [-most]


@pytest.mark.parametrize("backend", BACKENDS)
def test_samples_that_are_not_finite_add_nothing(backend: str) -> None:
    rows = torch.ones(5, 70) * 0.01
    for b, bad in ((1, math.nan), (2, math.inf), (3, -math.inf)):
        rows[b, 64 + b] = bad
    with use_backend(backend):
        together = grid_clip_sum(rows, torch.ones(5), 1.0, 2.0**-20)
        alone = grid_clip_sum(rows[[0, 4]], torch.ones(2), 1.0, 2.0**-20)
    assert torch.equal(together, alone) and alone.eq(2 * math.floor(0.01 * 2**20)).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_numbers_are_rounded_toward_zero(backend: str) -> None:
    with use_backend(backend):
        row = torch.tensor([[0.999, -0.999, 1.5, -1.5, 2.0, -0.0, 1e-45, -3e-39]])
        assert grid_clip_sum(row, torch.ones(1), 100.0, 1.0).tolist() == [0, 0, 1, -1, 2, 0, 0, 0]


# --- the same bits ---------------------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 2**20),
    samples=st.integers(0, 9),
    cols=st.sampled_from([0, 1, 31, 512, 513, 4097]),
    dtype=dtypes,
    reach=st.floats(-1, 1),
    limit=thresholds,
)
def test_compiled_and_reference_sums_are_the_same_bits(
    seed: int, samples: int, cols: int, dtype: torch.dtype, reach: float, limit: float
) -> None:
    scale, grid = 10.0 ** (reach * (300 if dtype == torch.float64 else 38)), grid_for(limit, limit)
    rows = gradients(seed, samples, cols, scale=scale, dtype=dtype)
    parts = [rows, gradients(seed + 1, samples, 3, 5, scale=scale, dtype=torch.float32)]
    coef = clip_coef(grad_norm_sq(parts), limit)
    results = []
    for backend in BACKENDS:
        with use_backend(backend):
            results.append(grid_clip_sum(parts, coef, limit, grid))
    for result in results[1:]:
        assert all(torch.equal(*pair) for pair in zip(result, results[0], strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_same_bits_for_every_instruction_set_and_thread_count(module: ModuleType, dtype: torch.dtype) -> None:
    rows = gradients(0, 7, 60_001, dtype=dtype)
    coef, grid, threads = clip_coef(grad_norm_sq(rows), 1.0), grid_for(1.0, 1.0), torch.get_num_threads()
    noisy, plain = [], []
    try:
        for isa, count in itertools.product(module.Isa.__members__.values(), (1, 2, 3)):
            if int(isa) <= int(module.best_isa()):
                module.use_isa(isa)
                torch.set_num_threads(count)
                with use_backend("cpp"):
                    plain.append(grid_clip_sum(rows, coef, 1.0, grid))
                    noisy.append(grid_release(plain[-1], 0.9, grid, Noise._with_key(KEY, "secure")))
    finally:
        torch.set_num_threads(threads)
    assert len(plain) >= 3
    assert all(torch.equal(x, plain[0]) for x in plain) and all(torch.equal(x, noisy[0]) for x in noisy)


@pytest.mark.parametrize("std", [0.0, 1e-9, 0.37, 60.0])
def test_compiled_and_reference_noise_are_the_same_bits(std: float) -> None:
    """The two make normals by other arithmetic; whole numbers agree unless one lies within 2^-22 of a half."""
    grid, generator = grid_for(1.0, std), torch.Generator().manual_seed(0)
    sums = [torch.randint(-(2**40), 2**40, (n,), generator=generator) for n in (3, 4099, 0, 20_000)]
    results = []
    for backend in BACKENDS:
        with use_backend(backend):
            results.append(torch.cat(grid_release(sums, std, grid, Noise._with_key(KEY, "secure"))))
    assert all(torch.equal(result, results[0]) for result in results)


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**20), backend=st.sampled_from(BACKENDS), cut=st.integers(0, 40))
def test_sums_do_not_depend_on_order_or_batches(seed: int, backend: str, cut: int) -> None:
    """As sums in floating point do: adding 40 rows in another order moves those."""
    rows, grid = gradients(seed, 40, 50), grid_for(1.0, 1.0)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(seed))
    with use_backend(backend):
        whole = clipped(rows, 1.0, grid)
        assert torch.equal(clipped(rows[order], 1.0, grid), whole)
        assert torch.equal(clipped(rows[:cut], 1.0, grid) + clipped(rows[cut:], 1.0, grid), whole)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("samples", [100_003, pytest.param(3_000_000, marks=pytest.mark.slow)])
def test_a_huge_batch_at_the_largest_numbers(backend: str, samples: int) -> None:
    most = float(2**25 - 1)
    rows = torch.full((1, 2), most, dtype=torch.float64).expand(samples, 2)
    with use_backend(backend):
        total = grid_clip_sum(rows, torch.ones(samples), most * 1.42, 2.0)
        assert total.tolist() == [samples * (2**24 - 1)] * 2


# --- the release -----------------------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(limit=thresholds, sigma=st.floats(1e-3, 1e6), seed=st.integers(0, 2**20), backend=st.sampled_from(BACKENDS))
def test_releases_are_multiples_of_the_grid(limit: float, sigma: float, seed: int, backend: str) -> None:
    std = min(sigma * limit, 2.0**60)
    grid = grid_for(limit, std)
    with use_backend(backend):
        released = grid_release(clipped(gradients(seed, 9, 40), limit, grid), std, grid, Noise(mode="secure"))
    assert released.dtype == torch.float32 and released.isfinite().all()
    assert all((Fraction(x) / Fraction(grid)).denominator == 1 for x in released.tolist())


def test_the_noise_is_rounded_and_not_shifted() -> None:
    """At one step a standard deviation: variance 1 + 1/12, and each whole number as often as it should be."""
    n, grid = 2_000_000, 2.0**-10
    whole = grid_release(torch.full((n,), 3), grid, grid, Noise(mode="secure")) / grid - 3
    assert float(whole.double().var()) == pytest.approx(1 + 1 / 12, rel=5 * math.sqrt(2 / n))
    for k in range(-4, 5):
        share = 0.5 * (math.erf((k + 0.5) / math.sqrt(2)) - math.erf((k - 0.5) / math.sqrt(2)))
        assert abs(float((whole == k).double().mean()) - share) < 5 * math.sqrt(share / n)


@settings(max_examples=300, deadline=None)
@given(limit=thresholds, sigma=st.floats(0, 1e8))
def test_the_grid_is_a_power_of_two_fine_enough_and_coarse_enough(limit: float, sigma: float) -> None:
    std = min(sigma * limit, 2.0**60)
    grid = grid_for(limit, std)
    assert math.frexp(grid)[0] == 0.5
    assert limit / grid < 2**25 and std / grid < 2**30
    assert limit / grid >= 2**24 or std / grid >= 2**29
    assert sigma > 32 or limit / grid >= 2**24, "no coarser without need"


def test_a_draw_is_spent_for_each_release_and_none_without_noise() -> None:
    noise, sums = Noise(mode="secure"), torch.zeros(5000, dtype=torch.int64)
    first, second = (grid_release(sums, 1.0, 2.0**-24, noise) for _ in range(2))
    assert not torch.equal(first, second)
    grid_release(sums, 0.0, 2.0**-24, noise)
    assert noise.next_draw() == 2


# --- what is refused -------------------------------------------------------------------------------------------------


def test_what_could_overflow_or_leave_the_grid_is_refused() -> None:
    rows, one = torch.ones(1, 3), torch.ones(1)
    for grid in (0.3, 1e-3, 0.0, -1.0, math.inf, math.nan, 2.0**-90, 1):
        with pytest.raises(ValueError, match=r"grid is .* a power of two"):
            grid_clip_sum(rows, one, 1.0, grid)
    for limit in (2.0**25, math.inf, math.nan, 0.0, -1.0):
        with pytest.raises(ValueError, match=r"max_grad_norm is .* below 2\^25 grids"):
            grid_clip_sum(rows, one, limit, 1.0)
    many = torch.ones(1, 1).expand(2**36 + 1, 1)
    with pytest.raises(ValueError, match=r"at most 2\^36"):
        grid_clip_sum(many, torch.ones(1).expand(2**36 + 1), 1.0, 2.0**-20)
    sums = torch.zeros(3, dtype=torch.int64)
    for std in (2.0**30, math.inf, math.nan, -1.0):
        with pytest.raises(ValueError, match=r"std is .* below 2\^30 grids"):
            grid_release(sums, std, 1.0, Noise(mode="secure"))
    with pytest.raises(ValueError, match=r"pass adamix_kernels\.Noise"):
        grid_release(sums, 1.0, 1.0)
    with pytest.raises(TypeError, match=r"sums has dtype torch\.int32; pass int64"):
        grid_release(sums.int(), 1.0, 1.0, Noise(mode="secure"))
    for limit, std in ((0.0, 1.0), (math.nan, 1.0), (1e19, 1.0), (1e-19, 1.0), (1.0, math.inf), (1.0, -1.0)):
        with pytest.raises(ValueError, match="for a grid"):
            grid_for(limit, std)
