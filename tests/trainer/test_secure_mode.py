"""The release in secure mode: on the grid, bounded exactly, and the float path's to within the grid."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from adamix import AdaMix
from adamix.errors import InputError
from adamix.mechanism import Mechanism, integer_sums
from adamix.models import Trainable, trainable
from adamix.rows import Rows
from adamix_kernels import Noise, grid_for, lift, subspace_basis

WAYS = ["head", "network", "per layer", "subspace"]


def rows(count: int, seed: int = 0) -> Rows:
    generator = torch.Generator().manual_seed(seed)
    return Rows(torch.randn(count, 6, generator=generator) * 3, torch.randint(0, 3, (count,), generator=generator))


def setting(way: str) -> tuple[Trainable, Tensor, Tensor | None]:
    """A model, thresholds and a basis."""
    torch.manual_seed(0)
    model = trainable(
        nn.Linear(6, 3) if way in ("head", "subspace") else nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    )
    basis = None
    if way == "subspace":
        basis = subspace_basis(torch.cat(list(model.grad_sample(rows(9, seed=5)))), rank=4)
    return model, torch.tensor([0.3, 0.05] if way == "per layer" else [0.4]), basis


def secure(sigma: float) -> Mechanism:
    return Mechanism(sigma, Noise(mode="secure"))


@pytest.mark.parametrize("way", WAYS)
def test_a_row_adds_at_most_the_threshold_exactly(way: str) -> None:
    model, thresholds, basis = setting(way)
    limits = thresholds.double().tolist()
    grids = [grid_for(limit, limit) for limit in limits]
    most = [Fraction(limit) ** 2 for limit in limits]
    data, clipped = rows(40), 0
    for scale in (1e-20, 1e-3, 1.0, 1e6, 1e30):
        for b in range(40):
            one = Rows(data.x[b : b + 1] * scale, data.y[b : b + 1])
            for total, grid, bound in zip(integer_sums(model, one, limits, grids, basis), grids, most, strict=True):
                norm_sq = sum(q * q for q in total.tolist()) * Fraction(grid) ** 2
                assert norm_sq <= bound
                clipped += norm_sq > bound * Fraction(0.999)
    assert clipped > 40, "some are at the threshold"


@pytest.mark.parametrize("way", WAYS)
def test_without_noise_it_is_the_float_path_to_within_the_grid(way: str) -> None:
    model, thresholds, basis = setting(way)
    data = rows(30)
    fast = Mechanism(0.0, Noise(seed=0)).release(model, data, thresholds, basis)
    grid = grid_for(float(thresholds.max()), 0.0)
    released = secure(0.0).release(model, data, thresholds, basis)
    torch.testing.assert_close(released, fast, rtol=1e-5, atol=31 * grid * math.sqrt(model.size))
    assert not torch.equal(released, fast)


@pytest.mark.parametrize("way", WAYS)
def test_every_output_is_a_multiple_of_the_grid(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, thresholds, basis = setting(way)
    seen: list[Tensor] = []
    monkeypatch.setattr("adamix.mechanism.lift", lambda released, basis: seen.append(released) or lift(released, basis))
    sigma = 1.3
    released = secure(sigma).release(model, rows(30), thresholds, basis)
    parts = (
        [seen[0]] if basis is not None else [released[s] for s in model.layers] if len(thresholds) > 1 else [released]
    )
    for part, tau in zip(parts, thresholds.double().tolist(), strict=True):
        grid = grid_for(tau, tau * sigma * math.sqrt(len(parts)))
        steps = part.double() / grid
        assert torch.equal(steps, steps.round()) and bool((part != 0).all())


@pytest.mark.parametrize("way", WAYS)
def test_the_noise_has_the_stated_standard_deviation(way: str) -> None:
    model, thresholds, basis = setting(way)
    sigma, data, mechanism = 1.7, rows(5), secure(1.7)
    signal = secure(0.0).release(model, data, thresholds, basis)
    noise = torch.stack([mechanism.release(model, data, thresholds, basis) - signal for _ in range(600)])
    coordinates = noise if basis is None else noise @ basis.T
    parts = model.layers if len(thresholds) > 1 else [slice(0, coordinates.shape[1])]
    for part, tau in zip(parts, thresholds.tolist(), strict=True):
        std = sigma * tau * math.sqrt(len(parts))
        own = coordinates[:, part]
        assert float(own.std()) == pytest.approx(std, rel=5 / math.sqrt(2 * own.numel()))
        assert float((own.std(0) / std - 1).abs().max()) < 5 / math.sqrt(2 * 600), "every coordinate gets noise"


@pytest.mark.parametrize("way", WAYS)
def test_an_empty_batch_releases_noise_alone(way: str) -> None:
    model, thresholds, basis = setting(way)
    assert secure(1.0).release(model, rows(0), thresholds, basis).any()
    assert not secure(0.0).release(model, rows(0), thresholds, basis).any()


def test_the_order_of_rows_changes_nothing() -> None:
    """Taken one by one; in one product torch may add in another order for another place in a batch."""
    model, thresholds, _ = setting("network")
    data, grid = rows(25), grid_for(float(thresholds), 1.0)

    def total(order: list[int]) -> Tensor:
        each = [Rows(data.x[b : b + 1], data.y[b : b + 1]) for b in order]
        return torch.stack([integer_sums(model, one, [float(thresholds)], [grid], None)[0] for one in each]).sum(0)

    assert torch.equal(total(list(range(25))), total(list(range(24, -1, -1))))


def test_a_threshold_without_a_grid_is_refused() -> None:
    model, _, _ = setting("head")
    with pytest.raises(InputError, match="noise_mode: 'secure' has no grid"):
        secure(1.0).release(model, rows(3), torch.tensor([1e25]))


@pytest.mark.parametrize("mode", ["fast", "secure"])
def test_the_run_draws_from_the_source_it_was_asked_for(
    mode: str, make_run: Callable[..., float], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    release = Mechanism.release

    def noted(self: Mechanism, *given: Any) -> Tensor:
        seen.append(self.noise.mode)
        return release(self, *given)

    monkeypatch.setattr(Mechanism, "release", noted)
    make_run(mode, {})
    assert seen == [mode] * 6


@pytest.mark.parametrize("extra", [{}, {"subspace_rank": 4}, {"clipping": "per_layer"}])
def test_a_run_in_secure_mode_learns_as_much(extra: dict[str, object], make_run: Callable[..., float]) -> None:
    secure_error, fast_error = (make_run(mode, extra) for mode in ("secure", "fast"))
    assert secure_error < fast_error + 4


@pytest.fixture
def make_run() -> Callable[..., float]:
    def run(mode: str, extra: dict[str, object]) -> float:
        generator = torch.Generator().manual_seed(1)
        centres = torch.randn(3, 8, generator=generator) * 2

        def draw(count: int) -> tuple[Tensor, Tensor]:
            y = torch.arange(count) % 3
            return centres[y] + torch.randn(count, 8, generator=generator), y

        model = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 3)) if "clipping" in extra else None
        result = AdaMix(model, epsilon=20.0, expected_batch_size=600, steps=6, noise_mode=mode, **extra).fit(
            public=draw(12), private=draw(600), test=draw(600)
        )
        assert result.test_error is not None
        return result.test_error

    return run
