"""The CUDA kernels, run on a CPU by an emulator: every spec case, and what only these kernels can get wrong."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from emulated_cuda import ROOT, device
from spec_checks import check_case
from torch import Tensor

from adamix_kernels import (
    BackendError,
    Noise,
    add_gaussian_noise_,
    backends,
    clip_coef,
    clip_sum,
    clip_sum_noise,
    cuda,
    cuda_library,
    device_lists,
    grad_norm_sq,
    norm_quantile,
    use_backend,
)
from adamix_kernels.device_lists import groups
from adamix_kernels.spec import FLOAT_DTYPES, OPS, Case

CUDA_OPS = [op for op in OPS.values() if "cuda" in op.backends]
KEY = bytes(range(32))
#: Devices on which the single reading holds 1, 2 and more rows at a time, and one that has none.
DEVICES: list[dict[str, Any]] = [
    {"multiprocessors": 3, "shared": 24 << 10, "threads": 64},
    {"multiprocessors": 2, "shared": 100 << 10, "threads": 64, "seed": 1},
    {"multiprocessors": 5, "shared": 16 << 10, "threads": 32, "seed": 2},
    {"multiprocessors": 4, "shared": 64 << 10, "threads": 128, "seed": 3},
    {"cooperative": False},
]


def values(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def cases() -> Iterator[Any]:
    for op, at in itertools.product(CUDA_OPS, range(len(DEVICES))):
        if at == 0 or op is clip_sum_noise:
            for case, dtype in itertools.product(op.cases(), FLOAT_DTYPES):
                name = f"{op.name}-{case.name}-{str(dtype).removeprefix('torch.')}-{at}".replace(" ", "_")
                yield pytest.param(op, case, dtype, at, id=name)


@pytest.mark.parametrize(("op", "case", "dtype", "at"), list(cases()))
def test_agrees_with_the_float64_definition(op: Any, case: Case, dtype: torch.dtype, at: int) -> None:
    with device(**DEVICES[at]):
        check_case(op, "cuda", case, dtype, "cpu")


# --- The single reading against the two -------------------------------------------------------------------------------


def both(parts: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
    """Results of the single reading and of the two, with noise of equal keys."""
    found = []
    for resident in (True, False):
        source = {"noise": Noise._with_key(KEY, "fast")} if args[1:] else {}
        found.append(cuda._clip_sum_noise(parts, *args, **source, **kwargs, resident=resident))
    return found[0], found[1]


def flat(sums: Any) -> Tensor:
    return torch.cat([s.double().flatten() for s in (sums if isinstance(sums, list) else [sums])])


LISTS = {
    "aligned": lambda rows: [(rows, 768)],
    "one tensor": lambda rows: [(rows, 2501)],
    "ragged": lambda rows: [(rows, 3, 5), (rows,), (rows, 7, 8), (rows, 0), (rows, 1031), (rows, 1), (rows, 2, 2)],
    "large and small": lambda rows: [(rows, 1500), (rows, 3), (rows, 8)],
}


@pytest.mark.parametrize("rows", [1, 2, 5, 31])
@pytest.mark.parametrize("shapes", LISTS)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_both_versions_give_the_reference(dtype: torch.dtype, shapes: str, rows: int) -> None:
    parts = [values(*shape, dtype=dtype, seed=i) for i, shape in enumerate(LISTS[shapes](rows))]
    if rows > 2:
        parts[0][2].view(-1)[-1] = torch.inf
    with use_backend("torch"):
        expected = clip_sum_noise.reference(parts, 3.0, 0.5, Noise._with_key(KEY, "fast"))
    single = 0
    for options in DEVICES:
        with device(**options) as emulated:
            once, twice = both(parts, 3.0, 0.5)
            single += emulated.cooperative_launches
        for out in (once, twice):
            torch.testing.assert_close(flat(out.sum), flat(expected.sum), rtol=2e-7, atol=2e-6)
            torch.testing.assert_close(out.norm_sq, expected.norm_sq, rtol=1e-6, atol=0)
    assert single or rows < 5


def test_lists_of_several_dtypes() -> None:
    kinds = [torch.float32, torch.bfloat16, torch.float64, torch.float32, torch.float16]
    parts = [values(5, 700 + 300 * i, dtype=dtype, seed=i) for i, dtype in enumerate(kinds)]
    expected = clip_sum_noise.reference(parts, 3.0, 0.5, Noise(seed=4))
    with device():
        got = clip_sum_noise(parts, 3.0, 0.5, Noise(seed=4))
    assert [s.dtype for s in got.sum] == [s.dtype for s in expected.sum]
    torch.testing.assert_close(got.norm_sq, expected.norm_sq, rtol=1e-6, atol=0)
    torch.testing.assert_close(flat(got.sum), flat(expected.sum), rtol=2e-7, atol=2e-6)


def test_groups_of_one_row_and_of_many() -> None:
    rows = values(37, 700)
    with device(shared=24 << 10) as emulated:
        assert emulated.plan([values(37, 2900)]).rows == 1
        assert emulated.plan([rows]).rows == 2
    with device(shared=100 << 10) as emulated:
        assert emulated.plan([rows]).rows > 8
        assert emulated.plan([values(1, 70)]).grid == 0, "too little work"
        assert emulated.plan([values(9, 40_000)]).grid == 0, "too many columns"
    with device(cooperative=False) as emulated:
        assert emulated.plan([rows]).grid == 0


def test_launches_and_memory_do_not_grow_with_the_list() -> None:
    parts = [values(20, 40 + i) for i in range(30)]
    columns = sum(p.shape[1] for p in parts) + 30 * 16  # sums are aligned
    with device(multiprocessors=16, shared=48 << 10, threads=128) as emulated:
        clip_sum_noise(parts, 1.0)
        assert emulated.launches == emulated.cooperative_launches == 1
    with device() as emulated:
        cuda._clip_sum_noise(parts, 1.0, 0.3, Noise(seed=0), resident=False)
        assert (emulated.launches, emulated.cooperative_launches) == (3, 0)
    with device() as emulated:
        add_gaussian_noise_(parts, 1.0, Noise(seed=0))
        assert emulated.launches == 1
    for rows, width in [(20, columns), (4000, 16), (3, 4000), (300, 300)]:
        for resident in (True, False):
            with device() as emulated:
                cuda._clip_sum_noise(values(rows, width), 1.0, resident=resident)
                ring = 8 * 4 * (16 * 3 + 1) if emulated.cooperative_launches else 0  # does not grow
                assert emulated.allocated <= 4 * (2 * width + rows) + ring


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_same_bits_whatever_the_order_of_threads(dtype: torch.dtype) -> None:
    parts = [values(23, 333, dtype=dtype), values(23, 1001, dtype=dtype, seed=1)]
    seen = []
    for seed in range(6):
        with device(shared=100 << 10, seed=seed) as emulated:
            once, twice = both(parts, 1.0, 0.5)
            assert emulated.cooperative_launches == 1
        seen.append([flat(once.sum), once.norm_sq, flat(twice.sum), twice.norm_sq])
    assert all(torch.equal(a, b) for other in seen[1:] for a, b in zip(seen[0], other, strict=True))


def test_many_rows_of_few_columns_are_shared_out() -> None:
    rows = values(1000, 5)
    coef = values(1000, seed=1).clamp(0, 1)
    with device() as emulated:
        got = clip_sum(rows, coef)
        assert emulated.launches == 1
    torch.testing.assert_close(got, (coef.double() @ rows.double()).float())


# --- Memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("shift", [0, 1, 3])
def test_any_alignment(dtype: torch.dtype, shift: int) -> None:
    for cols in (64, 130, 131):
        memory = torch.full((7 * cols + 40,), torch.nan, dtype=dtype)
        rows = memory[shift : shift + 7 * cols].view(7, cols)
        rows.copy_(values(7, cols))
        for options in DEVICES:
            with device(**options):
                once, twice = both(rows, 2.0)
            expected = clip_sum_noise.reference(rows, 2.0)
            for out in (once, twice):
                torch.testing.assert_close(out.sum, expected.sum, rtol=2e-7, atol=1e-6)


def test_rows_beyond_2_to_the_31_elements() -> None:
    """Of memory that is only promised: the table of blocks names the last two of each row."""
    cols = 2**31 + 1000
    rows = torch.empty(2, cols, dtype=torch.bfloat16)
    first = 2**21 - 1  # of the blocks
    start = first * 1024
    rows[:, start:] = values(2, cols - start)
    part = rows[:, start:].contiguous()
    table = torch.tensor([[rows.data_ptr(), cols, 2**40 + 1, -start]])
    blocks = torch.tensor([[0, first], [0, first + 1]], dtype=torch.int32)
    described = cuda_library.List(table.data_ptr(), blocks.data_ptr(), 2, 2)
    expected = clip_sum_noise.reference(part, 4.0)
    z = Noise._with_key(KEY, "fast").normal(0, 2**40 + 1 + start, cols - start)
    with device() as emulated:
        call = cuda_library.Call("test", torch.device("cpu"))
        limit, out, norm_sq = cuda_library.number(4.0)[0], emulated.empty(2024), emulated.empty(2)
        noise = call.noise(Noise._with_key(KEY, "fast"), 0.25, limit)
        call("partial_norms", 1, described, 1, 0, 1, None, 2024.0, norm_sq.data_ptr())
        call("clip_sum", 1, described, norm_sq.data_ptr(), None, limit, noise, False, out.data_ptr())
        torch.testing.assert_close(norm_sq, expected.norm_sq, rtol=1e-6, atol=0)
        torch.testing.assert_close(out[: cols - start], (expected.sum + z).float(), rtol=1e-6, atol=1e-6)
        plan = cuda_library.Plan()
        assert not emulated.lib.adamix_clip_sum_plan(0, 1, 2, 2, plan) and plan.grid
        again, norms = emulated.empty(2024), emulated.empty(2)
        scratch = emulated.empty(plan.scratch, dtype=torch.float64)
        pointers = (scratch.data_ptr(), norms.data_ptr(), again.data_ptr())
        call("clip_sum_resident", 1, described, plan, limit, noise, 2024.0, *pointers)
        assert torch.equal(norms, norm_sq)
        torch.testing.assert_close(again[: cols - start], out[: cols - start], rtol=1e-6, atol=1e-6)


# --- Noise ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["fast", "secure"])
@pytest.mark.parametrize("first", [0, 1, 7, 130, 515])
def test_noise_is_that_of_the_reference(mode: str, first: int) -> None:
    source = Noise._with_key(KEY, mode)
    expected = source.normal(0, first, 3001)
    with device():
        parts = [torch.zeros(first, dtype=torch.float64), torch.zeros(3001, dtype=torch.float64)]
        add_gaussian_noise_(parts, 0.7, Noise._with_key(KEY, mode))
        assert float((parts[1] / 0.7 - expected).abs().max()) < 1e-13
        zeros = [torch.zeros(2, first, dtype=torch.float64), torch.zeros(2, 3001, dtype=torch.float64)]
        for resident in (True, False):
            noise = Noise._with_key(KEY, mode)
            got = cuda._clip_sum_noise(zeros, torch.tensor(0.5), 1.4, noise, resident=resident).sum[1]
            assert float((got / 0.7 - expected).abs().max()) < 1e-13
            assert noise._draws == 1


@pytest.mark.parametrize("mode", ["fast", "secure"])
def test_noise_of_late_draws_and_large_offsets(mode: str) -> None:
    for draw, offset in [(2**32 + 7, 0), (3, 2**35 + 11), (2**40, 2**40 + 1), (1, 2**32 - 5), (1, 2**33 - 3)]:
        noise, out = Noise._with_key(KEY, mode), torch.zeros(600, dtype=torch.float64)
        noise._draws = draw
        table = torch.tensor([[out.data_ptr(), 600, offset, 0]])
        blocks = torch.tensor([[0, 0]], dtype=torch.int32)
        with device():
            call = cuda_library.Call("test", torch.device("cpu"))
            drawn = call.noise(noise, 1.0, cuda_library.number(1.0)[0])
            call("add_noise", 3, cuda_library.List(table.data_ptr(), blocks.data_ptr(), 1, 1), drawn)
        assert float((out - noise.normal(draw, offset, 600)).abs().max()) < 1e-13


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_noise_is_written_only_where_it_belongs(dtype: torch.dtype) -> None:
    whole = torch.full((4, 300), 7.0, dtype=dtype)
    expected = whole.clone()
    with use_backend("torch"):
        add_gaussian_noise_([expected[1, 3:200], expected[2:, ::3]], 1.0, Noise(seed=0))
    before = whole._version
    with device():
        add_gaussian_noise_([whole[1, 3:200], whole[2:, ::3]], 1.0, Noise(seed=0))
    torch.testing.assert_close(whole, expected, rtol=4 * torch.finfo(dtype).eps, atol=0)
    assert torch.equal(whole == 7, expected == 7) and whole._version > before


def test_noise_is_refused_where_it_would_be_lost() -> None:
    x, leaf = torch.zeros(8), torch.zeros(3, requires_grad=True)
    with device():
        for shared in ([x, x], [x[:5], x[4:]], [x.view(2, 4), x.view(2, 4).t()]):
            with pytest.raises(BackendError, match="share memory"):
                add_gaussian_noise_(shared, 1.0, Noise(seed=0))
        add_gaussian_noise_([x[:4], x[4:], x[:0]], 1.0, Noise(seed=0))
        with pytest.raises(BackendError, match="requires grad"):
            add_gaussian_noise_(leaf, 1.0, Noise(seed=0))
        with torch.no_grad():
            assert add_gaussian_noise_(leaf, 1.0, Noise(seed=0)) is leaf and bool(leaf.any())


def test_noise_is_not_captured_in_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_library, "capturing", lambda device: device.type == "cuda")
    call, noise = cuda_library.Call.__new__(cuda_library.Call), Noise(seed=0)
    call.op, call.device = "clip_sum_noise", torch.device("cuda", 0)
    with pytest.raises(RuntimeError, match="clip_sum_noise: noise cannot be captured in a CUDA graph"):
        call.noise(noise, 1.0, cuda_library.Number())
    assert noise._draws == 0
    assert call.noise(noise, 0.0, cuda_library.Number()).mode == 0


@pytest.mark.parametrize("at", [0, -1])
def test_std_may_be_an_element_of_what_is_noised(at: int) -> None:
    x, expected = torch.zeros(5000, dtype=torch.float64), torch.zeros(5000, dtype=torch.float64)
    x[at] = expected[at] = 0.5
    with device():
        add_gaussian_noise_(x, x[at], Noise(seed=0))
    torch.testing.assert_close(x, add_gaussian_noise_(expected, 0.5, Noise(seed=0)), rtol=1e-12, atol=1e-12)


def test_a_threshold_that_is_a_negating_view() -> None:
    threshold = torch.tensor(-1j, dtype=torch.complex128).conj().imag
    assert threshold.is_neg() and float(threshold) == 1
    with device():
        assert clip_coef(torch.tensor([4.0]), threshold).tolist() == [0.5]


def test_tables_in_a_captured_graph_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[Any] = []
    monkeypatch.setattr(device_lists, "_captured", kept)
    x = torch.ones(2, 5)
    device_lists.groups([x], 1024)
    assert not kept
    monkeypatch.setattr(device_lists, "capturing", lambda device: True)
    found = device_lists.groups([x], 1024)
    assert len(kept) == 1 and kept[0] is found


def test_a_library_that_cannot_run_warns_once_and_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with a driver older than the library: it opens, and every call fails."""
    library = SimpleNamespace(adamix_clip_sum_plan=lambda *_: 35, adamix_error=lambda _: b"driver too old")
    monkeypatch.setattr(cuda_library, "load", lambda: library)
    monkeypatch.setattr(cuda_library.ctypes, "CDLL", SimpleNamespace)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    cuda_library._fails_on.cache_clear()
    with pytest.warns(RuntimeWarning, match="fail on device 0: driver too old") as warned:
        assert cuda_library.unavailable() == cuda_library.unavailable() != None  # noqa: E711
    assert len(warned) == 1
    cuda_library._fails_on.cache_clear()


# --- The rest ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_quantile_of_any_numbers(dtype: torch.dtype) -> None:
    special = torch.tensor(
        [torch.nan, torch.inf, 0.0, 5e-324, 1e-45, 1e-30, 1e30, 1e300, 1.0, 1.0], dtype=torch.float64
    )
    for size, q in itertools.product([1, 2, 31, 33, 1025, 3000], [0.0, 0.5, 0.9, 0.999, 1.0]):
        numbers = torch.cat([values(size, seed=size).double() ** 2, special]).to(dtype)
        for sample in (numbers, numbers[:size].round()):
            with device():
                got = norm_quantile(sample, q)
            torch.testing.assert_close(got, norm_quantile.reference(sample, q), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_half_precision_value(dtype: torch.dtype) -> None:
    numbers = torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(dtype)
    rows = numbers.view(32, 2048)
    finite = rows.isfinite().all(1)
    with device(multiprocessors=16, threads=128, shared=48 << 10) as emulated:
        assert torch.equal(
            grad_norm_sq(numbers[:8192, None]).isinf(), grad_norm_sq.reference(numbers[:8192, None]).isinf()
        )
        total = clip_sum(rows[finite], finite[finite].double())
        once = clip_sum_noise(rows.nan_to_num(0, 0, 0), torch.inf)
        assert emulated.cooperative_launches == 1
    torch.testing.assert_close(total, rows[finite].double().sum(0).float(), rtol=1e-7, atol=0)
    torch.testing.assert_close(
        once.sum, clip_sum_noise.reference(rows.nan_to_num(0, 0, 0), torch.inf).sum, rtol=1e-6, atol=1e-7
    )


def test_given_factors_are_kept_to_the_letter() -> None:
    """Rows of factor 0 are not used whatever they hold; a NaN that the caller asks for is not hidden."""
    rows = torch.tensor([[1.0, torch.nan], [2.0, 3.0], [torch.inf, 1.0]])
    with device():
        assert clip_sum(rows, torch.tensor([0.0, 0.5, torch.nan])).tolist() == [1.0, 1.5]
        assert clip_sum(rows, torch.tensor([-1.0, 1e38, 0.0])).tolist() == torch.tensor([2e38, 3e38]).tolist()
        assert clip_sum(rows, torch.tensor([1.0, 0.5, 0.0])).isnan().tolist() == [False, True]


def test_errors_name_the_op() -> None:
    rows = values(9, 700)
    with device() as emulated:
        clip_sum_noise(rows, 1.0)
        emulated.lib.emulator_configure(1, 24 << 10, 64, True, 0)  # but the plan is kept
        with pytest.raises(RuntimeError, match="clip_sum_noise: CUDA error: the emulator refuses the call"):
            clip_sum_noise(rows, 1.0)


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has CUDA")
def test_a_torch_without_cuda_says_so() -> None:
    assert backends()["clip_sum_noise"]["cuda"] == "this torch was built without CUDA"
    with use_backend("cuda"), pytest.raises(BackendError, match="built without CUDA"):
        clip_coef(torch.ones(1), 1.0)


def test_only_tensors_of_the_device_are_taken() -> None:
    with device(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda_library, "DEVICE", "cuda")
        patch.setattr(torch.cuda, "current_device", lambda: 0)
        for call in (lambda: grad_norm_sq(torch.ones(1, 1)), lambda: clip_coef(torch.ones(1), torch.tensor(1.0))):
            with pytest.raises(BackendError, match="a tensor is on cpu; this backend takes CUDA tensors"):
                call()


def test_blocks_are_those_of_the_kernels() -> None:
    header = ROOT / "csrc" / "cuda" / "common.cuh"
    assert f"constexpr int kBlock = {cuda._BLOCK};" in header.read_text()
    assert groups([values(1, 1025)], cuda._BLOCK)[0].blocks.tolist() == [[0, 0], [0, 1]]
