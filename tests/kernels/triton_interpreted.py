"""The Triton kernels in Triton's interpreter, on CPU tensors: started by test_triton.py with TRITON_INTERPRET=1."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from fractions import Fraction
from typing import Any

import interpreter_mends
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from spec_checks import check_case
from test_bounds import SLACK, gradients, never_below, norm, rounding, unlucky_rows
from torch import Tensor

import adamix_kernels as kernels
from adamix_kernels import Noise, add_gaussian_noise_, clip_coef, clip_sum, clip_sum_noise, grad_norm_sq, use_backend
from adamix_kernels.spec import FLOAT_DTYPES, Case, Op
from adamix_kernels.triton import launch
from adamix_kernels.triton import noise as noise_kernels

interpreter_mends.install()

ACTUAL = launch.LAUNCHES["interpreter"]
#: Many programs, blocks, chunks and splits even of small inputs.
TINY = replace(
    ACTUAL, norm_block=32, norm_tile=16, norm_width=8, finish_tile=32, sum_width=16, sum_programs=6, noise_width=16,
    quantile_width=32,
)  # fmt: skip
OPS = [grad_norm_sq, clip_coef, clip_sum, clip_sum_noise, add_gaussian_noise_, kernels.norm_quantile]
KEY = bytes(range(32))


@pytest.fixture(autouse=True)
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh memory holds NaN, so that a result or a partial sum that is not written shows."""

    def poisoned(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *args, **kwargs: make(*args, **kwargs).fill_(torch.nan)

    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))


@pytest.fixture(autouse=True)
def fewest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adamix_kernels.triton.clip._FEWEST", 2)


@pytest.fixture(params=["actual", "tiny"])
def sizes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(launch.LAUNCHES, "interpreter", TINY if request.param == "tiny" else ACTUAL)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(launch.LAUNCHES, "interpreter", TINY)


@pytest.fixture(autouse=True)
def on_triton() -> Iterator[None]:
    with use_backend("triton"):
        yield


def runs() -> Iterator[Any]:
    for op in OPS:
        for case, dtype in itertools.product(op.cases(), FLOAT_DTYPES):
            name = f"{op.name}-{case.name}-{str(dtype).removeprefix('torch.')}"
            yield pytest.param(op, case, dtype, id=name.replace(" ", "_"))


@pytest.mark.usefixtures("sizes")
@pytest.mark.parametrize(("op", "case", "dtype"), list(runs()))
def test_agrees_with_the_float64_definition(op: Op[..., Any], case: Case, dtype: torch.dtype) -> None:
    check_case(op, "triton", case, dtype, "cpu")


# --- The bound --------------------------------------------------------------------------------------------------------

dtypes = st.sampled_from(FLOAT_DTYPES)
few = settings(max_examples=30, deadline=None, derandomize=True)


@few
@given(
    seed=st.integers(0, 10**6),
    width=st.integers(1, 300),
    reach=st.floats(-1, 1),
    threshold=st.floats(-300, 300).map(lambda e: 10.0**e),
    dtype=dtypes,
    many=st.booleans(),
)
def test_one_sample_adds_at_most_the_threshold(
    seed: int, width: int, reach: float, threshold: float, dtype: torch.dtype, many: bool
) -> None:
    grads = gradients(seed, (1, width), reach, dtype)
    given_as = [grads[:, : width // 2], grads[:, width // 2 :]] if many else [grads]
    out = clip_sum_noise(given_as, threshold)
    if math.isfinite(out.norm_sq):
        assert math.sqrt(float(out.norm_sq)) >= norm(grads) * (1 - 1e-12)
    assert norm(out.sum) <= threshold * SLACK + sum(map(rounding, out.sum))


@few
@given(seed=st.integers(0, 10**6), size=st.integers(1, 20), reach=st.floats(-1, 1), threshold=st.floats(1e-3, 1e3),
       dtype=dtypes)  # fmt: skip
@pytest.mark.usefixtures("tiny")
def test_adding_a_sample_moves_the_sum_by_at_most_the_threshold(
    seed: int, size: int, reach: float, threshold: float, dtype: torch.dtype
) -> None:
    parts = [gradients(seed + i, (size + 1, *shape), 0.0, dtype) for i, shape in enumerate([(3, 5), (1,), (21,)])]
    for i, part in enumerate(parts):
        part[-1] = gradients(seed + 9 + i, tuple(part.shape[1:]), reach, dtype)
    more = clip_sum_noise(parts, threshold).sum
    fewer = clip_sum_noise([p[:-1] for p in parts], threshold).sum
    moved = norm([a.double() - b.double() for a, b in zip(more, fewer, strict=True)])
    assert moved <= threshold * SLACK + 2**-23 * (norm(more) + norm(fewer))


@pytest.mark.usefixtures("sizes")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bad_samples_add_exactly_nothing(dtype: torch.dtype) -> None:
    grads = gradients(0, (6, 30), 0.0, dtype)
    spoilt = grads.clone()
    spoilt[1, 3], spoilt[4, 0], spoilt[5, 7] = torch.nan, torch.inf, -torch.inf
    zeroed = spoilt.clone()
    zeroed[[1, 4, 5]] = 0.0
    assert torch.equal(clip_sum_noise(spoilt, 0.5).sum, clip_sum_noise(zeroed, 0.5).sum)
    assert torch.equal(clip_sum(spoilt, torch.tensor([0.5, 0.0, 0.7, -1.0, 0.0, torch.nan])[:6]).isnan().sum(),
                       torch.tensor(0))  # fmt: skip


@pytest.mark.usefixtures("sizes")
def test_a_list_of_several_types() -> None:
    generator = torch.Generator().manual_seed(0)
    dtypes = [torch.float32, torch.bfloat16, torch.float64, torch.float32, torch.float16, torch.bfloat16]
    parts = [torch.randn(5, n, generator=generator).to(d) for n, d in zip((21, 40, 3, 0, 9, 33), dtypes, strict=True)]
    exact = torch.cat([p.double() for p in parts], 1).square().sum(1)
    norm_sq = grad_norm_sq(parts)
    assert bool((norm_sq >= exact).all()) and bool((norm_sq <= exact * (1 + 1e-6)).all())
    out = clip_sum_noise(parts, 0.5, 1.5, Noise(seed=1))
    wanted = clip_sum_noise.reference(parts, 0.5, 1.5, Noise(seed=1))
    for one, other in zip(out.sum, wanted.sum, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


def test_rows_too_small_for_float32_squares() -> None:
    """What underflows is made up for: 40,000 squares of 2^-76 are 2^-152 each, and 0 in float32."""
    row = torch.full((1, 40_000), 2.0**-76)
    assert grad_norm_sq(row).item() >= 40_000 * 2.0**-152
    row[0, 0] = 2.0**-63
    row[0, 1:] = 2.0**-75.5  # squares of 2^-151, less than half of the smallest denormal
    assert Fraction(grad_norm_sq(row).item()) >= Fraction(2) ** -126 + 39_999 * Fraction(float(row[0, 1])) ** 2
    tiny = torch.finfo(torch.float32).tiny
    rows = torch.tensor([[0.0], [5e-324], [1e-170], [1e-23], [1e-19], [1.0842021e-19]], dtype=torch.float64)
    for x in (rows, torch.zeros(2, 0)):
        assert (grad_norm_sq(x) == tiny).all()
    # For float32 there is one more allowance, of 2^-149 for each square.
    narrow = grad_norm_sq(rows.float())
    assert (narrow >= tiny).all() and (narrow <= tiny * (1 + 1e-6)).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_half_precision_value(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(launch.LAUNCHES, "interpreter", replace(ACTUAL, norm_tile=1 << 17))
    values = torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(dtype)[:, None]
    exact = values.double().square().sum(1)
    got = grad_norm_sq(values).double()
    usable = exact <= torch.finfo(torch.float32).max
    assert bool((got[~usable] == torch.inf).all()) and bool((got[usable] >= exact[usable]).all())
    assert bool((got[usable] <= exact[usable] * (1 + 1e-6) + 1.18e-38).all())


@pytest.mark.parametrize("terms", [1, 2, 3, 4, 5, 31, 32, 33, 500])
def test_norms_are_above_the_exact_ones(terms: int) -> None:
    """In integers: every float32 is one over 2^149."""
    generator = torch.Generator().manual_seed(terms)
    x = torch.rand(40, terms, generator=generator) + 0.5
    for row, got in zip(x.tolist(), grad_norm_sq(x).tolist(), strict=True):
        exact = sum(int(v * 2**30) ** 2 for v in row)
        assert exact <= int(got * 2**60) <= exact * (1 + 1e-6)


def test_norms_of_unlucky_rows_are_not_below_the_exact_ones() -> None:
    for row in unlucky_rows():
        with use_backend("triton"):
            assert never_below(grad_norm_sq(row)[0], row)


def test_factors_are_rounded_down() -> None:
    generator = torch.Generator().manual_seed(0)
    for c in (1.0, 0.1, 0.7, 3e-7, 123.456, math.pi * 1e12):
        size = 10 ** (torch.rand(400, generator=generator, dtype=torch.float64) * 8 - 2)
        norm_sq = (size * c**2).float()
        coef = clip_coef(norm_sq, c)
        assert torch.equal(coef, clip_coef.reference(norm_sq, c))
        assert torch.equal(coef, clip_coef(norm_sq, torch.tensor(c, dtype=torch.float64)))
    tiny = torch.finfo(torch.float32).tiny
    for c, expected in [(tiny * 1.5, tiny * 1.5), (tiny, tiny), (tiny * 0.99, 0.0), (1e-45, 0.0), (1e-300, 0.0)]:
        assert clip_coef(torch.ones(1), c).item() == expected
    assert clip_coef(torch.ones(1), torch.tensor(-1.0)).item() == 0.0
    assert clip_coef(torch.zeros(1), torch.tensor(0.0)).item() == 0.0


# --- The noise --------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("sizes")
@pytest.mark.parametrize("mode", ["fast", "secure"])
@pytest.mark.parametrize("first", [0, 1, 7, 66])
def test_noise_is_that_of_the_reference(mode: str, first: int) -> None:
    reference = Noise._with_key(KEY, mode)
    reference._draws = draw = 2**32 + 7
    parts = [torch.zeros(size, dtype=torch.float64) for size in (first, 0, 35, 3, 20)]
    add_gaussian_noise_(parts, 0.7, reference)
    got = torch.cat(parts)
    assert float((got / 0.7 - reference.normal(draw, 0, len(got))).abs().max()) < 1e-13
    assert reference._draws == draw + 1


@pytest.mark.parametrize("mode", ["fast", "secure"])
@pytest.mark.parametrize("offset", [2**35 + 11, 2**40 + 1, 2**33 - 20])
def test_noise_at_large_offsets(mode: str, offset: int) -> None:
    """As behind a tensor that does not fit here."""
    noise, out, width = Noise._with_key(KEY, mode), torch.zeros(100, dtype=torch.float64), 32
    words, unit = launch.draw(noise, out.device)
    table = torch.tensor([[out.data_ptr(), len(out), offset, 0]])
    blocks = torch.tensor([[0, i] for i in range(5)], dtype=torch.int32)
    noise_kernels.add_noise[(5,)](
        table, blocks, None, *launch.double(1.0), *words,
        DTYPE=noise_kernels.TYPES[out.dtype], WIDTH=width, UNIT=unit,
    )  # fmt: skip
    assert float((out - noise.normal(0, offset, len(out))).abs().max()) < 1e-13


@pytest.mark.usefixtures("sizes")
@pytest.mark.parametrize("mode", ["fast", "secure"])
@pytest.mark.parametrize("rows", [0, 3, 9])
def test_the_sum_gets_the_noise_of_its_place(mode: str, rows: int) -> None:
    """Fused into the sum, whether or not its rows are split; threshold from the host and from the device."""
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(rows, n, generator=generator, dtype=torch.float64) for n in (37, 16, 1, 0, 40)]
    quiet = torch.cat(clip_sum_noise(parts, 0.3).sum)
    for threshold in (0.3, torch.tensor(0.3, dtype=torch.float64)):
        noise = Noise._with_key(KEY, mode)
        noisy = torch.cat(clip_sum_noise(parts, threshold, 2.0, noise).sum)
        assert float((noisy - quiet - 0.6 * noise.normal(0, 0, len(quiet))).abs().max()) < 1e-13
        assert noise._draws == 1
    half = clip_sum_noise([p.float() for p in parts], torch.tensor(0.3, dtype=torch.bfloat16), 2.0, Noise(seed=1))
    spread = 2 * float(torch.tensor(0.3, dtype=torch.bfloat16))
    still = clip_sum_noise([p.float() for p in parts], torch.tensor(0.3, dtype=torch.bfloat16))
    added = torch.cat(half.sum) - torch.cat(still.sum)
    assert float((added - spread * Noise(seed=1).normal(0, 0, len(added))).abs().max()) < 1e-5


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_noise_is_written_where_the_tensor_lies(dtype: torch.dtype) -> None:
    whole = torch.full((400,), 7.0, dtype=dtype)
    for view in (whole[100:301], whole.view(20, 20)[:, 3], whole.view(20, 20)[5:7].t()):
        kept = whole.clone()
        expected = kept.clone()
        expected.set_(kept.untyped_storage(), view.storage_offset(), view.size(), view.stride())
        with use_backend("torch"):
            add_gaussian_noise_(expected, 1.0, Noise(seed=0))
        version = whole._version
        assert add_gaussian_noise_(view, 1.0, Noise(seed=0)) is view
        assert whole._version > version
        torch.testing.assert_close(whole, kept, rtol=torch.finfo(dtype).eps, atol=1e-6)
        whole.fill_(7.0)


def test_noise_that_is_refused() -> None:
    leaf = torch.zeros(3, requires_grad=True)
    with pytest.raises(kernels.BackendError, match="requires grad"):
        add_gaussian_noise_(leaf, 1.0, Noise(seed=0))
    with torch.inference_mode():
        assert bool(add_gaussian_noise_(torch.zeros(3), 1.0, Noise(seed=0)).all())
    with torch.no_grad():
        assert add_gaussian_noise_(leaf, 1.0, Noise(seed=0)) is leaf and bool(leaf.any())
    x = torch.zeros(10)
    with pytest.raises(kernels.BackendError, match="share memory"):
        add_gaussian_noise_([x, x[9:]], 1.0, Noise(seed=0))
    add_gaussian_noise_([x[:9], x[9:]], 1.0, Noise(seed=0))


# --- The rest ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.usefixtures("sizes")
def test_quantiles_of_awkward_values(dtype: torch.dtype) -> None:
    values = torch.tensor([3.0, 0.0, torch.inf, 1e-40, torch.nan, 2.0, 2.0, 1e38, torch.nan, 7e-46], dtype=dtype)
    values[4] = torch.copysign(values[4], torch.tensor(-1.0, dtype=dtype))
    for q in (0.0, 0.1, 0.35, 0.6, 0.8, 0.81, 1.0):
        expected = kernels.norm_quantile.reference(values, q)
        torch.testing.assert_close(kernels.norm_quantile(values, q), expected, rtol=0, atol=0, equal_nan=True)
    many = torch.rand(77, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    for q in (0.01, 0.5, 0.9, 0.999):
        assert torch.equal(kernels.norm_quantile(many, q), kernels.norm_quantile.reference(many, q))


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_alignment_does_not_change_a_bit(dtype: torch.dtype) -> None:
    """Whole blocks that start at 16 bytes are read another way."""
    values = torch.randn(3, 48, generator=torch.Generator().manual_seed(0)).to(dtype)
    askew = torch.cat([values.new_zeros(1), values.flatten()])[1:].view(3, 48)
    assert values.data_ptr() % 16 == 0 and askew.data_ptr() % 16 != 0 and askew.is_contiguous()
    one, other = (clip_sum_noise([x], 0.7, 1.0, Noise(seed=3)) for x in (values, askew))
    expected = clip_sum_noise.reference([values], 0.7, 1.0, Noise(seed=3))
    for a, b, c in zip([*one.sum, one.norm_sq], [*other.sum, other.norm_sq], [*expected.sum, one.norm_sq], strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, c, rtol=1e-6, atol=1e-6)
    add_gaussian_noise_([values, askew], 1.0, Noise(seed=4))
    flat = Noise(seed=4).normal(0, 0, 2 * values.numel()).view(2, 3, 48)
    torch.testing.assert_close(values.double() - askew.double(), flat[0] - flat[1], rtol=0, atol=0.07)


@pytest.mark.usefixtures("sizes")
def test_same_bits_on_every_run() -> None:
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(9, n, generator=generator) for n in (200, 3, 57)]

    def run() -> list[Tensor]:
        out = clip_sum_noise(parts, 0.7, 1.0, Noise(seed=3))
        return [out.norm_sq, *out.sum]

    first = run()
    assert all(torch.equal(a, b) for _ in range(2) for a, b in zip(run(), first, strict=True))


def test_partial_results_stay_small(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: made.append((x := empty(*a, **k)).numel() * x.itemsize) or x)
    for rows, cols in [(2, 60_000), (64, 3000), (300, 5), (1, 100_000)]:
        made.clear()
        grad_norm_sq(torch.ones(rows, cols))
        assert sum(made) <= 4 * rows + 8 * cols, (rows, cols, made)


def test_what_is_not_taken() -> None:
    with pytest.raises(kernels.BackendError, match=r"torch\.func"):
        torch.func.vmap(grad_norm_sq)(torch.ones(2, 3, 4))
    with pytest.raises(kernels.BackendError, match="is on meta"):
        grad_norm_sq(torch.ones(3, 4, device="meta"))
    with pytest.raises(kernels.BackendError, match="a tensor is on meta"):
        clip_coef(torch.ones(3), torch.tensor(1.0, device="meta"))


def test_views_that_negate() -> None:
    x = torch._neg_view(torch.ones(2, 3))
    assert clip_sum(x, torch.ones(2)).tolist() == [-2.0] * 3
    y = torch.zeros(4)
    add_gaussian_noise_(y, 1.0, Noise(seed=0))
    z = torch._neg_view(torch.zeros(4))
    add_gaussian_noise_(z, 1.0, Noise(seed=0))
    assert torch.equal(y, z)
