"""The compiled CPU kernels: every instruction set and thread count gives the same bits."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import pytest
import torch

from adamix_kernels import grad_norm_sq, native, use_backend


@pytest.fixture
def module() -> Iterator[ModuleType]:
    found = native.load()
    if isinstance(found, str):
        pytest.skip(found)
    yield found
    found.use_isa(found.best_isa())


def norms(x: torch.Tensor) -> torch.Tensor:
    with use_backend("cpp"):
        return grad_norm_sq(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_same_bits_for_every_instruction_set_and_thread_count(module: ModuleType, dtype: torch.dtype) -> None:
    x = torch.randn(3, 150_001, generator=torch.Generator().manual_seed(0)).to(dtype)
    expected, threads, tried = norms(x), torch.get_num_threads(), 0
    try:
        for isa in module.Isa.__members__.values():
            if int(isa) > int(module.best_isa()):
                continue
            module.use_isa(isa)
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                assert torch.equal(norms(x), expected)
                tried += 1
    finally:
        torch.set_num_threads(threads)
    assert tried >= 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_half_precision_value(module: ModuleType, dtype: torch.dtype) -> None:
    values = torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(dtype)
    for isa in module.Isa.__members__.values():
        if int(isa) <= int(module.best_isa()):
            module.use_isa(isa)
            for x in (values[:, None], values[:, None].repeat(1, 37)):
                assert torch.equal(norms(x), grad_norm_sq.reference(x))


def test_an_instruction_set_the_processor_lacks_is_refused(module: ModuleType) -> None:
    if module.best_isa() == module.Isa.avx512:
        pytest.skip("this processor has them all")
    with pytest.raises(ValueError, match="isa"):
        module.use_isa(module.Isa.avx512)
