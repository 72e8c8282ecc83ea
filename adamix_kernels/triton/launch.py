"""How the Triton kernels are launched: sizes per architecture as data, and what the wrappers share on the host.

Nothing is tuned at run time, which would need a driver and make results depend on timings. The sizes follow from this:
all kernels stream memory once, so they want about 32 KiB of loads in flight per multiprocessor and enough programs to
fill the device; the accumulators, in double, take two registers each.
"""

from __future__ import annotations

import functools
import os
import struct
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from adamix_kernels.memory import capturing, scalar
from adamix_kernels.ops.noise import Noise


@dataclass(frozen=True)
class Launch:
    """Widths and tiles are powers of two; `*_warps` are per program. No loop is software-pipelined."""

    #: Columns behind one partial sum of squares: 8 bytes per 4096 elements of a row are P / 2 floats at B = 1024.
    norm_block: int = 4096
    #: Elements of one of the four loads a program makes at a time, and its columns where the tensors are wide: 4 rows
    #: of 256. In 4 warps this is eight 16-byte loads per thread, 16 KiB per program.
    norm_tile: int = 1024
    norm_width: int = 256
    norm_warps: int = 4
    #: Partial sums added at a time.
    finish_tile: int = 1024
    finish_warps: int = 4
    #: Columns of a sum per program, twice as many of 2-byte types: four rows at a time are four 16-byte loads per
    #: thread. That takes about 95 and 110 registers, so 40 and 32 KiB are in flight.
    sum_width: int = 512
    sum_warps: int = 4
    #: With fewer programs than this, the samples are split among several; see `clip.py`.
    sum_programs: int = 4 * 132
    #: Elements per program of the noise, which is bound by arithmetic: 4 pairs of normals per thread.
    noise_width: int = 1024
    noise_warps: int = 4
    #: The most per thread, but for the quantile: 4 programs of 4 warps fit on a multiprocessor. Left to itself, ptxas
    #: takes more in places, and for 8.0 even spills with fewer.
    registers: int | None = 128
    #: Values the quantile holds in registers; beyond, it reads them once per bit.
    quantile_width: int = 16384
    quantile_warps: int = 16

    def options(self, warps: int) -> dict[str, int]:
        limit = {} if self.registers is None else {"maxnreg": self.registers}
        return {"num_warps": warps, "num_stages": 1, **limit}


#: By major compute capability, or the name of another target. A100 and H100/H200 differ in the number of
#: multiprocessors (108, 132), B200 has 148. A warp of gfx942 has 64 threads, and 304 compute units want programs.
LAUNCHES: dict[int | str, Launch] = {
    8: Launch(sum_programs=4 * 108),
    9: Launch(),
    10: Launch(sum_programs=4 * 148),
    "gfx942": Launch(
        norm_warps=2,
        finish_warps=2,
        sum_warps=2,
        noise_warps=2,
        quantile_warps=8,
        sum_programs=4 * 304,
        registers=None,
    ),
    "default": Launch(),
    "interpreter": Launch(sum_programs=4, registers=None),
}


@dataclass(frozen=True)
class LayerLaunch:
    """Of the kernels in `scale_shift`, `embedding` and `conv`. Not measured on a GPU."""

    #: Positions times channels a program loads at a time: 4 per thread of four float64 accumulators.
    channel_tile: int = 512
    channel_warps: int = 4
    #: Columns per program, and sorted positions behind one partial result: two float64 rows per 64.
    embedding_width: int = 256
    embedding_chunk: int = 64
    embedding_warps: int = 2
    #: A tile of the gradient: inputs, fewer where they are of several taps, by outputs. Positions added up in one chain
    #: of products, at most 64 (see `sum_error`), and loaded at a time. More of anything spills.
    conv_inner: int = 64
    conv_mixed: int = 32
    conv_outer: int = 64
    conv_chain: int = 64
    conv_step: int = 32
    conv_warps: int = 8
    #: The most per thread. Left to itself, ptxas takes fewer in places and spills.
    conv_registers: int | None = 255
    #: Pixels or positions per program of what the error takes.
    conv_width: int = 256
    conv_width_warps: int = 4

    def tile_options(self) -> dict[str, int]:
        limit = {} if self.conv_registers is None else {"maxnreg": self.conv_registers}
        return {"num_warps": self.conv_warps, "num_stages": 1, **limit}


LAYER_LAUNCHES: dict[int | str, LayerLaunch] = {
    "gfx942": LayerLaunch(channel_warps=2, embedding_warps=1, conv_warps=4, conv_registers=None, conv_width_warps=2),
    "default": LayerLaunch(),
    "interpreter": LayerLaunch(conv_registers=None),
}


def interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def _target(device: torch.device) -> int | str:
    if device.type == "cpu":
        return "interpreter"
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    return torch.cuda.get_device_capability(device)[0]


def config(device: torch.device) -> Launch:
    return LAUNCHES.get(_target(device), LAUNCHES["gfx942" if torch.version.hip else "default"])


def layers(device: torch.device) -> LayerLaunch:
    return LAYER_LAUNCHES.get(_target(device), LAYER_LAUNCHES["gfx942" if torch.version.hip else "default"])


def on(device: torch.device) -> AbstractContextManager[object]:
    """Triton launches on the current device, which need not be the tensors'."""
    if device.type == "cpu" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)


def double(x: float) -> tuple[int, int]:
    """As two int32: Triton passes a Python float as float32, and compiles anew for an int beyond 32 bits."""
    return struct.unpack("<ii", struct.pack("<d", x))


def scaled(scale: float, by: float | Tensor) -> tuple[Tensor | None, tuple[int, int]]:
    """`scale * by` as kernels take it: the address of a factor on the device or None, and the rest of it."""
    return (scalar(by), double(scale)) if isinstance(by, Tensor) else (None, double(scale * by))


class Draw(NamedTuple):
    """A reserved draw as kernels take it.

    `words`: ten int32, eight of the key (Philox uses two) and the halves of the draw number. `unit`: how many normals
    one block of the stream gives; programs start at multiples of it.
    """

    words: tuple[int, ...]
    unit: int


NO_DRAW = Draw((0,) * 10, 1)


def draw(noise: Noise, device: torch.device) -> Draw:
    if capturing(device):
        raise RuntimeError(
            "noise: the draw number would be fixed in the CUDA graph being captured, and every replay would add the "
            "same noise; capture the step without its noise, and call add_gaussian_noise_ after each replay"
        )
    key = (noise._key + [0] * 6)[:8]
    words = struct.unpack("<10i", struct.pack("<8IQ", *key, noise.next_draw()))
    return Draw(words, 8 if noise.mode == "secure" else 2)


@dataclass(frozen=True)
class Tile:
    """What one program makes of a matrix: `rows` x `cols`, `depth` terms per dot, powers of two and 16 at least.

    `chain`: the terms in one float32 accumulator, see `_dots.py`. Two dots at least, or one of mixed types.
    """

    rows: int
    cols: int
    depth: int
    warps: int
    stages: int
    chain: int = 64

    def fit(self, rows: int, cols: int, terms: int) -> Tile:
        """As large as the matrix needs. A chain may be one dot if it is the only one."""

        def least(most: int, size: int) -> int:
            return min(most, max(16, 1 << max(size - 1, 0).bit_length()))

        high, wide, deep = least(self.rows, rows), least(self.cols, cols), least(self.depth, terms)
        return replace(
            self,
            rows=high,
            cols=wide,
            depth=deep,
            warps=self.warps if 4 * high * wide >= self.rows * self.cols else min(4, self.warps),
            chain=self.chain if terms > deep else deep,
        )

    def constants(self) -> dict[str, int]:
        return {"ROWS": self.rows, "COLS": self.cols, "DEPTH": self.depth, "CHAIN": self.chain}

    def options(self) -> dict[str, int]:
        return {"num_warps": self.warps, "num_stages": self.stages}


@dataclass(frozen=True)
class Tiles:
    """By the types of two operands: `half` if both are float16 or bfloat16, `mixed` if bfloat16 and float32."""

    half: Tile
    mixed: Tile
    single: Tile

    def of(self, *operands: torch.dtype) -> Tile:
        if set(operands) == {torch.bfloat16, torch.float32}:
            return self.mixed
        return self.single if len(set(operands)) > 1 or torch.float32 in operands else self.half


_MIXED = Tile(64, 64, depth=32, warps=4, stages=2, chain=32)
_SINGLE = Tile(64, 64, depth=16, warps=4, stages=2)
_SPREAD = replace(_SINGLE, warps=8)


@dataclass(frozen=True)
class Matrix:
    """Launches of the kernels that multiply matrices. Not measured on a GPU: what fits registers and shared memory."""

    #: A tile has two accumulators in float32, the chain and the total.
    direct: Tiles = Tiles(Tile(128, 128, depth=32, warps=8, stages=3), _MIXED, _SINGLE)
    #: Square. Each of the two dots is of one type, so nothing is mixed.
    gram: Tiles = Tiles(Tile(64, 64, depth=32, warps=4, stages=3), _SPREAD, _SPREAD)
    #: The clipped sums have a float64 total besides: four registers for each entry.
    sums: Tiles = Tiles(Tile(128, 64, depth=32, warps=8, stages=3), replace(_MIXED, warps=8), _SPREAD)
    #: Rows are samples, columns are classes.
    scores: Tiles = Tiles(Tile(64, 64, depth=32, warps=8, stages=3), replace(_MIXED, warps=8), _SPREAD)
    #: With fewer programs than this the samples are split among several, each with this many positions at least.
    programs: int = 2 * 132
    share: int = 256
    #: Columns and elements per program of what reads rows once.
    row_width: int = 256
    row_tile: int = 1024
    row_warps: int = 4
    #: Positions at a time and columns of the bias's sums: 32 bytes of a narrow type are what memory gives at once.
    bias_rows: int = 64
    bias_cols: int = 16
    #: Bytes of a softmax head's residuals that are made before they are summed, so that they stay in the L2 cache.
    residuals: int = 32 << 20


_NARROW = Tile(64, 64, depth=32, warps=4, stages=2)
_CDNA = Tiles(_NARROW, replace(_MIXED, stages=1), replace(_SINGLE, stages=1))

#: As `LAUNCHES`. A multiprocessor takes two programs of the sums.
MATRICES: dict[int | str, Matrix] = {
    8: Matrix(
        direct=Tiles(Tile(128, 64, depth=32, warps=8, stages=3), _MIXED, _SINGLE),
        programs=2 * 108,
        residuals=24 << 20,
    ),
    9: Matrix(),
    # ptxas gives 128 registers to what loads ahead there, and spills.
    10: Matrix(sums=replace(Matrix.sums, mixed=replace(_MIXED, warps=8, stages=1)), programs=2 * 148),
    "gfx942": Matrix(
        direct=_CDNA,
        gram=replace(_CDNA, mixed=_CDNA.single),
        sums=_CDNA,
        scores=_CDNA,
        programs=2 * 304,
        row_warps=2,
    ),
    "default": Matrix(),
    "interpreter": Matrix(programs=4),
}


def matrix(device: torch.device) -> Matrix:
    return MATRICES.get(_target(device), MATRICES["gfx942" if torch.version.hip else "default"])
