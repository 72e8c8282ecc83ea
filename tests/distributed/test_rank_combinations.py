"""Jobs of other shapes: compiled in every way, read by fewer ranks, of one rank; ranks that are not in the group."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import rank_checks as checks
import spawned
import torch
import torch.distributed as dist
from rank_checks import KINDS

#: kind, strategy, mode of the noise, whether layers are recomputed
WAYS = {
    2: [
        ("ddp", "two_pass", "fast", True),
        ("ddp", "materialize", "secure", False),
        ("fsdp", "two_pass", "fast", True),
        ("fsdp", "materialize", "fast", False),
        ("fsdp", "per_layer", "secure", True),
    ],
    4: [
        ("hybrid", "per_layer", "fast", True),
        ("hybrid", "two_pass", "fast", False),
        ("hybrid", "materialize", "secure", False),
    ],
}
ALONE = [("auto", "fast", False, 1), ("per_layer", "fast", True, 2), ("two_pass", "fast", False, 1)]
ALONE += [("materialize", "secure", False, 1)]
USERS = [(kind, strategy, mode) for kind in KINDS for strategy, mode in (("auto", "fast"), ("per_layer", "secure"))]


def outside() -> dict[str, str] | None:
    """What ranks that are not in a group of the first two are told; these train meanwhile."""
    group = dist.new_group([0, 1])
    if dist.get_rank() < 2:
        torch.manual_seed(0)
        model = checks.Model()
        settings = {"max_grad_norm": 1.0, "noise_multiplier": 1.0, "expected_batch_size": 4.0}
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        engine = checks.DPEngine(model, optimizer, process_group=group, **settings)
        checks.backward(model, engine, [dist.get_rank()])
        engine.optimizer.step()
        assert checks.distributed.on_first(lambda: 3, group) == 3
        return None
    model = checks.Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    settings = {"max_grad_norm": 1.0, "noise_multiplier": 1.0, "expected_batch_size": 4.0}
    return {
        "engine": checks.refusal(lambda: checks.DPEngine(model, optimizer, process_group=group, **settings)),
        "ledger": checks.refusal(lambda: checks.distributed.RankLedger("rows.ledger", group)),
    }


def plan(size: int, folder: Path) -> list[tuple[str, Any, tuple[Any, ...]]]:
    found = [(f"compiled {cell}", checks.compiled_ways, cell) for cell in WAYS.get(size, [])]
    if size == 4:
        found += [(f"saved {kind}", checks.saved, (kind, folder / kind)) for kind in KINDS]
        return found
    if size == 2:
        found += [(f"users {cell}", checks.by_user, cell) for cell in USERS]
    found += [(f"resumed {kind}", checks.resumed, (kind, folder / kind)) for kind in KINDS]
    if size == 1:
        found += [(f"same {cell}", checks.same_weights, ("fsdp", *cell)) for cell in ALONE]
        found += [(f"noise {mode}", checks.noise_of_a_step, ("fsdp", mode)) for mode in ("fast", "secure")]
        found.append(("mixed", checks.mixed, ("fsdp", "per_layer", "fast", 0.7)))
        found.append(("detached", checks.detached, ("fsdp",)))
    return found


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("ranks")
    found = {}
    for size in (4, 2, 1):  # what four ranks save is read by fewer
        found[size] = spawned.run(size, folder, plan(size, folder))
        for rank in found[size]:
            for result in rank.values():
                if isinstance(result, AssertionError):
                    raise result
    return found


@pytest.mark.parametrize("size, cell", [(size, cell) for size in WAYS for cell in WAYS[size]], ids=str)
def test_compiled_models_are_those_of_one_process(
    jobs: dict[int, list[dict[str, Any]]], size: int, cell: tuple[Any, ...]
) -> None:
    for rank in jobs[size]:
        off, frames = rank[f"compiled {cell}"]
        assert off < 1e-6 and frames


@pytest.mark.parametrize("size", [2, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_goes_on_with_fewer_ranks(jobs: dict[int, list[dict[str, Any]]], kind: str, size: int) -> None:
    for rank in jobs[size]:
        off, finished, steps = rank[f"resumed {kind}"]
        assert off < 1e-6 and (finished, steps) == (3, 5)


@pytest.mark.parametrize("cell", USERS, ids=str)
def test_users_on_ranks_of_their_own(jobs: dict[int, list[dict[str, Any]]], cell: tuple[str, str, str]) -> None:
    for rank in jobs[2]:
        assert rank[f"users {cell}"] < 1e-6


@pytest.mark.parametrize("cell", ALONE, ids=str)
def test_one_rank_of_fsdp_is_one_process(jobs: dict[int, list[dict[str, Any]]], cell: tuple[Any, ...]) -> None:
    assert jobs[1][0][f"same {cell}"] < 1e-6


def test_one_rank_draws_the_noise_of_one_process(jobs: dict[int, list[dict[str, Any]]]) -> None:
    for mode in ("fast", "secure"):
        equal, ratio = jobs[1][0][f"noise {mode}"]
        assert equal and abs(ratio - 1) < 0.01
    off, (thresholds, expected) = jobs[1][0]["mixed"]
    assert off < 2e-6 and jobs[1][0]["detached"]
    torch.testing.assert_close(thresholds, expected, rtol=1e-5, atol=0)


def test_a_rank_outside_of_the_group_is_told(tmp_path: Path) -> None:
    for number, rank in enumerate(spawned.run(3, tmp_path, [("outside", outside, ())])):
        if number < 2:
            assert rank["outside"] is None
        else:
            assert f"process_group: rank {number} is not in it; make the DPEngine" in rank["outside"]["engine"]
            assert f"InputError: group: rank {number} is not in it" in rank["outside"]["ledger"]
