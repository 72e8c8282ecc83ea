"""Rules of the functions that layers are made of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from adamix_kernels.nn.errors import PrivacyError
from adamix_kernels.nn.factors import (
    ConvFactors,
    EmbeddingFactors,
    Factors,
    LinearFactors,
    PerSample,
    ScaleShiftFactors,
)
from adamix_kernels.nn.parameter import Private, PrivateParameter
from adamix_kernels.nn.rules import Rules, plain, refuse, rule, trains
from adamix_kernels.nn.rules_generic import by_vmap


def unfolded(rules: Rules, x: Tensor) -> Tensor:
    """`[B, T, I]` of rows `[B T, I]` that are a view of something whose dimension 0 is the batch.

    Whatever the order of its other dimensions, sample b must lie in the b-th part of the memory; x reads it in order.
    """
    base, samples = x._base, rules.batch_size
    if samples is None or x.dim() != 2 or x.shape[0] == samples:
        return x
    if samples == 1:
        return x[None]
    if base is None or base.dim() < 2 or base.shape[0] != samples or base.numel() != x.numel():
        return x
    if not samples or x.shape[0] % samples or not x.is_contiguous() or base.storage_offset() != x.storage_offset():
        return x
    size = x.numel() // samples
    within = sum((n - 1) * step for n, step in zip(base.shape[1:], base.stride()[1:], strict=True))
    if size and (base.stride(0) != size or within >= size):
        return x
    return x.view(samples, -1 if size else 0, x.shape[1])


def linear_factors(transposed: bool, weight: bool, bias: bool) -> Any:
    """Builds the factors of a weight, a bias or both."""

    def build(saved: Sequence[Tensor], g: Tensor, wanted: Sequence[bool]) -> Factors:
        flags = iter(wanted)
        with_weight, with_bias = weight and next(flags), bias and next(flags)
        x = saved[0]
        g = g.reshape(*x.shape[:-1], g.shape[-1])
        if with_weight:
            return LinearFactors(x, g, with_bias, transposed)
        return PerSample([g.flatten(1, -2).sum(1) if g.dim() > 2 else g])

    return build


def _linear(rules: Rules, input: Tensor, weight: Any, bias: Any, transposed: bool, what: str) -> Any:
    x = rules.cast(unfolded(rules, input))
    rules.check_batch(x, what, weight, bias)
    matrix = plain(weight).mT if transposed else plain(weight)
    out = F.linear(rules.cast(input), matrix, plain(bias))
    return rules.tap(out, linear_factors(transposed, trains(weight), trains(bias)), [x], weight, bias)


@rule(F.linear)
def linear(rules: Rules, input: Any, weight: Any, bias: Any = None) -> Any:
    if isinstance(input, Private) or rules.is_constant(input):
        return rules.derive(F.linear(input, weight, bias), input, weight, bias)
    return _linear(rules, input, weight, bias, False, "linear()")


@rule(torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm)
def matmul(rules: Rules, input: Any, other: Any) -> Any:
    if all(isinstance(x, Private) or rules.is_constant(x) for x in (input, other)):
        return rules.derive(torch.matmul(input, other), input, other)
    if not isinstance(other, Private) or other.dim() != 2 or input.dim() < 2:
        return by_vmap(rules, torch.matmul, (input, other), {})
    return _linear(rules, input, other, None, True, "matmul()")


@rule(torch.addmm, Tensor.addmm)
def addmm(rules: Rules, input: Any, mat1: Any, mat2: Any, *, beta: float = 1, alpha: float = 1) -> Any:
    if isinstance(mat1, Private) or not isinstance(mat2, Private) or (beta, alpha) != (1, 1) or input.dim() != 1:
        return by_vmap(rules, torch.addmm, (input, mat1, mat2), {"beta": beta, "alpha": alpha})
    return _linear(rules, mat1, mat2, input, True, "addmm()")


def conv_factors(shape: dict[str, Any], weight: bool, bias: bool) -> Any:
    def build(saved: Sequence[Tensor], g: Tensor, wanted: Sequence[bool]) -> Factors:
        flags = iter(wanted)
        with_weight, with_bias = weight and next(flags), bias and next(flags)
        return ConvFactors(saved[0], g, with_bias, shape) if with_weight else PerSample([g.flatten(2).sum(2)])

    return build


def _conv(dims: int, function: Any) -> None:
    @rule(function)
    def conv(
        rules: Rules,
        input: Any,
        weight: Any,
        bias: Any = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> Any:
        if isinstance(input, Private) or input.dim() != dims + 2:
            return by_vmap(rules, function, (input, weight, bias, stride, padding, dilation, groups), {})
        x = rules.cast(input)
        rules.check_batch(x, f"conv{dims}d()", weight, bias)
        out = function(x, plain(weight), plain(bias), stride, padding, dilation, groups)
        shape = {
            "kernel_size": tuple(weight.shape[2:]),
            "stride": stride,
            "padding": padding,
            "dilation": dilation,
            "groups": groups,
        }
        return rules.tap(out, conv_factors(shape, trains(weight), trains(bias)), [x], weight, bias)


for _dims, _function in ((1, F.conv1d), (2, F.conv2d), (3, F.conv3d)):
    _conv(_dims, _function)


@rule(F.embedding)
def embedding(
    rules: Rules,
    input: Any,
    weight: Any,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Any:
    if max_norm is not None or scale_grad_by_freq or sparse:
        raise PrivacyError(
            f"{rules.names([weight])}: an embedding with max_norm, scale_grad_by_freq or sparse=True; the first "
            "changes rows without noise, the second counts ids across samples, the third leaves rows without noise: "
            "switch them off"
        )
    if padding_idx is not None and padding_idx < 0:
        padding_idx += weight.shape[0]
    entries = weight.shape[0]
    if rules.shares_positions(input, weight):
        out = F.embedding(input, weight, padding_idx)

        def pull(grads: Tensor) -> Any:
            ids = input.expand(grads.shape[0], *input.shape[input.shape[0] == 1 and input.dim() > 1 :])
            return (weight,), EmbeddingFactors(ids, grads.reshape(*ids.shape, weight.shape[1]), entries, padding_idx)

        return rules.derive(out, weight, pull=pull if isinstance(weight, PrivateParameter) else None)
    rules.check_ids(input, weight)
    out = F.embedding(input, plain(weight), padding_idx)
    return rules.tap(out, embedding_factors(entries, padding_idx), [input], weight)


def embedding_factors(entries: int, padding_idx: int | None) -> Any:
    def build(saved: Sequence[Tensor], g: Tensor, wanted: Sequence[bool]) -> Factors:
        ids = saved[0]
        return EmbeddingFactors(*((ids, g) if ids.dim() > 1 else (ids[:, None], g[:, None])), entries, padding_idx)

    return build


def wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _affine(rules: Rules, out: Tensor, x: Tensor, weight: Any, bias: Any, last: int | None, normalise: Any) -> Tensor:
    shape = tuple((weight if weight is not None else bias).shape)
    return rules.tap(out, affine_factors(shape, trains(weight), trains(bias), last, normalise), [x], weight, bias)


def affine_factors(shape: Sequence[int], weight: bool, bias: bool, last: int | None, normalise: Any) -> Any:
    """`normalise(x)` is what the weight multiplies: on the `last` axes, or on axis 1 if None."""

    def columns(y: Tensor) -> Tensor:
        return y.movedim(1, -1) if last is None else y.flatten(-last)

    def build(saved: Sequence[Tensor], g: Tensor, wanted: Sequence[bool]) -> Factors:
        flags = iter(wanted)
        with_weight, with_bias = weight and next(flags), bias and next(flags)
        if with_weight:
            return ScaleShiftFactors(columns(normalise(wide(saved[0]))), columns(g), with_bias, shape)
        g = columns(g)
        return PerSample([(g.flatten(1, -2).sum(1) if g.dim() > 2 else g).reshape(-1, *shape)])

    return build


@rule(F.layer_norm)
def layer_norm(
    rules: Rules, input: Any, normalized_shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5
) -> Any:
    shape = tuple(normalized_shape)
    if isinstance(input, Private) or rules.is_constant(input):
        return rules.derive(F.layer_norm(input, shape, weight, bias, eps), input, weight, bias)
    rules.check_normalised(input, shape, "layer_norm()", weight, bias)
    out = F.layer_norm(input, shape, plain(weight), plain(bias), eps)
    return _affine(rules, out, input, weight, bias, len(shape), lambda x: F.layer_norm(x, shape, eps=eps))


@rule(F.rms_norm)
def rms_norm(rules: Rules, input: Any, normalized_shape: Any, weight: Any = None, eps: float | None = None) -> Any:
    shape = tuple(normalized_shape)
    if isinstance(input, Private) or rules.is_constant(input):
        return rules.derive(F.rms_norm(input, shape, weight, eps), input, weight)
    rules.check_normalised(input, shape, "rms_norm()", weight)
    out = F.rms_norm(input, shape, plain(weight), eps)
    least = torch.finfo(input.dtype).eps if eps is None else eps
    return _affine(rules, out, input, weight, None, len(shape), lambda x: F.rms_norm(x, shape, eps=least))


@rule(F.group_norm)
def group_norm(
    rules: Rules, input: Any, num_groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5
) -> Any:
    rules.check_batch(input, "group_norm()", weight, bias)
    out = F.group_norm(input, num_groups, plain(weight), plain(bias), eps)
    return _affine(rules, out, input, weight, bias, None, lambda x: F.group_norm(x, num_groups, eps=eps))


@rule(F.instance_norm)
def instance_norm(
    rules: Rules,
    input: Any,
    running_mean: Any = None,
    running_var: Any = None,
    weight: Any = None,
    bias: Any = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:
    if not use_input_stats:
        return batch_norm(rules, input, running_mean, running_var, weight, bias, False, momentum, eps)
    if running_mean is not None:
        raise PrivacyError(
            f"{rules.names([weight, bias])}: instance_norm() keeps running statistics of private samples without "
            "noise; pass track_running_stats=False"
        )
    rules.check_batch(input, "instance_norm()", weight, bias)

    def normalise(x: Tensor, weight: Any = None, bias: Any = None) -> Tensor:
        if not len(x):  # on which torch.instance_norm fails
            return F.group_norm(x, x.shape[1], weight, bias, eps)
        return F.instance_norm(x, None, None, weight, bias, True, momentum, eps)

    return _affine(rules, normalise(input, plain(weight), plain(bias)), input, weight, bias, None, normalise)


@rule(F.batch_norm)
def batch_norm(
    rules: Rules,
    input: Any,
    running_mean: Any,
    running_var: Any,
    weight: Any = None,
    bias: Any = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:
    if training or running_mean is None:
        raise PrivacyError(
            f"{rules.names([weight, bias])}: batch_norm() mixes the samples of a batch; replace it by a GroupNorm, for "
            "instance with adamix_kernels.replace_batch_norm(model), or call eval() on it"
        )
    rules.check_batch(input, "batch_norm()", weight, bias)
    out = F.batch_norm(input, running_mean, running_var, plain(weight), plain(bias), False, momentum, eps)

    def normalise(x: Tensor) -> Tensor:
        return F.batch_norm(x, running_mean.to(x.dtype), running_var.to(x.dtype), eps=eps)

    return _affine(rules, out, input, weight, bias, None, normalise)


rule(Tensor.__setitem__)(refuse("it is assigned to a part of a tensor", "join them by cat() or where()"))
rule(F.embedding_bag)(refuse("embedding_bag() has no rule", "use an Embedding and a sum over its positions"))
