"""Thresholds and step sizes of phase 2, from public quantities alone."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from adamix.config import Config
from adamix.models import Trainable
from adamix.rows import Rows
from adamix_kernels import norm_quantile

#: A threshold must be above 0 for the step size 1 / tau; public gradients that vanish altogether reach this.
_SMALLEST_THRESHOLD = 1e-8
#: Largest product of step size and curvature bound. Gradient descent alone would need 2, but the bound is loose where
#: predictions are confident, and clipping keeps an overshoot finite; chosen in `benchmarks/defaults.md`.
_STABLE = 16.0
#: Noise that a logit may have for sqrt(private rows per public row and unit of noise), and at most. Chosen there too.
_LOGIT_NOISE, _MOST_LOGIT_NOISE = 0.3, 1.0


@dataclass(frozen=True)
class Schedule:
    """Step sizes eta = `learning_rate` / tau, at most `limit`; adaptive thresholds are at least `floor`."""

    learning_rate: float
    limit: float = math.inf
    floor: float = _SMALLEST_THRESHOLD

    def thresholds(self, public_norm_sq: Tensor, config: Config) -> Tensor:
        """One threshold per row of the `[layers, N]` public squared norms.

        Their quantiles; scaled up together where their total, the root of the sum of squares, is below `floor`. With
        `quantile=None` the fixed `max_grad_norm`, split evenly.
        """
        if config.quantile is None:
            fixed = float(config.max_grad_norm or 0) / math.sqrt(len(public_norm_sq))
            return torch.full((len(public_norm_sq),), fixed, device=public_norm_sq.device)
        taus = torch.stack([norm_quantile(norm_sq, config.quantile) for norm_sq in public_norm_sq])
        taus = taus.clamp(min=_SMALLEST_THRESHOLD)
        return taus * (self.floor / taus.norm()).clamp(min=1.0)

    def step_size(self, tau: float) -> float:
        """Eta for a total threshold `tau`."""
        return min(self.learning_rate / tau, self.limit)


def make_schedule(model: Trainable, public: Rows, start: Tensor, config: Config, noise_multiplier: float) -> Schedule:
    """The given `learning_rate`, or a rule.

    After T steps the noise in every weight has standard deviation lr sigma sqrt(T) / (n + w n_pub), which moves a logit
    by J times as much, J being the norm of the logit's gradient on public rows: lr makes that `logit_noise`. Eta times
    the curvature of the public loss stays within _STABLE; the curvature is half the largest eigenvalue of the mean
    outer product of those gradients, which bounds it for a softmax head and estimates it otherwise. Where this limit
    binds, a small threshold would waste signal without sparing noise, so tau is raised to lr / limit: the noise is
    then the same, and less is clipped. It is never raised above the quantile at the weights the model came with (of
    whole gradients, also with a subspace), the scale of gradients that nothing has fitted yet.

    Args:
        start: those weights `[P]`.
    """
    if config.learning_rate is not None:
        return Schedule(config.learning_rate)
    gradients = model.logit_gradients(public).double()
    # Public rows without any gradient tell nothing: then those of unit-norm features are assumed.
    spread = float(gradients.square().sum(1).mean().sqrt()) or 1.0
    curvature = float(torch.linalg.matrix_norm(gradients, 2)) ** 2 / len(gradients) / 2 or 0.5
    limit = _STABLE / curvature
    noise = noise_multiplier * math.sqrt(config.steps) * spread
    denominator = config.expected_batch_size + config.public_weight * len(public.y)
    allowed = config.logit_noise or logit_noise(len(public.y), config, noise_multiplier)
    learning_rate = allowed * denominator / noise if noise else math.inf
    if config.quantile is None:
        return Schedule(learning_rate, limit)
    present = model.weights()
    model.set_weights(start)
    ceiling = float(Schedule(learning_rate).thresholds(public_norms(model.grad_sum(public)[1], config), config).norm())
    model.set_weights(present)
    return Schedule(learning_rate, limit, max(_SMALLEST_THRESHOLD, min(learning_rate / limit, ceiling)))


def logit_noise(public_rows: int, config: Config, noise_multiplier: float) -> float:
    """How much noise what private rows teach is worth: little where they are few, or public rows teach it already.

    0.3 sqrt(n / (N sigma_1)), at most 1, for n private rows, N public ones, and sigma_1, the noise multiplier of one
    step that would cost what all steps do. Found on validation rows of five data sets (`benchmarks/defaults.md`).
    """
    if not noise_multiplier:
        return _MOST_LOGIT_NOISE
    total = noise_multiplier / (config.sample_rate * math.sqrt(config.steps))
    return min(_MOST_LOGIT_NOISE, _LOGIT_NOISE * math.sqrt(config.private_rows / (public_rows * total)))


def public_norms(norm_sq: Tensor, config: Config) -> Tensor:
    """Squared norms `[layers, N]` as the thresholds need them: over all layers, `[1, N]`, for flat clipping."""
    return norm_sq.sum(0, keepdim=True) if config.clipping == "flat" else norm_sq
