"""Factored ops against torch's own per-sample gradients, and the bound on what one sample contributes."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import grad, vmap
from torch.nn import functional

from adamix_kernels.ops import _factored
from adamix_kernels.ops._factored import sum_error
from adamix_kernels.ops._numerics import round_up
from adamix_kernels.ops.clip import clip_coef
from adamix_kernels.ops.conv import conv_clip_sum, conv_norm_sq
from adamix_kernels.ops.embedding import embedding_clip_sum, embedding_norm_sq
from adamix_kernels.ops.linear import linear_clip_sum, linear_norm_sq
from adamix_kernels.ops.noise import Noise
from adamix_kernels.ops.scale_shift import scale_shift_clip_sum, scale_shift_norm_sq
from adamix_kernels.spec import use_backend

OPS = [
    linear_norm_sq,
    linear_clip_sum,
    embedding_norm_sq,
    embedding_clip_sum,
    conv_norm_sq,
    conv_clip_sum,
    scale_shift_norm_sq,
    scale_shift_clip_sum,
]
BOUND = 1 + 1e-6


@pytest.fixture(autouse=True)
def on_torch() -> Iterator[None]:
    with use_backend("torch"):
        yield


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


# --- The same gradients as torch.func ---------------------------------------------------------------------------------


def torch_grads(layer: Callable[..., Tensor], parameters: list[Tensor], x: Tensor, backprops: Tensor) -> list[Tensor]:
    """Per-sample gradients `[B, *]` of each parameter."""

    def loss(params: list[Tensor], one: Tensor, backprop: Tensor) -> Tensor:
        return (layer(one[None], *params) * backprop[None]).sum()

    return list(vmap(grad(loss), in_dims=(None, 0, 0))(parameters, x, backprops))


def assert_same(norms: list[Tensor], sums: Any, coef: Tensor, grads: list[Tensor]) -> None:
    """To 1e-9, and for the norms one rounding up to float32."""
    exact = torch.stack([g.flatten(1).square().sum(1) for g in grads]).sum(0).clamp(min=torch.finfo(torch.float32).tiny)
    for norm_sq in norms:
        assert norm_sq.dtype == torch.float32
        assert (norm_sq.double() >= exact * (1 - 1e-14)).all()
        below = torch.nextafter(norm_sq, torch.zeros_like(norm_sq)).double()
        assert (below <= exact * (1 + 1e-9)).all()
    results = [sums] if isinstance(sums, Tensor) else [part for part in sums if part is not None]
    for result, g in zip(results, grads, strict=True):
        expected = torch.tensordot(coef, g, 1)
        assert result.dtype == torch.float64
        torch.testing.assert_close(result, expected, rtol=0, atol=1e-9 * float(expected.abs().max()))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("middle", "inner", "outer"), [((), 5, 3), ((1,), 4, 6), ((9,), 30, 20), ((3, 40), 4, 5)])
def test_linear_is_torch(middle: tuple[int, ...], inner: int, outer: int, bias: bool) -> None:
    x, g, coef = randn(1, 6, *middle, inner), randn(2, 6, *middle, outer), randn(3, 6).abs()
    parameters = [randn(4, outer, inner), randn(5, outer)][: 1 + bias]
    norms = [linear_norm_sq(x, g, bias, method) for method in ("auto", "gram", "direct")]
    grads = torch_grads(functional.linear, parameters, x, g)
    assert_same(norms, linear_clip_sum(x, g, coef, bias), coef, grads)


@pytest.mark.parametrize("padding_idx", [None, 0, 3])
@pytest.mark.parametrize(("middle", "ids"), [((), 8), ((1,), 8), ((50,), 8), ((4, 5), 300)])
def test_embedding_is_torch(middle: tuple[int, ...], ids: int, padding_idx: int | None) -> None:
    indices = torch.randint(ids, (5, *middle), generator=generator(1))
    g, coef = randn(2, 5, *middle, 7), randn(3, 5).abs()

    def layer(one: Tensor, weight: Tensor) -> Tensor:
        return functional.embedding(one, weight, padding_idx)

    sums = embedding_clip_sum(indices, g, coef, ids, padding_idx)
    grads = torch_grads(layer, [randn(4, ids, 7)], indices, g)
    assert_same([embedding_norm_sq(indices, g, padding_idx)], sums, coef, grads)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("shape", "outputs", "kernel", "settings"),
    [
        ((4, 19), 6, (3,), {"stride": 2, "padding": 1, "dilation": 2, "groups": 2}),
        ((3, 8), 2, (4,), {"padding": "same"}),
        ((2, 7, 6), 3, (2, 4), {"padding": "same", "dilation": (3, 1)}),
        ((6, 8, 9), 9, (3, 2), {"stride": (2, 3), "padding": (0, 1), "groups": 3}),
        ((5, 6, 6), 10, (3, 3), {"padding": "valid", "groups": 5}),
        ((2, 30, 31), 3, (5, 5), {}),
        ((4, 4, 5, 6), 2, (2, 3, 1), {"stride": (1, 2, 1), "padding": (1, 0, 2), "groups": 2}),
    ],
)
def test_conv_is_torch(
    shape: tuple[int, ...], outputs: int, kernel: tuple[int, ...], settings: dict[str, Any], bias: bool
) -> None:
    conv = [functional.conv1d, functional.conv2d, functional.conv3d][len(kernel) - 1]

    def layer(one: Tensor, weight: Tensor, shift: Tensor | None = None) -> Tensor:
        return conv(one, weight, shift, **settings)

    weight = randn(1, outputs, shape[0] // settings.get("groups", 1), *kernel)
    parameters = [weight, randn(2, outputs)][: 1 + bias]
    x, coef = randn(3, 4, *shape), randn(4, 4).abs()
    g = randn(5, *layer(x, weight).shape)
    norm_sq = conv_norm_sq(x, g, kernel, **settings, bias=bias)
    sums = conv_clip_sum(x, g, coef, kernel, **settings, bias=bias)
    assert_same([norm_sq], sums, coef, torch_grads(layer, parameters, x, g))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("middle", [(), (1,), (60,), (4, 5)])
def test_scale_shift_is_torch(middle: tuple[int, ...], bias: bool) -> None:
    x, g, coef = randn(1, 4, *middle, 12), randn(2, 4, *middle, 12), randn(3, 4).abs()

    def layer(one: Tensor, weight: Tensor, shift: Tensor | None = None) -> Tensor:
        return functional.layer_norm(one, (12,), weight, shift)

    grads = torch_grads(layer, [randn(4, 12), randn(5, 12)][: 1 + bias], x, g)
    normal = functional.layer_norm(x, (12,))
    assert_same([scale_shift_norm_sq(normal, g, bias)], scale_shift_clip_sum(normal, g, coef, bias), coef, grads)


def test_scale_shift_is_group_norm_with_channels_last() -> None:
    x, g, coef = randn(1, 4, 6, 5, 5), randn(2, 4, 6, 5, 5), randn(3, 4).abs()

    def layer(one: Tensor, weight: Tensor, shift: Tensor) -> Tensor:
        return functional.group_norm(one, 3, weight, shift)

    grads = torch_grads(layer, [randn(4, 6), randn(5, 6)], x, g)
    normal, last = functional.group_norm(x, 3).movedim(1, -1), g.movedim(1, -1)
    assert_same([scale_shift_norm_sq(normal, last)], scale_shift_clip_sum(normal, last, coef), coef, grads)


# --- What one sample contributes --------------------------------------------------------------------------------------


def hostile(seed: int, positions: int, inner: int, outer: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Factors `[T, I]`, `[T, O]` of one sample, ordinary and adversarial; T even."""
    a, g = randn(seed, positions, inner), randn(seed + 1, positions, outer)
    half = positions // 2
    spread = 10.0 ** (18 * torch.rand(positions, 1, generator=generator(seed), dtype=torch.float64))
    magnitudes = [(1, 1), (1e3, 1e3), (1e4, 1e-7), (1e18, 1), (1e18, 1e-18), (1e30, 1e-30), (1e-30, 1), (1e-42, 1e-3)]
    for scale_a, scale_g in magnitudes:
        yield a * scale_a, g * scale_g
    # Float64 alone holds these; squares underflow or overflow where the gradient does neither.
    extremes = [(1e-170, 1), (1e-170, 1e-170), (1e-300, 1e290), (1e200, 1e-200), (1e150, 1e-165), (1e153, 1e-163)]
    for scale_a, scale_g in extremes:
        yield a * scale_a, g * scale_g
        yield a * scale_g, g * scale_a
        yield torch.cat([a[:half], a[:half]]) * scale_a, torch.cat([g[:half], -g[:half]]) * scale_g
    # Opposed: half of the positions take back what the others gave, but for `left` of it.
    for left in (0.0, 2.0**-23, 1e-6, 2.0**-8, 2.0**-11):
        for scale in (1.0, 1e3, 1e10, 1e18):
            pair_a = torch.cat([a[:half], a[:half]]) * scale
            pair_g = torch.cat([g[:half], -g[:half] * (1 + left)])
            yield pair_a, pair_g
            yield pair_a, pair_g * torch.cat([spread[:half], spread[:half]])
            yield pair_a.flip(0), pair_g * torch.cat([spread[:half], spread[:half]])
    # Large terms cancel and swallow a small one.
    swallowed = torch.cat([g[:half], -g[:half]]) * 1e17
    swallowed[half - 1], swallowed[-1] = g[half - 1], 0
    yield torch.cat([a[:half], a[:half]]), swallowed
    # A common direction of activations, and backprops that sum to about nothing.
    for offset in (1e4, 1e12):
        yield 1 + a / offset, g - g.mean(0)
        yield offset * torch.ones_like(a), torch.cat([g[:half] * spread[:half], -g[:half] * spread[:half]])


def flat_norm(sums: Any) -> float:
    parts = [sums] if isinstance(sums, Tensor) else [part for part in sums if part is not None]
    return math.hypot(*(float(part.double().norm()) for part in parts))


def worst_contribution(norm_sq: Tensor, clipped: Callable[[Tensor], Any]) -> float:
    """The largest contribution of one sample over the threshold, for thresholds of every kind."""
    norm = float(norm_sq.sqrt())
    thresholds = [1.0, 1e-3, 1e3, 1e-25] + [norm * f for f in (0.5, 1e-3, 1 - 1e-7) if 1e-30 < norm * f < math.inf]
    return max(flat_norm(clipped(clip_coef(norm_sq, c))) / c for c in thresholds)


def on_backends(op: Any) -> Any:
    """Each backend for CPU tensors, with each dtype it takes."""
    pairs = [(name, dtype) for name in ("torch", "cpp") if op.why_not(name) is None for dtype in op.dtypes(name)]
    ids = [f"{name}-{str(dtype).removeprefix('torch.')}" for name, dtype in pairs]
    return pytest.mark.parametrize(("backend", "dtype"), pairs, ids=ids)


SHAPES = [(2, 1, 1), (6, 3, 5), (16, 20, 9), (64, 8, 8), (4, 40, 30), (130, 4, 3)]


def samples(dtype: torch.dtype, shapes: list[tuple[int, int, int]] = SHAPES) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of one; what overflows in `dtype` is no finite input and is left out."""
    for seed, shape in enumerate(shapes):
        for factors in hostile(10 * seed, *shape):
            a, g = (x.to(dtype)[None] for x in factors)
            if a.isfinite().all() and g.isfinite().all():
                yield a, g


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


def exact_norm_sq(entries: dict[Any, list[tuple[float, float]]]) -> Fraction:
    """Of a gradient whose every entry is a sum of products."""
    return sum(
        (sum((Fraction(x) * Fraction(y) for x, y in e), Fraction(0)) ** 2 for e in entries.values()), Fraction(0)
    )


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


# --- The rest ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_blocks_do_not_change_the_result(op: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for case in op.cases():
        whole = op(**case.build(generator(0)))
        with monkeypatch.context() as patch:
            patch.setattr(_factored, "_LIMIT", 40)
            parts = op(**case.build(generator(0)))
        tolerance = {"rtol": 2e-7, "atol": 1e-44} if "norm" in op.name else {"rtol": 1e-12, "atol": 1e-12}
        torch.testing.assert_close(parts, whole, **tolerance)


@pytest.mark.parametrize("bias", [False, True])
def test_linear_noise_is_one_draw_over_weight_and_bias(bias: bool) -> None:
    noise = Noise(seed=3)
    a, g = torch.full((2, 3, 4), torch.nan), torch.full((2, 3, 5), torch.inf)
    weight, shift = linear_clip_sum(a, g, torch.zeros(2), bias, noise, 0.5)
    expected = 0.5 * Noise(seed=3).normal(0, 0, 25 if bias else 20)
    got = weight.reshape(-1) if shift is None else torch.cat([weight.reshape(-1), shift])
    torch.testing.assert_close(got.double(), expected, rtol=1e-6, atol=0)
    assert noise.next_draw() == 1


def test_embedding_needs_no_table_of_positions_by_ids() -> None:
    """2^20 ids and 2^10 positions: a one-hot would take 8 GB."""
    ids = torch.tensor([[5, 1 << 19, 5, (1 << 20) - 1] * 256])
    total = embedding_clip_sum(ids, torch.ones(1, 1024, 1), torch.ones(1), 1 << 20)
    assert total[ids[0, :4], 0].tolist() == [512, 256, 512, 256] and float(total.sum()) == 1024
    assert embedding_norm_sq(ids, torch.ones(1, 1024, 1))[0] == pytest.approx(512**2 + 2 * 256**2, rel=1e-6)


X = torch.ones(2, 3, 4)
IDS = torch.zeros(2, 3, dtype=torch.int64)
IMAGE, COEF = torch.ones(2, 4, 6, 6), torch.ones(2)


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (ValueError, "linear_norm_sq: backprops has shape [2, 5, 4]; expected [B, *, O] with *=[3] as in activations",
         lambda: linear_norm_sq(X, torch.ones(2, 5, 4))),
        (TypeError, "linear_norm_sq: activations has dtype torch.int64", lambda: linear_norm_sq(X.long(), X)),
        (ValueError, "linear_norm_sq: method is 'ghost'; pass", lambda: linear_norm_sq(X, X, method="ghost")),
        (TypeError, "linear_norm_sq: bias is Tensor; pass True", lambda: linear_norm_sq(X, X, bias=COEF)),
        (ValueError, "linear_clip_sum: coef has shape [3]; expected [B] with B=2 as in activations",
         lambda: linear_clip_sum(X, X, torch.ones(3))),
        (ValueError, "linear_clip_sum: std is -1.0; pass a finite", lambda: linear_clip_sum(X, X, COEF, std=-1.0)),
        (TypeError, "linear_clip_sum: noise is NoneType; pass", lambda: linear_clip_sum(X, X, COEF, std=1.0)),
        (ValueError, "linear_clip_sum: std has shape [2]; pass",
         lambda: linear_clip_sum(X, X, COEF, std=COEF, noise=Noise())),
        (TypeError, "embedding_norm_sq: indices has dtype torch.float32", lambda: embedding_norm_sq(X[..., 0], X)),
        (ValueError, "embedding_norm_sq: padding_idx is -1; pass", lambda: embedding_norm_sq(IDS, X, -1)),
        (ValueError, "embedding_clip_sum: indices holds 7; expected 0 <= index < num_embeddings=7",
         lambda: embedding_clip_sum(IDS + 7, X, COEF, 7)),
        (ValueError, "embedding_clip_sum: indices holds -1;", lambda: embedding_clip_sum(IDS - 1, X, COEF, 7)),
        (ValueError, "embedding_clip_sum: padding_idx is 7;", lambda: embedding_clip_sum(IDS, X, COEF, 7, 7)),
        (ValueError, "embedding_clip_sum: num_embeddings is 0;", lambda: embedding_clip_sum(IDS, X, COEF, 0)),
        (ValueError, "conv_norm_sq: backprops has shape [2, 4, 6, 6]; expected [2, 4, 4, 4], the output of activations "
         "[2, 4, 6, 6] with kernel_size (3, 3), stride 1, padding 0, dilation 1",
         lambda: conv_norm_sq(IMAGE, IMAGE, (3, 3))),
        (ValueError, "conv_norm_sq: kernel_size is 3; pass a tuple", lambda: conv_norm_sq(IMAGE, IMAGE, 3)),
        (ValueError, "conv_norm_sq: kernel_size is (0, 1); pass", lambda: conv_norm_sq(IMAGE, IMAGE, (0, 1))),
        (ValueError, "conv_norm_sq: kernel_size is (9, 9); larger", lambda: conv_norm_sq(IMAGE, IMAGE, (9, 9))),
        (ValueError, "conv_norm_sq: activations has shape [2, 4, 6, 6]; expected [B, I] and 1 spatial",
         lambda: conv_norm_sq(IMAGE, IMAGE, (1,))),
        (ValueError, "conv_norm_sq: stride is (1,); pass", lambda: conv_norm_sq(IMAGE, IMAGE, (1, 1), (1,))),
        (ValueError, "conv_norm_sq: dilation is 0; pass", lambda: conv_norm_sq(IMAGE, IMAGE, (1, 1), dilation=0)),
        (ValueError, "conv_norm_sq: padding is 'full'; pass", lambda: conv_norm_sq(IMAGE, IMAGE, (1, 1), 1, "full")),
        (ValueError, "conv_norm_sq: padding is 'same' with stride 2;",
         lambda: conv_norm_sq(IMAGE, IMAGE, (1, 1), 2, "same")),
        (ValueError, "conv_norm_sq: groups is 3; expected a divisor of I=4 and of O=4",
         lambda: conv_norm_sq(IMAGE, IMAGE, (1, 1), groups=3)),
        (ValueError, "conv_clip_sum: coef has shape [3]", lambda: conv_clip_sum(IMAGE, IMAGE, torch.ones(3), (1, 1))),
        (ValueError, "scale_shift_norm_sq: backprops has shape [2, 3, 3]; expected [B, *, D] with D=4",
         lambda: scale_shift_norm_sq(X, X[..., :3])),
        (TypeError, "scale_shift_clip_sum: bias is NoneType; pass",
         lambda: scale_shift_clip_sum(X, X, COEF, None)),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(error: type[Exception], message: str, call: Callable[[], Any]) -> None:
    with pytest.raises(error, match=re.escape(message)):
        call()
