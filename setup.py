"""Builds the optional compiled kernels with ninja; everything else stands in pyproject.toml.

`csrc/` includes no torch header, so one binary serves every torch, and the build needs only a C++17 compiler; the CUDA
kernels are built where nvcc is found. What cannot be built is left out: the package installs all the same and runs on
its torch references.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
COMPILE = [
    "-O3",
    "-std=c++17",
    "-fPIC",
    "-fvisibility=hidden",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-strict-aliasing",
    "-Wall",
    "-Wextra",
]
# No fast-math, and denormals are kept: both are what bounds a norm.
CUDA_COMPILE = ["-O3", "-std=c++17", "-ftz=false", "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall,-Wextra"]
CUDA_ARCHITECTURES = ("80", "90", "100")
CUDA = "adamix_kernels._cuda"


class NinjaBuild(build_ext):
    """Compiles each extension's sources with ninja, in parallel; a failure leaves the extension out."""

    def build_extension(self, ext: Extension) -> None:
        try:
            self._ninja(ext, *(self._cuda() if ext.name == CUDA else self._cpp()))
        except (ImportError, OSError, subprocess.CalledProcessError) as error:
            print(f"warning: {ext.name} is left out, its ops run on torch instead: {error}", file=sys.stderr)
            ext.optional = True

    def get_ext_filename(self, fullname: str) -> str:
        # A library without Python symbols: no tag of a Python's binary interface.
        name: str = super().get_ext_filename(fullname)
        return f"{name.partition('.')[0]}.so" if fullname.endswith("_cuda") else name

    @staticmethod
    def _cpp() -> tuple[str, list[str], list[str]]:
        """The compiler, and what it is given to compile and to link."""
        import pybind11

        includes = [pybind11.get_include(), sysconfig.get_paths()["include"]]
        openmp = [] if sys.platform == "darwin" else ["-fopenmp"]
        link = ["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else []
        return os.environ.get("CXX", "c++"), [*COMPILE, *openmp, *(f"-I{i}" for i in includes)], [*openmp, *link]

    @staticmethod
    def _cuda() -> tuple[str, list[str], list[str]]:
        nvcc = find_nvcc()
        listed = subprocess.run([nvcc, "--list-gpu-arch"], check=True, capture_output=True, text=True).stdout.split()
        known = [a for a in CUDA_ARCHITECTURES if f"compute_{a}" in listed]
        if not known:
            raise OSError(f"{nvcc} compiles for none of the architectures {', '.join(CUDA_ARCHITECTURES)}")
        targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in known]
        targets.append(f"-gencode=arch=compute_{known[-1]},code=compute_{known[-1]}")  # for later devices
        return nvcc, [*CUDA_COMPILE, *targets], ["-cudart=static", "-Xlinker=--exclude-libs=ALL"]

    def _ninja(self, ext: Extension, compiler: str, compile_flags: list[str], link_flags: list[str]) -> None:
        import ninja
        from ninja import ninja_syntax

        writer_class: Any = ninja_syntax.Writer  # its annotation says str where it takes a file
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        build = (Path(self.build_temp) / ext.name).resolve()
        build.mkdir(parents=True, exist_ok=True)
        with (build / "build.ninja").open("w") as file:
            writer = writer_class(file)
            writer.rule(
                "compile",
                " ".join(["$compiler -MMD -MF $out.d", *compile_flags, "-c $in -o $out"]),
                depfile="$out.d",
                deps="gcc",
            )
            writer.rule("link", " ".join(["$compiler -shared $in", *link_flags, "-o $out"]))
            writer.variable("compiler", compiler)
            objects = [f"{Path(source).stem}.o" for source in ext.sources]
            for compiled, source in zip(objects, ext.sources, strict=True):
                writer.build([compiled], "compile", [str(ROOT / source)])
            writer.build([str(target)], "link", objects)
        subprocess.run([str(Path(ninja.BIN_DIR) / "ninja"), "-C", str(build)], check=True)


def find_nvcc() -> str:
    homes = [Path(os.environ[name]) / "bin" for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    path = os.pathsep.join([*map(str, homes), os.environ.get("PATH", ""), "/usr/local/cuda/bin"])
    nvcc = shutil.which("nvcc", path=path)
    if nvcc is None:
        raise OSError("nvcc is neither on PATH nor in CUDA_HOME")
    return nvcc


def sources(folder: str, suffix: str) -> list[str]:
    return sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc" / folder).glob(f"*.{suffix}"))


setup(
    ext_modules=[
        Extension("adamix_kernels._cpu", sources=sources("cpu", "cpp"), optional=True),
        Extension(CUDA, sources=sources("cuda", "cu"), optional=True),
    ],
    cmdclass={"build_ext": NinjaBuild},
)
