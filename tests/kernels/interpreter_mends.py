"""Mends what is wrong with Triton's interpreter and would show in the kernels here.

It keeps bfloat16 as uint16 and converts it wrongly. The kernels compute in float32 or float64 and meet bfloat16 only
where they load and store, so the two conversions are enough; but for products of matrices, which it takes as integers.
And in Triton 3.6, numpy 2.4 refuses its loop bounds.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def _widened(x: Any) -> Any:
    return (np.asarray(x).astype(np.uint32) << 16).view(np.float32)


def _rounded(x: Any) -> Any:
    """To nearest, ties to even, as the hardware and torch do."""
    x = np.ascontiguousarray(x, dtype=np.float32)
    bits = x.view(np.uint32)
    nearest = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FC0), nearest)


def install() -> None:
    original = interpreter._convert_float

    def convert(x: Any, source: Any, target: Any, rounding_mode: Any) -> Any:
        if (source, target) == (tl.bfloat16, tl.float32):
            return _widened(x).view(np.uint32)
        if (source, target) == (tl.float32, tl.bfloat16):
            return _rounded(x.view(np.float32))
        return original(x, source, target, rounding_mode)

    interpreter._convert_float = convert
    dot = interpreter.InterpreterBuilder.create_dot

    def product(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        a, b = (
            interpreter.TensorHandle(_widened(x.data), tl.float32) if x.dtype.scalar == tl.bfloat16 else x
            for x in (a, b)
        )
        return dot(self, a, b, *rest)

    interpreter.InterpreterBuilder.create_dot = product
    patch = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

    interpreter._patch_lang_tensor = patched
