"""The Triton kernels that multiply matrices, compiled ahead of time: started by test_triton.py.

By default for compute capability 9.0, of bfloat16 for 8.0 and 10.0 too. With `-m slow` all.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import triton
from triton.compiler import ASTSource
from triton_compiled import TARGETS, resources

from adamix_kernels.triton import head, launch, linear_norm, linear_sum

SIZES = {"sm_80": launch.MATRICES[8], "sm_90": launch.MATRICES[9], "sm_100": launch.MATRICES[10],
         "gfx942": launch.MATRICES["gfx942"]}  # fmt: skip
#: The types of the two operands.
KINDS = {
    "bf16": (torch.bfloat16, torch.bfloat16),
    "fp16": (torch.float16, torch.float16),
    "fp32": (torch.float32, torch.float32),
    "bf16_fp32": (torch.bfloat16, torch.float32),
    "fp16_fp32": (torch.float16, torch.float32),
}
NAMES = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}
#: Numbers that are multiples of 16 in layers of ordinary sizes, so that memory is read 16 bytes at a time.
MULTIPLES = ("inner", "outer", "width")


class Variant(NamedTuple):
    """A kernel with its pointers' types, constants and options, and whether it multiplies matrices."""

    name: str
    kernel: Any
    given: dict[str, Any]
    options: dict[str, int]
    dots: bool = True


def variants(sizes: launch.Matrix, kind: str) -> Iterator[Variant]:
    first, second = KINDS[kind]
    a, g = NAMES[first], NAMES[second]

    def shapes(tile: launch.Tile) -> Iterator[tuple[str, launch.Tile]]:
        yield "", tile
        yield " few classes", tile.fit(tile.rows, 10, 1000)
        yield " short", tile.fit(tile.rows, tile.cols, 16)

    narrow = kind == "fp16_fp32"  # in the other kernels both are float32
    for name, tile in () if narrow else shapes(sizes.direct.of(first, second)):
        given = {"a": a, "g": g, "partials": "*fp64", **tile.constants()}
        yield Variant(f"direct_norms{name}", linear_norm.direct_norms, given, tile.options())
    tile = sizes.gram.of(first, second)
    for name, side in [("", tile), (" short", tile.fit(16, 16, 1000))]:
        for bias in (False, True):
            given = {"a": a, "g": g, "a_length": "*fp32", "g_length": "*fp32", "partials": "*fp64", "BIAS": bias,
                     "a_error": "fp32", "g_error": "fp32", "a_floor": "fp32", "g_floor": "fp32",
                     **side.constants()}  # fmt: skip
            yield Variant(f"gram_norms{name} {bias}", linear_norm.gram_norms, given, side.options())
    common = {"a": a, "g": g, "coef": "*fp32"}
    if first == second:
        for name, tile in shapes(sizes.sums.of(first, second)):
            for out in ("*fp32", "*fp64"):
                given = {**common, "out": out, **tile.constants()}
                yield Variant(f"sample_sums{name} {out}", linear_sum.sample_sums, given, tile.options())
    for name, tile in shapes(sizes.sums.of(torch.float32, first)) if first != torch.float16 else ():
        for out, more in [("*fp32", False), ("*fp64", True)]:
            given = {**common, "out": out, "length": "*fp32", "MORE": more, **tile.constants()}
            given["SPAN"] = 512 if first == torch.bfloat16 else given["CHAIN"]
            del given["CHAIN"]
            yield Variant(f"position_sums{name} {out}", linear_sum.position_sums, given, tile.options())
    for name, tile in () if narrow else shapes(sizes.scores.of(first, second)):
        given = {"x": a, "weight": g, "bias": g, "scores": "*fp32", **tile.constants()}
        yield Variant(f"head_scores{name}", head.head_scores, given, tile.options())
        given = {"x": a, "residual": "*fp32", "basis": g, "out": "*fp32", "BIAS": True, **tile.constants()}
        yield Variant(f"head_coordinates{name}", head.head_coordinates, given, tile.options())
    options = {"num_warps": sizes.row_warps, "num_stages": 1}
    for width in (16, sizes.row_width):
        rows = {"ROWS": sizes.row_tile // width, "WIDTH": width}
        given = {"x": a, "out": "*fp32", "BIAS": True, **rows}
        yield Variant(f"row_lengths {width}", linear_norm.row_lengths, given, options, False)
        given = {"x": a, "scores": "*fp32", "labels": "*i64", "norm_sq": "*fp32", "coef": "*fp32", "length": "*fp32",
                 "losses": "*fp64", "factor": "*fp64", "BIAS": True, **rows}  # fmt: skip
        yield Variant(f"head_residuals {width}", head.head_residuals, given, options, False)
    rows = {"ROWS": sizes.bias_rows, "COLS": sizes.bias_cols}
    yield Variant("bias_norms", linear_norm.bias_norms, {"g": g, "partials": "*fp64", **rows}, options, False)
    given = {"g": g, "coef": "*fp32", "out": "*fp64", "MORE": True, **rows}
    yield Variant("bias_sums", linear_sum.bias_sums, given, options, False)
    if kind == "fp32":
        given = {"partials": "*fp64", "a_length": "*fp32", "g_length": "*fp32", "norm_sq": "*fp32",
                 "WIDTH": sizes.row_width}  # fmt: skip
        yield Variant("finish_factored", linear_norm.finish_factored, given, {"num_warps": 1, "num_stages": 1}, False)
        for unit, noisy in [(1, False), (2, True), (8, True)]:
            noise = launch.LAUNCHES[9]
            given = {"scratch": "*fp64", "out": "*fp32", "factor": "*fp64", "WIDTH": noise.noise_width, "UNIT": unit,
                     "NOISE": noisy}  # fmt: skip
            yield Variant(f"finish_sums {unit}", linear_sum.finish_sums, given, noise.options(noise.noise_warps), False)


def runs() -> Iterator[Any]:
    for target, sizes in SIZES.items():
        for kind in KINDS:
            for variant in variants(sizes, kind):
                plain = variant.dots and " short" not in variant.name and " few" not in variant.name
                quick = (target == "sm_90" and kind in ("bf16", "fp32")) or (
                    target != "gfx942" and kind in ("bf16", "bf16_fp32") and plain and " True" not in variant.name
                )
                name = f"{target}-{kind}-{variant.name}".replace(" ", "_").replace("*", "")
                yield pytest.param(target, variant, kind, id=name, marks=[] if quick else [pytest.mark.slow])


def compiled(target: str, variant: Variant) -> Any:
    """As the launcher would, for aligned tensors."""
    signature: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    hints: dict[tuple[int, ...], Any] = {}
    unknown = {p.name for p in variant.kernel.params if p.do_not_specialize_on_alignment}
    for i, name in enumerate(variant.kernel.arg_names):
        value = variant.given.get(name, "i32")
        if isinstance(value, str):
            signature[name] = value
            if (value.startswith("*") and name not in unknown) or name in MULTIPLES:
                hints[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[name], constants[(i,)] = "constexpr", value
    return triton.compile(
        ASTSource(variant.kernel, signature, constants, hints), target=TARGETS[target][0], options=variant.options
    )


def chains_that_never_end(ttir: str) -> list[str]:
    """What dots add to if another turn of a loop has left it there: the compiler has undone the chains."""
    carried = set(re.findall(r"(%\w+) =", " ".join(re.findall(r"iter_args\((.*?)\) ->", ttir))))
    return [chain for chain in re.findall(r"tt\.dot %\w+, %\w+, (%\w+)", ttir) if chain in carried]


@pytest.mark.parametrize(("target", "variant", "kind"), list(runs()))
def test_compiles_within_the_limits(target: str, variant: Variant, kind: str, tmp_path: Path) -> None:
    kernel = compiled(target, variant)
    assert kernel.metadata.shared <= TARGETS[target][2]
    if " short" not in variant.name and not (kind == "fp32" and variant.kernel is linear_sum.position_sums):
        assert variant.dots is ("tt.dot" in kernel.asm["ttir"])
        assert not chains_that_never_end(kernel.asm["ttir"])
    if target.startswith("gfx"):
        spilt = re.search(r"\.vgpr_spill_count:\s+(\d+)", kernel.asm["amdgcn"])
        assert spilt and int(spilt.group(1)) == 0
        return
    ptx = kernel.asm["ptx"]
    assert ".ftz" not in ptx, "denormals must not be flushed"
    assert not re.search(r"\.approx|div\.full", ptx), "IEEE operations only"
    assert not re.search(r"\b(atom|red)\.", ptx), "sums in a fixed order"
    assert "tf32" not in ptx, "float32 is not rounded to 11 bits"
    cores = re.search(r"\b(mma\.sync|wgmma\.mma_async|tcgen05\.mma)", ptx)
    assert bool(cores) is (variant.dots and kind != "fp32")
    used = resources(kernel.asm["cubin"], tmp_path)
    assert used["STACK"] == used["LOCAL"] == 0, f"spills: {used}"
    assert used["REG"] * 32 * variant.options["num_warps"] <= 65536, used
    scaled = variant.kernel is linear_sum.position_sums  # in registers
    if variant.dots and not scaled and len(set(KINDS[kind])) == 1 and not re.search("short|few", variant.name):
        assert re.search(r"cp\.async\.cg\.shared\.global .*, 0x10", ptx), "no 16-byte loads of aligned tensors"
