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

from adamix.__main__ import main
from adamix.checkpoint import load_checkpoint
from adamix.ledger_records import read_ledger

pytest.importorskip("transformers")

ROOT = Path(__file__).parents[2]
QUICK = ["--tiny", "--device", "cpu", "--sample-rate", "1", "--steps", "3", "--public-steps", "5", "--tune", "bias"]
QUICK += ["--expected-batch-size", "192", "--public-batch-size", "15", "--optimizer", "sgd", "--json"]


def on_two(argv: list[str], folder: Path) -> tuple[dict[str, Any], str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "adamix"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, *argv], cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stdout.splitlines()
    assert sum(line.startswith("{") for line in lines) == 1, "rank 0 alone prints"
    return json.loads(lines[-1]), done.stderr


@pytest.mark.filterwarnings("ignore:noise_seed")
def test_two_processes_train_as_one_does(tmp_path: Path) -> None:
    argv = ["finetune", "vit", *QUICK, "--noise-seed", "3", "--out"]
    assert main([*argv, str(tmp_path / "one")]) == 0
    summary, said = on_two([*argv, str(tmp_path / "two")], tmp_path)
    assert summary["ranks"] == 2 and said.count("parameters are trained") == 1
    one, two = (load_file(tmp_path / name / "weights.safetensors") for name in ("one", "two"))
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-4, atol=1e-5)
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
