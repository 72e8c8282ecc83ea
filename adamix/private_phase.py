"""Phase 2: steps on public and private rows together, with threshold and subspace set anew by the public rows."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from adamix.config import Config
from adamix.mechanism import Mechanism
from adamix.models import Trainable
from adamix.rows import Rows
from adamix_kernels import norm_quantile, project, subspace_basis

#: A threshold must be above 0 for the step size 1 / tau; public gradients that vanish altogether reach this.
_SMALLEST_THRESHOLD = 1e-8
#: Largest product of step size and curvature bound. Gradient descent alone would need 2, but the bound is loose where
#: predictions are confident, and clipping keeps an overshoot finite; chosen in `benchmarks/defaults.md`.
_STABLE = 64.0


@dataclass(frozen=True)
class Step:
    """What may be published about one step: nothing here has touched a private row.

    `thresholds` tau_t per layer; `public_loss` mean; `public_clipped`, the share of public rows above the threshold;
    `rank` of the subspace, None without one; `step_size` eta.
    """

    number: int
    thresholds: tuple[float, ...]
    public_loss: float
    public_clipped: float
    rank: int | None
    step_size: float


def private_phase(
    model: Trainable, public: Rows, private: Rows, config: Config, mechanism: Mechanism, anchor: Tensor
) -> Iterator[Step]:
    """Run phase 2, updating `model` in place; yields after each step.

    Args:
        public: rows whose exact gradients set threshold and subspace, and enter the update.
        private: rows seen only through `mechanism`.
        anchor: the phase-1 weights `[P]`.
    """
    size = step_size(model, public, config, mechanism.noise_multiplier)
    weight = config.public_weight
    denominator = config.expected_batch_size + weight * len(public.y)
    for number in range(1, config.steps + 1):
        public_sum, norm_sq, loss = model.grad_sum(public)  # norm_sq [layers, N]
        if config.clipping == "flat":
            norm_sq = norm_sq.sum(0, keepdim=True)
        basis = None
        if config.projects:
            grads = torch.cat(list(model.grad_sample(public)))
            basis = subspace_basis(grads, rank=config.subspace_rank, energy=config.subspace_energy)
            norm_sq = project(grads, basis).double().square().sum(1)[None].float()
        thresholds = adaptive_thresholds(norm_sq, config)
        released = mechanism.release(model, mechanism.sample(private, config.sample_rate), thresholds, basis)

        tau = float(thresholds.double().square().sum().sqrt())
        eta = size.at(tau)
        direction = (released + weight * public_sum) / denominator
        weights = pulled_step(model.weights(), direction, eta, config.anchor, anchor)
        model.set_weights(weights)
        yield Step(
            number,
            tuple(thresholds.tolist()),
            float(loss) / len(public.y),
            float((norm_sq.sqrt() > thresholds[:, None]).any(0).double().mean()),
            None if basis is None else len(basis),
            eta,
        )


def adaptive_thresholds(public_norm_sq: Tensor, config: Config) -> Tensor:
    """One threshold per row of `[layers, N]` public squared norms: their quantile, or the fixed one split evenly."""
    if config.quantile is None:
        fixed = float(config.max_grad_norm or 0) / math.sqrt(len(public_norm_sq))
        return torch.full((len(public_norm_sq),), fixed, device=public_norm_sq.device)
    taus = [norm_quantile(norm_sq, config.quantile) for norm_sq in public_norm_sq]
    return torch.stack(taus).clamp(min=_SMALLEST_THRESHOLD)


def pulled_step(weights: Tensor, direction: Tensor, step_size: float, pull: float, anchor: Tensor) -> Tensor:
    """w <- w - eta (direction + pull (w - anchor)), the pull taken at the new w: stable for every eta and pull."""
    return (weights - step_size * direction + step_size * pull * anchor) / (1 + step_size * pull)


@dataclass(frozen=True)
class StepSize:
    """Step sizes eta of one run: `learning_rate` / tau, but at most `limit`."""

    learning_rate: float
    limit: float

    def at(self, tau: float) -> float:
        return min(self.learning_rate / tau, self.limit)


def step_size(model: Trainable, public: Rows, config: Config, noise_multiplier: float) -> StepSize:
    """The given `learning_rate`, or a rule from public quantities alone.

    The rule: after T steps the noise in every weight has standard deviation lr sigma sqrt(T) / (n + w n_pub), which
    moves a logit by J times as much, J being the norm of the logit's gradient on public rows; lr makes that
    `logit_noise`. And eta times a bound on the curvature of the public loss (half the largest eigenvalue of the mean
    outer product of those gradients) stays within _STABLE.
    """
    if config.learning_rate is not None:
        return StepSize(config.learning_rate, math.inf)
    gradients = model.logit_gradients(public).double()
    spread = float(gradients.square().sum(1).mean().sqrt())
    curvature = float(torch.linalg.matrix_norm(gradients, 2)) ** 2 / len(gradients) / 2
    denominator = config.expected_batch_size + config.public_weight * len(public.y)
    noise = noise_multiplier * math.sqrt(config.steps) * spread
    return StepSize(
        config.logit_noise * denominator / noise if noise else math.inf, _STABLE / curvature if curvature else math.inf
    )
