"""`fit` and `adamix train` with a ledger and checkpoints: what is charged when, and who may go on with what."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from crash_server import PRIVATE, PUBLIC, SETTINGS
from torch import nn

from adamix import AdaMix, Config, InputError, Ledger, Result, Rows, spent
from adamix.__main__ import main
from adamix.checkpoint import load_checkpoint
from adamix.ledger_records import head_path, read_ledger
from adamix.private_phase import Step
from adamix_kernels import Noise

pytestmark = pytest.mark.filterwarnings("ignore:epsilon. inf", "ignore:noise_seed")


class CrashError(Exception):
    pass


class Place:
    """A ledger and a checkpoint folder."""

    def __init__(self, folder: Path, **header: Any) -> None:
        self.ledger, self.checkpoint = folder / "rows.ledger", folder / "checkpoint"
        Ledger.create(self.ledger, data_set="test", **header).close()

    def fit(self, *, stop: int = 99, model: nn.Module | None = None, **changes: Any) -> Result:
        def stop_at(step: Step) -> None:
            if step.number == stop:
                raise CrashError

        fields = {**SETTINGS, **{k: v for k, v in changes.items() if k in Config.__dataclass_fields__}}
        given = {"ledger": self.ledger, "checkpoint": self.checkpoint, "public": PUBLIC, "private": PRIVATE}
        given |= {k: v for k, v in changes.items() if k not in Config.__dataclass_fields__}
        return AdaMix(model, **fields).fit(on_step=stop_at, **given)

    def interrupt(self, **changes: Any) -> None:
        with pytest.raises(CrashError):
            self.fit(**{"stop": 2, **changes})

    @property
    def charged(self) -> int:
        return sum(run.charged for run in read_ledger(self.ledger).runs.values())


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path, epsilon=5.0)


def test_settings_may_be_numbers_of_numpy(place: Place) -> None:
    given = {"epsilon": np.float32(2.0), "steps": np.int64(3), "expected_batch_size": np.int32(40)}
    place.interrupt(**given)
    assert place.fit(**given, resume=True).epsilon == place.fit(resume=True, **given).epsilon
    assert place.charged == 3


def test_every_step_is_charged_before_batch_and_noise(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    charge, next_draw = Ledger.charge, Noise.next_draw

    def noted_charge(self: Ledger, run: str) -> int:
        charged = charge(self, run)
        assert read_ledger(place.ledger).runs[run].charged == charged
        events.append("charge")
        return charged

    def noted_draw(self: Noise) -> int:
        events.append("draw")
        return next_draw(self)

    monkeypatch.setattr(Ledger, "charge", noted_charge)
    monkeypatch.setattr(Noise, "next_draw", noted_draw)
    result = place.fit(sample_rate=0.5, expected_batch_size=15)
    assert events == ["charge", "draw", "draw"] * 3, "the batch is drawn, then the noise"
    assert result.ledger_epsilon == result.epsilon <= 2.0
    assert read_ledger(place.ledger).spent() == result.ledger_epsilon


def test_a_charge_that_fails_ends_the_run_before_anything_is_drawn(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> int:
        raise InputError("ledger: full")

    monkeypatch.setattr(Ledger, "charge", refuse)
    monkeypatch.setattr(Noise, "next_draw", lambda _: pytest.fail("drawn"))
    with pytest.raises(InputError, match="ledger: full"):
        place.fit()


def test_without_noise_in_the_way_a_resumed_run_ends_where_a_whole_one_does(tmp_path: Path) -> None:
    """Also when the step sizes rest on the weights that phase 2 began with."""
    weights = []
    with pytest.warns(UserWarning, match="NO NOISE"):
        for name, stops in (("whole", [99]), ("cut", [1, 3, 99])):
            (tmp_path / name).mkdir()
            place = Place(tmp_path / name)
            for stop in stops:
                torch.manual_seed(0 if stop == stops[0] else 1)  # the start comes from the checkpoint
                model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
                try:
                    result = place.fit(
                        stop=stop, model=model, resume=stop != stops[0], epsilon=math.inf, quantile=None,
                        max_grad_norm=1.0, steps=5, anchor=0.1,
                    )  # fmt: skip
                except CrashError:
                    continue
            weights.append(result)
    torch.testing.assert_close(dict(weights[0].model.state_dict()), dict(weights[1].model.state_dict()))
    torch.testing.assert_close(weights[0].public_state, weights[1].public_state)
    assert weights[0].steps == weights[1].steps and len(weights[1].epsilons) == 5


def test_a_resumed_run_is_charged_for_what_was_lost(place: Place) -> None:
    place.interrupt()
    for path in place.checkpoint.glob("step-0000002*"):
        path.unlink()
    with pytest.warns(UserWarning, match="1 in all, so the run costs epsilon 2.3"):
        result = place.fit(resume=True)
    assert place.charged == 4 and [step.number for step in result.steps] == [1, 2, 3]
    expected = [spent(result.noise_multiplier, delta=1e-5, steps=n) for n in (2, 3, 4)]
    assert result.epsilons == expected and result.epsilon == result.ledger_epsilon == expected[-1]


def test_nothing_lost_costs_nothing(place: Place) -> None:
    place.interrupt()
    assert place.fit(resume=True).epsilon <= 2.0
    assert place.charged == 3
    again = place.fit(resume=True)
    assert place.charged == 3 and len(again.steps) == 3, "a finished run is only shown again"


def test_a_budget_too_small_for_the_lost_step_names_the_steps_that_fit(tmp_path: Path) -> None:
    place = Place(tmp_path, epsilon=2.0)
    place.interrupt()
    for path in place.checkpoint.glob("step-0000002*"):
        path.unlink()
    with pytest.raises(InputError, match="above the budget of 2 at delta 1e-05; resume with steps=2, which fits"):
        place.fit(resume=True)
    result = place.fit(resume=True, steps=2)
    assert len(result.steps) == 2 and place.charged == 3 and result.epsilon <= 2.0
    with pytest.raises(InputError, match="above the budget of 2"):
        place.fit(checkpoint=None)


def test_runs_compose_and_the_budget_refuses_before_anything_is_trained(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(2):
        place.fit(checkpoint=None, epsilon=3.0)
        assert place.charged == 3 * (number + 1)
    monkeypatch.setattr("adamix.trainer.fit_public", lambda *_, **__: pytest.fail("trained"))
    with pytest.raises(InputError, match=r"above the budget of 5 .*; start a run with epsilon <= "):
        place.fit(checkpoint=None, epsilon=3.0)
    with pytest.raises(InputError, match="come to inf, above the budget"):
        place.fit(checkpoint=None, epsilon=math.inf)


def test_no_key_is_stored_and_each_process_draws_its_own(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    keys: list[list[int]] = []
    start = Noise._start

    def noted(self: Noise, key: bytes, mode: str) -> None:
        start(self, key, mode)
        keys.append(self._key)

    monkeypatch.setattr(Noise, "_start", noted)
    place.interrupt()
    place.fit(resume=True)
    assert len(keys) == 2 and keys[0] != keys[1]
    saved = b"".join(path.read_bytes() for path in (place.ledger, *place.checkpoint.iterdir()))
    assert not any(str(word).encode() in saved for key in keys for word in key if word > 10**6)


OTHER = Rows(PUBLIC.x + 1, PUBLIC.y)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epsilon": 2.5}, "epsilon: the run to resume has 2.0, given 2.5; pass the same, or start a new run"),
        ({"sample_rate": 0.5}, "sample_rate: the run to resume has 1.0, given 0.5"),
        ({"delta": 1e-6}, "delta: "),
        ({"noise_mode": "secure"}, "noise_mode: "),
        ({"steps": 4}, "steps: 4 given to resume a run of 3 that finished 2"),
        ({"steps": 1}, "steps: 1 given to resume"),
        ({"public": OTHER}, "resume: the public rows differ"),
        ({"public": (PUBLIC.x[:, :3], PUBLIC.y), "private": (PRIVATE.x[:, :3], PRIVATE.y)}, "resume: the shape of a r"),
        ({"model": nn.Linear(4, 3)}, "resume: the trained parameters differ"),
        ({"resume": False}, "holds a run already; resume it, or name a new folder"),
        ({"checkpoint": "/nowhere"}, "checkpoint: /nowhere holds none"),
        ({"noise_seed": 1}, "noise_seed: given with a ledger"),
        ({"ledger": None}, "checkpoint: given without a ledger"),
        ({"checkpoint": None}, "resume: given without a checkpoint"),
        ({"checkpoint_every": 0}, "checkpoint_every: 0 is not valid"),
        ({"ledger": 3}, "ledger: is int; pass the path"),
        ({"checkpoint": 3}, "checkpoint: is int; pass the path"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_what_is_not_the_same_run_is_refused(place: Place, changes: dict[str, Any], message: str) -> None:
    place.interrupt()
    before = place.ledger.read_bytes()
    with pytest.raises(InputError, match=message) as raised:
        place.fit(**{"resume": True, **changes})
    assert "\n" not in str(raised.value) and place.ledger.read_bytes() == before


def test_another_model_is_refused(place: Place) -> None:
    def model(scale: float) -> nn.Module:
        frozen = nn.Linear(PUBLIC[0].shape[1], 4)
        for p in frozen.parameters():
            nn.init.constant_(p, scale).requires_grad_(False)
        return nn.Sequential(frozen, nn.Linear(4, int(PUBLIC[1].max()) + 1))

    place.interrupt(model=model(0.5))
    with pytest.raises(InputError, match="frozen parameters and buffers differ from those of the run to resume"):
        place.fit(model=model(0.6), resume=True)


def test_an_older_or_another_ledger_is_refused(tmp_path: Path, place: Place) -> None:
    older = place.ledger.read_bytes(), head_path(place.ledger).read_bytes()
    place.interrupt()
    place.ledger.write_bytes(older[0])
    head_path(place.ledger).write_bytes(older[1])
    with pytest.raises(InputError, match=r"is older than the checkpoint, or another one .*; restore the latest ledger"):
        place.fit(resume=True)
    (tmp_path / "other").mkdir()
    other = Place(tmp_path / "other")
    other.fit()
    with pytest.raises(InputError, match="is older than the checkpoint, or another one"):
        place.fit(resume=True, ledger=other.ledger)


def test_the_unit_must_be_that_of_the_ledger(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="its unit is one user, this run protects one record"):
        Place(tmp_path, unit="user").fit()


def test_fewer_checkpoints(place: Place) -> None:
    place.interrupt(stop=3, steps=5, checkpoint_every=2)
    assert load_checkpoint(place.checkpoint).finished == 2
    with pytest.warns(UserWarning, match="interrupted steps are charged again, 1 in all"):
        place.fit(resume=True, steps=5, checkpoint_every=2)
    assert place.charged == 6
    assert sorted(path.name for path in place.checkpoint.glob("*.json")) == ["step-0000004.json", "step-0000005.json"]


def test_an_open_ledger_stays_open(place: Place) -> None:
    with Ledger(place.ledger) as ledger:
        assert place.fit(ledger=ledger).ledger_epsilon == ledger.spent()
        with pytest.raises(InputError, match="is in use by"):
            place.fit(checkpoint=None)


@pytest.fixture
def flags(tmp_path: Path) -> list[str]:
    for name, rows in (("public", PUBLIC), ("private", PRIVATE), ("test", Rows(PRIVATE.x + 1, PRIVATE.y))):
        np.savez(tmp_path / f"{name}.npz", X=rows.x.numpy(), y=rows.y.numpy())
    own = [part for name in ("public", "private", "test") for part in (f"--{name}", str(tmp_path / f"{name}.npz"))]
    return ["train", "--json", *own, "--expected-batch-size", "30", "--steps", "3", "--epsilon", "1.5"]


def test_the_command_line(flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ledger, folder = str(tmp_path / "rows.ledger"), str(tmp_path / "checkpoint")
    train = [*flags, "--ledger", ledger, "--checkpoint", folder]

    def fails(arguments: list[str], message: str) -> None:
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert message in error and len(error.strip().splitlines()) == 1

    fails(train, "does not exist; check the path")
    fails([*train, "--budget-epsilon", "2"], "budget_epsilon: belongs to a new ledger and never changes")
    fails([*train, "--new-ledger", "rows", "--resume"], "new_ledger: pass --ledger FILE with it, and no --resume")
    assert main([*train, "--new-ledger", "rows", "--budget-epsilon", "2"]) == 0
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert summary["ledger_epsilon"] == summary["epsilon"] <= 1.5
    fails([*train, "--new-ledger", "rows"], "exists already; drop --new-ledger")
    fails(train, "holds a run already; resume it")
    assert main([*train, "--resume"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["epsilon"] == summary["epsilon"]
    fails([*flags, "--ledger", ledger], "above the budget of 2 at delta 1e-05; start a run with epsilon <= ")
    assert main(["budget", ledger, "--json"]) == 0
    captured = capsys.readouterr()
    shown = json.loads(captured.out.splitlines()[-1])
    assert shown["spent"] == summary["epsilon"] and shown["budget"] == 2.0 and 0 < shown["left"] < 2.0
    assert [(run["charged"], run["planned"], run["ended"]) for run in shown["runs"]] == [(3, 3, True)]
    assert "Spent in all: epsilon 1.5" in captured.err and "Left: a full-batch run of epsilon" in captured.err
    fails(["budget", str(tmp_path / "none")], "does not exist")
    Path(ledger).write_bytes(Path(ledger).read_bytes()[:-9])
    fails(["budget", ledger], "is truncated or an older copy")
