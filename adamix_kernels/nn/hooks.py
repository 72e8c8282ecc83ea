"""Hooks that belong to one model: copies of it do not inherit them."""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import nn


class Hook:
    """Calls a method of the engine; a copied or pickled one does nothing."""

    def __init__(self, method: Callable[..., Any] | None) -> None:
        self._method = method

    def __call__(self, *args: Any) -> Any:
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
        with torch._C.DisableTorchFunctionSubclass():
            type(self._model).zero_grad(self._model, set_to_none)
        self._drop()

    def __deepcopy__(self, memo: Any) -> Any:
        return MethodType(type(self._model).zero_grad, memo.get(id(self._model), self._model))

    def __reduce__(self) -> Any:
        return getattr, (self._model, "zero_grad")
