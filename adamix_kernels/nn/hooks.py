"""Hooks that belong to one model: copies of it do not inherit them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


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
