"""What the tests of the trainer share: no test reads or writes the user's own cache and data folder."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

_GIVEN_DATA = os.environ.get("ADAMIX_DATA")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADAMIX_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("ADAMIX_DATA", raising=False)


@pytest.fixture
def given_data(own_cache: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The data folder that the run was given after all, for the tests on real files."""
    if _GIVEN_DATA is not None:
        monkeypatch.setenv("ADAMIX_DATA", _GIVEN_DATA)
