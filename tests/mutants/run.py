"""Plants each bug of the catalogue in a copy of the source and runs the checks that must find it.

    python tests/mutants/run.py [WORD ...] [--all-checks] [--jobs N]

Prints which check kills which mutant and in how many seconds; exit code 1 if one survives. WORDs choose mutants whose
names hold one of them; --all-checks does not stop at the first check that kills.
"""

from __future__ import annotations

import argparse
import os
import queue
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parent))

from catalogue import MUTANTS
from mutant import Mutant

ROOT = Path(__file__).parents[2]
COPIED = ("adamix", "adamix_kernels", "benchmarks", "tests", "pyproject.toml", "README.md")
#: A mutant that makes a check hang is killed by that.
_PATIENCE = 200


class Outcome(NamedTuple):
    """`killed_by` is empty for a survivor; `note` says what went wrong otherwise."""

    mutant: Mutant
    killed_by: list[str]
    seconds: float
    note: str = ""


def copy_of_source(folder: Path) -> Path:
    """The packages as they are, compiled modules included, and the tests."""
    for name in COPIED:
        source, target = ROOT / name, folder / name
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__", ".*"))
        else:
            shutil.copy2(source, target)
    return folder


def check(folder: Path, nodes: Sequence[str], patience: float = _PATIENCE) -> int:
    """Exit code of pytest in the copy: 0 if the checks pass, 1 if one fails; -1 if they never end."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *nodes]
    environment = os.environ | {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    try:
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, timeout=patience, check=False)
    except subprocess.TimeoutExpired:
        return -1
    return done.returncode


@contextmanager
def planted(folder: Path, mutant: Mutant) -> Iterator[None]:
    """The copy with the bug in it."""
    file = folder / mutant.file
    text, before = file.read_text(), file.stat().st_mtime
    if text.count(mutant.old) != 1:
        raise ValueError(f"{mutant.name}: its old text stands {text.count(mutant.old)} times in {mutant.file}")
    file.write_text(text.replace(mutant.old, mutant.new))
    os.utime(file, (before + 10, before + 10))  # bytecode is kept by time and size
    try:
        yield
    finally:
        file.write_text(text)
        os.utime(file, (before, before))


def try_mutant(folder: Path, mutant: Mutant, all_checks: bool = False) -> Outcome:
    """Run its checks, one after the other, until one kills it."""
    started, killed_by, note = time.monotonic(), [], ""
    with planted(folder, mutant):
        for node in mutant.checks:
            code = check(folder, [node])
            if code in (1, -1):
                killed_by.append(node if code == 1 else f"{node} (never ends)")
                if not all_checks:
                    break
            elif code != 0:
                note = f"pytest ended with {code} on {node}"  # an error, no verdict
    return Outcome(mutant, killed_by, time.monotonic() - started, note)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*")
    parser.add_argument("--all-checks", action="store_true")
    parser.add_argument("--jobs", type=int, default=1)
    arguments = parser.parse_args(argv)
    chosen = [m for m in MUTANTS if not arguments.words or any(word in m.name for word in arguments.words)]
    with tempfile.TemporaryDirectory() as scratch:
        free: queue.Queue[Path] = queue.Queue()
        for number in range(arguments.jobs):
            free.put(copy_of_source(Path(scratch) / str(number)))
        nodes = sorted({node for mutant in chosen for node in mutant.checks})
        if code := check(Path(scratch) / "0", nodes, patience=10 * _PATIENCE):
            print(f"the checks do not pass on the source as it is (pytest ended with {code}): nothing can be said")
            return 1

        def attempt(mutant: Mutant) -> Outcome:
            folder = free.get()
            try:
                return try_mutant(folder, mutant, arguments.all_checks)
            finally:
                free.put(folder)

        survivors = 0
        with ThreadPoolExecutor(arguments.jobs) as pool:
            for outcome in pool.map(attempt, chosen):
                survivors += not outcome.killed_by
                verdict = ", ".join(outcome.killed_by) or f"SURVIVES {outcome.note}"
                print(f"{outcome.mutant.name:62} {outcome.seconds:5.1f} s  {verdict}", flush=True)
    print(f"{len(chosen) - survivors} of {len(chosen)} mutants killed")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
