"""Per-sample gradients of a convolution, for layers whose weight is small beside what goes through them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from adamix_kernels.ops._factored import blocks, layer_cost, weight_and_bias
from adamix_kernels.ops._numerics import sum_dtype
from adamix_kernels.ops.conv import conv_axes, flops_of, grads_of, grouped, small_cases, unit_of, validate, windows
from adamix_kernels.spec import Cost, Out, define_op


class ConvGrad(NamedTuple):
    """`weight`: `[B, O, I / groups, *kernel_size]`. `bias`: `[B, O]`, or None."""

    weight: Tensor
    bias: Tensor | None


def _cost(activations: Tensor, backprops: Tensor, kernel_size: Sequence[int], groups: int = 1, **_: object) -> Cost:
    outputs = backprops.shape[1] * activations.shape[1] // groups * torch.Size(kernel_size).numel()
    flops = activations.shape[0] * flops_of(activations, backprops, kernel_size, groups)[1]
    return layer_cost(activations, backprops, flops, activations.shape[0] * outputs)


@define_op(
    shapes={"activations": "B I ...", "backprops": "B O ..."},
    returns=[Out("weight", "B O I/groups kernel", rtol=1e-6, of_max=True), Out("bias", "B O", rtol=1e-6, of_max=True)],
    oracle=lambda **layer: weight_and_bias(grads_of(**layer)),
    # A NaN or Inf stays in its sample's gradient, whose norm tells; there is nothing to compare it with.
    cases=lambda: [case for case in small_cases() if not case.name.startswith(("nan", "magnitudes"))],
    cost=_cost,
    validate=validate,
)
def conv_grad_sample(
    activations: Tensor,
    backprops: Tensor,
    kernel_size: Sequence[int],
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    bias: bool = False,
) -> ConvGrad:
    """Each sample's gradient of a convolution.

    Args:
        activations: the layer's inputs `[B, I, *]` with 1 to 3 spatial axes.
        backprops: gradients with respect to its outputs `[B, O, *]`.
        kernel_size, stride, padding, dilation, groups: as in `torch.nn.Conv2d`; the padding is with zeros.
        bias: whether to give the gradient of the bias too.

    Returns:
        `ConvGrad(weight, bias)` float32, float64 if activations or backprops are. `grad_norm_sq` and `clip_sum` of them
        need no guard: they are what is summed. That is cheaper than `conv_norm_sq` and `conv_clip_sum`, which make the
        products twice, where B times the weight is small.

    Raises:
        TypeError, ValueError: names the argument that does not fit (its dtype, one of float32, bfloat16, float16 and
            float64; its shape; its value), what was given and what to pass.
    """
    axes, (outputs, inputs) = (
        conv_axes(kernel_size, stride, padding, dilation),
        (backprops.shape[1], activations.shape[1]),
    )
    dtype = sum_dtype(activations, backprops)
    parts = [
        (grouped(backprops[b], groups).mT.double() @ windows(activations[b], axes, groups).double()).to(dtype)
        for b in blocks(activations.shape[0], unit_of(activations, backprops, kernel_size))
    ]
    weight = torch.cat(parts).reshape(len(activations), outputs, inputs // groups, *kernel_size)
    return ConvGrad(weight, backprops.flatten(2).sum(2, dtype=torch.float64).to(dtype) if bias else None)
