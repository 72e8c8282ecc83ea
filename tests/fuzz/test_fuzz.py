"""The fuzzers, each in a process of its own, whose death is a failure like any other."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from adamix_kernels.spec import OPS

HERE = Path(__file__).parent


def fuzz(which: str, examples: int, tmp_path: Path, *more: str) -> dict[str, int]:
    trail = tmp_path / "trail"
    done = subprocess.run(
        [sys.executable, "-X", "faulthandler", str(HERE / "fuzz_ops.py"), which, str(examples), str(trail), *more],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode < 0 or "Fatal Python error" in done.stderr:
        call = trail.read_text().strip() if trail.exists() else "its start"
        pytest.fail(f"the process died (exit status {done.returncode}) in\n{call}\n{done.stderr[-3000:]}")
    assert done.returncode == 0, done.stderr[-6000:]
    seen = json.loads(done.stdout.splitlines()[-1])
    print(which, seen)
    assert seen["examples"] >= examples * 0.9  # less only where hypothesis finds no more
    return seen  # type: ignore[no-any-return]


@pytest.mark.parametrize("examples", [1500, pytest.param(60_000, marks=pytest.mark.slow)])
def test_every_outcome_is_a_result_or_names_an_argument(examples: int, tmp_path: Path) -> None:
    seen = fuzz("outcomes", examples, tmp_path, *["any"] * (examples > 10_000))
    assert min(seen["result"], seen["refused"]) > 0.2 * examples and seen["backend cannot"]


@pytest.mark.parametrize("examples", [1500, pytest.param(40_000, marks=pytest.mark.slow)])
def test_no_sample_adds_more_than_the_threshold(examples: int, tmp_path: Path) -> None:
    seen = fuzz("bounds", examples, tmp_path, *["any"] * (examples > 10_000))
    checked = {name: count for name, count in seen.items() if name in OPS}
    assert len(checked) == 13 and min(checked.values()) > 0.02 * examples
    assert seen["grid_for"] > 0.01 * examples
    assert min(seen["sums that are not 0"], seen["sums above C / 2"]) > 0.1 * seen["grid_clip_sum"]
    assert seen["releases with noise that is not 0"] > 0.2 * seen["grid_release"]


def test_a_process_that_dies_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the message tells in which call."""
    script = tmp_path / "fuzz_ops.py"
    script.write_text("import ctypes, sys; open(sys.argv[3], 'w').write('the last call'); ctypes.string_at(0)")
    monkeypatch.setattr(sys.modules[__name__], "HERE", tmp_path)
    with pytest.raises(pytest.fail.Exception, match=r"died \(exit status -11\) in\nthe last call"):
        fuzz("bounds", 1, tmp_path)
