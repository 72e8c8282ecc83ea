"""How a test runs a case of an op's spec on a backend, and what it compares the result with."""

from __future__ import annotations

import zlib
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map

from adamix_kernels.spec import Case, Op, Out, use_backend

FLOAT32_TINIEST = 2.0**-149
FLOAT32_NORMAL = torch.finfo(torch.float32).tiny  # no norm is reported below it


def inputs(op: Op[..., Any], case: Case, dtype: torch.dtype, device: str) -> dict[str, Any]:
    """The case's arguments: its floating tensors as `dtype`, laid out with gaps of NaN if `strided`."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{op.name} {case.name}".encode()))

    def convert(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        if x.is_floating_point():
            x = x.to(dtype)
            if case.strided and x.dim():
                gaps = torch.full((*x.shape, 2), torch.nan, dtype=dtype)
                gaps[..., 0] = x
                x = gaps[..., 0]
                assert x.numel() < 2 or not x.is_contiguous()
        return x.to(device)

    return tree_map(convert, case.build(generator))


def exact(arguments: dict[str, Any]) -> dict[str, Any]:
    def upcast(x: Any) -> Any:
        return x.detach().cpu().double().contiguous().clone() if isinstance(x, Tensor) and x.is_floating_point() else x

    return tree_map(lambda x: upcast(x.cpu() if isinstance(x, Tensor) else x), arguments)


def assert_close(out: Out, result: Tensor, expected: Tensor) -> None:
    if not expected.is_floating_point():
        assert torch.equal(result.cpu(), expected), f"{out.name}: whole numbers differ"
        return
    # An in-place op stores in its argument's own type: half a unit in the last place of that is unavoidable.
    rtol = max(out.rtol, torch.finfo(result.dtype).eps / 2)
    result, expected = result.detach().cpu().double(), expected.double()
    assert result.shape == expected.shape, f"{out.name}: shape {list(result.shape)}, expected {list(expected.shape)}"
    if not expected.numel():
        return
    expected = expected.where(expected.abs() <= torch.finfo(torch.float32).max, expected * torch.inf)
    infinite = expected.isinf()
    assert torch.equal(result[infinite], expected[infinite]), f"{out.name}: Inf expected"
    result, expected = result[~infinite], expected[~infinite]
    size = expected.abs().max() if out.of_max and expected.numel() else expected.abs()
    error = (
        (result - expected).abs()
        - rtol * size
        - (FLOAT32_NORMAL if out.never_below or out.floored else FLOAT32_TINIEST)
    )
    assert not (error > 0).any() and not result.isnan().any(), (
        f"{out.name}: off by {(result - expected).abs().max():.3g} where rtol is {rtol:.3g}"
    )
    if out.never_below or out.floored:
        assert (result >= FLOAT32_NORMAL).all(), f"{out.name}: denormal or zero"
    if out.never_below:
        assert (result >= expected * (1 - 1e-14)).all(), f"{out.name}: below the exact value"


def check_case(op: Op[..., Any], backend: str, case: Case, dtype: torch.dtype, device: str) -> None:
    """One op on one backend against its float64 definition."""
    with use_backend(backend):
        result = op(**inputs(op, case, dtype, device))
    expected = op.oracle(**exact(inputs(op, case, dtype, "cpu")))
    results = [result] if len(op.returns) == 1 else list(result)
    references = [expected] if len(op.returns) == 1 else list(expected)
    for out, part, reference in zip(op.returns, results, references, strict=True):
        parts, wanted = tree_flatten(part)[0], tree_flatten(reference)[0]
        assert len(parts) == len(wanted)
        for one, other in zip(parts, wanted, strict=True):
            if other is None or one is None:
                assert one is other
            else:
                assert one.dtype in (torch.float32, torch.float64, dtype, other.dtype)
                assert_close(out, one, other)
