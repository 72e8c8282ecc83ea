"""The noise: known-answer vectors, its distribution, and that no draw comes twice."""

from __future__ import annotations

import copy
import hashlib
import itertools
import math
import multiprocessing
import os
import pickle
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from scipy import stats

from adamix_kernels import Noise, add_gaussian_noise_, grid_release, use_backend
from adamix_kernels.ops import noise as noise_module
from adamix_kernels.ops._streams import chacha20_block, philox_block

KEY = bytes(range(100, 132))
MASK = 0xFFFFFFFF


def words(*values: int) -> list[torch.Tensor]:
    return [torch.tensor([v], dtype=torch.int64) for v in values]


@pytest.mark.parametrize(
    ("key", "counter", "expected"),
    [  # Random123 kat_vectors, philox4x32 10
        ((0, 0), (0, 0, 0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 2, (0xFFFFFFFF,) * 4, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0xA4093822, 0x299F31D0),
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_known_answers(key: tuple[int, int], counter: tuple[int, ...], expected: tuple[int, ...]) -> None:
    assert tuple(int(w) for w in philox_block(key, *words(*counter))) == expected


def test_chacha20_known_answer() -> None:
    """RFC 8439, section 2.3.2."""
    key = [int.from_bytes(bytes(range(i, i + 4)), "little") for i in range(0, 32, 4)]
    block = chacha20_block(key, words(1, 0x09000000, 0x4A000000, 0))[:, 0].tolist()
    assert b"".join(w.to_bytes(4, "little") for w in block).hex() == (
        "10f1e7e4d13b5915500fdd1fa32071c4c7d1f4c733c068030422aa9ac3d46c4e"
        "d2826446079faa0914c2d705d98b02a2b5129cd1de164eb9cbd083e8a2503c4e"
    )


def plain_chacha20(key: bytes, block: int, draw: int) -> list[int]:
    """One block of 16 words, on Python integers: the constants, the key, the block's number, the draw's."""

    def rotate(x: int, bits: int) -> int:
        return (x << bits | x >> (32 - bits)) & MASK

    def quarter(a: int, b: int, c: int, d: int) -> None:
        for first, second, third, bits in [(a, b, d, 16), (c, d, b, 12), (a, b, d, 8), (c, d, b, 7)]:
            state[first] = (state[first] + state[second]) & MASK
            state[third] = rotate(state[third] ^ state[first], bits)

    head = b"expand 32-byte k" + key + block.to_bytes(8, "little") + draw.to_bytes(8, "little")
    start = [int.from_bytes(head[i : i + 4], "little") for i in range(0, 64, 4)]
    state = list(start)
    for _ in range(10):
        for i in range(4):
            quarter(i, 4 + i, 8 + i, 12 + i)
        for i in range(4):
            quarter(i, 4 + (i + 1) % 4, 8 + (i + 2) % 4, 12 + (i + 3) % 4)
    return [(x + y) & MASK for x, y in zip(state, start, strict=True)]


def plain_philox(key: bytes, block: int, draw: int) -> list[int]:
    """One block of 4 words, on Python integers; the key is the first 8 bytes."""
    k0, k1 = int.from_bytes(key[:4], "little"), int.from_bytes(key[4:8], "little")
    c = [block & MASK, block >> 32, draw & MASK, draw >> 32]
    for i in range(10):
        left, right = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        keys = (k0 + i * 0x9E3779B9) & MASK, (k1 + i * 0xBB67AE85) & MASK
        c = [right >> 32 ^ c[1] ^ keys[0], right & MASK, left >> 32 ^ c[3] ^ keys[1], left & MASK]
    return c


def plain_words(mode: str, key: bytes, draw: int, first: int, count: int) -> list[int]:
    block, size = (plain_chacha20, 16) if mode == "secure" else (plain_philox, 4)
    return [block(key, i // size, draw)[i % size] for i in range(first, first + count)]


def plain_normal(mode: str, key: bytes, draw: int, element: int) -> float:
    """Box-Muller on two uniforms of 53 bits, the radius's in (0, 1]; the cosine is the even element's."""
    w = plain_words(mode, key, draw, 4 * (element // 2), 4)
    first, second = (high // 32 * 2**26 + low // 64 for high, low in (w[:2], w[2:]))
    radius, angle = math.sqrt(-2 * math.log((first + 1) / 2**53)), 2 * math.pi * second / 2**53
    return radius * (math.sin(angle) if element % 2 else math.cos(angle))


@pytest.mark.parametrize("mode", ["fast", "secure"])
@pytest.mark.parametrize("draw", [0, 3, 2**32 - 1, 2**32 + 5, 2**63 + 9])
def test_stream_is_that_of_plain_python(mode: str, draw: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "urandom", lambda size: KEY[:size])
    noise = Noise(mode=mode)
    for first in (0, 7, 2**34 - 20, 2**40 + 3):  # in words; blocks 2^32 lie between
        assert noise._words(draw, first, 45, "cpu").tolist() == plain_words(mode, KEY, draw, first, 45)
    for start in (0, 5, 2**33 - 3):
        expected = [plain_normal(mode, KEY, draw, element) for element in range(start, start + 20)]
        assert noise.normal(draw, start, 20).tolist() == pytest.approx(expected, rel=1e-12, abs=1e-12)


def test_uniform_is_that_of_plain_python() -> None:
    noise = Noise(seed=11)
    noise.next_draw()
    w = plain_words("fast", hashlib.blake2b(b"11", digest_size=32).digest(), 1, 0, 14)
    expected = [(high // 32 * 2**26 + low // 64) / 2**53 for high, low in zip(w[::2], w[1::2], strict=True)]
    assert noise.uniform(7).tolist() == expected


@pytest.mark.parametrize("chunk", [1, 4, 7, 36, 37, 64])
def test_chunks_do_not_change_the_noise(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(noise_module, "_CHUNK", chunk)
    expected = Noise(seed=4).normal(0, 0, 60)
    parts = [torch.zeros(37, dtype=torch.float64), torch.zeros(0), torch.zeros(23, dtype=torch.float64)]
    with use_backend("torch"):
        got = torch.cat([p.double() for p in add_gaussian_noise_(parts, 1.0, Noise(seed=4))])
    assert torch.equal(got, expected)


@pytest.mark.parametrize("mode", ["fast", "secure"])
def test_distribution(mode: str) -> None:
    count = 400_000
    z = Noise._with_key(bytes(range(32)), mode).normal(0, 0, count)
    assert stats.kstest(z.numpy(), "norm").pvalue > 1e-3
    assert abs(float(z.mean())) < 4 / math.sqrt(count)
    assert abs(float(z.var()) - 1) < 4 * math.sqrt(2 / count)
    assert abs(float((z**4).mean()) - 3) < 4 * math.sqrt(96 / count)
    for lag in (1, 2, 3, 8):
        assert abs(float((z[:-lag] * z[lag:]).mean())) < 4 / math.sqrt(count)


def test_the_tail_reaches_beyond_24_bits() -> None:
    """The smallest uniforms give 8.57 standard deviations; a 24-bit uniform would stop at 5.7."""
    noise = Noise(seed=0)
    noise._words = lambda *_: torch.zeros(4, dtype=torch.int64)  # type: ignore[method-assign]
    assert float(noise.normal(0, 0, 1)) == pytest.approx(math.sqrt(2 * 53 * math.log(2)))


@pytest.mark.parametrize("mode", ["fast", "secure"])
def test_any_part_of_a_draw_can_be_made_alone(mode: str) -> None:
    noise = Noise._with_key(bytes(32), mode)
    whole = noise.normal(7, 0, 100)
    for start, count in [(0, 1), (1, 1), (5, 60), (99, 1), (33, 0)]:
        assert torch.equal(noise.normal(7, start, count), whole[start : start + count])


def test_no_draw_comes_twice() -> None:
    noise = Noise(seed=3)
    first, second = (add_gaussian_noise_(torch.zeros(1000), 1.0, noise) for _ in range(2))
    assert not torch.isin(first, second).any()
    assert abs(float((first * second).mean())) < 4 / math.sqrt(1000)
    assert not torch.equal(Noise().normal(0, 0, 9), Noise().normal(0, 0, 9)), "two keys of the operating system"
    low, high = noise.normal(0, 0, 4), noise.normal(2**32, 0, 4)
    assert not torch.equal(low, high), "the draw number does not wrap at 32 bits"
    assert not torch.equal(low, noise.normal(0, 2**33, 4)), "nor does the offset"


class SlowInt(int):
    """Other threads run between reading it and writing the sum back; on a plain int CPython 3.11 never lets them."""

    def __add__(self, other: int) -> SlowInt:
        total = SlowInt(int(self) + other)
        time.sleep(0)
        return total


def test_threads_get_different_draws() -> None:
    noise = Noise(seed=0)
    noise._draws = SlowInt(0)
    with ThreadPoolExecutor(8) as pool:
        draws = list(pool.map(lambda _: [int(noise.next_draw()) for _ in range(2000)], range(8)))
    assert sorted(draw for some in draws for draw in some) == list(range(16000))


def test_a_list_is_one_vector() -> None:
    whole = add_gaussian_noise_(torch.zeros(13), 2.0, Noise(seed=1))
    parts = add_gaussian_noise_([torch.zeros(2, 3), torch.zeros(7)], 2.0, Noise(seed=1))
    assert torch.equal(torch.cat([p.flatten() for p in parts]), whole)


@pytest.mark.parametrize("backend", [b for b in ("torch", "cpp") if add_gaussian_noise_.why_not(b) is None])
def test_std_may_be_an_element_of_what_is_noised(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(noise_module, "_CHUNK", 16)
    parts = [torch.zeros(50, dtype=torch.float64), torch.zeros(30, dtype=torch.float64)]
    parts[0][0] = 0.5
    with use_backend(backend):
        add_gaussian_noise_(parts, parts[0][0], Noise(seed=8))
    expected = 0.5 * Noise(seed=8).normal(0, 0, 80)
    expected[0] += 0.5
    torch.testing.assert_close(torch.cat(parts), expected, rtol=1e-12, atol=1e-12)


def test_seeds_repeat_and_differ() -> None:
    assert torch.equal(Noise(seed=1).normal(0, 0, 5), Noise(seed=1).normal(0, 0, 5))
    assert not torch.equal(Noise(seed=1).normal(0, 0, 5), Noise(seed=2).normal(0, 0, 5))


@pytest.mark.parametrize(("mode", "words"), [("fast", 2), ("secure", 8)])
def test_keys_of_the_system_are_whole(mode: str, words: int) -> None:
    """Every word is fresh. Of 800 random ones two pairs are the same with a probability of 3e-9."""
    keys = [Noise(mode=mode)._key for _ in range(100)]
    assert {len(key) for key in keys} == {words}
    assert len({word for key in keys for word in key}) >= 100 * words - 1


def test_torch_generators_are_left_alone() -> None:
    before = torch.get_rng_state()
    add_gaussian_noise_(torch.zeros(9), 1.0, Noise())
    assert torch.equal(torch.get_rng_state(), before)


def test_uniform() -> None:
    u = Noise(seed=2).uniform(100_000)
    assert float(u.min()) >= 0 and float(u.max()) < 1
    assert stats.kstest(u.numpy(), "uniform").pvalue > 1e-3


def test_a_noise_cannot_be_copied() -> None:
    noise = Noise(seed=0)
    for duplicate in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="cannot be copied or pickled"):
            duplicate(noise)


def _draw_in_child(noise: Noise, answers: multiprocessing.SimpleQueue[str]) -> None:
    try:
        noise.next_draw()
        answers.put("drew")
    except RuntimeError as error:
        answers.put(str(error))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # forking a process with threads is what is tested
@pytest.mark.parametrize("reuse", [False, True], ids=["new pid", "pid of a process that ended"])
def test_a_forked_noise_refuses(reuse: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if reuse:
        monkeypatch.setattr(noise_module, "os", SimpleNamespace(getpid=lambda: 7))
    context = multiprocessing.get_context("fork")
    answers = context.SimpleQueue()
    child = context.Process(target=_draw_in_child, args=(Noise(seed=0), answers))
    child.start()
    child.join(60)
    assert "before a fork" in answers.get()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mode": "strong"}, "mode: is 'strong'; pass 'fast' or 'secure'"),
        ({"mode": "secure", "seed": 1}, "seed: is 1 with mode='secure'"),
        ({"seed": 0.5}, "seed: is float; pass an int"),
    ],
)
def test_bad_arguments(arguments: dict[str, object], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        Noise(**arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("mode", ["fast", "secure"])
@pytest.mark.parametrize("backend", [b for b in ("torch", "cpp") if add_gaussian_noise_.why_not(b) is None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_parts_at_offsets_are_those_of_the_whole_bit_for_bit(mode: str, backend: str, dtype: torch.dtype) -> None:
    """Wherever a vector is cut, and in whatever order its parts are handed over."""
    key = bytes(range(32))
    with use_backend(backend):
        whole = add_gaussian_noise_(torch.ones(1000, dtype=dtype), 0.3, Noise._with_key(key, mode))
        for cuts in ([0, 1, 2, 9, 100, 101, 1000], [0, 333, 333, 334, 1000]):
            pairs = list(itertools.pairwise(cuts))[::-1]
            parts = [torch.ones(b - a, dtype=dtype) for a, b in pairs]
            add_gaussian_noise_(parts, 0.3, Noise._with_key(key, mode), [a for a, _ in pairs])
            assert torch.equal(torch.cat(parts[::-1]), whole)


@pytest.mark.parametrize(
    ("offsets", "error", "message"),
    [
        ([0, 2], ValueError, "tensors would get the same noise"),
        ([1, 0], ValueError, "tensors would get the same noise"),
        ([0], ValueError, "pass 2 numbers >= 0"),
        ([-1, 5], ValueError, "pass 2 numbers >= 0"),
        ([0, 2**62], ValueError, "a draw has 2"),
        ([0, 3.0], TypeError, "pass a list of int"),
        (7, TypeError, "pass a list of int"),
    ],
)
def test_offsets_that_do_not_fit(offsets: object, error: type[Exception], message: str) -> None:
    noise = Noise(seed=1)
    with pytest.raises(error, match=message):
        add_gaussian_noise_([torch.zeros(3), torch.zeros(2, 2)], 1.0, noise, offsets)
    with pytest.raises(error, match=message):
        grid_release([torch.zeros(3).long(), torch.zeros(2, 2).long()], 1.0, 2.0**-20, noise, offsets)
    assert noise._draws == 0
