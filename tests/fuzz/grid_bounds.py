"""The mechanism on whole numbers, with any input: every comparison here is one of whole or rational numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from random import Random
from typing import Any

import torch
from calls import arguments
from tensors import FLOATS, described, floats, laid_out
from torch import Tensor

from adamix_kernels import (
    BackendError,
    Noise,
    clip_coef,
    grad_norm_sq,
    grid_clip_sum,
    grid_for,
    grid_release,
    use_backend,
)

Tell = Callable[[str], None]
#: Whole numbers that each type holds exactly go so far.
_EXACT = {torch.bfloat16: 2**8, torch.float16: 2**11, torch.float32: 2**24, torch.float64: 2**24}


def one_grid_bound(r: Random, name: str, tell: Tell) -> list[str]:
    """Check one call; what is to be counted."""
    flushed, backend = r.random() < 0.1, r.choice(["auto", "torch", "cpp"])

    def say(text: str) -> str:
        text = f"{name} on {backend}{', denormals flushed' * flushed}: {text}"
        tell(text)
        return text

    def on_backend(op: Callable[..., Any], *given: Any) -> Any:
        torch.set_flush_denormal(flushed)
        try:
            with use_backend(backend):
                return op(*given)
        finally:
            torch.set_flush_denormal(False)

    try:
        return {"grid_clip_sum": _sum, "grid_release": _release, "grid_for": _grid}[name](r, on_backend, say)
    except BackendError:
        return ["backend cannot"]


# --- what one sample adds --------------------------------------------------------------------------------------------


def _sum(r: Random, on_backend: Callable[..., Any], say: Callable[[str], str]) -> list[str]:
    found = arguments(r, grid_clip_sum, dtype=r.choice(FLOATS))
    many = isinstance(found["grad_sample"], list)
    parts, count = found["grad_sample"] if many else [found["grad_sample"]], len(found["coef"])
    if not count:
        return []
    b, (limit, grid) = r.randrange(count), _limit_and_grid(r)
    how = r.choice(["clipped", "any factors", "factors too large", "the edge"])
    if how == "any factors":
        found["coef"] = laid_out(r, floats(r, [count], r.choice(FLOATS)))
    elif how == "factors too large":
        found["coef"] = clip_coef(grad_norm_sq(parts), limit) * (1 + 2.0 ** -r.randrange(24))
    elif how == "the edge":
        parts, found["coef"], limit = _edge(r, parts, b, grid)
    shown = [described(x) for x in (*parts, found["coef"])]
    text = say(f"{how}, row {b}, threshold {limit!r}, grid {grid!r}, {shown}")

    def added(rows: Any) -> list[int]:
        """The sum of some rows, which are clipped by norms that were taken of them alone."""
        taken = [x[rows] for x in parts]
        coef = clip_coef(grad_norm_sq(taken), limit) if how == "clipped" else found["coef"][rows]
        return whole(grid_clip_sum(taken if many else taken[0], coef, limit, grid))

    alone, together = on_backend(added, slice(b, b + 1)), on_backend(added, slice(None))
    square, most = sum(q * q for q in alone) * Fraction(grid) ** 2, Fraction(limit) ** 2
    assert square <= most, f"{text}\nadds {math.sqrt(square / most):.17g} of the threshold"
    without = on_backend(added, [i for i in range(count) if i != b])
    assert [x - y for x, y in zip(together, without, strict=True)] == alone, f"{text}\nneighbours differ by more"
    order = r.sample(range(count), count)
    assert on_backend(added, order) == together, f"{text}\nthe sum is another in the order {order}"
    if how == "the edge":
        given = [int(x) for part in parts for x in part[b].double().flatten().tolist()]
        fits = sum(q * q for q in given) * Fraction(grid) ** 2 <= most
        assert alone == (given if fits else [0] * len(given)), f"{text}\nadds {alone}"
    return ["grid_clip_sum"] + ["sums that are not 0"] * any(alone) + ["sums above C / 2"] * (4 * square > most)


def whole(sums: Tensor | Sequence[Tensor]) -> list[int]:
    return [q for part in ([sums] if isinstance(sums, Tensor) else sums) for q in part.flatten().tolist()]


def _limit_and_grid(r: Random) -> tuple[float, float]:
    """As the trainer takes them, or any that are let through."""
    if r.random() < 0.5:
        limit = 10.0 ** r.uniform(-18, 18)
        std = r.choice([0.0, min(limit * 10.0 ** r.uniform(-3, 9), 2.0**60)])
        return limit, grid_for(limit, std)
    grid = 2.0 ** r.randrange(-84, 37)
    limits = [grid * 2.0 ** r.uniform(-3, 25), grid * r.randrange(1, 2**25), math.nextafter(grid * 2**25, 0), 1e-300]
    return min(r.choice(limits), limits[2]), grid


def _edge(r: Random, parts: Sequence[Tensor], b: int, grid: float) -> tuple[list[Tensor], Tensor, float]:
    """Whole multiples of the grid, and the threshold that is nearest to a row's norm, or a neighbour of that."""
    edges, total = [], 0
    for part in parts:
        reach = r.choice([1, 5, 100, _EXACT[part.dtype]])
        x = torch.randint(-reach, reach + 1, part.shape, generator=torch.Generator().manual_seed(r.randrange(2**32)))
        edges.append(laid_out(r, x.to(part.dtype)))
        total += sum(int(q) ** 2 for q in edges[-1][b].double().flatten().tolist())
    limit = (math.sqrt(total) or 1.0) * grid
    limit = r.choice([limit, math.nextafter(limit, 0), math.nextafter(limit, math.inf)])
    coef = torch.full((len(parts[0]),), grid, dtype=r.choice([torch.float32, torch.float64]))
    return edges, coef, min(limit, math.nextafter(grid * 2**25, 0))


# --- what is released ------------------------------------------------------------------------------------------------


def _release(r: Random, on_backend: Callable[..., Any], say: Callable[[str], str]) -> list[str]:
    """Sums and noise are one whole number, rounded once; the noise is the same whatever the sums are."""
    shapes = arguments(r, grid_release)["sums"]
    many, grid, key = isinstance(shapes, list), 2.0 ** r.randrange(-84, 37), r.randbytes(32)
    std = r.choice([0.0, grid * 2.0 ** r.uniform(-30, 30), math.nextafter(grid * 2**30, 0)])
    std = min(std, math.nextafter(grid * 2**30, 0))
    generator, reach = torch.Generator().manual_seed(r.randrange(2**32)), 2 ** r.choice([1, 10, 24, 40, 61])
    sums = [
        laid_out(r, torch.randint(-reach, reach + 1, part.shape, generator=generator))
        for part in (shapes if many else [shapes])
    ]
    text = say(f"std {std!r}, grid {grid!r}, key {key.hex()}, {described(sums)}")

    def released(values: list[Tensor]) -> list[int]:
        noise = Noise._with_key(key, "secure")
        out = on_backend(grid_release, values if many else values[0], std, grid, noise)
        assert noise.next_draw() == (1 if std else 0), f"{text}\nspends {noise.next_draw() - 1} draws"
        steps = [Fraction(x) / Fraction(grid) for x in whole(out)]
        assert all(x.denominator == 1 for x in steps), f"{text}\nleaves the grid"
        return [int(x) for x in steps]

    first = released([torch.zeros(part.shape, dtype=torch.int64) for part in sums])
    rest = released(_like([-n for n in first], sums))  # what float32 left out of the first
    noise = [n + more for n, more in zip(first, rest, strict=True)]
    exact = torch.tensor([s + n for s, n in zip(whole(sums), noise, strict=True)], dtype=torch.int64)
    assert released(sums) == [int(x) for x in exact.float().tolist()], f"{text}\nhas other noise than zeros have"
    return ["grid_release"] + ["releases with noise that is not 0"] * any(noise)


def _like(values: list[int], parts: Sequence[Tensor]) -> list[Tensor]:
    cut = torch.tensor(values, dtype=torch.int64).split([part.numel() for part in parts])
    return [x.view(part.shape) for x, part in zip(cut, parts, strict=True)]


def _grid(r: Random, on_backend: Callable[..., Any], say: Callable[[str], str]) -> list[str]:
    limit, std = (
        r.choice([10.0 ** r.uniform(-19, 19), 2.0 ** r.randrange(-62, 63), r.choice([0.0, 5e-324, 1e308, math.inf])])
        for _ in range(2)
    )
    limit, std = (math.nextafter(x, r.choice([x, -math.inf, math.inf])) for x in (limit, std))
    text = say(f"threshold {limit!r}, std {std!r}")
    try:
        grid = grid_for(limit, std)
    except ValueError as error:
        said = str(error).split(" ", maxsplit=1)[0]
        fits = {"max_grad_norm": 2.0**-60 <= limit <= 2.0**60, "std": 0 <= std <= 2.0**60}
        assert not fits[said], f"{text}\nsays {error}"
        return ["grids refused"]
    steps, spread = Fraction(limit) / Fraction(grid), Fraction(std) / Fraction(grid)
    assert steps < 2**25 and spread < 2**30, f"{text}\ngives {grid!r}, too fine"
    assert steps >= 2**24 or spread >= 2**29, f"{text}\ngives {grid!r}, coarser than needed"
    assert not any(whole(on_backend(grid_clip_sum, torch.zeros(1, 1), torch.ones(1), limit, grid)))
    on_backend(grid_release, torch.zeros(1, dtype=torch.int64), std, grid, Noise._with_key(bytes(32), "secure"))
    return ["grid_for"]
