"""Per-sample norms of materialised gradients."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from adamix_kernels.ops._cases import grad_cases
from adamix_kernels.ops._numerics import as_list, round_up, sum_sq
from adamix_kernels.spec import Cost, Out, define_op


def _oracle(grad_sample: Tensor | Sequence[Tensor]) -> Tensor:
    parts = as_list(grad_sample)
    norms = [math.fsum(float((p[b] ** 2).sum()) for p in parts) for b in range(parts[0].shape[0])]
    return torch.tensor([math.inf if math.isnan(n) else n for n in norms], dtype=torch.float64)


def _cost(grad_sample: Tensor | Sequence[Tensor]) -> Cost:
    parts = as_list(grad_sample)
    return Cost(sum(p.numel() * p.element_size() for p in parts), 2 * sum(p.numel() for p in parts))


@define_op(
    shapes={"grad_sample": "B *[]"},
    returns=[Out("norm_sq", "B", rtol=1e-6, never_below=True)],
    oracle=_oracle,
    cases=grad_cases,
    cost=_cost,
)
def grad_norm_sq(grad_sample: Tensor | Sequence[Tensor]) -> Tensor:
    """Squared L2 norm of each sample's gradient over all its tensors, rounded up.

    Args:
        grad_sample: per-sample gradients `[B, *]`, or a list of such tensors (one per parameter).

    Returns:
        `[B]` float32, never below the exact value, nor below float32's smallest normal number, 1.2e-38: in rows so
        small that their squares vanish the exact value is lost, and 0 would let them through unclipped. Inf for a
        sample that holds a NaN or Inf, or whose squared norm is beyond float32's range; `clip_coef` turns that into
        a contribution of exactly zero.
    """
    parts = as_list(grad_sample)
    total = torch.stack([sum_sq(p) for p in parts]).sum(0)
    return round_up(total, terms=sum(math.prod(p.shape[1:]) for p in parts))
