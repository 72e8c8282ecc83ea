"""The normals of `Noise.normal` and `csrc/normal.h` in Triton: integer streams bit for bit, the rest to rounding."""

from __future__ import annotations

import triton
import triton.language as tl

# Python floats are exact beside a float64 operand only: alone, or assigned to a name, they become float32.


@triton.jit
def double(low, high):
    """The float64 whose halves are two int32."""
    return join64(low, high).to(tl.float64, bitcast=True)


@triton.jit
def join64(low, high):
    return (high.to(tl.int64) << 32) | (low.to(tl.int64) & 0xFFFFFFFF)


@triton.jit
def _low(x):
    return (x & 0xFFFFFFFF).to(tl.uint32)


@triton.jit
def _high(x):
    return ((x >> 32) & 0xFFFFFFFF).to(tl.uint32)


@triton.jit
def _philox(k0, k1, block, draw0, draw1):
    """Philox4x32-10 (Salmon et al. 2011): the four words of each block."""
    c0, c1 = _low(block), _high(block)
    c2, c3 = tl.zeros_like(c0) + draw0, tl.zeros_like(c0) + draw1
    for _ in tl.static_range(10):
        h0, h1 = tl.umulhi(c0, 0xD2511F53), tl.umulhi(c2, 0xCD9E8D57)
        l0, l1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = h1 ^ c1 ^ k0, l1, h0 ^ c3 ^ k1, l0
        k0 += 0x9E3779B9
        k1 += 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def _mix(a, b, d, BITS: tl.constexpr):
    a += b
    d ^= a
    return a, (d << BITS) | (d >> (32 - BITS))


@triton.jit
def _quarter(a, b, c, d):
    a, d = _mix(a, b, d, 16)
    c, b = _mix(c, d, b, 12)
    a, d = _mix(a, b, d, 8)
    c, b = _mix(c, d, b, 7)
    return a, b, c, d


@triton.jit
def _in_turn(a, b, c, d):
    """`[n]`, four times, as `[4 n]`: a[0], b[0], c[0], d[0], a[1], ..."""
    return tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), [4 * a.shape[0]])


@triton.jit
def _chacha20(k0, k1, k2, k3, k4, k5, k6, k7, block, draw0, draw1):
    """ChaCha20 blocks (RFC 8439), as the words 0, 1, 2, 3 of groups of four: four tensors of 4 n words."""
    c0, c1 = _low(block), _high(block)
    zero = tl.zeros_like(c0)
    x0, x1, x2, x3 = zero + 0x61707865, zero + 0x3320646E, zero + 0x79622D32, zero + 0x6B206574
    x4, x5, x6, x7 = zero + k0, zero + k1, zero + k2, zero + k3
    x8, x9, x10, x11 = zero + k4, zero + k5, zero + k6, zero + k7
    x12, x13, x14, x15 = c0, c1, zero + draw0, zero + draw1
    for _ in range(10):
        x0, x4, x8, x12 = _quarter(x0, x4, x8, x12)
        x1, x5, x9, x13 = _quarter(x1, x5, x9, x13)
        x2, x6, x10, x14 = _quarter(x2, x6, x10, x14)
        x3, x7, x11, x15 = _quarter(x3, x7, x11, x15)
        x0, x5, x10, x15 = _quarter(x0, x5, x10, x15)
        x1, x6, x11, x12 = _quarter(x1, x6, x11, x12)
        x2, x7, x8, x13 = _quarter(x2, x7, x8, x13)
        x3, x4, x9, x14 = _quarter(x3, x4, x9, x14)
    w0 = _in_turn(x0 + 0x61707865, x4 + k0, x8 + k4, x12 + c0)
    w1 = _in_turn(x1 + 0x3320646E, x5 + k1, x9 + k5, x13 + c1)
    w2 = _in_turn(x2 + 0x79622D32, x6 + k2, x10 + k6, x14 + draw0)
    w3 = _in_turn(x3 + 0x6B206574, x7 + k3, x11 + k7, x15 + draw1)
    return w0, w1, w2, w3


@triton.jit
def _bits53(high, low):
    return (high >> 5).to(tl.int32).to(tl.float64) * 67108864.0 + (low >> 6).to(tl.int32).to(tl.float64)


@triton.jit
def _log_fraction(x):
    """Natural logarithm of a normal number in (0, 1], after fdlibm's __ieee754_log."""
    bits = x.to(tl.int64, bitcast=True)
    # The exponent for which the rest lies in [sqrt(1/2), sqrt(2)).
    exponent = ((bits + (0x3FF0000000000000 - 0x3FE6A09E667F3BCD)) >> 52) - 1023
    f = (bits - (exponent << 52)).to(tl.float64, bitcast=True) - 1.0
    s = f / (f + 2.0)
    z = s * s
    half = 0.5 * f * f
    e = exponent.to(tl.int32).to(tl.float64)
    r = 1.479819860511658591e-01 * z + 1.531383769920937332e-01
    r = r * z + 1.818357216161805012e-01
    r = r * z + 2.222219843214978396e-01
    r = r * z + 2.857142874366239149e-01
    r = r * z + 3.999999999940941908e-01
    r = r * z + 6.666666666666735130e-01
    return e * 6.93147180369123816490e-01 - ((half - (s * (half + r * z) + e * 1.90821492927058770002e-10)) - f)


@triton.jit
def _normal_pair(w0, w1, w2, w3):
    """Two independent normals from four random words, by Box-Muller."""
    radius = tl.sqrt(-2.0 * _log_fraction((_bits53(w0, w1) + 1.0) * 1.1102230246251565e-16))  # 2^-53
    turns = _bits53(w2, w3) * 4.440892098500626e-16  # 2^-51: quarter turns, in [0, 4)
    quarter = (turns + 0.5).to(tl.int32)
    a = (turns - quarter.to(tl.float64)) * 1.57079632679489661923  # in [-pi/4, pi/4]
    s = a * a
    sine = 1.58969099521155010221e-10 * s - 2.50507602534068634195e-08  # fdlibm's __kernel_sin, _cos
    sine = sine * s + 2.75573137070700676789e-06
    sine = sine * s - 1.98412698298579493134e-04
    sine = sine * s + 8.33333333332248946124e-03
    sine = sine * s - 1.66666666666666324348e-01
    sine = a + a * s * sine
    cosine = -1.13596475577881948265e-11 * s + 2.08757232129817482790e-09
    cosine = cosine * s - 2.75573143513906633035e-07
    cosine = cosine * s + 2.48015872894767294178e-05
    cosine = cosine * s - 1.38888888888741095749e-03
    cosine = cosine * s + 4.16666666666666019037e-02
    cosine = 1.0 - 0.5 * s + s * s * cosine
    swap = (quarter & 1) != 0
    x, y = tl.where(swap, sine, cosine), tl.where(swap, cosine, sine)
    even = radius * tl.where(((quarter + 1) & 2) != 0, -x, x)
    odd = radius * tl.where((quarter & 2) != 0, -y, y)
    return even, odd


@triton.jit
def normals(k0, k1, k2, k3, k4, k5, k6, k7, draw0, draw1, first, WIDTH: tl.constexpr, UNIT: tl.constexpr):
    """Elements first .. first + WIDTH of a draw; `first` is a multiple of UNIT: 2 for Philox, 8 for ChaCha20."""
    k0, k1, draw0, draw1 = k0.to(tl.uint32), k1.to(tl.uint32), draw0.to(tl.uint32), draw1.to(tl.uint32)
    block = first // UNIT + tl.arange(0, WIDTH // UNIT)
    if UNIT == 8:
        k2, k3, k4 = k2.to(tl.uint32), k3.to(tl.uint32), k4.to(tl.uint32)
        k5, k6, k7 = k5.to(tl.uint32), k6.to(tl.uint32), k7.to(tl.uint32)
        w0, w1, w2, w3 = _chacha20(k0, k1, k2, k3, k4, k5, k6, k7, block, draw0, draw1)
    else:
        w0, w1, w2, w3 = _philox(k0, k1, block, draw0, draw1)
    even, odd = _normal_pair(w0, w1, w2, w3)
    return tl.interleave(even, odd)
