"""The Triton kernels for linear layers and softmax heads on a GPU: what neither interpreter nor compiler can show."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hostile_samples import BOUND, samples, worst_contribution
from test_triton_gpu import random, room_for
from torch import Tensor

from adamix_kernels import (
    Noise,
    clip_coef,
    linear_clip_sum,
    linear_norm_sq,
    softmax_head_clip_sum_noise,
    softmax_head_coordinates,
    use_backend,
)
from adamix_kernels.triton import unavailable

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(unavailable() is not None or not torch.cuda.is_available(), reason=str(unavailable())),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def on_triton() -> Iterator[None]:
    with use_backend("triton"):
        yield


def relative(got: Tensor, wanted: Tensor) -> float:
    return float((got.double() - wanted.double()).abs().max() / wanted.double().abs().max())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", ["gram", "direct"])
@pytest.mark.parametrize("bias", [False, True])
def test_linear_contribution_is_bounded(method: str, bias: bool, dtype: torch.dtype) -> None:
    for host in samples(dtype):
        a, g = (x.cuda() for x in host)
        norm_sq = linear_norm_sq(a, g, bias, method)
        assert worst_contribution(norm_sq, lambda coef, a=a, g=g: linear_clip_sum(a, g, coef, bias)) <= BOUND


@pytest.mark.parametrize(("first", "second"), [*zip(DTYPES, DTYPES, strict=True), (torch.bfloat16, torch.float32),
                                               (torch.float32, torch.float16)])  # fmt: skip
@pytest.mark.parametrize(
    ("count", "positions", "inner", "outer"),
    [(300, 1, 1000, 513), (40, 12, 768, 768), (9, 300, 770, 300), (3, 1025, 128, 3072), (500, 64, 40, 10)],
)
def test_linear_of_ordinary_sizes(
    count: int, positions: int, inner: int, outer: int, first: torch.dtype, second: torch.dtype
) -> None:
    a, g = random(count, positions, inner, dtype=first), random(count + 1, positions, outer, dtype=second)[1:]
    coef = torch.rand(count, device="cuda")
    coef[1] = 0.0
    with use_backend("torch"):
        exact = linear_norm_sq(a.double(), g.double(), True).double()
        wanted = linear_clip_sum(a.double(), g.double(), coef, True)
    for method in ("gram", "direct"):
        got = linear_norm_sq(a, g, True, method).double()
        assert bool((got >= exact).all()) and bool((got <= exact * (1 + 4e-3)).all())
    a[1] = torch.nan
    sums = linear_clip_sum(a, g, coef, True)
    for one, other, again in zip(sums, wanted, linear_clip_sum(a, g, coef, True), strict=True):
        assert relative(one, other) < 1e-6 and torch.equal(one, again)
    noisy = linear_clip_sum(a, g, coef, True, Noise(seed=1), torch.tensor(0.5, device="cuda"))
    added = torch.cat([(x.double() - y.double()).flatten() for x, y in zip(noisy, sums, strict=True)]).cpu()
    noise = 0.5 * Noise(seed=1).normal(0, 0, len(added))
    assert float((added - noise).abs().max()) < 3e-7 * float(sums.weight.abs().max()) + 1e-6


@pytest.mark.parametrize(("first", "second"), [*zip(DTYPES, DTYPES, strict=True), (torch.bfloat16, torch.float32),
                                               (torch.float16, torch.float32)])  # fmt: skip
@pytest.mark.parametrize(("rows", "inner", "classes"), [(5000, 1280, 10), (3001, 512, 1000), (200_000, 64, 100)])
def test_heads_of_ordinary_sizes(rows: int, inner: int, classes: int, first: torch.dtype, second: torch.dtype) -> None:
    x, w = random(rows, inner, dtype=first), (0.05 * random(classes, inner)).to(second)
    b, y = random(classes, dtype=second), torch.randint(classes, (rows,), device="cuda")
    basis = (random(3, classes * (inner + 1)) / (classes * inner) ** 0.5).to(second)
    with use_backend("torch"):
        wide = x.double(), y, w.double(), b.double()
        wanted = softmax_head_clip_sum_noise(*wide, 1.0)
        coordinates = softmax_head_coordinates(*wide[:3], basis.double(), wide[3])
    got = softmax_head_clip_sum_noise(x, y, w, b, 1.0)
    for one, other in zip(got, wanted, strict=True):
        assert relative(one, other) < 1e-5
    assert torch.equal(got.weight, softmax_head_clip_sum_noise(x, y, w, b, 1.0).weight)
    assert relative(softmax_head_coordinates(x, y, w, basis, b), coordinates) < 1e-5


def test_beyond_32_bit_indices() -> None:
    room_for(30)
    a, g = (torch.ones(70, 8192, 4096, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    a[:, 16:], g[-1] = 0, 2
    for method in ("gram", "direct"):
        norm = linear_norm_sq(a[:, :, :64].contiguous() if method == "direct" else a, g, False, method).sqrt()
        wanted = torch.full((70,), 16 * 4096 / (8.0 if method == "direct" else 1.0))
        wanted[-1] *= 2
        torch.testing.assert_close(norm.cpu(), wanted, rtol=2e-3, atol=0)
    coef = torch.zeros(70)
    coef[-1] = 1.0
    total = linear_clip_sum(a, g, coef.cuda(), True)
    assert bool((total.weight == 32).all()) and bool((total.bias == 2 * 8192).all())


def test_nothing_waits_for_the_device() -> None:
    a, g, noise = random(64, 40, 256), random(64, 40, 100), Noise(seed=0)
    x, y, w, tau = (
        random(500, 64),
        torch.zeros(500, dtype=torch.int64, device="cuda"),
        random(10, 64),
        random(1)[0].abs(),
    )

    def step() -> None:
        linear_clip_sum(a, g, clip_coef(linear_norm_sq(a, g, True), tau), True, noise, tau)
        softmax_head_clip_sum_noise(x, y, w, None, tau, 1.0, noise)

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_graphs_capture_norms_and_sums() -> None:
    a, g, tau = random(64, 40, 256), random(64, 40, 100), torch.tensor(0.5, device="cuda")

    def step() -> Tensor:
        return linear_clip_sum(a, g, clip_coef(linear_norm_sq(a, g), tau)).weight

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    a.mul_(3.0)
    graph.replay()
    assert torch.equal(out, step())


@pytest.mark.parametrize("method", ["gram", "direct"])
def test_norms_take_little_memory(method: str) -> None:
    a, g = random(8, 2048, 1024, dtype=torch.bfloat16), random(8, 2048, 1024, dtype=torch.bfloat16)
    linear_norm_sq(a, g, True, method)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    linear_norm_sq(a, g, True, method)
    assert torch.cuda.max_memory_allocated() - before <= 1 << 20
