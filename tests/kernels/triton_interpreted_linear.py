"""The Triton kernels for linear layers and softmax heads in Triton's interpreter: started by test_triton.py."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
from hostile_samples import BOUND, exact_norm_sq, flat_norm, randn, samples
from hypothesis import given, settings
from hypothesis import strategies as st
from spec_checks import check_case
from test_bounds import SLACK, gradients, norm, rounding
from torch import Tensor
from triton.runtime import interpreter
from triton_interpreted import on_triton, poison  # noqa: F401  the fixtures are for all tests here too

from adamix_kernels import (
    Noise,
    clip_coef,
    linear_clip_sum,
    linear_norm_sq,
    softmax_head_clip_sum_noise,
    softmax_head_coordinates,
    softmax_head_mixed_sum,
    use_backend,
)
from adamix_kernels.ops import _factored
from adamix_kernels.ops._factored import by_gram
from adamix_kernels.spec import Case, Op
from adamix_kernels.triton import launch, linear_sum

ACTUAL = launch.MATRICES["interpreter"]
_TILE = launch.Tile(16, 16, depth=16, warps=1, stages=1, chain=32)
_TILES = launch.Tiles(_TILE, replace(_TILE, chain=16), _TILE)
#: Many tiles, chains, splits and blocks even of small inputs.
TINY = replace(
    ACTUAL, direct=_TILES, gram=_TILES, sums=_TILES, scores=_TILES, programs=6, share=4, row_width=16, row_tile=64,
    bias_rows=4, bias_cols=4, residuals=1,
)  # fmt: skip
OPS = [linear_norm_sq, linear_clip_sum, softmax_head_clip_sum_noise, softmax_head_coordinates]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def shrink(patch: pytest.MonkeyPatch) -> None:
    patch.setitem(launch.MATRICES, "interpreter", TINY)
    patch.setitem(launch.LAUNCHES, "interpreter", replace(launch.LAUNCHES["interpreter"], noise_width=64))
    patch.setattr(linear_sum, "_SPAN", 64)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    shrink(monkeypatch)


@pytest.fixture(params=["actual", "tiny"])
def sizes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "tiny":
        shrink(monkeypatch)


def runs() -> Iterator[Any]:
    for op in OPS:
        for case, dtype in itertools.product(op.cases(), DTYPES):
            name = f"{op.name}-{case.name}-{str(dtype).removeprefix('torch.')}"
            yield pytest.param(op, case, dtype, id=name.replace(" ", "_"))


@pytest.mark.parametrize(("op", "case", "dtype"), list(runs()))
def test_agrees_with_the_float64_definition(
    op: Op[..., Any], case: Case, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    if dtype == torch.bfloat16:  # the actual sizes too
        check_case(op, "triton", case, dtype, "cpu")
    shrink(monkeypatch)
    check_case(op, "triton", case, dtype, "cpu")


def relative(got: Tensor, wanted: Tensor) -> float:
    return float((got.double() - wanted.double()).abs().max() / wanted.double().abs().max())


@pytest.mark.parametrize("positions", [1, 5, 70])
@pytest.mark.parametrize(("first", "second"), list(itertools.product(DTYPES, DTYPES)), ids=str)
def test_linear_of_every_two_types(first: torch.dtype, second: torch.dtype, positions: int) -> None:
    a, g = randn(1, 4, positions, 37).to(first), randn(2, 4, positions, 21).to(second)
    coef = torch.tensor([0.5, 1e-3, 0.0, 1.0])
    a[2, 0, 0] = torch.nan
    wide = a.double(), g.double()
    for bias in (False, True):
        with use_backend("torch"):
            exact = linear_norm_sq(*wide, bias).double()
            wanted = linear_clip_sum(*wide, coef, bias)
        for method in ("gram", "direct"):
            got = linear_norm_sq(a, g, bias, method).double()
            assert got[2] == torch.inf and bool((got >= exact * (1 - 1e-7)).all())
            assert bool((got <= exact * (1 + 1e-3)).where(exact < torch.inf, True).all())
        for one, other in zip(linear_clip_sum(a, g, coef, bias), wanted, strict=True):
            assert (one is None and other is None) or relative(one, other) < 1e-6


# --- What one sample contributes --------------------------------------------------------------------------------------


def cut(x: Any, unit: Any) -> Any:
    return np.trunc(x / unit) * unit


def truncating_dot(self: Any, a: Any, b: Any, d: Any, *_: Any) -> Any:
    """Tensor cores as `_dots.py` allows them to be.

    16 exact products and the sum so far are cut at 2^-24 of the largest and added; the result is cut to float32.
    """
    x, y, total = (part.data for part in (a, b, d))
    if a.dtype.scalar == tl.bfloat16:
        x, y = ((part.astype(np.uint32) << 16).view(np.float32) for part in (x, y))
    total = total.astype(np.float64)
    for start in range(0, x.shape[1], 16):
        k = slice(start, start + 16)
        terms = np.concatenate([x[:, k, None].astype(np.float64) * y[None, k].astype(np.float64), total[:, None]], 1)
        _, exponent = np.frexp(np.abs(terms).max(1, keepdims=True))
        unit = np.ldexp(1.0, np.maximum(exponent - 1, -126).astype(np.int64) - 24)
        total = cut(terms, unit).sum(1)
        _, exponent = np.frexp(total)
        total = cut(total, np.ldexp(1.0, np.maximum(exponent.astype(np.int64) - 24, -149)))
    return interpreter.TensorHandle(total.astype(np.float32), d.dtype.scalar)


def contributions(a: Tensor, g: Tensor, bias: bool, norm_sq: Tensor) -> float:
    """The largest of all samples, over thresholds of every kind in turn."""
    worst = 0.0
    for i, n in enumerate(norm_sq.sqrt().tolist()):
        c = [1.0, 1e-25, 0.5 * n if 1e-30 < n < math.inf else 1e-3][i % 3]
        coef = clip_coef(norm_sq[i : i + 1], c)
        if float(coef):
            worst = max(worst, flat_norm(linear_clip_sum(a[i : i + 1], g[i : i + 1], coef, bias)) / c)
    return worst


def batches(dtype: torch.dtype, shapes: list[tuple[int, int, int]]) -> Iterator[tuple[Tensor, Tensor]]:
    for shape in shapes:
        found = list(samples(dtype, [shape]))
        yield torch.cat([a for a, _ in found]), torch.cat([g for _, g in found])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_linear_contribution_is_bounded(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", truncating_dot)
    for (a, g), bias in zip(batches(dtype, [(6, 3, 5), (70, 4, 3)]), (True, False), strict=True):
        assert len(a) >= 60
        for method in ("gram", "direct"):
            assert contributions(a, g, bias, linear_norm_sq(a, g, bias, method)) <= BOUND, (method, a.shape)


def test_a_truncating_dot_is_worse() -> None:
    """The model above is not the interpreter's own: it loses up to what is allowed."""
    x = torch.ones(16, 64, dtype=torch.float64)
    x[:, 1:] = 2.0**-25
    handles = [interpreter.TensorHandle(part.float().numpy(), tl.float32) for part in (x, x.T * 0 + 1, x[:, :16] * 0)]
    lost = 1 + 63 * 2.0**-25 - truncating_dot(None, *handles).data[0, 0]
    assert 15 * 2.0**-25 <= lost <= 80 * 2.0**-23 * (1 + 63 * 2.0**-25)


@pytest.mark.parametrize("shape", [(2, 1, 1), (6, 2, 2)])
def test_norms_are_never_below_the_exact_value(shape: tuple[int, int, int]) -> None:
    """In rational arithmetic."""
    for a, g in batches(torch.float32, [shape]):
        norms = [linear_norm_sq(a, g, True, method).tolist() for method in ("gram", "direct")]
        for i, (x, y) in enumerate(zip(a.double().tolist(), g.double().tolist(), strict=True)):
            steps, outer, inner = range(shape[0]), range(shape[2]), range(shape[1])
            weight = {(o, k): [(y[t][o], x[t][k]) for t in steps] for o in outer for k in inner}
            bias = {o: [(y[t][o], 1.0) for t in steps] for o in outer}
            exact = exact_norm_sq({**weight, **bias})
            assert all(one[i] == math.inf or Fraction(one[i]) >= exact for one in norms)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("count", "positions"), [(100, 1), (4, 70)])
def test_norms_leave_room_for_sums_elsewhere(
    count: int, positions: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not below n + e, with numbers of one sign, whose dots are too small then."""
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", truncating_dot)
    a, g = (randn(seed, count, positions, width).abs().to(dtype) for seed, width in [(1, 20), (2, 10)])
    x, y = a.double(), g.double()
    n = (y.mT @ x).square().sum((1, 2)).sqrt()
    e = _factored.sum_error((x.norm(dim=2) * y.norm(dim=2)).sum(1), positions, dtype)
    for method in ("gram", "direct"):
        assert bool((linear_norm_sq(a, g, False, method).double() >= (n + e).square() * (1 - 1e-12)).all())


@pytest.mark.parametrize("method", ["gram", "direct"])
def test_what_leaves_the_range_on_the_way_does_not_lower_a_norm(method: str) -> None:
    a, g = randn(1, 1, 3, 5), randn(2, 1, 3, 4)
    for up, down in itertools.product([10, 15, 20, 25, 30], [15, 20, 24, 30, 36]):
        for x, y in [(a * 10.0**up, g * 10.0**-down), (a * 10.0**-down, g * 10.0**up)]:
            exact = float((y[0].float().double().T @ x[0].float().double()).square().sum())
            assert float(linear_norm_sq(x.float(), y.float(), False, method)) >= exact, (up, down)


@pytest.mark.parametrize("method", ["gram", "direct"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_ordinary_norms_are_little_above(method: str, dtype: torch.dtype) -> None:
    for positions, inner, outer in [(1, 50, 40), (30, 100, 60), (200, 130, 70)]:
        a, g = randn(1, 2, positions, inner).to(dtype), randn(2, 2, positions, outer).to(dtype)
        with use_backend("torch"):
            exact = linear_norm_sq(a.double(), g.double(), True)
        got = linear_norm_sq(a, g, True, method)
        assert bool((got >= exact).all()) and bool((got <= exact * (1 + 1e-3)).all())


@pytest.mark.parametrize("positions", [2, 17])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sums_of_factors_of_every_size(dtype: torch.dtype, positions: int) -> None:
    """Coefficient, backprops and activations that are each near an end of float32, but not their product."""
    a, g = randn(1, 1, positions, 9), randn(2, 1, positions, 7)
    for up, down in itertools.product([0, 10, 25, 36], [0, 12, 26, 37]):
        for scaled in [(a * 10.0**up, g * 10.0**-down), (a * 10.0**-down, g * 10.0**up)]:
            x, y = (part.to(dtype) for part in scaled)
            for coef in (1.0, 3e-6, 7e-17, 1.3e-38):
                factor = torch.tensor([coef])
                wanted = factor.double() * (y[0].double().T @ x[0].double())
                if 1e-36 < float(wanted.abs().max()) < 1e36:
                    got = linear_clip_sum(x, y, factor).weight
                    # Long samples of narrow types are multiplied as they are: that is right to what no norm is below.
                    floor = 0 if positions < 16 or dtype == torch.float32 else 1e-36 * coef
                    error = float((got.double() - wanted).abs().max())
                    assert error <= 1e-6 * float(wanted.abs().max()) + floor, (up, down, coef)


@pytest.mark.parametrize("positions", [2, 20, 70])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_beside_a_cancelling_sample_another_adds_no_more_than_the_threshold(dtype: torch.dtype, positions: int) -> None:
    """Were they in one float32 sum, the large terms of the one would round what the other adds, upwards too."""
    a, g = torch.ones(2, positions, 1), torch.zeros(2, positions, 132)
    g[1, 0], g[1, -1], a[0, 1], g[0, 0] = 1e9, -1e9, 0.0, 132**-0.5
    a, g = a.to(dtype), g.to(dtype)
    coef = clip_coef(linear_norm_sq(a, g, False, "direct"), 1.0)
    both, alone = (linear_clip_sum(a[i:], g[i:], coef[i:]).weight.double() for i in (0, 1))
    assert float((both - alone).norm()) <= 1 + 1e-6


def test_small_sums_of_narrow_types_keep_their_digits() -> None:
    """Bfloat16 has 8 bits from 2^-126 on only."""
    a, g = torch.tensor([[1.0, 0.00130]], dtype=torch.bfloat16), torch.tensor([[1.0]], dtype=torch.bfloat16)
    got = linear_clip_sum(a, g, torch.tensor([2e-36])).weight
    torch.testing.assert_close(got.double(), 2e-36 * a.double(), rtol=1e-6, atol=2.0**-149)


# --- Linear: the rest -------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("sizes")
@pytest.mark.parametrize("positions", [1, 7, 70])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_factors_that_are_not_above_zero_leave_samples_out(dtype: torch.dtype, positions: int) -> None:
    a, g = randn(1, 6, positions, 5).to(dtype), randn(2, 6, positions, 4).to(dtype)
    a[0], g[1], a[3, 0, 2], g[4, -1, 1] = torch.nan, torch.inf, -torch.inf, torch.nan
    coef = torch.tensor([0.0, -1.0, 0.5, torch.nan, -0.0, 1.0])
    kept = linear_clip_sum(a[[2, 5]], g[[2, 5]], coef[[2, 5]], True)
    for one, other in zip(linear_clip_sum(a, g, coef, True), kept, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


@pytest.mark.usefixtures("sizes")
@pytest.mark.parametrize("mode", ["fast", "secure"])
@pytest.mark.parametrize(("count", "positions"), [(0, 3), (9, 1), (11, 20)])
def test_sums_get_the_noise_of_their_place(mode: str, count: int, positions: int) -> None:
    a, g, coef = randn(1, count, positions, 37).bfloat16(), randn(2, count, positions, 5).bfloat16(), torch.ones(count)
    for std in (0.7, torch.tensor(0.7, dtype=torch.float64)):
        noise = Noise._with_key(bytes(range(32)), mode)
        noise._draws = 2**32 + 7
        quiet, noisy = linear_clip_sum(a, g, coef, True), linear_clip_sum(a, g, coef, True, noise, std)
        added = torch.cat([(x.double() - y.double()).flatten() for x, y in zip(noisy, quiet, strict=True)])
        size = max(1.0, float(quiet[0].abs().max()))
        assert float((added - 0.7 * noise.normal(2**32 + 7, 0, len(added))).abs().max()) < 4e-7 * size
        assert noise._draws == 2**32 + 8


@pytest.mark.usefixtures("sizes")
def test_same_bits_on_every_run() -> None:
    a, g, coef = randn(1, 4, 20, 20).bfloat16(), randn(2, 4, 20, 9).bfloat16(), torch.rand(4)

    def run() -> list[Tensor]:
        return [*linear_clip_sum(a, g, coef, True), *(linear_norm_sq(a, g, True, m) for m in ("gram", "direct"))]

    first = run()
    assert all(torch.equal(x, y) for x, y in zip(run(), first, strict=True))


def test_neither_all_pairs_nor_all_entries_are_written(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: made.append((x := empty(*a, **k)).numel()) or x)
    a, g = torch.ones(1, 128, 200), torch.ones(1, 128, 150)
    for method in ("gram", "direct"):
        made.clear()
        linear_norm_sq(a, g, True, method)
        assert sum(made) <= 2 * 128 + 40


def test_auto_takes_the_cheaper() -> None:
    assert [by_gram("triton", t, 1024, 1024) for t in (1, 1023, 1024)] == [True, True, False]
    assert not by_gram("triton", 70, 3, 2)


# --- Heads ------------------------------------------------------------------------------------------------------------


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10**6),
    reach=st.floats(-1, 1),
    gap=st.floats(-3, 3),
    threshold=st.one_of(st.floats(1e-12, 1e12), st.floats(-45, 45).map(lambda e: 10.0**e)),
    dtype=st.sampled_from(DTYPES),
    bias=st.booleans(),
)
def test_one_row_moves_the_head_by_at_most_the_threshold(
    seed: int, reach: float, gap: float, threshold: float, dtype: torch.dtype, bias: bool
) -> None:
    features = gradients(seed, (1, 9), reach, dtype)
    weight = (gradients(seed + 1, (4, 9), 0.0, torch.float64) * 10**gap / max(norm(features), 1e-38)).float()
    weight = weight.clamp(-3e38, 3e38)
    with use_backend("triton"):
        out = softmax_head_clip_sum_noise(
            features, torch.tensor([seed % 4]), weight, torch.zeros(4) if bias else None, max_grad_norm=threshold
        )
    sums = [out.weight] + ([] if out.bias is None else [out.bias])
    assert norm(sums) <= threshold * SLACK + sum(map(rounding, sums))


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize(("first", "second"), list(itertools.product(DTYPES, DTYPES)), ids=str)
def test_heads_of_every_two_types(first: torch.dtype, second: torch.dtype) -> None:
    """In several blocks of rows and tiles of classes."""
    x, w, b = randn(1, 70, 24).to(first), (0.2 * randn(2, 20, 24)).to(second), randn(3, 20).to(second)
    y = torch.randint(20, (70,), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    basis = torch.linalg.qr(randn(4, 20 * 25, 2)).Q.T.to(second)
    with use_backend("torch"):
        wide = x.double(), y, w.double(), b.double()
        wanted = softmax_head_clip_sum_noise(*wide, 1.0)
        coordinates = softmax_head_coordinates(*wide[:3], basis.double(), wide[3])
    got = softmax_head_clip_sum_noise(x, y, w, b, torch.tensor(1.0))
    for one, other in zip(got, wanted, strict=True):
        assert relative(one, other) < 1e-5
    assert relative(softmax_head_coordinates(x, y, w, basis, b), coordinates) < 1e-5


@pytest.mark.usefixtures("sizes")
def test_heads_get_the_noise_of_their_place() -> None:
    x, y, w, b = randn(1, 66, 5).float(), torch.arange(66) % 4, randn(2, 4, 5).float(), torch.zeros(4)
    noisy = softmax_head_clip_sum_noise(x, y, w, b, torch.tensor(0.5), 2.0, Noise(seed=3))
    still = softmax_head_clip_sum_noise(x, y, w, b, 0.5)
    added = torch.cat([(noisy.weight - still.weight).flatten(), noisy.bias - still.bias])
    assert relative(added, Noise(seed=3).normal(0, 0, len(added))) < 1e-5


def test_residuals_keep_their_precision() -> None:
    """Where the label is all but certain, softmax - 1 is what is left of it."""
    x, w = torch.tensor([[1.0]]), torch.tensor([[50.0], [0.0], [-35.0]])
    out = softmax_head_clip_sum_noise(x, torch.tensor([0]), w)
    exact = torch.softmax(w.double()[:, 0], 0)
    exact[0] = -exact[1:].sum()
    torch.testing.assert_close(out.weight[:, 0].double(), exact, rtol=1e-6, atol=0)
    assert float(out.norm_sq) >= float(out.weight.double().square().sum())


def test_labels_that_are_none_make_bad_rows() -> None:
    """Reading them on a GPU would wait for it."""
    x, w = randn(1, 3, 5).float(), randn(2, 4, 5).float()
    run = softmax_head_clip_sum_noise.backends["triton"].run
    out = run(features=x, labels=torch.tensor([1, 4, -1]), weight=w)
    alone = softmax_head_clip_sum_noise(x[:1], torch.tensor([1]), w)
    assert torch.equal(out.weight, alone.weight) and torch.equal(out.loss, alone.loss)
    assert out.norm_sq.isinf().tolist() == [False, True, True]


def test_mixed_sums_run_on_these_kernels() -> None:
    x, y, w = randn(1, 9, 6).float(), torch.arange(9) % 3, randn(2, 3, 6).float()
    with use_backend("auto"):
        wanted = softmax_head_mixed_sum.reference(x[:5], y[:5], x[5:], y[5:], w, quantile=0.5)
    calls: list[Callable[..., Any]] = [softmax_head_clip_sum_noise.backends["triton"].run]
    public = calls[0](features=x[5:], labels=y[5:], weight=w)
    private = calls[0](features=x[:5], labels=y[:5], weight=w, max_grad_norm=wanted.max_grad_norm)
    torch.testing.assert_close(public.weight, wanted.public.weight, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(private.weight, wanted.private.weight, rtol=1e-5, atol=1e-6)
