"""Public functions that are no ops, given anything: a result, or one line that names the argument."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from adamix import AdaMix, Config, InputError, Rows
from adamix.rows import check_rows
from adamix_kernels import DPEngine, Noise, PoissonSampler, grid_for

anything = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=4), st.binary(max_size=3),
    st.lists(st.integers(), max_size=2), st.just(object()), st.complex_numbers(), st.just(10**400),
    st.just(torch.ones(2)), st.just(np.ones(2)), st.just(torch.tensor(1.0)), st.just(np.float32(0.5)),
    st.sampled_from(["inf", "flat", "per_layer", "whiten", "secure", "fast", 1e-320, 1e308, -0.0]),
)  # fmt: skip
FIELDS = [f.name for f in dataclasses.fields(Config)]


def names_one(error: Exception, names: list[str]) -> bool:
    said = str(error)
    return any(said.startswith(name) for name in names) and "\n" not in said


@settings(max_examples=400, deadline=None)
@given(st.dictionaries(st.sampled_from(FIELDS), anything, min_size=1, max_size=3))
def test_config(changes: dict[str, Any]) -> None:
    try:
        config = Config(**{"epsilon": 3.0, "expected_batch_size": 100, **changes})
    except InputError as error:
        assert names_one(error, FIELDS)
    else:
        assert config.private_rows > 0 and isinstance(config.projects, bool)


arrays = st.one_of(
    anything,
    st.tuples(
        st.lists(st.integers(0, 4), max_size=3),
        st.sampled_from("f2 f4 f8 i1 i4 i8 u1 ? c8 S2 O M8[s]".split()),
        st.sampled_from([0, 1, -1, 3, 1e30, 1e300, math.nan, math.inf]),
        st.booleans(),
    ),
)


def array(spec: Any) -> Any:
    if not (isinstance(spec, tuple) and len(spec) == 4):
        return spec
    shape, dtype, value, as_tensor = spec
    with np.errstate(all="ignore"):
        try:
            made = np.full(shape, value).astype(dtype)
            return torch.from_numpy(made) if as_tensor else made
        except (ValueError, TypeError, OverflowError):
            return np.zeros(shape, dtype)


@pytest.mark.filterwarnings("ignore")
@settings(max_examples=600, deadline=None)
@given(arrays, arrays, st.sampled_from([None, 1, 3]), st.booleans(), st.booleans(), st.booleans())
def test_rows(x: Any, y: Any, classes: int | None, empty: bool, keep: bool, pair: bool) -> None:
    try:
        given_rows = (array(x), array(y)) if pair else array(x)
        rows = check_rows("private", given_rows, classes, allow_empty=empty, keep_integers=keep)
    except InputError as error:
        assert names_one(error, ["private: "])
    else:
        assert isinstance(rows, Rows) and bool(rows.x.isfinite().all()) and rows.y.dtype == torch.int64
        assert len(rows.x) == len(rows.y) and (len(rows.y) or empty) and bool((rows.y >= 0).all())


@pytest.mark.filterwarnings("ignore")
@settings(max_examples=40, deadline=None)
@given(
    reach=st.tuples(st.floats(-12, 12), st.floats(-45, 38)),
    counts=st.tuples(st.integers(0, 6), st.integers(0, 9)),
    width=st.integers(1, 5),
    classes=st.integers(1, 4),
    more=st.fixed_dictionaries(
        {},
        optional={
            "geometry": st.none(),
            "subspace_rank": st.integers(1, 9),
            "public_weight": st.sampled_from([0.0, 100.0]),
            "sample_rate": st.sampled_from([1e-3, 0.5]),
            "learning_rate": st.sampled_from([1e-12, 1.0]),
            "epsilon": st.sampled_from([1e-9, 1000.0, math.inf]),
            "noise_mode": st.just("secure"),
        },
    ),
)
def test_fit_of_any_finite_rows(reach: Any, counts: Any, width: int, classes: int, more: dict[str, Any]) -> None:
    """A model with weights that are numbers, or an error that says what is wrong."""
    generator = torch.Generator().manual_seed(width)
    sets = []
    for scale, count in zip(reach, counts, strict=True):
        y = torch.arange(count) % classes
        sets.append((torch.randn(count, width, generator=generator) * 10.0**scale, y))
    try:
        settings_ = {"epsilon": 1.0, "expected_batch_size": 9, "steps": 2, "public_steps": 5, **more}
        result = AdaMix(**settings_).fit(public=sets[0], private=sets[1])
    except InputError as error:
        assert names_one(error, ["public", "private", "model", "learning_rate"])
    else:
        assert all(not p.isnan().any() for p in result.model.parameters()) and result.epsilon <= settings_["epsilon"]


@settings(max_examples=200, deadline=None)
@given(anything, anything, anything, anything)
def test_sampler_and_noise(count: Any, rate: Any, steps: Any, seed: Any) -> None:
    try:
        sampler = PoissonSampler(count, rate, steps=steps, max_batch_size=None)
    except (TypeError, ValueError) as error:
        assert names_one(error, ["num_samples", "sample_rate", "steps", "max_batch_size"])
    else:
        assert 0 < sampler.sample_rate <= 1 and len(sampler) >= 1
    try:
        Noise(seed)
    except TypeError as error:
        assert names_one(error, ["seed"])


@settings(max_examples=300, deadline=None)
@given(anything, anything, st.booleans())
def test_grid_for(limit: Any, std: Any, one_fits: bool) -> None:
    try:
        grid = grid_for(limit, 1.0 if one_fits else std)
    except (TypeError, ValueError) as error:
        assert names_one(error, ["max_grad_norm", "std"])
    else:
        assert type(grid) is float and math.frexp(grid)[0] == 0.5


SETTINGS = ["max_grad_norm", "noise_multiplier", "expected_batch_size", "strategy", "clipping", "loss_reduction",
            "loss_scale"]  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.sampled_from(SETTINGS), anything, min_size=1, max_size=2))
def test_engine(changes: dict[str, Any]) -> None:
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    given_settings = {"max_grad_norm": 1.0, "noise_multiplier": 1.0, "expected_batch_size": 4, **changes}
    try:
        dp = DPEngine(model, optimizer, **given_settings)
    except (TypeError, ValueError) as error:
        assert names_one(error, SETTINGS)
        assert type(model.weight) is nn.Parameter, "nothing is left attached"
    else:
        dp.detach()
