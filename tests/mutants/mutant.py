"""What a planted bug is."""

from __future__ import annotations

from typing import NamedTuple


class Mutant(NamedTuple):
    """`old` stands exactly once in `file`; with `new` in its place one of `checks` (pytest node ids) must fail."""

    name: str
    file: str
    old: str
    new: str
    checks: tuple[str, ...]
