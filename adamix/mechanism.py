"""The only place where private gradients become something that may leave: one Gaussian mechanism per step."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from adamix.errors import InputError
from adamix.models import SoftmaxHead, Trainable
from adamix.rows import Rows, UserRows
from adamix.users import count_users, sample_users, sorted_by_user, summed_by_user
from adamix_kernels import (
    Noise,
    add_gaussian_noise_,
    clip_coef,
    clip_sum,
    grad_norm_sq,
    grid_clip_sum,
    grid_for,
    grid_release,
    lift,
)
from adamix_kernels.ops.noise import coin_rate


@dataclass(frozen=True)
class Mechanism:
    """Clips the gradient of each private row, or of each user, sums, adds noise.

    Guarantee: whatever `thresholds` and `basis` are, if they do not depend on private rows, `release` is a Gaussian
    mechanism with the given noise multiplier for neighbours that add or remove one row; with `UserRows`, for
    neighbours that add or remove one user with all of their rows. With L layers the vector of layer sums, each over its
    own threshold, has sensitivity sqrt(L), so layer l gets noise of standard deviation
    noise_multiplier * sqrt(L) * thresholds[l].

    With noise of mode "secure" that holds on a machine of finite precision too: sums and noise are whole multiples of a
    grid (`adamix_kernels.ops.grid` states what is assumed all the same). In mode "fast" sums are in floating point:
    thresholds hold up to rounding, and the low bits of what is released are not hardened against attacks.
    """

    noise_multiplier: float
    noise: Noise

    def sample(self, rows: Rows | UserRows, sample_rate: float) -> Rows | UserRows:
        """A Poisson batch: each row, or user, independently with probability `sample_rate`, by secret randomness."""
        if sample_rate == 1:
            return rows
        sample_rate = coin_rate(sample_rate)
        if isinstance(rows, UserRows):
            return sample_users(rows, self.noise.uniform(count_users(rows), rows.x.device), sample_rate)
        chosen = self.noise.uniform(len(rows.y), rows.x.device) < sample_rate
        return Rows(rows.x[chosen], rows.y[chosen])

    def release(
        self, model: Trainable, rows: Rows | UserRows, thresholds: Tensor, basis: Tensor | None = None
    ) -> Tensor:
        """The noisy sum of clipped gradients.

        Args:
            model: gives the per-sample gradients at its present weights.
            rows: private rows, possibly none. The gradients of a user's rows are added before they are clipped.
            thresholds: `[L]`, one for each of the model's layers, or `[1]` over all of them.
            basis: orthonormal `[K, P]`: clip and add noise in these K coordinates, one threshold.

        Returns:
            `[P]` float32: safe to use in any way afterwards. In secure mode multiples of each layer's grid, or lifted
            from such coordinates.

        Raises:
            InputError: in secure mode, a threshold is out of the range of a grid.
        """
        if self.noise.mode == "secure":
            released = torch.cat(self._on_the_grid(model, rows, thresholds, basis))
        elif isinstance(model, SoftmaxHead) and basis is None and not isinstance(rows, UserRows):
            return model.clip_sum_noise(
                rows, max_grad_norm=thresholds[0], noise_multiplier=self.noise_multiplier, noise=self._noise
            )[0]
        else:
            released = torch.cat(self._in_floats(model, rows, thresholds, basis))
        return released.float() if basis is None else lift(released, basis).float()

    def _in_floats(
        self, model: Trainable, rows: Rows | UserRows, thresholds: Tensor, basis: Tensor | None
    ) -> list[Tensor]:
        sums = clipped_sums(model, rows, thresholds, basis)
        if self.noise_multiplier:
            for part, threshold in zip(sums, thresholds, strict=True):
                std = threshold.double() * (self.noise_multiplier * math.sqrt(len(sums)))
                add_gaussian_noise_(part, std, self.noise)
        return sums

    def _on_the_grid(
        self, model: Trainable, rows: Rows | UserRows, thresholds: Tensor, basis: Tensor | None
    ) -> list[Tensor]:
        limits = thresholds.double().tolist()
        stds = [limit * (self.noise_multiplier * math.sqrt(len(limits))) for limit in limits]
        try:
            grids = [grid_for(limit, std) for limit, std in zip(limits, stds, strict=True)]
        except ValueError as error:
            raise InputError(
                f"noise_mode: 'secure' has no grid for this threshold ({error}); scale the rows"
            ) from error
        sums = integer_sums(model, rows, limits, grids, basis)
        return [grid_release(part, std, grid, self._noise) for part, std, grid in zip(sums, stds, grids, strict=True)]

    @property
    def _noise(self) -> Noise | None:
        return self.noise if self.noise_multiplier else None


def clipped_sums(model: Trainable, rows: Rows | UserRows, thresholds: Tensor, basis: Tensor | None) -> list[Tensor]:
    """The sums before noise, float64, one per threshold. Private: for `Mechanism.release` and its tests alone."""
    parts, width = parts_of(model, len(thresholds), basis)
    sums = [torch.zeros(width, dtype=torch.float64, device=rows.x.device)[part] for part in parts]
    for coordinates in contributions(model, rows, basis):
        for total, part, threshold in zip(sums, parts, thresholds, strict=True):
            own = coordinates[:, part]
            total.add_(clip_sum(own, clip_coef(grad_norm_sq(own), threshold)))
    return sums


def integer_sums(
    model: Trainable, rows: Rows | UserRows, limits: list[float], grids: list[float], basis: Tensor | None
) -> list[Tensor]:
    """The same in whole multiples of each threshold's grid, int64: exact for as many rows as memory holds."""
    parts, width = parts_of(model, len(limits), basis)
    sums = [torch.zeros(width, dtype=torch.int64, device=rows.x.device)[part] for part in parts]
    for coordinates in contributions(model, rows, basis):
        for total, part, limit, grid in zip(sums, parts, limits, grids, strict=True):
            own = coordinates[:, part]
            total.add_(grid_clip_sum(own, clip_coef(grad_norm_sq(own), limit), limit, grid))
    return sums


def parts_of(model: Trainable, count: int, basis: Tensor | None) -> tuple[list[slice], int]:
    """Which of the coordinates each of `count` thresholds is for, and how many there are."""
    width = model.size if basis is None else len(basis)
    return (model.layers if count == len(model.layers) > 1 else [slice(0, width)]), width


def contributions(model: Trainable, rows: Rows | UserRows, basis: Tensor | None) -> Iterable[Tensor]:
    """What is clipped, in chunks `[b, P]` or `[b, K]`: gradients of rows, or their sums by user."""
    ordered = sorted_by_user(rows) if isinstance(rows, UserRows) else rows
    plain = Rows(ordered.x, ordered.y)
    chunks = model.grad_sample(plain) if basis is None else model.coordinates(plain, basis)
    return summed_by_user(chunks, ordered.users) if isinstance(ordered, UserRows) else chunks
