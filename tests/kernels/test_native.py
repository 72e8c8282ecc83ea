"""The compiled CPU kernels: every instruction set and thread count gives the same bits."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from adamix_kernels import (
    BackendError,
    Noise,
    add_gaussian_noise_,
    clip_coef,
    clip_sum,
    clip_sum_noise,
    grad_norm_sq,
    native,
    use_backend,
)


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


def sums(x: torch.Tensor) -> torch.Tensor:
    with use_backend("cpp"):
        return clip_sum(x, torch.linspace(0, 1, len(x)))


def noisy(x: torch.Tensor, mode: str = "fast", first: int = 5) -> torch.Tensor:
    """Noise from an odd offset on, as a list gives it."""
    with use_backend("cpp"):
        parts = [torch.zeros(first), x.clone()]
        return add_gaussian_noise_(parts, 0.7, Noise._with_key(bytes(range(32)), mode))[1]


def secure(x: torch.Tensor) -> torch.Tensor:
    return noisy(x, "secure", first=130)


@pytest.mark.parametrize("kernel", [norms, sums, noisy, secure])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_same_bits_for_every_instruction_set_and_thread_count(
    module: ModuleType, dtype: torch.dtype, kernel: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    x = torch.randn(3, 150_001, generator=torch.Generator().manual_seed(0)).to(dtype)
    expected, threads, tried = kernel(x), torch.get_num_threads(), 0
    try:
        for isa in module.Isa.__members__.values():
            if int(isa) > int(module.best_isa()):
                continue
            module.use_isa(isa)
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                assert torch.equal(kernel(x), expected)
                tried += 1
    finally:
        torch.set_num_threads(threads)
    assert tried >= 3


@pytest.mark.parametrize("mode", ["fast", "secure"])
@pytest.mark.parametrize("first", [0, 1, 127, 128, 1001])
def test_noise_is_that_of_the_reference(module: ModuleType, mode: str, first: int) -> None:
    reference = Noise._with_key(bytes(range(32)), mode).normal(0, first, 70_001)
    compiled = noisy(torch.zeros(70_001, dtype=torch.float64), mode, first) / 0.7
    assert float((compiled - reference).abs().max()) < 1e-13


@pytest.mark.parametrize("mode", ["fast", "secure"])
def test_noise_of_late_draws_and_large_offsets(module: ModuleType, mode: str) -> None:
    for isa, (draw, offset) in itertools.product(
        module.Isa.__members__.values(), [(2**32 + 7, 0), (3, 2**35 + 11), (2**40, 2**40 + 1), (0, 2**33 - 150)]
    ):
        if int(isa) <= int(module.best_isa()):
            module.use_isa(isa)
            noise, out = Noise._with_key(bytes(range(32)), mode), torch.zeros(300, dtype=torch.float64)
            module.add_gaussian_noise([(out.data_ptr(), module.DType.float64, 300, offset)], 1.0, noise._key, draw, 1)
            assert float((out - noise.normal(draw, offset, 300)).abs().max()) < 1e-13


@pytest.mark.parametrize("mode", ["fast", "secure"])
def test_tails_and_correlations_of_many_normals(module: ModuleType, mode: str) -> None:
    """2e8 of them: beyond 5 standard deviations as often as they should be, and beyond what 24-bit uniforms reach."""
    source, chunk, times = Noise._with_key(bytes(range(7, 39)), mode), 20_000_000, 10
    levels = (3.0, 4.0, 5.0)
    counts, largest, total, squares, fourth = [0, 0, 0], 0.0, 0.0, 0.0, 0.0
    with use_backend("cpp"):
        for _ in range(times):
            left, right = add_gaussian_noise_([torch.zeros(chunk // 2), torch.zeros(chunk // 2)], 1.0, source)
            across = float(left.dot(right)) / (chunk // 2)
            assert abs(across) < 5 / math.sqrt(chunk // 2), "tensors of one list are not correlated"
            z = torch.cat([left, right]).abs_()
            counts = [count + int((z > level).sum()) for count, level in zip(counts, levels, strict=True)]
            largest, total = max(largest, float(z.max())), total + float(left.double().sum() + right.double().sum())
            power = z.double().square_()
            squares, fourth = squares + float(power.sum()), fourth + float(power.square_().sum())
    n = chunk * times
    for count, level in zip(counts, levels, strict=True):
        expected = n * math.erfc(level / math.sqrt(2))
        assert abs(count - expected) < 5 * math.sqrt(expected), f"beyond {level} standard deviations"
    assert largest > 5.5
    assert abs(total / n) < 5 / math.sqrt(n)
    assert abs(squares / n - 1) < 5 * math.sqrt(2 / n)
    assert abs(fourth / n - 3) < 5 * math.sqrt(96 / n)


def test_noise_after_a_part_of_many_elements(module: ModuleType) -> None:
    """Offsets beyond what a float32 holds, in both ops that make noise."""
    first, noise = 2**24 + 3, Noise(seed=1)
    expected = noise.normal(0, first, 9)
    with use_backend("cpp"):
        added = add_gaussian_noise_([torch.zeros(first), torch.zeros(9, dtype=torch.float64)], 1.0, Noise(seed=1))
        parts = [torch.zeros(1, first), torch.zeros(1, 9, dtype=torch.float64)]
        summed = clip_sum_noise(parts, 1.0, 1.0, Noise(seed=1)).sum
    torch.testing.assert_close(added[1], expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(summed[1], expected, rtol=1e-12, atol=1e-12)


def test_more_elements_than_32_bits_count(module: ModuleType) -> None:
    """Memory that is mapped but never written costs none."""
    rows, cols = 2000, 2_200_000
    x = torch.from_numpy(np.zeros((rows, cols), dtype=np.int16)).view(torch.bfloat16)
    x[-1, 5], x[0, 7] = 3.0, 2.0
    coef = torch.zeros(rows)
    coef[0], coef[-1] = 0.5, 1.0
    with use_backend("cpp"):
        total = clip_sum(x, coef)
    assert total.nonzero().flatten().tolist() == [5, 7] and total[5] == 3 and total[7] == 1


def test_writes_stay_inside_and_are_seen_by_autograd(module: ModuleType) -> None:
    whole = torch.full((400,), 7.0)
    with use_backend("cpp"):
        add_gaussian_noise_(whole[100:301], 1.0, Noise(seed=0))
    assert bool((whole[:100] == 7).all() and (whole[301:] == 7).all() and (whole[100:301] != 7).all())
    assert whole._version > 0
    leaf = torch.zeros(3, requires_grad=True)
    with use_backend("cpp"), pytest.raises(BackendError, match="requires grad"):
        add_gaussian_noise_(leaf, 1.0, Noise(seed=0))
    with use_backend("cpp"), torch.no_grad():
        assert add_gaussian_noise_(leaf, 1.0, Noise(seed=0)) is leaf and bool(leaf.any())


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


class Subclass(torch.Tensor):
    pass


def test_every_tensor_of_a_call_is_looked_at(module: ModuleType) -> None:
    rows, strange = torch.ones(3, 4), torch.ones(3).as_subclass(Subclass)
    for call in (
        lambda: clip_sum(rows, strange),
        lambda: clip_coef(strange, 1.0),
        lambda: clip_coef(torch.ones(3), strange[0]),
        lambda: clip_sum_noise(rows, strange[0]),
        lambda: add_gaussian_noise_(rows, strange[0], Noise(seed=0)),
    ):
        with use_backend("cpp"), pytest.raises(BackendError, match="is a Subclass"):
            call()


@pytest.mark.parametrize(
    ("make", "inside", "reason"),
    [
        (lambda: torch.ones(3, 4), FakeTensorMode, "traced or replaced"),
        (lambda: torch.ones(3, 4), lambda: FlopCounterMode(display=False), "traced or replaced"),
        (lambda: FakeTensorMode().from_tensor(torch.ones(3, 4)), nullcontext, "is a FakeTensor"),
        (lambda: torch.ones(3, 4).as_subclass(Subclass), nullcontext, "is a Subclass"),
        (lambda: torch.ones(3, 4, device="meta"), nullcontext, "is on meta"),
        (lambda: torch._efficientzerotensor(3, 4), nullcontext, "has no storage"),
    ],
)
def test_tensors_without_memory_are_left_to_torch(module: ModuleType, make: Any, inside: Any, reason: str) -> None:
    with inside():
        x = make()
        assert grad_norm_sq(x).shape == (3,)
        for given in (x, [torch.ones(3, 2, device=x.device), x]):
            with use_backend("cpp"), pytest.raises(BackendError, match=reason):
                grad_norm_sq(given)


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools:UserWarning")  # no harm: it is traced
def test_inside_transforms_torch_runs(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    each = torch.stack([grad_norm_sq(one) for one in x])
    torch.testing.assert_close(torch.func.vmap(grad_norm_sq)(x), each)
    with use_backend("cpp"), pytest.raises(BackendError, match=r"torch\.func"):
        torch.func.vmap(grad_norm_sq)(x)
    compiled = torch.compile(lambda one: grad_norm_sq(one) + 1, backend="eager")
    torch.testing.assert_close(compiled(x[0]), each[0] + 1)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with use_backend("cpp"), pytest.raises(BackendError, match="traced or replaced"):
        grad_norm_sq(x)


def test_plain_tensors_are_taken(module: ModuleType) -> None:
    x = torch.ones(3, 4)
    for one in (x, torch.nn.Parameter(x), x.t().contiguous().t(), x.to(torch.complex64).conj().imag):
        assert norms(one).tolist() == grad_norm_sq.reference(one).tolist()
    with torch.device("meta"):  # the default of what is made, not of what is given
        assert norms(x).tolist() == pytest.approx([4.0] * 3)


@pytest.mark.filterwarnings("ignore")  # torch.jit is deprecated, and warns of every shape it fixes
def test_tracing_takes_the_reference(module: ModuleType) -> None:
    """A kernel's result is memory that a trace knows nothing of."""

    def function(x: torch.Tensor) -> torch.Tensor:
        return grad_norm_sq(x)

    traced = torch.jit.trace(function, torch.ones(2, 3), check_trace=False)
    x = torch.tensor([[3.0, 4.0, 0.0], [1.0, 2.0, 2.0]])
    torch.testing.assert_close(traced(x), torch.tensor([25.0, 9.0]))


@pytest.mark.parametrize("order", [(0, 1), (1, 0), (0, 1, 0), (1, 1)])
def test_parts_that_share_memory_get_the_noise_of_each(order: tuple[int, ...]) -> None:
    """A part that is written through a copy must not take back what another part of the list has got."""
    sums = []
    for backend in ("torch", "cpp"):
        memory = torch.zeros(12)
        parts = memory, memory.view(3, 4).T
        with use_backend(backend):
            add_gaussian_noise_([parts[i] for i in order], 1.0, Noise(seed=3))
        sums.append(memory)
    torch.testing.assert_close(*sums, rtol=1e-6, atol=1e-6)
    assert sums[0].abs().min() > 0
