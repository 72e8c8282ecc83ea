"""The README's examples run, and its op table is the specs'."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import adamix_kernels  # noqa: F401  registers every op
from adamix_kernels.spec import op_table

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text()


@pytest.mark.parametrize(
    "code",
    re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL),
    ids=["adamix", "adamix_kernels", "DPEngine", "mixed", "DeepAdaMix"],
)
def test_example_runs(code: str) -> None:
    exec(compile(code, "README.md", "exec"), {})


def test_the_op_table_is_up_to_date() -> None:
    assert op_table() in TEXT, "run: python -c 'import adamix_kernels.spec as s; print(s.op_table())'"


def test_the_command_for_a_gpu_finds_its_tests_and_benchmarks() -> None:
    (command,) = re.findall(r"^pytest (-m gpu tests benchmarks .*)$", TEXT, re.MULTILINE)
    collect = [sys.executable, "-m", "pytest", "-q", "--collect-only", "-p", "no:cacheprovider", *command.split()]
    done = subprocess.run(collect, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout[-2000:]
    for file in ("test_one_pass", "test_gaussian_noise", "test_ops", "test_specs", "test_cuda_gpu", "test_triton_gpu"):
        assert f"{file}.py::" in done.stdout, file
