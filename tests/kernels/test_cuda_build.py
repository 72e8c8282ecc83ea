"""What nvcc makes of the CUDA kernels: no register is spilled, nothing is flushed to zero."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
#: Registers of a multiprocessor over the threads that __launch_bounds__ asks to run on it together.
MOST_REGISTERS = {"clip_resident": 128, "clip": 128, "norm": 64, "noise": 80, "quantile": 64}


def nvcc(*arguments: str) -> str:
    find = "import setuptools; setuptools.setup = lambda **_: None; import setup; print(setup.find_nvcc())"
    found = subprocess.run([sys.executable, "-c", find], check=False, cwd=ROOT, capture_output=True, text=True)
    if found.returncode:
        pytest.skip(found.stderr.strip().splitlines()[-1])
    command = [found.stdout.strip(), "-O3", "-std=c++17", "-ftz=false", *arguments]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return done.stdout + done.stderr


@pytest.mark.parametrize("architecture", ["80", "90", "100"])
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_nothing_is_spilled(source: Path, architecture: str, tmp_path: Path) -> None:
    target = f"-gencode=arch=compute_{architecture},code=sm_{architecture}"
    said = nvcc("-cubin", target, "-Xptxas=-v", str(source), "-o", str(tmp_path / "out"))
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", said)
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", said)]
    kernels = said.count("Compiling entry function")
    assert len(frames) == len(registers) == kernels > 0
    assert set(frames) == {("0", "0", "0")}
    assert max(registers) <= MOST_REGISTERS[source.stem], registers
    assert "bytes smem" not in said, "all shared memory is dynamic: the emulator begins it as NaN"


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_denormals_are_kept(source: Path, tmp_path: Path) -> None:
    nvcc("-ptx", "-arch=compute_90", str(source), "-o", str(tmp_path / "out.ptx"))
    text = (tmp_path / "out.ptx").read_text()
    assert ".entry" in text and ".ftz" not in text and ".approx.f32" not in text
