"""The compiled `clip_sum_noise`: whatever is kept in cache between norm and sum, the result has the same bits."""

from __future__ import annotations

import subprocess
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from adamix_kernels import (
    ClippedSum,
    Noise,
    add_gaussian_noise_,
    clip_coef,
    clip_sum,
    clip_sum_noise,
    grad_norm_sq,
    native,
    use_backend,
)

pytestmark = pytest.mark.skipif(isinstance(native.load(), str), reason="the compiled CPU kernels were not built")
COLUMNS = 3 * 5 + 20_001 + 1 + 5_000 + 33
#: Caches in which all rows of `samples` (as float32) are taken together, five, four, or all since not even four fit.
EVERYTHING, FIVE_ROWS, FOUR_ROWS, NOTHING = 1 << 40, 8 * 5 * 4 * (COLUMNS + 1), 2 * 4 * 4 * (COLUMNS + 1), 0


@pytest.fixture
def module() -> Any:
    found = native.load()
    assert isinstance(found, ModuleType)
    yield found
    found.use_isa(found.best_isa())


def samples(dtype: torch.dtype, rows: int = 60) -> list[Tensor]:
    """A ragged list; one row is not finite, one is huge, one is zero."""
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(rows, *shape, generator=generator) for shape in [(3, 5), (20_001,), (), (5_000,), (33,)]]
    parts[1][3, 17] = torch.nan
    for part in parts:
        part[5] *= 1e4
        part[7] = 0
    return [part.to(dtype) for part in parts]


def fused(parts: Any, cache: int, noise_multiplier: float = 0.0, mode: str = "fast") -> ClippedSum:
    source = Noise._with_key(bytes(range(32)), mode)
    with pytest.MonkeyPatch.context() as patch, use_backend("cpp"):
        patch.setattr(native, "cache_bytes", lambda: cache)
        return clip_sum_noise(parts, 0.7, noise_multiplier, source)


def same(one: ClippedSum, other: ClippedSum) -> bool:
    pairs = [*zip(one.sum, other.sum, strict=True), (one.norm_sq, other.norm_sq)]
    return all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("mode", ["fast", "secure"])
def test_same_bits_for_every_cache_thread_count_and_instruction_set(
    module: ModuleType, dtype: torch.dtype, mode: str
) -> None:
    parts = samples(dtype)
    expected, threads = fused(parts, EVERYTHING, 1.3, mode), torch.get_num_threads()
    try:
        for isa in module.Isa.__members__.values():
            if int(isa) > int(module.best_isa()):
                continue
            module.use_isa(isa)
            for cache in (EVERYTHING, FIVE_ROWS, FOUR_ROWS, NOTHING):
                for count in (1, 2, 3):
                    torch.set_num_threads(count)
                    assert same(fused(parts, cache, 1.3, mode), expected)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("cache", [EVERYTHING, FIVE_ROWS, FOUR_ROWS, NOTHING])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_is_the_ops_one_after_the_other(cache: int, dtype: torch.dtype) -> None:
    parts = samples(dtype)
    with use_backend("cpp"):
        norm_sq = grad_norm_sq(parts)
        sums = clip_sum(parts, clip_coef(norm_sq, 0.7))
    assert same(fused(parts, cache), ClippedSum(sums, norm_sq))


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_many_tiny_parts_are_all_shared_out(threads: int) -> None:
    generator = torch.Generator().manual_seed(2)
    parts = [torch.randn(3000, *[1] * (i % 3), generator=generator) for i in range(23)]
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        result = fused(parts, EVERYTHING)
    finally:
        torch.set_num_threads(before)
    with use_backend("torch"):
        expected = clip_sum_noise(parts, 0.7)
    torch.testing.assert_close(result.sum, expected.sum, rtol=1e-5, atol=1e-6)


def test_the_cache_is_of_a_sane_size() -> None:
    assert 1 << 18 <= native.cache_bytes() <= 1 << 32


def test_wide_rows_cut_into_the_largest_blocks() -> None:
    rows = torch.randn(9, 600_001, generator=torch.Generator().manual_seed(1))
    four = fused([rows], 2 * 4 * 4 * 600_002, 1.0)
    assert same(four, fused([rows], EVERYTHING, 1.0))
    with use_backend("torch"):
        expected = clip_sum_noise([rows], 0.7, 1.0, Noise._with_key(bytes(range(32)), "fast"))
    torch.testing.assert_close(four.sum, expected.sum, rtol=1e-6, atol=1e-6)


def test_noise_is_that_of_a_draw_on_the_whole_list() -> None:
    parts = samples(torch.float64)
    with use_backend("cpp"):
        noise = add_gaussian_noise_(
            [torch.zeros_like(p[0]) for p in parts], 1.3 * 0.7, Noise._with_key(bytes(32), "fast")
        )
    for cache in (EVERYTHING, FOUR_ROWS):
        quiet, source = fused(parts, cache), Noise._with_key(bytes(32), "fast")
        with pytest.MonkeyPatch.context() as patch, use_backend("cpp"):
            patch.setattr(native, "cache_bytes", lambda cache=cache: cache)
            loud = clip_sum_noise(parts, 0.7, 1.3, source)
            clip_sum_noise(parts, 0.7, 0.0, source)
        assert source.next_draw() == 1, "one draw a call, none where there is no noise"
        for a, b, z in zip(loud.sum, quiet.sum, noise, strict=True):
            torch.testing.assert_close(a - b, z, rtol=1e-12, atol=1e-12)


def test_every_result_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    empty = torch.empty
    expected = {cache: fused(samples(torch.float32), cache, 1.0) for cache in (EVERYTHING, FOUR_ROWS)}
    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: empty(*args, **kwargs).fill_(torch.nan))
    for cache, result in expected.items():
        assert same(fused(samples(torch.float32), cache, 1.0), result)
        assert not any(part.isnan().any() for part in result.sum)


@pytest.mark.parametrize("cache", [EVERYTHING, FIVE_ROWS, FOUR_ROWS, NOTHING])
@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    reach=st.floats(-1, 1),
    threshold=st.floats(1e-3, 1e3),
    at=st.integers(0, 59),
    value=st.sampled_from([None, torch.inf, torch.nan]),
)
def test_one_sample_moves_the_sum_by_at_most_the_threshold(
    cache: int, seed: int, reach: float, threshold: float, at: int, value: float | None
) -> None:
    """Replaced by anything: each of the two contributes at most the threshold, or nothing if it is not finite."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(60, 1200, generator=generator) * threshold / 30
    other = rows.clone()
    other[at] = torch.randn(1200, generator=generator) * 10.0 ** (reach * 36)
    if value is not None:
        other[at, seed % 1200] = value
    gone = rows.clone()
    gone[at] = 0
    with pytest.MonkeyPatch.context() as patch, use_backend("cpp"):
        patch.setattr(native, "cache_bytes", lambda: cache * 1200 // COLUMNS)
        sums = [clip_sum_noise(x, threshold).sum.double() for x in (other, gone)]
    rounding = 2**-24 * (sums[0].norm() + sums[1].norm())
    assert float((sums[0] - sums[1]).norm() - rounding) <= threshold * (1 + 1e-6)
    if value is not None:
        assert torch.equal(sums[0], sums[1])


MEMORY = """
import re, sys
import torch
from adamix_kernels import clip_sum_noise, native, Noise
columns, cache = 6_000_000, int(sys.argv[1])
def peak():  # not getrusage's, which counts the process that started this one
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])
native.cache_bytes = lambda: cache
clip_sum_noise(torch.ones(8, 100_000), 1.0, 1.0, Noise())  # threads, libraries
rows = torch.ones(12, columns)
before = peak()
clip_sum_noise(rows, 1.0, 1.0, Noise())
print((peak() - before) / (4 * columns))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of resident memory as Linux reports it")
@pytest.mark.parametrize(("cache", "most"), [(1 << 40, 1.1), (4 * 6_000_000 * 8 + 8, 2.1)])
def test_peak_memory_is_two_numbers_a_column_at_most(cache: int, most: float) -> None:
    done = subprocess.run([sys.executable, "-c", MEMORY, str(cache)], check=True, capture_output=True, text=True)
    assert 0.9 < float(done.stdout) < most
