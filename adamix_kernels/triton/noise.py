"""Gaussian noise on lists of tensors, in place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from adamix_kernels.device_lists import groups
from adamix_kernels.memory import plain
from adamix_kernels.ops._numerics import as_list
from adamix_kernels.ops.noise import Noise
from adamix_kernels.triton._random import normals
from adamix_kernels.triton.launch import config, draw, on, scaled
from adamix_kernels.triton.norm import TYPES, aligned, columns, scale, view, wide

_STREAM = ["k0", "k1", "k2", "k3", "k4", "k5", "k6", "k7", "draw0", "draw1"]


@triton.jit
def narrow(x, DTYPE: tl.constexpr):
    """Float64 as another type, by way of float32 as torch does."""
    return x if tl.float64 == DTYPE else x.to(tl.float32).to(DTYPE)


@triton.jit
def _add(address, count, first, z, DTYPE: tl.constexpr, WIDTH: tl.constexpr, WHOLE: tl.constexpr):
    """`WHOLE`: 16 bytes at a time, all of them the tensor's."""
    data, _ = view(address, count, first, DTYPE, WHOLE)
    low, high = columns(count, first, WIDTH)
    lane = tl.arange(0, WIDTH)
    mask = None if WHOLE else (lane >= low) & (lane < high)
    x = tl.load(data + lane, mask)
    tl.store(data + lane, narrow(wide(x).to(tl.float64) + z, DTYPE), mask)


@triton.jit(do_not_specialize=["low", "high", *_STREAM], do_not_specialize_on_alignment=["factor"])
def add_noise(
    table, blocks, factor, low, high, k0, k1, k2, k3, k4, k5, k6, k7, draw0, draw1,
    DTYPE: tl.constexpr, WIDTH: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """A program adds WIDTH elements of the draw to a tensor."""
    entry = blocks + 2 * tl.program_id(0)
    tensor = table + 4 * tl.load(entry)
    address, count, offset = tl.load(tensor), tl.load(tensor + 1), tl.load(tensor + 2)
    first = tl.load(entry + 1).to(tl.int64) * WIDTH - offset % UNIT
    z = normals(k0, k1, k2, k3, k4, k5, k6, k7, draw0, draw1, offset + first, WIDTH, UNIT) * scale(factor, low, high)
    if aligned(address, 0, first, DTYPE) & (first >= 0) & (first + WIDTH <= count):
        _add(address, count, first, z, DTYPE, WIDTH, True)
    else:
        _add(address, count, first, z, DTYPE, WIDTH, False)


def add_gaussian_noise_(tensor: Any, std: float | Tensor, noise: Noise, offsets: Sequence[int] | None = None) -> Any:
    parts = as_list(tensor)
    device = parts[0].device
    words, unit = draw(noise, device)
    # Memory that the kernel writes: the tensor's own, or a copy's that goes back.
    written = [plain(part) for part in parts]
    factor, number = scaled(1.0, std)
    sizes = config(device)
    with on(device), torch.no_grad():
        flat = [part.view(1, part.numel()) for part in written]
        for group in groups(flat, sizes.noise_width, unit, offsets):
            if len(group.blocks):
                add_noise[(len(group.blocks),)](
                    group.table, group.blocks, factor, *number, *words,
                    DTYPE=TYPES[group.dtype], WIDTH=sizes.noise_width, UNIT=unit,
                    **sizes.options(sizes.noise_warps),
                )  # fmt: skip
        for part, copy in zip(parts, written, strict=True):
            if copy.data_ptr() != part.data_ptr() or not part.is_contiguous():
                part.copy_(copy)
    # They were written behind torch's back.
    torch.autograd.graph.increment_version([part for part in parts if not part.is_inference()])
    return tensor
