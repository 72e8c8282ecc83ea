"""Poisson batches: who is in them, what they look like when nobody is, and padding them to one size."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from scipy import stats
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from adamix_kernels import DPEngine, Noise, PoissonSampler, SamplingEvent, pad_batch


def membership(sampler: PoissonSampler) -> Tensor:
    rows = torch.zeros(len(sampler), sampler.num_samples)
    for row, batch in zip(rows, sampler, strict=True):
        row[batch] += 1
    return rows


def test_each_sample_comes_at_its_rate_and_independently() -> None:
    rows = membership(PoissonSampler(50, 0.2, steps=4000, noise=Noise(seed=1)))
    assert rows.max() == 1
    counts = rows.sum(0)
    statistic = ((counts - 800) ** 2 / (4000 * 0.2 * 0.8)).sum()
    assert 0.001 < stats.chi2.sf(float(statistic), 50) < 0.999
    sizes = torch.bincount(rows.sum(1).long(), minlength=51).double()
    expected = torch.from_numpy(stats.binom.pmf(range(51), 50, 0.2)) * 4000
    usual = expected > 5
    assert stats.chi2.sf(float(((sizes - expected)[usual] ** 2 / expected[usual]).sum()), int(usual.sum())) > 0.001
    for lag in (1, 2):  # across steps
        joint = (rows[lag:] * rows[:-lag]).sum()
        trials = (4000 - lag) * 50
        assert abs(joint - 0.04 * trials) < 4.5 * math.sqrt(trials * 0.04 * 0.96)
    neighbours = (rows[:, 1:] * rows[:, :-1]).sum()
    assert abs(neighbours - 0.04 * 4000 * 49) < 4.5 * math.sqrt(4000 * 49 * 0.04 * 0.96)


def test_draws_differ_between_epochs_and_samplers() -> None:
    sampler = PoissonSampler(200, 0.5, steps=2)
    drawn = [*sampler, *sampler, *PoissonSampler(200, 0.5, steps=2)]
    assert len({tuple(batch) for batch in drawn}) == 6


def test_rate_one_takes_all_and_lengths() -> None:
    assert list(PoissonSampler(3, 1.0)) == [[0, 1, 2]]
    assert len(PoissonSampler(10, 0.3)) == 4
    assert len(PoissonSampler(10, 0.3, steps=7)) == 7
    assert PoissonSampler(10, 0.3).expected_batch_size == 3
    assert PoissonSampler(10, 0.3, max_batch_size=4).event == SamplingEvent(0.3, 10, 4)


def test_a_truncated_batch_keeps_a_uniform_subset() -> None:
    rows = membership(PoissonSampler(20, 0.5, steps=4000, max_batch_size=6, noise=Noise(seed=2)))
    sizes = rows.sum(1)
    assert sizes.max() == 6
    kept = stats.binom.pmf(range(21), 20, 0.5) @ [min(k, 6) for k in range(21)]
    p = kept / 20
    statistic = ((rows.sum(0) - 4000 * p) ** 2 / (4000 * p * (1 - p))).sum()
    assert 0.001 < stats.chi2.sf(float(statistic), 20) < 0.999


@pytest.mark.parametrize(
    ("error", "arguments", "match"),
    [
        (ValueError, {"num_samples": 0}, "num_samples: is 0; pass at least 1"),
        (TypeError, {"num_samples": 2.5}, "num_samples: is float; pass an int"),
        (ValueError, {"steps": 0}, "steps: is 0"),
        (ValueError, {"max_batch_size": 0}, "max_batch_size: is 0"),
        (ValueError, {"sample_rate": 1.5}, "sample_rate: is 1.5; pass a number above 0, at most 1"),
        (ValueError, {"sample_rate": math.nan}, "sample_rate: is nan"),
        (TypeError, {"sample_rate": "0.1"}, "sample_rate: is str"),
        (TypeError, {"noise": 3}, "noise: is int"),
    ],
)
def test_arguments(error: type[Exception], arguments: dict, match: str) -> None:
    with pytest.raises(error, match=match):
        PoissonSampler(**{"num_samples": 10, "sample_rate": 0.1, **arguments})


class Rows:
    def __len__(self) -> int:
        return 4

    def __getitem__(self, i: int) -> dict:
        return {"x": torch.full((3,), float(i)), "y": i, "z": (torch.ones(2, 2),)}


def test_a_loader_whose_batches_are_empty() -> None:
    sampler = PoissonSampler(4, 1e-9, steps=2)
    for batch in DataLoader(Rows(), batch_sampler=sampler, collate_fn=sampler.collate(Rows())):
        assert batch["x"].shape == (0, 3)
        assert batch["y"].shape == (0,) and batch["y"].dtype == torch.int64
        assert batch["z"][0].shape == (0, 2, 2)
    full = sampler.collate(Rows())([Rows()[0], Rows()[2]])
    assert full["x"].shape == (2, 3)
    with pytest.raises(TypeError, match="makes a str without a row for each sample"):
        sampler.collate(["a"])([])


def test_a_whole_loop_with_empty_batches_is_noise_and_data() -> None:
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(8, 3), torch.randint(0, 2, (8,)))
    sampler = PoissonSampler(8, 0.1, steps=12, noise=Noise(seed=4))
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    dp = DPEngine(
        model, optimizer, max_grad_norm=1.0, noise_multiplier=1.0, expected_batch_size=sampler.expected_batch_size
    )
    sizes = []
    for x, y in DataLoader(data, batch_sampler=sampler, collate_fn=sampler.collate(data)):
        before = model.weight.detach().clone()
        F.cross_entropy(model(x), y, reduction="none").mean().backward() if len(x) else None
        optimizer.step()
        optimizer.zero_grad()
        sizes.append(len(x))
        assert not torch.equal(before, model.weight) and model.weight.isfinite().all()
    assert dp.steps == 12 and 0 in sizes and max(sizes) > 0


def test_padded_rows_count_nothing() -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    dp = DPEngine(
        model, optimizer, max_grad_norm=0.3, noise_multiplier=0.0, expected_batch_size=1.0, loss_reduction="sum"
    )
    batch = {"x": torch.randn(3, 3), "y": torch.tensor([0, 1, 1])}
    gradients = []
    for size in (3, 5):
        padded, mask = pad_batch(batch, size)
        assert padded["x"].shape == (size, 3) and mask.tolist() == [1.0] * 3 + [0.0] * (size - 3)
        losses = F.cross_entropy(model(padded["x"]), padded["y"], reduction="none")
        (losses * mask).sum().backward()
        step = [p.detach().clone() for p in model.parameters()]
        optimizer.step()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
        optimizer.zero_grad()
        with torch.no_grad():
            for p, old in zip(model.parameters(), step, strict=True):
                p.copy_(old)
    torch.testing.assert_close(*gradients)
    assert dp.steps == 2
    empty, mask = pad_batch((torch.ones(0, 2), torch.ones(0, dtype=torch.bool)), 2)
    assert empty[0].shape == (2, 2) and not mask.any()


def test_what_cannot_be_padded() -> None:
    with pytest.raises(ValueError, match=r"batch: has tensors of \[3\] rows; pass equal numbers of at most size = 2"):
        pad_batch(torch.ones(3, 1), 2)
    with pytest.raises(ValueError, match=r"rows; pass equal"):
        pad_batch([torch.ones(3, 1), torch.ones(2, 1)], 4)
    with pytest.raises(TypeError, match="batch: must hold tensors alone"):
        pad_batch({"x": torch.ones(2, 1), "name": "a"}, 4)


def test_ranks_share_one_poisson_batch() -> None:
    """With equal keys their batches are those of one process, cut by rank; with other keys none is on two ranks."""
    whole = PoissonSampler(1000, 0.2, noise=Noise(seed=1))
    ranks = [PoissonSampler(1000, 0.2, noise=Noise(seed=1), rank=r, world_size=3) for r in range(3)]
    for batch, *parts in zip(whole, *ranks, strict=True):
        assert sorted(i for part in parts for i in part) == batch
    assert {rank.expected_batch_size for rank in ranks} == {200.0} and {rank.event for rank in ranks} == {whole.event}
    own = [PoissonSampler(1000, 1.0, rank=r, world_size=3, steps=1).draw() for r in range(3)]
    assert [i % 3 for part in own for i in part] == [0] * 334 + [1] * 333 + [2] * 333


def test_samples_of_a_rank_are_by_coins_of_their_own() -> None:
    """Also where all ranks have one key: sample i of a rank is not in whenever sample i of another is."""
    ranks = [PoissonSampler(3000, 0.5, noise=Noise(seed=2), rank=r, world_size=2) for r in range(2)]
    first, second = ({i // 2 for i in rank.draw()} for rank in ranks)
    assert abs(len(first & second) / 1500 - 0.25) < 0.05


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 2, "world_size": 2}, "rank: is 2 of world_size 2"),
        ({"rank": -1}, "rank: is -1"),
        ({"rank": 0, "world_size": 2, "max_batch_size": 3}, "max_batch_size: is not supported over several ranks"),
    ],
)
def test_ranks_that_do_not_fit(settings: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PoissonSampler(10, 0.5, **settings)
