"""The adaptive subspace: leading directions of public per-sample gradients, and moving in and out of it."""

from __future__ import annotations

from numbers import Integral

import torch
from torch import Tensor

from adamix_kernels.ops._cases import randn
from adamix_kernels.ops._numerics import check_number, sum_dtype
from adamix_kernels.spec import Case, Cost, Out, define_op

#: Directions whose share of the largest eigenvalue is below this are rounding, not signal: of a Gram matrix in float64,
_RANK_TOLERANCE = 1e-10
#: .. and of one whose products are float32.
_FLOAT32_TOLERANCE = 1e-5


def _basis_oracle(grad_sample: Tensor, rank: int | None, energy: float | None) -> Tensor:
    rows = grad_sample[grad_sample.isfinite().all(1)].flatten(1)
    if not rows.numel():
        return rows.new_zeros(0, rows.shape[1])
    _, singular, directions = torch.linalg.svd(rows, full_matrices=False)
    return directions[: _kept(singular**2, rank, energy)]


def _kept(eigenvalues: Tensor, rank: int | None, energy: float | None, tolerance: float = _RANK_TOLERANCE) -> int:
    """How many of the descending `eigenvalues` to keep."""
    kept = int((eigenvalues > tolerance * eigenvalues[0]).sum())
    if energy is not None:
        share = eigenvalues.cumsum(0) / eigenvalues.sum()
        kept = min(kept, int((share < energy - 1e-12).sum()) + 1)
    return min(kept, rank) if rank is not None else kept


def _up_to_sign(basis: Tensor) -> Tensor:
    """Each direction with its largest entry positive, so that bases can be compared."""
    if not basis.numel():
        return basis
    largest = basis.gather(1, basis.abs().argmax(1, keepdim=True))
    return basis * largest.sign()


def _basis_cases() -> list[Case]:
    def spread(g: torch.Generator, n: int, p: int) -> Tensor:
        # Well separated directions: only then is each one determined.
        return randn(g, n, p) @ torch.diag(torch.logspace(0, -1.5, p, dtype=torch.float64)) * 3

    def case(name: str, n: int, p: int, **how: float | int | None) -> Case:
        return Case(name, lambda g: {"grad_sample": spread(g, n, p), "rank": None, "energy": None, **how})

    def deficient(g: torch.Generator) -> dict[str, object]:
        return {"grad_sample": randn(g, 2, 12).sign().repeat(4, 1), "rank": 5, "energy": None}

    return [
        case("given rank", 8, 20, rank=3),
        case("retained energy", 9, 15, energy=0.8),
        case("rank above N", 4, 30, rank=10),
        case("more samples than parameters", 30, 4),
        case("one sample", 1, 6, rank=2),
        Case("rank deficient", deficient),
        Case("all zero", lambda g: {"grad_sample": torch.zeros(3, 5).double(), "rank": 2, "energy": None}),
        case("no sample", 0, 7, rank=2),
    ]


def directions(gram: Tensor, rank: int | None, energy: float | None, exact: bool) -> tuple[Tensor, float]:
    """Leading directions as combinations of N vectors with Gram matrix `[N, N]` float64, and their share of its trace.

    `[K, N]`: the basis is this times the vectors, orthonormal but for rounding. Vectors whose products are not finite
    are left out. `exact` if the products were made in float64, else in float32: fewer directions can be told.
    """
    usable = gram.diagonal().isfinite()
    own = gram[usable][:, usable].nan_to_num(0.0, 0.0, 0.0)
    scale = own.diagonal().max() if len(own) else own.new_zeros(())
    if not scale > 0:
        return gram.new_zeros(0, len(gram)), 0.0
    eigenvalues, vectors = (x.flip(-1) for x in torch.linalg.eigh((own + own.T) / (2 * scale)))
    kept = _kept(eigenvalues, rank, energy, _RANK_TOLERANCE if exact else _FLOAT32_TOLERANCE)
    found = gram.new_zeros(kept, len(gram))
    found[:, usable] = (vectors[:, :kept] / (eigenvalues[:kept] * scale).sqrt()).T
    return found, float(eigenvalues[:kept].sum() / eigenvalues.clamp(min=0).sum())


def _check_basis(grad_sample: Tensor, rank: int | None, energy: float | None) -> None:
    check_directions(rank, energy)


def check_directions(rank: int | None, energy: float | None) -> None:
    if rank is not None and (not isinstance(rank, Integral) or rank < 1):
        raise ValueError(f"rank is {rank}; pass a number of directions >= 1, or None for all")
    if energy is not None:
        check_number("energy", energy)
    if energy is not None and not 0 < energy <= 1:
        raise ValueError(f"energy is {energy}; pass the fraction to retain, in (0, 1], or None")


@define_op(
    shapes={"grad_sample": "N P"},
    returns=[Out("basis", "K P", rtol=1e-4, of_max=True)],
    oracle=lambda **inputs: _up_to_sign(_basis_oracle(**inputs)),
    cases=_basis_cases,
    cost=lambda grad_sample, **_: Cost(grad_sample.numel() * 8, 4 * grad_sample.shape[0] * grad_sample.numel()),
    validate=_check_basis,
)
def subspace_basis(grad_sample: Tensor, rank: int | None = None, energy: float | None = None) -> Tensor:
    """Orthonormal leading directions of public per-sample gradients, by their N x N Gram matrix.

    Args:
        grad_sample: public per-sample gradients `[N, P]`; rows with NaN or Inf are left out.
        rank: at most so many directions.
        energy: as few directions as retain this fraction of the squared gradients, in (0, 1]. With `rank`, the
            smaller of both.

    Returns:
        `[K, P]` float32 (float64 for float64 input), each row's largest entry positive. K is smaller than asked
        where the gradients span fewer dimensions, 0 if they are all zero.

    Source: Golatkar et al. 2022 (arXiv 2203.11481), section 4; Gram form of PCA.
    """
    rows = grad_sample.double()
    rows = rows[rows.isfinite().all(1)]
    scale = rows.abs().max() if rows.numel() else rows.new_zeros(())
    if scale == 0:
        return grad_sample.new_zeros(0, grad_sample.shape[1], dtype=sum_dtype(grad_sample))
    rows = rows / scale  # squares of extreme values stay in range
    eigenvalues, vectors = torch.linalg.eigh(rows @ rows.T)
    kept = _kept(eigenvalues.flip(0), rank, energy)
    directions = vectors.flip(1)[:, :kept].T @ rows
    # Small eigenvalues leave directions only nearly orthogonal; QR makes them so, in the same order.
    basis = torch.linalg.qr(directions.T).Q.T
    return _up_to_sign(basis).to(sum_dtype(grad_sample))


def _projection_cases(name: str, width: int) -> list[Case]:
    def case(title: str, rows: int, rank: int = 4, strided: bool = False) -> Case:
        def build(g: torch.Generator) -> dict[str, Tensor]:
            basis = torch.linalg.qr(randn(g, 21, rank)).Q.T
            return {name: randn(g, rows, width if width else rank), "basis": basis}

        return Case(title, build, strided)

    return [case("plain", 6), case("empty batch", 0), case("empty basis", 3, rank=0), case("strided", 5, strided=True)]


@define_op(
    shapes={"grad_sample": "... P", "basis": "K P"},
    returns=[Out("coordinates", "... K", rtol=2e-6, of_max=True)],
    oracle=lambda grad_sample, basis: (
        torch.stack([(grad_sample * row).sum(-1) for row in basis], -1) if len(basis) else grad_sample[..., :0]
    ),
    cases=lambda: _projection_cases("grad_sample", 21),
    cost=lambda grad_sample, basis: Cost(4 * grad_sample.numel(), 2 * grad_sample.numel() * len(basis)),
)
def project(grad_sample: Tensor, basis: Tensor) -> Tensor:
    """Coordinates of gradients in a subspace.

    Args:
        grad_sample: `[..., P]`.
        basis: orthonormal rows `[K, P]`, as `subspace_basis` gives them.

    Returns:
        `[..., K]` float32 (float64 if an input is). Clip these, not the gradients: noise is added to them.
    """
    return (grad_sample.double() @ basis.double().T).to(sum_dtype(grad_sample, basis))


@define_op(
    shapes={"coordinates": "... K", "basis": "K P"},
    returns=[Out("grad", "... P", rtol=2e-6, of_max=True)],
    oracle=lambda coordinates, basis: sum(
        (coordinates[..., k, None] * basis[k] for k in range(len(basis))),
        torch.zeros(*coordinates.shape[:-1], basis.shape[1], dtype=torch.float64),
    ),
    cases=lambda: _projection_cases("coordinates", 0),
    cost=lambda coordinates, basis: Cost(4 * basis.numel(), 2 * coordinates.numel() * basis.shape[1]),
)
def lift(coordinates: Tensor, basis: Tensor) -> Tensor:
    """Gradients of subspace coordinates, the transpose of `project`.

    Args:
        coordinates: `[..., K]`.
        basis: orthonormal rows `[K, P]`.

    Returns:
        `[..., P]` float32 (float64 if an input is).
    """
    return (coordinates.double() @ basis.double()).to(sum_dtype(coordinates, basis))
