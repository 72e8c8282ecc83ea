"""Inputs of the generated tests that several ops share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Generator, Tensor
from torch.nn.functional import normalize

from adamix_kernels.ops._numerics import as_list
from adamix_kernels.spec import Case


def randn(generator: Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def rand(generator: Generator, *shape: int) -> Tensor:
    return torch.rand(*shape, generator=generator, dtype=torch.float64)


def with_bad_rows(x: Tensor) -> Tensor:
    """Row 1 gets a NaN, row 3 an Inf: neither may reach a sum."""
    x = x.clone()
    x[1].view(-1)[0] = torch.nan
    x[3].view(-1)[-1] = -torch.inf
    return x


def scaled_rows(x: Tensor) -> Tensor:
    """Rows of magnitude 1e30, 1e-30, a float32 denormal, 1 and 0."""
    factors = torch.tensor([1e30, 1e-30, 1e-42, 1.0, 0.0], dtype=torch.float64)
    return x * factors.reshape(-1, *[1] * (x.dim() - 1))


def grad_cases(**extra: Callable[[Generator, int], Any]) -> list[Case]:
    """Per-sample gradients of every awkward kind; each `extra` argument is made from the generator and B."""

    def case(name: str, make: Callable[[Generator], Tensor | list[Tensor]], strided: bool = False) -> Case:
        def build(generator: Generator) -> dict[str, Any]:
            grad_sample = make(generator)
            size = as_list(grad_sample)[0].shape[0]
            return {"grad_sample": grad_sample, **{name: f(generator, size) for name, f in extra.items()}}

        return Case(name, build, strided)

    return [
        case("plain", lambda g: randn(g, 7, 130)),
        case("empty batch", lambda g: randn(g, 0, 10)),
        case("one sample", lambda g: randn(g, 1, 65)),
        case("one parameter", lambda g: randn(g, 9, 1)),
        case("no parameters", lambda g: randn(g, 4, 0)),
        case("ragged list", lambda g: [randn(g, 6, *shape) for shape in [(3, 5), (1,), (2, 3, 7), ()]]),
        case("empty batch list", lambda g: [randn(g, 0, *shape) for shape in [(3, 5), (1,)]]),
        case("strided", lambda g: randn(g, 6, 4, 9), strided=True),
        case("magnitudes", lambda g: scaled_rows(randn(g, 5, 33))),
        case("all zero", lambda g: torch.zeros(3, 17, dtype=torch.float64)),
        case("nan and inf rows", lambda g: with_bad_rows(randn(g, 6, 40))),
        case("just above the threshold", lambda g: normalize(randn(g, 8, 50), dim=1) * (1 + 1e-7)),
    ]
