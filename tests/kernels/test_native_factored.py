"""The compiled kernels on factored gradients: the same bits for every thread count, near for every instruction set."""

from __future__ import annotations

import math
import subprocess
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from spec_checks import check_case, inputs
from torch import Tensor
from torch.utils._pytree import tree_leaves

from adamix_kernels import (
    Noise,
    clip_coef,
    conv_clip_sum,
    conv_grad_sample,
    conv_norm_clip_sum,
    conv_norm_sq,
    grad_norm_sq,
    linear_clip_sum,
    linear_norm_sq,
    native,
    softmax_head_clip_sum_noise,
    softmax_head_coordinates,
    use_backend,
)
from adamix_kernels.spec import Op

pytestmark = pytest.mark.skipif(isinstance(native.load(), str), reason="the compiled CPU kernels were not built")
OPS = [
    linear_norm_sq,
    linear_clip_sum,
    conv_norm_sq,
    conv_clip_sum,
    conv_grad_sample,
    conv_norm_clip_sum,
    softmax_head_clip_sum_noise,
    softmax_head_coordinates,
]


@pytest.fixture
def module() -> Any:
    found = native.load()
    assert isinstance(found, ModuleType)
    yield found
    found.use_isa(found.best_isa())


def randn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def works() -> dict[str, Any]:
    """Large enough for several threads, blocks and chunks; the last with few outputs, so that its rows are split."""
    a, g, coef = randn(1, 5, 150, 170), randn(2, 5, 150, 110), randn(3, 5).abs()
    image, back = randn(4, 4, 12, 14, 15), randn(5, 4, 20, 14, 15)
    x, labels = randn(6, 9000, 97), torch.arange(9000) % 17  # three blocks of rows
    weight, bias = randn(7, 17, 97) * 0.2, randn(8, 17)
    conv = {"kernel_size": (3, 3), "padding": "same", "groups": 2, "bias": True}
    return {
        "gram": lambda: linear_norm_sq(a, g, True, "gram"),
        "direct": lambda: linear_norm_sq(a, g, True, "direct"),
        "sum": lambda: linear_clip_sum(a, g, coef, True, Noise(seed=1), 0.3),
        "conv norm": lambda: conv_norm_sq(image, back, **conv),
        "conv grads": lambda: conv_grad_sample(image, back, **conv),
        "conv in one pass": lambda: conv_norm_clip_sum(image, back, coef[:4], 0.8, **conv),
        "conv sum": lambda: conv_clip_sum(image, back, coef[:4], **conv),
        "head": lambda: softmax_head_clip_sum_noise(x, labels, weight, bias, 1.0, 0.5, Noise(seed=2)),
        "coordinates": lambda: softmax_head_coordinates(x, labels, weight, randn(9, 3, 17 * 98), bias),
        "narrow sum": lambda: linear_clip_sum(randn(1, 20, 300, 5), randn(2, 20, 300, 4), randn(3, 20).abs()),
    }


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
@pytest.mark.parametrize("work", works())
def test_same_bits_for_every_thread_count(module: ModuleType, work: str, isa: str) -> None:
    if int(getattr(module.Isa, isa)) > int(module.best_isa()):
        pytest.skip(f"this processor has no {isa}")
    module.use_isa(getattr(module.Isa, isa))
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            with use_backend("cpp"):
                results.append(tree_leaves(works()[work]()))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for x, y in zip(results[0], other, strict=True):
            assert x is y is None or torch.equal(x, y)


@pytest.mark.parametrize("isa", ["portable", "avx2"])
@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_every_instruction_set_agrees_with_the_definition(module: ModuleType, op: Op[..., Any], isa: str) -> None:
    if int(getattr(module.Isa, isa)) > int(module.best_isa()):
        pytest.skip(f"this processor has no {isa}")
    module.use_isa(getattr(module.Isa, isa))
    for case in op.cases():
        check_case(op, "cpp", case, torch.float32, "cpu")


@pytest.mark.parametrize("mode", ["fast", "secure"])
def test_noise_is_one_draw_whatever_the_regions(mode: str) -> None:
    a, g, coef = randn(1, 3, 4, 301), randn(2, 3, 4, 205), torch.ones(3)
    x, labels, weight, bias = randn(3, 9, 301), torch.arange(9), randn(4, 205, 301), randn(5, 205)

    def source() -> Noise:
        return Noise._with_key(bytes(range(32)), mode)

    with use_backend("cpp"):
        runs: list[Any] = [
            (linear_clip_sum(a, g, coef, True), linear_clip_sum(a, g, coef, True, source(), 1e4)),
            (
                softmax_head_clip_sum_noise(x, labels, weight, bias, 1e3)[:2],
                softmax_head_clip_sum_noise(x, labels, weight, bias, 1e3, 10.0, source())[:2],
            ),
        ]
    expected = 1e4 * source().normal(0, 0, 205 * 302)
    for quiet, noisy in runs:
        added = torch.cat([(y.double() - x.double()).flatten() for x, y in zip(quiet, noisy, strict=True)])
        torch.testing.assert_close(added, expected, rtol=1e-6, atol=1e-2)


@pytest.mark.parametrize("backend", ["torch", "cpp"])
def test_draws_are_counted_alike(backend: str) -> None:
    """Also where the deviation is a tensor that happens to be 0: later noise must not depend on the backend."""
    a, g, coef, zero = randn(1, 3, 5), randn(2, 3, 4), torch.ones(3), torch.tensor(0.0)
    x, labels, weight = randn(3, 3, 5), torch.arange(3), randn(4, 4, 5)
    source = Noise(seed=0)
    with use_backend(backend):
        for std, draws in [(0.0, 0), (zero, 1), (0.5, 2)]:
            linear_clip_sum(a, g, coef, False, source, std)
            assert source._draws == draws
        for threshold, multiplier, draws in [(1.0, 0.0, 2), (torch.inf, 0.0, 2), (zero, 1.0, 3), (1.0, 1.0, 4)]:
            softmax_head_clip_sum_noise(x, labels, weight, None, threshold, multiplier, source)
            assert source._draws == draws


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_float64_is_left_to_torch(op: Op[..., Any]) -> None:
    arguments = inputs(op, op.cases()[0], torch.float64, "cpu")
    assert "float64" in str(op.why_not("cpp", arguments))
    first = op(**arguments)
    part = tree_leaves(first)[0]
    assert part.dtype == (torch.float32 if op.name.endswith("norm_sq") else torch.float64)


def test_a_sample_with_factor_zero_is_never_touched_by_what_it_holds() -> None:
    """In one chunk with others, so that only masking keeps its NaN out."""
    a, g = randn(1, 6, 20, 33), randn(2, 6, 20, 17)
    coef = torch.tensor([0.5, 0.0, 1.0, 0.0, 0.0, 0.25])
    with use_backend("cpp"):
        clean = linear_clip_sum(a, g, coef, True)
        for bad in (torch.nan, torch.inf):
            a[1], g[3], a[4, 3, 5] = bad, bad, -bad
            assert all(torch.equal(x, y) for x, y in zip(clean, linear_clip_sum(a, g, coef, True), strict=True))


def test_factors_and_values_at_the_ends_of_the_range_do_not_vanish() -> None:
    """The factor times a backprop would underflow in float32, or a tiny activation be lost; their product is not."""
    for size_a, size_g in [(1e30, 1e-20), (1e-30, 1e36), (1e-38, 1e38), (1e18, 1e-30)]:
        a, g = size_a * randn(1, 3, 4, 20), size_g * randn(2, 3, 4, 10)
        norm_sq = linear_norm_sq(a.double(), g.double())
        coef = clip_coef(norm_sq, 1e-3)
        with use_backend("cpp"):
            got = linear_clip_sum(a, g, coef).weight
        expected = torch.einsum("b,bto,bti->oi", coef.double(), g.double(), a.double())
        torch.testing.assert_close(got.double(), expected, rtol=0, atol=1e-6 * float(expected.abs().max()))


def test_rows_whose_logits_overflow_are_left_out() -> None:
    x = torch.tensor([[1.0, 2.0], [3e38, 3e38], [-1.0, 0.5]])
    weight, labels = torch.tensor([[1.0, 4.0], [0.5, -1.0]]), torch.tensor([0, 1, 1])
    with use_backend("cpp"):
        out = softmax_head_clip_sum_noise(x, labels, weight, None, 1.0)
        rest = softmax_head_clip_sum_noise(x[[0, 2]], labels[[0, 2]], weight, None, 1.0)
    assert out.norm_sq[1] == torch.inf and torch.equal(out.weight, rest.weight) and out.loss == rest.loss


def test_a_confident_row_keeps_its_precision() -> None:
    """Softmax minus one would leave few digits of a probability near one."""
    x, weight = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[14.0, -3.0], [0.0, 9.0], [1.0, 0.5]])
    labels = torch.tensor([0, 1])
    with use_backend("cpp"):
        got = softmax_head_clip_sum_noise(x, labels, weight)
    with use_backend("torch"):
        expected = softmax_head_clip_sum_noise(x.double(), labels, weight.double())
    torch.testing.assert_close(got.weight.double(), expected.weight, rtol=2e-6, atol=0)
    torch.testing.assert_close(got.norm_sq, expected.norm_sq, rtol=4e-6, atol=0)


FLUSHED = """
import torch
from adamix_kernels import *
torch.set_num_threads(2)
large = torch.randn(64, 64, 64)
with use_backend("cpp"):
    linear_norm_sq(large, large)  # now the second thread is there, and keeps denormals
    torch.set_flush_denormal(True)
    a, g = torch.full((8, 4, 64), 1e-39), torch.full((8, 4, 64), 1e38)
    worst = 0.0
    for method in ("gram", "direct"):
        coef = clip_coef(linear_norm_sq(a, g, False, method), 1.0)
        for b in range(8):
            one = torch.zeros(8)
            one[b] = coef[b]
            worst = max(worst, float(linear_clip_sum(a, g, one).weight.double().norm()))
    a, g = a[:, :1].expand(8, 5000, 64), g[:, :1].expand(8, 5000, 64)
    coef = clip_coef(scale_shift_norm_sq(a[:1, :2], g[:1, :2], False), 1.0)
    worst = max(worst, float(scale_shift_clip_sum(a, g, coef.repeat(8), False).weight.norm()) / 8)
print(worst)
"""


def test_all_threads_treat_denormals_as_the_caller_does() -> None:
    """Else a norm made by one that flushes them, and a sum by one that does not, would be of different numbers."""
    done = subprocess.run([sys.executable, "-c", FLUSHED], check=True, capture_output=True, text=True)
    assert float(done.stdout) <= 1


MEMORY = """
import re, torch
from adamix_kernels import linear_norm_sq, softmax_head_clip_sum_noise, use_backend
torch.set_num_threads(2)
def peak(): return 1024 * int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])
def more(run):
    run(64)
    open("/proc/self/clear_refs", "w").write("5")
    before = peak()
    run({size})
    return peak() - before
with use_backend("cpp"):
    print(more({run}))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of resident memory as Linux reports it")
@pytest.mark.parametrize(
    ("size", "run", "most"),
    [
        # Inputs, which `run` makes, take 2 x 4096 x 512 x 4 = 16.8 MB; T x T would be 67 MB, I x O 1 MB.
        (4096, 'lambda t: linear_norm_sq(torch.ones(1, t, 512), torch.ones(1, t, 512), False, "gram")', 21e6),
        # 2 x 512 x 4096 x 4 = 16.8 MB; I x O would be 67 MB.
        (512, 'lambda t: linear_norm_sq(torch.ones(1, t, 4096), torch.ones(1, t, 4096), False, "direct")', 24e6),
    ],
)
def test_norms_need_no_more_memory_than_their_inputs(size: int, run: str, most: float) -> None:
    code = MEMORY.format(size=size, run=run)
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert 16e6 < float(done.stdout) < most


@pytest.mark.parametrize("backend", ["torch", "cpp"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_gradients_of_a_convolution_keep_what_is_not_finite_to_its_sample(backend: str, value: float) -> None:
    torch.manual_seed(0)
    a, g = torch.randn(4, 3, 9, 9), torch.randn(4, 5, 7, 7)
    with use_backend(backend):
        before = conv_grad_sample(a, g, (3, 3), bias=True)
        a[1, 0, 4, 4], g[2, 1, 0, 0] = value, value
        after = conv_grad_sample(a, g, (3, 3), bias=True)
        norm_sq = grad_norm_sq(list(after))
    assert torch.equal(before.weight[[0, 3]], after.weight[[0, 3]])
    assert norm_sq.isinf().tolist() == [False, True, True, False]
