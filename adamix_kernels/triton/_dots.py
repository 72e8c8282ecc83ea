"""Products of tiles in float32 whatever their types, and what keeps the operands in its range."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# No narrow number is made float32 for a product with float32 in a kernel: for 10.0, Triton multiplies these in TF32
# whatever it is told (its issue 10176). `alike` does it before.
#
# A chain is what is added up in one float32 accumulator before that goes to another: 64 terms at most. On tensor cores
# each 17 terms, 16 products and the sum so far, may be cut at 2^-24 of the largest: (17 / 16 + 1 / 8) 64 2^-24 and less
# of the sum of the products' sizes. Of multiply-adds each rounds by half of that. The 64 + 16 of `float32_error` is
# above both, and above what is left of it by 1 / 2 for fewer terms.


@triton.jit
def _thirds(x):
    """Float32 as three bfloat16 that add up to it, 8 bits each, but for what is below bfloat16's smallest number."""
    high = x.to(tl.bfloat16)
    rest = x - high.to(tl.float32)
    middle = rest.to(tl.bfloat16)
    return high, middle, (rest - middle.to(tl.float32)).to(tl.bfloat16)


@triton.jit
def product(x, y, chain):
    """`chain + x @ y` in float32: operands of one type, or float32 beside bfloat16 as three exact products.

    The smallest comes first: where `chain` is 0, the other two are cut at 2^-8 and 2^-16 of what the last is. So there
    a chain is one such product.
    """
    if x.dtype == y.dtype:
        return tl.dot(x, y, chain, input_precision="ieee")
    elif x.dtype == tl.float32:
        high, middle, low = _thirds(x)
        return tl.dot(high, y, tl.dot(middle, y, tl.dot(low, y, chain)))
    else:
        high, middle, low = _thirds(y)
        return tl.dot(x, high, tl.dot(x, middle, tl.dot(x, low, chain)))


@triton.jit
def tile(matrix, row, rows, col, cols):
    """`[R, C]` of a row-major matrix, 0 outside of it."""
    inside = (row < rows)[:, None] & (col < cols)[None, :]
    return tl.load(matrix + row.to(tl.int64)[:, None] * cols + col[None, :], inside, 0.0)


@triton.jit
def inner_products(x, row, rows, y, other, others, width, DEPTH: tl.constexpr, CHAIN: tl.constexpr):
    """Float32 `[R, S]`: rows of `x [rows, width]` times rows of `y [others, width]`.

    Two products at least in a chain of one type: the compiler makes `total + x @ y` one chain from end to end.
    """
    total = tl.zeros([row.shape[0], other.shape[0]], tl.float32)
    for first in range(0, width, CHAIN):
        chain = tl.zeros([row.shape[0], other.shape[0]], tl.float32)
        for link in tl.static_range(CHAIN // DEPTH):
            col = first + link * DEPTH + tl.arange(0, DEPTH)
            left, right = tile(x, row, rows, col, width), tile(y, other, others, col, width)
            chain = product(left, tl.trans(right), chain)
        total += chain
    return total


@triton.jit
def outer_products(a, inner, i, g, outer, o, first, stop, DEPTH: tl.constexpr, CHAIN: tl.constexpr):
    """Float32 `[O, I]`: one chain, the sum over positions from `first` of g_t a_t^T."""
    chain = tl.zeros([o.shape[0], i.shape[0]], tl.float32)
    for link in tl.static_range(CHAIN // DEPTH):
        t = first + link * DEPTH + tl.arange(0, DEPTH)
        chain = product(tl.trans(tile(g, t, stop, o, outer)), tile(a, t, stop, i, inner), chain)
    return chain


@triton.jit
def _power(exponent):
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _exponent(x):
    return (x.to(tl.int32, bitcast=True) >> 23) - 127


@triton.jit
def balanced(coef, length):
    """Two factors of `coef`, one for a row of that length, the other, a power of two, for its partner.

    `coef` times the row might underflow while its partner is large. So the row is made about 1 long, where that takes
    from its partner; and 2^-20 where that would make the partner small, as bfloat16 is exact from 2^-126 on only.
    """
    size = _exponent(coef) + tl.minimum(tl.maximum(_exponent(length), -100), 100)
    shift = tl.maximum(tl.where(size < 0, tl.minimum(size + 20, 0), size), -126)
    return coef * _power(-shift), _power(shift)


def alike(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """In types that `product` takes."""
    if x.dtype == y.dtype or {x.dtype, y.dtype} == {torch.bfloat16, torch.float32}:
        return x, y
    return x.float(), y.float()
