"""A full disk, an error, a short write at each call: the ledger loses no charge and the last checkpoint loads."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from crash_server import Run, train
from test_crashes import check_counts, finish

from adamix import durable
from adamix.checkpoint import load_checkpoint


def fail_at_calls(server: Run, tmp_path: Path, stride: int) -> int:
    failures = 0
    for offset, (fault, only) in enumerate([("EIO", None), ("ENOSPC", "write"), ("short", "write")]):
        whole = tmp_path / f"{fault}-whole"
        whole.mkdir()
        calls = server(whole, only=only)["calls"]
        for at in range(1 + offset * stride // 3, calls + 1, stride):
            folder = tmp_path / f"{fault}-{at}"
            folder.mkdir()
            outcome = server(folder, fault=fault, at=at, only=only)
            assert outcome["status"] == 0, f"a traceback, not a message: {fault} at {at}"
            refused = outcome.get("refused", "")
            # Removing old checkpoints may fail in silence; every other failure is told, on one line.
            assert fault != "short" or not refused
            assert "\n" not in refused and (not refused or "cannot be" in refused), refused
            failures += 1
            charged = check_counts(folder)
            if any((folder / "checkpoint").glob("*.json")):
                assert charged - 1 <= load_checkpoint(folder / "checkpoint").finished <= charged
            finish(server, folder, 1 if refused else 0)
    return failures


def test_writes_that_take_seven_bytes_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Slow:
        def __getattr__(self, name: str) -> Any:
            return (lambda file, data: os.write(file, data[:7])) if name == "write" else getattr(os, name)

    monkeypatch.setattr(durable, "_os", Slow())
    assert train(tmp_path, {})["steps"] == 3
    assert check_counts(tmp_path) == load_checkpoint(tmp_path / "checkpoint").finished == 3


def test_some_calls_fail(server: Run, tmp_path: Path) -> None:
    assert fail_at_calls(server, tmp_path, 31) >= 6


@pytest.mark.slow
def test_every_call_fails(server: Run, tmp_path: Path) -> None:
    print("failures:", fail_at_calls(server, tmp_path, 1))
