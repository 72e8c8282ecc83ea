"""Counter-based Gaussian noise: the same values on every backend, never the same pair of key and counter twice.

A draw is one vector of noise. Each call takes the next draw number of its `Noise`; element e of the draw comes from
words 4(e // 2) .. 4(e // 2) + 3 of the stream (key, draw), by Box-Muller with 53-bit uniforms.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import os
import threading
import warnings
from collections.abc import Sequence
from typing import Any, ClassVar, NoReturn

import torch
from torch import Tensor

from adamix_kernels.ops import _streams
from adamix_kernels.ops._cases import randn
from adamix_kernels.ops._numerics import as_list, check_number
from adamix_kernels.spec import Case, Cost, Out, define_op

#: Normals made at a time: bounds the memory of the integer words.
_CHUNK = 1 << 20


class FastNoiseWarning(UserWarning):
    """Data are about to be protected by noise of mode "fast"."""


def warn_if_fast(mode: str, *, stacklevel: int) -> None:
    """Said where training starts, by Python's own filter once for each line that starts it."""
    if mode == "fast":
        warnings.warn(
            'noise: mode "fast" is not hardened against attacks on floating point or on its generator; for releases '
            'that must be, use mode "secure"',
            FastNoiseWarning,
            stacklevel=stacklevel + 1,
        )


class Noise:
    """A source of Gaussian noise, keyed once and counting its draws.

    Args:
        seed: None takes the key from the operating system. A number makes the noise reproducible, and so known to
            whoever knows the number: for tests and benchmarks, not for a release.
        mode: "fast" is Philox4x32-10 (Salmon et al. 2011), statistically sound but not cryptographic, nor hardened
            against attacks on floating point; "secure" is ChaCha20 (RFC 8439) and takes no seed. Of the ops only
            `grid_clip_sum` with `grid_release` are hardened against these, and what uses them when it is given secure
            noise: `DPEngine` and AdaMix. The others add either noise in floating point.

    A `Noise` cannot be copied, pickled or used after `fork`: each would draw the same noise twice.
    """

    _forks: ClassVar[int] = 0  # behind this process; its id alone could be that of a process that ended

    def __init__(self, seed: int | None = None, mode: str = "fast") -> None:
        if mode not in ("fast", "secure"):
            raise ValueError(f"mode: is {mode!r}; pass 'fast' or 'secure'")
        if mode == "secure" and seed is not None:
            raise ValueError(f"seed: is {seed} with mode='secure', whose key comes from the operating system; drop it")
        if seed is not None and not isinstance(seed, int):
            raise TypeError(f"seed: is {type(seed).__name__}; pass an int, or None for a key of the operating system")
        key = os.urandom(32) if seed is None else hashlib.blake2b(str(seed).encode(), digest_size=32).digest()
        self._start(key, mode)

    @classmethod
    def _with_key(cls, key: bytes, mode: str) -> Noise:
        """A source with a chosen 32-byte key: test vectors, and ranks that share one stream."""
        source = cls.__new__(cls)
        source._start(key, mode)
        return source

    @classmethod
    def _at(cls, words: Sequence[int], mode: str, draws: int) -> Noise:
        """The source of another process of the same job, which draws other parts of the same draws."""
        source = cls._with_key(bytes(32), mode)
        source._key, source._draws = list(words), draws
        return source

    def _start(self, key: bytes, mode: str) -> None:
        words = [int.from_bytes(key[i : i + 4], "little") for i in range(0, 32, 4)]
        self.mode = mode
        self._key = words if mode == "secure" else words[:2]
        self._draws = 0
        self._lock = threading.Lock()
        self._process = self._this_process()

    @classmethod
    def _this_process(cls) -> tuple[int, int]:
        return os.getpid(), cls._forks

    @classmethod
    def _count_fork(cls) -> None:
        cls._forks += 1

    def next_draw(self) -> int:
        """Reserve a draw number; no other call gets it."""
        if self._this_process() != self._process:
            raise RuntimeError("noise: this Noise was made before a fork and would repeat draws; make one per process")
        with self._lock:
            self._draws += 1
            return self._draws - 1

    def normal(self, draw: int, start: int, count: int, device: torch.device | str = "cpu") -> Tensor:
        """Standard normals `start .. start + count` of a reserved draw: `[count]` float64."""
        first, last = start // 2, (start + count + 1) // 2
        words = self._words(draw, 4 * first, 4 * (last - first), device).view(-1, 4)
        radius = (-2.0 * ((_uniform_bits(words[:, 0], words[:, 1]) + 1).double() * 2.0**-53).log()).sqrt()
        angle = _uniform_bits(words[:, 2], words[:, 3]).double() * (2.0**-53 * 2.0 * math.pi)
        pairs = torch.stack([radius * angle.cos(), radius * angle.sin()], dim=1).view(-1)
        return pairs[start - 2 * first :][:count]

    def uniform(self, count: int, device: torch.device | str = "cpu") -> Tensor:
        """A draw of `count` uniforms in [0, 1) with 53 bits, float64: for sampling that must stay secret."""
        words = self._words(self.next_draw(), 0, 2 * count, device).view(-1, 2)
        return _uniform_bits(words[:, 0], words[:, 1]).double() * 2.0**-53

    def _words(self, draw: int, first: int, count: int, device: torch.device | str) -> Tensor:
        stream = _streams.chacha20 if self.mode == "secure" else _streams.philox
        return stream(self._key, draw, first, count, device)

    def __repr__(self) -> str:
        return f"Noise(mode={self.mode!r}, draws={self._draws})"

    def __reduce__(self) -> NoReturn:
        raise TypeError("noise: a Noise cannot be copied or pickled, both would repeat its draws; make a new Noise()")


if hasattr(os, "register_at_fork"):  # not on Windows, where nothing forks
    os.register_at_fork(after_in_child=Noise._count_fork)


def coin_rate(rate: float) -> float:
    """A probability rounded down to a multiple of 2^-53: `Noise.uniform` is below it that often, and not oftener."""
    return math.floor(rate * 2.0**53) * 2.0**-53


def _uniform_bits(high: Tensor, low: Tensor) -> Tensor:
    """53 random bits of two 32-bit words."""
    return ((high >> 5) << 26) | (low >> 6)


def _oracle(tensor: Any, std: float | Tensor, noise: Noise, offsets: Sequence[int] | None = None) -> Any:
    draw = noise.next_draw()
    for part, offset in zip(as_list(tensor), places(as_list(tensor), offsets), strict=True):
        for i in range(part.numel()):
            z = noise.normal(draw, offset + i, 1)
            part.view(-1)[i] += float(std) * float(z)
    return tensor


def _cases() -> list[Case]:
    def case(
        name: str,
        *shapes: tuple[int, ...],
        std: Any = 0.7,
        secure: bool = False,
        strided: bool = False,
        offsets: list[int] | None = None,
    ) -> Case:
        def build(g: torch.Generator) -> dict[str, Any]:
            tensors = [randn(g, *shape) for shape in shapes]
            noise = Noise._with_key(bytes(range(32)), "secure") if secure else Noise(seed=5)
            tensor = tensors if len(tensors) > 1 else tensors[0]
            return {"tensor": tensor, "std": std, "noise": noise, "offsets": offsets}

        return Case(name, build, strided)

    return [
        case("plain", (5, 13)),
        case("secure", (70,), secure=True),
        case("one number", (1,)),
        case("empty", (0, 4)),
        case("odd list", (3,), (0,), (2, 5), (1,), (7,)),
        case("std tensor", (9,), std=torch.tensor(1.5, dtype=torch.float64)),
        case("strided", (4, 6), strided=True),
        case("parts of a draw", (3, 7), (0,), (5,), (70,), offsets=[129, 7, 3, 2**33 + 1]),
        case("secure parts", (3, 7), (21,), secure=True, offsets=[21, 0]),
    ]


def places(parts: Sequence[Tensor], offsets: Sequence[int] | None) -> list[int]:
    """Where in the draw each part of a list begins: one behind the other unless `offsets` says otherwise."""
    sizes = [part.numel() for part in parts]
    return [0, *itertools.accumulate(sizes)][: len(sizes)] if offsets is None else list(offsets)


def check_offsets(parts: Sequence[Tensor], offsets: Sequence[int] | None) -> None:
    """No number of a draw may be used twice: the difference of both sums would have no noise."""
    if offsets is None:
        return
    if not isinstance(offsets, list | tuple) or not all(type(at) is int for at in offsets):
        raise TypeError(f"offsets is {offsets!r}; pass a list of int, one for each tensor")
    if len(offsets) != len(parts) or min(offsets, default=0) < 0:
        raise ValueError(f"offsets is {list(offsets)}; pass {len(parts)} numbers >= 0, one for each tensor")
    taken = sorted((at, at + part.numel()) for at, part in zip(offsets, parts, strict=True) if part.numel())
    if any(end > start for (_, end), (start, _) in itertools.pairwise(taken)):
        raise ValueError(f"offsets is {list(offsets)}: tensors would get the same noise; let their ranges not overlap")
    if taken and taken[-1][1] > 2**62:
        raise ValueError(f"offsets is {list(offsets)}; a draw has 2^62 numbers")


def _check(tensor: Any, std: float | Tensor, noise: Noise | None, offsets: Sequence[int] | None) -> None:
    check_noise(tensor, std, noise)
    check_offsets(as_list(tensor), offsets)


def check_noise(tensor: Any, std: float | Tensor, noise: Noise | None) -> None:
    check_number("std", std, scalar_tensor=True)
    for part in () if tensor is None else as_list(tensor):
        if 0 in part.stride() and any(s == 0 and n > 1 for s, n in zip(part.stride(), part.shape, strict=True)):
            raise ValueError("tensor is expanded: some of its elements are the same number; pass tensor.clone()")
    if not isinstance(std, Tensor) and not 0 <= std < math.inf:
        raise ValueError(f"std is {std}; pass a finite number >= 0")
    if not isinstance(noise, Noise):
        raise TypeError(f"noise is {type(noise).__name__}; pass adamix_kernels.Noise()")


@define_op(
    shapes={"tensor": "...[]"},
    returns=[Out("tensor", "...", rtol=1e-6, of_max=True)],
    oracle=_oracle,
    cases=_cases,
    cost=lambda tensor, **_: Cost(2 * sum(t.numel() * t.element_size() for t in as_list(tensor)), 0),
    validate=_check,
)
def add_gaussian_noise_(tensor: Any, std: float | Tensor, noise: Noise, offsets: Sequence[int] | None = None) -> Any:
    """Add independent N(0, std^2) to every element, in place.

    Args:
        tensor: a tensor of any shape, or a list of them; a list is one vector, its parts at consecutive offsets.
        std: standard deviation, a number or a scalar tensor on the same device (it is not read on the host).
        noise: the source; one draw of it is spent.
        offsets: where in the draw each tensor begins, a number each; None is one behind the other. So processes that
            share a key, and hold parts of one vector, add to each part what one process would.

    Returns:
        `tensor`.

    Raises:
        TypeError, ValueError: `offsets` are no numbers >= 0, one for each tensor, or let two tensors overlap, which
            would get the same noise.
    """
    draw = noise.next_draw()
    scale = std.detach().clone() if isinstance(std, Tensor) else float(std)  # it may be an element of what is written
    for part, offset in zip(as_list(tensor), places(as_list(tensor), offsets), strict=True):
        flat = part.reshape(-1)  # a view or, of a strided tensor, a copy
        for start in range(0, flat.numel(), _CHUNK):
            block = flat[start : start + _CHUNK]
            z = noise.normal(draw, offset + start, block.numel(), part.device)
            block.copy_(block.double() + z * scale)
        if flat.data_ptr() != part.data_ptr() or not part.is_contiguous():
            part.copy_(flat.view_as(part))
    return tensor
