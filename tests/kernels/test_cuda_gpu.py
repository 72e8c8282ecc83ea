"""The CUDA kernels on a GPU; what an emulator cannot show. Also worth running:

compute-sanitizer --tool memcheck python -m pytest -m gpu tests/kernels -k cuda
compute-sanitizer --tool racecheck python -m pytest -m gpu tests/kernels -k cuda
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from test_bounds import SLACK, gradients, norm, rounding
from torch import Tensor

from adamix_kernels import (
    Noise,
    add_gaussian_noise_,
    clip_coef,
    clip_sum,
    clip_sum_noise,
    cuda,
    cuda_library,
    grad_norm_sq,
    norm_quantile,
    use_backend,
)
from adamix_kernels.spec import FLOAT_DTYPES

REASON = clip_sum_noise.why_not("cuda")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(REASON is not None, reason=str(REASON))]


@pytest.fixture(autouse=True)
def backend() -> Iterator[None]:
    with use_backend("cuda"):
        yield


def values(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(shape, generator=generator, device="cuda").to(dtype)


def is_resident(parts: list[Tensor]) -> bool:
    group = cuda.groups(parts, cuda._BLOCK)[0]
    call = cuda_library.Call("test", parts[0].device)
    dtype, blocks = cuda_library.DTYPES[group.dtype], len(group.blocks)
    return cuda._plan(call.index, dtype, blocks, len(parts[0]), call.lib)[1].grid > 0


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("widths", [(1_000_000,), (777_777,), (400_000, 3, 131, 50_000, 768, 1)], ids=str)
@pytest.mark.parametrize("rows", [16, 100])
def test_one_reading_gives_what_two_do(dtype: torch.dtype, widths: tuple[int, ...], rows: int) -> None:
    parts = [values(rows, width, dtype=dtype, seed=i) for i, width in enumerate(widths)]
    if not is_resident(parts):
        pytest.skip("too many columns for one reading on this device")
    parts[0][rows // 2, -1] = torch.nan
    results = [cuda._clip_sum_noise(parts, 300.0, 0.1, Noise(seed=3), resident=r) for r in (True, False)]
    with use_backend("torch"):
        reference = clip_sum_noise(parts, 300.0, 0.1, Noise(seed=3))
    for out in results:
        torch.testing.assert_close(out.norm_sq, reference.norm_sq, rtol=1e-6, atol=0)
        for got, expected in zip(out.sum, reference.sum, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-4)


@pytest.mark.parametrize("resident", [True, False])
def test_same_bits_on_every_run(resident: bool) -> None:
    rows = values(200, 500_001)
    first = cuda._clip_sum_noise(rows, 500.0, 0.1, Noise(seed=3), resident=resident)
    for _ in range(10):
        again = cuda._clip_sum_noise(rows, 500.0, 0.1, Noise(seed=3), resident=resident)
        assert torch.equal(again.sum, first.sum) and torch.equal(again.norm_sq, first.norm_sq)


@pytest.mark.parametrize("resident", [True, False])
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_one_sample_adds_at_most_the_threshold(dtype: torch.dtype, resident: bool) -> None:
    for seed in range(40):
        row = gradients(seed, (1, 60_000 + seed), math.sin(seed), dtype)
        rows = torch.cat([row, torch.zeros(19, row.shape[1], dtype=dtype)]).cuda()
        for threshold in (1e-30, 1e-3, 1.0, 1e20):
            out = cuda._clip_sum_noise(rows, threshold, resident=resident).sum.cpu()
            assert norm(out) <= threshold * SLACK + rounding(out)


def test_more_than_2_to_the_31_elements() -> None:
    rows = torch.ones(5, 2**29 + 8, dtype=torch.bfloat16, device="cuda")
    rows[-1, -1] = 100.0
    out = clip_sum_noise(rows, math.inf)
    assert out.sum[0] == 5 and out.sum[-1] == 104
    torch.testing.assert_close(out.norm_sq[-1].item(), 2.0**29 + 7 + 1e4, rtol=1e-6, atol=0)
    wide = torch.zeros(2**31 + 1000, dtype=torch.bfloat16, device="cuda")
    noise = Noise(seed=1)
    add_gaussian_noise_(wide, 1.0, noise)
    for start in (0, 2**31 - 500, len(wide) - 500):
        expected = noise.normal(0, start, 500, "cuda").to(torch.bfloat16)
        torch.testing.assert_close(wide[start : start + 500], expected, rtol=1e-2, atol=0)
    assert grad_norm_sq(wide[None]).isfinite().all()


def test_an_adaptive_step_never_waits_for_the_device() -> None:
    public, private = values(64, 100_000), [values(32, 90_000), values(32, 10_000)]
    noise = Noise(seed=0)

    def step() -> None:
        tau = norm_quantile(grad_norm_sq(public), 0.9)
        out = clip_sum_noise(private, tau, 1.1, noise)
        add_gaussian_noise_(out.sum, tau * 0.5, noise)
        clip_sum(private, clip_coef(out.norm_sq, tau))

    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("resident", [True, False])
def test_other_streams_are_respected(resident: bool) -> None:
    rows = torch.zeros(64, 100_000, device="cuda")
    made = values(64, 100_000)
    expected = cuda._clip_sum_noise(made, 10.0, resident=resident).sum
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(100_000_000)
        rows.copy_(made)
        got = cuda._clip_sum_noise(rows, 10.0, resident=resident).sum
        rows.zero_()
        torch.cuda.current_stream().synchronize()
    assert torch.equal(got, expected)


def test_a_graph_takes_the_sum_and_refuses_the_noise() -> None:
    rows, noise = values(64, 100_000), Noise(seed=0)
    expected = clip_sum_noise(rows, 10.0).sum
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = clip_sum_noise(rows, 10.0).sum
        with pytest.raises(RuntimeError, match="cannot be captured in a CUDA graph"):
            clip_sum_noise(rows, 10.0, 1.0, noise)
        with pytest.raises(RuntimeError, match="cannot be captured in a CUDA graph"):
            add_gaussian_noise_(rows[0], 1.0, noise)
    assert noise._draws == 0
    for _ in range(3):
        out.zero_()
        graph.replay()
        assert torch.equal(out, expected)


@pytest.mark.parametrize("width", [1_000_000, 20_000_000])
def test_memory(width: int) -> None:
    rows = values(50, width)
    clip_sum_noise(rows, 10.0)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    clip_sum_noise(rows, 10.0, 1.0, Noise(seed=0))
    assert torch.cuda.max_memory_allocated() - before <= 4 * (2 * width + 50) + 4096
