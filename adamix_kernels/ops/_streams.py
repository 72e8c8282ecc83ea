"""Counter-based random words in torch: Philox4x32-10 and ChaCha20, on 32-bit values held in int64.

Both map (key, draw, word index) to words; the counter holds the block index in its low half, the draw in its high.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_CHACHA_CONSTANTS = (0x61707865, 0x3320646E, 0x79622D32, 0x6B206574)  # "expand 32-byte k"


def philox(key: Sequence[int], draw: int, first: int, count: int, device: torch.device | str = "cpu") -> Tensor:
    """Words `first .. first + count` of a draw: `[count]` int64 in [0, 2^32). Salmon et al. 2011, 10 rounds."""
    skip, blocks = _blocks(first, count, 4, device)
    words = philox_block(key, _low(blocks), _high(blocks), _fill(draw, blocks), _fill(draw >> 32, blocks))
    return torch.stack(words, dim=1).view(-1)[skip : skip + count]


def philox_block(key: Sequence[int], c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor) -> tuple[Tensor, ...]:
    k0, k1 = key
    for _ in range(10):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # modulo 2^64
        c0, c1, c2, c3 = _high(p1) ^ c1 ^ k0, _low(p1), _high(p0) ^ c3 ^ k1, _low(p0)
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    return c0, c1, c2, c3


def chacha20(key: Sequence[int], draw: int, first: int, count: int, device: torch.device | str = "cpu") -> Tensor:
    """Words `first .. first + count` of a draw: `[count]` int64 in [0, 2^32). RFC 8439 blocks."""
    skip, blocks = _blocks(first, count, 16, device)
    words = chacha20_block(key, [_low(blocks), _high(blocks), _fill(draw, blocks), _fill(draw >> 32, blocks)])
    return words.T.reshape(-1)[skip : skip + count]


def chacha20_block(key: Sequence[int], counter_and_nonce: Sequence[Tensor]) -> Tensor:
    """The block function: words `[16, n]` for n counters."""
    like = counter_and_nonce[0]
    rows = [_fill(word, like) for word in (*_CHACHA_CONSTANTS, *key)] + list(counter_and_nonce)
    start = torch.stack(rows).view(4, 4, -1)
    a, b, c, d = start
    for _ in range(10):
        a, b, c, d = _quarter_rounds(a, b, c, d)
        a, b, c, d = _quarter_rounds(a, b.roll(-1, 0), c.roll(-2, 0), d.roll(-3, 0))
        b, c, d = b.roll(1, 0), c.roll(2, 0), d.roll(3, 0)
    return ((torch.stack([a, b, c, d]) + start) & _MASK).view(16, -1)


def _quarter_rounds(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    a = (a + b) & _MASK
    d = _rotate(d ^ a, 16)
    c = (c + d) & _MASK
    b = _rotate(b ^ c, 12)
    a = (a + b) & _MASK
    d = _rotate(d ^ a, 8)
    c = (c + d) & _MASK
    b = _rotate(b ^ c, 7)
    return a, b, c, d


def _rotate(x: Tensor, bits: int) -> Tensor:
    return ((x << bits) | (x >> (32 - bits))) & _MASK


def _low(x: Tensor) -> Tensor:
    return x & _MASK


def _high(x: Tensor) -> Tensor:
    return (x >> 32) & _MASK


def _fill(word: int, like: Tensor) -> Tensor:
    return torch.full_like(like, word & _MASK)


def _blocks(first: int, count: int, size: int, device: torch.device | str) -> tuple[int, Tensor]:
    """The block indices that cover the words asked for, and the words to skip in the first block."""
    start = first // size
    stop = -(-(first + count) // size)
    return first - start * size, torch.arange(start, stop, dtype=torch.int64, device=device)
