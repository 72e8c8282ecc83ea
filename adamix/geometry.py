"""Public geometry: coordinates, learned from public rows alone, where isotropic noise falls where signal does not."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from adamix.errors import InputError


class Whiten(nn.Module):
    """Shrunken whitening by the pooled within-class covariance of public features, on the unit sphere.

    x <- (x - mean) / ||x - mean||, z = (S + f I)^-power x with f = tr(S) / d, result z / ||z||.

    Args:
        features: public `[N, d]`.
        labels: their classes `[N]`.
        power: 0.5 whitens, 1 gives linear discriminant analysis' metric.
    """

    mean: Tensor
    directions: Tensor
    scales: Tensor

    def __init__(self, features: Tensor, labels: Tensor, power: float = 0.5) -> None:
        super().__init__()
        if features.dim() != 2:
            raise InputError(
                f"geometry: 'whiten' needs feature vectors [N, d], the rows have shape {list(features.shape[1:])}; "
                "pass geometry=None, or features of a backbone"
            )
        x = features.double()
        mean = x.mean(0)
        x = normalize(x - mean, dim=1)
        centres = torch.zeros(int(labels.max()) + 1, x.shape[1], dtype=x.dtype, device=x.device)
        centres = centres.index_add(0, labels, x) / labels.bincount()[:, None].clamp(min=1)
        within = x - centres[labels]
        # S has at most N directions; the others all get f^-power, so no d x d matrix is made.
        _, singular, directions = torch.linalg.svd(within, full_matrices=False)
        values = singular.square() / len(x)
        # One row per class has no spread within classes: then there is nothing to whiten.
        floor = values.sum() / x.shape[1] if values.sum() > 0 else torch.ones_like(values[0])
        # Relative to the others: the result is of unit norm anyway.
        scales = (values / floor + 1) ** -power - 1
        self.register_buffer("mean", mean.float())
        self.register_buffer("directions", directions.float())
        self.register_buffer("scales", scales.float())

    def forward(self, x: Tensor) -> Tensor:
        """`[..., d]` to `[..., d]`, of unit norm."""
        x = x - self.mean
        x = x / x.abs().amax(-1, keepdim=True).clamp(min=torch.finfo(x.dtype).tiny)  # squares stay in range
        x = normalize(x, dim=-1)
        return normalize(x + x @ self.directions.T * self.scales @ self.directions, dim=-1)
