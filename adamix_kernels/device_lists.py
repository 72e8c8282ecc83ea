"""Lists of per-sample gradients as GPU kernels take them: one table on the device, one launch for a whole model."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from adamix_kernels.memory import capturing

#: Results start at multiples of this many elements, so that a thread may write 16 bytes at once.
_ALIGN = 16


class Group(NamedTuple):
    """The tensors of a list that have one dtype. All sizes are in elements.

    `table` `[n, 4]` int64: address of the rows, columns, offset in the list as one vector, offset in the result.
    `blocks` `[k, 2]` int32: the tensor and the block of columns in it that a program takes.
    `members`: which tensors of the list these are. `size`: elements of the result, gaps included.
    `columns`: those of all members together. `widest`: those of the largest.
    """

    dtype: torch.dtype
    table: Tensor
    blocks: Tensor
    members: tuple[int, ...]
    size: int
    columns: int
    widest: int


def groups(parts: Sequence[Tensor], block: int, unit: int = 1, offsets: Sequence[int] | None = None) -> list[Group]:
    """The contiguous tensors `[B, *]` of a list, by dtype, cut into blocks of `block` columns.

    Each has its offset in the list as one vector, or that of `offsets`.

    Blocks start where the offset in the list is a multiple of `unit`, which divides `block`: the first of a tensor at
    column `-(offset % unit)`, the columns below 0 being nobody's.

    The tables of recent lists are kept: a training loop mostly meets the same addresses again, and a captured CUDA
    graph must not copy from memory of the host.
    """
    key = tuple((part.data_ptr(), math.prod(part.shape[1:]), part.dtype) for part in parts)
    placed = None if offsets is None else tuple(offsets)
    found, uploaded = _groups(key, parts[0].device, block, unit, placed)
    uploaded.wait(found)
    return found


class _Upload:
    """Tables are copied on one stream; a call on another must not read them before, nor torch reuse their memory."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream: torch.cuda.Stream | None = None
        self.event: torch.cuda.Event | None = None
        if device.type == "cuda":
            if capturing(device):
                raise RuntimeError(
                    "grad_sample: these tensors are new, and their addresses cannot be sent to the device while a "
                    "CUDA graph is captured; call the op once on the same tensors before the capture"
                )
            self.stream = torch.cuda.current_stream(device)

    def done(self) -> _Upload:
        if self.stream is not None:
            self.event = self.stream.record_event()
        return self

    def wait(self, found: list[Group]) -> None:
        """Not in a capture, which may depend on nothing outside; torch waits for the device before it begins one."""
        if capturing(self.device):
            _captured.append(found)
        elif self.event is not None and (now := torch.cuda.current_stream(self.device)) != self.stream:
            now.wait_event(self.event)
            for group in found:
                group.table.record_stream(now)
                group.blocks.record_stream(now)


#: Tables whose addresses stand in a CUDA graph, which may be replayed for as long as the process lives.
_captured: list[list[Group]] = []


@functools.lru_cache(maxsize=64)
def _groups(
    key: tuple[tuple[int, int, torch.dtype], ...],
    device: torch.device,
    block: int,
    unit: int,
    placed: tuple[int, ...] | None,
) -> tuple[list[Group], _Upload]:
    upload = _Upload(device)
    offsets = np.cumsum([0] + [cols for _, cols, _ in key]) if placed is None else np.array(placed, dtype=np.int64)
    found = []
    for dtype in dict.fromkeys(dtype for _, _, dtype in key):
        members = [i for i, part in enumerate(key) if part[2] == dtype]
        cols = np.array([key[i][1] for i in members], dtype=np.int64)
        starts = np.cumsum([0] + [_padded(int(size)) for size in cols])
        counts = np.where(cols > 0, -(-(cols + offsets[members] % unit) // block), 0)
        table = np.stack([[key[i][0] for i in members], cols, offsets[members], starts[:-1]], axis=1)
        within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        blocks = np.stack([np.repeat(np.arange(len(members)), counts), within], axis=1)
        found.append(
            Group(
                dtype,
                _upload(table.astype(np.int64), device),
                _upload(blocks.astype(np.int32), device),
                tuple(members),
                int(starts[-1]),
                int(cols.sum()),
                int(cols.max()),
            )
        )
    return found, upload.done()


def _upload(values: np.ndarray, device: torch.device) -> Tensor:
    """Without waiting for the device."""
    host = torch.from_numpy(np.ascontiguousarray(values))
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host.to(device)


def results(parts: Sequence[Tensor], group: Group, flat: Tensor) -> list[Tensor]:
    """The views of a group's flat result, one shaped as each member's `[*]`."""
    views, start = [], 0
    for i in group.members:
        size = math.prod(parts[i].shape[1:])
        views.append(flat[start : start + size].view(parts[i].shape[1:]))
        start += _padded(size)
    return views


def _padded(size: int) -> int:
    return -(-size // _ALIGN) * _ALIGN
