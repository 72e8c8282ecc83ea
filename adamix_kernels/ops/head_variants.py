"""The softmax classifier's step on public and private rows together, and its gradients in a subspace."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from adamix_kernels.ops._cases import randn
from adamix_kernels.ops._factored import blocks
from adamix_kernels.ops._numerics import check_number, sum_dtype
from adamix_kernels.ops.clip import check_mechanism
from adamix_kernels.ops.head import (
    HeadSum,
    check_labels,
    head_cost,
    head_oracle,
    residuals,
    softmax_head_clip_sum_noise,
)
from adamix_kernels.ops.noise import Noise
from adamix_kernels.ops.quantile import norm_quantile
from adamix_kernels.spec import Case, Cost, Out, define_op


class MixedHeadSum(NamedTuple):
    """What one step on public and private rows needs.

    `private`: the noisy sum, clipped to `max_grad_norm` (`[]` float32); its `norm_sq` and `loss` are private.
    `public`: the exact sum.
    """

    private: HeadSum
    public: HeadSum
    max_grad_norm: Tensor


def _mixed_oracle(
    *,
    public_features: Tensor,
    public_labels: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    quantile: float,
    **private: Any,
) -> MixedHeadSum:
    public = head_oracle(public_features, public_labels, weight, bias, math.inf, 0.0, None)
    threshold = norm_quantile.oracle(public.norm_sq, quantile)
    return MixedHeadSum(head_oracle(weight=weight, bias=bias, max_grad_norm=threshold, **private), public, threshold)


def _mixed_cases() -> list[Case]:
    def case(name: str, n: int, public: int, bias: bool = True, sigma: float = 0.0, strided: bool = False) -> Case:
        def build(g: torch.Generator) -> dict[str, object]:
            return {
                "features": randn(g, n, 6),
                "labels": torch.randint(0, 3, (n,), generator=g),
                "public_features": randn(g, public, 6),
                "public_labels": torch.randint(0, 3, (public,), generator=g),
                "weight": randn(g, 3, 6) * 0.3,
                "bias": randn(g, 3) if bias else None,
                "quantile": 0.6,
                "noise_multiplier": sigma,
                "noise": Noise(seed=n) if sigma else None,
            }

        return Case(name, build, strided)

    return [
        case("plain", 9, 4),
        case("noise", 7, 5, sigma=0.8),
        case("no bias, one public row", 5, 1, bias=False),
        case("empty batch", 0, 3, sigma=1.5),
        case("strided", 4, 6, strided=True),
    ]


def _check_mixed(
    labels: Tensor,
    public_features: Tensor,
    public_labels: Tensor,
    weight: Tensor,
    quantile: float,
    noise_multiplier: float,
    noise: Noise | None,
    **_: Any,
) -> None:
    check_number("quantile", quantile)
    if not 0 <= quantile <= 1:
        raise ValueError(f"quantile is {quantile}; pass a number in [0, 1]")
    if not len(public_features):
        raise ValueError("public_features has no row; the threshold needs one public row at least")
    check_labels("labels", labels, weight)
    check_mechanism(1.0, noise_multiplier, noise)
    check_labels("public_labels", public_labels, weight)


def _mixed_cost(features: Tensor, public_features: Tensor, weight: Tensor, **_: Any) -> Cost:
    private, public = head_cost(features, weight), head_cost(public_features, weight)
    return Cost(private.bytes + public.bytes, private.flops + public.flops)


@define_op(
    shapes={
        "features": "N I",
        "labels": "int:N",
        "public_features": "M I",
        "public_labels": "int:M",
        "weight": "O I",
        "bias": "O",
    },
    returns=[
        Out("private", "O I", rtol=1e-5, of_max=True),
        Out("public", "O I", rtol=1e-5, of_max=True),
        Out("max_grad_norm", "", rtol=1e-5),
    ],
    oracle=_mixed_oracle,
    cases=_mixed_cases,
    cost=_mixed_cost,
    validate=_check_mixed,
    parts=(softmax_head_clip_sum_noise, norm_quantile),
)
def softmax_head_mixed_sum(
    features: Tensor,
    labels: Tensor,
    public_features: Tensor,
    public_labels: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    quantile: float = 0.9,
    noise_multiplier: float = 0.0,
    noise: Noise | None = None,
) -> MixedHeadSum:
    """AdaMix's step on a softmax classifier: public rows set the threshold that private ones are clipped to.

    Nothing of it waits for the device.

    Args:
        features, labels: private rows `[N, I]` and classes `[N]`.
        public_features, public_labels: public rows `[M, I]`, one at least, and classes `[M]`.
        weight, bias, noise_multiplier, noise: as for `softmax_head_clip_sum_noise`.
        quantile: the threshold is this quantile of the public rows' gradient norms, in [0, 1].

    Returns:
        `MixedHeadSum(private, public, max_grad_norm)`: the clipped noisy sum, the exact sum, the threshold.

    Raises:
        TypeError, ValueError: names the argument that does not fit (its dtype, one of float32, bfloat16, float16 and
            float64; its shape; its value), what was given and what to pass.

    Source: Golatkar et al. 2022 (arXiv 2203.11481), section 4.
    """
    public = softmax_head_clip_sum_noise(public_features, public_labels, weight, bias)
    threshold = norm_quantile(public.norm_sq, quantile)
    private = softmax_head_clip_sum_noise(features, labels, weight, bias, threshold, noise_multiplier, noise)
    return MixedHeadSum(private, public, threshold)


def _coordinates_oracle(features: Tensor, labels: Tensor, weight: Tensor, bias: Tensor | None, basis: Tensor) -> Tensor:
    rows = []
    for x, y in zip(features, labels, strict=True):
        residual = (weight @ x + (0.0 if bias is None else bias)).softmax(0)
        residual[y] -= 1
        grads = [torch.outer(residual, x).flatten()] + ([] if bias is None else [residual])
        rows.append(basis @ torch.cat(grads))
    return torch.stack(rows) if rows else basis.new_zeros(0, len(basis))


def _coordinates_cases() -> list[Case]:
    def case(name: str, n: int, i: int, o: int, k: int, bias: bool = True, strided: bool = False) -> Case:
        def build(g: torch.Generator) -> dict[str, object]:
            return {
                "features": randn(g, n, i),
                "labels": torch.randint(0, o, (n,), generator=g),
                "weight": randn(g, o, i) * 0.3,
                "bias": randn(g, o) if bias else None,
                "basis": torch.linalg.qr(randn(g, o * (i + bias), k)).Q.T,
            }

        return Case(name, build, strided)

    return [
        case("plain", 9, 14, 5, 4),
        case("no bias", 6, 7, 3, 2, bias=False),
        case("empty batch", 0, 4, 3, 2),
        case("empty basis", 3, 4, 3, 0),
        case("one class", 4, 3, 1, 1),
        case("no feature", 4, 0, 3, 2),
        case("strided", 5, 6, 3, 3, strided=True),
    ]


def _check_coordinates(labels: Tensor, weight: Tensor, bias: Tensor | None, basis: Tensor, **_: Any) -> None:
    check_labels("labels", labels, weight)
    size = weight.numel() + (0 if bias is None else bias.numel())
    if basis.shape[1] != size:
        raise ValueError(f"basis has shape {list(basis.shape)}; expected [K, {size}] for the weight, then the bias")


@define_op(
    shapes={"features": "N I", "labels": "int:N", "weight": "O I", "bias": "O", "basis": "K P"},
    returns=[Out("coordinates", "N K", rtol=1e-5, of_max=True)],
    oracle=_coordinates_oracle,
    cases=_coordinates_cases,
    cost=lambda features, weight, basis, **_: Cost(
        features.numel() * features.element_size(), 2 * features.numel() * len(weight) * (1 + len(basis))
    ),
    validate=_check_coordinates,
)
def softmax_head_coordinates(
    features: Tensor, labels: Tensor, weight: Tensor, basis: Tensor, bias: Tensor | None = None
) -> Tensor:
    """Per-sample gradients of a softmax classifier in a subspace: `project` without forming them.

    Args:
        features, labels, weight, bias: as for `softmax_head_clip_sum_noise`.
        basis: orthonormal `[K, P]`, P the weight's numbers, then the bias's, as `subspace_basis` gives it.

    Returns:
        `[N, K]` float32, float64 if features, weight, bias or basis are; for `clip_sum_noise`.

    Raises:
        TypeError, ValueError: names the argument that does not fit (its dtype, one of float32, bfloat16, float16 and
            float64; its shape; its value), what was given and what to pass.
    """
    rank, classes = len(basis), len(weight)
    directions = basis.double()[:, : weight.numel()].reshape(rank * classes, weight.shape[1])
    shifts = basis.double()[:, weight.numel() :]
    dtype = sum_dtype(*(x for x in (features, weight, bias, basis) if x is not None))
    parts = [torch.zeros(0, rank, dtype=torch.float64, device=features.device)]
    for x, residual, _ in residuals(features, labels, weight, bias):
        for b in blocks(len(x), rank * classes):
            scores = (x[b] @ directions.T).unflatten(1, (rank, classes))
            coordinates = torch.einsum("nko,no->nk", scores, residual[b])
            parts.append(coordinates + residual[b] @ shifts.T if bias is not None else coordinates)
    return torch.cat(parts).to(dtype)
