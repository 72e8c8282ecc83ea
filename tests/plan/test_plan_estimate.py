"""What a plan makes of a trace: sharding, communication, micro-batches, accounting; and the command."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from plan_models import WORKS, cnn

from adamix.__main__ import main
from adamix.errors import InputError
from adamix.plan import Job, Rates, Setting, account, preset, resolve
from adamix.plan.rates import default_path, interpolate
from adamix.plan.trace import Call
from adamix.privacy import calibrate, spent

H200 = preset("h200")
FLAT = dataclasses.replace(
    H200,
    measured=True,
    curves={"memory.float32": [(1.0, 1e-9), (1e9, 1.0)], "matmul.float32": [(1.0, 1e-12), (1e12, 1.0)]},
    link=1e9,
)


def job(name: str = "mlp", strategy: str | None = "auto", **given: Any) -> Job:
    work, samples = WORKS[name]
    return Job(work, Setting(strategy), **({"batch": samples} | given))


def parameters(name: str) -> int:
    return sum(p.numel() for p in WORKS[name][0].build().parameters())


def test_curves_are_interpolated() -> None:
    curve = [(10.0, 1.0), (1000.0, 100.0)]
    assert [interpolate(curve, x) for x in (1, 10, 100, 1000, 5000)] == pytest.approx([1, 1, 10, 100, 500])


def test_the_slower_of_bytes_and_products_counts() -> None:
    assert FLAT.seconds(Call("", "matmul", "float32", 10**12, 10)) == pytest.approx(1)
    assert FLAT.seconds(Call("", "matmul", "float32", 10, 10**9)) == pytest.approx(1)
    assert FLAT.seconds(Call("", "special", "bfloat16", 0, 10**9)) == pytest.approx(1)
    assert FLAT.missing({"memory", "special"}) == ["special"]


def test_the_private_step_costs_more() -> None:
    """Its norms, sums and noise are seen, in time and in bytes."""
    private, ordinary = (each.estimate(each.rows, H200) for each in (job(), job().without_privacy()))
    assert private.time.norms_and_sums > 0 and private.time.noise > 0
    assert ordinary.time.norms_and_sums == 0 and ordinary.time.noise == 0
    assert private.time.total > ordinary.time.total
    assert private.memory.total >= ordinary.memory.total


def test_two_passes_take_longer_than_one() -> None:
    times = {s: job("transformer", s).estimate(8, FLAT).time.total for s in ("two_pass", "per_layer", None)}
    assert times["two_pass"] > times["per_layer"] > times[None]


def test_more_micro_batches_gather_more_often() -> None:
    """Parameters once more in each pass, sums too; a ring's bytes over the link's speed. The bytes themselves are held
    against real ranks in tests/distributed/test_planned_ranks.py."""
    sharded = job(devices=4, sharding="fsdp", batch=64)
    once, often = (sharded.estimate(rows, FLAT) for rows in (16, 4))
    for what, count in once.communication.parts.items():
        if what != "agreement of all":
            assert often.communication.parts[what] == 4 * count
    assert once.time.communication == pytest.approx(once.communication.total / 1e9)


def test_copies_meet_over_the_network() -> None:
    """Shards are neighbours: of two nodes each has a copy, and only sums of copies and agreement leave it."""
    rates = dataclasses.replace(FLAT, per_node=4, network=1e6)
    shared = job(devices=8, sharding="hsdp", replicas=2, batch=64).estimate(8, rates)
    far = sum(n for what, n in shared.communication.parts.items() if "between copies" in what or "agreement" in what)
    near = shared.communication.total - far
    assert shared.time.communication == pytest.approx(near / 1e9 + far / 1e6)
    assert 0 < far < near


def test_fsdp_holds_a_part() -> None:
    alone = job("transformer", batch=8).memory(8, H200)
    shared = job("transformer", batch=32, devices=4, sharding="fsdp").memory(8, H200)
    for name in ("parameters", "optimizer"):
        assert shared.parts[name] == pytest.approx(alone.parts[name] / 4, abs=1)
    assert shared.parts["activations"] == alone.parts["activations"]
    assert shared.parts["gathered parameters"] > 0


def test_noise_is_shared_by_the_devices() -> None:
    alone, shared = job(batch=16), job(batch=64, devices=4, sharding="ddp")
    ratio = alone.estimate(16, FLAT).time.noise / shared.estimate(16, FLAT).time.noise
    assert ratio == pytest.approx(4, rel=0.01)


def test_micro_batches_repeat_the_passes_alone() -> None:
    """The update is done once, in whatever parts the rows come."""
    once, often = (job(strategy="materialize", batch=64).estimate(rows, FLAT) for rows in (64, 16))
    assert often.micro_batches == 4
    assert often.time.phases["update"] == pytest.approx(once.time.phases["update"])
    assert often.time.phases["private backward"] > once.time.phases["private backward"]
    assert often.memory.total < once.memory.total


def test_public_rows_are_in_one_pass() -> None:
    """The first, whatever the number of micro-batches."""
    work, samples = WORKS["mlp"]
    mixed = Job(work, Setting("auto", public_rows=32), samples)
    once, often = (mixed.estimate(rows, FLAT).time.phases for rows in (samples, samples // 4))
    assert set(once) == {"mixed forward", "mixed backward", "update"}
    assert set(often) == {*once, "private forward", "private backward"}
    alone = job().estimate(samples // 4, FLAT).time.phases
    assert often["private forward"] == pytest.approx(3 / 4 * alone["private forward"])


def test_secure_noise_makes_all_gradients() -> None:
    fast, secure = (
        Job(WORKS["mlp"][0], Setting("per_layer", noise_mode=mode, device="cpu"), 64).memory(64, H200).total
        for mode in ("fast", "secure")
    )
    assert secure - fast > 0.9 * 64 * 4 * 1024 * 1024  # of one layer's samples


@pytest.mark.parametrize("strategy", ["auto", "materialize"])
def test_the_largest_micro_batch_fits_and_a_little_more_does_not(strategy: str) -> None:
    limit = H200.reserved + 64 * 2**20
    one = job(strategy=strategy)
    most = one.largest_micro_batch(limit, H200)
    large = dataclasses.replace(one, batch=1 << 16)
    assert large.memory(most, H200).total <= limit < large.memory(math.ceil(1.1 * most), H200).total
    assert one.largest_micro_batch(H200.reserved, H200) == 0


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"batch": 0}, "batch: 0"),
        ({"devices": 2}, "sharding: 'none' does not go with 2"),
        ({"sharding": "fsdp"}, "sharding: 'fsdp' does not go with 1"),
        ({"sharding": "zero", "devices": 2}, "sharding: 'zero'"),
        ({"sharding": "hsdp", "devices": 4}, "replicas: None given with sharding 'hsdp'"),
        ({"sharding": "fsdp", "devices": 4, "replicas": 2}, "replicas: 2 given with sharding 'fsdp'"),
        ({"sharding": "hsdp", "devices": 4, "replicas": 3}, "replicas: 3 copies do not share 4 devices"),
        ({"sharding": "hsdp", "devices": 4, "replicas": 4}, "replicas: 4 copies do not share 4 devices"),
    ],
)
def test_a_job_that_cannot_be(given: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        job(**given)


def test_settings_that_cannot_be() -> None:
    for name in ("strategy", "precision", "optimizer", "device", "noise_mode"):
        with pytest.raises(InputError, match=f"{name}: 'fp32' is not valid here; pass one of"):
            Setting(**{name: "fp32"})
    by_layer = Setting("per_layer", public_rows=4, noise_mode="secure")
    with pytest.raises(InputError, match="noise_mode: secure noise over several devices"):
        Job(WORKS["mlp"][0], by_layer, 64, 2, "ddp")


def test_accounting_is_that_of_the_trainer() -> None:
    settings = {"delta": 1e-5, "steps": 200, "sample_rate": 0.05}
    found = account(private_rows=2000, batch=100, delta=1e-5, epochs=10, epsilon=3.0)
    assert (found.steps, found.sample_rate) == (200, 0.05)
    assert found.noise_multiplier == calibrate(3.0, **settings)
    assert found.epsilon == spent(found.noise_multiplier, **settings) <= 3.0
    again = account(private_rows=2000, batch=100, delta=1e-5, steps=200, noise_multiplier=found.noise_multiplier)
    assert again == found
    assert found.full_batches > found.epsilon


def test_a_part_of_an_epoch_is_a_whole_step() -> None:
    assert account(private_rows=1000, batch=300, delta=1e-6, epochs=1, noise_multiplier=1.0).steps == 4


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"steps": 1, "epochs": 1.0, "epsilon": 1.0}, "steps: pass either"),
        ({"epsilon": 1.0}, "steps: pass either"),
        ({"steps": 1}, "epsilon: pass either"),
        ({"steps": 1, "epsilon": 1.0, "noise_multiplier": 1.0}, "epsilon: pass either"),
        ({"steps": 1, "epsilon": 1.0, "batch": 101}, "private_rows: 100"),
        ({"epochs": math.nan, "epsilon": 1.0}, "epochs: nan"),
        ({"steps": 1, "epsilon": 1.0, "delta": 2.0}, "delta: 2.0"),
    ],
)
def test_accounting_refuses(given: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        account(**({"private_rows": 100, "batch": 10, "delta": 1e-5} | given))


@pytest.mark.parametrize("model", ["nothing", "plan_models:missing", "no.module:f"])
def test_models_that_are_not_there(model: str) -> None:
    with pytest.raises(InputError, match="model: "):
        resolve(model, input_shape=(1, 28, 28))


def test_a_configuration_is_planned(tmp_path: Path) -> None:
    """A folder with a config.json, at a tiny size; each tuning trains fewer parameters than all."""
    pytest.importorskip("transformers")
    pytest.importorskip("peft")
    tiny = {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 99, "n_positions": 16}
    (tmp_path / "config.json").write_text(json.dumps(tiny))
    trained = {}
    for tuning in ("full", "lora", "head", "bias"):
        found = Job(resolve(str(tmp_path), sequence_length=8), Setting(tuning=tuning), 4).estimate(4, H200)
        trained[tuning] = found.trained
    assert trained["full"] == 99 * 32 + 16 * 32 + 2 * (12 * 32 * 32 + 13 * 32) + 2 * 32
    assert trained["head"] == 99 * 32  # the tied embedding
    assert trained["lora"] == 2 * 8 * (32 + 96 + 32 + 32 + 32 + 128 + 128 + 32)
    assert trained["bias"] == 2 * (32 + 96 + 32 + 32 + 128 + 32) + 32
    with pytest.raises(InputError, match=r"sequence_length: .* at most 16"):
        resolve(str(tmp_path), sequence_length=17)


def test_batch_norm_is_refused_with_the_engines_words() -> None:
    work, samples = WORKS["cnn"]
    mixing = dataclasses.replace(work, build=lambda: torch.nn.Sequential(torch.nn.BatchNorm2d(1), *cnn()))
    with pytest.raises(InputError, match=r"DPEngine refuses it: .*BatchNorm"):
        Job(mixing, Setting(), samples).estimate(samples, H200)


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, Any], str]:
    code = main(["plan", "--json", *arguments])
    caught = capsys.readouterr()
    return code, json.loads(caught.out.splitlines()[-1]) if caught.out else {}, caught.err


MODEL = ("--model", "plan_models:cnn", "--input-shape", "1,28,28", "--batch", "32", "--precision", "float32")


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ADAMIX_CACHE", str(tmp_path))
    monkeypatch.setattr(sys, "path", [str(Path(__file__).parent), *sys.path])


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    budget = ("--private-rows", "1000", "--epochs", "2", "--epsilon", "2")
    code, found, shown = run(capsys, *MODEL, "--rates", "a100", *budget)
    assert code == 0
    assert found["estimated"] and not found["rates"]["measured"]
    assert "datasheet, not measured" in shown and "estimated" in shown
    assert found["fits"] and found["private"]["micro_batch"] == 32 and found["largest_micro_batch"] > 1000
    assert found["time_ratio"] > 1 and found["accounting"]["epsilon"] <= 2


def test_the_command_with_options(capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--public-batch-size", "12", "--noise-mode", "secure", "--gpus", "8", "--sharding", "hsdp")
    code, found, shown = run(capsys, *MODEL, "--rates", "a100", *options, "--replicas", "2")
    assert code == 0 and found["replicas"] == 2 and found["setting"]["public_rows"] == 2
    assert "2 public rows on a device in the same pass, secure noise, hsdp sharding" in " ".join(shown.split())
    assert "all-reduce of sums between copies" in found["private"]["communication"]["parts"]


def test_the_command_warns(capsys: pytest.CaptureFixture[str]) -> None:
    """Of what does not fit, and of a delta that promises nothing."""
    budget = ("--private-rows", "1000", "--steps", "2", "--noise-multiplier", "1", "--delta", "0.001")
    code, found, shown = run(capsys, *MODEL, "--rates", "a100", "--memory", "0.1", *budget)
    assert code == 0 and not found["fits"] and found["largest_micro_batch"] == 0
    assert "do not fit into 0.1 GiB" in shown and "delta: 0.001 is at least 1/N" in shown


def test_rates_that_were_not_measured(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, shown = run(capsys, *MODEL, "--device", "cpu")
    assert code == 2 and "were not measured yet; run adamix plan --measure" in shown


def test_measured_rates_are_kept_and_read(capsys: pytest.CaptureFixture[str]) -> None:
    measured = dataclasses.replace(FLAT, device="cpu", name="a machine", link=None, network=None)
    measured.save(default_path("cpu"))
    assert dataclasses.asdict(Rates.load(default_path("cpu")))["name"] == "a machine"
    code, found, _ = run(capsys, *MODEL, "--device", "cpu")
    assert code == 0 and found["rates"]["measured"]
    code, _, shown = run(capsys, *MODEL[:-1], "autocast", "--device", "cpu")
    assert code == 0 and "rates: none was measured in bfloat16" in shown
    code, _, shown = run(capsys, *MODEL, "--device", "cpu", "--gpus", "2")
    assert code == 2 and "bandwidth: the rates do not say" in shown
    default_path("cpu").write_text("{")
    code, _, shown = run(capsys, *MODEL, "--device", "cpu")
    assert code == 2 and "measure anew" in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "model: there is nothing to plan"),
        ((*MODEL, "--rates", "a100", "--epsilon", "1"), "epsilon: nothing can be accounted"),
        ((*MODEL, "--rates", "a100", "--micro-batch", "64"), "micro_batch: 64"),
        ((*MODEL[:2], "--rates", "a100"), "input_shape: "),
        ((*MODEL, "--rates", "a100", "--input-shape", "1,x"), "input_shape: '1,x'"),
        ((*MODEL, "--rates", "a100", "--bandwidth", "0"), "bandwidth: 0"),
        ((*MODEL, "--rates", "nowhere.json"), "rates: nowhere.json"),
        ((*MODEL, "--rates", "a100", "--gpus", "0"), "gpus: 0"),
        ((*MODEL, "--rates", "a100", "--public-batch-size", "-1"), "public_batch_size: -1"),
        ((*MODEL, "--rates", "a100", "--compile"), "compile: what torch.compile makes of a step is not modelled"),
        ((*MODEL, "--rates", "a100", "--checkpointing"), "checkpointing: the model is none of transformers"),
        ((*MODEL, "--rates", "a100", "--tune", "nonsense"), "tune: 'nonsense' is none of full, head, bias, lora, and "),
        ((*MODEL, "--rates", "a100", "--memory", "nan"), "memory: nan"),
        ((*MODEL, "--rates", "a100", "--memory", "inf"), "memory: inf"),
        ((*MODEL, "--rates", "a100", "--input-shape", "1,9,9"), "fails on inputs"),
        (("--model", "plan_models:tokens", *MODEL[2:], "--rates", "a100"), "plan_models:tokens() fails"),
        (("--model", "plan_models:nothing", *MODEL[2:], "--rates", "a100"), "gives a NoneType"),
    ],
)
def test_the_command_refuses(arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, shown = run(capsys, *arguments)
    assert code == 2 and message in shown
