"""Attaches the Triton kernels as the backend "triton". Triton itself is imported by the first call.

With `TRITON_INTERPRET=1` in the environment the kernels run on CPU tensors, slowly: that is for tests.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from adamix_kernels.memory import none_behind, not_writable, overlap
from adamix_kernels.ops._numerics import as_list
from adamix_kernels.ops.clip import clip_coef, clip_sum, clip_sum_noise
from adamix_kernels.ops.conv import conv_clip_sum, conv_norm_sq
from adamix_kernels.ops.embedding import embedding_clip_sum, embedding_norm_sq
from adamix_kernels.ops.head import softmax_head_clip_sum_noise
from adamix_kernels.ops.head_variants import softmax_head_coordinates
from adamix_kernels.ops.linear import linear_clip_sum, linear_norm_sq
from adamix_kernels.ops.noise import add_gaussian_noise_
from adamix_kernels.ops.norm import grad_norm_sq
from adamix_kernels.ops.quantile import norm_quantile
from adamix_kernels.ops.scale_shift import scale_shift_clip_sum, scale_shift_norm_sq
from adamix_kernels.spec import FLOAT_DTYPES
from adamix_kernels.triton.launch import interpreting

#: Of kernels that sum in float32.
_FLOAT32 = (torch.float32, torch.bfloat16, torch.float16)


@functools.cache
def unavailable() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    return None if interpreting() or torch.cuda.is_available() else "torch finds no GPU"


def _refused(*given: Any) -> str | None:
    if interpreting():  # only where it is asked for by name: it is slow, and rounds bfloat16 wrongly
        return none_behind(given, "cpu")
    reason = none_behind(given, "cuda")
    if reason is None and unavailable() is None:
        reason = _fails_on(next(x.device for x in given if isinstance(x, Tensor)))
    return reason


@functools.cache
def _fails_on(device: torch.device) -> str | None:
    """Why no kernel can run on a device: a broken installation, say, or no C compiler. Warns, once."""
    try:
        importlib.import_module("adamix_kernels.triton.norm").clip_coef(torch.ones(1, device=device), 1.0)
    except Exception as error:  # whatever an installation may raise
        reason = f"Triton fails on {device}: {type(error).__name__}: {error}"
        warnings.warn(f"adamix_kernels: {reason}. Falling back.", RuntimeWarning, stacklevel=2)
        return reason
    return None


def _large(activations: Tensor, backprops: Tensor, **_: Any) -> str | None:
    """Within a channel of one sample the kernels for convolutions count in 32 bits."""
    size = max(math.prod(x.shape[2:]) for x in (activations, backprops))
    return f"a channel of one sample has {size} elements; this backend takes 2^30" if size > 2**30 else None


def _attach(
    op: Any, module: str, refuses: Callable[..., str | None], dtypes: Sequence[torch.dtype] = FLOAT_DTYPES
) -> None:
    """`adamix_kernels.triton.<module>` has a function of the op's name."""

    @functools.cache
    def kernel() -> Callable[..., Any]:
        return getattr(importlib.import_module(f"adamix_kernels.triton.{module}"), op.name)

    @op.register("triton", device="cuda", dtypes=dtypes, unavailable=unavailable, refuses=refuses)
    def run(**arguments: Any) -> Any:
        return kernel()(**arguments)


_attach(grad_norm_sq, "norm", lambda grad_sample: _refused(*as_list(grad_sample)))
_attach(clip_coef, "norm", lambda **given: _refused(*given.values()))
_attach(clip_sum, "clip", lambda grad_sample, coef: _refused(*as_list(grad_sample), coef))
_attach(
    clip_sum_noise,
    "clip",
    lambda grad_sample, max_grad_norm, **_: _refused(*as_list(grad_sample), max_grad_norm),
)
_attach(
    add_gaussian_noise_,
    "noise",
    lambda tensor, std, **_: not_writable(tensor) or _refused(*as_list(tensor), std) or overlap(tensor),
)
_attach(norm_quantile, "quantile", lambda **given: _refused(*given.values()))
_LAYERS: list[tuple[str, tuple[Any, Any]]] = [
    ("scale_shift", (scale_shift_norm_sq, scale_shift_clip_sum)),
    ("embedding", (embedding_norm_sq, embedding_clip_sum)),
]
for _module, _ops in _LAYERS:
    for _op in _ops:
        _attach(_op, _module, lambda **given: _refused(*given.values()))
for _op in (conv_norm_sq, conv_clip_sum):
    _attach(_op, "conv", lambda **given: _large(**given) or _refused(*given.values()), _FLOAT32)
_attach(linear_norm_sq, "linear_norm", lambda **given: _refused(*given.values()), _FLOAT32)
_attach(linear_clip_sum, "linear_sum", lambda **given: _refused(*given.values()), _FLOAT32)
_attach(softmax_head_clip_sum_noise, "head", lambda **given: _refused(*given.values()), _FLOAT32)
_attach(softmax_head_coordinates, "head", lambda **given: _refused(*given.values()), _FLOAT32)
