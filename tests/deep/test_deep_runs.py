"""Ledger and checkpoints of `DeepAdaMix`, and that nothing but the noisy release tells of private rows."""

from __future__ import annotations

import dataclasses
import json
import pickle
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small import PRIVATE, PUBLIC, TEST, blobs, conv_net, fit, plain_steps, vector
from torch import Tensor
from torch.utils.data import TensorDataset

from adamix import InputError, Ledger
from adamix.checkpoint import load_checkpoint
from adamix.deep import DeepResult
from adamix.ledger_records import read_ledger
from adamix.private_phase import Step
from adamix.report import write_run
from adamix_kernels import Noise
from adamix_kernels.nn.sums import StepSums

pytestmark = pytest.mark.filterwarnings("ignore:epsilon. inf", "ignore:noise_seed", "ignore:resume")

#: With noise; full batches, which are accounted for at once.
NOISY: dict[str, Any] = {"epsilon": 2.0, "delta": 1e-3}


class CrashError(Exception):
    pass


class Place:
    def __init__(self, folder: Path, **header: Any) -> None:
        self.ledger, self.checkpoint = folder / "rows.ledger", folder / "checkpoint"
        Ledger.create(self.ledger, data_set="test", **header).close()

    def fit(self, *, stop: int = 99, **given: Any) -> DeepResult:
        def stop_at(step: Step) -> None:
            if step.number == stop:
                raise CrashError

        return fit(on_step=stop_at, ledger=self.ledger, checkpoint=self.checkpoint, **given)

    def interrupt(self, **given: Any) -> None:
        with pytest.raises(CrashError):
            self.fit(**{"stop": 2, **given})

    @property
    def charged(self) -> int:
        return sum(run.charged for run in read_ledger(self.ledger).runs.values())


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path, epsilon=5.0, delta=1e-3)


# --- ledger ----------------------------------------------------------------------------------------------------------


def test_every_step_is_charged_before_batch_and_noise(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    charge, next_draw = Ledger.charge, Noise.next_draw
    monkeypatch.setattr(Ledger, "charge", lambda self, run: (events.append("charge"), charge(self, run))[1])
    monkeypatch.setattr(Noise, "next_draw", lambda self: (events.append("draw"), next_draw(self))[1])
    result = place.fit(**NOISY)
    assert events == ["charge", "draw", "draw"] * 3, "the batch is drawn, then the noise"
    assert result.ledger_epsilon == result.epsilon <= 2.0 and place.charged == 3


def test_a_charge_that_fails_ends_the_run_before_anything_is_drawn(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> int:
        raise InputError("ledger: full")

    monkeypatch.setattr(Ledger, "charge", refuse)
    monkeypatch.setattr(Noise, "next_draw", lambda _: pytest.fail("drawn"))
    with pytest.raises(InputError, match="ledger: full"):
        place.fit(**NOISY)


def test_a_run_that_the_budget_does_not_allow_is_refused(place: Place) -> None:
    with pytest.raises(InputError, match="budget"):
        place.fit(epsilon=5.5, delta=1e-3, on_public_step=lambda _: pytest.fail("trained"))
    assert place.charged == 0


# --- checkpoints -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_without_noise_a_resumed_run_ends_where_a_whole_one_does(tmp_path: Path, optimizer: str) -> None:
    settings = {"optimizer": optimizer, "steps": 5, "anchor": 0.5, "learning_rate": 1e-2, "test": TEST}
    ends = []
    for name, stops in (("whole", [99]), ("cut", [1, 3, 99])):
        (tmp_path / name).mkdir()
        place = Place(tmp_path / name)
        for stop in stops:
            # Another start: it comes from the checkpoint.
            model = conv_net(0 if stop == stops[0] else 1)
            try:
                ends.append(place.fit(stop=stop, model=model, resume=stop != stops[0], **settings))
            except CrashError:
                continue
    whole, cut = ends
    torch.testing.assert_close(vector(whole), vector(cut), rtol=0, atol=0)
    assert repr(whole.steps) == repr(cut.steps) and whole.public_error == cut.public_error
    torch.testing.assert_close(whole.public_state, cut.public_state, rtol=0, atol=0)


def test_a_resumed_run_is_charged_for_what_was_lost_and_shares_no_noise(place: Place) -> None:
    """The same step, taken twice from the same weights, with everything but the key of the noise the same."""
    place.interrupt(**NOISY)
    for path in place.checkpoint.glob("step-0000002*"):
        path.unlink()
    lost = load_checkpoint(place.checkpoint)
    assert lost.finished == 1 and place.charged == 2
    ends = []
    for _ in range(2):
        with pytest.raises(CrashError):
            place.fit(stop=2, resume=True, **NOISY)
        ends.append(load_checkpoint(place.checkpoint).weights)
        for path in place.checkpoint.glob("step-0000002*"):
            path.unlink()
    assert (ends[0] - ends[1]).abs().min() > 0 and place.charged == 4
    result = place.fit(resume=True, **NOISY)
    assert place.charged == 6 and len(result.steps) == 3 and result.epsilon > 2.0
    assert result.ledger_epsilon == pytest.approx(result.epsilon)


def test_only_the_same_run_may_go_on(place: Place) -> None:
    place.interrupt(**NOISY)
    for changes, message in (
        ({"quantile": 0.5}, "quantile: the run to resume has 0.9"),
        ({"tune": "head"}, "tune: the run to resume has 'full'"),
        ({"public": blobs(12, 9)}, "resume: the public rows differ"),
        ({"optimizer": "sgd"}, "optimizer: the run to resume has 'adamw'"),
    ):
        with pytest.raises(InputError, match=message):
            place.fit(resume=True, **{**NOISY, **changes})
    frozen = conv_net()
    frozen[0].bias.requires_grad_(False)
    with pytest.raises(InputError, match="resume: the trained parameters differ"):
        place.fit(resume=True, model=frozen, **NOISY)
    assert place.charged == 2


def test_a_checkpoint_holds_no_pickle_and_refuses_what_it_cannot_hold(place: Place) -> None:
    class Odd(torch.optim.SGD):
        def state_dict(self) -> dict[str, Any]:
            return {**super().state_dict(), "state": {0: {"f": object()}}}

    with pytest.raises(InputError, match="optimizer: its state holds a object"):
        place.fit(optimizer=lambda p: Odd(p, lr=0.1), **NOISY)
    assert place.charged == 0
    place.fit(**NOISY)
    for path in place.checkpoint.iterdir():
        assert path.suffix in {".json", ".safetensors"}
        with pytest.raises(Exception, match=r".+"):
            pickle.loads(path.read_bytes())


# --- information flow ------------------------------------------------------------------------------------------------

#: Other values, other labels, another number of rows, and some that are far out.
OTHER = TensorDataset(
    blobs(26, 3).tensors[0] * torch.logspace(-3, 6, 26)[:, None, None, None], (blobs(26, 3).tensors[1] + 1) % 3
)


@pytest.fixture
def released(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The private release is a constant: what still differs between two runs came another way."""
    calls: list[int] = []

    def constant(self: StepSums, sums: list[Tensor], *_: Any) -> list[Tensor]:
        calls.append(1)
        return [torch.full(x.shape, 0.01) for x in sums]

    monkeypatch.setattr(StepSums, "_release_as_one", constant)
    monkeypatch.setattr(StepSums, "_release_by_layer", constant)
    return calls


class Noisy(TensorDataset):
    """Draws at random while a row is loaded, from every generator."""

    def __getitem__(self, i: Any) -> Any:
        torch.rand(1), random.random(), np.random.rand()
        return super().__getitem__(i)


def everything(result: DeepResult, steps: list[Step]) -> Iterator[tuple[str, Any]]:
    for field in dataclasses.fields(result):
        value = getattr(result, field.name)
        if field.name not in {"model", "public_state"}:
            yield field.name, repr(value)
    yield "steps", repr(steps)
    state = {**result.model.state_dict(), **{f"grad.{n}": p.grad for n, p in result.model.named_parameters()}}
    yield from ((name, None if x is None else x.numpy().tobytes()) for name, x in state.items())
    yield "generators", (torch.get_rng_state().numpy().tobytes(), random.getstate(), repr(np.random.get_state()))


RUNS: dict[str, dict[str, Any]] = {
    "per layer": {"strategy": "per_layer"},
    "one threshold": {"strategy": "auto"},
    "fixed threshold": {"quantile": None, "max_grad_norm": 0.5},
    "Poisson": {"sample_rate": 0.5, "epsilon": float("inf")},
    "several passes": {"micro_batch_size": 15},
    "secure": {"noise_mode": "secure"},
    "adapters": {"tune": "bias"},
}


def run(private: Any, given: dict[str, Any]) -> tuple[DeepResult, dict[str, Any]]:
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    steps: list[Step] = []
    settings = {**NOISY, **given}
    result = fit(private=private, test=TEST, on_step=steps.append, expected_batch_size=30, **settings)
    return result, dict(everything(result, steps))


@pytest.mark.parametrize("name", RUNS)
def test_nothing_returned_has_touched_a_private_row(name: str, released: list[int]) -> None:
    """Bit for bit: not even the last bits of thresholds and public gradients tell how many rows there were."""
    _, one = run(Noisy(*PRIVATE.tensors), RUNS[name])
    assert len(released) == 3
    assert one == run(Noisy(*OTHER.tensors), RUNS[name])[1]
    assert one == run([], RUNS[name])[1]


@pytest.mark.parametrize("micro", [60, 15])
def test_every_pass_has_as_many_rows_whatever_was_drawn(micro: int) -> None:
    """Products of matrices of other sizes may round otherwise: that would tell of the number of private rows."""
    sizes: list[int] = []

    def loss(model: Any, batch: Any) -> Tensor:
        sizes.append(len(batch[0]))
        return torch.nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")

    for private, rate in ((PRIVATE, 0.3), (OTHER, 1.0), ([], 1.0)):
        sizes.clear()
        fit(private=private, sample_rate=rate, micro_batch_size=micro, public_steps=0, loss=loss)
        assert len(sizes) > 4 + 3 and set(sizes[4:]) == {micro}, "after four that try the loss"


def test_nothing_written_has_touched_a_private_row(tmp_path: Path, released: list[int]) -> None:
    seen = []
    for name, private in (("one", PRIVATE), ("other", OTHER)):
        place = Place(tmp_path / name) if (tmp_path / name).mkdir() is None else None
        assert place is not None
        result = place.fit(private=private, expected_batch_size=30, **NOISY)
        write_run(tmp_path / name / "run", result, {"epsilon": result.epsilon})
        files = {p.name: p.read_bytes() for p in sorted((tmp_path / name / "run").iterdir())}
        tensors = [p.read_bytes() for p in sorted(place.checkpoint.glob("*.safetensors"))]
        records = [json.loads(p.read_text()) for p in sorted(place.checkpoint.glob("*.json"))]
        own = {"run", "ledger_head", "sha256", "previous"}  # random names, and hashes over them
        seen.append((files, tensors, [{k: v for k, v in r.items() if k not in own} for r in records]))
        assert {"summary.json", "metrics.jsonl", "config.json", "weights.safetensors", "run.png"} <= files.keys()
    assert seen[0] == seen[1]


def test_a_leak_would_be_seen(released: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the rows that fill a batch, the last bits of public figures depend on how many private rows there are."""
    one = run(PRIVATE, {"loss": lambda m, b: torch.nn.functional.cross_entropy(m(b[0]), b[1], reduction="sum")})[1]
    assert one["steps"].count("nan") == 6, "of a sum over rows no public loss is told"
    monkeypatch.setattr("adamix.deep.phases._public_losses", lambda losses, batch: losses.detach())
    assert run(PRIVATE, {})[1]["steps"] != run(OTHER, {})[1]["steps"]


def test_a_public_figure_is_of_the_public_rows() -> None:
    """Of step 1: thresholds and loss of its public rows at the phase-1 weights."""
    result = fit(strategy="auto", quantile=1.0, public_steps=0, optimizer=plain_steps)
    x, y = PUBLIC.tensors
    with torch.no_grad():
        losses = torch.nn.functional.cross_entropy(conv_net()(x), y, reduction="none").sort().values
    assert losses[:8].mean() <= result.steps[0].public_loss <= losses[-8:].mean()
    assert "private" not in json.dumps(dataclasses.asdict(result.steps[0]))
