"""Ranks of a job train as one process does, with the same noise, or say why they cannot."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import rank_checks as checks
import spawned
import torch
from rank_checks import KINDS
from torch.distributed.tensor import Shard

from adamix_kernels import PrivacyError
from adamix_kernels.nn.sharded import Shards

STRATEGIES = ("auto", "book_keeping", "materialize", "per_layer", "two_pass")
CELLS = [
    (kind, strategy, "fast", recompute, 1) for kind in KINDS for strategy in STRATEGIES for recompute in (False, True)
]
CELLS += [(kind, strategy, "secure", False, 1) for kind in KINDS for strategy in ("auto", "per_layer")]
CELLS += [(kind, strategy, "fast", False, 2) for kind in KINDS for strategy in ("auto", "per_layer", "two_pass")]
MIXED = [(kind, strategy, "fast", 0.7) for kind in KINDS for strategy in ("auto", "per_layer", "two_pass")]
MIXED += [(kind, "auto", mode, q) for kind in KINDS for mode, q in (("fast", None), ("secure", 0.7))]
MIXED_HYBRID = [("hybrid", strategy, "fast", 0.7) for strategy in ("auto", "per_layer")]
MIXED_HYBRID += [("hybrid", "auto", "secure", 0.7)]
HYBRID = [(strategy, "fast", False, 1) for strategy in STRATEGIES]
HYBRID += [(strategy, "secure", False, 1) for strategy in ("auto", "per_layer")]
HYBRID += [("auto", "fast", True, 1), ("two_pass", "fast", True, 1), ("per_layer", "fast", False, 2)]
LOW = [(kind, strategy) for kind in ("ddp", "fsdp") for strategy in ("auto", "per_layer")]
COMPILED = [(kind, strategy, "fast") for kind in KINDS for strategy in ("auto", "per_layer")]
COMPILED += [(kind, "auto", "secure") for kind in KINDS]
EVALUATED: list[tuple[Any, ...]] = [(), (True,), (False,)]  # reshard_after_forward

COMPILED_DDP = [(strategy, inside) for strategy in ("auto", "per_layer") for inside in (False, True)]


def plan(size: int, folder: Path) -> list[tuple[str, Any, tuple[Any, ...]]]:
    """All checks of one job, so that processes start once."""
    few = [cell for cell in CELLS if cell[1] in ("auto", "per_layer") and not cell[3] and cell[4] == 1]
    cells = CELLS if size == 2 else few
    found = [(f"same {cell}", checks.same_weights, cell) for cell in cells]
    for kind in KINDS:
        found += [(f"noise {kind} {mode}", checks.noise_of_a_step, (kind, mode)) for mode in ("fast", "secure")]
        found += [
            (f"{name} {kind}", getattr(checks, name), (kind,))
            for name in ("a_large_bucket_is_many", "public_rows", "detached")
        ]
        if size == 2:
            found.append((f"saved {kind}", checks.saved, (kind, folder / kind)))
        found.append((f"resumed {kind}", checks.resumed, (kind, folder / kind)))
    found += [(f"mixed {cell}", checks.mixed, cell) for cell in MIXED]
    found += [(f"micro {kind}", checks.micro_batches_on_one_rank, (kind,)) for kind in ("plain", "ddp")]
    found += [(f"inside or around {cell}", checks.compiled_ddp, cell) for cell in COMPILED_DDP]
    found += [("one ledger", checks.one_ledger, (folder,)), ("damaged", checks.damaged, (folder / f"damaged-{size}",))]
    names = (
        "doubt_on_one_rank gathered stateless refusals thresholds_differ key_is_shared frozen_and_thawed shared_table"
    )
    found += [(name, getattr(checks, name), ()) for name in names.split()]
    found += [(f"low precision {cell}", checks.low_precision, cell) for cell in LOW]
    found += [(f"evaluated {reshard}", checks.evaluated, reshard) for reshard in EVALUATED]
    found += [("models", checks.refused_models, ()), ("passes", checks.refused_passes, ())]
    found += [
        ("kept unsharded", keep_unsharded, ("auto",)),
        ("kept unsharded by layer", keep_unsharded, ("per_layer",)),
    ]
    if size == 2:
        found += [(f"compiled {cell}", checks.compiled, cell) for cell in COMPILED]
    if size == 4:
        found += [(f"hybrid {cell}", checks.hybrid, cell) for cell in HYBRID]
        found += [(f"mixed {cell}", checks.mixed, cell) for cell in MIXED_HYBRID]
    return found


def keep_unsharded(strategy: str) -> float:
    return checks.sharded(strategy, reshard_after_forward=False)


#: The checks that a test looks at, by the beginning of their names.
LOOKS_AT = {
    "test_weights_are_those_of_one_process": "same",
    "test_public_rows_are_those_of_all_ranks": "mixed",
    "test_a_compiled_model_has_the_same_weights": "inside or around",
    "test_noise_is_drawn_once": "noise",
    "test_buckets_change_nothing": "a_large_bucket_is_many",
    "test_ranks_may_have_other_numbers_of_passes": "micro",
    "test_public_gradients_are_averaged": "public_rows",
    "test_ranks_join_one_that_runs_its_layers_again": "doubt_on_one_rank",
    "test_sums_of_low_precision_are_float32": "low precision",
    "test_sharded_models_of_other_kinds": "kept unsharded, frozen_and_thawed, shared_table",
    "test_replicas_of_shards": "hybrid",
    "test_public_rows_of_replicas_of_shards": "mixed ('hybrid'",
    "test_detach_leaves_no_trace": "detached",
    "test_a_checkpoint_goes_on_with_other_ranks": "saved, resumed",
    "test_one_ledger_stops_all_ranks": "one ledger",
    "test_a_damaged_checkpoint_is_refused": "damaged",
    "test_values_of_all_ranks_are_gathered": "gathered",
    "test_a_step_that_makes_the_state_of_an_optimizer_is_none": "stateless",
    "test_all_ranks_have_one_key": "key_is_shared",
    "test_noise_follows_the_largest_threshold": "thresholds_differ",
    "test_compiled_models_are_those_of_one_process": "compiled",
    "test_an_evaluation_changes_nothing": "evaluated",
    "test_refused_on_all_ranks": "refusals",
    "test_refused_models": "models",
    "test_refused_where_ranks_do_not_do_the_same": "passes",
}


@pytest.fixture(scope="module")
def jobs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Any]]]:
    """Results by size, rank and check, of the checks that the chosen tests look at."""
    folder = tmp_path_factory.mktemp("ranks")
    chosen = {getattr(item, "originalname", "") for item in request.session.items}
    wanted = tuple(name for test in chosen if test in LOOKS_AT for name in LOOKS_AT[test].split(", "))
    plans = {size: [check for check in plan(size, folder) if check[0].startswith(wanted)] for size in (2, 4)}
    return {size: spawned.run(size, folder, checks) for size, checks in plans.items()}


@pytest.fixture(params=[2, 4], ids=["2 ranks", "4 ranks"])
def job(request: pytest.FixtureRequest, jobs: dict[int, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    return jobs[request.param]


def results(job: list[dict[str, Any]], name: str) -> list[Any]:
    """Of each rank."""
    for rank in job:
        for found in rank.values():
            if isinstance(found, AssertionError):
                raise found
    return [rank[name] for rank in job]


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_weights_are_those_of_one_process(job: list[dict[str, Any]], cell: tuple[Any, ...]) -> None:
    """After five steps with noise, of which one leaves ranks without a sample."""
    if f"same {cell}" not in plan_names(job):
        pytest.skip("on two ranks only")
    assert max(results(job, f"same {cell}")) < 1e-6


def plan_names(job: list[dict[str, Any]]) -> set[str]:
    return {name for name, *_ in plan(len(job), Path())}


@pytest.mark.parametrize("cell", MIXED, ids=str)
def test_public_rows_are_those_of_all_ranks(job: list[dict[str, Any]], cell: tuple[Any, ...]) -> None:
    """Their sums are added, and their norms together set thresholds, the same on all ranks."""
    for off, (thresholds, expected) in results(job, f"mixed {cell}"):
        assert off < 2e-6
        torch.testing.assert_close(thresholds, expected, rtol=1e-5, atol=0)
        torch.testing.assert_close(thresholds, results(job, f"mixed {cell}")[0][1][0], rtol=0, atol=0)


@pytest.mark.parametrize("cell", COMPILED_DDP, ids=str)
def test_a_compiled_model_has_the_same_weights(job: list[dict[str, Any]], cell: tuple[Any, ...]) -> None:
    assert max(results(job, f"inside or around {cell}")) < 1e-6


@pytest.mark.parametrize("mode", ["fast", "secure"])
@pytest.mark.parametrize("kind", KINDS)
def test_noise_is_drawn_once(job: list[dict[str, Any]], kind: str, mode: str) -> None:
    for equal, ratio in results(job, f"noise {kind} {mode}"):
        assert equal and abs(ratio - 1) < 0.01


@pytest.mark.parametrize("kind", KINDS)
def test_buckets_change_nothing(job: list[dict[str, Any]], kind: str) -> None:
    assert all(results(job, f"a_large_bucket_is_many {kind}"))


@pytest.mark.parametrize("kind", ["plain", "ddp"])
def test_ranks_may_have_other_numbers_of_passes(job: list[dict[str, Any]], kind: str) -> None:
    assert max(results(job, f"micro {kind}")) < 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_public_gradients_are_averaged(job: list[dict[str, Any]], kind: str) -> None:
    assert max(results(job, f"public_rows {kind}")) < 1e-6


def test_ranks_join_one_that_runs_its_layers_again(job: list[dict[str, Any]]) -> None:
    assert max(results(job, "doubt_on_one_rank")) < 1e-6


@pytest.mark.parametrize("cell", LOW, ids=str)
def test_sums_of_low_precision_are_float32(job: list[dict[str, Any]], cell: tuple[str, str]) -> None:
    """Of a sharded model against one in float32, else against the same on one process."""
    for kinds, off in results(job, f"low precision {cell}"):
        assert kinds == {"torch.float32"}
        assert 0 < off < 0.03 if cell[0] == "fsdp" else off < 0.005


@pytest.mark.parametrize("cell", COMPILED, ids=str)
def test_compiled_models_are_those_of_one_process(
    jobs: dict[int, list[dict[str, Any]]], cell: tuple[str, str, str]
) -> None:
    for off, frames in results(jobs[2], f"compiled {cell}"):
        assert off < 1e-6 and frames


@pytest.mark.parametrize("reshard", EVALUATED, ids=str)
def test_an_evaluation_changes_nothing(job: list[dict[str, Any]], reshard: tuple[Any, ...]) -> None:
    assert max(results(job, f"evaluated {reshard}")) < 1e-6


@pytest.mark.parametrize("name", ["kept unsharded", "kept unsharded by layer", "frozen_and_thawed", "shared_table"])
def test_sharded_models_of_other_kinds(job: list[dict[str, Any]], name: str) -> None:
    assert max(results(job, name)) < 1e-6


@pytest.mark.parametrize("cell", HYBRID, ids=str)
def test_replicas_of_shards(jobs: dict[int, list[dict[str, Any]]], cell: tuple[Any, ...]) -> None:
    for off, equal in results(jobs[4], f"hybrid {cell}"):
        assert off < 1e-6 and equal


@pytest.mark.parametrize("cell", MIXED_HYBRID, ids=str)
def test_public_rows_of_replicas_of_shards(jobs: dict[int, list[dict[str, Any]]], cell: tuple[Any, ...]) -> None:
    test_public_rows_are_those_of_all_ranks(jobs[4], cell)


@pytest.mark.parametrize("kind", KINDS)
def test_detach_leaves_no_trace(job: list[dict[str, Any]], kind: str) -> None:
    assert all(results(job, f"detached {kind}"))


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_goes_on_with_other_ranks(job: list[dict[str, Any]], kind: str) -> None:
    """Written by two ranks, read by two and by four."""
    for off, finished, steps in results(job, f"resumed {kind}"):
        assert off < 1e-6 and (finished, steps) == (3, 5)


def test_one_ledger_stops_all_ranks(job: list[dict[str, Any]]) -> None:
    found = results(job, "one ledger")
    assert found == [found[0]] * len(job)
    charged, exhausted, (count, _), missing = found[0]
    assert (charged, count) == (1, 3) and "has been charged all 1 steps" in exhausted and "InputError" in missing


def test_a_damaged_checkpoint_is_refused(job: list[dict[str, Any]]) -> None:
    assert all("is not as it was written" in message for message in results(job, "damaged"))


def test_values_of_all_ranks_are_gathered(job: list[dict[str, Any]]) -> None:
    expected = [float(i) for rank in range(len(job)) for i in range(2 * rank)]
    assert results(job, "gathered") == [expected] * len(job)


def test_a_step_that_makes_the_state_of_an_optimizer_is_none(job: list[dict[str, Any]]) -> None:
    assert all(results(job, "stateless"))


def test_all_ranks_have_one_key(job: list[dict[str, Any]]) -> None:
    keys = results(job, "key_is_shared")
    assert keys == [keys[0]] * len(job) and len(keys[0]) == 8


def test_noise_follows_the_largest_threshold(job: list[dict[str, Any]]) -> None:
    for ratio in results(job, "thresholds_differ"):
        assert abs(ratio / len(job) - 1) < 0.01


REFUSED = {
    "no group": "PrivacyError: process_group: torch.distributed runs",
    "no group at all": "TypeError: process_group: is int",
    "signal": "ValueError: measure_signal",
    "noise_multiplier": "PrivacyError: noise_multiplier: is 1.0 on rank 0 and 2.0 on rank 1",
    "max_grad_norm": "PrivacyError: max_grad_norm: is 1.0 on rank 0 and 2.0 on rank 1",
    "expected_batch_size": "PrivacyError: expected_batch_size: is 8.0 on rank 0 and 9.0 on rank 1",
    "strategy": "PrivacyError: strategy: is 'auto' on rank 0 and 'per_layer' on rank 1",
    "weights": "PrivacyError: model: its weights differ",
    "draws": "PrivacyError: noise: draws: differs",
    "trained": "PrivacyError: parameters that are trained",
    "users": "PrivacyError: users: 1 users have rows on several ranks",
    "grids": "PrivacyError: max_grad_norm: differs between ranks",
    "rows": "PrivacyError: backward(): ",
    "root": "PrivacyError: model: some parameters are DTensors, but the model itself is not sharded",
    "dimension": "is sharded along dimension",
    "tensor parallel": "Tensor parallelism is not supported",
    "group of shards": "ValueError: process_group: a sharded model has that of its device mesh",
    "validate": "PrivacyError: validate(): a sharded model",
    "compiled inside ddp": "PrivacyError: model: is the result of torch.compile()",
    "group of ddp": "ValueError: process_group: is not that of",
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_on_all_ranks(job: list[dict[str, Any]], name: str) -> None:
    for found in results(job, "refusals"):
        if name == "users" and len(job) > 2:
            assert "users have rows on several ranks" in found[name]
        else:
            assert REFUSED[name] in found[name]


REFUSED_MODELS = {
    "first fsdp": "is FSDP's first version",
    "mixed precision": "DistributedDataParallel with mixed_precision is not supported",
    "compiled": "model: is the result of torch.compile()",
    "scalar": "fully_shard doesn't support scalar parameters",  # torch itself
    "ignored": "parameter 'bias' is not sharded",
    "part of the ranks": "has two dimensions but not all ranks",
    "meshes": "its parameters are on several device meshes",
}


@pytest.mark.parametrize("name", REFUSED_MODELS)
def test_refused_models(job: list[dict[str, Any]], name: str) -> None:
    assert all(REFUSED_MODELS[name] in found[name] for found in results(job, "models"))


REFUSED_PASSES = {
    "a pass": "rank 0 is in a gathering of public rows, rank 1 in optimizer.step()",
    "a quantile": "rank 0 is in a gathering of public rows, rank 1 in optimizer.step()",
    "a quantile of shards": "rank 0 is in a gathering of public rows, rank 1 in a backward pass",
    "public rows of shards": "backward(): ranks have other parameters that are trained",
    "a pass of shards": "rank 0 is in a backward pass, rank 1 in optimizer.step()",
    "trained shards": "backward(): ranks have other parameters that are trained",
    "the divisor of shards": "backward(): ranks have other parameters that are trained",
    "some ranks": "is cut otherwise after a forward pass; pass reshard_after_forward=True or False",
    "layers": "PublicQuantile with 'per_layer' and secure noise is not supported over several ranks",
}


@pytest.mark.parametrize("name", REFUSED_PASSES)
def test_refused_where_ranks_do_not_do_the_same(job: list[dict[str, Any]], name: str) -> None:
    """On all of them, before a number of one is taken for another of the next."""
    if name == "some ranks" and len(job) == 2:
        pytest.skip("two ranks are all of them")
    assert all(REFUSED_PASSES[name] in found[name] for found in results(job, "passes"))


@pytest.mark.parametrize(
    ("device", "shape", "message"),
    [("cuda", (3,), "leave CPUOffloadPolicy out"), ("cpu", (), r"give it the shape \[1\]")],
)
def test_shards_that_are_elsewhere_or_nowhere(device: str, shape: tuple[int, ...], message: str) -> None:
    """On a GPU alone parameters can be offloaded."""
    part = torch.zeros(shape)
    p = SimpleNamespace(
        placements=(Shard(0),), device_mesh=SimpleNamespace(device_type=device), to_local=lambda: part, dim=part.dim
    )
    with pytest.raises(PrivacyError, match=message):
        Shards._check_placement("weight", p)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a GPU for each rank")
def test_the_same_with_nccl(tmp_path: Path) -> None:
    size = 4 if torch.cuda.device_count() >= 4 else 2
    for rank in spawned.run(size, tmp_path, [entry for entry in plan(2, tmp_path) if entry[0] != "refusals"], "nccl"):
        for name, found in rank.items():
            if isinstance(found, AssertionError):
                raise found
            if name.startswith("same"):
                assert found < 1e-6
            elif name.startswith("noise"):
                assert abs(found[1] - 1) < 0.01
