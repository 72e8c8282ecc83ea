"""What the trainer returns, logs and writes is the same whatever the private rows are, but for the noisy release."""

from __future__ import annotations

import dataclasses
import json
import math
import pickle
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from adamix import AdaMix, Rows, private_phase
from adamix.__main__ import main
from adamix.mechanism import Mechanism
from adamix.models import Trainable, error_rate, trainable
from adamix.private_metrics import PrivateMetrics, private_metrics
from adamix.report import to_json, write_run
from adamix_kernels import OutsideGuaranteeWarning, Private

pytestmark = pytest.mark.filterwarnings("ignore:noise_seed", "ignore::adamix_kernels.OutsideGuaranteeWarning")


def blobs(count: int, seed: int) -> Rows:
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(count) % 3
    return Rows(torch.randn(count, 6, generator=generator) + 2 * torch.eye(3, 6)[y], y)


PUBLIC, TEST = blobs(24, 0), blobs(30, 1)
ONE = blobs(90, 2)
#: Other values, other labels, another number of rows, and some that are far out.
OTHER = Rows(blobs(70, 3).x * torch.logspace(-3, 6, 70)[:, None], (blobs(70, 3).y + 1) % 3)

RUNS: dict[str, dict[str, Any]] = {
    "default": {},
    "as given": {"geometry": None, "warm_start": False},
    "fixed threshold": {"quantile": None, "max_grad_norm": 0.5},
    "fixed step": {"learning_rate": 0.1},
    "Poisson": {"sample_rate": 0.5},
    "subspace": {"subspace_rank": 3},
    "secure": {"noise_mode": "secure"},
    "any model": {"model": nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))},
    "per layer": {"clipping": "per_layer", "model": nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))},
}


@pytest.fixture
def released(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The release is a constant: what still differs between two runs came another way. Counts the releases."""
    calls: list[int] = []

    def constant(self: Mechanism, model: Trainable, *_: Any, **__: Any) -> Tensor:
        calls.append(1)
        return torch.linspace(-1, 1, model.size)

    monkeypatch.setattr(Mechanism, "release", constant)
    return calls


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Everything that can be reached from a result."""
    if isinstance(value, nn.Module):
        yield from leaves({**value.state_dict(), "text": str(value)}, path)
        yield from leaves({n: p.grad for n, p in value.named_parameters()}, f"{path}.grad")
    elif dataclasses.is_dataclass(value):
        yield from leaves({f.name: getattr(value, f.name) for f in dataclasses.fields(value)}, path)
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from leaves(inner, f"{path}.{key}")
    elif isinstance(value, list | tuple):
        yield f"{path}.length", len(value)
        for i, inner in enumerate(value):
            yield from leaves(inner, f"{path}[{i}]")
    else:
        yield path, value.numpy().tobytes() if isinstance(value, Tensor) else repr(value)


def run(private: Rows, settings: dict[str, Any]) -> dict[str, Any]:
    settings = dict(settings)
    torch.manual_seed(0)
    model = settings.pop("model", None)
    if model is not None:
        for layer in model:
            if hasattr(layer, "reset_parameters"):
                layer.reset_parameters()
    steps: list[Any] = []
    trainer = AdaMix(model, epsilon=1.0, expected_batch_size=80, steps=3, public_steps=20, **settings)
    result = trainer.fit(public=PUBLIC, private=private, test=TEST, on_step=steps.append)
    return dict(leaves({"result": result, "steps": steps, "generator": torch.get_rng_state()}))


@pytest.mark.parametrize("name", RUNS)
def test_nothing_returned_has_touched_a_private_row(name: str, released: list[int]) -> None:
    one = run(ONE, RUNS[name])
    assert len(released) == 3
    assert one == run(OTHER, RUNS[name])
    assert not any("Private" in repr(value) for value in one.values())


def test_the_comparison_sees_a_leak(released: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """One number of one step, of a private row: found, with its name."""
    whole = private_phase.Step

    def leaky(number: int, *rest: Any) -> Any:
        return dataclasses.replace(whole(number, *rest), public_loss=float(seen[0].x[5, 0]))

    seen: list[Rows] = []
    sample = Mechanism.sample
    monkeypatch.setattr(Mechanism, "sample", lambda self, rows, rate: seen.append(rows) or sample(self, rows, rate))
    monkeypatch.setattr(private_phase, "Step", leaky)
    one, other = run(ONE, {}), run(ONE._replace(x=ONE.x + 0), {})
    assert one == other
    seen.clear()
    other = run(OTHER, {})
    assert {name for name in one if one[name] != other[name]} >= {".result.steps[0].public_loss"}


def test_nothing_written_has_touched_a_private_row(
    tmp_path: Path, released: list[int], capfd: pytest.CaptureFixture[str]
) -> None:
    """Standard output and error and every file of the command line, byte for byte."""
    for name, rows in (("public", PUBLIC), ("test", TEST), ("one", ONE), ("other", OTHER)):
        np.savez(tmp_path / f"{name}.npz", X=rows.x.numpy(), y=rows.y.numpy())
    seen = []
    for name in ("one", "other"):
        out = tmp_path / "run"
        argv = ["train", "--json", "--epsilon", "1", "--steps", "3", "--expected-batch-size", "80", "--device", "cpu"]
        sets = {"public": "public", "private": name, "test": "test"}
        (tmp_path / "private.npz").write_bytes((tmp_path / f"{name}.npz").read_bytes())
        for role in sets:
            argv += [f"--{role}", str(tmp_path / f"{role}.npz")]
        assert main([*argv, "--out", str(out)]) == 0
        said = capfd.readouterr()
        files = {path.name: path.read_bytes() for path in sorted(out.iterdir())}
        assert {"summary.json", "metrics.jsonl", "config.json", "weights.safetensors"} <= files.keys()
        assert not any(name.startswith("PRIVATE") for name in files)
        assert "private" not in files["metrics.jsonl"].decode() and "paragon" not in said.out + said.err
        seen.append((files, said.out, said.err))
        out.rename(tmp_path / name)
    assert seen[0] == seen[1]


# --- where they are asked for ----------------------------------------------------------------------------------------


def model_at(seed: int) -> Trainable:
    torch.manual_seed(seed)
    return trainable(nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)))


def test_private_metrics_are_what_they_say() -> None:
    model = model_at(0)
    norms = torch.cat(list(model.grad_sample(ONE))).norm(dim=1)
    found = private_metrics(4, model, ONE, norms.median()[None])
    assert found.number == 4
    assert found.loss.reveal() == pytest.approx(float(model.loss(ONE).detach()))
    assert found.accuracy.reveal() == pytest.approx(1 - error_rate(model.module, ONE) / 100)
    assert found.clipped_fraction.reveal() == pytest.approx(45 / 90, abs=0.012)
    by_layer = torch.stack([torch.cat(list(model.grad_sample(ONE)))[:, part].norm(dim=1) for part in model.layers])
    limits = by_layer.median(dim=1).values
    share = float((by_layer > limits[:, None]).any(0).double().mean())
    assert private_metrics(1, model, ONE, limits).clipped_fraction.reveal() == pytest.approx(share, abs=0.03)
    basis = torch.eye(2, model.size)
    within = torch.cat(list(model.grad_sample(ONE)))[:, :2].norm(dim=1)
    share = float((within > 0.1).double().mean())
    assert private_metrics(1, model, ONE, torch.tensor([0.1]), basis).clipped_fraction.reveal() == pytest.approx(share)


def test_private_metrics_of_no_rows() -> None:
    empty = Rows(torch.zeros(0, 6), torch.zeros(0, dtype=torch.int64))
    found = private_metrics(1, model_at(0), empty, torch.ones(1)).revealed()
    assert found.pop("number") == 1 and all(math.isnan(value) for value in found.values())


def test_private_metrics_are_marked() -> None:
    found = private_metrics(1, model_at(0), ONE, torch.ones(1))
    values = [getattr(found, f.name) for f in dataclasses.fields(PrivateMetrics) if f.name != "number"]
    assert all(type(value) is Private for value in values)
    assert "0." not in repr(found) and "call reveal()" in repr(found)
    for use in (json.dumps, pickle.dumps, lambda m: to_json(dataclasses.asdict(m)), lambda m: f"{m.loss}"):
        with pytest.raises(TypeError):
            use(found)
    with pytest.raises(TypeError, match=r"private loss: .*JSON; call reveal\(\)"):
        to_json({"step": [found.loss]})
    with pytest.warns(OutsideGuaranteeWarning, match="private loss"):
        found.revealed()


def test_measuring_has_no_effect_on_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights, generators, everything: bit for bit."""
    settings = {"model": RUNS["any model"]["model"], "noise_seed": 3}
    plain = run(ONE, settings)
    release, measured = Mechanism.release, []

    def measure(self: Mechanism, model: Trainable, rows: Rows, thresholds: Tensor, basis: Tensor | None = None) -> Any:
        measured.append(private_metrics(1, model, rows, thresholds, basis))
        return release(self, model, rows, thresholds, basis)

    monkeypatch.setattr(Mechanism, "release", measure)
    assert run(ONE, settings) == plain and len(measured) == 3


def test_the_trainer_gives_them_where_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[PrivateMetrics] = []
    trainer = AdaMix(epsilon=1.0, expected_batch_size=80, steps=3, noise_seed=0)
    with pytest.warns(OutsideGuaranteeWarning, match="do not publish") as caught:
        result = trainer.fit(public=PUBLIC, private=ONE, private_metrics=seen.append)
    assert [w.filename for w in caught if w.category is OutsideGuaranteeWarning] == [__file__]
    assert [m.number for m in seen] == [1, 2, 3] and 0.5 < seen[0].accuracy.reveal() < 1
    plain = AdaMix(epsilon=1.0, expected_batch_size=80, steps=3, noise_seed=0).fit(public=PUBLIC, private=ONE)
    assert dict(leaves(result)) == dict(leaves(plain))


def test_the_command_line_writes_them_where_asked(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    argv = ["train", "--epsilon", "1", "--steps", "2", "--expected-batch-size", "80", "--log-private-metrics"]
    for name, rows in (("public", PUBLIC), ("private", ONE), ("test", TEST)):
        np.savez(tmp_path / f"{name}.npz", X=rows.x.numpy(), y=rows.y.numpy())
        argv += [f"--{name}", str(tmp_path / f"{name}.npz")]
    assert main(argv) == 2 and "pass --out" in capfd.readouterr().err
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        assert main([*argv, "--out", str(tmp_path / "run")]) == 0
    assert "do not publish" in capfd.readouterr().err
    argv.remove("--log-private-metrics")
    assert main([*argv, "--out", str(tmp_path / "plain")]) == 0 and "do not publish" not in capfd.readouterr().err
    assert not list((tmp_path / "plain").glob("PRIVATE*"))
    lines = (tmp_path / "run" / "PRIVATE_metrics.jsonl").read_text().splitlines()
    assert len(lines) == 2 and json.loads(lines[0]).keys() == {"number", "loss", "accuracy", "clipped_fraction"}


def test_they_go_to_a_file_of_their_own(tmp_path: Path) -> None:
    trainer = AdaMix(epsilon=1.0, expected_batch_size=80, steps=2)
    result = trainer.fit(public=PUBLIC, private=ONE, test=TEST)
    found = [private_metrics(n, trainable(result.model[1]), ONE, torch.ones(1)) for n in (1, 2)]
    write_run(tmp_path / "run", result, {}, found)
    lines = (tmp_path / "run" / "PRIVATE_metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["number"] for line in lines] == [1, 2]
    assert json.loads(lines[0])["accuracy"] == found[0].accuracy.reveal()
    for path in (tmp_path / "run").iterdir():
        assert path.name.startswith("PRIVATE") or b"accuracy" not in path.read_bytes()
