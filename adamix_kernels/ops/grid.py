"""The Gaussian mechanism on whole numbers: no rounding error of a floating-point sum reaches what is released.

Why it is private. Each sample's clipped gradient is a vector q of whole numbers, in units of `grid`, with |q| exactly
at most C / grid; their sum S is taken in integers. So adding or removing a sample moves S by at most C / grid, in exact
arithmetic, and not by rounding errors as a sum in floating point does (Casacuberta et al. 2022, arXiv 2207.10635).
What is released is S + round(Z / grid). As S is whole, that is round(S + Z / grid): post-processing of the Gaussian
mechanism with Z ~ N(0, std^2). Every output is a multiple of `grid`, whatever the data: the low bits of a float, by
which noisy sums can be told apart (Mironov 2012; Jin et al. 2022, arXiv 2112.05307; Haney et al. 2022,
arXiv 2207.13793), carry nothing. Rounding the released whole number to float32 is post-processing too, and leaves a
multiple of `grid`.

What is assumed all the same:

* Z is Box-Muller on two 53-bit uniforms in float64: it never exceeds 8.58 std (an ideal normal does with a probability
  of 1e-17), and is off by some 2^-51 of itself, without a preferred sign. As std / grid < 2^30 (`grid_for`), where one
  whole number ends and the next begins is off by less than 2^-17 of a step; where std is about C, by less than 2^-22.
* The words behind it are unpredictable: `Noise(mode="secure")`, ChaCha20 with a key of the operating system.
* A sample's gradient does not depend on which other samples share its batch. Matrix products may add in another order
  for another batch size, which moves the gradients of all samples in their last bits.
* Nobody measures how long a call takes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import torch
from torch import Generator, Tensor

from adamix_kernels.ops._cases import grad_cases, rand
from adamix_kernels.ops._numerics import as_list, check_number, rows
from adamix_kernels.ops.clip import clip_coef
from adamix_kernels.ops.noise import Noise, check_offsets, places
from adamix_kernels.ops.norm import grad_norm_sq
from adamix_kernels.spec import Case, Cost, Out, define_op

#: Steps of the grid in a threshold: 2^24 to 2^25, as fine as float32.
_BITS = 24
#: Steps in a standard deviation: below 2^30.
_NOISE_BITS = 30
#: Rows that a sum may have: |q| < 2^25, so |S| < 2^61, and the noise, below 9 * 2^30, fits beside it in 64 bits.
MOST_ROWS = 2**36
#: Thresholds for which no sum or grid leaves float32's range.
_RANGE = 2.0**-60, 2.0**60
_GRIDS = 2.0**-84, 2.0**36
#: Columns whose squares, below 2^50, are added up at a time: below 2^62.
_BLOCK = 1 << 12


def grid_for(max_grad_norm: float, std: float) -> float:
    """The grid for a threshold C and noise of standard deviation `std`: the power of two in (C 2^-25, C 2^-24].

    Coarser where that is needed for std / grid < 2^30, so that float64 normals still reach every multiple. It depends
    on public numbers alone. Truncation takes less than one step off each entry of a sample's gradient.

    Raises:
        TypeError, ValueError: C or std is no number, or out of range.
    """
    check_number("max_grad_norm", max_grad_norm)
    check_number("std", std)
    low, high = _RANGE
    if not low <= max_grad_norm <= high:
        raise ValueError(f"max_grad_norm is {max_grad_norm}; pass a number in [{low:.3g}, {high:.3g}] for a grid")
    if not 0 <= std <= high:
        raise ValueError(f"std is {std}; pass a number in [0, {high:.3g}] for a grid")
    exponent = math.frexp(max_grad_norm)[1] - 1 - _BITS
    if std:
        exponent = max(exponent, math.frexp(std)[1] - _NOISE_BITS)
    return math.ldexp(1.0, exponent)


def bounds(max_grad_norm: float, grid: float) -> tuple[int, int]:
    """The largest whole number that an entry may be, and that the squared norm may be: exact."""
    ratio = Fraction(max_grad_norm) / Fraction(grid)
    return math.floor(ratio), math.floor(ratio**2)


def _check_grid(grid: float) -> None:
    if not (isinstance(grid, float) and _GRIDS[0] <= grid <= _GRIDS[1] and math.log2(grid).is_integer()):
        raise ValueError(f"grid is {grid!r}; pass a power of two as a float, as grid_for() gives it")


def _check_sum(grad_sample: Tensor | Sequence[Tensor], max_grad_norm: float, grid: float, **_: Any) -> None:
    _check_grid(grid)
    if not isinstance(max_grad_norm, int | float) or not 0 < max_grad_norm < grid * 2 ** (_BITS + 1):
        raise ValueError(
            f"max_grad_norm is {max_grad_norm!r} with grid {grid:.6g}; pass a number above 0 and below 2^{_BITS + 1} "
            "grids, or grid_for(max_grad_norm, std)"
        )
    count = as_list(grad_sample)[0].shape[0]
    if count > MOST_ROWS:
        raise ValueError(f"grad_sample has {count} rows; pass at most 2^36, whose sum cannot overflow")


def _check_release(
    sums: Tensor | Sequence[Tensor], std: float, grid: float, noise: Noise | None, offsets: Sequence[int] | None
) -> None:
    _check_grid(grid)
    check_offsets(as_list(sums), offsets)
    for part in as_list(sums):
        if part.dtype != torch.int64:
            raise TypeError(f"sums has dtype {part.dtype}; pass int64, as grid_clip_sum gives them")
    if not isinstance(std, int | float) or not 0 <= std < grid * 2**_NOISE_BITS:
        raise ValueError(
            f"std is {std!r} with grid {grid:.6g}; pass a number >= 0 and below 2^{_NOISE_BITS} grids, or "
            "grid_for(max_grad_norm, std)"
        )
    if std and not isinstance(noise, Noise):
        raise ValueError(f"noise is {noise!r} with std {std}; pass adamix_kernels.Noise(mode='secure')")


def factors_of(coef: Tensor, grid: float) -> Tensor:
    """What gradients are multiplied with, in float64: exact for factors of 24 bits, as `clip_coef` gives them."""
    return coef.double() / grid


def _whole(block: Tensor, factors: Tensor, largest: int) -> tuple[Tensor, Tensor]:
    """Whole numbers `[B, n]` of a block of columns, and which rows have none that is too large or not a number."""
    scaled = block.double() * factors[:, None]
    fits = scaled.abs() < largest + 1
    return scaled.where(fits, 0.0).long(), fits.all(1)


def _sum_oracle(grad_sample: Tensor | Sequence[Tensor], coef: Tensor, max_grad_norm: float, grid: float) -> Any:
    """One sample at a time in Python's integers."""
    parts = as_list(grad_sample)
    totals = [[0] * math.prod(part.shape[1:]) for part in parts]
    _, most = bounds(max_grad_norm, grid)
    for b, c in enumerate(coef.tolist()):
        scaled = [[x * (c / grid) for x in part[b].flatten().tolist()] for part in parts]
        if not all(math.isfinite(x) for row in scaled for x in row):
            continue
        whole = [[math.trunc(x) for x in row] for row in scaled]
        if sum(q * q for row in whole for q in row) <= most:
            totals = [[t + q for t, q in zip(*pair, strict=True)] for pair in zip(totals, whole, strict=True)]
    return [torch.tensor(t, dtype=torch.int64).reshape(p.shape[1:]) for t, p in zip(totals, parts, strict=True)]


def _sum_cases() -> list[Case]:
    def awkward(generator: Generator, size: int) -> Tensor:
        """Most rows below the threshold, some above it: those add nothing."""
        return rand(generator, size) * 0.2

    cases = grad_cases(coef=awkward, max_grad_norm=lambda g, size: 1.3, grid=lambda g, size: 2.0**-20)
    truth = grad_cases(max_grad_norm=lambda g, size: 0.7, grid=lambda g, size: grid_for(0.7, 1.0))

    def clipped(build: Callable[[Generator], dict[str, Any]]) -> Callable[[Generator], dict[str, Any]]:
        def made(generator: Generator) -> dict[str, Any]:
            arguments = build(generator)
            rounded = [part.to(torch.bfloat16).double() for part in as_list(arguments["grad_sample"])]
            return arguments | {"coef": clip_coef.reference(grad_norm_sq.reference(rounded), 0.7).double()}

        return made

    return cases + [Case(f"{case.name}, clipped", clipped(case.build), case.strided) for case in truth]


@define_op(
    shapes={"grad_sample": "B *[]", "coef": "B"},
    returns=[Out("sum", "*", rtol=0)],
    oracle=_sum_oracle,
    cases=_sum_cases,
    cost=lambda grad_sample, **_: grad_norm_sq.cost(grad_sample),
    validate=_check_sum,
)
def grid_clip_sum(grad_sample: Tensor | Sequence[Tensor], coef: Tensor, max_grad_norm: float, grid: float) -> Any:
    """Sum over samples of `coef[b] * grad_sample[b]` in whole multiples of a grid, exactly.

    Each entry is divided by `grid` and rounded toward zero, so that no norm grows. A sample whose squared norm, over
    the whole list and in integers, is then above (max_grad_norm / grid)^2 adds exactly 0, as does one with a NaN or
    Inf; with factors of `clip_coef` only the latter occurs. The sum is that of integers: the same bits in any order,
    without overflow, as an entry is below 2^25 and there are at most 2^36 rows.

    Args:
        grad_sample: per-sample gradients `[B, *]`, or a list of such tensors.
        coef: factors `[B]`, as `clip_coef` gives them.
        max_grad_norm: the threshold C, above 0 and below 2^25 grids.
        grid: a power of two, as `grid_for` gives it.

    Returns:
        int64 `[*]` (or a list): the sum over `grid`. Adding or removing one sample moves it by at most C / grid in
        the Euclidean norm, exactly. It has no noise yet: see `grid_release`.

    Raises:
        TypeError, ValueError: names the argument that does not fit, what was given and what to pass.

    Source: the head of this module.
    """
    parts, factors = [rows(part) for part in as_list(grad_sample)], factors_of(coef, grid)
    largest, most = bounds(max_grad_norm, grid)
    total = torch.zeros(len(factors), dtype=torch.int64, device=factors.device)
    for part in parts:
        for block in part.split(_BLOCK, dim=1):
            q, fits = _whole(block, factors, largest)
            total = (total + q.square().sum(1).where(fits, most + 1)).clamp(max=most + 1)
    factors = factors.where(total <= most, torch.nan)
    sums = [
        torch.cat([_whole_sum(block, factors, largest) for block in part.split(_BLOCK, dim=1)]).view(given.shape[1:])
        for part, given in zip(parts, as_list(grad_sample), strict=True)
    ]
    return sums[0] if isinstance(grad_sample, Tensor) else sums


def _whole_sum(block: Tensor, factors: Tensor, largest: int) -> Tensor:
    return _whole(block, factors, largest)[0].sum(0)


def _release_oracle(
    sums: Tensor | Sequence[Tensor],
    std: float,
    grid: float,
    noise: Noise | None,
    offsets: Sequence[int] | None = None,
) -> list[Tensor]:
    released = []
    draw = noise.next_draw() if std and noise is not None else 0
    for part, offset in zip(as_list(sums), places(as_list(sums), offsets), strict=True):
        values = part.flatten().tolist()
        if std and noise is not None:
            z = [float(noise.normal(draw, offset + i, 1)) for i in range(len(values))]
            values = [s + round(x * (std / grid)) for s, x in zip(values, z, strict=True)]
        released.append(torch.tensor([v * grid for v in values], dtype=torch.float64).reshape(part.shape))
    return released


def _release_cases() -> list[Case]:
    def case(
        name: str, *shapes: tuple[int, ...], std: float = 0.7, most: int = 2**40, offsets: list[int] | None = None
    ) -> Case:
        def build(g: Generator) -> dict[str, Any]:
            sums = [torch.randint(-most, most, shape, generator=g) for shape in shapes]
            noise = Noise._with_key(bytes(range(32)), "secure") if std else None
            given = sums if len(sums) > 1 else sums[0]
            return {"sums": given, "std": std, "grid": 2.0**-24, "noise": noise, "offsets": offsets}

        return Case(name, build)

    return [
        case("plain", (5, 13)),
        case("small sums", (200,), most=5),
        case("empty", (0, 4)),
        case("odd list", (3,), (0,), (2, 5), (1,), (7,)),
        case("no noise", (2, 3), std=0.0),
        case("coarse noise", (90,), std=2.0**-24, most=3),
        case("parts of a draw", (3, 7), (0,), (5,), (70,), offsets=[129, 7, 3, 2**33 + 1]),
    ]


@define_op(
    shapes={"sums": "int:...[]"},
    returns=[Out("released", "...", rtol=1e-7, of_max=True)],
    oracle=_release_oracle,
    cases=_release_cases,
    cost=lambda sums, **_: Cost(12 * sum(t.numel() for t in as_list(sums)), 0),
    validate=_check_release,
)
def grid_release(
    sums: Tensor | Sequence[Tensor],
    std: float,
    grid: float,
    noise: Noise | None = None,
    offsets: Sequence[int] | None = None,
) -> Any:
    """Integer sums with Gaussian noise that is rounded to the same grid, as floats.

    Args:
        sums: int64, of any shape, as `grid_clip_sum` gives them; a list is one vector.
        std: standard deviation of the noise before it is rounded, below 2^30 grids; 0 adds none.
        grid: that of the sums, a power of two.
        noise: its source, of mode "secure" for a release; one draw of it is spent. Needed unless `std` is 0.
        offsets: where in the draw each tensor begins, as in `add_gaussian_noise_`; None is one behind the other.

    Returns:
        float32, shaped as `sums`: `(sums + round(Z / grid)) * grid`, a multiple of `grid`. A whole number of more than
        24 bits is rounded to one that float32 holds, which is post-processing.

    Raises:
        TypeError, ValueError: names the argument that does not fit, what was given and what to pass.

    Source: the head of this module.
    """
    draw, released = noise.next_draw() if std and noise is not None else None, []
    for part, offset in zip(as_list(sums), places(as_list(sums), offsets), strict=True):
        whole = part
        if draw is not None and noise is not None:
            z = noise.normal(draw, offset, part.numel(), part.device).view(part.shape)
            whole = part + (z * (std / grid)).round().long()
        released.append(whole.float() * grid)
    return released[0] if isinstance(sums, Tensor) else released
