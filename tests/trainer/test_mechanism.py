"""The release: sensitivity, noise, projection, sampling."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from adamix.mechanism import Mechanism, clipped_sums
from adamix.models import Trainable, trainable
from adamix.rows import Rows, UserRows
from adamix_kernels import Noise, PoissonSampler, subspace_basis, use_backend


def rows(count: int, width: int = 6, classes: int = 3, seed: int = 0) -> Rows:
    generator = torch.Generator().manual_seed(seed)
    return Rows(
        torch.randn(count, width, generator=generator) * 3, torch.randint(0, classes, (count,), generator=generator)
    )


def head(bias: bool = True) -> Trainable:
    torch.manual_seed(0)
    return trainable(nn.Linear(6, 3, bias=bias))


def network() -> Trainable:
    torch.manual_seed(0)
    return trainable(nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)))


def quiet() -> Mechanism:
    return Mechanism(0.0, Noise(seed=0))


def some_basis(model: Trainable, rank: int = 4) -> Tensor:
    return subspace_basis(torch.cat(list(model.grad_sample(rows(9, seed=5)))), rank=rank)


@pytest.mark.parametrize("make", [head, network])
@pytest.mark.parametrize("projected", [False, True])
def test_one_row_moves_the_sum_by_at_most_the_threshold(make: object, projected: bool) -> None:
    model = make()  # type: ignore[operator]
    basis = some_basis(model) if projected else None
    data = rows(12)
    for scale in (1e-6, 1.0, 1e6):
        x = data.x.clone()
        x[-1] *= scale
        for tau in (1e-3, 0.4, 50.0):
            thresholds = torch.tensor([tau])
            whole = quiet().release(model, Rows(x, data.y), thresholds, basis)
            without = quiet().release(model, Rows(x[:-1], data.y[:-1]), thresholds, basis)
            moved = float((whole.double() - without.double()).norm())
            assert moved <= tau * (1 + 1e-6) + 1e-6 * float(whole.norm())
    assert moved > 0


def test_clipping_comes_after_projection() -> None:
    """A gradient mostly outside the subspace keeps its whole part inside, up to the threshold."""
    model = head()
    data = rows(1)
    grad = torch.cat(list(model.grad_sample(data)))[0].double()
    basis = some_basis(model, rank=2)
    inside = basis.double() @ grad
    assert float(inside.norm()) < 0.8 * float(grad.norm())
    tau = float(inside.norm()) * 1.01
    released = quiet().release(model, data, torch.tensor([tau]), basis)
    torch.testing.assert_close(released.double(), inside @ basis.double(), rtol=1e-5, atol=1e-6)


def test_the_release_lies_in_the_subspace() -> None:
    model = network()
    basis = some_basis(model)
    released = Mechanism(2.0, Noise(seed=1)).release(model, rows(7), torch.tensor([0.5]), basis)
    outside = released - (released @ basis.T) @ basis
    assert float(outside.norm()) < 1e-5 * float(released.norm())


@pytest.mark.parametrize("projected", [False, True])
@pytest.mark.parametrize("make", [head, network])
def test_the_noise_has_the_stated_standard_deviation(make: object, projected: bool) -> None:
    model = make()  # type: ignore[operator]
    basis = some_basis(model) if projected else None
    sigma, tau, mechanism = 1.7, 0.3, Mechanism(1.7, Noise(seed=2))
    signal = quiet().release(model, rows(5), torch.tensor([tau]), basis)
    noise = torch.stack([mechanism.release(model, rows(5), torch.tensor([tau]), basis) - signal for _ in range(1500)])
    coordinates = noise if basis is None else noise @ basis.T
    count = coordinates.numel()
    assert coordinates.shape[1] == (model.size if basis is None else 4)
    assert float(coordinates.std()) == pytest.approx(sigma * tau, rel=5 / math.sqrt(2 * count))
    each = coordinates.std(0) / (sigma * tau)
    assert float((each - 1).abs().max()) < 5 / math.sqrt(2 * 1500), "every coordinate gets noise"


def test_layers_are_clipped_each_and_noised_for_the_whole() -> None:
    model = network()
    assert [s.stop - s.start for s in model.layers] == [35, 18]
    thresholds = torch.tensor([0.2, 0.05])
    data = rows(1)
    sums = clipped_sums(model, data, thresholds, None)
    for part, tau in zip(sums, thresholds, strict=True):
        assert float(part.norm()) == pytest.approx(float(tau), rel=1e-5), "this row is beyond both thresholds"
    mechanism = Mechanism(1.0, Noise(seed=3))
    released = torch.stack([mechanism.release(model, data, thresholds) for _ in range(1500)])
    for layer, tau in zip(model.layers, thresholds, strict=True):
        assert float(released[:, layer].std(0).mean()) == pytest.approx(float(tau) * math.sqrt(2), rel=0.02)


def test_an_empty_batch_releases_noise_alone() -> None:
    for model in (head(), network()):
        empty = Rows(torch.zeros(0, 6), torch.zeros(0, dtype=torch.int64))
        released = Mechanism(1.0, Noise(seed=4)).release(model, empty, torch.tensor([0.5]))
        assert released.shape == (model.size,) and bool((released != 0).all())
        assert not quiet().release(model, empty, torch.tensor([0.5])).any()


def test_a_row_with_a_non_finite_gradient_adds_nothing() -> None:
    data = rows(4)
    bad = Rows(data.x.clone(), data.y)
    bad.x[2, 0] = torch.nan
    for model in (head(), network()):
        good = quiet().release(model, Rows(data.x[[0, 1, 3]], data.y[[0, 1, 3]]), torch.tensor([0.5]))
        torch.testing.assert_close(quiet().release(model, bad, torch.tensor([0.5])), good)


def test_poisson_batches() -> None:
    mechanism, data = Mechanism(1.0, Noise(seed=5)), rows(50)
    counts = torch.zeros(50)
    sizes = []
    for _ in range(2000):
        batch = mechanism.sample(data, 0.1)
        sizes.append(float(len(batch.y)))
        counts += torch.isin(data.x[:, 0], batch.x[:, 0])
    assert float(torch.tensor(sizes).mean()) == pytest.approx(5, rel=0.03)
    assert float(torch.tensor(sizes).var()) == pytest.approx(50 * 0.1 * 0.9, rel=0.12), "sizes vary as a binomial"
    assert float((counts / 2000 - 0.1).abs().max()) < 5 * math.sqrt(0.09 / 2000), "each row alike"
    assert len(mechanism.sample(data, 1.0).y) == 50


@pytest.mark.parametrize("rate", [0.1, 1e-17])
def test_a_rate_is_rounded_down_to_what_coins_can_show(rate: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """A uniform is a multiple of 2^-53: the largest one below the rate would be a chance too many."""
    largest = math.floor(rate * 2.0**53) * 2.0**-53
    data = rows(4)
    monkeypatch.setattr(
        Noise, "uniform", lambda self, count, device="cpu": torch.full((count,), largest, dtype=torch.float64)
    )
    for given in (data, UserRows(*data, torch.arange(4))):
        assert not len(Mechanism(1.0, Noise()).sample(given, rate).y)
    assert PoissonSampler(4, rate, steps=1).draw() == []


def test_head_and_generic_gradients_agree() -> None:
    fast = head()
    generic = Trainable(fast.module)
    data = rows(8)
    torch.testing.assert_close(torch.cat(list(fast.grad_sample(data))), torch.cat(list(generic.grad_sample(data))))
    for one, other in zip(fast.grad_sum(data), generic.grad_sum(data), strict=True):
        torch.testing.assert_close(one, other.reshape(one.shape), rtol=1e-4, atol=1e-5)
    tau = torch.tensor([0.7])
    torch.testing.assert_close(quiet().release(fast, data, tau), quiet().release(generic, data, tau))


@pytest.mark.parametrize("projected", [False, True])
@pytest.mark.parametrize("sigma", [0.0, 1.3])
def test_compiled_and_plain_heads_release_the_same(projected: bool, sigma: float) -> None:
    def release(backend: str) -> Tensor:
        with use_backend(backend):
            model = head()
            basis = some_basis(model) if projected else None
            mechanism = Mechanism(sigma, Noise(seed=4))
            return mechanism.release(model, rows(500), torch.tensor([0.7]), basis)

    torch.testing.assert_close(release("auto"), release("torch"), rtol=1e-5, atol=1e-4)


def test_gradients_of_a_head_are_not_formed_for_their_coordinates(monkeypatch: pytest.MonkeyPatch) -> None:
    model = head()
    basis = some_basis(model)
    monkeypatch.setattr(type(model), "grad_sample", None)
    assert len(clipped_sums(model, rows(20), torch.tensor([1.0]), basis)[0]) == len(basis)
