"""Choosing a backend, checking arguments, and what importing does not do."""

from __future__ import annotations

import itertools
import subprocess
import sys
import warnings
from typing import Any

import pytest
import torch

import adamix_kernels as kernels
from adamix_kernels import native
from adamix_kernels.spec import OPS


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: kernels.grad_norm_sq([[1.0]]),
            TypeError,
            r"grad_norm_sq: grad_sample\[0\] is list; expected a tensor",
        ),
        (lambda: kernels.grad_norm_sq([]), ValueError, "grad_norm_sq: grad_sample is an empty list; pass at least one"),
        (lambda: kernels.grad_norm_sq(torch.tensor(1.0)), ValueError, r"has shape \[\]; expected \[B, \*\]"),
        (
            lambda: kernels.grad_norm_sq(torch.ones(2, 2).int()),
            TypeError,
            "has dtype torch.int32; expected one of float32",
        ),
        (
            lambda: kernels.grad_norm_sq([torch.ones(2, 2), torch.ones(3, 1)]),
            ValueError,
            r"grad_sample\[1\] has shape \[3, 1\]; expected \[B, \*\] with B=2 as in grad_sample\[0\]",
        ),
        (
            lambda: kernels.clip_sum(torch.ones(2, 3), torch.ones(4)),
            ValueError,
            r"clip_sum: coef has shape \[4\]; expected \[B\] with B=2 as in grad_sample",
        ),
        (
            lambda: kernels.clip_coef(torch.ones(2), 0.0),
            ValueError,
            "clip_coef: max_grad_norm is 0.0; pass a number above 0",
        ),
        (lambda: kernels.clip_coef(torch.ones(2), float("nan")), ValueError, "max_grad_norm is nan"),
        (lambda: kernels.clip_coef(torch.ones(2), torch.ones(2)), ValueError, r"max_grad_norm has shape \[2\]"),
        (
            lambda: kernels.clip_sum_noise(torch.ones(2, 3), 1.0, 1.0),
            ValueError,
            r"noise is None with noise_multiplier 1.0",
        ),
        (
            lambda: kernels.clip_sum_noise(torch.ones(2, 3), 1.0, -1.0),
            ValueError,
            "noise_multiplier is -1.0; pass a finite",
        ),
        (
            lambda: kernels.clip_sum_noise(torch.ones(2, 3), float("inf"), 1.0, kernels.Noise()),
            ValueError,
            "max_grad_norm is inf with noise_multiplier 1.0",
        ),
        (lambda: kernels.add_gaussian_noise_(torch.ones(2), -1.0, kernels.Noise()), ValueError, "std is -1.0"),
        (
            lambda: kernels.add_gaussian_noise_(torch.ones(2), 1.0, 3),
            TypeError,
            "noise is int; pass adamix_kernels.Noise",
        ),
        (lambda: kernels.norm_quantile(torch.ones(0), 0.5), ValueError, "norm_quantile: norm_sq is empty"),
        (lambda: kernels.norm_quantile(torch.ones(3), 1.5), ValueError, r"q is 1.5; pass a fraction in \[0, 1\]"),
        (lambda: kernels.subspace_basis(torch.ones(2, 3), rank=0), ValueError, "rank is 0"),
        (lambda: kernels.subspace_basis(torch.ones(2, 3), energy=2.0), ValueError, "energy is 2.0"),
        (
            lambda: kernels.softmax_head_clip_sum_noise(torch.ones(2, 3), torch.tensor([0, 5]), torch.ones(4, 3)),
            ValueError,
            r"labels lie in \[0, 5\]; weight has 4 classes",
        ),
        (
            lambda: kernels.softmax_head_clip_sum_noise(torch.ones(2, 3), torch.ones(2), torch.ones(4, 3)),
            TypeError,
            "labels has dtype torch.float32; expected one of int64, int32",
        ),
        (
            lambda: kernels.grad_norm_sq([torch.ones(2, 3).to_sparse()]),
            TypeError,
            r"grad_norm_sq: grad_sample\[0\] has layout torch.sparse_coo; pass a dense tensor \[B, \*\]",
        ),
        (
            lambda: kernels.grad_norm_sq(torch.ones(2, 3).to_mkldnn()),
            TypeError,
            "has layout torch._mkldnn; pass a dense",
        ),
        (
            lambda: kernels.grad_norm_sq(torch.nested.nested_tensor([torch.ones(2)], layout=torch.jagged)),
            TypeError,
            "grad_sample is nested; pass a dense",
        ),
        (lambda: kernels.clip_coef(torch.ones(2)), TypeError, "missing a required argument: 'max_grad_norm'"),
        (lambda: kernels.clip_coef(torch.ones(2), 1.0, 2.0), TypeError, "too many positional arguments"),
        (lambda: kernels.clip_coef(torch.ones(2), 1.0, norm=2.0), TypeError, "unexpected keyword argument 'norm'"),
        (lambda: kernels.clip_coef(torch.ones(2), norm_sq=torch.ones(2)), TypeError, "multiple values for argument"),
    ],
)
def test_bad_arguments_are_named(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("wide", ["features", "weight", "bias", None])
def test_head_sums_are_float64_if_any_of_its_tensors_is(wide: str | None) -> None:
    tensors = {"features": torch.ones(2, 3), "weight": torch.ones(4, 3), "bias": torch.ones(4)}
    if wide:
        tensors[wide] = tensors[wide].double()
    out = kernels.softmax_head_clip_sum_noise(labels=torch.tensor([0, 1]), **tensors)
    assert out.weight.dtype == out.bias.dtype == (torch.float64 if wide else torch.float32)
    assert out.norm_sq.dtype == out.loss.dtype == torch.float32


@pytest.mark.parametrize("dtypes", list(itertools.product([torch.float16, torch.float32, torch.float64], repeat=3)))
def test_sums_are_float64_if_what_is_summed_is(dtypes: tuple[torch.dtype, ...]) -> None:
    """The factors' type does not count."""
    a, g, coef = torch.ones(2, 3, dtype=dtypes[0]), torch.ones(2, 3, dtype=dtypes[1]), torch.ones(2, dtype=dtypes[2])
    one, both = ((torch.float64 if torch.float64 in given else torch.float32) for given in (dtypes[1:2], dtypes[:2]))
    assert kernels.clip_sum(g, coef).dtype == one
    assert [x.dtype for x in kernels.clip_sum([g, g.half()], coef)] == [one, torch.float32]
    assert kernels.clip_sum_noise(g, coef[0]).sum.dtype == one
    assert kernels.embedding_clip_sum(torch.zeros(2, dtype=torch.int64), g, coef, 1).dtype == one
    assert kernels.linear_clip_sum(a, g, coef).weight.dtype == both
    assert kernels.scale_shift_clip_sum(a, g, coef).weight.dtype == both
    assert kernels.conv_clip_sum(a[:, None], g[:, None], coef, (1,)).weight.dtype == both
    for norm_sq in (kernels.grad_norm_sq(g), kernels.linear_norm_sq(a, g), kernels.clip_coef(coef, 1.0)):
        assert norm_sq.dtype == torch.float32


def test_a_backend_that_cannot_run_raises_instead_of_falling_back() -> None:
    with (
        kernels.use_backend("triton"),
        pytest.raises(kernels.BackendError, match="lift: backend 'triton' was asked for but this op has no"),
    ):
        kernels.lift(torch.ones(2, 1), torch.ones(1, 2))
    with pytest.raises(ValueError, match="name: 'metal' is not a backend"), kernels.use_backend("metal"):
        pass


def test_use_backend_ends_with_its_block(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    op = kernels.grad_norm_sq
    monkeypatch.setattr(op, "reference", lambda **_: seen.append("torch"))
    monkeypatch.setattr(op, "backends", {})
    op.register("cpp", device="cpu")(lambda **_: seen.append("cpp"))  # type: ignore[arg-type]
    with kernels.use_backend("torch"):
        op(torch.ones(1, 1))
        with kernels.use_backend("cpp"):
            op(torch.ones(1, 1))
        op(torch.ones(1, 1))
    op(torch.ones(1, 1))
    assert seen == ["torch", "cpp", "torch", "cpp"]


def test_backends_tells_what_runs_and_why_not() -> None:
    table = kernels.backends()
    assert table.keys() == OPS.keys()
    assert all(states["torch"] == "runs" for states in table.values())
    assert table["linear_norm_sq"]["cuda"] == "this op has no 'cuda' implementation"


def test_a_broken_build_warns_once_and_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    native.load.cache_clear()
    monkeypatch.setitem(sys.modules, "adamix_kernels._cpu", None)  # importing it now fails
    monkeypatch.setattr(native.importlib.util, "find_spec", lambda name: object())
    monkeypatch.delattr(kernels, "_cpu", raising=False)
    try:
        with pytest.warns(RuntimeWarning, match="do not load"):
            kernels.grad_norm_sq(torch.ones(2, 2))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            kernels.grad_norm_sq(torch.ones(2, 2))
        with kernels.use_backend("cpp"), pytest.raises(kernels.BackendError, match="do not load"):
            kernels.grad_norm_sq(torch.ones(2, 2))
    finally:
        native.load.cache_clear()


def test_a_missing_build_falls_back_in_peace(monkeypatch: pytest.MonkeyPatch) -> None:
    native.load.cache_clear()
    monkeypatch.setattr(native.importlib.util, "find_spec", lambda name: None)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert float(kernels.grad_norm_sq(torch.ones(1, 2))) == pytest.approx(2)
        assert "were not built" in kernels.backends()["grad_norm_sq"]["cpp"]
    finally:
        native.load.cache_clear()


def test_importing_is_light() -> None:
    check = (
        "import sys, torch, adamix_kernels\n"
        "loaded = {'triton', 'adamix', 'adamix_kernels._cpu'} & sys.modules.keys()\n"
        "assert not loaded and not torch.cuda.is_initialized(), loaded\n"
        "assert not adamix_kernels.cuda_library.load.cache_info().currsize"
    )
    subprocess.run([sys.executable, "-c", check], check=True, timeout=120)
