"""Measuring this machine's rates: torch's own operations and the ops of `adamix_kernels`, each at several sizes."""

from __future__ import annotations

import dataclasses
import datetime
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import adamix_kernels as kernels
from adamix.errors import InputError
from adamix.plan.models import Work
from adamix.plan.rates import BY_FLOPS, Curve, Rates
from adamix.plan.steps import Setting, attach, trace_step
from adamix.plan.trace import Trace
from adamix_kernels import Noise
from adamix_kernels.ops.grid import grid_for

#: Larger sizes of a kind are left out after a call of so many seconds.
_LONGEST = 0.1
_REPEATS, _BUDGET = 9, 0.08  # calls of one size at most, unless they take fewer seconds

Run = Callable[[], Any]


def measure(device: torch.device, on_part: Callable[[str], None] = lambda _: None) -> Rates:
    """Rates of a device, about half a minute. What else runs on the machine meanwhile makes them too low.

    Args:
        device: a CPU or CUDA device.
        on_part: called with the name of each part before it is measured.
    """
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"device: {device.type!r} cannot be measured; pass cpu or cuda")
    dtypes = [torch.float32] + [torch.bfloat16] * (device.type == "cuda" or _fast_bfloat16())
    curves: dict[str, Curve] = {}
    for dtype in dtypes:
        for kind, sizes in _WORKS.items():
            on_part(f"{kind}, {str(dtype).removeprefix('torch.')}")
            points = _points(sizes(device, dtype), device)
            by_kind: dict[str, list[tuple[float, float]]] = {}
            for name, amount, seconds in points:
                by_kind.setdefault(name, []).append((amount, seconds))
            for name, curve in by_kind.items():
                curves.setdefault(f"{name}.{str(dtype).removeprefix('torch.')}", _rising(curve))
    rates = Rates(
        name=torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        source=f"measured on this machine, {torch.get_num_threads()} threads"
        if device.type == "cpu"
        else "measured on this machine",
        measured=True,
        device=device.type,
        memory=_memory(device),
        reserved=_reserved(device),
        curves=curves,
        made=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        versions={name: metadata.version(name) for name in ("adamix", "torch")},
    )
    on_part("host")
    return _with_host(rates, device)


# --- what is measured -------------------------------------------------------------------------------------------------


def _randn(device: torch.device, dtype: torch.dtype, *sizes: int) -> Tensor:
    return torch.randn(sizes, device=device).to(dtype)


def _memory_work(device: torch.device, dtype: torch.dtype) -> Iterator[Run]:
    for count in (1, 1 << 12, 1 << 15, 1 << 18, 1 << 20, 1 << 22, 1 << 24, 1 << 26):
        x = _randn(device, dtype, count)
        yield partial(torch.add, x, x)
        yield partial(x.add_, x)


def _special(device: torch.device, dtype: torch.dtype) -> Iterator[Run]:
    for count in (1, 1 << 12, 1 << 15, 1 << 18, 1 << 20, 1 << 22, 1 << 24):
        x = _randn(device, dtype, count)
        yield partial(F.gelu, x)


def _pool(device: torch.device, dtype: torch.dtype) -> Iterator[Run]:
    for samples in (1, 8, 64, 512):
        x = _randn(device, dtype, samples, 16, 14, 14)
        yield partial(F.max_pool2d, x, 2, 1)
        out, places = F.max_pool2d(x, 2, 1, return_indices=True)
        yield partial(_POOL_BACKWARD, out, x, [2, 2], [1, 1], [0, 0], [1, 1], False, places)


_POOL_BACKWARD = torch.ops.aten.max_pool2d_with_indices_backward


def _matmul(device: torch.device, dtype: torch.dtype) -> Iterator[Run]:
    for size in (4, 32, 96, 256, 512, 1024, 2048, 4096, 8192):
        x = _randn(device, dtype, size, size)
        yield partial(torch.matmul, x, x)


def _bmm(device: torch.device, dtype: torch.dtype) -> Iterator[Run]:
    for samples, size in ((2, 4), (16, 16), (32, 32), (64, 64), (64, 128), (64, 256), (64, 512), (64, 1024)):
        x = _randn(device, dtype, samples, size, size)
        yield partial(torch.matmul, x, x)


def _conv(device: torch.device, dtype: torch.dtype) -> Iterator[Run]:
    for samples, channels, size in ((1, 4, 8), (16, 16, 14), (64, 16, 14), (64, 32, 28), (64, 64, 56), (64, 256, 56)):
        x, w = _randn(device, dtype, samples, channels, size, size), _randn(device, dtype, channels, channels, 3, 3)
        yield partial(F.conv2d, x, w, padding=1)


def _attention(device: torch.device, dtype: torch.dtype) -> Iterator[Run]:
    for samples, positions in ((1, 16), (4, 64), (16, 64), (16, 256), (16, 1024), (16, 4096)):
        x = _randn(device, dtype, samples, 8, positions, 64)
        yield partial(F.scaled_dot_product_attention, x, x, x, is_causal=True)


_LAYERS = (
    (2, 4, 8, 8),
    (8, 16, 64, 64),
    (16, 64, 256, 256),
    (16, 64, 256, 1024),
    (8, 256, 768, 768),
    (8, 512, 1024, 4096),
)


def _linear(device: torch.device, dtype: torch.dtype) -> Iterator[Run]:
    for samples, positions, inner, outer in _LAYERS:
        a, g = _randn(device, dtype, samples, positions, inner), _randn(device, dtype, samples, positions, outer)
        coef = torch.rand(samples, device=device)
        yield partial(kernels.linear_norm_sq, a, g)
        yield partial(kernels.linear_clip_sum, a, g, coef)


def _linear_rows(device: torch.device, dtype: torch.dtype) -> Iterator[Run]:
    for samples, inner, outer in ((4, 8, 8), (64, 64, 64), (128, 256, 256), (256, 1024, 1024), (1024, 4096, 4096)):
        a, g = _randn(device, dtype, samples, inner), _randn(device, dtype, samples, outer)
        coef = torch.rand(samples, device=device)
        yield partial(kernels.linear_norm_sq, a, g)
        yield partial(kernels.linear_clip_sum, a, g, coef)


def _convolutions(device: torch.device, dtype: torch.dtype) -> Iterator[Run]:
    for samples, channels, size in ((2, 4, 8), (16, 16, 10), (128, 16, 12), (64, 32, 28), (32, 64, 56)):
        a, g = (_randn(device, dtype, samples, channels, size, size) for _ in range(2))
        coef = torch.rand(samples, device=device)
        shape: dict[str, Any] = {"kernel_size": (3, 3), "padding": 1}
        yield partial(kernels.conv_norm_sq, a, g, **shape)
        yield partial(kernels.conv_clip_sum, a, g, coef, **shape)
        yield partial(kernels.conv_norm_clip_sum, a, g, coef, 1.0, **shape)
        if device.type == "cpu":  # elsewhere the engine does not make them
            yield partial(kernels.conv_grad_sample, a, g, **shape)


def _samples(device: torch.device, dtype: torch.dtype) -> Iterator[Run]:
    for samples, count in ((2, 8), (16, 1 << 8), (64, 1 << 12), (64, 1 << 16), (64, 1 << 20)):
        x, coef = _randn(device, dtype, samples, count), torch.rand(samples, device=device)
        yield partial(kernels.grad_norm_sq, x)
        yield partial(kernels.clip_sum, x, coef)
        yield partial(kernels.grid_clip_sum, x, coef, 1.0, grid_for(1.0, 1.0))


def _rows(device: torch.device, dtype: torch.dtype) -> Iterator[Run]:
    for samples, positions, width in ((2, 4, 8), (16, 64, 64), (16, 64, 256), (16, 256, 768), (16, 1024, 2048)):
        x, coef = _randn(device, dtype, samples, positions, width), torch.rand(samples, device=device)
        ids = torch.randint(1000, (samples, positions), device=device)
        yield partial(kernels.embedding_norm_sq, ids, x)
        yield partial(kernels.embedding_clip_sum, ids, x, coef, 1000)
        yield partial(kernels.scale_shift_norm_sq, x, x, True)
        yield partial(kernels.scale_shift_clip_sum, x, x, coef, True)


def _noise(device: torch.device, dtype: torch.dtype) -> Iterator[Run]:
    noise, secret = Noise(seed=0), Noise(mode="secure")  # of numbers that nobody uses
    for count in (1, 1 << 12, 1 << 16, 1 << 20, 1 << 23, 1 << 26):
        x = torch.zeros(count, device=device)
        yield partial(kernels.add_gaussian_noise_, x, 1.0, noise)
        yield partial(kernels.grid_release, x.long(), 1.0, grid_for(1.0, 1.0), secret)


_WORKS: dict[str, Callable[[torch.device, torch.dtype], Iterator[Run]]] = {
    "memory": _memory_work,
    "elementwise functions": _special,
    "pooling": _pool,
    "products": _matmul,
    "batched products": _bmm,
    "convolutions": _conv,
    "attention": _attention,
    "norms and sums of linear layers": _linear,
    "the same without positions": _linear_rows,
    "norms and sums of convolutions": _convolutions,
    "norms and sums of gradients": _samples,
    "norms and sums of rows": _rows,
    "noise": _noise,
}


def _points(works: Iterator[Run], device: torch.device) -> Iterator[tuple[str, float, float]]:
    """Kind, amount and seconds of each work, in ascending sizes until one takes long."""
    slow: set[str] = set()
    for run in works:
        trace = Trace(device.type)
        call = trace.only(run)
        if call.kind in slow:
            continue
        seconds = _seconds(run, device)
        if seconds > _LONGEST:
            slow.add(call.kind)
        yield call.kind, float(call.flops if call.kind in BY_FLOPS else call.bytes), seconds


def _seconds(run: Run, device: torch.device) -> float:
    """The median of several calls; on a GPU of calls that are launched one after the other."""
    run()
    times: list[float] = []
    while len(times) < _REPEATS and (len(times) < 3 or sum(times) < _BUDGET):
        _wait(device)
        start, calls = time.perf_counter(), 10
        for _ in range(calls):
            run()
            if time.perf_counter() - start > _BUDGET / 10 and device.type == "cpu":
                calls = _ + 1
                break
        _wait(device)
        times.append((time.perf_counter() - start) / calls)
    return statistics.median(times)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _rising(points: list[tuple[float, float]]) -> Curve:
    """By amount; a larger amount takes no less time, whatever disturbed the machine."""
    curve: list[tuple[float, float]] = []
    for amount, seconds in sorted(points):
        if not curve or amount > curve[-1][0]:
            curve.append((max(amount, 1.0), max(seconds, curve[-1][1] if curve else 0.0)))
    return curve


# --- the machine ------------------------------------------------------------------------------------------------------


def _with_host(rates: Rates, device: torch.device) -> Rates:
    """What calls and private uses cost the host: steps of a network so small that nothing else counts."""
    work = Work("tiny", lambda: nn.Sequential(*(nn.Linear(8, 8) for _ in range(16))), _tiny_batch, _tiny_loss)
    seconds, counts, known, uses = {}, {}, {}, 1
    for strategy in (None, "auto"):
        setting = Setting(strategy, optimizer="sgd", device=device.type)
        traced = trace_step(work, setting, 4)
        counts[strategy] = traced.trace.calls.total()
        known[strategy] = sum(rates.seconds(call) * n for call, n in traced.trace.calls.items())
        uses = len(traced.trained)
        seconds[strategy] = _seconds(_tiny_step(work, setting, device), device)
    if device.type == "cuda":  # the device works meanwhile: all of it is the host's
        known = dict.fromkeys(known, 0.0)
    per_call = max(0.0, seconds[None] - known[None]) / counts[None]
    per_use = max(0.0, seconds["auto"] - known["auto"] - counts["auto"] * per_call) / uses
    return dataclasses.replace(rates, host_per_call=per_call, host_per_use=per_use)


def _tiny_batch(samples: int) -> tuple[Tensor, Tensor]:
    return torch.zeros(samples, 8), torch.zeros(samples, dtype=torch.int64)


def _tiny_loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x), y)


def _tiny_step(work: Work, setting: Setting, device: torch.device) -> Run:
    with torch.device(device):
        model, (x, y) = work.build(), work.batch(4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    engine = attach(model, optimizer, setting, 4)

    def step() -> None:
        loss = work.loss(model, x, y)
        loss.backward() if engine is None else engine.backward(loss)
        optimizer.step()
        optimizer.zero_grad()

    return step


def _memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _reserved(device: torch.device) -> int:
    """What the process takes without tensors: on a GPU its context; on a CPU it is not the planned memory."""
    if device.type != "cuda":
        return 0
    free, total = torch.cuda.mem_get_info(device)
    return max(0, total - free - torch.cuda.memory_reserved(device))


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _fast_bfloat16() -> bool:
    """CPUs with instructions for its products; on others bfloat16 is emulated, and seldom what one trains in."""
    path = Path("/proc/cpuinfo")
    return path.exists() and any(flag in path.read_text() for flag in ("amx_bf16", "avx512_bf16"))
