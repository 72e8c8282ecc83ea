"""Clipping factors of the engine's modes, from squared norms `[B]` that are rounded up."""

from __future__ import annotations

import torch
from torch import Tensor

from adamix_kernels.ops._numerics import round_down
from adamix_kernels.ops.clip import clip_coef

#: Keeps a vanishing gradient from being blown up to the threshold (Bu et al. 2022, gamma).
STABILITY = 0.01


def scaled(max_grad_norm: float | Tensor, scale: float) -> float | Tensor:
    """The threshold for gradients that are `scale` times what they should be."""
    return max_grad_norm.double() * scale if isinstance(max_grad_norm, Tensor) else max_grad_norm * scale


def factors(norm_sq: Tensor, max_grad_norm: float | Tensor, scale: float, automatic: bool) -> Tensor:
    """`[B]` float32: what each sample is multiplied with.

    `automatic` normalises every sample, C / (norm + 0.01), instead of clipping the large ones (Bu et al. 2022, arXiv
    2206.07136, AUTO-S). A sample whose norm is not finite gets 0.
    """
    threshold = scaled(max_grad_norm, scale)
    if not automatic:
        return clip_coef(norm_sq, threshold)
    coef = round_down(threshold / (norm_sq.double().sqrt() + STABILITY * scale))
    return coef.where(norm_sq.isfinite(), torch.zeros_like(coef))
