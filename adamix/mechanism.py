"""The only place where private gradients become something that may leave: one Gaussian mechanism per step."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from adamix.models import SoftmaxHead, Trainable
from adamix.rows import Rows
from adamix_kernels import Noise, add_gaussian_noise_, clip_coef, clip_sum, grad_norm_sq, lift


@dataclass(frozen=True)
class Mechanism:
    """Clips each private row's gradient, sums, adds noise.

    Guarantee: whatever `thresholds` and `basis` are, if they do not depend on private rows, `release` is a Gaussian
    mechanism with the given noise multiplier for neighbours that add or remove one row. With L layers the vector of
    layer sums, each over its own threshold, has sensitivity sqrt(L), so layer l gets noise of standard deviation
    noise_multiplier * sqrt(L) * thresholds[l].
    """

    noise_multiplier: float
    noise: Noise

    def sample(self, rows: Rows, sample_rate: float) -> Rows:
        """A Poisson batch: each row independently with probability `sample_rate`, by secret randomness."""
        if sample_rate == 1:
            return rows
        chosen = self.noise.uniform(len(rows.y), rows.x.device) < sample_rate
        return Rows(rows.x[chosen], rows.y[chosen])

    def release(self, model: Trainable, rows: Rows, thresholds: Tensor, basis: Tensor | None = None) -> Tensor:
        """The noisy sum of clipped gradients.

        Args:
            model: gives the per-sample gradients at its present weights.
            rows: private rows, possibly none.
            thresholds: `[L]`, one for each of the model's layers, or `[1]` over all of them.
            basis: orthonormal `[K, P]`: clip and add noise in these K coordinates, one threshold.

        Returns:
            `[P]` float32: safe to use in any way afterwards.
        """
        if isinstance(model, SoftmaxHead) and basis is None:
            return model.clip_sum_noise(
                rows, max_grad_norm=thresholds[0], noise_multiplier=self.noise_multiplier, noise=self._noise
            )[0]
        sums = clipped_sums(model, rows, thresholds, basis)
        if self.noise_multiplier:
            for part, threshold in zip(sums, thresholds, strict=True):
                std = threshold.double() * (self.noise_multiplier * math.sqrt(len(sums)))
                add_gaussian_noise_(part, std, self.noise)
        released = torch.cat(sums)
        return released.float() if basis is None else lift(released, basis).float()

    @property
    def _noise(self) -> Noise | None:
        return self.noise if self.noise_multiplier else None


def clipped_sums(model: Trainable, rows: Rows, thresholds: Tensor, basis: Tensor | None) -> list[Tensor]:
    """The sums before noise, float64, one per threshold. Private: for `Mechanism.release` and its tests alone."""
    width = model.size if basis is None else len(basis)
    parts = model.layers if len(thresholds) == len(model.layers) > 1 else [slice(0, width)]
    sums = [torch.zeros(width, dtype=torch.float64, device=rows.x.device)[part] for part in parts]
    for coordinates in model.grad_sample(rows) if basis is None else model.coordinates(rows, basis):
        for total, part, threshold in zip(sums, parts, thresholds, strict=True):
            own = coordinates[:, part]
            total.add_(clip_sum(own, clip_coef(grad_norm_sq(own), threshold)))
    return sums
