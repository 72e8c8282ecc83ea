"""The bound on what one sample contributes to the sums of factored ops, on torch and C++."""

from __future__ import annotations

import math
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import pytest
import torch
from hostile_samples import BOUND, exact_norm_sq, flat_norm, generator, randn, samples, worst_contribution
from torch import Tensor

from adamix_kernels.nn.combine import TiedFactors
from adamix_kernels.nn.factors import EmbeddingFactors, LinearFactors
from adamix_kernels.ops._factored import sum_error
from adamix_kernels.ops._numerics import round_up
from adamix_kernels.ops.clip import clip_coef
from adamix_kernels.ops.conv import conv_clip_sum, conv_norm_sq
from adamix_kernels.ops.conv_clip import conv_norm_clip_sum
from adamix_kernels.ops.embedding import embedding_clip_sum, embedding_norm_sq
from adamix_kernels.ops.linear import linear_clip_sum, linear_norm_sq
from adamix_kernels.ops.scale_shift import scale_shift_clip_sum, scale_shift_norm_sq
from adamix_kernels.spec import use_backend


@pytest.fixture(autouse=True)
def on_torch() -> Iterator[None]:
    with use_backend("torch"):
        yield


def on_backends(op: Any) -> Any:
    """Each backend for CPU tensors, with each dtype it takes."""
    pairs = [(name, dtype) for name in ("torch", "cpp") if op.why_not(name) is None for dtype in op.dtypes(name)]
    ids = [f"{name}-{str(dtype).removeprefix('torch.')}" for name, dtype in pairs]
    return pytest.mark.parametrize(("backend", "dtype"), pairs, ids=ids)


@on_backends(linear_norm_sq)
@pytest.mark.parametrize("method", ["gram", "direct"])
@pytest.mark.parametrize("bias", [False, True])
def test_linear_contribution_is_bounded(method: str, bias: bool, backend: str, dtype: torch.dtype) -> None:
    count = 0
    for a, g in samples(dtype):
        with use_backend(backend):
            norm_sq = linear_norm_sq(a, g, bias, method)
            assert worst_contribution(norm_sq, lambda coef, a=a, g=g: linear_clip_sum(a, g, coef, bias)) <= BOUND
        for other in {"torch", "cpp"} - {backend} if dtype == torch.float32 else ():
            with use_backend(other):
                assert worst_contribution(norm_sq, lambda coef, a=a, g=g: linear_clip_sum(a, g, coef, bias)) <= BOUND
        count += 1
    assert count > 60


@on_backends(embedding_norm_sq)
def test_embedding_contribution_is_bounded(backend: str, dtype: torch.dtype) -> None:
    for trial, (_, g) in enumerate(samples(dtype)):
        ids = torch.randint(1 + trial % 4, g.shape[:2], generator=generator(trial))
        with use_backend(backend):
            norm_sq = embedding_norm_sq(ids, g)
            assert worst_contribution(norm_sq, lambda coef, ids=ids, g=g: embedding_clip_sum(ids, g, coef, 4)) <= BOUND


@on_backends(scale_shift_norm_sq)
def test_scale_shift_contribution_is_bounded(backend: str, dtype: torch.dtype) -> None:
    for a, g in samples(dtype, [(2, 1, 1), (6, 5, 5), (64, 20, 20)]):
        with use_backend(backend):
            norm_sq = scale_shift_norm_sq(a, g)
            assert worst_contribution(norm_sq, lambda coef, a=a, g=g: scale_shift_clip_sum(a, g, coef)) <= BOUND


@on_backends(conv_norm_sq)
def test_conv_contribution_is_bounded(backend: str, dtype: torch.dtype) -> None:
    for factors in samples(dtype, [(6, 2, 4), (64, 4, 6)]):  # a kernel of size 1 sees the factors as they are
        a, g = (x.mT for x in factors)

        def clipped(coef: Tensor, a: Tensor = a, g: Tensor = g) -> Any:
            return conv_clip_sum(a, g, coef, (1,), groups=2, bias=True)

        with use_backend(backend):
            norm_sq = conv_norm_sq(a, g, (1,), groups=2, bias=True)
            assert worst_contribution(norm_sq, clipped) <= BOUND


@on_backends(conv_norm_sq)
@pytest.mark.parametrize("kernel", [1, 3])
def test_contribution_of_a_small_convolution_is_bounded(kernel: int, backend: str, dtype: torch.dtype) -> None:
    """Weights so small that the compiled kernels make norm and sum of one sample's gradient after the other."""
    for factors in samples(dtype, [(64, 20, 20), (300, 18, 20)]):
        a, g = (x.mT for x in factors)
        g = g[..., kernel - 1 :]

        def clipped(coef: Tensor, a: Tensor = a, g: Tensor = g) -> Any:
            return conv_clip_sum(a, g, coef, (kernel,), bias=True)

        with use_backend(backend):
            norm_sq = conv_norm_sq(a, g, (kernel,), bias=True)
            assert worst_contribution(norm_sq, clipped) <= BOUND
        for other in {"torch", "cpp"} - {backend} if dtype == torch.float32 else ():  # whose sums are rounded otherwise
            with use_backend(other):
                assert worst_contribution(norm_sq, clipped) <= BOUND


@on_backends(conv_norm_clip_sum)
@pytest.mark.parametrize("kernel", [1, 3])
def test_contribution_to_a_sum_in_one_pass_is_bounded(kernel: int, backend: str, dtype: torch.dtype) -> None:
    """With a share of the rest of the model, whose norm of each sample is half the threshold or nothing."""
    threshold, count = 0.25, 0
    for factors in samples(dtype, [(6, 2, 4), (64, 20, 20), (300, 18, 20)]):
        a, g = (x.mT for x in factors)
        g = g[..., kernel - 1 :]
        for share in (0.0, threshold / 2):
            others = torch.full((1,), share**2, dtype=dtype)
            with use_backend(backend):
                weight, bias, norm_sq = conv_norm_clip_sum(a, g, others, threshold, (kernel,), bias=True)
                rest = share * float(clip_coef(norm_sq, threshold))
            assert math.hypot(flat_norm([weight, bias]), rest) <= threshold * BOUND
            assert weight.isfinite().all()
            count += 1
    assert count > 100


@pytest.mark.parametrize("backend", ["torch", "cpp"])
@pytest.mark.parametrize("value", [1e4, 1e8, math.nan, math.inf])
def test_inputs_that_no_window_sees_do_not_inflate_a_norm(value: float, backend: str) -> None:
    """The guard is relative to what the products are made of, not to all that is there."""
    a, g = randn(1, 3, 3, 8, 8).float(), randn(2, 3, 16, 3, 3).float()
    layer: dict[str, Any] = {"kernel_size": (3, 3), "stride": 2, "bias": True}
    with use_backend(backend):
        before = conv_norm_clip_sum(a, g, torch.zeros(3), 1.0, **layer)
        a[1, :, 7, :] = value
        after = conv_norm_clip_sum(a, g, torch.zeros(3), 1.0, **layer)
        own = conv_norm_sq(a, g, **layer)
    torch.testing.assert_close(after.norm_sq, before.norm_sq, rtol=1e-3, atol=0)
    torch.testing.assert_close(own.double(), before.norm_sq, rtol=1e-3, atol=0)
    torch.testing.assert_close(after.weight, before.weight, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("backend", ["torch", "cpp"])
@pytest.mark.parametrize("outputs", [2, 16])
def test_a_sum_in_one_pass_takes_norms_of_any_kind(outputs: int, backend: str) -> None:
    """Its own result, float64; with a history; with NaN, which is Inf as everywhere."""
    a, g = randn(1, 3, 3, 6, 6).float(), randn(2, 3, outputs, 4, 4).float()
    others = torch.tensor([1.0, math.nan, 2.0], dtype=torch.float64, requires_grad=True)
    with use_backend(backend):
        first = conv_norm_clip_sum(a, g, others, 1.0, (3, 3))
        second = conv_norm_clip_sum(a, g, (first.norm_sq, torch.ones(3)), 1.0, (3, 3))
    assert not first.norm_sq.requires_grad and not first.weight.requires_grad
    assert first.norm_sq.isinf().tolist() == second.norm_sq.isinf().tolist() == [False, True, False]
    assert second.norm_sq[0] > first.norm_sq[0] + 1 and first.weight.isfinite().all()


@pytest.mark.parametrize("backend", ["torch", "cpp"])
def test_a_sum_in_one_pass_is_that_of_its_parts(backend: str) -> None:
    """Also beside a sample that cancels, one that is not finite and one whose other gradients are not."""
    a, g = randn(1, 40, 3, 20).float(), randn(2, 40, 40, 18).float()
    g[7, :, 9:], a[7, :, 9:] = -g[7, :, :9], a[7, :, :11]
    g[7] *= 1e12
    a[11, 0, 3] = math.nan
    others = [randn(seed, 40).float().square() for seed in (3, 4)]
    others[1][13] = math.inf
    with use_backend(backend):
        weight, bias, norm_sq = conv_norm_clip_sum(a, g, others, 0.7, (3,), bias=True)
        own = conv_norm_sq(a, g, (3,), bias=True)
        coef = clip_coef(norm_sq, 0.7)
        wanted = conv_clip_sum(a, g, coef, (3,), bias=True)
    assert torch.equal(norm_sq, others[0].double() + others[1].double() + own.double())
    assert coef[[11, 13]].tolist() == [0, 0] and coef[:11].min() > 0
    torch.testing.assert_close(weight, wanted.weight, rtol=1e-6, atol=1e-6 * float(wanted.weight.abs().max()))
    torch.testing.assert_close(bias, wanted.bias, rtol=1e-6, atol=1e-6 * float(wanted.bias.abs().max()))


@pytest.mark.parametrize("backend", ["torch", "cpp"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_contribution_of_a_tied_weight_is_bounded(backend: str, dtype: torch.dtype) -> None:
    """An embedding that takes back what the linear layer with the same weight gives, but for what rounding leaves."""
    for scale in (1e-6, 1.0, 1e6, 1e15):
        for seed, left in enumerate((0.0, 1e-7, 1e-3, -2.0)):
            h, g = (randn(seed, 8, 5) * scale).to(dtype)[None], randn(seed + 1, 8, 6).to(dtype)[None]
            back = -(g.double().mT @ h.double()) * (1 + left)
            lookup = EmbeddingFactors(torch.arange(6)[None], back.to(dtype), 6, None)
            tied = TiedFactors(LinearFactors(h, g, False), lookup)
            with use_backend(backend if dtype == torch.float32 else "auto"):
                norm_sq = tied.norm_sq()
                assert worst_contribution(norm_sq, tied.clip_sum) <= BOUND


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("method", ["gram", "direct"])
def test_bound_fails_without_the_guard(method: str, dtype: torch.dtype) -> None:
    """Plain arithmetic, even in float64, lets cancelling samples through: so the tests above can fail."""
    worst = 0.0
    for a, g in samples(torch.float32):
        x, y = a.to(dtype), g.to(dtype)
        terms = (x @ x.mT) * (y @ y.mT) if method == "gram" else (y.mT @ x).square()
        norm_sq = terms.sum((1, 2)).clamp(min=0).float()
        worst = max(worst, worst_contribution(norm_sq, lambda coef, a=a, g=g: linear_clip_sum(a, g, coef)))
    assert worst > (2 if method == "gram" else 1.01)


def test_sum_in_float32_needs_its_own_room() -> None:
    """With the exact norm instead of n + e, a cancelling sample gets through the float32 sum."""
    worst = 0.0
    for a, g in samples(torch.float32):
        norm_sq = (g.double().mT @ a.double()).square().sum((1, 2)) * (1 + 1e-12)
        clipped = lambda coef, a=a, g=g: linear_clip_sum(a, g, coef)  # noqa: E731
        with use_backend("cpp"):
            worst = max(worst, worst_contribution(round_up(norm_sq, 1), clipped))
    assert worst > 1.01


def test_gram_norm_in_float32_needs_its_own_room() -> None:
    """With room for the sum alone, a norm from float32 dots lets a cancelling sample through."""
    worst = 0.0
    for a, g in samples(torch.float32):
        n = ((a @ a.mT).double() * (g @ g.mT).double()).sum((1, 2)).clamp(min=0).sqrt()
        room = sum_error((a.double().norm(dim=2) * g.double().norm(dim=2)).sum(1), a.shape[1], torch.float32)
        clipped = lambda coef, a=a, g=g: linear_clip_sum(a, g, coef)  # noqa: E731
        with use_backend("cpp"):
            worst = max(worst, worst_contribution(round_up((n + room).square(), 1), clipped))
    assert worst > 1.01


@pytest.mark.parametrize("backend", ["torch", "cpp"])
@pytest.mark.parametrize("method", ["gram", "direct"])
@pytest.mark.parametrize(("positions", "inner", "outer"), [(1, 64, 32), (16, 512, 512), (300, 96, 128), (2000, 24, 40)])
def test_norms_of_ordinary_samples_are_hardly_raised(
    backend: str, method: str, positions: int, inner: int, outer: int
) -> None:
    a, g = randn(1, 8, positions, inner).float(), randn(2, 8, positions, outer).float()
    exact = (g.double().mT @ a.double()).square().sum((1, 2))
    with use_backend(backend):
        raised = (linear_norm_sq(a, g, False, method).double() / exact).sqrt() - 1
    assert float(raised.min()) >= 0 and float(raised.mean()) < 1e-3


@pytest.mark.parametrize("backend", ["torch", "cpp"])
def test_norms_are_never_below_the_exact_value(backend: str) -> None:
    """In rational arithmetic, where float64 itself would be in doubt: positions that cancel but for a little."""
    for a, g in samples(torch.float32, [(2, 1, 1), (6, 2, 2), (16, 3, 3)]):
        x, y = a[0].double().tolist(), g[0].double().tolist()
        steps, outer, inner = range(len(x)), range(g.shape[2]), range(a.shape[2])
        weight = {(o, i): [(y[t][o], x[t][i]) for t in steps] for o in outer for i in inner}
        bias = {o: [(y[t][o], 1.0) for t in steps] for o in outer}
        with use_backend(backend):
            norms = [linear_norm_sq(a, g, True, method) for method in ("gram", "direct")]
            norms.append(conv_norm_sq(a.mT, g.mT, (1,), bias=True))
        for norm_sq in norms:
            assert float(norm_sq) == math.inf or Fraction(float(norm_sq)) >= exact_norm_sq({**weight, **bias})
        norm_sq = scale_shift_norm_sq(a, g, bias=False)
        assert float(norm_sq) == math.inf or Fraction(float(norm_sq)) >= exact_norm_sq({i: weight[i, i] for i in inner})
        norm_sq = embedding_norm_sq(torch.zeros(g.shape[:2], dtype=torch.int64), g)
        assert float(norm_sq) == math.inf or Fraction(float(norm_sq)) >= exact_norm_sq(bias)


@pytest.mark.parametrize("layer", ["linear", "embedding", "scale_shift", "conv"])
def test_cancelling_sample_does_not_blur_the_others(layer: str) -> None:
    """Its large terms meet its own opposites before they meet another sample."""
    a, g = randn(1, 20, 22, 6), randn(2, 20, 22, 6)
    a[7, 11:], g[7, 11:] = a[7, :11], -g[7, :11]
    g[7] *= 1e18
    coef = torch.ones(20, dtype=torch.float64)
    coef[7] = 1e-5

    def run(weights: Tensor) -> Tensor:
        if layer == "embedding":
            return embedding_clip_sum(torch.zeros(20, 22, dtype=torch.int64), g, weights, 1)
        if layer == "conv":
            return conv_clip_sum(a.mT, g.mT, weights, (1,)).weight
        return (linear_clip_sum if layer == "linear" else scale_shift_clip_sum)(a, g, weights).weight

    alone = torch.zeros_like(coef)
    alone[7] = coef[7]
    torch.testing.assert_close(run(coef), run(coef - alone) + run(alone), rtol=1e-12, atol=1e-10)


@pytest.mark.parametrize("backend", ["torch", "cpp"])
@pytest.mark.parametrize("positions", [2, 3, 5, 50, 129, 200])
def test_a_cancelling_sample_does_not_swallow_the_others(backend: str, positions: int) -> None:
    """Its first and last term are opposite and so large that a float32 sum that holds one of them loses what the others
    add to it: with one of them in a sum of 128, about the threshold."""
    count = 300 // positions + 4
    a, g = torch.zeros(1, positions, 9), torch.zeros(1, positions, 8)  # of which one number of the gradient is not 0
    a[0, :, 0], g[0, 0, 0], g[0, -1, 0] = 1.0, 1e12, -1e12
    with use_backend(backend):
        own = clip_coef(linear_norm_sq(a, g, False, "direct"), 1.0)  # "gram" leaves more room
        lost = 0.4 * 2.0**-23 * 2.0 ** math.floor(math.log2(1e12 * float(own)))  # less than half of its last place
        others_a, others_g, coef = a.repeat(count, 1, 1), torch.zeros(count, positions, 8), torch.ones(count)
        others_g[..., 0] = lost
        without = linear_clip_sum(others_a, others_g, coef).weight.double()
        for place in range(count + 1):
            x, y = (torch.cat([t[:place], one, t[place:]]) for t, one in [(others_a, a), (others_g, g)])
            total = linear_clip_sum(x, y, torch.cat([coef[:place], own, coef[place:]])).weight.double()
            assert float((total - without).norm()) <= 0.1


@pytest.mark.parametrize("backend", ["torch", "cpp"])
@pytest.mark.parametrize("method", ["gram", "direct"])
@pytest.mark.parametrize("positions", [2, 4, 16, 64, 200])
def test_beside_a_cancelling_sample_another_adds_no_more_than_the_threshold(
    backend: str, method: str, positions: int
) -> None:
    """Were they in one float32 sum, the large terms of the one would round what the other adds, upwards too."""
    a, g = torch.ones(2, positions, 1), torch.zeros(2, positions, 132)
    g[1, 0], g[1, 1], a[0, 1], g[0, 0] = 1e9, -1e9, 0.0, 132**-0.5
    with use_backend(backend):
        coef = clip_coef(linear_norm_sq(a, g, False, method), 1.0)
        both, alone = (linear_clip_sum(a[i:], g[i:], coef[i:]).weight.double() for i in (0, 1))
    assert float((both - alone).norm()) <= BOUND
