"""`DeepAdaMix` on sharded models: the run of one process, its guarantees, and no rank that has all of the model."""

from __future__ import annotations

import multiprocessing
import sys
from pathlib import Path
from typing import Any

import pytest
import shard_checks as checks
import torch
from small import fit
from torch import Tensor

from adamix import InputError, Ledger
from adamix.ledger_records import read_ledger

sys.path.append(str(Path(__file__).parents[1] / "distributed"))

import spawned

pytestmark = pytest.mark.filterwarnings("ignore:epsilon. inf", "ignore:noise_seed", "ignore:resume")

#: How far weights may be: the order of sums over ranks moves what is rounded to bfloat16.
NEAR = {"autocast": 2e-3, "bfloat16": 2e-3}
#: From so many ranks to so many, and how the model is sharded on these.
RESUMES = [(2, 4, "fsdp"), (2, 4, "hybrid"), (2, 1, "fsdp"), (4, 2, "fsdp"), (4, 1, "fsdp"), (2, 2, "fsdp")]


#: The checks that a test looks at, by the beginning of their names.
LOOKS_AT = {
    "test_a_run_is_that_of_one_process": ("same",),
    "test_noise_is_bit_for_bit_that_of_one_process": ("noise",),
    "test_adapters_are_sharded_too": ("adapters",),
    "test_ranks_train_the_weights_of_the_first": ("other weights",),
    "test_a_run_goes_on_with_other_ranks": ("interrupted", "2 to", "4 to"),
    "test_a_lost_step_is_charged_again_and_shares_no_noise": ("lost",),
    "test_a_step_is_charged_before_batch_and_noise_on_each_rank": ("order",),
    "test_no_rank_has_all_of_the_model": ("memory",),
    "test_a_digest_is_that_of_the_whole": ("digests",),
    "test_refused_on_all_ranks": ("refusals",),
    "test_ranks_that_were_given_other_things_are_refused": ("unequal",),
    "test_no_rank_waits_for_the_accounting_of_another": ("waits",),
    "test_all_ranks_write_where_the_first_does": ("folders",),
    "test_a_model_on_some_of_the_ranks_is_refused": ("refusals",),
}


@pytest.fixture(scope="module")
def jobs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Any]]]:
    """Results by size, rank and check, of the checks that the chosen tests look at: first all that leave something,
    then what goes on with it."""
    chosen = {getattr(item, "originalname", "") for item in request.session.items}
    wanted = tuple(name for test in chosen if test in LOOKS_AT for name in LOOKS_AT[test])
    folder = tmp_path_factory.mktemp("shards")
    found: dict[int, list[dict[str, Any]]] = {}
    for size in (2, 4, 1, 2):
        entries = [] if size in found else list(checks.plan(size, folder))
        for of, to, kind in RESUMES:
            if to == size and (of in found or of == size):
                name = f"{of} to {to} {kind}"
                if not any(name in rank for ranks in found.values() for rank in ranks):
                    entries.append((name, checks.resumed, (kind, folder, name, f"of-{of}")))
        entries = [entry for entry in entries if entry[0].startswith(wanted)]
        run = folder / str(len(found)) if size not in found else folder / "again"
        run.mkdir()
        ranks = spawned.run(size, run, entries)
        found[size] = [{**before, **now} for before, now in zip(found.get(size, [{}] * size), ranks, strict=True)]
    return found


def results(job: list[dict[str, Any]], name: str) -> list[Any]:
    """Of each rank."""
    for rank in job:
        for found in rank.values():
            if isinstance(found, AssertionError):
                raise found
    return [rank[name] for rank in job]


def farthest(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    assert found.keys() == expected.keys()
    return max(float((found[name] - expected[name]).abs().max()) for name in expected)


@pytest.mark.parametrize(
    ("size", "kind", "name"),
    [(2, "fsdp", name) for name in checks.RUNS]
    + [(2, kind, name) for kind in ("setting", "ddp") for name in ("per layer", "several passes")]
    + [(4, "fsdp", "several passes"), (4, "hybrid", "per layer"), (1, "fsdp", "per layer")],
)
def test_a_run_is_that_of_one_process(jobs: dict[int, list[dict[str, Any]]], size: int, kind: str, name: str) -> None:
    """Weights after both phases, thresholds, losses and errors; all ranks take as many passes."""
    expected = checks.result_of("plain", name)
    if name in {"several passes", "a sum"}:
        passes = [found["passes"] for found in results(jobs[size], f"same {kind} {name}")]
        assert any(len(set(of_step)) > 1 for of_step in zip(*passes, strict=True)), "ranks need other numbers of them"
    near = NEAR.get(name, 1e-6)
    for found in results(jobs[size], f"same {kind} {name}"):
        assert farthest(found["weights"], expected["weights"]) < near
        assert found["figures"] == expected["figures"]
        if name not in NEAR:
            torch.testing.assert_close(found["losses"], expected["losses"], rtol=1e-5, atol=0)
            torch.testing.assert_close(found["steps"], expected["steps"], rtol=1e-5, atol=1e-9, equal_nan=True)


@pytest.mark.parametrize(("size", "kind"), [(2, "fsdp"), (2, "setting"), (2, "ddp"), (4, "fsdp"), (4, "hybrid")])
def test_noise_is_bit_for_bit_that_of_one_process(jobs: dict[int, list[dict[str, Any]]], size: int, kind: str) -> None:
    expected = checks.noise_alone("plain")
    assert float(torch.cat([x.flatten() for x in expected.values()]).std()) > 0
    for found in results(jobs[size], f"noise {kind}"):
        assert farthest(found, expected) == 0


@pytest.mark.parametrize("kind", ["fsdp", "setting"])
def test_adapters_are_sharded_too(jobs: dict[int, list[dict[str, Any]]], kind: str) -> None:
    expected = checks.with_adapters("plain")
    assert any("lora_" in name for name in expected)
    for found in results(jobs[2], f"adapters {kind}"):
        assert farthest(found, expected) < 1e-6


@pytest.mark.parametrize(("size", "kind"), [(2, "setting"), (4, "hybrid")])
def test_ranks_train_the_weights_of_the_first(jobs: dict[int, list[dict[str, Any]]], size: int, kind: str) -> None:
    """Replicas of shards came with others; the ranks end with one model, that of the first."""
    first, *others = results(jobs[size], f"other weights {kind}")
    assert all(farthest(found, first) == 0 for found in others)
    assert farthest(first, checks.whole(checks.run("plain", **{**checks.NOISY, "steps": 1}))) < 1e-6


# --- ledger and checkpoints ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def uninterrupted() -> Any:
    return fit(checks.Net(), **checks.RESUMED)


@pytest.mark.parametrize(("of", "to", "kind"), RESUMES)
def test_a_run_goes_on_with_other_ranks(
    jobs: dict[int, list[dict[str, Any]]], uninterrupted: Any, of: int, to: int, kind: str
) -> None:
    steps = ["step-0000001", "step-0000001.json", "step-0000002", "step-0000002.json"]
    assert results(jobs[of], f"interrupted {of}") == [steps] * of
    for found in results(jobs[to], f"{of} to {to} {kind}"):
        assert farthest(found["weights"], checks.whole(uninterrupted)) < 1e-6
        torch.testing.assert_close(
            found["steps"], [step.thresholds for step in uninterrupted.steps], rtol=1e-5, atol=1e-9
        )
        assert found["charged"] == 5 and found["errors"] == (uninterrupted.public_error, uninterrupted.test_error)
        assert found["names"] == ["step-0000004", "step-0000004.json", "step-0000005", "step-0000005.json"]


def test_a_lost_step_is_charged_again_and_shares_no_noise(jobs: dict[int, list[dict[str, Any]]]) -> None:
    for found in results(jobs[2], "lost"):
        assert found["charged"] == [2, 3, 4, 5] and found["apart"] > 1e-4 and found["epsilon"] > 2.0


def test_a_step_is_charged_before_batch_and_noise_on_each_rank(jobs: dict[int, list[dict[str, Any]]]) -> None:
    """The first checkpoint comes before the run's line in the ledger, that of a step after its noise."""
    first, second = results(jobs[2], "order")
    step = ["charge", "next_draw", "next_draw", "dcp_save"]
    assert first == ["dcp_save", "start_run", *step, *step] and second == ["dcp_save", *step, *step]


@pytest.mark.parametrize("size", [2, 4])
def test_no_rank_has_all_of_the_model(jobs: dict[int, list[dict[str, Any]]], size: int) -> None:
    """The largest tensor is a shard or a block, which is a quarter; ranks tell each other little, and write shares."""
    for largest, told, file in results(jobs[size], "memory"):
        assert largest < 0.55 and told < 0.35 and file < 1.1 / size + 0.15


@pytest.mark.parametrize("size", [2, 4])
def test_a_digest_is_that_of_the_whole(jobs: dict[int, list[dict[str, Any]]], size: int) -> None:
    assert all(all(found) for found in results(jobs[size], "digests"))


REFUSED = {
    "adapters": "tune: 'lora' given for a model that is spread over ranks already",
    "adapters in ddp": "tune: 'lora' given for a model that is spread over ranks already",
    "tied": "sharding: 'fsdp' given, and parameter 'up.weight' of a block that is sharded by itself is shared",
    "ddp": "sharding: 'fsdp' given, and a model in DistributedDataParallel",
    "root": "model: the private engine does not take it: model: some parameters are DTensors",
    "no run": "holds none",
    "of replicas": "is of a model that is not sharded",
    "of shards": "is of a model that was sharded; shard it again",
    "begun": "holds a run already",
    "other parts": "tune: the run to resume has 'full'",
    "other buffers": "resume: the frozen parameters and buffers differ",
    "a bit": "is not as it was written",
    "program": "do not read each other's; go on with the one that wrote it",
    "the other program": "holds no 'engine': DeepAdaMix and adamix.distributed.save do not read each other's",
    "optimizer": "optimizer: its state is placed as",
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_on_all_ranks(jobs: dict[int, list[dict[str, Any]]], name: str) -> None:
    for found in results(jobs[2], "refusals"):
        assert REFUSED[name] in found[name]


UNEQUAL = {
    "public and private changed": "public: differs between ranks 0 and 1; let all ranks call fit() with the same",
    "order of private rows": "private: differs between ranks 0 and 1; let all",
    "more private rows": "private: differs between ranks 0 and 1; let all",
    "test rows": "test: differs between ranks 0 and 1; let all",
    "a setting": "steps: differs between ranks 0 and 1, 1 and 2;",
    "trained parts": "tune: differs between ranks 0 and 1, 'full' and 'head';",
    "sharding": "sharding: differs between ranks 0 and 1, 'fsdp' and 'none';",
    "model": "model: differs between ranks 0 and 1; let all",
    "resume": "resume: differs between ranks 0 and 1, True and False;",
}


@pytest.mark.parametrize("kind", ["plain", "fsdp"])
@pytest.mark.parametrize("name", UNEQUAL)
def test_ranks_that_were_given_other_things_are_refused(
    jobs: dict[int, list[dict[str, Any]]], kind: str, name: str
) -> None:
    """A row that is public on one rank and private on another would be in the model without noise. On all ranks."""
    for found in results(jobs[2], f"unequal {kind}"):
        assert found[name].startswith(UNEQUAL[name])


def test_no_rank_waits_for_the_accounting_of_another(jobs: dict[int, list[dict[str, Any]]]) -> None:
    """It takes up to a minute, longer than a rank waits, and what was trained would be lost."""
    assert max(results(jobs[2], "waits")) < 1 / 3


def test_all_ranks_write_where_the_first_does(jobs: dict[int, list[dict[str, Any]]]) -> None:
    """Parts that rank 0 cannot see have no checksum: a checkpoint that lacks some is none."""
    for found in results(jobs[2], "folders"):
        assert "cannot be read again; let all ranks write to one folder" in found["disks"] and not found["sealed"]
        assert found["steps"] == 2
        assert found["of the first"] == ["step-0000001", "step-0000001.json", "step-0000002", "step-0000002.json"]
        assert "step-0000009.json is of step 1" in found["renamed"]


def test_a_model_on_some_of_the_ranks_is_refused(jobs: dict[int, list[dict[str, Any]]]) -> None:
    for found in results(jobs[4], "refusals"):
        assert "model: is sharded over 2 of 4 processes" in found["part of the ranks"]


def test_sharding_needs_a_job() -> None:
    with pytest.raises(InputError, match=r"sharding: 'fsdp' given, but torch\.distributed is not initialised"):
        fit(sharding="fsdp")
    with pytest.raises(InputError, match="sharding: 'ddp' is not valid here; pass one of none, fsdp"):
        fit(sharding="ddp")


def test_ranks_leave_when_one_was_killed(tmp_path: Path) -> None:
    """At once; the step was charged, and no gradient is left in the model."""
    Ledger.create(tmp_path / "rows.ledger", data_set="test").close()
    context: Any = multiprocessing.get_context("forkserver")
    ranks = [context.Process(target=checks.dies, args=(rank, 2, tmp_path, spawned.start)) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(120)
    assert all(process.exitcode for process in ranks)
    left, clean = (tmp_path / "left-0").read_text().split()
    assert float(left) - float((tmp_path / "died").read_text()) < 60 and clean == "True"
    (run,) = read_ledger(tmp_path / "rows.ledger").runs.values()
    assert run.charged == 2 and not run.ended
    assert not (tmp_path / "run" / "step-0000002.json").exists() and (tmp_path / "run" / "step-0000001.json").exists()
