"""The Triton kernels of layers in Triton's interpreter, on CPU tensors: started by test_triton.py."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from typing import Any

import pytest
import torch
from hostile_samples import BOUND, exact_norm_sq, flat_norm, generator, randn, samples
from spec_checks import check_case
from torch import Tensor
from triton_interpreted import on_triton, poison  # noqa: F401  for every test

import adamix_kernels as kernels
from adamix_kernels import clip_coef, use_backend
from adamix_kernels.ops._cases import randn as normal
from adamix_kernels.ops._factored import always, half_coef, layer_case, sum_error
from adamix_kernels.spec import Case, Op
from adamix_kernels.triton import launch

OPS = [
    kernels.scale_shift_norm_sq,
    kernels.scale_shift_clip_sum,
    kernels.embedding_norm_sq,
    kernels.embedding_clip_sum,
    kernels.conv_norm_sq,
    kernels.conv_clip_sum,
]
ACTUAL = launch.LAYER_LAUNCHES["interpreter"]
#: Many programs, tiles, chunks and runs that cross them even of small inputs.
TINY = replace(
    ACTUAL, channel_tile=16, embedding_width=4, embedding_chunk=5, conv_inner=16, conv_mixed=16, conv_outer=16,
    conv_chain=32, conv_step=16, conv_width=32,
)  # fmt: skip


@pytest.fixture(params=["actual", "tiny"])
def sizes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(launch.LAYER_LAUNCHES, "interpreter", TINY if request.param == "tiny" else ACTUAL)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(launch.LAYER_LAUNCHES, "interpreter", TINY)


def channels_for_a_tap(**extra: Any) -> Case:
    """Enough of them for tiles of one tap each; two groups, two chains of positions."""
    layer = (lambda g, size: normal(g, size, 34, 5, 14), lambda g, size: normal(g, size, 36, 5, 7))
    settings = {"kernel_size": (1, 3), "stride": (1, 2), "padding": (0, 1), "dilation": 1, "groups": 2, "bias": True}
    return layer_case("one tap", 2, layer, {**{key: always(value) for key, value in settings.items()}, **extra})


def runs() -> Iterator[Any]:
    more = {kernels.conv_norm_sq: [channels_for_a_tap()], kernels.conv_clip_sum: [channels_for_a_tap(coef=half_coef)]}
    for op in OPS:
        for case, dtype in itertools.product([*op.cases(), *more.get(op, [])], op.backends["triton"].dtypes):
            name = f"{op.name}-{case.name}-{str(dtype).removeprefix('torch.')}"
            yield pytest.param(op, case, dtype, id=name.replace(" ", "_"))


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize(("op", "case", "dtype"), list(runs()))
def test_agrees_with_the_float64_definition(op: Op[..., Any], case: Case, dtype: torch.dtype) -> None:
    check_case(op, "triton", case, dtype, "cpu")


@pytest.mark.parametrize(("op", "case", "dtype"), [run for run in runs() if run.values[2] is torch.float32])
def test_agrees_as_launched(op: Op[..., Any], case: Case, dtype: torch.dtype) -> None:
    """In one type: the sizes of a launch do not depend on it."""
    check_case(op, "triton", case, dtype, "cpu")


# --- What one sample contributes --------------------------------------------------------------------------------------


class Layer:
    """A layer's two ops on factors `[B, T, I]` and `[B, T, O]`, and the entries of its gradient as sums of products."""

    def __init__(self, name: str, positions: int) -> None:
        self.name = name
        self.ids = torch.randint(3, (1, positions), generator=generator(positions))

    def norm_sq(self, a: Tensor, g: Tensor) -> Tensor:
        if self.name == "embedding":
            return kernels.embedding_norm_sq(self.ids.expand(g.shape[:2]), g)
        if self.name == "conv":
            return kernels.conv_norm_sq(a.mT, g.mT, (1,), groups=2, bias=True)
        return kernels.scale_shift_norm_sq(a, g)

    def clip_sum(self, a: Tensor, g: Tensor, coef: Tensor) -> Any:
        if self.name == "embedding":
            return kernels.embedding_clip_sum(self.ids.expand(g.shape[:2]), g, coef, 3)
        if self.name == "conv":
            return kernels.conv_clip_sum(a.mT, g.mT, coef, (1,), groups=2, bias=True)
        return kernels.scale_shift_clip_sum(a, g, coef)

    def entries(self, a: Tensor, g: Tensor) -> dict[Any, list[tuple[float, float]]]:
        x, y, steps = a[0].double().tolist(), g[0].double().tolist(), range(a.shape[1])
        inner, outer = a.shape[2], g.shape[2]
        shift = {o: [(y[t][o], 1.0) for t in steps] for o in range(outer)}
        if self.name == "embedding":
            of = {(v, o): [t for t in steps if self.ids[0, t] == v] for v in range(3) for o in range(outer)}
            return {(v, o): [(y[t][o], 1.0) for t in positions] for (v, o), positions in of.items()}
        if self.name == "conv":
            same = [(o, i) for o in range(outer) for i in range(inner) if o // (outer // 2) == i // (inner // 2)]
        else:
            same = [(i, i) for i in range(inner)]
        return {**{(o, i): [(y[t][o], x[t][i]) for t in steps] for o, i in same}, **shift}


SHAPES = {"scale_shift": (20, 6, 6), "embedding": (12, 3, 5), "conv": (34, 4, 6)}


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("narrow", [False, True])
def test_contribution_is_bounded(name: str, narrow: bool) -> None:
    """Whichever backends the norm and the sum come from."""
    dtype = (
        (torch.bfloat16 if narrow else torch.float32) if name == "conv" else torch.float32 if narrow else torch.float64
    )
    layer, batch = Layer(name, SHAPES[name][0]), list(samples(dtype, [SHAPES[name]]))[::2]
    assert len(batch) > 20
    factors = [torch.cat(parts) for parts in zip(*batch, strict=True)]
    norms = [layer.norm_sq(*factors)]
    with use_backend("torch"):
        norms.append(layer.norm_sq(*factors))
    for norm_sq, (a, g) in zip(torch.minimum(*norms), batch, strict=True):
        threshold = min(max(float(norm_sq.sqrt()) * 0.7, 1e-25), 1e25)
        for backend in ("triton", "torch"):
            with use_backend(backend):
                total = layer.clip_sum(a, g, clip_coef.reference(norm_sq[None], threshold))
            assert flat_norm(total) <= threshold * BOUND, backend


@pytest.mark.parametrize("name", SHAPES)
def test_norms_are_never_below_the_exact_value(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In rational arithmetic; and for a convolution not below that of what a sum in float32 may make of it."""
    monkeypatch.setitem(launch.LAYER_LAUNCHES, "interpreter", replace(TINY, conv_width=2))
    layer = Layer(name, 6)
    layer.ids.zero_()
    for a, g in samples(torch.float32, [(6, 2, 2)]):
        got = float(layer.norm_sq(a, g))
        exact = exact_norm_sq(layer.entries(a, g))
        assert got == math.inf or Fraction(got) >= exact
        if name == "conv" and got < 1e30:
            x, y = (z.double().unflatten(2, (2, -1)) for z in (a, g))
            length = ((x.square().sum(3) + 1) * y.square().sum(3)).sqrt().sum(1)[0]
            least = math.sqrt(exact) + float(sum_error(length, a.shape[1], torch.float32).norm())
            assert math.sqrt(got) >= least * (1 - 1e-9)


@pytest.mark.usefixtures("sizes")
@pytest.mark.parametrize("name", ["scale_shift", "embedding"])
def test_cancelling_sample_does_not_blur_the_others(name: str) -> None:
    """Its large terms meet its own opposites before they meet another sample."""
    a, g = randn(1, 6, 22, 3), randn(2, 6, 22, 3)
    a[4, 11:], g[4, 11:] = a[4, :11], -g[4, :11]
    g[4] *= 1e18
    layer = Layer(name, 22)
    layer.ids = torch.arange(11).repeat(2)[None] % 3
    coef = torch.ones(6, dtype=torch.float64)
    coef[4] = 1e-5
    alone = torch.zeros_like(coef)
    alone[4] = coef[4]

    def run(weights: Tensor) -> Tensor:
        sums = layer.clip_sum(a, g, weights)
        return sums if isinstance(sums, Tensor) else torch.stack(sums)

    torch.testing.assert_close(run(coef), run(coef - alone) + run(alone), rtol=1e-12, atol=1e-10)


@pytest.mark.usefixtures("sizes")
@pytest.mark.parametrize("name", SHAPES)
def test_samples_with_factor_0_add_exactly_nothing(name: str) -> None:
    a, g, layer = randn(1, 6, 30, 4).float(), randn(2, 6, 30, 6 if name == "conv" else 4).float(), Layer(name, 30)
    coef = torch.tensor([0.5, 0.0, 0.7, -1.0, 0.0, torch.nan])
    spoilt = [x.clone() for x in (a, g)]
    for x in spoilt:
        x[1], x[3], x[4, 3], x[5] = torch.nan, torch.inf, 1e38, -torch.inf
    kept = torch.tensor([0, 2])
    wanted = layer.clip_sum(a[kept], g[kept], coef[kept])
    torch.testing.assert_close(flat(layer.clip_sum(*spoilt, coef)), flat(wanted), rtol=1e-6, atol=1e-7)
    expected = layer.norm_sq(*spoilt).isinf().tolist()
    assert expected == [False, True, False, True, True, True]


def flat(sums: Any) -> Tensor:
    return torch.cat([x.flatten() for x in ([sums] if isinstance(sums, Tensor) else sums) if x is not None])


# --- Embeddings -------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("ids", [1, 3, 100])
def test_runs_of_every_length_cross_chunks(ids: int) -> None:
    """Chunks of five: runs of one sample within, across and over several of them, and ids over many samples."""
    for seed, shape in enumerate([(9, 4), (4, 23), (1, 40), (3, 5), (13, 1), (2, 15)]):
        indices = torch.randint(ids, shape, generator=generator(seed)).sort(dim=1).values
        g, coef = randn(seed, *shape, 5), randn(seed + 1, shape[0]).abs()
        coef[seed % shape[0]] = 0.0
        padding = None if seed % 2 else 0
        norm_sq = kernels.embedding_norm_sq(indices, g, padding)
        total = kernels.embedding_clip_sum(indices, g, coef, ids, padding)
        with use_backend("torch"):
            assert torch.equal(norm_sq, kernels.embedding_norm_sq(indices, g, padding))
            wanted = kernels.embedding_clip_sum(indices, g, coef, ids, padding)
        torch.testing.assert_close(total, wanted, rtol=1e-12, atol=1e-12)


def test_ids_beyond_the_rows_write_nothing() -> None:
    """On a GPU they are not checked."""
    guarded = torch.full((8, 3), 7.0)
    indices, g = torch.tensor([[4, -1, 3, 9, 4]]), torch.ones(1, 5, 3)
    run = kernels.embedding_clip_sum.backends["triton"].run
    zeros = torch.zeros
    torch.zeros = lambda *size, **_: guarded[2 : 2 + size[0]].zero_()  # type: ignore[assignment]
    try:
        total = run(indices=indices, backprops=g, coef=torch.ones(1), num_embeddings=4, padding_idx=None)
    finally:
        torch.zeros = zeros
    assert total[:, 0].tolist() == [0, 0, 0, 1] and bool((guarded[[0, 1, 6, 7]] == 7).all())


# --- Launches ---------------------------------------------------------------------------------------------------------


def test_what_is_not_taken() -> None:
    x = torch.ones(2, 4, 3, dtype=torch.float64)
    with pytest.raises(kernels.BackendError, match="does not compute in"):
        kernels.conv_norm_sq(x, x, (1,))
    long = torch.ones(1, 1, 1).expand(1, 1, 2**30 + 1)
    with pytest.raises(kernels.BackendError, match="takes 2"):
        kernels.conv_norm_sq(long, long, (1,))
