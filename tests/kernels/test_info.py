"""`python -m adamix_kernels`: what runs where, and why not."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from adamix_kernels import __main__ as info
from adamix_kernels import backends


def test_says_what_runs_and_why_the_rest_does_not(capsys: pytest.CaptureFixture[str]) -> None:
    info.main(["--no-bandwidth"])
    lines = capsys.readouterr().out.splitlines()
    assert f"torch {torch.__version__}" in lines[0]
    for op, states in backends().items():
        line = next(line for line in lines if line.split()[:1] == [op])
        for cell, state in zip(line.split()[1:], states.values(), strict=True):
            assert cell == "runs" if state == "runs" else f"{cell}: {state}" in lines


def test_measures_only_what_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(info, "_PARAMETERS", 1000)
    found = info.bandwidth("cpu")
    assert min(found.values()) > 0
    right = info.clip_sum_noise
    monkeypatch.setattr(info, "clip_sum_noise", lambda *a, **k: right(*a, **{**k, "max_grad_norm": torch.rand(()) + 1}))
    with pytest.raises(AssertionError):
        info.bandwidth("cpu")


def test_runs_as_a_module() -> None:
    command = [sys.executable, "-W", "error", "-m", "adamix_kernels", "--json", "--no-bandwidth"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    report = json.loads(done.stdout)
    assert report["backends"] == backends() and report["versions"]["adamix"] and "cpu" in report["devices"]
