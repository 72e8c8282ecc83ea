"""Builds the optional compiled kernels with ninja; everything else stands in pyproject.toml.

`csrc/` includes no torch header, so one binary serves every torch and the build needs only a C++17 compiler. Without
one, or if the build fails, the package installs all the same and runs on its torch references.
"""

from __future__ import annotations

import os
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


class NinjaBuild(build_ext):
    """Compiles each extension's sources with ninja, in parallel; a failure leaves the extension out."""

    def build_extension(self, ext: Extension) -> None:
        try:
            self._ninja(ext)
        except (ImportError, OSError, subprocess.CalledProcessError) as error:
            print(f"warning: {ext.name} is left out, its ops run on torch instead: {error}", file=sys.stderr)
            ext.optional = True

    def _ninja(self, ext: Extension) -> None:
        import ninja
        import pybind11
        from ninja import ninja_syntax

        writer_class: Any = ninja_syntax.Writer  # its annotation says str where it takes a file
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        build = (Path(self.build_temp) / ext.name).resolve()
        build.mkdir(parents=True, exist_ok=True)
        includes = [pybind11.get_include(), sysconfig.get_paths()["include"]]
        openmp = [] if sys.platform == "darwin" else ["-fopenmp"]
        link = ["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else []
        with (build / "build.ninja").open("w") as file:
            writer = writer_class(file)
            writer.rule(
                "compile",
                " ".join(["$cxx -MMD -MF $out.d", *COMPILE, *openmp, *(f"-I{i}" for i in includes), "-c $in -o $out"]),
                depfile="$out.d",
                deps="gcc",
            )
            writer.rule("link", " ".join(["$cxx -shared", *openmp, *link, "$in -o $out"]))
            writer.variable("cxx", os.environ.get("CXX", "c++"))
            objects = [f"{Path(source).stem}.o" for source in ext.sources]
            for compiled, source in zip(objects, ext.sources, strict=True):
                writer.build([compiled], "compile", [str(ROOT / source)])
            writer.build([str(target)], "link", objects)
        subprocess.run([str(Path(ninja.BIN_DIR) / "ninja"), "-C", str(build)], check=True)


setup(
    ext_modules=[
        Extension(
            "adamix_kernels._cpu",
            sources=sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc" / "cpu").glob("*.cpp")),
            optional=True,
        ),
    ],
    cmdclass={"build_ext": NinjaBuild},
)
