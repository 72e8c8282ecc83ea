"""Per-sample gradients as the ops take them: in factors where they are large, one by one where they are small."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from adamix_kernels.ops._factored import positions_axis
from adamix_kernels.ops.clip import clip_sum
from adamix_kernels.ops.conv import conv_clip_sum, conv_norm_sq
from adamix_kernels.ops.conv_clip import conv_norm_clip_sum
from adamix_kernels.ops.conv_grad import conv_grad_sample
from adamix_kernels.ops.embedding import embedding_clip_sum, embedding_norm_sq
from adamix_kernels.ops.linear import linear_clip_sum, linear_norm_sq
from adamix_kernels.ops.noise import capturing
from adamix_kernels.ops.norm import grad_norm_sq
from adamix_kernels.ops.scale_shift import scale_shift_clip_sum, scale_shift_norm_sq
from adamix_kernels.spec import device_type


class Factors(Protocol):
    """Gradients of a batch with respect to one or more parameters."""

    @property
    def samples(self) -> int:
        """B."""

    def norm_sq(self) -> Tensor:
        """`[B]`: squared norms over all of its parameters, rounded up."""

    def clip_sum(self, coef: Tensor) -> list[Tensor]:
        """For each parameter the sum over samples of `coef[b]` times its gradient."""

    def grad_sample(self) -> list[Tensor]:
        """For each parameter the gradients themselves, `[B, *shape]`."""

    def take(self, rows: slice | Tensor) -> Factors:
        """Of some of the samples: views for a slice, copies for indices."""


class Taken:
    """Factors whose tensors are all `[B, *]`."""

    def take(self, rows: slice | Tensor) -> Any:
        taken = {x.name: _taken(getattr(self, x.name), rows) for x in fields(self)}  # type: ignore[arg-type]
        return replace(self, **taken)  # type: ignore[type-var]


def _taken(value: Any, rows: slice | Tensor) -> Any:
    if isinstance(value, Tensor):
        return value[rows if isinstance(rows, slice) else rows.to(value.device)]
    if isinstance(value, list | tuple):
        return [_taken(x, rows) for x in value]
    return value.take(rows) if isinstance(value, Taken) else value


@dataclass
class PerSample(Taken):
    """Gradients that are there: `[B, *shape]` for each parameter.

    Kernels for lists are sent the addresses of their tensors, which no CUDA graph that is being captured lets through:
    in one the references run, which any device does.
    """

    grads: list[Tensor]

    @property
    def samples(self) -> int:
        return self.grads[0].shape[0]

    def norm_sq(self) -> Tensor:
        op = grad_norm_sq.reference if capturing() else grad_norm_sq
        found: Tensor = op(self.grads)
        return found

    def clip_sum(self, coef: Tensor) -> list[Tensor]:
        op = clip_sum.reference if capturing() else clip_sum
        return list(op(self.grads, coef))

    def grad_sample(self) -> list[Tensor]:
        return self.grads


def per_sample(of_one: Callable[..., Any], *rows: Tensor) -> Any:
    """`of_one` of each sample's rows, stacked; what is `[B, *]` may have B = 0."""
    if rows[0].shape[0]:
        return torch.func.vmap(of_one, randomness="error")(*rows)
    return tree_map(lambda x: x[:0], torch.func.vmap(of_one)(*(row.new_zeros(1, *row.shape[1:]) for row in rows)))


def _with_bias(weight: Tensor, bias: Tensor | None) -> list[Tensor]:
    return [weight] if bias is None else [weight, bias]


@dataclass
class LinearFactors(Taken):
    """Of a weight `[O, I]`, or `[I, O]` if `transposed`, and perhaps a bias `[O]`: activations, backprops."""

    activations: Tensor  # [B, *, I]
    backprops: Tensor  # [B, *, O]
    bias: bool
    transposed: bool = False

    @property
    def samples(self) -> int:
        return self.activations.shape[0]

    def norm_sq(self) -> Tensor:
        return linear_norm_sq(self.activations, self.backprops, self.bias)

    def clip_sum(self, coef: Tensor) -> list[Tensor]:
        if self.transposed and not self.bias:  # the other way round it needs no copy
            return [linear_clip_sum(self.backprops, self.activations, coef).weight]
        weight, bias = linear_clip_sum(self.activations, self.backprops, coef, self.bias)
        return _with_bias(weight.T.contiguous() if self.transposed else weight, bias)

    def grad_sample(self) -> list[Tensor]:
        a, g = positions_axis(self.activations).to(self.backprops.dtype), positions_axis(self.backprops)
        left, right = (a, g) if self.transposed else (g, a)
        if g.shape[1] == 1:  # for which bmm is slow
            return _with_bias(left.mT * right, g[:, 0] if self.bias else None)
        return _with_bias(torch.bmm(left.mT, right), g.sum(1) if self.bias else None)


@dataclass
class ConvFactors(Taken):
    """Of a convolution's weight and perhaps a bias `[O]`; `shape` as the ops take it."""

    activations: Tensor  # [B, I, *]
    backprops: Tensor  # [B, O, *]
    bias: bool
    shape: dict[str, Any]

    @property
    def samples(self) -> int:
        return self.activations.shape[0]

    def norm_sq(self) -> Tensor:
        return conv_norm_sq(self.activations, self.backprops, **self.shape, bias=self.bias)

    def clip_sum(self, coef: Tensor) -> list[Tensor]:
        return _with_bias(*conv_clip_sum(self.activations, self.backprops, coef, **self.shape, bias=self.bias))

    @property
    def products(self) -> int:
        """Multiplications in its gradients."""
        return self.backprops.numel() * self.activations.shape[1] // self.shape["groups"] * self.kernel

    @property
    def kernel(self) -> int:
        return math.prod(self.shape["kernel_size"])

    def norm_clip_sum(self, norm_sq: list[Tensor], max_grad_norm: float | Tensor) -> tuple[Tensor, list[Tensor]]:
        """Squared norms with those of all other parameters, and the sum clipped by them."""
        norm_sq = norm_sq or [self.activations.new_zeros(self.samples)]
        total = conv_norm_clip_sum(
            self.activations, self.backprops, norm_sq, max_grad_norm, **self.shape, bias=self.bias
        )
        return total.norm_sq, _with_bias(total.weight, total.bias)

    def grad_sample(self) -> list[Tensor]:
        return _with_bias(*conv_grad_sample(self.activations, self.backprops, **self.shape, bias=self.bias))


@dataclass
class EmbeddingFactors(Taken):
    """Of a weight `[V, D]`: ids, backprops."""

    indices: Tensor  # [B, *]
    backprops: Tensor  # [B, *, D]
    num_embeddings: int
    padding_idx: int | None

    @property
    def samples(self) -> int:
        return self.indices.shape[0]

    def norm_sq(self) -> Tensor:
        return embedding_norm_sq(self.indices, self.backprops, self.padding_idx)

    def clip_sum(self, coef: Tensor) -> list[Tensor]:
        return [embedding_clip_sum(self.indices, self.backprops, coef, self.num_embeddings, self.padding_idx)]

    def grad_sample(self) -> list[Tensor]:
        ids, g = self.indices.flatten(1).long(), positions_axis(self.backprops)
        if self.padding_idx is not None:
            g = g.where((ids != self.padding_idx)[..., None], 0.0)
        weight = g.new_zeros(self.samples, self.num_embeddings, g.shape[-1])
        return [weight.scatter_add_(1, ids[..., None].expand_as(g), g)]


@dataclass
class ScaleShiftFactors(Taken):
    """Of a scale `[D]` of normalised activations and perhaps a shift `[D]`; `shape` is that of the parameters."""

    activations: Tensor  # [B, *, D]
    backprops: Tensor  # [B, *, D]
    bias: bool
    shape: Sequence[int]

    @property
    def samples(self) -> int:
        return self.activations.shape[0]

    def norm_sq(self) -> Tensor:
        return scale_shift_norm_sq(self.activations, self.backprops, self.bias)

    def clip_sum(self, coef: Tensor) -> list[Tensor]:
        sums = scale_shift_clip_sum(self.activations, self.backprops, coef, self.bias)
        return [total.view(*self.shape) for total in _with_bias(*sums)]

    def grad_sample(self) -> list[Tensor]:
        terms = [self.activations * self.backprops, self.backprops][: 1 + self.bias]
        return [positions_axis(term).sum(1).view(self.samples, *self.shape) for term in terms]


@dataclass
class StackedFactors(Taken):
    """Of parameters that are stacked along dimension 0 of slices, each of which is used by itself."""

    slices: Sequence[Factors]

    @property
    def samples(self) -> int:
        return self.slices[0].samples

    def norm_sq(self) -> Tensor:
        """The slices have no entry in common: their squares add up."""
        return torch.stack([part.norm_sq() for part in self.slices]).double().sum(0)

    def clip_sum(self, coef: Tensor) -> list[Tensor]:
        return [torch.cat(sums) for sums in zip(*(part.clip_sum(coef) for part in self.slices), strict=True)]

    def grad_sample(self) -> list[Tensor]:
        return [torch.cat(grads, 1) for grads in zip(*(part.grad_sample() for part in self.slices), strict=True)]


def owned(factors: Factors, lent: Sequence[Tensor]) -> Factors:
    """The same with copies of what shares memory with tensors that are `lent`."""
    places = {x.untyped_storage().data_ptr() for x in lent}

    def own(x: Any) -> Any:
        return x.clone() if isinstance(x, Tensor) and x.untyped_storage().data_ptr() in places else x

    if isinstance(factors, PerSample):
        return PerSample([own(grad) for grad in factors.grads])
    assert isinstance(factors, LinearFactors | ConvFactors | EmbeddingFactors | ScaleShiftFactors)
    return replace(factors, **{name: own(value) for name, value in vars(factors).items()})


_DIVISIBLE = (LinearFactors, ConvFactors, ScaleShiftFactors)
#: Gradients of so many numbers are kept in any case: one call of an op takes those of all layers.
_FEW = 1 << 16


def smaller(factors: Factors) -> Factors:
    """The gradients themselves where they are few, or smaller than the factors: faster, products are made only once."""
    if not isinstance(factors, _DIVISIBLE):
        return factors
    a, g = factors.activations, factors.backprops
    if isinstance(factors, ConvFactors):
        weights = g.shape[1] * a.shape[1] // factors.shape["groups"] * factors.kernel
        able = device_type(a) == "cpu"  # on others the op runs on its reference
    else:
        weights = g.shape[-1] * (a.shape[-1] if isinstance(factors, LinearFactors) else 1)
        able = g.dtype in (torch.float32, torch.float64)  # a product of two halves would be rounded to one
    keep = able and g.shape[0] * weights <= max(a.numel() + g.numel(), _FEW)
    return PerSample(factors.grad_sample()) if keep else factors
