"""Starts the tests of the Triton kernels that need a process of their own, and checks what happens without a GPU.

A process either interprets Triton kernels or compiles them.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import adamix_kernels as kernels
from adamix_kernels import device_lists
from adamix_kernels.triton import launch, unavailable

HERE = Path(__file__).parent
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


def run_alone(name: str, cache: Path, **environment: str) -> None:
    inherited = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "ignore", str(HERE / name)]
    done = subprocess.run(
        command,
        env={**inherited, "TRITON_CACHE_DIR": str(cache), **environment},
        cwd=HERE.parent.parent,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]


@needs_triton
@pytest.mark.parametrize("kind", ["", "_layers", "_linear"])
def test_interpreted(kind: str, tmp_path: Path) -> None:
    run_alone(f"triton_interpreted{kind}.py", tmp_path, TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="")


@needs_triton
@pytest.mark.parametrize("kind", ["", "_layers", "_matrix"])
def test_compiled_ahead_of_time(kind: str, tmp_path: Path) -> None:
    run_alone(f"triton_compiled{kind}.py", tmp_path)


@pytest.mark.skipif(unavailable() is None, reason="the backend can run here")
def test_without_a_gpu_asking_for_it_raises() -> None:
    with kernels.use_backend("triton"), pytest.raises(kernels.BackendError, match=r"GPU|not installed"):
        kernels.clip_coef(torch.ones(2), 1.0)
    assert "triton" not in kernels.grad_norm_sq(torch.ones(2, 2)).__class__.__module__


def test_launches_are_powers_of_two() -> None:
    for sizes in launch.LAUNCHES.values():
        for name, value in vars(sizes).items():
            if name not in ("sum_programs", "registers"):
                assert value > 0 and value & (value - 1) == 0
        assert sizes.sum_width % 8 == 0 and sizes.noise_width % 8 == 0, "whole blocks of ChaCha20"
        assert sizes.norm_block % (4 * sizes.norm_width) == 0 and sizes.norm_width <= sizes.norm_tile


def test_launches_of_layers() -> None:
    for sizes in launch.LAYER_LAUNCHES.values():
        for name, value in vars(sizes).items():
            assert name == "conv_registers" or (value > 0 and value & (value - 1) == 0)
        assert 16 <= sizes.conv_step <= sizes.conv_chain <= 64, "chains of products as `sum_error` takes them to be"
        assert min(sizes.conv_inner, sizes.conv_mixed, sizes.conv_outer) >= 16, "the least for products of matrices"


def test_tiles_keep_their_chains() -> None:
    for sizes in launch.MATRICES.values():
        for name in ("direct", "gram", "sums", "scores"):
            tiles = getattr(sizes, name)
            for kind, tile in vars(tiles).items():
                numbers = [tile.rows, tile.cols, tile.depth, tile.warps, tile.chain]
                assert all(n & (n - 1) == 0 for n in numbers) and min(numbers[:3]) >= 16
                # One dot per chain of a single type would be made one from end to end; see `_dots.py`.
                mixed = kind == "mixed" and name != "gram"
                assert tile.chain == tile.depth if mixed else 2 * tile.depth <= tile.chain <= 64
            assert name != "gram" or all(tile.rows == tile.cols for tile in vars(tiles).values())
        small = sizes.direct.half.fit(10, 3, 1)
        assert (small.rows, small.cols, small.depth, small.chain) == (16, 16, 16, 16)
        assert sizes.direct.half.fit(10, 300, 33).chain == 64


def test_blocks_start_at_multiples_of_the_unit() -> None:
    parts = [torch.zeros(2, n) for n in (5, 0, 16, 3, 40)]
    for unit in (1, 2, 8):
        (group,) = device_lists.groups(parts, 8, unit)
        covered: list[int] = []
        for tensor, block in group.blocks.tolist():
            _, cols, offset, _ = group.table[tensor].tolist()
            first = block * 8 - offset % unit
            assert (offset + first) % unit == 0 and first < cols
            covered += [offset + c for c in range(first, first + 8) if 0 <= c < cols]
        assert covered == list(range(64)), unit
        assert (group.columns, group.widest) == (64, 40)


def test_host_numbers_are_exact() -> None:
    for x in (0.1, 1e300, 5e-324, float("inf"), 1 + 2**-52):
        low, high = launch.double(x)
        assert torch.tensor([low, high], dtype=torch.int32).view(torch.float64).item() == x
    noise = kernels.Noise._with_key(bytes(range(200, 232)), "secure")
    noise._draws = 2**40 + 3
    words, unit = launch.draw(noise, torch.device("cpu"))
    assert [w & 0xFFFFFFFF for w in words] == [*noise._key, 3, 2**8] and unit == 8
    assert noise._draws == 2**40 + 4
