"""The catalogue of planted bugs fits the source, and a few of them are killed; all of them in the slow form."""

from __future__ import annotations

from pathlib import Path

import pytest
from catalogue import MUTANTS
from mutant import Mutant
from run import ROOT, check, copy_of_source, main, planted, try_mutant

#: Quick ones, for every run of the tests.
QUICK = ("each layer is clipped to the whole threshold", "public and private rows may overlap")


def test_there_are_enough_of_them() -> None:
    assert len(MUTANTS) >= 140
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_mutant_fits_the_source(mutant: Mutant) -> None:
    text = (ROOT / mutant.file).read_text()
    assert text.count(mutant.old) == 1
    compile(text.replace(mutant.old, mutant.new), mutant.file, "exec")
    for node in mutant.checks:
        file, _, test = node.partition("::")
        assert f"def {test.partition('[')[0]}" in (ROOT / file).read_text()


def test_quick_mutants_are_killed_and_others_are_not(tmp_path: Path) -> None:
    folder = copy_of_source(tmp_path)
    chosen = [mutant for mutant in MUTANTS if mutant.name in QUICK]
    assert len(chosen) == len(QUICK)
    for mutant in chosen:
        assert try_mutant(folder, mutant).killed_by == list(mutant.checks)
    harmless = chosen[0]._replace(new=f"{chosen[0].old}  # the same")
    assert not try_mutant(folder, harmless).killed_by


def test_a_mutant_must_fit(tmp_path: Path) -> None:
    (tmp_path / "file.py").write_text("a = 1\na = 1\n")
    with (
        pytest.raises(ValueError, match=r"stands 2 times in file\.py"),
        planted(tmp_path, Mutant("x", "file.py", "a", "b", ())),
    ):
        pass
    assert check(tmp_path, ["nothing.py"]) not in (0, 1)


@pytest.mark.slow
def test_all_mutants_are_killed() -> None:
    assert main([]) == 0
