"""The engine's subspace of public gradients, against the one that is made of gradients in float64."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from plain_loop import batch, classifier, engine, per_sample, run, step
from torch import Tensor, nn

from adamix_kernels import (
    DPEngine,
    Noise,
    PrivacyError,
    PublicQuantile,
    clip_coef,
    clip_sum,
    grad_norm_sq,
    lift,
    project,
    subspace_basis,
)

STRATEGIES = ["auto", "book_keeping", "materialize", "per_layer"]
LIMIT = 0.7


def public(samples: int = 8, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(7)
    return torch.randn(samples, 5, generator=g, dtype=dtype) * 2, torch.randint(0, 3, (samples,), generator=g)


def loss_of(dp: DPEngine, data: tuple[Tensor, Tensor]) -> Callable[[], Tensor]:
    return lambda: F.cross_entropy(dp.model(data[0]), data[1])


def matrix(model: nn.Module, data: tuple[Tensor, Tensor], names: list[str]) -> Tensor:
    """Per-sample gradients `[N, P]` of some parameters, by torch alone."""
    x, y = data
    rows = per_sample(model, lambda m, b: F.cross_entropy(m(x[b : b + 1]), y[b : b + 1]), len(x))
    return torch.stack([torch.cat([row[n].flatten() for n in names]) for row in rows])


def defined(
    model: nn.Module,
    data: tuple[Tensor, Tensor],
    names: list[str],
    limit: float,
    *,
    fold: Callable[[Tensor], Tensor] = lambda x: x,
    **how: Any,
) -> dict[str, Tensor]:
    """The clipped sum in the subspace, lifted: project, clip and lift with a basis that is made."""
    basis = subspace_basis(matrix(model, public(), names), **how)
    coordinates = fold(project(matrix(model, data, names), basis))
    total = lift(clip_sum(coordinates, clip_coef(grad_norm_sq(coordinates), limit)), basis)
    sizes = [model.get_parameter(n).numel() for n in names]
    return {n: part.view(model.get_parameter(n).shape) for n, part in zip(names, total.split(sizes), strict=True)}


def close(got: dict[str, Tensor], want: dict[str, Tensor], rtol: float = 1e-6) -> None:
    assert got.keys() >= want.keys()
    for name, reference in want.items():
        assert (got[name].double() - reference).norm() <= rtol * max(1.0, float(reference.norm())), name


def layers(model: nn.Module) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name, _ in model.named_parameters():
        found.setdefault(name.rpartition(".")[0], []).append(name)
    return found


# --- against the definition ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [{"rank": 3}, {"energy": 0.9}, {}], ids=["rank", "energy", "all"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_step_is_that_of_a_basis_that_is_made(strategy: str, how: dict[str, Any]) -> None:
    model = classifier()
    groups = layers(model) if strategy == "per_layer" else {"": [n for n, _ in model.named_parameters()]}
    want: dict[str, Tensor] = {}
    for names in groups.values():
        want |= defined(classifier(), batch(), names, LIMIT / math.sqrt(len(groups)), **how)
    dp = engine(model, strategy=strategy)
    subspace = dp.public_subspace(**how)
    assert subspace.refresh(loss_of(dp, public()))
    run(dp, batch())
    close(step(dp), want)
    if "rank" in how:
        assert set(subspace.ranks.values()) == {3}
    assert subspace.ranks.keys() == groups.keys()


def test_micro_batches_add_up() -> None:
    x, y = batch()
    want = defined(classifier(), (x, y), [n for n, _ in classifier().named_parameters()], LIMIT, rank=3)
    dp = engine(classifier())
    subspace = dp.public_subspace(rank=3)
    subspace.refresh(loss_of(dp, public()))
    for part in (slice(0, 3), slice(3, 3), slice(3, 10)):
        run(dp, (x[part], y[part])) if len(x[part]) else None
    close(step(dp), want)


def test_public_rows_may_come_in_parts_and_their_scale_is_that_of_the_loss() -> None:
    """Means over 2 and 6 rows: each row counts the same."""
    x, y = public()
    names = [n for n, _ in classifier().named_parameters()]
    dp = engine(classifier(), loss_scale=4.0)
    subspace = dp.public_subspace(rank=3)
    subspace.refresh(lambda: (4 * F.cross_entropy(dp.model(x[p]), y[p]) for p in (slice(0, 2), slice(2, 8))))
    assert subspace.rows == 8
    x, y = batch()
    (4 * F.cross_entropy(dp.model(x), y)).backward()
    close(step(dp), defined(classifier(), batch(), names, LIMIT, rank=3))


def test_a_users_rows_are_added_before_they_are_clipped() -> None:
    ids = torch.tensor([4, 1, 4, 1, 9, 9, 9, 2, 4, 1])
    member = (ids.unique()[:, None] == ids).double()
    names = [n for n, _ in classifier().named_parameters()]
    want = defined(classifier(), batch(), names, LIMIT, rank=3, fold=lambda x: member @ x)
    dp = engine(classifier(), unit="user")
    dp.public_subspace(rank=3).refresh(loss_of(dp, public()))
    with dp.users(ids):
        run(dp, batch())
    close(step(dp), want)


def test_thresholds_are_a_quantile_of_the_public_rows_own_norms() -> None:
    names = [n for n, _ in classifier().named_parameters()]
    gradients = matrix(classifier(), public(), names)
    norms = project(gradients, subspace_basis(gradients, rank=3)).norm(dim=1)
    limit = float(norms.sort().values[3])  # half of 8 do not exceed it
    dp = engine(classifier(), max_grad_norm=1e-9)
    subspace = dp.public_subspace(rank=3, quantile=0.5)
    subspace.refresh(loss_of(dp, public()))
    assert subspace.thresholds[""] == pytest.approx(limit, rel=1e-6)
    run(dp, batch())
    close(step(dp), defined(classifier(), batch(), names, subspace.thresholds[""], rank=3))


def test_some_parameters_in_the_subspace_and_others_as_they_are() -> None:
    inside, outside = ["0.weight", "0.bias"], ["2.weight", "2.bias", "3.weight", "3.bias"]
    dp = engine(classifier())
    dp.public_subspace(rank=3, parameters=["0.*"]).refresh(loss_of(dp, public()))
    run(dp, batch())
    got = step(dp)
    close(got, defined(classifier(), batch(), inside, LIMIT / math.sqrt(2), rank=3))
    rest = matrix(classifier(), batch(), outside)
    total = clip_sum(rest, clip_coef(grad_norm_sq(rest), LIMIT / math.sqrt(2)))
    torch.testing.assert_close(torch.cat([got[n].flatten() for n in outside]), total, rtol=1e-5, atol=1e-6)


# --- what bounds the release -----------------------------------------------------------------------------------------


def coordinates_of(dp: DPEngine) -> Tensor:
    """What the step would add noise to."""
    assert dp._subspace is not None
    (sums,) = dp._subspace.sums._step.sums.values()
    return sums[""].double()


HOSTILE = [math.nan, math.inf, -math.inf, 1e38, 1e18, 1e-38]


@pytest.mark.parametrize("secure", [False, True], ids=["fast", "secure"])
@pytest.mark.parametrize("value", HOSTILE)
def test_no_row_moves_the_sum_by_more_than_the_threshold(value: float, secure: bool) -> None:
    x, y = (t.clone() for t in batch(dtype=torch.float32))
    hostile = x.clone()
    hostile[4, 1] = value
    sums = []
    for data in ((x, y), (torch.cat([x[:4], x[5:]]), torch.cat([y[:4], y[5:]])), (hostile, y)):
        noise = Noise(mode="secure") if secure else None
        dp = engine(classifier(torch.float32), loss_reduction="sum", noise=noise)
        subspace = dp.public_subspace(rank=4)
        subspace.refresh(
            lambda dp=dp: F.cross_entropy(dp.model(public(dtype=torch.float32)[0]), public()[1], reduction="sum")
        )
        run(dp, data, "sum")
        sums.append(coordinates_of(dp) * (next(iter(subspace.sums._step.grids.values())) if secure else 1))
    bound = LIMIT * (1 + (0 if secure else 1e-5))
    assert (sums[0] - sums[1]).norm() <= bound
    assert (sums[2] - sums[1]).norm() <= bound
    if not math.isfinite(value):
        torch.testing.assert_close(sums[2], sums[1], rtol=1e-6, atol=1e-6)
    assert (sums[0] - sums[1]).norm() > 0.3 * LIMIT  # it is not that nothing is released


def test_coordinates_are_clipped_as_they_are_if_the_basis_is_far_from_orthonormal() -> None:
    """What a wrong decomposition would make of M: coordinates a million times too large."""
    dp = engine(classifier(), loss_reduction="sum")
    subspace = dp.public_subspace(rank=4)
    subspace.refresh(loss_of(dp, public()))
    (basis,) = subspace.bases.values()
    basis.matrix = basis.matrix * 1e6 + torch.randn_like(basis.matrix) * 1e5
    run(dp, (batch()[0][:1], batch()[1][:1]), "sum")
    assert float(coordinates_of(dp).norm()) == pytest.approx(LIMIT, rel=1e-5)
    assert coordinates_of(dp).norm() <= LIMIT * (1 + 1e-6)


def test_repeated_and_degenerate_public_rows_give_fewer_directions() -> None:
    x, y = public(2)
    dp = engine(classifier(torch.float32))
    subspace = dp.public_subspace(rank=6)
    noisy = torch.cat([x, x * (1 + 1e-9), x, x]).float()
    noisy[3] = math.nan
    subspace.refresh(lambda: F.cross_entropy(dp.model(noisy), y.repeat(4)))
    assert subspace.ranks == {"": 2}
    run(dp, batch(dtype=torch.float32))
    assert coordinates_of(dp).norm() <= 10 * LIMIT * (1 + 1e-6)
    assert all(g.isfinite().all() for g in step(dp).values())


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_public_row_that_is_not_finite_is_as_if_it_were_not_there(bad: float, strategy: str) -> None:
    x, y = public(dtype=torch.float32)
    grads = []
    left = torch.arange(8) != 3
    for rows in (x.index_fill(0, torch.tensor(3), bad), y), (x[left], y[left]):
        dp = engine(classifier(torch.float32), strategy=strategy)
        dp.public_subspace(rank=4).refresh(loss_of(dp, rows))
        run(dp, batch(dtype=torch.float32))
        grads.append(step(dp))
    assert all(g.any() for g in grads[0].values())
    close(grads[0], {name: g.double() for name, g in grads[1].items()}, rtol=1e-4)


def test_thresholds_of_public_norms_beyond_float32() -> None:
    dp = engine(nn.Linear(5, 3), noise_multiplier=1.0)
    subspace = dp.public_subspace(rank=2, quantile=1.0)
    x, y = public(dtype=torch.float32)
    subspace.refresh(lambda: F.cross_entropy(dp.model(x * 1e30), y))
    assert 1e29 < subspace.thresholds[""] < 1e32
    run(dp, batch(dtype=torch.float32))
    assert all(g.isfinite().all() for g in step(dp).values())


def test_public_gradients_of_zero_release_zeros() -> None:
    dp = engine(classifier(), noise_multiplier=1.0)
    subspace = dp.public_subspace(rank=4, quantile=0.5)
    subspace.refresh(lambda: dp.model(public()[0]).sum() * 0)
    assert subspace.ranks == {"": 0}
    run(dp, batch())
    assert all(not g.any() for g in step(dp).values())


# --- noise -----------------------------------------------------------------------------------------------------------


def released(dp: DPEngine, repeats: int) -> Tensor:
    """`[repeats, P]`: steps without a sample."""
    rows = []
    for _ in range(repeats):
        rows.append(torch.cat([g.flatten().double() for g in step(dp).values()]))
    return torch.stack(rows)


@pytest.mark.parametrize("secure", [False, True], ids=["fast", "secure"])
@pytest.mark.parametrize("strategy", ["auto", "per_layer"])
def test_noise_is_of_as_many_numbers_as_directions_and_of_the_right_size(strategy: str, secure: bool) -> None:
    noise = Noise(mode="secure") if secure else Noise(seed=3)
    settings = {"strategy": strategy, "noise_multiplier": 1.5, "expected_batch_size": 4.0, "noise": noise}
    dp = engine(classifier(), **settings)
    subspace = dp.public_subspace(rank=3, every=1_000)
    subspace.refresh(loss_of(dp, public()))
    rows = released(dp, 600)
    groups = len(subspace.ranks)
    assert torch.linalg.matrix_rank(rows, rtol=1e-6) == 3 * groups
    # of the whole, in 3 directions per group: 1.5 sqrt(G) (C / sqrt(G)) / 4 each
    size = float(rows.square().sum()) / (600 * 3 * groups)
    deviation = math.sqrt(2 / (600 * 3 * groups))
    assert size / (1.5 * LIMIT / 4) ** 2 == pytest.approx(1, abs=4.5 * deviation)


def test_noise_of_groups_is_by_their_own_thresholds() -> None:
    dp = engine(classifier(), noise_multiplier=2.0, noise=Noise(seed=1))
    subspace = dp.public_subspace(rank=3, every=1_000, quantile=0.5, parameters=["0.*"])
    subspace.refresh(loss_of(dp, public()))
    rows = []
    for _ in range(400):
        grads = step(dp)
        rows.append(
            [float(sum(g.square().sum() for n, g in grads.items() if (n[0] == "0") == i)) for i in (True, False)]
        )
    inside, outside = torch.tensor(rows).mean(0).tolist()
    others = sum(p.numel() for n, p in dp.model.named_parameters() if n[0] != "0")
    assert inside / (3 * 2 * (2.0 * subspace.thresholds[""]) ** 2) == pytest.approx(1, abs=4.5 * math.sqrt(2 / 1200))
    assert outside / (others * 2 * (2.0 * LIMIT) ** 2) == pytest.approx(1, abs=4.5 * math.sqrt(2 / (400 * others)))


def test_the_largest_threshold_of_a_step_sets_its_noise() -> None:
    stds = []
    for limits in ((LIMIT, LIMIT), (100 * LIMIT, LIMIT)):
        dp = engine(classifier(), noise_multiplier=1.0, noise=Noise(seed=5))
        dp.public_subspace(rank=3).refresh(loss_of(dp, public()))
        for limit, part in zip(limits, (slice(0, 5), slice(5, 10)), strict=True):
            dp.max_grad_norm = limit
            run(dp, (batch()[0][part], batch()[1][part]))
        before = coordinates_of(dp).clone()
        (basis,) = dp._subspace.bases.values()
        kept = copy.copy(basis)
        got, without = step(dp), kept.lift(before)
        stds.append(torch.cat([(got[n] - without[n]).flatten() for n in got]).norm())
    assert float(stds[1] / stds[0]) == pytest.approx(100, rel=1e-3)


def test_a_step_without_a_sample_has_the_noise_that_one_with_a_sample_would_have() -> None:
    """The threshold may change between steps."""
    norms = []
    for limit in (LIMIT, 100 * LIMIT):
        dp = engine(classifier(), noise_multiplier=1.0, noise=Noise(seed=5))
        dp.public_subspace(rank=3, every=9).refresh(loss_of(dp, public()))
        run(dp, batch())
        step(dp)
        dp.max_grad_norm = limit
        norms.append(torch.cat([g.flatten() for g in step(dp).values()]).norm())
    assert float(norms[1] / norms[0]) == pytest.approx(100, rel=1e-6)


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.other, self.both = nn.Linear(5, 3), nn.Linear(5, 3), True

    def forward(self, x: Tensor) -> Tensor:
        return self.one(x) + self.other(x) if self.both else self.one(x)


def test_a_layer_that_no_sample_reaches_has_the_noise_of_the_threshold_of_the_pass() -> None:
    norms = []
    for limit in (LIMIT, 100 * LIMIT):
        torch.manual_seed(0)
        dp = engine(Branches().double(), strategy="per_layer", noise_multiplier=1.0, noise=Noise(seed=5))
        dp.public_subspace(rank=3).refresh(loss_of(dp, public()))
        dp.model.both = False
        for own, part in ((limit, slice(0, 5)), (LIMIT, slice(5, 10))):
            dp.max_grad_norm = own
            run(dp, (batch()[0][part], batch()[1][part]))
        norms.append(torch.cat([g.flatten() for n, g in step(dp).items() if n.startswith("other")]).norm())
    assert float(norms[1] / norms[0]) == pytest.approx(100, rel=1e-6)


# --- its use ---------------------------------------------------------------------------------------------------------


def test_it_is_due_every_so_many_steps_and_an_old_one_is_refused() -> None:
    dp = engine(classifier())
    subspace = dp.public_subspace(rank=2, every=2)
    assert subspace.due
    with pytest.raises(PrivacyError, match="there are no public rows yet"):
        run(dp, batch())
    dp.optimizer.zero_grad()
    with pytest.raises(PrivacyError, match="there are no public rows yet"):
        dp.optimizer.step()
    calls = []
    for _ in range(5):
        calls.append(subspace.refresh(loss_of(dp, public())))
        run(dp, batch())
        step(dp)
    assert calls == [True, False, True, False, True]
    run(dp, batch())
    step(dp)
    with pytest.raises(PrivacyError, match="it is of step 4, and is to be computed anew every 2 steps"):
        run(dp, batch())


def test_it_is_not_changed_within_a_step() -> None:
    dp = engine(classifier())
    subspace = dp.public_subspace(rank=2)
    subspace.refresh(loss_of(dp, public()))
    run(dp, batch())
    dp.steps += 1  # due again
    with pytest.raises(PrivacyError, match="waits for its step"):
        subspace.refresh(loss_of(dp, public()))
    with pytest.raises(PrivacyError, match="waits for its step"):
        dp.public_subspace(rank=3)


def test_public_rows_leave_no_gradient_and_count_as_no_sample() -> None:
    dp = engine(classifier(), unit="user")
    dp.public_subspace(rank=2).refresh(loss_of(dp, public()))
    assert all(p.grad is None for p in dp.model.parameters())
    assert not dp._sums.norm_sq
    assert all(not g.any() for g in step(dp).values())


def test_what_is_kept_is_a_copy() -> None:
    """A buffer that the loop uses for public rows, and then for private ones."""
    x, y = public()
    buffer = x.clone()
    dp = engine(classifier())
    subspace = dp.public_subspace(rank=3)
    subspace.refresh(lambda: F.cross_entropy(dp.model(buffer), y))
    buffer.copy_(torch.full_like(buffer, 1e3))
    run(dp, batch())
    close(step(dp), defined(classifier(), batch(), [n for n, _ in classifier().named_parameters()], LIMIT, rank=3))


def test_a_failed_refresh_leaves_none() -> None:
    dp = engine(classifier())
    subspace = dp.public_subspace(rank=3)
    subspace.refresh(loss_of(dp, public()))
    dp.steps += 1
    with pytest.raises(ZeroDivisionError):
        subspace.refresh(lambda: 1 / 0)
    with pytest.raises(PrivacyError, match="there are no public rows yet"):
        run(dp, batch())
    dp.optimizer.zero_grad()
    with dp.public(), pytest.raises(PrivacyError, match="no gradient of a parameter in the subspace came"):
        subspace.refresh(loss_of(dp, public()))


def test_the_engine_without_it_is_as_before() -> None:
    dp = engine(classifier())
    dp.public_subspace(rank=3).refresh(loss_of(dp, public()))
    dp.detach()
    assert dp._subspace is None
    assert all(type(p) is nn.Parameter for p in dp.model.parameters())


def test_memory_is_told_and_bounded() -> None:
    dp = engine(classifier())
    subspace = dp.public_subspace(rank=3)
    assert str(subspace) == "PublicSubspace(no public rows yet, at most 1024.00 MiB)"
    subspace.refresh(loss_of(dp, public()))
    # activations and backprops of 5 -> 7, of the norm, of 7 -> 3; and M
    assert subspace.memory == 8 * (8 * (5 + 7 + 7 + 7 + 7 + 3) + 3 * 8)
    assert "rank 3, 8 public rows, " in str(subspace)
    small = dp.public_subspace(rank=3, max_bytes=1000)
    with pytest.raises(ValueError, match=r"max_bytes: factors of 8 public rows take .* pass about 3 rows"):
        small.refresh(loss_of(dp, public()))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "rank is 0; pass a number of directions"),
        ({"energy": 1.5}, "energy is 1.5; pass the fraction"),
        ({"every": 0}, "every: is 0; pass an int >= 1"),
        ({"max_bytes": 0.5}, "max_bytes: is 0.5; pass an int >= 1"),
        ({"quantile": 0}, "quantile: is 0; pass a number in"),
        ({"parameters": "0.*"}, "parameters: is the str '0.*'; pass a list"),
        ({"parameters": ["nothing"]}, "parameters: 'nothing' matches no parameter"),
    ],
)
def test_bad_settings_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message.replace("*", r"\*").replace(".", r"\.")):
        engine(classifier()).public_subspace(**settings)


def test_several_ranks_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    dp = engine(classifier())
    monkeypatch.setattr(dp, "ranks", object())
    with pytest.raises(PrivacyError, match="coordinates are not added up over ranks"):
        dp.public_subspace(rank=2)


def test_two_passes_and_parameters_apart_are_refused() -> None:
    with pytest.raises(ValueError, match="strategy: is 'two_pass'"):
        engine(classifier(), strategy="two_pass").public_subspace(rank=2)
    dp = engine(classifier())
    with pytest.raises(PrivacyError, match=r"only some of .*'3.weight', '3.bias'.* are in the subspace"):
        dp.public_subspace(rank=2, parameters=["*.weight"]).refresh(loss_of(dp, public()))


def test_mixed_batches_and_their_thresholds_are_refused() -> None:
    with pytest.raises(ValueError, match="max_grad_norm: is a PublicQuantile; set it to a number"):
        engine(classifier(), max_grad_norm=PublicQuantile(0.5)).public_subspace(rank=2)
    dp = engine(classifier())
    subspace = dp.public_subspace(rank=2)
    with dp.mixed(slice(0, 2)), pytest.raises(PrivacyError, match="PublicQuantile do not go with public_subspace"):
        subspace.refresh(loss_of(dp, public()))
    subspace.refresh(loss_of(dp, public()))
    with dp.mixed(slice(0, 2)), pytest.raises(PrivacyError, match="PublicQuantile do not go with public_subspace"):
        run(dp, batch())
    dp.optimizer.zero_grad()
    dp.max_grad_norm = PublicQuantile(0.5, start=1.0)
    with pytest.raises(PrivacyError, match="PublicQuantile do not go with public_subspace"):
        run(dp, batch())


def test_thresholds_do_not_change_within_a_secure_step() -> None:
    dp = engine(classifier(), noise=Noise(mode="secure"))
    dp.public_subspace(rank=2).refresh(loss_of(dp, public()))
    run(dp, batch())
    dp.max_grad_norm = 3 * LIMIT
    with pytest.raises(PrivacyError, match="was changed between the backward passes of one step"):
        run(dp, batch())
