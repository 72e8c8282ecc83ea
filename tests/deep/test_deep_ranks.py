"""`torchrun -m adamix finetune` on two processes: the run of one process, with one ledger."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from adamix import Ledger
from adamix.__main__ import main
from adamix.checkpoint import load_checkpoint
from adamix.ledger_records import read_ledger

pytest.importorskip("transformers")

ROOT = Path(__file__).parents[2]
QUICK = ["--tiny", "--device", "cpu", "--sample-rate", "1", "--steps", "3", "--public-steps", "5", "--tune", "bias"]
QUICK += ["--expected-batch-size", "192", "--public-batch-size", "15", "--optimizer", "sgd", "--json"]


def on_two(argv: list[str], folder: Path, program: str = "adamix", restarts: int = 0) -> tuple[dict[str, Any], str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["--max-restarts", str(restarts), "-m", program]
    path = os.pathsep.join((str(ROOT), str(Path(__file__).parent)))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    done = subprocess.run(
        [*command, *argv], cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stdout.splitlines()
    assert sum(line.startswith("{") for line in lines) == 1, "rank 0 alone prints"
    return json.loads(lines[-1]), done.stderr


@pytest.mark.filterwarnings("ignore:noise_seed")
@pytest.mark.parametrize("sharding", ["none", "fsdp"])
def test_two_processes_train_as_one_does(tmp_path: Path, sharding: str) -> None:
    argv = ["finetune", "vit", *QUICK, "--noise-seed", "3", "--out"]
    assert main([*argv, str(tmp_path / "one")]) == 0
    summary, said = on_two([*argv, str(tmp_path / "two"), "--sharding", sharding], tmp_path)
    assert summary["ranks"] == 2 and summary["sharding"] == sharding and said.count("parameters are trained") == 1
    for file in ("weights.safetensors", "public_weights.safetensors"):
        one, two = (load_file(tmp_path / name / file) for name in ("one", "two"))
        assert one.keys() == two.keys()
        for name, tensor in one.items():
            torch.testing.assert_close(two[name], tensor, rtol=1e-4, atol=1e-5)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one", "two"], "nothing is left beside"
    steps = [
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    ]
    for alone, together in zip(*steps, strict=True):
        assert together["public_loss"] == pytest.approx(alone["public_loss"], rel=1e-4)
        assert together["thresholds"] == pytest.approx(alone["thresholds"], rel=1e-3, abs=1e-6)
        assert together["epsilon"] == alone["epsilon"]


def test_rank_0_alone_charges_and_writes(tmp_path: Path) -> None:
    argv = ["finetune", "vit", *QUICK, "--ledger", "rows.ledger", "--checkpoint", "steps"]
    summary, _ = on_two([*argv, "--new-ledger", "rows", "--budget-epsilon", "4"], tmp_path)
    (run,) = read_ledger(tmp_path / "rows.ledger").runs.values()
    assert run.charged == 3 and run.ended and summary["ledger_epsilon"] == summary["epsilon"]
    assert load_checkpoint(tmp_path / "steps").finished == 3


def test_torchrun_goes_on_after_a_rank_was_killed(tmp_path: Path) -> None:
    """From the last checkpoint, with the same command; the step that was interrupted is charged again."""
    argv = ["finetune", "vit", *QUICK, "--sharding", "fsdp", "--tune", "lora", "--out", "run"]
    argv += ["--ledger", "rows.ledger", "--new-ledger", "rows", "--budget-epsilon", "5", "--checkpoint", "steps"]
    summary, said = on_two(argv, tmp_path, "dying", restarts=1)
    assert "exitcode: -9" in said and "interrupted steps are charged again, 1 in all" in said
    (run,) = read_ledger(tmp_path / "rows.ledger").runs.values()
    assert run.charged == 4 and run.ended and summary["steps"] == 3 and summary["ledger_epsilon"] == summary["epsilon"]
    assert sorted(p.name for p in (tmp_path / "steps").glob("*.json")) == ["step-0000002.json", "step-0000003.json"]
    weights = load_file(tmp_path / "run" / "weights.safetensors")
    assert sum(x.numel() for x in weights.values()) == summary["trained_parameters"]


@pytest.mark.parametrize(("restarts", "given", "message"), [
    ("1", [], "checkpoint: missing, and torchrun was given --max-restarts"),
    ("1", ["--ledger", "rows.ledger", "--checkpoint", "steps", "--resume"], "checkpoint: steps holds none"),
])  # fmt: skip
def test_restarts_without_a_checkpoint_are_refused(
    restarts: str, given: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", restarts)
    Ledger.create("rows.ledger", data_set="rows").close()
    assert main(["finetune", "vit", *QUICK, *given]) == 2
    assert message in capsys.readouterr().err


def test_a_restarted_job_takes_its_ledger_and_checkpoint_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Killed before the first checkpoint, after the ledger was made: nothing was charged, and the run begins."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "2")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    Ledger.create("rows.ledger", data_set="rows", epsilon=5.0, delta=1e-3).close()
    argv = ["finetune", "vit", *QUICK, "--ledger", "rows.ledger", "--new-ledger", "rows", "--budget-epsilon", "5"]
    assert main([*argv, "--checkpoint", "steps"]) == 0
    (run,) = read_ledger("rows.ledger").runs.values()
    assert run.charged == 3 and run.ended
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["steps"] == 3


@pytest.mark.parametrize("made", [{"epsilon": 9.0}, {}, {"epsilon": 5.0, "delta": 1e-7}, {"data_set": "others"}])
def test_a_restarted_job_does_not_take_a_ledger_that_was_refused_at_first(
    made: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It was there before the job, with a budget that was not asked for."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "1")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    Ledger.create("rows.ledger", **{"data_set": "rows", "delta": 1e-3, **made}).close()
    argv = ["finetune", "vit", *QUICK, "--ledger", "rows.ledger", "--new-ledger", "rows", "--budget-epsilon", "5"]
    assert main([*argv, "--checkpoint", "steps"]) == 2
    assert "ledger: rows.ledger exists already" in capsys.readouterr().err
    assert not read_ledger("rows.ledger").runs
