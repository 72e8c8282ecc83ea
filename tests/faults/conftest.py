"""The process that crashes are made in."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from crash_server import Run


@pytest.fixture(scope="session")
def server() -> Iterator[Run]:
    """Run a job of `crash_server.py`."""
    process = subprocess.Popen(
        [sys.executable, str(Path(__file__).parent / "crash_server.py")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert process.stdin is not None and process.stdout is not None

    def run(folder: Path, **job: Any) -> dict[str, Any]:
        print(json.dumps({"folder": str(folder), **job}), file=process.stdin, flush=True)
        return json.loads(process.stdout.readline())  # type: ignore[no-any-return, union-attr]

    yield run
    process.stdin.close()
    process.wait(timeout=30)
