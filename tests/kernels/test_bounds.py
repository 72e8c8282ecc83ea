"""Privacy first: what one sample can add to a sum is bounded, for every finite input."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import adamix_kernels as kernels
from adamix_kernels import clip_coef, clip_sum, clip_sum_noise, grad_norm_sq, softmax_head_clip_sum_noise, use_backend

SLACK = 1 + 1e-6
BACKENDS = [b for b in ("torch", "cpp") if grad_norm_sq.why_not(b) is None]
thresholds = st.one_of(st.floats(1e-12, 1e12), st.floats(-300, 300).map(lambda e: 10.0**e))
reaches = st.floats(-1, 1)
dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64])


def gradients(seed: int, shape: tuple[int, ...], reach: float, dtype: torch.dtype) -> Tensor:
    """Numbers about 1 for `reach` 0, near the smallest and the largest of `dtype` for -1 and 1."""
    generator = torch.Generator().manual_seed(seed)
    scale = 10.0 ** (reach * (300 if dtype == torch.float64 else 38))
    spread = 10 ** (torch.rand(shape, generator=generator, dtype=torch.float64) * 6 - 3)
    x = torch.randn(shape, generator=generator, dtype=torch.float64) * spread * scale
    limit = torch.finfo(dtype).max
    return x.clamp(-limit, limit).to(dtype)


def norm(x: Any) -> float:
    """Exact enough: float64, scaled so that no square leaves the range."""
    flat = torch.cat([t.double().flatten() for t in (x if isinstance(x, list) else [x])])
    top = float(flat.abs().max()) if flat.numel() else 0.0
    return top * float((flat / top).norm()) if top else 0.0


def rounding(sums: Tensor) -> float:
    """Of numbers so small that they are rounded to a multiple of the smallest denormal."""
    return math.sqrt(sums.numel()) * 2.0 ** (-1074 if sums.dtype == torch.float64 else -149)


def unlucky_rows() -> list[Tensor]:
    """Numbers whose squares, added four at a time in float32, are rounded down most: by up to 3 2^-24 of their sum.

    The first four are the worst found for a chain of fused operations, the others for plain ones. The four stand side
    by side, or as far apart as kernels take them from a row.
    """
    fours = [
        ["0x1.8e4aeep+0", "0x1.454686p+0", "0x1.04d51ap-1", "0x1.0ec504p-1"],
        ["0x1.72989cp+0", "0x1.76d4a2p+0", "0x1.55dfb0p-1", "0x1.2e2b08p-1"],
    ]
    rows = []
    for four, stride, count in itertools.product(fours, (1, 32, 256), (1, 3, 40)):
        x = torch.tensor([float.fromhex(number) for number in four], dtype=torch.float64)
        rows.append(x.repeat_interleave(stride).repeat(count).float()[None])
    return rows


def never_below(norm_sq: Tensor, row: Tensor) -> bool:
    exact = sum((Fraction(x) ** 2 for x in row.flatten().tolist()), Fraction(0))
    return Fraction(float(norm_sq)) >= exact


@contextmanager
def flushed_denormals() -> Iterator[None]:
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush denormals")
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 10**6), width=st.integers(1, 300), reach=reaches, threshold=thresholds, dtype=dtypes)
def test_one_sample_adds_at_most_the_threshold(
    backend: str, seed: int, width: int, reach: float, threshold: float, dtype: torch.dtype
) -> None:
    grads = gradients(seed, (1, width), reach, dtype)
    coef_of = clip_coef.reference
    with use_backend(backend):
        norm_sq = grad_norm_sq(grads)
        contribution = clip_sum(grads, coef_of(norm_sq, threshold))
    if math.isfinite(norm_sq):
        assert math.sqrt(float(norm_sq)) >= norm(grads) * (1 - 1e-12)
    assert norm(contribution) <= threshold * SLACK + rounding(contribution)


@pytest.mark.parametrize("parts_on", ["torch", "auto"])
@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 10**6), size=st.integers(1, 40), reach=reaches, threshold=st.floats(1e-3, 1e3), dtype=dtypes)
def test_adding_a_sample_moves_the_sum_by_at_most_the_threshold(
    parts_on: str, seed: int, size: int, reach: float, threshold: float, dtype: torch.dtype
) -> None:
    parts = [gradients(seed + i, (size + 1, *shape), 0.0, dtype) for i, shape in enumerate([(3, 5), (1,), (7,)])]
    for i, part in enumerate(parts):
        part[-1] = gradients(seed + 9 + i, tuple(part.shape[1:]), reach, dtype)
    with use_backend(parts_on):
        more = clip_sum_noise(parts, threshold).sum
        fewer = clip_sum_noise([p[:-1] for p in parts], threshold).sum
    moved = norm([a.double() - b.double() for a, b in zip(more, fewer, strict=True)])
    assert moved <= threshold * SLACK + 2**-23 * (norm(more) + norm(fewer))


@pytest.mark.parametrize("parts_on", ["torch", "auto"])
def test_bad_samples_add_exactly_nothing(parts_on: str) -> None:
    grads = gradients(0, (6, 30), 1.0, torch.float32)
    spoilt = grads.clone()
    spoilt[1, 3], spoilt[4, 0], spoilt[5, 7] = torch.nan, torch.inf, -torch.inf
    with use_backend(parts_on):
        assert torch.equal(clip_sum_noise(spoilt, 0.5).sum, clip_sum_noise(grads[[0, 2, 3]], 0.5).sum)


def test_a_threshold_of_zero_gives_zero() -> None:
    grads = torch.stack([torch.ones(4), torch.zeros(4)])
    assert not clip_sum_noise(grads, torch.tensor(0.0)).sum.any()


def test_a_bound_test_can_fail() -> None:
    """An ordinary float32 norm underflows and lets a sample through: the property above is not vacuous."""
    grads = torch.full((1, 4), 1e-30)
    naive = grads.square().sum(1)
    assert norm(clip_sum(grads, clip_coef(naive, 1e-33))) > 1e-33 * SLACK
    assert norm(clip_sum(grads, clip_coef(grad_norm_sq(grads), 1e-33))) <= 1e-33 * SLACK


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    reach=reaches,
    gap=st.floats(-3, 3),
    threshold=thresholds,
    dtype=dtypes,
    bias=st.booleans(),
)
def test_one_row_moves_the_head_by_at_most_the_threshold(
    seed: int, reach: float, gap: float, threshold: float, dtype: torch.dtype, bias: bool
) -> None:
    features = gradients(seed, (1, 9), reach, dtype)
    # Logits about 10^gap apart, from certain to undecided, whatever the size of the features.
    weight = gradients(seed + 1, (4, 9), 0.0, torch.float64) * 10**gap / max(norm(features), 1e-290)
    out = softmax_head_clip_sum_noise(
        features, torch.tensor([seed % 4]), weight, torch.zeros(4) if bias else None, max_grad_norm=threshold
    )
    sums = [out.weight] + ([] if out.bias is None else [out.bias])
    assert norm(sums) <= threshold * SLACK + sum(map(rounding, sums))


# --- Rows so small that their squares vanish --------------------------------------------------------------------------


def _linear(x: Tensor, c: float, method: str) -> Any:
    one = torch.ones_like(x[:, :1])
    return kernels.linear_clip_sum(x, one, clip_coef(kernels.linear_norm_sq(x, one, False, method), c)).weight


def _embedding(x: Tensor, c: float) -> Any:
    ids = torch.zeros(1, dtype=torch.int64)
    return kernels.embedding_clip_sum(ids, x, clip_coef(kernels.embedding_norm_sq(ids, x), c), 1)


def _conv(x: Tensor, c: float) -> Any:
    x, one = x[:, None], torch.ones_like(x)[:, None]
    return kernels.conv_clip_sum(x, one, clip_coef(kernels.conv_norm_sq(x, one, (1,)), c), (1,)).weight


def _scale_shift(x: Tensor, c: float) -> Any:
    return list(kernels.scale_shift_clip_sum(x, x, clip_coef(kernels.scale_shift_norm_sq(x, x), c)))


def _head(x: Tensor, c: float) -> Any:
    label, weight = torch.zeros(1, dtype=torch.int64), torch.zeros(3, x.shape[1])
    return softmax_head_clip_sum_noise(x, label, weight, None, c).weight


CLIPPED: dict[str, Callable[[Tensor, float], Any]] = {
    "clip_sum_noise": lambda x, c: clip_sum_noise(x, c).sum,
    "gram": lambda x, c: _linear(x, c, "gram"),
    "direct": lambda x, c: _linear(x, c, "direct"),
    "embedding": _embedding,
    "conv": _conv,
    "scale_shift": _scale_shift,
    "head": _head,
}


@pytest.mark.parametrize("parts_on", ["torch", "auto"])
@pytest.mark.parametrize("name", CLIPPED)
def test_tiny_and_huge_rows_of_float64(name: str, parts_on: str) -> None:
    values = [5e-324, 1e-310, 1e-200, 1e-170, 1e-162, 1e-160, 1e-150, 1e-100, 1e-20, 1e150, 1e200, 1e300]
    for value, threshold in itertools.product(values, [1e-300, 1e-180, 1e-56, 1e-54, 1e-30, 1.0, 1e300]):
        with use_backend(parts_on):
            got = norm(CLIPPED[name](torch.full((1, 4), value, dtype=torch.float64), threshold))
        assert got <= threshold * SLACK, f"{value} adds {got / threshold:.3g} of the threshold {threshold}"


@pytest.mark.parametrize("parts_on", ["torch", "auto"])
@pytest.mark.parametrize("name", CLIPPED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tiny_rows_where_denormals_are_flushed(name: str, dtype: torch.dtype, parts_on: str) -> None:
    for value, c in [(1e-21, 1e-25), (1e-30, 1e-33), (1e-42, 1e-50), (1e-19, 1e-21), (1e-19, 1e-35), (1e-154, 1e-180)]:
        x = torch.full((1, 4), value, dtype=dtype)
        with flushed_denormals(), use_backend(parts_on):
            result = CLIPPED[name](x, c)
        assert norm(result) <= c * SLACK, f"{value} adds {norm(result) / c:.3g} of the threshold {c}"


@pytest.mark.parametrize("backend", BACKENDS)
def test_norms_of_unlucky_rows_are_not_below_the_exact_ones(backend: str) -> None:
    for row in unlucky_rows():
        with use_backend(backend):
            assert never_below(grad_norm_sq(row)[0], row)
    lost = sum((x * x).reshape(-1, 4).sum(1).double().sum() < x.double().square().sum() for x in unlucky_rows())
    assert lost > 0, "an ordinary float32 sum is: the rows are unlucky"


@pytest.mark.parametrize("backend", BACKENDS)
def test_factors_that_are_not_above_zero_leave_rows_out(backend: str) -> None:
    rows = torch.randn(6, 9, generator=torch.Generator().manual_seed(0))
    rows[0], rows[1, 3], rows[3] = torch.nan, torch.inf, torch.nan
    coef = torch.tensor([0.0, -1.0, 0.5, torch.nan, -0.0, 1.0])
    with use_backend(backend):
        torch.testing.assert_close(clip_sum(rows, coef), 0.5 * rows[2] + rows[5])


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_norm_is_below_the_smallest_normal_number(backend: str) -> None:
    tiny = torch.finfo(torch.float32).tiny
    rows = torch.tensor([[0.0], [5e-324], [1e-170], [1e-23], [1e-19], [1.0842021e-19]], dtype=torch.float64)
    with use_backend(backend):
        for x in (rows, rows.float(), torch.zeros(2, 0)):
            assert (grad_norm_sq(x) == tiny).all()
        with flushed_denormals():
            flushed = grad_norm_sq(rows)
        assert (flushed == tiny).all()


def test_large_features_do_not_bring_back_a_residual_that_vanished() -> None:
    """Softmax 1e-165 apart from the label: the squared residual underflows, its product with the features does not."""
    x, w = torch.tensor([[1e150]], dtype=torch.float64), torch.tensor([[0.0], [-3.8e-148]], dtype=torch.float64)
    exact = softmax_head_clip_sum_noise(x, torch.tensor([0]), w)
    assert 1e-16 < norm(exact.weight) < 1e-14
    for c in (1e-20, 1e-30, 1e-50):
        assert norm(softmax_head_clip_sum_noise(x, torch.tensor([0]), w, None, c).weight) <= c * SLACK


@pytest.mark.parametrize("parts_on", ["torch", "auto"])
def test_factors_are_rounded_down(parts_on: str) -> None:
    """In rational arithmetic, but for the float64 rounding of root and quotient; to nearest would be 2^-25 above."""
    generator = torch.Generator().manual_seed(0)
    for c in (1.0, 0.1, 0.7, 3e-7, 123.456, math.pi * 1e12):
        size = 10 ** (torch.rand(400, generator=generator, dtype=torch.float64) * 8 - 2)
        norm_sq = (size * c**2).float()
        with use_backend(parts_on):
            factors = clip_coef(norm_sq, c)
        for coef, n in zip(factors.tolist(), norm_sq.tolist(), strict=True):
            assert Fraction(coef) ** 2 * Fraction(n) <= Fraction(c) ** 2 * (1 + Fraction(1, 2**50))


def test_factors_are_normal_numbers_or_zero() -> None:
    """So that they are the same, and below the exact value, whether or not a thread flushes denormals."""
    tiny = torch.finfo(torch.float32).tiny
    for c, expected in [(tiny * 1.5, tiny * 1.5), (tiny, tiny), (tiny * 0.99, 0.0), (1e-45, 0.0), (1e-300, 0.0)]:
        assert clip_coef(torch.ones(1), c).item() == expected
