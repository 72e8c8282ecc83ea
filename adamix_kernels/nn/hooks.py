"""Hooks that belong to one model: copies of it do not inherit them."""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch._compile import _disable_dynamo


def _call(function: Callable[..., Any], *args: Any) -> Any:
    return function(*args)


#: Calls what compiled code must not trace.
outside = _disable_dynamo(_call)
outside._torchdynamo_disable = True  # type: ignore[attr-defined]  # so that Dynamo gives the reason
outside._torchdynamo_disable_msg = "adamix_kernels: the engine's own work is never compiled"  # type: ignore[attr-defined]


class Hook:
    """Calls a method of the engine, outside of compiled code unless `traced`; a copied or pickled one does nothing."""

    def __init__(self, method: Callable[..., Any] | None, traced: bool = False) -> None:
        self._method, self._traced = method, traced

    def __call__(self, *args: Any) -> Any:
        if self._method is not None and not self._traced and torch.compiler.is_compiling():
            return outside(self._method, *args)
        return self._method(*args) if self._method is not None else None

    def __deepcopy__(self, memo: Any) -> Hook:
        return Hook(None)

    def __reduce__(self) -> Any:
        return Hook, (None,)


class ZeroGrad:
    """A model's `zero_grad`, which also drops sums; that of a copy is its own again."""

    def __init__(self, model: nn.Module, drop: Callable[[], None]) -> None:
        self._model, self._drop = model, drop

    def __call__(self, set_to_none: bool = True) -> None:
        if torch.compiler.is_compiling():
            outside(self, set_to_none)
            return
        self._drop()
        with torch._C.DisableTorchFunctionSubclass():
            type(self._model).zero_grad(self._model, set_to_none)

    def __deepcopy__(self, memo: Any) -> Any:
        return MethodType(type(self._model).zero_grad, memo.get(id(self._model), self._model))

    def __reduce__(self) -> Any:
        return getattr, (self._model, "zero_grad")
