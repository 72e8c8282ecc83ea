"""What the samples of a step were like: values without noise, each marked as `Private`."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from adamix_kernels.private import Private, refusal


class Metrics:
    """Of one step's samples. Each property is a `Private` value: read it with `reveal()`.

    Its tensors stay on their device; only `reveal()` waits for it.
    """

    def __init__(
        self,
        norm_sq: Sequence[Tensor],  # [B] of each backward pass, rounded up
        thresholds: Sequence[float | Tensor],  # of each backward pass
        sums: Sequence[Tensor],
        std: float | Tensor,
        measure_signal: bool,
    ) -> None:
        self._norm_sq, self._thresholds = tuple(norm_sq), tuple(thresholds)
        self._signal = get_total_norm(sums) if measure_signal else None  # norm of the clipped sum
        self._noise = std * sum(x.numel() for x in sums) ** 0.5  # root of the expected square norm

    @functools.cached_property
    def _norms(self) -> Tensor:
        return torch.cat([x.double().sqrt() for x in self._norm_sq]) if self._norm_sq else torch.zeros(0)

    @property
    def norms(self) -> Private[Tensor]:
        """`[B]` float64 of all backward passes, not clipped; Inf where a gradient is not finite."""
        return Private("norms", lambda: self._norms)

    @property
    def samples(self) -> Private[int]:
        """How many took part: of a Poisson batch that is private too."""
        return Private("samples", lambda: len(self._norms))

    @property
    def clipped_fraction(self) -> Private[float]:
        """Of samples whose norm is above the threshold of the whole gradient; 0 of no samples."""
        return Private("clipped_fraction", self._clipped_fraction)

    def _clipped_fraction(self) -> float:
        above = [(x.double().sqrt() > c).sum() for x, c in zip(self._norm_sq, self._thresholds, strict=False)]
        return float(torch.stack(above).sum()) / max(len(self._norms), 1) if above else 0.0

    def norm_quantiles(self, q: Sequence[float] = (0.05, 0.25, 0.5, 0.75, 0.95)) -> Private[list[float]]:
        """The smallest norms that at least a share `q` of the samples does not exceed; NaN of no samples."""
        shares = tuple(q)

        def quantiles() -> list[float]:
            if not len(self._norms):
                return [float("nan")] * len(shares)
            ordered = self._norms.sort().values.cpu()
            return [float(ordered[max(0, -int(-len(ordered) * share // 1) - 1)]) for share in shares]

        return Private("norm_quantiles", quantiles)

    @property
    def signal_to_noise(self) -> Private[float]:
        """Norm of the clipped sum over the norm to be expected of the noise; Inf without noise."""
        signal = self._signal
        if signal is None:
            raise RuntimeError("signal_to_noise: was not measured; pass measure_signal=True to the DPEngine")

        def ratio() -> float:
            noise = float(self._noise)
            return float(signal) / noise if noise else float("inf")

        return Private("signal_to_noise", ratio)

    def __repr__(self) -> str:
        return "<private metrics of a step, outside the guarantee; call reveal() on each>"

    def __reduce_ex__(self, *_: Any) -> NoReturn:
        raise TypeError(refusal("metrics", "they cannot be copied, pickled or saved"))
