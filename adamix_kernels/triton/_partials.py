"""What the layers' kernels share: partial results in float64, added in a fixed order."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from adamix_kernels.triton.launch import config, double, on
from adamix_kernels.triton.norm import finish_norms

#: Bytes of the partial sums of a layer whose samples are split among programs.
_SCRATCH = 1 << 24


@triton.jit(do_not_specialize=["splits", "size"])
def add_parts(scratch, out, splits, size, WIDTH: tl.constexpr):
    """Add the rows of `scratch [splits, size]`, in order."""
    lane = tl.program_id(0).to(tl.int64) * WIDTH + tl.arange(0, WIDTH)
    total = tl.zeros([WIDTH], tl.float64)
    for split in range(splits):
        total += tl.load(scratch + split * size + lane, lane < size, 0.0)
    tl.store(out + lane, total.to(out.dtype.element_ty), lane < size)


def split(samples: int, programs: int, size: int, device: torch.device) -> int:
    """Among how many times as many programs to split the samples of a sum of `size` numbers."""
    return max(1, min(-(-config(device).sum_programs // programs), samples, _SCRATCH // (8 * size)))


def add(scratch: Tensor, out: Tensor) -> None:
    """`out [size]` of `scratch [splits, size]`; the same memory where there is one split."""
    splits, size = scratch.shape
    sizes = config(out.device)
    with on(out.device):
        add_parts[(triton.cdiv(size, sizes.finish_tile),)](
            scratch, out, splits, size, WIDTH=sizes.finish_tile, **sizes.options(sizes.finish_warps)
        )


def finish(partials: Tensor, terms: int) -> Tensor:
    """Float32 `[B]`, rounded up, of `partials [B, parts]`: `terms` numbers added in float64."""
    rows, parts = partials.shape
    sizes = config(partials.device)
    norm_sq = torch.empty(rows, dtype=torch.float32, device=partials.device)
    width = sizes.finish_tile if 16 * parts > sizes.finish_tile else sizes.finish_tile // 16
    height = sizes.finish_tile // width
    if rows:
        with on(partials.device):
            finish_norms[(triton.cdiv(rows, height),)](
                partials, norm_sq, None, None, parts, rows, *double(1 + (terms + 1) * 2.0**-52), *double(0.0), 0, 0,
                ROWS=height, WIDTH=width, **sizes.options(sizes.finish_warps),
            )  # fmt: skip
    return norm_sq
