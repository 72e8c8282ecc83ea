"""`adamix finetune`: both recipes at tiny size, on made-up rows and on folders; what is wrong is said in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file

from adamix.__main__ import main
from adamix.deep import DeepConfig, recipes
from adamix.deep.recipes import load_recipe, prepare
from adamix.deep.sources import ImageFolder, TextLines, made_up_lines, open_tokenizer
from adamix.ledger_records import read_ledger

pytest.importorskip("transformers")
pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

#: Full batches: they are accounted for at once.
QUICK = ["--tiny", "--device", "cpu", "--sample-rate", "1", "--steps", "3", "--public-steps", "30"]


def image_folders(root: Path) -> list[str]:
    image = pytest.importorskip("PIL.Image")
    generator, argv = np.random.default_rng(0), list[str]()
    for name, count in (("public", 8), ("private", 12), ("test", 6)):
        for label, colour in (("cat", 220), ("dog", 40)):
            folder = root / name / label
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = np.clip(generator.normal(colour, 60, (20, 18, 3)), 0, 255).astype(np.uint8)
                image.fromarray(pixels).save(folder / f"{i}.png")
        argv += [f"--{name}", str(root / name)]
    return argv


def text_files(root: Path) -> list[str]:
    argv = []
    for name, count in (("public", 24), ("private", 60), ("test", 12)):
        (root / name).mkdir(parents=True)
        lines = made_up_lines(count, 16, name)
        (root / name / "a.txt").write_text("\n\n".join(lines[: count // 2]))
        (root / name / "b.txt").write_text("\n".join(lines[count // 2 :]))
        argv += [f"--{name}", str(root / name)]
    argv[argv.index("--test") + 1] += "/a.txt"
    return argv


@pytest.mark.parametrize("recipe", ["vit", "lm"])
def test_a_recipe_runs_on_made_up_rows(recipe: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    argv = ["finetune", recipe, *QUICK, "--json", "--expected-batch-size", "192", "--out", str(tmp_path / "run")]
    assert main(argv) == 0
    said = capsys.readouterr()
    summary = json.loads(said.out.splitlines()[-1])
    assert summary["test_loss"] < summary["public_loss"], "phase 2 gains"
    assert summary["epsilon"] <= 3.0 and summary["delta"] == 1e-3 and summary["steps"] == 3
    assert "parameters are trained" in said.err and "Data: made up" in said.err
    weights = load_file(tmp_path / "run" / "weights.safetensors")
    assert sum(x.numel() for x in weights.values()) == summary["trained_parameters"] <= summary["parameters"]
    assert json.loads((tmp_path / "run" / "config.json").read_text())["tune"] == summary["tune"]
    assert (summary["test_error"] is None) == (recipe == "lm")


@pytest.mark.parametrize("recipe", ["vit", "lm"])
def test_a_recipe_runs_on_folders_with_a_ledger_and_pretrained_weights(
    recipe: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    data = image_folders(tmp_path) if recipe == "vit" else text_files(tmp_path)
    shape, _ = load_recipe(recipe, tiny=True)
    prepare(recipe, shape, dict.fromkeys(("public", "private", "test")), tiny=True).model.save_pretrained(
        tmp_path / "model"
    )
    ledger = tmp_path / "rows.ledger"
    argv = ["finetune", recipe, *QUICK, "--json", *data, "--model", str(tmp_path / "model"), "--tune", "lora"]
    argv += ["--expected-batch-size", "24", "--public-batch-size", "16", "--micro-batch-size", "50"]
    new = ["--ledger", str(ledger), "--new-ledger", "rows", "--budget-epsilon", "4"]
    assert main([*argv, *new, "--checkpoint", str(tmp_path / "steps")]) == 0
    said = capsys.readouterr()
    summary = json.loads(said.out.splitlines()[-1])
    assert summary["ledger_epsilon"] == read_ledger(ledger).spent() == summary["epsilon"]
    assert summary["trained_parameters"] < summary["parameters"] and summary["tune"] == "lora"
    assert main([*argv, "--ledger", str(ledger)]) == 2 and "budget" in capsys.readouterr().err


def test_the_rows_of_folders(tmp_path: Path) -> None:
    image_folders(tmp_path)
    rows = ImageFolder("public", str(tmp_path / "public"), 16)
    pixels, label = rows[9]
    assert pixels.shape == (3, 16, 16) and label == 1 and -1 <= float(pixels.min()) < float(pixels.max()) <= 1
    assert rows.class_names == ("cat", "dog") and len({rows.digest(i) for i in range(len(rows))}) == len(rows) == 16
    swapped = ImageFolder("private", str(tmp_path / "private"), 16, ("dog", "cat"))
    assert swapped[0][1] == 1 and swapped[23][1] == 0


def test_the_rows_of_text(tmp_path: Path) -> None:
    text_files(tmp_path)
    rows = TextLines.read("public", str(tmp_path / "public"), open_tokenizer(None), 20)
    assert len(rows) == 24, "lines without text are none"
    row = rows[0]
    assert row["input_ids"].tolist() == [*made_up_lines(24, 16, "public")[0].encode(), 256, 256, 256, 256]
    assert row["labels"].tolist() == [*row["input_ids"][:17].tolist(), -100, -100, -100]
    long = TextLines("public", ["ü" * 30], open_tokenizer(None), 5)[0]
    assert long["labels"].tolist() == [0xC3, 0xBC, 0xC3, 0xBC, 0xC3]


@pytest.mark.parametrize("recipe", recipes.RECIPES)
def test_a_recipe_is_whole(recipe: str) -> None:
    for tiny in (False, True):
        _, settings = load_recipe(recipe, tiny=tiny)
        DeepConfig(**{"expected_batch_size": 10, **settings})
    assert "expected_batch_size" not in load_recipe(recipe)[1], "a count of private rows is private: no default"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["vit", "--public", "a", "--private", "b"], "expected_batch_size: missing"),
        (["vit", "--expected-batch-size", "9"], "public, private: pass both, folders"),
        (["lm", "--tiny", "--public", "a"], "public, private: pass both, or neither"),
        (["vit", "--tiny", "--public", "nowhere", "--private", "b"], "public: 'nowhere' is neither an image folder"),
        (["lm", "--tiny", "--public", "nowhere", "--private", "b"], "public: nowhere cannot be read as UTF-8 text"),
        (["lm", "--tiny", "--tokenizer", "nowhere"], "tokenizer: 'nowhere' is no folder"),
        (["lm", "--tiny", "--model", "nowhere"], "model: 'nowhere' is no folder"),
        (["lm", "--tiny", "--tune", "lor"], "tune: 'lor' is none of full, head, bias, lora"),
        (["vit", "--tiny", "--optimizer", "adam"], "optimizer: 'adam' is not valid"),
        (["vit", "--tiny", "--checkpoint", "c"], "checkpoint: given without a ledger"),
        (["vit", "--tiny", "--quantile", "2"], "quantile: 2.0 is not valid here"),
        (["gpt"], "argument recipe: invalid choice: 'gpt'"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    try:
        code: Any = main(["finetune", *argv, "--device", "cpu"])
    except SystemExit as ended:
        code = ended.code
    said = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("warning:")]
    assert code == 2 and len(said) == 1 and f"error: {message}" in said[0]
