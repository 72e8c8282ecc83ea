"""What the samples of a step were like."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm


@dataclass(frozen=True)
class Metrics:
    """Of one step's samples. Private: nothing here has noise, and no guarantee covers its publication.

    Its tensors stay on their device; only reading a property waits for it.
    """

    norm_sq: Sequence[Tensor]  # [B] of each backward pass, rounded up
    thresholds: Sequence[float | Tensor]  # of each backward pass
    signal: Tensor | None  # norm of the clipped sum, if it was measured
    noise: float | Tensor  # root of the expected square norm of the noise

    @classmethod
    def of(
        cls,
        norm_sq: Sequence[Tensor],
        thresholds: Sequence[float | Tensor],
        sums: Sequence[Tensor],
        std: float | Tensor,
        measure_signal: bool,
    ) -> Metrics:
        signal = get_total_norm(sums) if measure_signal else None
        return cls(tuple(norm_sq), tuple(thresholds), signal, std * sum(x.numel() for x in sums) ** 0.5)

    @functools.cached_property
    def norms(self) -> Tensor:
        """`[B]` of all backward passes, not clipped; Inf where a gradient is not finite."""
        return torch.cat([x.double().sqrt() for x in self.norm_sq]) if self.norm_sq else torch.zeros(0)

    @property
    def samples(self) -> int:
        return len(self.norms)

    @functools.cached_property
    def clipped_fraction(self) -> float:
        """Of samples whose norm is above the threshold of the whole gradient; 0 of no samples."""
        above = [(x.double().sqrt() > c).sum() for x, c in zip(self.norm_sq, self.thresholds, strict=False)]
        return float(torch.stack(above).sum()) / max(self.samples, 1) if above else 0.0

    def norm_quantiles(self, q: Sequence[float] = (0.05, 0.25, 0.5, 0.75, 0.95)) -> list[float]:
        """The smallest norms that at least a share `q` of the samples does not exceed; NaN of no samples."""
        if not self.samples:
            return [float("nan")] * len(q)
        ordered = self.norms.sort().values.cpu()
        return [float(ordered[max(0, -int(-len(ordered) * share // 1) - 1)]) for share in q]

    @property
    def signal_to_noise(self) -> float:
        """Norm of the clipped sum over the norm to be expected of the noise; Inf without noise."""
        if self.signal is None:
            raise RuntimeError("signal_to_noise: was not measured; pass measure_signal=True to the DPEngine")
        noise = float(self.noise)
        return float(self.signal) / noise if noise else float("inf")
