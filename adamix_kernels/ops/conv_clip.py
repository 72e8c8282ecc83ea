"""A convolution's norms and clipped sum in one pass, when the norms of all other parameters are known."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor

from adamix_kernels.ops._cases import rand
from adamix_kernels.ops._factored import weight_and_bias
from adamix_kernels.ops._numerics import as_list
from adamix_kernels.ops.clip import check_mechanism, clip_coef, clip_oracle, clip_sum
from adamix_kernels.ops.conv import conv_clip_sum, conv_norm_sq, grads_of, small_cases, validate
from adamix_kernels.ops.norm import grad_norm_sq
from adamix_kernels.spec import Out, define_op


class ConvClippedSum(NamedTuple):
    """`weight`: `[O, I / groups, *kernel_size]`. `bias`: `[O]`, or None. `norm_sq`: `[B]` of everything, private."""

    weight: Tensor
    bias: Tensor | None
    norm_sq: Tensor


def _oracle(norm_sq: Tensor | Sequence[Tensor], max_grad_norm: float | Tensor, **layer: Any) -> ConvClippedSum:
    grads = grads_of(**layer)
    total = sum(as_list(norm_sq), grad_norm_sq.oracle(grads))
    sums = clip_sum.oracle(grads, clip_oracle(total, max_grad_norm))
    return ConvClippedSum(*weight_and_bias(sums), total)


def _validate(max_grad_norm: float | Tensor, **layer: Any) -> None:
    check_mechanism(max_grad_norm)
    validate(**layer)


def _others(generator: Generator, samples: int) -> list[Tensor]:
    return [rand(generator, samples) * 5 for _ in range(2)]


@define_op(
    shapes={"activations": "B I ...", "backprops": "B O ...", "norm_sq": "B[]"},
    returns=[
        Out("weight", "O I/groups kernel", rtol=1e-3, of_max=True),  # as far as the guard of the norms lowers a factor
        Out("bias", "O", rtol=1e-3, of_max=True),
        Out("norm_sq", "B", rtol=1e-3, never_below=True),
    ],
    oracle=_oracle,
    cases=lambda: small_cases(norm_sq=_others, max_grad_norm=lambda g, size: 2.5),
    cost=lambda norm_sq, max_grad_norm, **layer: conv_clip_sum.cost(**layer),
    validate=_validate,
    parts=[conv_norm_sq, clip_coef, conv_clip_sum],
)
def conv_norm_clip_sum(
    activations: Tensor,
    backprops: Tensor,
    norm_sq: Tensor | Sequence[Tensor],
    max_grad_norm: float | Tensor,
    kernel_size: Sequence[int],
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    bias: bool = False,
) -> ConvClippedSum:
    """Clipped sum of a convolution's gradients, by their norms and those of all other parameters' gradients.

    `conv_norm_sq`, `clip_coef` and `conv_clip_sum` in one: for one layer of a model, the last whose norms are unknown,
    each sample's gradient is made once instead of twice where that is how the others make it.

    Args:
        activations: the layer's inputs `[B, I, *]` with 1 to 3 spatial axes.
        backprops: gradients with respect to its outputs `[B, O, *]`.
        norm_sq: squared norms `[B]` of the gradients of all other parameters, rounded up, or a list of such that
            add up; 0 if there are no others.
        max_grad_norm: the threshold of the whole gradient, above 0 (`inf`: no clipping), or a scalar tensor on the
            same device.
        kernel_size, stride, padding, dilation, groups: as in `torch.nn.Conv2d`; the padding is with zeros.
        bias: whether the layer has a trainable bias.

    Returns:
        `ConvClippedSum(weight, bias, norm_sq)`: sums float32, float64 if activations or backprops are; `norm_sq` `[B]`
        float64 with those of this layer, from which `clip_coef` gives the factors that were used; Inf where it is not
        finite.

    Raises:
        TypeError, ValueError: names the argument that does not fit (its dtype, one of float32, bfloat16, float16 and
            float64; its shape; its value), what was given and what to pass.
    """
    settings = (kernel_size, stride, padding, dilation, groups, bias)
    own = conv_norm_sq(activations, backprops, *settings)
    total = (
        torch.stack([*as_list(norm_sq), own]).sum(0, dtype=torch.float64).nan_to_num(nan=torch.inf, posinf=torch.inf)
    )
    sums = conv_clip_sum(activations, backprops, clip_coef(total, max_grad_norm), *settings)
    return ConvClippedSum(*sums, total)
