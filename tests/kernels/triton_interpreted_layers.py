"""The Triton kernels of layers in Triton's interpreter, on CPU tensors: started by test_triton.py."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import interpreter_mends
import pytest
import torch
from spec_checks import check_case
from triton_interpreted import on_triton, poison  # noqa: F401  fixtures of every test

import adamix_kernels as kernels
from adamix_kernels.spec import Case, Op
from adamix_kernels.triton import launch

interpreter_mends.install()

OPS = [
    kernels.scale_shift_norm_sq,
    kernels.scale_shift_clip_sum,
    kernels.embedding_norm_sq,
    kernels.embedding_clip_sum,
    kernels.conv_norm_sq,
    kernels.conv_clip_sum,
]
ACTUAL = launch.LayerLaunch()
#: Many programs, tiles, chunks and runs that cross them even of small inputs.
TINY = replace(ACTUAL, channel_tile=4, embedding_width=4, embedding_chunk=3, conv_inner=16, conv_mixed=16, conv_outer=16,
               conv_chain=32, conv_step=16, conv_width=8)  # fmt: skip


@pytest.fixture(params=["actual", "tiny"])
def sizes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(launch.LAYER_LAUNCHES, "interpreter", TINY if request.param == "tiny" else ACTUAL)


def runs() -> Iterator[Any]:
    for op in OPS:
        for case, dtype in itertools.product(op.cases(), op.backends["triton"].dtypes):
            name = f"{op.name}-{case.name}-{str(dtype).removeprefix('torch.')}"
            yield pytest.param(op, case, dtype, id=name.replace(" ", "_"))


@pytest.mark.usefixtures("sizes")
@pytest.mark.parametrize(("op", "case", "dtype"), list(runs()))
def test_agrees_with_the_float64_definition(op: Op[..., Any], case: Case, dtype: torch.dtype) -> None:
    check_case(op, "triton", case, dtype, "cpu")
