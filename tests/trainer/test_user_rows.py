"""Privacy by user: the rows of a user are one contribution."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from adamix.errors import InputError
from adamix.mechanism import Mechanism, clipped_sums, integer_sums
from adamix.models import Trainable, trainable
from adamix.rows import Rows, UserRows, check_private_rows
from adamix.users import sorted_by_user, summed_by_user
from adamix_kernels import Noise, grid_for, subspace_basis

MODES = ["fast", "secure"]


def rows(count: int, users: int, seed: int = 0) -> UserRows:
    g = torch.Generator().manual_seed(seed)
    owner = torch.randint(0, users, (count,), generator=g) * 7 - 20
    return UserRows(torch.randn(count, 6, generator=g) * 3, torch.randint(0, 3, (count,), generator=g), owner)


def head() -> Trainable:
    torch.manual_seed(0)
    return trainable(nn.Linear(6, 3))


def network() -> Trainable:
    torch.manual_seed(0)
    return trainable(nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)))


def by_hand(model: Trainable, data: UserRows, thresholds: Tensor, basis: Tensor | None) -> list[Tensor]:
    """A user after the other: gradients of their rows added, clipped, summed."""
    parts = model.layers if len(thresholds) > 1 else [slice(None)]
    total = [torch.zeros(()).double() for _ in parts]
    for user in data.users.unique():
        own = data.users == user
        grads = torch.cat(list(model.grad_sample(Rows(data.x[own], data.y[own])))).double().sum(0)
        if basis is not None:
            grads = basis.double() @ grads
        for i, (part, tau) in enumerate(zip(parts, thresholds.tolist(), strict=True)):
            total[i] = total[i] + grads[part] * min(1.0, tau / float(grads[part].norm()))
    return total


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("way", ["head", "network", "per layer", "subspace"])
def test_a_release_is_the_sum_of_clipped_user_sums(way: str, mode: str) -> None:
    model = head() if way in ("head", "subspace") else network()
    thresholds = torch.tensor([0.9, 0.4] if way == "per layer" else [1.1])
    basis = subspace_basis(torch.cat(list(model.grad_sample(Rows(*rows(9, 3)[:2])))), rank=4)
    basis = basis if way == "subspace" else None
    data = rows(50, 12)
    noise = Noise(mode="secure") if mode == "secure" else Noise(seed=0)
    released = Mechanism(0.0, noise).release(model, data, thresholds, basis)
    want = torch.cat(by_hand(model, data, thresholds, basis))
    want = want if basis is None else want @ basis.double()
    torch.testing.assert_close(released.double(), want, rtol=1e-4, atol=2e-5)
    apart = Mechanism(0.0, noise).release(model, Rows(data.x, data.y), thresholds, basis)
    assert float((released - apart).norm()) > 0.1, "clipping rows is another thing"


def test_a_user_adds_at_most_the_threshold() -> None:
    limit, grid = 0.7, grid_for(0.7, 0.7)
    for scale in (1e-20, 1e-2, 1.0, 1e6):
        data = rows(200, 1)
        data = UserRows(data.x * scale, data.y, data.users)
        (whole,) = integer_sums(network(), data, [limit], [grid], None)
        assert sum(q * q for q in whole.tolist()) * Fraction(grid) ** 2 <= Fraction(limit) ** 2
        (sums,) = clipped_sums(network(), data, torch.tensor([limit]), None)
        assert float(sums.norm()) <= limit * (1 + 1e-6)


def test_a_user_may_lie_in_several_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    model, data, thresholds = network(), rows(60, 5), torch.tensor([1.0])
    (whole,) = clipped_sums(model, data, thresholds, None)
    for elements in (1, model.size * 3, model.size * 7, model.size * 59):
        monkeypatch.setattr("adamix.models._CHUNK_ELEMENTS", elements)
        torch.testing.assert_close(clipped_sums(model, data, thresholds, None)[0], whole, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("sizes", [[1] * 12, [12], [5, 7], [3, 1, 4, 0, 4], [2] * 6])
def test_sums_of_chunks(sizes: list[int]) -> None:
    users = torch.tensor([1, 1, 1, 2, 5, 5, 5, 5, 5, 5, 8, 9])
    grads = torch.arange(24.0).view(12, 2)
    sums = torch.cat(list(summed_by_user(grads.split(sizes), users)))
    want = torch.stack([grads[users == user].sum(0) for user in users.unique()])
    assert torch.equal(sums, want)
    assert list(summed_by_user([], users[:0])) == []
    assert list(summed_by_user([grads[:0]], users[:0])) == []


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_last_bits_of_a_sum_do_not_tell_where_chunks_end(size: int) -> None:
    grads = torch.randn(40, 300, generator=torch.Generator().manual_seed(2))
    users = torch.arange(40) // 9
    chunked, whole = (torch.cat(list(summed_by_user(grads.split(n), users))) for n in (size, 40))
    assert torch.equal(chunked, whole)


def test_rows_of_a_user_side_by_side() -> None:
    data = rows(30, 4)
    ordered = sorted_by_user(data)
    assert bool((ordered.users.diff() >= 0).all()) and len(ordered.users.unique_consecutive()) == 4
    pairs = {(float(x[0]), int(y), int(user)) for x, y, user in zip(*data, strict=True)}
    assert pairs == {(float(x[0]), int(y), int(user)) for x, y, user in zip(*ordered, strict=True)}


def test_a_row_that_is_not_finite_takes_its_user_out() -> None:
    data = rows(20, 4)
    user = data.users[3]
    data.x[3, 0] = torch.nan
    others = UserRows(*(part[data.users != user] for part in data))
    for model in (head(), network()):
        for mode in MODES:
            mechanism = Mechanism(0.0, Noise(mode=mode))
            got, want = (mechanism.release(model, each, torch.tensor([0.5])) for each in (data, others))
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_users_are_sampled_and_not_rows() -> None:
    mechanism, data = Mechanism(1.0, Noise(seed=5)), rows(60, 15)
    counts, sizes = {int(user): 0 for user in data.users.unique()}, []
    for _ in range(1500):
        batch = mechanism.sample(data, 0.2)
        assert isinstance(batch, UserRows)
        taken = batch.users.unique().tolist()
        sizes.append(len(taken))
        for user in taken:
            counts[user] += 1
            assert int((batch.users == user).sum()) == int((data.users == user).sum()), "all rows or none"
    n = len(counts)
    assert float(torch.tensor(sizes).double().mean()) == pytest.approx(0.2 * n, rel=0.04)
    assert max(abs(count / 1500 - 0.2) for count in counts.values()) < 5 * math.sqrt(0.16 / 1500)
    assert mechanism.sample(data, 1.0) is data


@pytest.mark.parametrize("mode", MODES)
def test_no_users_release_noise_alone(mode: str) -> None:
    for model in (head(), network()):
        assert Mechanism(1.0, Noise(mode=mode)).release(model, rows(0, 1), torch.tensor([0.5])).any()
        assert not Mechanism(0.0, Noise(mode=mode)).release(model, rows(0, 1), torch.tensor([0.5])).any()


def test_private_rows_with_users_are_checked() -> None:
    x, y = np.zeros((4, 3), np.float32), np.array([0, 1, 0, 1])
    checked = check_private_rows((x, y, np.array([3, 3, -1, 9], np.int32)), 2)
    assert isinstance(checked, UserRows) and checked.users.tolist() == [3, 3, -1, 9]
    assert checked.users.dtype == torch.int64
    assert type(check_private_rows((x, y), 2)) is Rows
    assert len(check_private_rows((x[:0], y[:0], y[:0]), 2).y) == 0
    for users, message in (
        (y[:3], r"private: users has shape \[3\] but y has \[4\]; pass one user number per row"),
        (y.astype(np.float32), "private: users has dtype float32; pass integer user numbers"),
        (["a", "b", "c", "d"], "private: users has dtype <U1; pass integer user numbers"),
    ):
        with pytest.raises(InputError, match=message):
            check_private_rows((x, y, users), 2)
    with pytest.raises(InputError, match="private: y has label 7"):
        check_private_rows((x, y * 7, y), 2)
    with pytest.raises(InputError, match="private: expected a pair"):
        check_private_rows((x, y, y, y), 2)
