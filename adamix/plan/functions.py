"""Torch functions that do otherwise on meta tensors than on the device they stand for: attention, and autocast."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

from adamix_kernels.nn.parameter import PRIVATE

#: Attention that never writes its T x T scores: what torch takes on GPUs, and on CPUs under this name.
FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu

_LOWER = {
    F.linear,
    *(getattr(F, f"conv{'_transpose' * t}{n}d") for n in (1, 2, 3) for t in (0, 1)),
    F.scaled_dot_product_attention,
    F.bilinear,
    torch.einsum,
    *(getattr(torch, name) for name in "mm bmm mv matmul addmm addmv baddbmm addbmm".split()),
    *(getattr(Tensor, name) for name in "mm bmm mv matmul addmm addmv baddbmm addbmm __matmul__ __rmatmul__".split()),
}
#: On GPUs also what normalises, exponentials, and sums.
_FLOAT32 = {
    "cpu": {F.cross_entropy, F.nll_loss, F.mse_loss, F.l1_loss, F.smooth_l1_loss, F.huber_loss, F.kl_div},
    "cuda": {
        *(F.cross_entropy, F.nll_loss, F.mse_loss, F.l1_loss, F.smooth_l1_loss, F.huber_loss, F.kl_div),
        *(F.layer_norm, F.group_norm, F.softmax, F.log_softmax, F.softplus, F.normalize, F.cosine_similarity),
        *(torch.layer_norm, torch.group_norm, torch.nn.functional.rms_norm),
        *(
            getattr(of, name)
            for of in (torch, Tensor)
            for name in "exp expm1 log log2 log10 log1p rsqrt pow sum prod cumsum cumprod norm softmax".split()
        ),
        *(Tensor.__pow__, Tensor.__rpow__),
    },
}


class Functions(TorchFunctionMode):
    """What runs inside meets them as it would on a device.

    On meta tensors `scaled_dot_product_attention` would be spelt out, with its scores in memory, and autocast would not
    be seen. Casts go by https://docs.pytorch.org/docs/stable/amp.html#autocast-op-reference; what a function that is
    not in Python makes of autocast inside (nn.LSTM, nn.MultiheadAttention) is seen no more than what it is made of.

    Args:
        device: "cpu" or "cuda", the type of device that is planned for.
    """

    def __init__(self, device: str) -> None:
        super().__init__()
        self._device = device
        self._casts: dict[tuple[int, torch.dtype], Tensor] = {}  # of parameters, as long as autocast's own

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        private = next((type(x) for x in tree_leaves((args, kwargs)) if isinstance(x, PRIVATE)), None)
        if private is not None and torch._C._is_torch_function_enabled():
            with self:  # within a rule too
                return private.__torch_function__(func, types, args, kwargs)
        if torch.is_autocast_enabled(self._device):
            half = torch.get_autocast_dtype(self._device)
            if func in _LOWER:
                args, kwargs = self._cast(half, args, kwargs)
            elif func in _FLOAT32[self._device]:
                args, kwargs = self._cast(torch.float32, args, kwargs)
        elif self._casts:
            self._casts.clear()
        if func is F.scaled_dot_product_attention:
            return _attention(*args, **kwargs)
        return func(*args, **kwargs)

    def _cast(self, dtype: torch.dtype, args: Any, kwargs: Any) -> Any:
        def cast(x: Tensor) -> Tensor:
            if not x.is_floating_point() or x.dtype in (torch.float64, dtype):
                return x
            if not (x.is_leaf and x.requires_grad):
                return x.to(dtype)
            key = id(x), dtype
            if key not in self._casts:
                self._casts[key] = x.to(dtype)
            return self._casts[key]

        with torch._C.DisableTorchFunction():
            return tree_map_only(Tensor, cast, (args, kwargs))


@contextmanager
def autocast(device: str, enabled: bool) -> Iterator[None]:
    """`torch.autocast` in bfloat16 as the engine's rules see it, also for a device that this machine has not."""
    if not enabled:
        yield
        return
    before = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    torch.set_autocast_enabled(device, True)
    torch.set_autocast_dtype(device, torch.bfloat16)
    try:
        yield
    finally:
        torch.set_autocast_enabled(device, before[0])
        torch.set_autocast_dtype(device, before[1])


@contextmanager
def again(device: str, lower: bool) -> Iterator[None]:
    """For what a backward pass computes again: modes of functions do not reach into it."""
    with Functions(device), autocast(device, lower):
        yield


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if enable_gqa:
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype)
    out: Tensor = FLASH(query, key, value, 0.0, is_causal, attn_mask=attn_mask, scale=scale)[0]
    return F.dropout(out, dropout_p) if dropout_p else out
