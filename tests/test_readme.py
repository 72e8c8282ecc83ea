"""The README's examples run, and its op table is the specs'."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import adamix_kernels  # noqa: F401  registers every op
from adamix_kernels.spec import op_table

TEXT = (Path(__file__).parents[1] / "README.md").read_text()


@pytest.mark.parametrize("code", re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL), ids=["adamix", "adamix_kernels"])
def test_example_runs(code: str) -> None:
    exec(compile(code, "README.md", "exec"), {})


def test_the_op_table_is_up_to_date() -> None:
    assert op_table() in TEXT, "run: python -c 'import adamix_kernels.spec as s; print(s.op_table())'"
