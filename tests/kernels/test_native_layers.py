"""The compiled kernels of embeddings and of affine parts: their bounds, their bits, and what they do not read."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from fractions import Fraction
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from hostile_samples import BOUND, exact_norm_sq, generator, randn, samples, worst_contribution
from torch import Tensor

from adamix_kernels import (
    BackendError,
    clip_coef,
    embedding_clip_sum,
    embedding_norm_sq,
    native,
    scale_shift_clip_sum,
    scale_shift_norm_sq,
    use_backend,
)
from adamix_kernels.spec import FLOAT_DTYPES

pytestmark = pytest.mark.skipif(isinstance(native.load(), str), reason="the compiled CPU kernels were not built")


@pytest.fixture(autouse=True)
def compiled() -> Iterator[ModuleType]:
    found = native.compiled()
    with use_backend("cpp"):
        yield found
    found.use_isa(found.best_isa())


def embed(ids: Tensor, g: Tensor, rows: int, padding: int | None = None) -> tuple[Tensor, ...]:
    return embedding_norm_sq(ids, g, padding), embedding_clip_sum(ids, g, factors(g), rows, padding)


def scale(a: Tensor, g: Tensor) -> tuple[Tensor, ...]:
    return scale_shift_norm_sq(a, g), *scale_shift_clip_sum(a, g, factors(g))


def factors(g: Tensor) -> Tensor:
    """Of each sample; that of the third is 0."""
    return torch.linspace(0.1, 1, len(g), dtype=torch.float64) * (torch.arange(len(g)) != 2)


def few(count: int, *shape: int) -> Tensor:
    """Ids, the small ones more often than the large."""
    return (count ** torch.rand(shape, generator=generator(count), dtype=torch.float64) - 1).long()


def channels_first(x: Tensor) -> Tensor:
    return x.movedim(-1, 1).contiguous().movedim(1, -1)


#: (positions, columns): about the sizes of a chunk of positions and of a block of columns.
EMBEDDINGS = [((), 1), ((1,), 30), ((63,), 5), ((64,), 33), ((65,), 1), ((200,), 257), ((9, 30), 1024), ((130,), 2051)]
LAYERS = [((), 40), ((1,), 7), ((3,), 512), ((2, 50), 31), ((70,), 32), ((301,), 1), ((64,), 8), ((8, 17), 1100)]


# --- The same as the reference, and the same bits everywhere ----------------------------------------------------------


def assert_same(mine: tuple[Tensor, ...], reference: tuple[Tensor, ...]) -> None:
    torch.testing.assert_close(mine[0], reference[0], rtol=2.5e-7, atol=0)
    for one, other in zip(mine[1:], reference[1:], strict=True):
        rtol = 1e-13 if one.dtype == torch.float64 else 1.2e-7
        torch.testing.assert_close(one, other, rtol=rtol, atol=1e-13 * float(other.abs().max()))


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("padding", [None, 1])
@pytest.mark.parametrize(("middle", "width"), EMBEDDINGS)
def test_embedding_is_the_reference(
    middle: tuple[int, ...], width: int, padding: int | None, dtype: torch.dtype
) -> None:
    for rows in (2, 7, 300, 70_000):
        ids, g = few(rows, 5, *middle), randn(1, 5, *middle, width).to(dtype)
        if rows * width > 1 << 20:
            continue
        with use_backend("torch"):
            expected = embed(ids, g, rows, padding)
        assert_same(embed(ids.int() if rows == 7 else ids, g, rows, padding), expected)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize(("middle", "width"), LAYERS)
def test_scale_shift_is_the_reference(middle: tuple[int, ...], width: int, dtype: torch.dtype) -> None:
    a, g = randn(1, 9, *middle, width).to(dtype), randn(2, 9, *middle, width).to(dtype)
    with use_backend("torch"):
        expected, without = scale(a, g), scale_shift_norm_sq(a, g, False)
    first = channels_first(a), channels_first(g)
    for x, y in ((a, g), first, (a, first[1]), (first[0], g)):
        assert_same(scale(x, y), expected)
        torch.testing.assert_close(scale_shift_norm_sq(x, y, False), without, rtol=2.5e-7, atol=0)
        assert scale_shift_clip_sum(x, y, factors(y), False).bias is None


@pytest.mark.parametrize("types", [(0, 1), (1, 2), (2, 0), (3, 1), (0, 3)])
def test_activations_and_backprops_of_two_types(types: tuple[int, int]) -> None:
    a, g = (randn(i, 4, 30, 12).to(FLOAT_DTYPES[t]) for i, t in enumerate(types))
    with use_backend("torch"):
        expected = scale(a, g)
    assert_same(scale(a, g), expected)
    assert_same(scale(channels_first(a), g), expected)


CALLS: dict[str, Callable[[torch.dtype], tuple[Tensor, ...]]] = {
    "embedding": lambda dtype: embed(few(90, 7, 150), randn(1, 7, 150, 1500).to(dtype), 120, 2),
    "embedding of one sample": lambda dtype: embed(few(90, 1, 700), randn(1, 1, 700, 300).to(dtype), 5000),
    "scale and shift": lambda dtype: scale(randn(1, 9, 70, 700).to(dtype), randn(2, 9, 70, 700).to(dtype)),
    "many samples": lambda dtype: scale(randn(1, 150, 20, 30).to(dtype), randn(2, 150, 20, 30).to(dtype)),
    "few channels": lambda dtype: scale(randn(1, 9, 2500, 3).to(dtype), randn(2, 9, 2500, 3).to(dtype)),
    "channels first": lambda dtype: scale(*(channels_first(randn(i, 9, 70, 100).to(dtype)) for i in (1, 2))),
}


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_same_bits_for_every_instruction_set_and_thread_count(
    compiled: ModuleType, name: str, dtype: torch.dtype
) -> None:
    call, threads, tried = CALLS[name], torch.get_num_threads(), 0
    expected = call(dtype)
    try:
        for isa in compiled.Isa.__members__.values():
            if int(isa) > int(compiled.best_isa()):
                continue
            compiled.use_isa(isa)
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                assert all(map(torch.equal, call(dtype), expected))
                tried += 1
    finally:
        torch.set_num_threads(threads)
    assert tried >= 3


def test_every_result_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = {name: call(torch.float32) for name, call in CALLS.items()}
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: empty(*args, **kwargs).fill_(torch.nan))
    for name, call in CALLS.items():
        assert all(map(torch.equal, call(torch.float32), expected[name]))


def test_rows_of_an_embedding_are_added_by_sample_and_position() -> None:
    ids, g, coef = few(6, 70, 3), randn(1, 70, 3), randn(2, 70).abs()
    expected = [0.0] * 6
    for b in range(70):
        own = [0.0] * 6
        for i, x in zip(ids[b].tolist(), g[b].tolist(), strict=True):
            own[i] += x
        expected = [total + float(coef[b]) * x for total, x in zip(expected, own, strict=True)]
    assert embedding_clip_sum(ids, g[..., None], coef, 6)[:, 0].tolist() == expected


# --- What one sample contributes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("backends", [("cpp", "cpp"), ("cpp", "torch"), ("torch", "cpp")], ids="-".join)
def test_contributions_are_bounded(backends: tuple[str, str], dtype: torch.dtype) -> None:
    """Whichever backend computes the norm, and whichever the sum."""
    for trial, (a, g) in enumerate(samples(dtype, [(2, 1, 1), (6, 5, 5), (64, 20, 20)])):
        ids = torch.randint(1 + trial % 4, g.shape[:2], generator=generator(trial))
        with use_backend(backends[0]):
            norms = embedding_norm_sq(ids, g), scale_shift_norm_sq(a, g)
        with use_backend(backends[1]):
            assert worst_contribution(norms[0], lambda coef, i=ids, g=g: embedding_clip_sum(i, g, coef, 4)) <= BOUND
            assert worst_contribution(norms[1], lambda coef, a=a, g=g: scale_shift_clip_sum(a, g, coef)) <= BOUND


def test_norms_are_never_below_the_exact_value() -> None:
    for a, g in samples(torch.float32, [(2, 1, 1), (6, 2, 2), (16, 3, 3)]):
        x, y = a[0].double().tolist(), g[0].double().tolist()
        steps, width = range(len(x)), range(g.shape[2])
        weight = {("weight", i): [(y[t][i], x[t][i]) for t in steps] for i in width}
        bias = {i: [(y[t][i], 1.0) for t in steps] for i in width}
        rows = {(t % 2, i): [(y[s][i], 1.0) for s in steps if s % 2 == t % 2] for t in steps for i in width}
        for norm_sq, exact in [
            (scale_shift_norm_sq(a, g), {**weight, **bias}),
            (scale_shift_norm_sq(channels_first(a), channels_first(g), False), weight),
            (embedding_norm_sq(torch.zeros(g.shape[:2], dtype=torch.int64), g), bias),
            (embedding_norm_sq(torch.arange(g.shape[1])[None] % 2, g), rows),
        ]:
            assert float(norm_sq) == math.inf or Fraction(float(norm_sq)) >= exact_norm_sq(exact)


@pytest.mark.parametrize("layer", ["embedding", "scale_shift", "channels_first"])
def test_cancelling_sample_does_not_blur_the_others(layer: str) -> None:
    a, g = randn(1, 20, 22, 6), randn(2, 20, 22, 6)
    a[7, 11:], g[7, 11:] = a[7, :11], -g[7, :11]
    g[7] *= 1e18
    coef = torch.ones(20, dtype=torch.float64)
    coef[7] = 1e-5

    def run(weights: Tensor) -> Tensor:
        if layer == "embedding":
            return embedding_clip_sum(torch.zeros(20, 22, dtype=torch.int64), g, weights, 1)
        x, y = (channels_first(a), channels_first(g)) if layer == "channels_first" else (a, g)
        return scale_shift_clip_sum(x, y, weights).weight

    alone = torch.zeros_like(coef)
    alone[7] = coef[7]
    torch.testing.assert_close(run(coef), run(coef - alone) + run(alone), rtol=1e-12, atol=1e-10)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("coef", [0.0, -1.0, torch.nan])
def test_samples_that_are_not_finite(bad: float, coef: float) -> None:
    """Their norm is infinite; without a positive factor nothing of them is read."""
    a, g, ids = randn(1, 5, 90, 40), randn(2, 5, 90, 40), few(30, 5, 90)
    keep = torch.arange(5) != 3
    for at in [(3, 0, 0), (3, 89, 39), (3, 45, 20)]:
        x, y = a.clone(), g.clone()
        x[at] = y[at] = bad
        weights = torch.where(keep, 0.5, coef)
        for norm_sq in (embedding_norm_sq(ids, y), scale_shift_norm_sq(a, y), scale_shift_norm_sq(x, g, False)):
            assert norm_sq.isinf().tolist() == (~keep).tolist()
        for result, expected in zip(
            (embedding_clip_sum(ids, y, weights, 30), *scale_shift_clip_sum(x, y, weights)),
            (embedding_clip_sum(ids, g, 0.5 * keep, 30), *scale_shift_clip_sum(a, g, 0.5 * keep)),
            strict=True,
        ):
            assert torch.equal(result, expected)


# --- Sizes ------------------------------------------------------------------------------------------------------------


def test_many_positions_of_one_id() -> None:
    """Small whole numbers, whose sums are exact."""
    g = (
        torch.arange(200_000, dtype=torch.float32)
        .remainder(7)
        .reshape(2, 100_000, 1)
        .expand(2, 100_000, 3)
        .contiguous()
    )
    ids = torch.full((2, 100_000), 4)
    exact = g.double().sum(1)
    squares = exact.square().sum(1)
    norm_sq, total = embed(ids, g, 6)
    assert (norm_sq.double() >= squares).all() and (norm_sq.double() <= squares * (1 + 2e-7)).all()
    torch.testing.assert_close(total[4], (factors(g)[:, None] * exact).sum(0).float())
    assert not total[[0, 1, 2, 3, 5]].any()
    ids[:, ::2] = torch.arange(50_000)  # and half of them of an id each
    with use_backend("torch"):
        expected = embed(ids, g, 50_000)
    assert_same(embed(ids, g, 50_000), expected)


def test_ids_of_every_size_are_told_apart() -> None:
    """By each of their eight bytes."""
    ids = torch.tensor([[0, *(1 << shift for shift in range(62)), -1, 1 << 62, 3]])
    ones = torch.ones(1, 66, 1)
    assert embedding_norm_sq(ids, ones)[0] == pytest.approx(66, rel=1e-6)
    assert embedding_norm_sq(ids.repeat(1, 3), ones.repeat(1, 3, 1))[0] == pytest.approx(9 * 66, rel=1e-6)
    assert embedding_norm_sq(ids, ones, padding_idx=1 << 40)[0] == pytest.approx(65, rel=1e-6)


def test_more_elements_than_32_bits_count() -> None:
    """Memory that is mapped but never written costs none; samples without a factor are not read."""
    size, width = 2000, 1_100_000
    x = torch.from_numpy(np.zeros((size, 1, width), dtype=np.int16)).view(torch.bfloat16)
    x[-1, 0, 5], x[0, 0, 7] = 3.0, 2.0
    coef = torch.zeros(size)
    coef[0], coef[-1] = 0.5, 1.0
    ids = torch.arange(size)[:, None] % 2
    total = embedding_clip_sum(ids, x, coef, 2)
    assert total.nonzero().tolist() == [[0, 7], [1, 5]] and total[1, 5] == 3 and total[0, 7] == 1
    sums = scale_shift_clip_sum(x, x, coef)
    assert sums.weight.nonzero().flatten().tolist() == [5, 7] and sums.weight[5] == 9 and sums.bias[7] == 1


MEMORY = """
import re, torch
from adamix_kernels import embedding_clip_sum, embedding_norm_sq, use_backend
def peak():
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])
rows = 1 << 20
ids = torch.randint(rows, (8, 1000), generator=torch.Generator().manual_seed(0))
g, coef = torch.ones(8, 1000, 16), torch.ones(8)
with use_backend("cpp"):
    embedding_norm_sq(ids[:, :9], g[:, :9]), embedding_clip_sum(ids[:, :9] % 5, g[:, :9], coef, 5)
    before = peak()
    embedding_norm_sq(ids, g)
    norm = peak() - before
    total = embedding_clip_sum(ids, g, coef, rows)
print(norm, (peak() - before - norm) / (4 * total.numel()))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of resident memory as Linux reports it")
def test_nothing_but_the_result_is_as_large_as_the_vocabulary() -> None:
    done = subprocess.run([sys.executable, "-c", MEMORY], check=True, capture_output=True, text=True)
    norm, total = map(float, done.stdout.split())
    assert norm < 1 << 21 and 0.9 < total < 1.1


# --- Arguments --------------------------------------------------------------------------------------------------------


class Subclass(torch.Tensor):
    pass


def test_every_tensor_of_a_call_is_looked_at() -> None:
    ids, x, coef = torch.zeros(2, 3, dtype=torch.int64), torch.ones(2, 3, 4), torch.ones(2)
    calls: list[tuple[Callable[..., Any], list[Any]]] = [
        (embedding_norm_sq, [ids, x]),
        (lambda *given: embedding_clip_sum(*given, 5), [ids, x, coef]),
        (scale_shift_norm_sq, [x, x]),
        (scale_shift_clip_sum, [x, x, coef]),
    ]
    for call, given in calls:
        for i, tensor in enumerate(given):
            with pytest.raises(BackendError, match="is a Subclass"):
                call(*given[:i], tensor.as_subclass(Subclass), *given[i + 1 :])


def test_an_index_beyond_the_table_is_refused() -> None:
    for index in (-1, 5):
        with pytest.raises(ValueError, match=f"indices holds {index}"):
            embedding_clip_sum(torch.full((2, 3), index), torch.ones(2, 3, 4), torch.ones(2), 5)


def test_factors_of_every_type() -> None:
    ids, g = few(20, 4, 30), randn(1, 4, 30, 9)
    for dtype in FLOAT_DTYPES:
        coef = factors(g).to(dtype)
        with use_backend("torch"):
            expected = embedding_clip_sum(ids, g, coef, 20), scale_shift_clip_sum(g, g, coef)
        torch.testing.assert_close(embedding_clip_sum(ids, g, coef, 20), expected[0], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(scale_shift_clip_sum(g, g, coef), expected[1], rtol=1e-12, atol=1e-12)


def test_no_history_and_negated_views() -> None:
    g = torch.complex(randn(1, 2, 5, 6), randn(2, 2, 5, 6)).conj().imag.requires_grad_()
    ids = few(4, 2, 5)
    assert g.is_neg()
    results = [*embed(ids, g, 4), *scale(g, g)]
    with use_backend("torch"):
        expected = [*embed(ids, g, 4), *scale(g, g)]
    assert not any(result.requires_grad for result in results)
    torch.testing.assert_close(results, expected, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("positions", [64, 1000, 100_000])
@pytest.mark.parametrize("layer", ["embedding", "scale", "shift"])
@pytest.mark.parametrize("first", [False, True])
def test_norms_leave_room_for_terms_that_another_order_of_additions_keeps(
    positions: int, layer: str, first: bool
) -> None:
    """Between 1 and -1 many terms too small to change 1: in order their sum vanishes, in pairs it does not."""
    g = torch.full((1, positions, 3), 1.1 * 2.0**-54, dtype=torch.float64)
    g[0, 0], g[0, -1] = 1.0, -1.0
    a = torch.zeros_like(g) if layer == "shift" else torch.ones_like(g)  # one part of the gradient alone
    ids, c = torch.zeros(1, positions, dtype=torch.int64), 1e-16
    if first:
        a, g = channels_first(a), channels_first(g)
    norm_sq = embedding_norm_sq(ids, g) if layer == "embedding" else scale_shift_norm_sq(a, g, layer == "shift")
    coef = clip_coef(norm_sq, c)
    exact = (positions - 2) * 1.1 * 2.0**-54 * math.sqrt(3)
    assert float(coef) * exact <= c * BOUND
