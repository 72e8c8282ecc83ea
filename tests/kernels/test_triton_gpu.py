"""The Triton kernels on a GPU: what neither the interpreter nor the compiler can show."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_bounds import SLACK, gradients, norm, rounding
from torch import Tensor

from adamix_kernels import (
    Noise,
    add_gaussian_noise_,
    clip_coef,
    clip_sum,
    clip_sum_noise,
    grad_norm_sq,
    norm_quantile,
    use_backend,
)
from adamix_kernels.spec import FLOAT_DTYPES
from adamix_kernels.triton import unavailable

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(unavailable() is not None or not torch.cuda.is_available(), reason=str(unavailable())),
]
KEY = bytes(range(32))


@pytest.fixture(autouse=True)
def on_triton() -> Iterator[None]:
    with use_backend("triton"):
        yield


def room_for(gigabytes: float) -> None:
    if torch.cuda.mem_get_info()[0] < gigabytes * 1e9:
        pytest.skip(f"needs {gigabytes} GB of GPU memory")


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to("cuda", dtype)


@settings(max_examples=300, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    width=st.one_of(st.integers(1, 300), st.integers(4000, 20_000)),
    reach=st.floats(-1, 1),
    threshold=st.floats(-300, 300).map(lambda e: 10.0**e),
    dtype=st.sampled_from(FLOAT_DTYPES),
)
def test_one_sample_adds_at_most_the_threshold(
    seed: int, width: int, reach: float, threshold: float, dtype: torch.dtype
) -> None:
    grads = gradients(seed, (1, width), reach, dtype)
    with use_backend("triton"):
        out = clip_sum_noise(grads.cuda(), threshold)
    if math.isfinite(out.norm_sq):
        assert math.sqrt(float(out.norm_sq)) >= norm(grads) * (1 - 1e-12)
    total = out.sum.cpu()
    assert norm(total) <= threshold * SLACK + rounding(total)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize(("rows", "cols"), [(33, 100_003), (5, 1 << 20), (20_000, 650), (3000, 7), (1, 5_000_000)])
def test_large_enough_for_every_way_of_splitting(rows: int, cols: int, dtype: torch.dtype) -> None:
    x = random(rows, cols, dtype=dtype)
    norm_sq = grad_norm_sq(x)
    exact = x.double().square().sum(1)
    assert bool((norm_sq >= exact).all()) and bool((norm_sq <= exact * (1 + 1e-6)).all())
    coef = clip_coef(norm_sq, 1.0)
    torch.testing.assert_close(coef, clip_coef.reference(norm_sq, 1.0), rtol=0, atol=0)
    expected = coef.double() @ x.double()
    error = (clip_sum(x, coef).double() - expected).abs().max()
    assert float(error) <= 1e-6 * float(expected.abs().max())
    again = clip_sum_noise(x, 1.0)
    assert torch.equal(again.norm_sq, norm_sq) and torch.equal(again.sum, clip_sum(x, coef))


@pytest.mark.parametrize("mode", ["fast", "secure"])
def test_noise_is_that_of_the_reference(mode: str) -> None:
    for sizes in [(100_000,), (7, 0, 1, 50_001, 8, 333)]:
        noise = Noise._with_key(KEY, mode)
        noise._draws = draw = 2**32 + 5
        parts = [torch.zeros(n, dtype=torch.float64, device="cuda") for n in sizes]
        got = torch.cat(add_gaussian_noise_(parts, 1.0, noise)).cpu()
        assert float((got - noise.normal(draw, 0, len(got))).abs().max()) < 1e-13
        noise._draws = draw
        rows = [torch.zeros(2, n, dtype=torch.float64, device="cuda") for n in sizes]
        fused = torch.cat(clip_sum_noise(rows, torch.tensor(0.5, device="cuda"), 2.0, noise).sum).cpu()
        assert torch.equal(fused, got)


def test_beyond_32_bit_indices() -> None:
    room_for(16)
    x = torch.ones(2, 1_200_000_007, dtype=torch.bfloat16, device="cuda")
    norm_sq = grad_norm_sq(x).double()
    assert bool((norm_sq >= x.shape[1]).all()) and bool((norm_sq <= x.shape[1] * (1 + 1e-6)).all())
    total = clip_sum(x, torch.tensor([1.0, 0.5], device="cuda"))
    assert float(total.min()) == float(total.max()) == 1.5
    del x, total
    torch.cuda.empty_cache()
    many = torch.ones(70_001, 40_000, dtype=torch.bfloat16, device="cuda")
    assert bool((grad_norm_sq(many) >= 40_000).all())
    assert bool((clip_sum(many, torch.ones(len(many), device="cuda")) == len(many)).all())
    del many
    torch.cuda.empty_cache()
    long, noise = torch.zeros(2**31 + 1001, device="cuda"), Noise(seed=4)
    add_gaussian_noise_(long, 1.0, noise)
    for start in (0, 2**31 - 500, len(long) - 700):
        torch.testing.assert_close(long[start : start + 700].cpu(), noise.normal(0, start, 700).float())


def test_nothing_waits_for_the_device() -> None:
    public, private = random(200, 3000), [random(64, 5000), random(64, 7)]
    noise = Noise(seed=0)

    def step() -> list[Tensor]:
        threshold = norm_quantile(grad_norm_sq(public), 0.9)
        return clip_sum_noise(private, threshold, 1.0, noise).sum

    step()
    before = torch.cuda.get_rng_state()
    torch.cuda.set_sync_debug_mode("error")
    try:
        sums = step()
        add_gaussian_noise_(sums, 1.0, noise)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(torch.cuda.get_rng_state(), before)


def test_another_stream_gives_the_same_bits() -> None:
    parts = [random(64, 5000), random(64, 7)]
    torch.cuda.synchronize()
    expected = clip_sum_noise(parts, 1.0, 1.0, Noise(seed=0))
    for _ in range(3):
        with torch.cuda.stream(torch.cuda.Stream()):
            got = clip_sum_noise(parts, 1.0, 1.0, Noise(seed=0))
        torch.cuda.synchronize()
        assert all(torch.equal(a, b) for a, b in zip(got.sum, expected.sum, strict=True))
        assert torch.equal(got.norm_sq, expected.norm_sq)


def test_graphs_capture_the_sum_but_not_its_noise() -> None:
    parts = [random(64, 5000), random(64, 7)]
    threshold = torch.tensor(0.5, device="cuda")
    clip_sum_noise(parts, threshold)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = clip_sum_noise(parts, threshold)
    for part in parts:
        part.mul_(3.0)
    threshold.fill_(0.25)
    graph.replay()
    fresh = clip_sum_noise(parts, threshold)
    assert torch.equal(out.norm_sq, fresh.norm_sq)
    assert all(torch.equal(a, b) for a, b in zip(out.sum, fresh.sum, strict=True))


@pytest.mark.parametrize("fused", [True, False])
def test_noise_in_a_graph_is_refused(fused: bool) -> None:
    x, noise = random(8, 100), Noise(seed=0)
    clip_sum_noise(x, 1.0)
    with (
        pytest.raises(RuntimeError, match="every replay would add the same noise"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        clip_sum_noise(x, 1.0, 1.0, noise) if fused else add_gaussian_noise_(x, 1.0, noise)
    torch.cuda.synchronize()
    assert noise._draws == 0


def test_new_tensors_in_a_graph_are_refused() -> None:
    x = random(8, 123)
    with (
        pytest.raises(RuntimeError, match="call the op once on the same tensors before the capture"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        grad_norm_sq(x)


@pytest.mark.parametrize(("rows", "cols"), [(64, 1_000_000), (1024, 200_000), (4, 3_000_000), (20_000, 650)])
def test_little_memory_is_taken(rows: int, cols: int) -> None:
    x = random(rows, cols)
    clip_sum_noise(x, 1.0, 1.0, Noise(seed=0))
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = clip_sum_noise(x, 1.0, 1.0, Noise(seed=0))
    taken = torch.cuda.max_memory_allocated() - before
    results = out.sum.untyped_storage().nbytes() + out.norm_sq.untyped_storage().nbytes()
    assert taken <= results + 4 * (cols + rows) + (1 << 20) + 8192
