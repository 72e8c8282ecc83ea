"""The report of `DPEngine.validate`: rules, costs and memory of each parameter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from adamix_kernels.nn.combine import TiedFactors
from adamix_kernels.nn.factors import (
    ConvFactors,
    EmbeddingFactors,
    Factors,
    LinearFactors,
    PerSample,
    ScaleShiftFactors,
    StackedFactors,
)
from adamix_kernels.nn.parameter import tensors
from adamix_kernels.ops.conv import conv_clip_sum, conv_norm_sq
from adamix_kernels.ops.embedding import embedding_clip_sum, embedding_norm_sq
from adamix_kernels.ops.linear import linear_clip_sum, linear_norm_sq
from adamix_kernels.ops.norm import grad_norm_sq
from adamix_kernels.ops.scale_shift import scale_shift_clip_sum, scale_shift_norm_sq

_OPS: dict[type, tuple[Any, Any]] = {
    LinearFactors: (linear_norm_sq, linear_clip_sum),
    ConvFactors: (conv_norm_sq, conv_clip_sum),
    EmbeddingFactors: (embedding_norm_sq, embedding_clip_sum),
    ScaleShiftFactors: (scale_shift_norm_sq, scale_shift_clip_sum),
}


@dataclass(frozen=True)
class ParameterReport:
    """What the engine does with one parameter on this batch."""

    name: str
    rule: str  # the kind of factors its gradients are kept in, or "unused"
    together_with: str | None  # the parameter under which the costs of both stand
    flops: int  # of the norms and the sum
    factor_bytes: int  # activations and backprops until the norms are known
    sample_bytes: int  # its per-sample gradients, were they made
    norm_error: float  # largest relative error of a sample's norm
    sum_error: float  # of the clipped sum, relative to the sum of its terms' norms


@dataclass(frozen=True)
class Report:
    """The result of `DPEngine.validate`; print it."""

    samples: int
    strategy: str
    parameters: Sequence[ParameterReport]
    memory: Mapping[str, int]  # bytes beyond ordinary training, by strategy
    notes: Sequence[str]

    def __str__(self) -> str:
        head = ["parameter", "rule", "MFLOP", "factors", "per-sample", "norm error", "sum error"]
        rows = [
            [
                row.name,
                row.rule,
                f"{row.flops / 1e6:.2f}" if row.together_with is None else "",
                mebi(row.factor_bytes) if row.together_with is None else f"with {row.together_with}",
                mebi(row.sample_bytes),
                f"{row.norm_error:.1e}",
                f"{row.sum_error:.1e}",
            ]
            for row in self.parameters
        ]
        widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in [head, *rows]]
        memory = ", ".join(f"{name} {mebi(size)}" for name, size in self.memory.items())
        return "\n".join(
            [
                *(line.rstrip() for line in lines),
                f"{self.samples} samples, strategy {self.strategy!r}. Memory for gradients: {memory}",
                *self.notes,
            ]
        )


def kind(factors: Factors) -> str:
    return "per sample" if isinstance(factors, PerSample) else type(factors).__name__.removesuffix("Factors").lower()


def held(factors: Any) -> list[Tensor]:
    values = [x for value in vars(factors).values() for x in (value if isinstance(value, list | tuple) else [value])]
    nested = [x for value in values if hasattr(value, "clip_sum") for x in held(value)]
    return [*tensors(*values), *nested]


def kept_bytes(factors: Factors) -> int:
    return sum(size_of(x) for x in held(factors))


def size_of(x: Tensor) -> int:
    return x.numel() * x.element_size()


def sample_bytes(samples: int, parameter: Tensor) -> int:
    return samples * parameter.numel() * max(4, parameter.element_size())


def mebi(count: float) -> str:
    return f"{count / 2**20:.2f} MiB"


def flops(factors: Any) -> int:
    """Of the norms and the sum; what joins tied uses is not counted."""
    if isinstance(factors, TiedFactors):
        return flops(factors.linear) + flops(factors.embedding)
    if isinstance(factors, StackedFactors):
        return sum(flops(part) for part in factors.slices)
    if isinstance(factors, PerSample):
        return 2 * grad_norm_sq.cost(factors.grads).flops
    given = dict(vars(factors))
    shape = given.pop("shape", None)
    given |= shape if isinstance(shape, dict) else {}
    return sum(op.cost(**given).flops for op in _OPS.get(type(factors), ()))
