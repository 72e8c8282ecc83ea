"""The shapes and types of what the ops of `adamix_kernels` return, of which a plan makes meta tensors.

Their references would tell too, but in as many blocks as a real batch needs, which takes minutes for a large one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from adamix_kernels.ops._numerics import as_list, sum_dtype
from adamix_kernels.ops.conv import ConvSum
from adamix_kernels.ops.conv_clip import ConvClippedSum
from adamix_kernels.ops.conv_grad import ConvGrad
from adamix_kernels.ops.linear import LinearSum
from adamix_kernels.ops.scale_shift import ScaleShiftSum

Arguments = Mapping[str, Any]


def _empty(dtype: torch.dtype, *sizes: int) -> Tensor:
    return torch.empty(sizes, dtype=dtype, device="meta")


def _of_samples(name: str) -> Callable[[Arguments], Tensor]:
    """`[B]` float32, as many as the argument `name` has rows."""
    return lambda given: _empty(torch.float32, len(as_list(given[name])[0]))


def _pair(given: Arguments, weight: Sequence[int], bias: Sequence[int]) -> tuple[Tensor, Tensor | None]:
    dtype = sum_dtype(given["activations"], given["backprops"])
    return _empty(dtype, *weight), _empty(dtype, *bias) if given["bias"] else None


def _linear(given: Arguments) -> LinearSum:
    inner, outer = given["activations"].shape[-1], given["backprops"].shape[-1]
    return LinearSum(*_pair(given, (outer, inner), (outer,)))


def _scale_shift(given: Arguments) -> ScaleShiftSum:
    width = given["activations"].shape[-1:]
    return ScaleShiftSum(*_pair(given, width, width))


def _weight(given: Arguments) -> tuple[int, ...]:
    channels = given["activations"].shape[1] // given["groups"]
    return given["backprops"].shape[1], channels, *given["kernel_size"]


def _conv(given: Arguments) -> ConvSum:
    return ConvSum(*_pair(given, _weight(given), _weight(given)[:1]))


def _conv_grad(given: Arguments) -> ConvGrad:
    samples = len(given["activations"])
    return ConvGrad(*_pair(given, (samples, *_weight(given)), (samples, _weight(given)[0])))


def _conv_norm(given: Arguments) -> ConvClippedSum:
    return ConvClippedSum(*_conv(given), _empty(torch.float64, len(given["activations"])))


def _embedding(given: Arguments) -> Tensor:
    g = given["backprops"]
    return _empty(sum_dtype(g), given["num_embeddings"], g.shape[-1])


def _clip_sum(given: Arguments) -> Any:
    parts = given["grad_sample"]
    sums = [_empty(sum_dtype(x), *x.shape[1:]) for x in as_list(parts)]
    return sums[0] if isinstance(parts, Tensor) else sums


def _grid_sum(given: Arguments) -> Any:
    parts = given["grad_sample"]
    sums = [_empty(torch.int64, *x.shape[1:]) for x in as_list(parts)]
    return sums[0] if isinstance(parts, Tensor) else sums


def _released(given: Arguments) -> Any:
    sums = given["sums"]
    found = [_empty(torch.float32, *x.shape) for x in as_list(sums)]
    return found[0] if isinstance(sums, Tensor) else found


#: By op: those that a `DPEngine` calls.
RESULTS: dict[str, Callable[[Arguments], Any]] = {
    "grad_norm_sq": _of_samples("grad_sample"),
    "clip_coef": _of_samples("norm_sq"),
    "clip_sum": _clip_sum,
    "linear_norm_sq": _of_samples("activations"),
    "linear_clip_sum": _linear,
    "conv_norm_sq": _of_samples("activations"),
    "conv_clip_sum": _conv,
    "conv_norm_clip_sum": _conv_norm,
    "conv_grad_sample": _conv_grad,
    "embedding_norm_sq": _of_samples("backprops"),
    "embedding_clip_sum": _embedding,
    "scale_shift_norm_sq": _of_samples("activations"),
    "scale_shift_clip_sum": _scale_shift,
    "add_gaussian_noise_": lambda given: given["tensor"],
    "grid_clip_sum": _grid_sum,
    "grid_release": _released,
    "norm_quantile": lambda given: _empty(torch.float32),
}
