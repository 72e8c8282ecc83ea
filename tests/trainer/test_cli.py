"""The command line: the main job, its files, its errors."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from adamix import AdaMix, cli, cli_baselines
from adamix.__main__ import main
from adamix.datasets import BENCHMARKS
from adamix.report import to_json


def last_json(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    lines = capsys.readouterr().out.splitlines()
    return json.loads(lines[-1])  # type: ignore[no-any-return]


def test_the_main_job(tmp_path: Path) -> None:
    """As a user runs it: another process, all defaults, under a minute, AdaMix better than public rows alone."""
    out = tmp_path / "run"
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "adamix", "train", "--json", "--out", str(out)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert time.monotonic() - start < 60
    summary = json.loads(done.stdout.splitlines()[-1])
    assert {
        "method", "test_error", "public_error", "epsilon", "delta", "noise_multiplier", "steps", "seed",
        "paragon_error", "error_increase",
    } <= summary.keys()  # fmt: skip
    assert summary["test_error"] < summary["public_error"] - 5
    assert 3.0 - 1e-6 <= summary["epsilon"] <= 3.0
    assert "without privacy (paragon)" in done.stderr and "outside the guarantee" in done.stderr

    assert sorted(p.name for p in out.iterdir()) == [
        "config.json", "metrics.jsonl", "public_weights.safetensors", "run.png", "summary.json", "weights.safetensors",
    ]  # fmt: skip
    assert json.loads((out / "summary.json").read_text()) == summary
    assert json.loads((out / "config.json").read_text())["epsilon"] == 3.0
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [r["number"] for r in records] == list(range(1, summary["steps"] + 1))
    assert {"thresholds", "public_loss", "public_clipped", "epsilon"} <= records[0].keys()
    assert records[-1]["epsilon"] == summary["epsilon"]
    weights, public = load_file(out / "weights.safetensors"), load_file(out / "public_weights.safetensors")
    assert weights.keys() == public.keys() and not torch.equal(weights["1.weight"], public["1.weight"])
    assert (out / "run.png").read_bytes().startswith(b"\x89PNG")
    assert not list(tmp_path.glob(".*")), "nothing is left beside it"


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    generator = np.random.default_rng(0)
    paths = {}
    for name, count in (("public", 9), ("private", 60), ("test", 30)):
        y = np.arange(count) % 3
        x = generator.normal(size=(count, 4)) + 2 * np.eye(3, 4)[y]
        paths[name] = str(tmp_path / f"{name}.npz")
        np.savez(paths[name], X=x.astype(np.float32), y=y)
    return paths


def options(files: dict[str, str], **more: Any) -> list[str]:
    flags = {**files, "expected-batch-size": 60, "steps": 3, **more}
    return ["train", "--json", *(part for name, value in flags.items() for part in (f"--{name}", str(value)))]


def test_own_rows(files: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(options(files)) == 0
    summary = last_json(capsys)
    assert "paragon_error" not in summary, "private rows are not read without noise unless asked"
    assert main([*options(files), "--compare"]) == 0
    assert "paragon_error" in last_json(capsys)


def test_no_privacy_is_valid_json_and_loud(files: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(options(files, epsilon="inf")) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out.splitlines()[-1], parse_constant=pytest.fail)["epsilon"] == "inf"
    assert "NO NOISE" in captured.err


def test_the_seed_draws_rows_and_not_noise(capsys: pytest.CaptureFixture[str]) -> None:
    outcomes = []
    for _ in range(2):
        assert main(["train", "--json", "--data", "digits", "--seed", "3", "--steps", "2"]) == 0
        outcomes.append(last_json(capsys))
    assert outcomes[0]["public_error"] == outcomes[1]["public_error"]
    assert outcomes[0]["seed"] == 3


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"epsilon": 0}, "epsilon: 0.0 is not valid here"),
        ({"epsilon": "three"}, "argument --epsilon: invalid float value: 'three'"),
        ({"delta": 2}, "delta: 2.0 is not valid here"),
        ({"sample-rate": 1.5}, "sample_rate: 1.5 is not valid here"),
        ({"private": "nowhere.npz"}, "nowhere.npz"),
        ({"device": "abacus"}, "device: 'abacus' cannot be used"),
        ({"epsilon": "1e300"}, "epsilon: 1e+300 is not valid here; pass a number in (0, 1000], or inf"),
        ({"public-l2": "1e300"}, "public_l2: 1e+300 is not valid here"),
        ({"quantile": "none", "max-grad-norm": "1e-300"}, "max_grad_norm: 1e-300 is not valid here"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_two(
    files: dict[str, str], more: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    try:
        code = main([*options(files, **more), "--out", str(out)])
    except SystemExit as stop:  # argparse's own way
        code = int(stop.code or 0)
    captured = capsys.readouterr()
    assert code == 2 and message in captured.err and captured.out == ""
    assert len(captured.err.strip().splitlines()) == 1 and "Traceback" not in captured.err
    assert not out.exists() and not list(tmp_path.glob(".*"))


def spoil(path: str, **changes: Any) -> None:
    arrays = dict(np.load(path))
    np.savez(path, **{**arrays, **{key: change(arrays[key].copy()) for key, change in changes.items()}})


def with_nan(x: Any) -> Any:
    x[2, 1] = np.nan
    return x


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("private", {"X": with_nan}, "private: x has NaN or Inf (as float32) in 1 rows, first in row 2"),
        ("private", {"y": lambda y: y[:-1]}, "private: x has 60 rows but y has 59; pass one label per row"),
        ("private", {"y": lambda y: y + 1}, "labels must be in 0..2"),
        ("private", {"X": lambda x: x[:, :3]}, "private: rows have shape [3] but public rows have [4]"),
        ("public", {"y": lambda y: np.where(y == 1, 2, y)}, "class"),
        ("public", {"X": lambda x: x[:, 0]}, "public: x has shape [9]"),
    ],
)
def test_bad_rows_are_one_line_too(
    files: dict[str, str],
    name: str,
    changes: dict[str, Any],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    spoil(files[name], **changes)
    assert main([*options(files), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_overlap_and_corruption(files: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    public, private = np.load(files["public"])["X"], dict(np.load(files["private"]))
    private["X"][7] = public[3]
    np.savez(files["private"], **private)
    assert main(options(files)) == 2
    assert "1 of 60 rows are also public rows" in (error := capsys.readouterr().err) and len(error.splitlines()) == 1
    Path(files["private"]).write_bytes(Path(files["private"]).read_bytes()[:200])
    assert main(options(files)) == 2
    assert "private" in (error := capsys.readouterr().err) and len(error.splitlines()) == 1


def test_the_expected_batch_size_of_own_rows_must_be_given(
    files: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [part for name, value in files.items() for part in (f"--{name}", value)]
    assert main(["train", *flags]) == 2
    assert "expected_batch_size: missing" in capsys.readouterr().err


def test_an_existing_run_is_not_overwritten(
    files: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert main(options(files, out=out)) == 0
    before = (out / "summary.json").read_text()
    assert main(options(files, out=out)) == 2
    assert "nothing is overwritten" in capsys.readouterr().err
    assert (out / "summary.json").read_text() == before


def test_a_failing_write_leaves_nothing(
    files: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from adamix import report

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(report, "plot_run", full)
    assert main(options(files, out=tmp_path / "run")) == 2
    captured = capsys.readouterr()
    assert "No space left" in captured.err and "AdaMix" in captured.err, "the result is shown all the same"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["private.npz", "public.npz", "test.npz"]


@pytest.mark.parametrize("where", ["file/sub", "file", "dangling", "n" * 300, "a\0b"])
def test_an_out_that_cannot_be_made_is_found_before_training(
    files: dict[str, str],
    where: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    monkeypatch.setattr(AdaMix, "fit", lambda *_, **__: pytest.fail("trained"))
    before = sorted(tmp_path.iterdir())
    assert main([*options(files), "--out", str(tmp_path / where)]) == 2
    error = capsys.readouterr().err
    assert "out: " in error and len(error.strip().splitlines()) == 1
    assert sorted(tmp_path.iterdir()) == before


def test_out_may_be_deep_or_an_empty_folder(files: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for where in ("a/b/c", "empty"):
        assert main([*options(files), "--out", str(tmp_path / where)]) == 0
        assert (tmp_path / where / "summary.json").exists()


def test_settings_are_judged_before_the_data_are_read(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for module in (cli, cli_baselines):
        monkeypatch.setattr(module, "load_split", lambda *_, **__: pytest.fail("loaded"))
    assert main(["train", "--delta", "7"]) == 2
    assert main(["train", "--device", "abacus"]) == 2
    assert main(["baselines", "--epsilon", "0"]) == 2
    assert "epsilon: 0.0" in capsys.readouterr().err


def test_json_has_no_infinities() -> None:
    text = to_json({"a": [math.inf, (math.nan, 1.0)], "b": {"c": -math.inf}})
    assert json.loads(text, parse_constant=pytest.fail) == {"a": ["inf", ["nan", 1.0]], "b": {"c": "-inf"}}


def test_ablations_are_one_flag_each(files: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    for flags in (
        {"geometry": "none"},
        {"subspace-rank": 3},
        {"anchor": 0},
        {"public-weight": 0},
        {"sample-rate": 0.5, "expected-batch-size": 30},
    ):
        assert main(options(files, **flags)) == 0
        assert math.isclose(last_json(capsys)["epsilon"], 3.0, abs_tol=1e-3)
    assert main([*options(files), "--no-warm-start"]) == 0
    assert main([*options(files, quantile="none"), "--max-grad-norm", "0.5"]) == 0


def test_paths_are_not_markup(files: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "[" / "b]"
    assert main(options(files, out=out)) == 0
    assert main([*options(files), "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert "exists already; name a new folder" in error and "cannot be written" not in error


def test_info(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--json"]) == 0
    info = last_json(capsys)
    assert info["kernels"]["clip_sum"]["torch"] == "runs" and "torch" in info["versions"]
    assert list(info["data"]) == list(BENCHMARKS)
    assert info["data"]["glyphs"] == "computed on first use", "asking takes no minutes"


def test_features(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    image = pytest.importorskip("PIL.Image")
    monkeypatch.setenv("ADAMIX_CACHE", str(tmp_path / "cache"))
    for name, shade in (("dark", 30), ("light", 220)):
        (tmp_path / "images" / name).mkdir(parents=True)
        image.new("RGB", (20, 20), (shade,) * 3).save(tmp_path / "images" / name / "a.png")
    out = tmp_path / "f.npz"
    assert main(["features", str(tmp_path / "images"), "--out", str(out), "--image-size", "32", "--json"]) == 0
    assert last_json(capsys) == {"method": "features", "rows": 2, "features": 1280, "classes": 2}
    assert np.load(out)["X"].shape == (2, 1280)


def test_baselines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "table.md"
    flags = ["--data", "digits", "--epsilon", "3", "--seeds", "2", "--searches", "2", "--private-rows", "200"]
    assert main(["baselines", *flags, "--out", str(out), "--json"]) == 0
    (setting,) = last_json(capsys)["settings"]
    rows = {row["method"]: row for row in setting["rows"]}
    for name in ("public only", "fully private DP-GD", "conventional mixed DP-GD, tuned", "AdaMix", "- cold start"):
        assert 0 <= rows[name]["test_error"] <= 100
    assert rows["conventional mixed DP-GD, tuned"]["chosen"].keys() >= {"learning_rate", "max_grad_norm"}
    assert rows["AdaMix"]["chosen"] is None
    paragon = rows["non-private on all data (paragon)"]
    assert paragon["error_increase"] == 0 and paragon["test_error"] < rows["public only"]["test_error"]
    assert "| AdaMix |" in out.read_text() and setting["seeds"] == 2
    assert main(["baselines", *flags, "--out", str(out)]) == 2


def test_baselines_take_public_benchmarks_only(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["baselines", "--data", "patients.npz"])
    assert stop.value.code == 2 and "invalid choice: 'patients.npz'" in capsys.readouterr().err
