"""Privacy first: what one sample can add to a sum is bounded, for every finite input."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from adamix_kernels import clip_coef, clip_sum, clip_sum_noise, grad_norm_sq, softmax_head_clip_sum_noise, use_backend

SLACK = 1 + 1e-6
BACKENDS = [b for b in ("torch", "cpp") if grad_norm_sq.why_not(b) is None]
thresholds = st.floats(1e-12, 1e12)
scales = st.floats(-38, 38).map(lambda e: 10.0**e)
dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64])


def gradients(seed: int, shape: tuple[int, ...], scale: float, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    spread = 10 ** (torch.rand(shape, generator=generator, dtype=torch.float64) * 6 - 3)
    x = torch.randn(shape, generator=generator, dtype=torch.float64) * spread * scale
    limit = torch.finfo(dtype).max
    return x.clamp(-limit, limit).to(dtype)


def norm(x: Any) -> float:
    """Exact enough: float64, scaled so that no square leaves the range."""
    flat = torch.cat([t.double().flatten() for t in (x if isinstance(x, list) else [x])])
    top = float(flat.abs().max()) if flat.numel() else 0.0
    return top * float((flat / top).norm()) if top else 0.0


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 10**6), width=st.integers(1, 300), scale=scales, threshold=thresholds, dtype=dtypes)
def test_one_sample_adds_at_most_the_threshold(
    backend: str, seed: int, width: int, scale: float, threshold: float, dtype: torch.dtype
) -> None:
    grads = gradients(seed, (1, width), scale, dtype)
    with use_backend(backend):
        norm_sq = grad_norm_sq(grads)
    if math.isfinite(norm_sq):
        assert math.sqrt(float(norm_sq)) >= norm(grads) * (1 - 1e-12)
    contribution = clip_sum(grads, clip_coef(norm_sq, threshold))
    assert norm(contribution) <= threshold * SLACK


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 10**6), size=st.integers(1, 40), scale=scales, threshold=st.floats(1e-3, 1e3), dtype=dtypes)
def test_adding_a_sample_moves_the_sum_by_at_most_the_threshold(
    seed: int, size: int, scale: float, threshold: float, dtype: torch.dtype
) -> None:
    parts = [gradients(seed + i, (size + 1, *shape), 1.0, dtype) for i, shape in enumerate([(3, 5), (1,), (7,)])]
    for i, part in enumerate(parts):
        part[-1] = gradients(seed + 9 + i, tuple(part.shape[1:]), scale, dtype)
    more = clip_sum_noise(parts, threshold).sum
    fewer = clip_sum_noise([p[:-1] for p in parts], threshold).sum
    rounding = 2**-23 * (norm(more) + norm(fewer))
    assert norm([a.double() - b.double() for a, b in zip(more, fewer, strict=True)]) <= threshold * SLACK + rounding


def test_bad_samples_add_exactly_nothing() -> None:
    grads = gradients(0, (6, 30), 1.0, torch.float32)
    spoilt = grads.clone()
    spoilt[1, 3], spoilt[4, 0], spoilt[5, 7] = torch.nan, torch.inf, -torch.inf
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
    scale=st.floats(-30, 30).map(lambda e: 10.0**e),
    threshold=st.floats(1e-9, 1e9),
    dtype=dtypes,
    bias=st.booleans(),
)
def test_one_row_moves_the_head_by_at_most_the_threshold(
    seed: int, scale: float, threshold: float, dtype: torch.dtype, bias: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    features = gradients(seed, (1, 9), scale, dtype)
    weight = torch.randn(4, 9, generator=generator)
    out = softmax_head_clip_sum_noise(
        features, torch.tensor([seed % 4]), weight, torch.zeros(4) if bias else None, max_grad_norm=threshold
    )
    assert norm([out.weight] + ([] if out.bias is None else [out.bias])) <= threshold * SLACK
