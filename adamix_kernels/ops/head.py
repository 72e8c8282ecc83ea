"""The private step of a softmax classifier on fixed features: per-sample gradients are never formed."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from adamix_kernels.ops._cases import randn, scaled_rows, with_bad_rows
from adamix_kernels.ops._numerics import round_up, sum_dtype
from adamix_kernels.ops.clip import add_mechanism_noise_, check_mechanism, clip_coef, clip_oracle
from adamix_kernels.ops.noise import Noise, add_gaussian_noise_
from adamix_kernels.spec import Case, Cost, Out, define_op

#: Rows upcast to float64 at a time.
_ROWS = 4096
#: The smallest normal float64: more than a square loses when it underflows.
_UNDERFLOW = torch.finfo(torch.float64).tiny


class HeadSum(NamedTuple):
    """`weight` `[O, I]` and `bias` `[O]` (or None): noisy sums. `norm_sq` `[N]` and `loss` (a sum): private."""

    weight: Tensor
    bias: Tensor | None
    norm_sq: Tensor
    loss: Tensor


def head_oracle(
    features: Tensor,
    labels: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    max_grad_norm: float | Tensor,
    noise_multiplier: float,
    noise: Noise | None,
) -> HeadSum:
    def sample_loss(parameters: tuple[Tensor, ...], x: Tensor, y: Tensor) -> Tensor:
        logits = parameters[0] @ x + (parameters[1] if len(parameters) > 1 else 0.0)
        return torch.logsumexp(logits, 0) - logits[y]

    parameters = tuple(p.double() for p in (weight, bias) if p is not None)
    sums = [torch.zeros_like(p) for p in parameters]
    norms, loss = [], 0.0
    for x, y in zip(features, labels, strict=True):
        if not x.isfinite().all():
            norms.append(math.inf)
            continue
        grads, value = torch.func.grad_and_value(sample_loss)(parameters, x, y)
        norms.append(math.fsum(float((g**2).sum()) for g in grads))
        coef = float(clip_oracle(torch.tensor(norms[-1:], dtype=torch.float64), max_grad_norm))
        sums = [s + coef * g for s, g in zip(sums, grads, strict=True)]
        loss += float(value) if coef > 0 else 0.0
    if noise_multiplier and noise is not None:
        add_gaussian_noise_.oracle(sums, noise_multiplier * float(max_grad_norm), noise)
    return HeadSum(
        sums[0], sums[1] if len(sums) > 1 else None, torch.tensor(norms).double(), torch.tensor(loss).double()
    )


def _cases() -> list[Case]:
    def case(name: str, n: int, i: int, o: int, bias: bool = True, sigma: float = 0.0, kind: str = "") -> Case:
        def build(g: torch.Generator) -> dict[str, object]:
            x = randn(g, n, i)
            x = with_bad_rows(x) if kind == "bad" else scaled_rows(x) if kind == "scaled" else x
            return {
                "features": x,
                "labels": torch.randint(0, max(o, 1), (n,), generator=g),
                "weight": randn(g, o, i) * 0.3,
                "bias": randn(g, o) if bias else None,
                "max_grad_norm": math.inf if kind == "exact" else 1.5,
                "noise_multiplier": sigma,
                "noise": Noise(seed=n) if sigma else None,
            }

        return Case(name, build, strided=kind == "strided")

    return [
        case("plain", 9, 14, 5),
        case("no bias, noise", 6, 7, 3, bias=False, sigma=0.9),
        case("noise", 8, 5, 4, sigma=1.1),
        case("empty batch", 0, 4, 3, sigma=0.5),
        case("one sample, one feature", 1, 1, 2),
        case("one class", 4, 3, 1),
        case("no feature", 5, 0, 3),
        case("no class", 0, 4, 0),
        case("exact gradient", 12, 6, 4, kind="exact"),
        case("nan and inf rows", 6, 8, 3, kind="bad"),
        case("magnitudes", 5, 6, 3, kind="scaled"),
        case("strided", 7, 6, 3, kind="strided"),
        case("larger than blocks", 150, 801, 103),
    ]


def _check(labels: Tensor, weight: Tensor, **mechanism: object) -> None:
    check_mechanism(**mechanism)  # type: ignore[arg-type]
    check_labels("labels", labels, weight)


def check_labels(name: str, labels: Tensor, weight: Tensor) -> None:
    # Reading labels on a GPU would wait for it; there the gather itself fails.
    if labels.device.type == "cpu" and labels.numel():
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= weight.shape[0]:
            raise ValueError(
                f"{name} lie in [{low}, {high}]; weight has {weight.shape[0]} classes: pass labels below that"
            )


def head_cost(features: Tensor, weight: Tensor, **_: object) -> Cost:
    n, i = features.shape
    return Cost(features.numel() * features.element_size(), 4 * n * i * weight.shape[0])


@define_op(
    shapes={"features": "N I", "labels": "int:N", "weight": "O I", "bias": "O"},
    returns=[
        Out("weight", "O I", rtol=1e-5, of_max=True),
        Out("bias", "O", rtol=1e-5, of_max=True),
        Out("norm_sq", "N", rtol=1e-5, floored=True),
        Out("loss", "", rtol=1e-5),
    ],
    oracle=head_oracle,
    cases=_cases,
    cost=head_cost,
    validate=_check,
)
def softmax_head_clip_sum_noise(
    features: Tensor,
    labels: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    max_grad_norm: float | Tensor = math.inf,
    noise_multiplier: float = 0.0,
    noise: Noise | None = None,
) -> HeadSum:
    """Clipped, summed, noisy gradient of the cross-entropy of `softmax(weight @ x + bias)`.

    The gradient of one sample is (softmax - onehot) x^T, so its norm is a product of two norms.

    Args:
        features: `[N, I]`.
        labels: classes `[N]`, int32 or int64 in [0, O).
        weight: `[O, I]`.
        bias: `[O]` or None.
        max_grad_norm: the threshold tau over weight and bias together, or a scalar tensor on the same device;
            `inf` gives the exact gradient (public rows).
        noise_multiplier: noise standard deviation over tau, on the sum; 0 adds none.
        noise: source of the noise; needed unless `noise_multiplier` is 0. One draw covers weight, then bias.

    Returns:
        `HeadSum(weight, bias, norm_sq, loss)`, float32; weight and bias float64 if features, weight or bias are.
        Adding or removing one row moves (weight, bias), before the noise, by at most tau (1 + 1e-6) and rounding of
        the sum. A row with NaN or Inf contributes 0, to the loss too. `norm_sq` is not below that of the gradient as it
        is summed. That may come from logits in float32 (float64 for float64 input): the gradient of features or
        weights that differ from the given ones in their last places.

    Raises:
        TypeError, ValueError: names the argument that does not fit (its dtype, one of float32, bfloat16, float16 and
            float64; its shape; its value), what was given and what to pass.

    Source: Goodfellow 2015 (arXiv 1510.01799) for the norm; Golatkar et al. 2022 (arXiv 2203.11481) for the use.
    """
    classes, width = weight.shape
    total = torch.zeros(classes, width + 1, dtype=torch.float64, device=features.device)
    norms, losses = [], []
    for x, residual, loss in residuals(features, labels, weight, bias):
        # Large features would bring back what underflows in the squares of the residual.
        residual_sq = residual.square().sum(1) + classes * _UNDERFLOW
        norm_sq = residual_sq * (x.square().sum(1) + (bias is not None))
        norms.append(round_up(norm_sq, terms=2 * (classes + width)))
        coef = clip_coef.reference(norms[-1], max_grad_norm).double()[:, None]
        inside = coef > 0
        kept = (coef * residual).where(inside, 0.0)
        total[:, :width] += kept.T @ x.where(inside, 0.0)
        total[:, width] += kept.sum(0)
        losses.append(loss.where(inside[:, 0], 0.0).sum())
    dtype = sum_dtype(features, weight, *([] if bias is None else [bias]))
    sums = [total[:, :width].to(dtype)] + ([] if bias is None else [total[:, width].to(dtype)])
    add_mechanism_noise_(sums, max_grad_norm, noise_multiplier, noise)
    return HeadSum(sums[0], None if bias is None else sums[1], torch.cat(norms), torch.stack(losses).sum().float())


def residuals(
    features: Tensor, labels: Tensor, weight: Tensor, bias: Tensor | None
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """In float64, some rows at a time: features, softmax - onehot, loss."""
    w, b = weight.double(), None if bias is None else bias.double()
    for block, y in zip(features.split(_ROWS), labels.split(_ROWS), strict=True):
        x = block.double()
        log_p = torch.nn.functional.linear(x, w, b).log_softmax(1)
        loss = -log_p.gather(1, y.long()[:, None])[:, 0]
        yield x, log_p.exp().scatter_add(1, y.long()[:, None], -torch.ones_like(loss)[:, None]), loss
