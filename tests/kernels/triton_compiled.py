"""The Triton kernels compiled ahead of time for GPUs that need not be here: started by test_triton.py.

By default float32 and bfloat16 for compute capability 9.0, and some variants elsewhere. With `-m slow` every kernel,
type, mode, architecture and size of launch.
"""

from __future__ import annotations

import functools
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from adamix_kernels.triton import clip, launch, noise, norm, quantile

TARGETS: dict[str, tuple[GPUTarget, launch.Launch, int]] = {  # and the bytes of shared memory of a program
    "sm_80": (GPUTarget("cuda", 80, 32), launch.LAUNCHES[8], 163 << 10),
    "sm_90": (GPUTarget("cuda", 90, 32), launch.LAUNCHES[9], 227 << 10),
    "sm_100": (GPUTarget("cuda", 100, 32), launch.LAUNCHES[10], 227 << 10),
    "gfx942": (GPUTarget("hip", "gfx942", 64), launch.LAUNCHES["gfx942"], 64 << 10),
}
TYPES = {"fp32": tl.float32, "bf16": tl.bfloat16, "fp16": tl.float16, "fp64": tl.float64}


class Variant(NamedTuple):
    """A kernel with its pointers' types and its constants."""

    name: str
    kernel: Any
    given: dict[str, Any]
    warps: str


def variants(sizes: launch.Launch, kind: str) -> Iterator[Variant]:
    dtype, wide = TYPES[kind], "*fp64" if kind == "fp64" else "*fp32"
    tables = {"table": "*i64", "blocks": "*i32"}
    for width in (sizes.norm_width, sizes.norm_width // 8):
        rows = sizes.norm_tile // width // (2 if kind == "fp64" else 1)
        for ends, coef, factor in [("partials", "*fp32", "*fp64"), ("finished", "*fp32", None), ("norm", None, None)]:
            partials = "*fp64" if ends == "partials" else None
            given = {**tables, "partials": partials, "norm_sq": "*fp32", "coef": coef, "factor": factor,
                     "DTYPE": dtype, "BLOCK": sizes.norm_block, "ROWS": rows, "WIDTH": width}  # fmt: skip
            yield Variant(f"partial_norms {width} {ends}", norm.partial_norms, given, "norm_warps")
    width = sizes.sum_width * (2 if kind in ("bf16", "fp16") else 1)
    for unit, noisy, factor in [(1, False, None), (2, False, None), (8, False, None), (2, True, "*fp64"),
                                (2, True, None), (8, True, "*fp64"), (8, True, None)]:  # fmt: skip
        given = {**tables, "coef": "*fp32", "out": wide, "factor": factor, "DTYPE": dtype, "WIDTH": width,
                 "UNIT": unit, "NOISE": noisy}  # fmt: skip
        yield Variant(f"weighted_sums {unit} {noisy} {factor}", clip.weighted_sums, given, "sum_warps")
    for unit, factor in [(2, None), (2, "*fp64"), (8, None), (8, "*fp64")]:
        given = {**tables, "factor": factor, "DTYPE": dtype, "WIDTH": sizes.noise_width, "UNIT": unit}
        yield Variant(f"add_noise {unit} {factor}", noise.add_noise, given, "noise_warps")
    if kind in ("fp32", "fp64"):
        for unit, noisy in [(1, False), (2, True), (8, True)]:
            given = {**tables, "scratch": "*fp64", "out": wide, "factor": None, "WIDTH": sizes.sum_width,
                     "UNIT": unit, "NOISE": noisy}  # fmt: skip
            yield Variant(f"add_splits {unit} {noisy}", clip.add_splits, given, "sum_warps")
        for width in (sizes.finish_tile, sizes.finish_tile // 16):
            given = {"partials": "*fp64", "norm_sq": "*fp32", "coef": "*fp32", "factor": "*fp64" if kind == "fp64" else
                     None, "ROWS": sizes.finish_tile // width, "WIDTH": width}  # fmt: skip
            yield Variant(f"finish_norms {width}", norm.finish_norms, given, "finish_warps")
        for width, resident in [(sizes.quantile_width // 16, True), (sizes.quantile_width, True),
                                (sizes.quantile_width, False)]:  # fmt: skip
            given = {"values": f"*{kind}", "out": "*fp32", "WIDTH": width, "RESIDENT": resident}
            yield Variant(f"order_statistic {width} {resident}", quantile.order_statistic, given, "quantile_warps")
    given = {"norm_sq": f"*{kind}", "coef": "*fp32", "factor": None, "WIDTH": sizes.finish_tile}
    yield Variant("coefficients", norm.coefficients, given, "finish_warps")


def runs() -> Iterator[Any]:
    quick = (
        "partial_norms 256 partials",
        "weighted_sums 8 True *fp64",
        "add_noise 2 None",
        "order_statistic 1024 True",
    )
    for target, (_, sizes, _) in TARGETS.items():
        for kind in TYPES:
            for variant in variants(sizes, kind):
                main = target == "sm_90" and kind in ("fp32", "bf16")
                slow = not main and not (kind in ("fp32", "fp64") and variant.name in quick)
                name = f"{target}-{kind}-{variant.name}".replace(" ", "_").replace("*", "")
                yield pytest.param(target, variant, kind, id=name, marks=[pytest.mark.slow] if slow else [])


def compiled(target: str, variant: Variant) -> Any:
    sizes = TARGETS[target][1]
    warps = getattr(sizes, variant.warps)
    options = {"num_warps": warps} if variant.kernel is quantile.order_statistic else sizes.options(warps)
    return built(target, variant.kernel, variant.given, options)


def built(target: str, kernel: Any, given: dict[str, Any], options: dict[str, int]) -> Any:
    """As the launcher would: pointers are multiples of 16 bytes, but for those it is told nothing about."""
    gpu = TARGETS[target][0]
    unknown = {p.name for p in kernel.params if p.do_not_specialize_on_alignment}
    signature: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    hints: dict[tuple[int, ...], Any] = {}
    for i, name in enumerate(kernel.arg_names):
        value = given.get(name, "i32")
        if isinstance(value, str):
            signature[name] = value
            if value.startswith("*") and name not in unknown:
                hints[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[name], constants[(i,)] = "constexpr", value
    known = vars(triton.compiler.make_backend(gpu).parse_options(options))
    assert options.keys() <= known.keys(), "the launcher refuses options that it does not know"
    return triton.compile(ASTSource(kernel, signature, constants, hints), target=gpu, options=options)


@functools.cache
def tool(name: str) -> str:
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def resources(cubin: bytes, folder: Path) -> dict[str, int]:
    path = folder / "kernel.cubin"
    path.write_bytes(cubin)
    report = subprocess.run(
        [tool("cuobjdump"), "--dump-resource-usage", str(path)], capture_output=True, text=True, check=True
    )
    found = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", report.stdout)}
    assert found.keys() == {"REG", "STACK", "LOCAL"}, report.stdout
    return found


@pytest.mark.parametrize(("target", "variant", "kind"), list(runs()))
def test_compiles_within_the_limits(target: str, variant: Variant, kind: str, tmp_path: Path) -> None:
    kernel = compiled(target, variant)
    assert kernel.metadata.shared <= TARGETS[target][2]
    if target.startswith("gfx"):
        spilt = re.search(r"\.vgpr_spill_count:\s+(\d+)", kernel.asm["amdgcn"])
        assert spilt and int(spilt.group(1)) == 0
        return
    ptx = kernel.asm["ptx"]
    assert ".ftz" not in ptx, "denormals must not be flushed"
    assert not re.search(r"\.approx|div\.full", ptx), "IEEE operations only"
    assert not re.search(r"\b(atom|red)\.", ptx), "sums in a fixed order"
    used = resources(kernel.asm["cubin"], tmp_path)
    assert used["STACK"] == used["LOCAL"] == 0, f"spills: {used}"
    assert used["REG"] <= 128, used  # 16 warps: four programs, or the quantile's one
    if variant.kernel in (norm.partial_norms, clip.weighted_sums, noise.add_noise) and "32 " not in variant.name:
        pairs = r"v2\.b64" if kind == "fp64" else r"v4\.b32"
        assert re.search(rf"ld\.global(?:\.\w+)*\.{pairs}", ptx), "no 16-byte loads where the tensors are aligned"
