"""Values computed from private rows without noise: marked, so that none is logged or returned by accident.

A mark, not a wall: it stops what happens unthinking (an f-string, a logger, JSON, a comparison that stops training
early), not a programmer who looks for the value. Where it is wanted, `reveal()` gives it, and says what that means.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, Generic, NoReturn, TypeVar

T = TypeVar("T")


class OutsideGuaranteeWarning(UserWarning):
    """What is read now was computed from private rows without noise: no (epsilon, delta) covers its publication."""


class Private(Generic[T]):
    """A value computed from private rows without noise, for instance a norm, a clipped fraction, a private loss.

    Only its repr shows, and that without the value. To print, format, convert, compare, iterate, calculate with, copy,
    pickle or JSON-serialise it raises a TypeError that names it; `reveal()` returns it.

    Args:
        name: what it is, as messages call it.
        compute: makes the value; called at each `reveal()`, so that until then nothing waits for a device.
    """

    __slots__ = ("_compute", "name")

    def __init__(self, name: str, compute: Callable[[], T]) -> None:
        self.name, self._compute = name, compute

    def reveal(self) -> T:
        """The value, with an `OutsideGuaranteeWarning`: by Python's own filter once for each line that calls this."""
        warnings.warn(
            f"{self.name}: computed from private rows without noise; what is done with it is outside the guarantee",
            OutsideGuaranteeWarning,
            stacklevel=2,
        )
        return self._compute()

    def refuse(self, what: str) -> NoReturn:
        """Raise the TypeError that says why not, and what to do."""
        raise TypeError(refusal(self.name, what))

    def __repr__(self) -> str:
        return f"<private {self.name}, outside the guarantee; call reveal()>"

    def __getattr__(self, attribute: str) -> NoReturn:
        # An AttributeError, so that hasattr() still answers.
        raise AttributeError(refusal(self.name, f"its attribute {attribute!r} cannot be read"))

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> NoReturn:
        name = next((value.name for value in args if isinstance(value, Private)), "an argument")
        raise TypeError(refusal(name, "torch cannot calculate with it"))


def refusal(name: str, what: str) -> str:
    return (
        f"{name}: was computed from private rows without noise, so {what}; call reveal() to get the value, which is "
        "outside the privacy guarantee"
    )


def _refuse(what: str) -> Callable[..., NoReturn]:
    def method(self: Private[Any], *_: Any, **__: Any) -> NoReturn:
        self.refuse(what)

    return method


_REFUSED = {
    "it cannot be printed or formatted": "str format bytes",
    "it cannot be converted to a number or array": "float int index complex bool round trunc floor ceil array",
    "it cannot be compared or be a key": "eq ne lt le gt ge hash",
    "it cannot be taken apart": "len iter next getitem contains reversed",
    "it cannot be copied, pickled or saved": "reduce reduce_ex getstate copy deepcopy",
    "it cannot be calculated with": " ".join(
        prefix + name
        for name in "add sub mul matmul truediv floordiv mod divmod pow and or xor lshift rshift".split()
        for prefix in ("", "r")
    )
    + " neg pos abs invert",
}
for _what, _names in _REFUSED.items():
    for _name in _names.split():
        setattr(Private, f"__{_name}__", _refuse(_what))
