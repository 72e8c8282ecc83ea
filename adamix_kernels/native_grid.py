"""The compiled CPU kernels of the mechanism on whole numbers: backend "cpp" of its ops."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from adamix_kernels.memory import plain
from adamix_kernels.native import CPU, compiled, dtype_of, register
from adamix_kernels.ops._numerics import as_list
from adamix_kernels.ops.grid import bounds, factors_of, grid_clip_sum, grid_release
from adamix_kernels.ops.noise import Noise, places


@register(grid_clip_sum, "grad_sample", "coef")
def _grid_clip_sum(grad_sample: Tensor | Sequence[Tensor], coef: Tensor, max_grad_norm: float, grid: float) -> Any:
    rows = [plain(part) for part in as_list(grad_sample)]
    sums = [torch.empty(part.shape[1:], dtype=torch.int64, device=CPU) for part in rows]
    described = [
        (part.data_ptr(), math.prod(part.shape[1:]), dtype_of(part.dtype), out.data_ptr())
        for part, out in zip(rows, sums, strict=True)
    ]
    compiled().grid_clip_sum(
        described, factors_of(coef, grid).tolist(), *bounds(max_grad_norm, grid), torch.get_num_threads()
    )
    return sums[0] if isinstance(grad_sample, Tensor) else sums


@register(grid_release, "sums")
def _grid_release(
    sums: Tensor | Sequence[Tensor],
    std: float,
    grid: float,
    noise: Noise | None,
    offsets: Sequence[int] | None = None,
) -> Any:
    parts = [plain(part) for part in as_list(sums)]
    released = [torch.empty(part.shape, dtype=torch.float32, device=CPU) for part in parts]
    described = [
        (part.data_ptr(), part.numel(), offset, out.data_ptr())
        for part, offset, out in zip(parts, places(parts, offsets), released, strict=True)
    ]
    key, draw = (noise._key, noise.next_draw()) if std and noise is not None else ([], 0)
    compiled().grid_release(described, key, draw, std / grid, grid, torch.get_num_threads())
    return released[0] if isinstance(sums, Tensor) else released
