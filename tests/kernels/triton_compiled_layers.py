"""The Triton kernels of layers compiled ahead of time for GPUs that need not be here: started by test_triton.py.

By default float32 and bfloat16 for compute capability 9.0, and the convolutions' tiles everywhere. With `-m slow` all.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from triton_compiled import TARGETS, TYPES, built, resources

from adamix_kernels.triton import _conv_tiles, _partials, conv, embedding, launch, scale_shift

TILES = (_conv_tiles.tile_norms, _conv_tiles.tile_sums)


class Variant(NamedTuple):
    """A kernel with its pointers' types and its constants, its options, and which numbers are multiples of 16."""

    name: str
    kernel: Any
    given: dict[str, Any]
    options: dict[str, int]
    multiples: tuple[str, ...] = ()


def sizes_of(target: str) -> launch.LayerLaunch:
    return launch.LAYER_LAUNCHES.get(target, launch.LAYER_LAUNCHES["default"])


def variants(target: str, kind: str) -> Iterator[Variant]:
    layers, sizes = sizes_of(target), TARGETS[target][1]
    out = "*fp64" if kind == "fp64" else "*fp32"
    factors = {"a": f"*{kind}", "g": f"*{kind}"}
    options = sizes.options(layers.channel_warps)
    for bias, rows in [(True, 1), (False, 1), (True, 16)]:
        tile = {"BIAS": bias, "ROWS": rows, "WIDTH": layers.channel_tile // rows}
        given = {**factors, "partials": "*fp64", **tile}
        yield Variant(f"channel_norms {bias} {rows}", scale_shift.channel_norms, given, options, ("width",))
        given = {**factors, "coef": "*fp32", "out": out, **tile}
        yield Variant(f"channel_sums {bias} {rows}", scale_shift.channel_sums, given, options, ("width",))
    options = sizes.options(layers.embedding_warps)
    for ids in ("*i64", "*i32"):
        common = {"keys": ids, "CHUNK": layers.embedding_chunk, "WIDTH": layers.embedding_width}
        given = {**common, "g": f"*{kind}", "order": "*i64", "partials": "*fp64"}
        yield Variant(f"run_norms {ids}", embedding.run_norms, given, options, ("width",))
        given = {**common, "g": f"*{kind}", "order": "*i64", "coef": "*fp32", "out": out, "scratch": "*fp64"}
        yield Variant(f"run_sums {ids}", embedding.run_sums, given, options, ("width",))
        given = {**common, "out": out, "scratch": "*fp64"}
        yield Variant(f"join_runs {ids}", embedding.join_runs, given, options, ("width",))
    given = {"scratch": "*fp64", "out": out, "WIDTH": sizes.finish_tile}
    yield Variant("add_parts", _partials.add_parts, given, sizes.options(sizes.finish_warps))
    if kind == "fp64":
        return
    options = sizes.options(layers.conv_width_warps)
    given = {"a": f"*{kind}", "out": "*fp64", "WIDTH": layers.conv_width}
    yield Variant("pixel_squares", conv.pixel_squares, given, options)
    given = {
        "squares": "*fp64",
        "g": f"*{kind}",
        "lengths": "*fp64",
        "AXES": 3,
        "BIAS": True,
        "WIDTH": layers.conv_width,
    }
    yield Variant("window_lengths", conv.window_lengths, given, options)
    for groups in (1, sizes.finish_tile // 4):
        given = {"squares": "*fp64", "lengths": "*fp64", "norm_sq": "*fp32", "GROUPS": groups,
                 "PARTS": sizes.finish_tile // groups}  # fmt: skip
        yield Variant(f"finish_groups {groups}", conv.finish_groups, given, sizes.options(sizes.finish_warps))
    options = layers.tile_options()
    largest = {"OUTER": layers.conv_outer, "CHAIN": layers.conv_chain, "STEP": layers.conv_step}
    smallest = {"INNER": 16, "OUTER": 16, "CHAIN": 16, "STEP": 16, "ONE_TAP": False}
    for name, tile, axes, multiples in [
        ("one tap", {**largest, "INNER": layers.conv_inner, "ONE_TAP": True}, 3, ()),
        ("one tap, aligned", {**largest, "INNER": layers.conv_inner, "ONE_TAP": True}, 2, ("positions",)),
        ("mixed", {**largest, "INNER": layers.conv_mixed, "ONE_TAP": False}, 3, ()),
        ("smallest", smallest, 1, ()),
    ]:
        given = {**factors, "AXES": axes, "BIAS": True, **tile, "squares": "*fp64"}
        yield Variant(f"tile_norms {name}", _conv_tiles.tile_norms, given, options, multiples)
        for splits in ("*fp64", "*fp32"):
            given = {**factors, "AXES": axes, "BIAS": True, **tile, "coef": "*fp32", "out": splits}
            yield Variant(f"tile_sums {name} {splits}", _conv_tiles.tile_sums, given, options, multiples)


def runs() -> Iterator[Any]:
    quick = ("tile_norms one tap", "tile_sums mixed *fp64", "run_sums *i64")
    for target in TARGETS:
        for kind in TYPES:
            for variant in variants(target, kind):
                main = target == "sm_90" and kind in ("fp32", "bf16")
                slow = not main and not (kind in ("fp32", "bf16") and variant.name in quick)
                name = f"{target}-{kind}-{variant.name}".replace(" ", "_").replace("*", "")
                yield pytest.param(target, variant, kind, id=name, marks=[pytest.mark.slow] if slow else [])


@pytest.mark.parametrize(("target", "variant", "kind"), list(runs()))
def test_compiles_within_the_limits(target: str, variant: Variant, kind: str, tmp_path: Path) -> None:
    kernel = built(target, variant.kernel, variant.given, variant.options, variant.multiples)
    assert kernel.metadata.shared <= TARGETS[target][2]
    chains = re.findall(r"tt\.dot .*", kernel.asm["ttir"])
    assert bool(chains) == (variant.kernel in TILES)
    if target.startswith("gfx"):
        spilt = re.search(r"\.vgpr_spill_count:\s+(\d+)", kernel.asm["amdgcn"])
        assert spilt and int(spilt.group(1)) == 0
        assert not (chains and kind in ("bf16", "fp16")) or "v_mfma" in kernel.asm["amdgcn"]
        return
    ptx = kernel.asm["ptx"]
    assert ".ftz" not in ptx, "denormals must not be flushed"
    assert not re.search(r"\.approx|div\.full", ptx), "IEEE operations only"
    assert not re.search(r"\b(atom|red)\.", ptx), "sums in a fixed order"
    used = resources(kernel.asm["cubin"], tmp_path)
    assert used["STACK"] == used["LOCAL"] == 0, f"spills: {used}"
    assert used["REG"] * variant.options["num_warps"] * 32 <= 65536, used
    if chains:
        tensor_cores = re.search(r"mma\.sync|wgmma\.mma_async|tcgen05\.mma", ptx)
        assert bool(tensor_cores) == (kind in ("bf16", "fp16")), "and full float32 products otherwise"
        assert "tf32" not in ptx
        assert_chains_end(kernel.asm["ttir"])
    elif variant.multiples and variant.kernel is not embedding.join_runs and kind in ("fp32", "bf16"):
        assert re.search(r"ld\.global(?:\.\w+)*\.v[24]\.b32", ptx), "no wide loads where rows are aligned"


def assert_chains_end(ttir: str) -> None:
    """The product that a chain begins with is added to nothing: the sum of chains is not its accumulator."""
    names = {name: value for name, value in re.findall(r"(%\w+) = arith\.constant (dense<[^>]*>)", ttir)}
    lines = ttir.splitlines()
    (dot,) = (line for line in lines if "tt.dot " in line)
    accumulator = re.search(r"tt\.dot %\w+, %\w+, (%\w+)", dot)
    assert accumulator
    started = [re.search(rf"\{accumulator.group(1)} = (%\w+)", line) for line in lines if "scf.for" in line]
    (start,) = (found.group(1) for found in started if found)
    assert names[start] == "dense<0.000000e+00>", dot
