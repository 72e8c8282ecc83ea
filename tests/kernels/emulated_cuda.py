"""The CUDA kernels on a CPU: their sources compiled against the headers in `cuda_emulator`, taking CPU tensors."""

from __future__ import annotations

import atexit
import ctypes
import functools
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from adamix_kernels import cuda, cuda_library, use_backend

ROOT = Path(__file__).parents[2]
HEADERS = Path(__file__).parent / "cuda_emulator"
FLAGS = ["-std=c++20", "-O1", "-fPIC", "-Wno-unknown-pragmas", "-ffp-contract=off"]
FLAGS += ["-fsanitize=alignment,bounds", "-fno-sanitize-recover=all", f"-I{HEADERS}"]
GUARD = 64  # elements behind everything that the kernels are given to write


@functools.cache
def library(sources: Path = ROOT / "csrc" / "cuda") -> ctypes.CDLL:
    """Built once; takes seconds."""
    if shutil.which("g++") is None:
        pytest.skip("there is no g++")
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    objects = []
    for source in [*sorted(sources.glob("*.cu")), HEADERS / "emulator.cpp"]:
        objects.append(folder / f"{source.stem}.o")
        command = ["g++", "-x", "c++", *FLAGS, "-c", str(source), "-o", str(objects[-1])]
        subprocess.run(command, check=True)
    target = folder / "emulated.so"
    link = ["g++", "-shared", "-pthread", "-fsanitize=undefined", *map(str, objects), "-o", str(target)]
    subprocess.run(link, check=True)
    found = cuda_library.open_library(target)
    for name in ("launches", "cooperative_launches"):
        getattr(found, f"emulator_{name}").restype = ctypes.c_longlong
    return found


class Device:
    """What an emulated device was asked for."""

    def __init__(self) -> None:
        self.lib = library()
        self.buffers: list[Tensor] = []

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Memory that holds NaN, and has NaN behind it."""
        size = torch.Size(shape).numel()
        buffer = torch.full((size + GUARD,), torch.nan, dtype=dtype)
        self.buffers.append(buffer)
        return buffer[:size].view(shape)

    @property
    def launches(self) -> int:
        return int(self.lib.emulator_launches())

    @property
    def cooperative_launches(self) -> int:
        return int(self.lib.emulator_cooperative_launches())

    @property
    def allocated(self) -> int:
        return sum((len(b) - GUARD) * b.element_size() for b in self.buffers)

    def plan(self, parts: Sequence[Tensor]) -> Any:
        group = cuda.groups(parts, cuda._BLOCK)[0]
        plan = cuda_library.Plan()
        dtype = cuda_library.DTYPES[group.dtype]
        assert not self.lib.adamix_clip_sum_plan(0, dtype, len(group.blocks), len(parts[0]), plan)
        return plan


@contextmanager
def device(
    multiprocessors: int = 3, shared: int = 24 << 10, threads: int = 64, cooperative: bool = True, seed: int = 0
) -> Iterator[Device]:
    """Makes the backend "cuda" run on an emulated device; `seed` chooses the order in which threads run."""
    found = Device()
    found.lib.emulator_configure(multiprocessors, shared, threads, cooperative, seed)
    cuda._plan.cache_clear()
    with pytest.MonkeyPatch.context() as patch, use_backend("cuda"):
        patch.setattr(cuda_library, "load", lambda: found.lib)
        patch.setattr(cuda_library, "DEVICE", "cpu")
        patch.setattr(cuda_library.Call, "empty", found.empty)
        yield found
    cuda._plan.cache_clear()
    assert all(b[-GUARD:].isnan().all() for b in found.buffers), "a write beyond the end of an output"
