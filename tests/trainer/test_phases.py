"""Phase 1, and what each part of phase 2 does."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from adamix import private_phase as phase
from adamix.config import Config
from adamix.mechanism import Mechanism
from adamix.models import Trainable, trainable
from adamix.public_phase import fit_public
from adamix.rows import Rows
from adamix.schedule import Schedule, logit_noise, make_schedule
from adamix_kernels import Noise, subspace_basis


def rows(count: int, seed: int = 0) -> Rows:
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(count) % 3
    return Rows(torch.randn(count, 5, generator=generator) + torch.eye(3, 5)[y] * 2, y)


def zero_head() -> Trainable:
    module = nn.Linear(5, 3)
    nn.init.zeros_(module.weight)
    nn.init.zeros_(module.bias)
    return trainable(module)


def config(**settings: Any) -> Config:
    return Config(**{"epsilon": 1.0, "expected_batch_size": 40, "geometry": None, "steps": 3, **settings})


def run(model: Trainable, settings: Config, sigma: float = 0.0, private: Rows | None = None) -> list[phase.Step]:
    anchor = model.weights()
    mechanism = Mechanism(sigma, Noise(seed=0))
    start = torch.zeros_like(anchor)
    private = private or rows(40, seed=1)
    return list(phase.private_phase(model, rows(12), private, settings, mechanism, start=start, anchor=anchor))


def test_phase_one_finds_the_regularised_optimum() -> None:
    model, data = zero_head(), rows(30)
    fit_public(model, data, l2=0.1, steps=200)
    weights = list(model.module.parameters())
    loss = cross_entropy(model.module(data.x), data.y) + 0.05 * sum((w**2).sum() for w in weights)
    assert max(float(g.abs().max()) for g in torch.autograd.grad(loss, weights)) < 1e-4


def test_phase_one_pulls_towards_the_start_it_was_given() -> None:
    model = zero_head()
    start = torch.randn(model.size, generator=torch.Generator().manual_seed(3))
    model.set_weights(start)
    fit_public(model, rows(30), l2=1e4, steps=50)
    torch.testing.assert_close(model.weights(), start, rtol=0, atol=1e-3)


def test_the_threshold_is_the_quantile_of_the_public_norms_at_the_present_weights() -> None:
    model = zero_head()
    for step in range(3):
        before = model.weights()
        public = rows(12)
        norms = torch.cat(list(model.grad_sample(public))).norm(dim=1).sort().values
        steps = run(model, config(steps=1, quantile=0.75, learning_rate=1.0))
        assert steps[0].thresholds == pytest.approx([float(norms[8])], rel=1e-5), f"step {step}"
        assert steps[0].public_clipped == pytest.approx(3 / 12)
        assert not torch.equal(before, model.weights())


def test_per_layer_thresholds() -> None:
    torch.manual_seed(0)
    model = trainable(nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)))
    grads = torch.cat(list(model.grad_sample(rows(12))))
    steps = run(model, config(clipping="per_layer", quantile=1.0, learning_rate=0.1))
    expected = [float(grads[:, layer].norm(dim=1).max()) for layer in model.layers]
    assert steps[0].thresholds == pytest.approx(expected, rel=1e-5)


def test_a_fixed_threshold_stays() -> None:
    steps = run(zero_head(), config(quantile=None, max_grad_norm=0.37, learning_rate=1.0))
    assert [s.thresholds for s in steps] == [pytest.approx((0.37,))] * 3


def test_the_update_mixes_as_stated() -> None:
    model, weight, n = zero_head(), 2.5, 40
    before = model.weights()
    public, private = rows(12), rows(40, seed=1)
    public_grads, private_grads = (torch.cat(list(model.grad_sample(r))).double() for r in (public, private))
    tau = 0.6
    factors = (tau / private_grads.norm(dim=1)).clamp(max=1)
    clipped = (factors[:, None] * private_grads).sum(0)
    assert float(factors.min()) < 1
    run(model, config(steps=1, quantile=None, max_grad_norm=tau, learning_rate=0.3, public_weight=weight))
    direction = (clipped + weight * public_grads.sum(0)) / (n + weight * 12)
    torch.testing.assert_close(model.weights().double(), before.double() - 0.3 / tau * direction, rtol=1e-5, atol=1e-6)


def test_the_denominator_is_the_public_constant() -> None:
    """Twice the private rows move the weights twice as far: the realised number is used nowhere."""
    moved = []
    for copies in (1, 2):
        model = zero_head()
        private = Rows(rows(20, seed=1).x.repeat(copies, 1), rows(20, seed=1).y.repeat(copies))
        run(model, config(steps=1, learning_rate=1.0, public_weight=0.0), private=private)
        moved.append(model.weights())
    torch.testing.assert_close(moved[1], 2 * moved[0])


def test_the_pull_contracts_towards_the_anchor() -> None:
    weights, anchor = torch.randn(7), torch.randn(7)
    for eta, pull in [(0.1, 0.5), (1e6, 1e3)]:
        after = phase.pulled_step(weights, torch.zeros(7), eta, pull, anchor)
        torch.testing.assert_close(
            (after - anchor).norm(), (weights - anchor).norm() / (1 + eta * pull), atol=1e-6, rtol=1e-4
        )
    direction = torch.randn(7)
    torch.testing.assert_close(phase.pulled_step(weights, direction, 0.2, 0.0, anchor), weights - 0.2 * direction)
    # First order in eta it is the formula of the method: w - eta (g + pull (w - anchor)).
    exact = weights - 1e-4 * (direction + 2.0 * (weights - anchor))
    torch.testing.assert_close(phase.pulled_step(weights, direction, 1e-4, 2.0, anchor), exact, atol=1e-6, rtol=1e-6)


def test_a_strong_pull_keeps_the_weights_home() -> None:
    far, near = zero_head(), zero_head()
    run(far, config(learning_rate=1.0), sigma=5.0)
    run(near, config(learning_rate=1.0, anchor=1e4), sigma=5.0)
    assert float(near.weights().norm()) < 0.01 * float(far.weights().norm())


def test_the_subspace_follows_the_public_gradients() -> None:
    ranks = [s.rank for s in run(zero_head(), config(subspace_rank=4, learning_rate=1.0))]
    assert ranks == [4, 4, 4]
    assert all(1 <= (s.rank or 0) < 12 for s in run(zero_head(), config(subspace_energy=0.8, learning_rate=1.0)))
    model = zero_head()
    before = model.weights()
    run(model, config(subspace_rank=2, learning_rate=1.0, public_weight=0.0, steps=1), sigma=1.0)
    fresh = zero_head()
    grads = torch.cat(list(fresh.grad_sample(rows(12)))).double()
    plane = torch.linalg.svd(grads, full_matrices=False).Vh[:2]
    step = (model.weights() - before).double()
    assert float((step - step @ plane.T @ plane).norm()) < 1e-5 * float(step.norm())


def test_vanishing_public_gradients_do_not_stop_the_run() -> None:
    model = zero_head()
    public = Rows(torch.zeros(6, 5), torch.arange(6) % 3)
    model.set_weights(torch.tensor([0.0] * 15 + [200.0] * 3))
    settings = config(subspace_rank=3, learning_rate=1e-8)
    for rule in (settings, config(subspace_rank=3)):
        weights, mechanism = model.weights(), Mechanism(1.0, Noise(seed=0))
        steps = list(phase.private_phase(model, public, rows(9), rule, mechanism, start=weights, anchor=weights))
        assert len(steps) == 3 and bool(model.weights().isfinite().all())


def test_the_subspace_and_its_threshold_are_set_anew_at_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    bases: list[Tensor] = []

    def watch(grad_sample: Tensor, **how: Any) -> Tensor:
        torch.testing.assert_close(grad_sample, torch.cat(list(model.grad_sample(rows(12)))))
        bases.append(subspace_basis(grad_sample, **how))
        return bases[-1]

    monkeypatch.setattr(phase, "subspace_basis", watch)
    model = zero_head()
    mechanism, settings = Mechanism(0.0, Noise(seed=0)), config(subspace_rank=2, learning_rate=3.0, quantile=0.5)
    weights = model.weights()
    steps = phase.private_phase(model, rows(12), rows(40, seed=1), settings, mechanism, start=weights, anchor=weights)
    grads = torch.cat(list(model.grad_sample(rows(12))))
    for number, step in enumerate(steps):
        inside = (grads @ bases[number].T).norm(dim=1).sort().values
        assert step.thresholds == pytest.approx([float(inside[5])], rel=1e-5), "the quantile of the projected norms"
        assert float(inside[5]) < 0.98 * float(grads.norm(dim=1).sort().values[5])
        grads = torch.cat(list(model.grad_sample(rows(12))))
    assert len(bases) == 3
    assert not any(torch.allclose(bases[i], bases[j], atol=1e-3) for i, j in [(0, 1), (1, 2)])


def test_a_cold_start_is_pulled_to_the_phase_one_weights() -> None:
    model = zero_head()
    anchor = torch.randn(model.size)
    mechanism, settings = Mechanism(1.0, Noise(seed=0)), config(anchor=1e6, learning_rate=1.0)
    start = model.weights()
    list(phase.private_phase(model, rows(12), rows(40, seed=1), settings, mechanism, start=start, anchor=anchor))
    torch.testing.assert_close(model.weights(), anchor, atol=1e-4, rtol=0)


def test_poisson_batches_are_what_is_released(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []

    def watch(self: Mechanism, model: Trainable, batch: Rows, *_: Any) -> Tensor:
        sizes.append(len(batch.y))
        return torch.zeros(model.size)

    monkeypatch.setattr(Mechanism, "release", watch)
    run(zero_head(), config(sample_rate=0.25, expected_batch_size=10, steps=100, learning_rate=0.01), sigma=1.0)
    assert sum(sizes) / 100 == pytest.approx(10, abs=5 * math.sqrt(40 * 0.25 * 0.75 / 100)) and len(set(sizes)) > 4


def test_poisson_batches_with_empty_ones() -> None:
    settings = config(sample_rate=0.01, expected_batch_size=1, steps=30, learning_rate=0.01)
    steps = run(zero_head(), settings, sigma=1.0)
    assert len(steps) == 30


def test_the_step_size_rule_keeps_the_noise_in_a_logit() -> None:
    settings = config(steps=16, logit_noise=0.5, public_weight=2.0)
    for make in (zero_head, lambda: Trainable(zero_head().module)):
        model = make()
        schedule = make_schedule(model, rows(12), model.weights(), settings, noise_multiplier=3.0)
        spread = math.sqrt(float((rows(12).x.square().sum(1) + 1).mean()))
        assert schedule.learning_rate * 3.0 * 4 / (40 + 2 * 12) * spread == pytest.approx(0.5, rel=1e-5)
        x = torch.cat([rows(12).x, torch.ones(12, 1)], 1).double()
        assert schedule.limit == pytest.approx(16 / (float(torch.linalg.eigvalsh(x.T @ x / 12)[-1]) / 2), rel=1e-5)
        assert schedule.step_size(1e-9) == schedule.limit
        assert schedule.step_size(1e9) == schedule.learning_rate / 1e9
    given = make_schedule(zero_head(), rows(12), zero_head().weights(), config(learning_rate=2.0), 3.0)
    assert given == Schedule(2.0) and given.step_size(0.5) == 4.0


def test_less_noise_is_allowed_where_private_rows_say_less() -> None:
    few, many = config(expected_batch_size=50), config(expected_batch_size=2000)
    sigma = 2.0 * math.sqrt(few.steps)  # 2 for all steps as one
    assert logit_noise(10, few, sigma) == pytest.approx(0.3 * math.sqrt(50 / (10 * 2)))
    assert logit_noise(10, many, sigma) == logit_noise(10, few, 0.0) == 1.0, "at most"
    poisson = config(expected_batch_size=5, sample_rate=0.1, steps=few.steps)
    assert logit_noise(10, poisson, 0.1 * sigma) == pytest.approx(logit_noise(10, few, sigma))
    rule = make_schedule(zero_head(), rows(12), zero_head().weights(), few, sigma)
    given = config(expected_batch_size=50, logit_noise=logit_noise(12, few, sigma))
    assert rule == make_schedule(zero_head(), rows(12), zero_head().weights(), given, sigma)


def test_a_threshold_too_small_for_the_step_is_raised() -> None:
    """Where the limit on the step binds, the noise budget goes into less clipping; up to the scale at the start."""
    model, public = zero_head(), rows(12)
    start = model.weights()
    at_start = torch.cat(list(model.grad_sample(public))).norm(dim=1).sort().values[10]
    fit_public(model, public, l2=1e-6, steps=200)
    fitted = model.weights()
    little_noise = make_schedule(model, public, start, config(), noise_multiplier=1e-3)
    assert little_noise.floor == pytest.approx(float(at_start), rel=1e-5)
    assert torch.equal(model.weights(), fitted), "the weights are as before"
    much_noise = make_schedule(model, public, start, config(), noise_multiplier=100.0)
    assert much_noise.floor == pytest.approx(much_noise.learning_rate / much_noise.limit)
    norm_sq = torch.tensor([[1e-6, 4e-6], [1e-8, 9e-6]])
    taus = little_noise.thresholds(norm_sq, config(quantile=1.0))
    assert float(taus.norm()) == pytest.approx(little_noise.floor)
    assert float(taus[1] / taus[0]) == pytest.approx(1.5), "layers keep their proportions"
    large = little_noise.thresholds(norm_sq * 1e12, config(quantile=1.0))
    torch.testing.assert_close(large, torch.tensor([2e3, 3e3]))
    no_noise = make_schedule(model, public, start, config(), noise_multiplier=0.0)
    assert no_noise.step_size(0.1) == no_noise.limit and math.isfinite(no_noise.floor)


def test_private_rows_reach_the_weights_through_the_mechanism_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the release replaced by zeros, private rows leave no trace."""

    def nothing(self: Mechanism, model: Trainable, *_: Any) -> Tensor:
        return torch.zeros(model.size)

    monkeypatch.setattr(Mechanism, "release", nothing)
    outcomes = []
    for seed in (1, 2):
        model = zero_head()
        steps = run(model, config(anchor=0.1), sigma=1.0, private=rows(40, seed=seed))
        outcomes.append((model.weights(), steps))
    assert torch.equal(outcomes[0][0], outcomes[1][0]) and outcomes[0][1] == outcomes[1][1]
