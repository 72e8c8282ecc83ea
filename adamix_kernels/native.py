"""Loads the compiled CPU kernels on first use and attaches them as the backend "cpp"."""

from __future__ import annotations

import functools
import importlib.util
import math
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from adamix_kernels.memory import none_behind, not_writable, plain
from adamix_kernels.ops._numerics import as_list, sum_dtype
from adamix_kernels.ops.clip import ClippedSum, clip_coef, clip_sum, clip_sum_noise
from adamix_kernels.ops.noise import Noise, add_gaussian_noise_, places
from adamix_kernels.ops.norm import grad_norm_sq
from adamix_kernels.ops.quantile import norm_quantile, rank_of
from adamix_kernels.spec import FLOAT_DTYPES

CPU = torch.device("cpu")  # whatever the default device


@functools.cache
def load() -> ModuleType | str:
    """The compiled module, or why there is none. A module that is there but broken warns, once."""
    if importlib.util.find_spec("adamix_kernels._cpu") is None:
        return "the compiled CPU kernels were not built; install again with a C++17 compiler at hand"
    try:
        from adamix_kernels import _cpu  # type: ignore[attr-defined]
    except ImportError as error:
        reason = f"the compiled CPU kernels do not load: {error}; install again to rebuild them"
        warnings.warn(f"adamix_kernels: {reason}. Falling back to torch.", RuntimeWarning, stacklevel=2)
        return reason
    return _cpu


def unavailable() -> str | None:
    module = load()
    return module if isinstance(module, str) else None


def compiled() -> ModuleType:
    module = load()
    assert isinstance(module, ModuleType)  # dispatch has asked `unavailable`
    return module


@functools.cache
def dtype_of(dtype: torch.dtype) -> Any:
    return getattr(compiled().DType, str(dtype).removeprefix("torch."))


_LISTS = (list, tuple)


def register(
    op: Any,
    *tensors: str,
    dtypes: Sequence[torch.dtype] = FLOAT_DTYPES,
    computes_in: Sequence[str] | None = None,
) -> Callable[[Any], Any]:
    """Attach an implementation of `op` for plain CPU tensors, which are the arguments `tensors`, or lists in them."""

    def refuses(**call: Any) -> str | None:
        values = [call[name] for name in tensors]
        return none_behind([x for value in values for x in (value if isinstance(value, _LISTS) else (value,))], "cpu")

    return op.register(
        "cpp", device="cpu", dtypes=dtypes, computes_in=computes_in, unavailable=unavailable, refuses=refuses
    )


@functools.cache
def cache_bytes() -> int:
    """Size of the processor's last cache; 16 MiB if it is not known."""
    sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    found = [int(size.read_text().strip().removesuffix("K")) << 10 for size in sizes]
    return max(found, default=16 << 20)


@grad_norm_sq.register(
    "cpp", device="cpu", unavailable=unavailable, refuses=lambda grad_sample: none_behind(as_list(grad_sample), "cpu")
)
def _grad_norm_sq(grad_sample: Tensor | Sequence[Tensor]) -> Tensor:
    parts = [plain(part) for part in as_list(grad_sample)]
    out = torch.empty(parts[0].shape[0], dtype=torch.float32, device=CPU)
    described = [(p.data_ptr(), math.prod(p.shape[1:]), dtype_of(p.dtype)) for p in parts]
    compiled().grad_norm_sq(described, len(out), out.data_ptr(), torch.get_num_threads())
    return out


@register(clip_coef, "norm_sq", "max_grad_norm")
def _clip_coef(norm_sq: Tensor, max_grad_norm: float | Tensor) -> Tensor:
    squares = plain(norm_sq)
    out = torch.empty(len(squares), dtype=torch.float32, device=CPU)
    compiled().clip_coef(
        squares.data_ptr(), dtype_of(squares.dtype), float(max_grad_norm), len(squares), out.data_ptr()
    )
    return out


@register(norm_quantile, "norm_sq")
def _norm_quantile(norm_sq: Tensor, q: float) -> Tensor:
    squares = plain(norm_sq)
    count = len(squares)
    norm = compiled().norm_quantile(squares.data_ptr(), dtype_of(squares.dtype), count, rank_of(count, q))
    return torch.tensor(norm, dtype=torch.float32, device=CPU)


def _parts(grad_sample: Tensor | Sequence[Tensor]) -> tuple[list[tuple[Any, ...]], list[Tensor], list[Tensor]]:
    """What a kernel is told of each part; the memory that must outlive the call; where the sums go."""
    rows = [plain(part) for part in as_list(grad_sample)]
    sums = [torch.empty(part.shape[1:], dtype=sum_dtype(part), device=CPU) for part in rows]
    described, offset = [], 0
    for part, out in zip(rows, sums, strict=True):
        cols = out.numel()
        described.append((part.data_ptr(), cols, dtype_of(part.dtype), out.data_ptr(), offset))
        offset += cols
    return described, rows, sums


@clip_sum.register(
    "cpp",
    device="cpu",
    unavailable=unavailable,
    refuses=lambda grad_sample, coef: none_behind([*as_list(grad_sample), coef], "cpu"),
)
def _clip_sum(grad_sample: Tensor | Sequence[Tensor], coef: Tensor) -> Any:
    described, _alive, sums = _parts(grad_sample)
    factors = plain(coef)
    compiled().clip_sum(described, len(factors), factors.data_ptr(), dtype_of(factors.dtype), torch.get_num_threads())
    return sums[0] if isinstance(grad_sample, Tensor) else sums


@clip_sum_noise.register(
    "cpp",
    device="cpu",
    unavailable=unavailable,
    refuses=lambda grad_sample, max_grad_norm, **_: none_behind([*as_list(grad_sample), max_grad_norm], "cpu"),
)
def _clip_sum_noise(
    grad_sample: Tensor | Sequence[Tensor],
    max_grad_norm: float | Tensor,
    noise_multiplier: float = 0.0,
    noise: Noise | None = None,
) -> ClippedSum:
    described, rows, sums = _parts(grad_sample)
    norm_sq = torch.empty(rows[0].shape[0], dtype=torch.float32, device=CPU)
    threshold, key, draw = float(max_grad_norm), [], 0
    if noise_multiplier:
        assert noise is not None  # the op has checked
        key, draw = noise._key, noise.next_draw()
    std = noise_multiplier * threshold if noise_multiplier else 0.0  # 0 times an infinite threshold is none
    compiled().clip_sum_noise(
        described,
        norm_sq.shape[0],
        threshold,
        norm_sq.data_ptr(),
        key,
        draw,
        std,
        torch.get_num_threads(),
        cache_bytes(),
    )
    return ClippedSum(sums[0] if isinstance(grad_sample, Tensor) else sums, norm_sq)


@add_gaussian_noise_.register(
    "cpp",
    device="cpu",
    unavailable=unavailable,
    refuses=lambda tensor, std, **_: not_writable(tensor) or none_behind([*as_list(tensor), std], "cpu"),
)
def _add_gaussian_noise_(tensor: Any, std: float | Tensor, noise: Noise, offsets: Sequence[int] | None = None) -> Any:
    scale, draw = float(std), noise.next_draw()  # first: the std may be an element of what is written
    threads = torch.get_num_threads()
    waiting: list[tuple[int, Any, int, int]] = []

    def add() -> None:
        compiled().add_gaussian_noise(waiting, scale, noise._key, draw, threads)
        waiting.clear()

    with torch.no_grad():
        for part, offset in zip(as_list(tensor), places(as_list(tensor), offsets), strict=True):
            in_place = part.dtype in (torch.float32, torch.float64) and part.is_contiguous() and not part.is_neg()
            if not in_place:
                add()  # parts may share memory: a copy must hold the noise of those before
            flat = part if in_place else plain(part if part.dtype == torch.float64 else part.float())
            waiting.append((flat.data_ptr(), dtype_of(flat.dtype), flat.numel(), offset))
            if not in_place:
                add()
                part.copy_(flat)
            torch.autograd.graph.increment_version(part)  # it was written behind torch's back
        add()
    return tensor
