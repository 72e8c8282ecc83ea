"""Privacy by user in the engine: the rows of a user are one contribution."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from plain_loop import assert_same, batch, classifier, clipped, engine, per_sample, run, step
from torch import Tensor, nn

from adamix.rows import UserRows, check_private_rows
from adamix.users import count_users
from adamix_kernels import DPEngine, Noise, PrivacyError

STRATEGIES = ["auto", "book_keeping", "per_layer", "materialize"]
IDS = [7, 3, 7, 7, -2, 3, 10**12, -2, 7, 5]


def by_user(model: nn.Module, **settings: Any) -> DPEngine:
    return engine(model, unit="user", **settings)


def expected(data: tuple[Tensor, Tensor], ids: list[int], strategy: str = "", limit: float = 0.7) -> dict[str, Tensor]:
    """A user after the other, with torch alone: the gradient of the sum of their losses, clipped."""
    x, y = data
    users = sorted(set(ids))

    def loss(model: nn.Module, u: int) -> Tensor:
        own = torch.tensor([i == users[u] for i in ids])
        return F.cross_entropy(model(x[own]), y[own], reduction="sum")

    rows = per_sample(classifier(), loss, len(users))
    layers = {name.rpartition(".")[0] for name, _ in classifier().named_parameters()}
    even = dict.fromkeys(layers, limit / len(layers) ** 0.5) if strategy == "per_layer" else None
    return clipped(rows, limit, even)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("mode", ["fast", "secure"])
def test_a_step_is_the_sum_of_clipped_user_sums(strategy: str, reduction: str, mode: str) -> None:
    dp = by_user(classifier(), strategy=strategy, loss_reduction=reduction, noise=Noise(mode=mode))
    with dp.users(torch.tensor(IDS)):
        run(dp, batch(), reduction)
    assert_same(step(dp), expected(batch(), IDS, strategy), rtol=1e-5 if mode == "secure" else 1e-6)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_users_may_be_spread_over_micro_batches(strategy: str) -> None:
    x, y = batch()
    dp = by_user(classifier(), strategy=strategy)
    order = sorted(range(10), key=IDS.__getitem__)
    for rows in (order[:4], order[4:5], order[5:]):
        ids = [IDS[b] for b in rows]
        loss = F.cross_entropy(dp.model(x[rows]), y[rows])
        with dp.users(ids):
            loss.backward()
    assert_same(step(dp), expected((x, y), IDS, strategy))


@pytest.mark.parametrize("mode", ["fast", "secure"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_user_of_many_rows_adds_at_most_the_threshold(strategy: str, mode: str) -> None:
    for factor in (1e-3, 1.0, 1e5):
        x, y = batch(50, torch.float32)
        dp = by_user(classifier(torch.float32), strategy=strategy, noise=Noise(mode=mode), loss_reduction="sum")
        with dp.users([4] * 50):
            run(dp, (x * factor, y), "sum")
        norm_sq = sum(Fraction(v) ** 2 for g in step(dp).values() for v in g.flatten().tolist())
        assert norm_sq <= (Fraction(0.7) * (1 if mode == "secure" else 1 + Fraction(1, 10**6))) ** 2


def test_one_row_each_is_privacy_by_sample() -> None:
    results = []
    for unit in ("sample", "user"):
        dp = engine(classifier(), unit=unit)
        if unit == "user":
            with dp.users(range(10)):
                run(dp, batch())
        else:
            run(dp, batch())
        results.append(step(dp))
    assert_same(results[1], results[0])


def test_a_row_that_is_not_finite_takes_its_user_out() -> None:
    x, y = batch()
    x[2, 1] = torch.nan  # user 7
    dp = by_user(classifier(), loss_reduction="sum")
    with dp.users(IDS):
        run(dp, (x, y), "sum")
    kept = [b for b, user in enumerate(IDS) if user != 7]
    assert_same(step(dp), expected((x[kept], y[kept]), [IDS[b] for b in kept]))


def test_an_empty_batch_is_noise_alone() -> None:
    x, y = batch()
    dp = by_user(classifier(), noise_multiplier=1.0)
    with dp.users([]):
        run(dp, (x[:0], y[:0]))
    assert all(g.isfinite().all() and g.any() for g in step(dp).values())


def test_metrics_count_users() -> None:
    dp = by_user(classifier())
    with dp.users(IDS):
        run(dp, batch())
    step(dp)
    assert dp.metrics().samples.reveal() == len(set(IDS))
    assert bool((dp.metrics().norms.reveal() > 1e-3).all())


@pytest.mark.parametrize(
    "ids",
    [
        [7, 7 + 2**32, 7 - 2**32, -7, 7],
        [2**63 - 1, -(2**63), 0, -1, 2**63 - 1],
        np.array([2**63, 2**64 - 1, 0, 1, 2**63], np.uint64),
    ],
)
def test_ids_are_compared_whole(ids: Any) -> None:
    """Two users taken for one would be clipped as one, and each could move the sum by twice the threshold."""
    dp = by_user(classifier())
    x, y = batch(5)
    with dp.users(ids):
        run(dp, (x, y))
    assert_same(step(dp), expected((x, y), [int(i) for i in ids]))
    assert dp.metrics().samples.reveal() == 4
    rows = check_private_rows((x.float(), y, ids), 3)
    assert isinstance(rows, UserRows) and count_users(rows) == 4


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_user_in_two_backward_passes_of_a_step_is_refused(strategy: str) -> None:
    x, y = batch()
    dp = by_user(classifier(), strategy=strategy)
    with dp.users(IDS[:5]):
        run(dp, (x[:5], y[:5]))
    with dp.users(IDS[5:]), pytest.raises(PrivacyError, match="users: 3 users of this backward pass were in one"):
        run(dp, (x[5:], y[5:]))
    assert_same(step(dp), expected((x[:5], y[:5]), IDS[:5], strategy), rtol=1e-6)
    with dp.users(IDS[5:]):
        run(dp, (x[5:], y[5:]))
    assert_same(step(dp), expected((x[5:], y[5:]), IDS[5:], strategy))


def test_zero_grad_forgets_who_was_seen() -> None:
    dp = by_user(classifier())
    for _ in range(2):
        with dp.users(IDS):
            run(dp, batch())
        dp.optimizer.zero_grad()


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_rows_without_users_are_refused(strategy: str) -> None:
    dp = by_user(classifier(), strategy=strategy)
    with pytest.raises(PrivacyError, match="unit is 'user', and nothing tells whose rows"):
        run(dp, batch())
    assert not dp._sums.totals
    with dp.users(IDS[:9]), pytest.raises(PrivacyError, match="users: 9 ids for a batch of 10 rows"):
        run(dp, batch())
    assert not dp._sums.totals
    with dp.users(IDS):
        run(dp, batch())
    step(dp)
    with pytest.raises(PrivacyError, match="nothing tells whose rows"):
        run(dp, batch())  # the ids of the block that has ended are not those of these rows
    assert dp.validate(batch()[0]).samples == 10, "which reports on samples"


def test_wrong_ids_and_settings_are_refused() -> None:
    dp = by_user(classifier())
    for ids, error, message in (
        (torch.ones(10), TypeError, "ids: has dtype torch.float32; pass integers"),
        (["a", "b"], TypeError, "ids: is list; pass integers"),
        (None, TypeError, "ids: is NoneType; pass integers"),
        (torch.ones(10, 1, dtype=torch.int64), ValueError, r"ids: has shape \[10, 1\]; pass integers"),
    ):
        with pytest.raises(error, match=message):
            dp.users(ids).__enter__()
    with pytest.raises(PrivacyError, match=r"users\(\): the engine protects samples; pass unit='user'"):
        engine(classifier()).users(IDS)
    with pytest.raises(ValueError, match="unit: is 'group'; pass one of 'sample', 'user'"):
        engine(classifier(), unit="group")
    with pytest.raises(ValueError, match=r"strategy: is 'two_pass' with 'user' as unit.*pass 'auto'"):
        by_user(classifier(), strategy="two_pass")


def test_ids_that_are_changed_later_do_not_matter() -> None:
    ids = torch.tensor(IDS)
    dp = by_user(classifier())
    with dp.users(ids):
        ids.zero_()
        run(dp, batch())
    assert_same(step(dp), expected(batch(), IDS))
