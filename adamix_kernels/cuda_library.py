"""The library of CUDA kernels: found and opened on first use, and called on addresses through ctypes.

There is no Python in it, nor torch: one build serves every version of both.
"""

from __future__ import annotations

import ctypes
import functools
import warnings
from ctypes import POINTER, c_double, c_int32, c_int64, c_uint32, c_uint64, c_void_p
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adamix_kernels.memory import capturing, none_behind, scalar
from adamix_kernels.ops.noise import Noise

#: The type of device whose tensors the kernels take. The tests run them on an emulator, on CPU tensors.
DEVICE = "cuda"

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
_MODES = {"fast": 1, "secure": 2}


class List(ctypes.Structure):
    _fields_ = (("table", c_void_p), ("blocks", c_void_p), ("count", c_int64), ("rows", c_int64))


class Number(ctypes.Structure):
    _fields_ = (("at", c_void_p), ("value", c_double))


class Drawn(ctypes.Structure):
    _fields_ = (("key", c_uint32 * 8), ("draw", c_uint64), ("factor", c_double), ("unit", Number), ("mode", c_int32))


class Plan(ctypes.Structure):
    _fields_ = (
        ("grid", c_int32),
        ("threads", c_int32),
        ("slots", c_int32),
        ("rows", c_int32),
        ("shared", c_int64),
        ("scratch", c_int64),
    )


#: Arguments of the launchers after the device; all but the last two take the stream next.
_SIGNATURES = {
    "partial_norms": (c_int32, POINTER(List), c_int64, c_int64, c_int64, c_void_p, c_double, c_void_p),
    "finish_norms": (c_void_p, c_int64, c_int64, c_double, c_int32, c_void_p),
    "clip_factors": (c_int32, c_void_p, c_int64, POINTER(Number), c_void_p),
    "clip_sum": (c_int32, POINTER(List), c_void_p, c_void_p, POINTER(Number), POINTER(Drawn), c_int32, c_void_p),
    "clip_sum_resident": (
        c_int32,
        POINTER(List),
        POINTER(Plan),
        POINTER(Number),
        POINTER(Drawn),
        c_double,
        c_void_p,
        c_void_p,
        c_void_p,
    ),
    "add_noise": (c_int32, POINTER(List), POINTER(Drawn)),
    "norm_quantile": (c_int32, c_void_p, c_int64, c_int64, c_void_p),
    "clip_sum_plan": (c_int32, c_int64, c_int64, POINTER(Plan)),
    "multiprocessors": (POINTER(c_int32),),
}


def open_library(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    for name, arguments in _SIGNATURES.items():
        stream = () if name in ("clip_sum_plan", "multiprocessors") else (c_void_p,)
        getattr(library, f"adamix_{name}").argtypes = (c_int32, *stream, *arguments)
    library.adamix_error.restype = ctypes.c_char_p
    return library


@functools.cache
def load() -> ctypes.CDLL | str:
    """The library, or why there is none. One that is there but broken warns, once."""
    if torch.version.cuda is None:
        return "this torch was built without CUDA"
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    path = Path(__file__).with_name("_cuda.so")
    if not path.exists():
        return "the CUDA kernels were not built; install again with nvcc at hand"
    try:
        return open_library(path)
    except (OSError, AttributeError) as error:
        reason = f"the CUDA kernels do not load: {error}; install again to rebuild them"
        warnings.warn(f"adamix_kernels: {reason}.", RuntimeWarning, stacklevel=2)
        return reason


def unavailable() -> str | None:
    library = load()
    if isinstance(library, str):
        return library
    return _fails_on(torch.cuda.current_device()) if DEVICE == "cuda" else None


def refused(*given: Any) -> str | None:
    reason = none_behind(given, DEVICE)
    if reason is None and DEVICE == "cuda" and unavailable() is None:
        index = next(x.device.index for x in given if isinstance(x, Tensor))
        reason = _fails_on(index or 0)
    return reason


@functools.cache
def _fails_on(index: int) -> str | None:
    """Why no kernel can run on a device: an old driver, say, or one the library holds no code for. Warns, once."""
    library = load()
    assert isinstance(library, ctypes.CDLL)
    error = library.adamix_clip_sum_plan(index, 0, 1, 1, Plan())
    if not error:
        return None
    reason = f"the CUDA kernels fail on device {index}: {library.adamix_error(error).decode()}"
    warnings.warn(f"adamix_kernels: {reason}.", RuntimeWarning, stacklevel=2)
    return reason


class Call:
    """Calls launchers for one op, on torch's current stream of a device."""

    def __init__(self, op: str, device: torch.device) -> None:
        library = load()
        assert isinstance(library, ctypes.CDLL)  # dispatch has asked `unavailable`
        self.op, self.device, self.lib = op, device, library
        self.index, self.stream = device.index or 0, None
        if device.type == "cuda":
            self.stream = torch.cuda.current_stream(device).cuda_stream

    def __call__(self, launcher: str, *arguments: Any) -> None:
        self.check(getattr(self.lib, f"adamix_{launcher}")(self.index, self.stream, *arguments))

    def check(self, error: int) -> None:
        if error:
            raise RuntimeError(f"{self.op}: CUDA error: {self.lib.adamix_error(error).decode()}")

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.device)

    def multiprocessors(self) -> int:
        count = c_int32()
        self.check(self.lib.adamix_multiprocessors(self.index, count))
        return count.value

    def noise(self, noise: Noise | None, factor: float, unit: Number) -> Drawn:
        """Standard deviation `factor` times `unit`; takes a draw."""
        if noise is None or not factor:
            return Drawn()
        if capturing(self.device):
            raise RuntimeError(
                f"{self.op}: noise cannot be captured in a CUDA graph, each replay would repeat the draw; "
                "capture the sum without noise and add the noise outside of the graph"
            )
        key = noise._key + [0] * (8 - len(noise._key))
        return Drawn((c_uint32 * 8)(*key), noise.next_draw(), factor, unit, _MODES[noise.mode])


def number(value: float | Tensor) -> tuple[Number, Tensor | None]:
    """What the kernels take for a number, and the memory it stands in."""
    if not isinstance(value, Tensor):
        return Number(None, float(value)), None
    memory = scalar(value)
    return Number(memory.data_ptr(), 0.0), memory
