"""Every op x backend x dtype x case of its spec against its float64 definition."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from spec_checks import check_case, inputs

import adamix_kernels  # noqa: F401  registers every op
from adamix_kernels.spec import AUTO_ORDER, OPS, Case, Op

DEVICES = {"torch": ("cpu", "cuda"), "cpp": ("cpu",), "triton": ("cuda",), "cuda": ("cuda",)}


def runs() -> Iterator[Any]:
    for op in OPS.values():
        for backend in AUTO_ORDER:
            if op.why_not(backend) is None:
                for case, dtype, device in itertools.product(op.cases(), op.dtypes(backend), DEVICES[backend]):
                    name = f"{op.name}-{backend}-{case.name}-{str(dtype).removeprefix('torch.')}-{device}"
                    marks = [pytest.mark.gpu] if device == "cuda" else []
                    yield pytest.param(op, backend, case, dtype, device, id=name.replace(" ", "_"), marks=marks)


@pytest.mark.parametrize(("op", "backend", "case", "dtype", "device"), list(runs()))
def test_agrees_with_the_float64_definition(
    op: Op[..., Any], backend: str, case: Case, dtype: torch.dtype, device: str
) -> None:
    check_case(op, backend, case, dtype, device)


@pytest.mark.parametrize("op", OPS.values(), ids=list(OPS))
def test_spec_is_complete(op: Op[..., Any]) -> None:
    assert op.__doc__ and "Returns:" in op.__doc__ and "Args:" in op.__doc__
    cases = op.cases()
    assert len({case.name for case in cases}) == len(cases)
    first = inputs(op, cases[0], torch.float32, "cpu")
    assert set(first) == set(op._names), "cases give every argument"
    assert op.cost(**first).bytes >= 0
