"""The engine's adaptive subspace: private gradients are clipped, and get noise, in few public directions.

Public rows' gradients g_1 .. g_N are kept in factors. With K[i, j] = <g_i, g_j> = V diag(l) V^T the basis of the k
leading directions is U = M G, with G the gradients, one in each row, and M = diag(l)^(-1/2) V_k^T, `[k, N]`. Neither U
nor G is made: coordinates of a private gradient are U g = M (<g_1, g>, .., <g_N, g>), and what is lifted is
U^T z = sum_i (M^T z)_i g_i, a weighted sum over public rows.

Why it is private. Let c_b be the coordinates of sample b as they were computed, whatever their rounding, and however
far U is from orthonormal. c_b depends on sample b, the public rows and the released weights alone. It is clipped: what
is added to the sum is f_b c_b with |f_b c_b| <= C (1 + 1e-6), by `grad_norm_sq` of c_b, which is rounded up, and
`clip_coef`, which is rounded down; 0 where c_b is not finite. So adding or removing a sample moves the sum S, of k
numbers, by at most C, and S + N(0, (sigma C)^2 I_k) is a Gaussian mechanism with noise multiplier sigma. M, the kept
factors and hence the lifting do not depend on private rows of this step: it is post-processing. With G groups that are
clipped apart (layers, or parameters in and outside of the subspace) to thresholds C_1 .. C_G, the vector of all
S_g / C_g has sensitivity sqrt(G), so group g gets noise of standard deviation sigma sqrt(G) C_g.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from adamix_kernels.nn.adaptive import PublicQuantile
from adamix_kernels.nn.basis import Basis, Group, names_of
from adamix_kernels.nn.clipping import Limit
from adamix_kernels.nn.errors import PrivacyError
from adamix_kernels.nn.factors import Factors
from adamix_kernels.nn.inner_products import copied
from adamix_kernels.nn.parameter import PrivateParameter
from adamix_kernels.nn.report import held, mebi, size_of
from adamix_kernels.nn.subspace_sums import SubspaceSums
from adamix_kernels.ops.quantile import norm_quantile
from adamix_kernels.ops.subspace import check_directions

if TYPE_CHECKING:
    from adamix_kernels.nn.engine import DPEngine

Record = tuple[tuple[PrivateParameter, ...], Factors]

#: A public quantile is not below this share of the largest norm: a threshold must be above 0.
_LEAST = 1e-6


class PublicSubspace:
    """What `DPEngine.public_subspace` gives; printing it tells ranks, retained energy and memory.

    Args: as those of `DPEngine.public_subspace`.
    """

    def __init__(
        self,
        engine: DPEngine,
        rank: int | None,
        energy: float | None,
        every: int,
        parameters: Sequence[str] | None,
        quantile: float | None,
        max_bytes: int,
    ) -> None:
        if engine.ranks is not None:
            raise PrivacyError("public_subspace(): coordinates are not added up over ranks; train in one process")
        if isinstance(engine.max_grad_norm, PublicQuantile):
            raise ValueError("max_grad_norm: is a PublicQuantile; set it to a number, and pass quantile= here")
        if engine._sums.begun:
            raise PrivacyError("public_subspace(): a backward pass waits for its step; call it before")
        check_directions(rank, energy)
        if engine.strategy == "two_pass":
            raise ValueError(
                "strategy: is 'two_pass', whose second pass has no coordinates; pass 'auto' or 'per_layer'"
            )
        for name, value in (("every", every), ("max_bytes", max_bytes)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name}: is {value!r}; pass an int >= 1")
        if quantile is not None and not (isinstance(quantile, int | float) and 0 < quantile <= 1):
            raise ValueError(f"quantile: is {quantile!r}; pass a number in (0, 1], or None for max_grad_norm")
        if isinstance(parameters, str):
            raise TypeError(f"parameters: is the str {parameters!r}; pass a list of names or patterns")
        for pattern in parameters or ():
            if not any(fnmatchcase(name, pattern) for name in engine.layers):
                raise ValueError(
                    f"parameters: {pattern!r} matches no parameter; names are as {next(iter(engine.layers))!r}"
                )
        self._engine, self._parameters = engine, None if parameters is None else tuple(parameters)
        self._rank, self._energy, self._quantile, self._every = rank, energy, quantile, every
        self.max_bytes = max_bytes
        self.bases: dict[Group, Basis] = {}
        self._new: dict[Group, Basis] | None = None  # while public rows run
        self._made_at: int | None = None
        self.sums = SubspaceSums(engine, self)

    # --- what it knows -------------------------------------------------------------------------------------------

    @property
    def due(self) -> bool:
        """Whether the next backward pass or step needs public rows first."""
        return self._made_at is None or not 0 <= self._engine.steps - self._made_at < self._every

    @property
    def ranks(self) -> dict[str, int]:
        """Directions, by layer, or of "" if all parameters are one group."""
        return {group.layer or "": len(basis.matrix) for group, basis in self.bases.items()}

    @property
    def thresholds(self) -> dict[str, float]:
        """Of coordinates, by layer, if they are a public quantile."""
        limits = {g.layer or "": self._public_limit(g) for g in self.bases} if self._quantile is not None else {}
        return {name: limit for name, limit in limits.items() if limit is not None}

    @property
    def rows(self) -> int:
        """Public rows that are kept."""
        return max((sum(map(len, basis.scales)) for basis in self.bases.values()), default=0)

    @property
    def memory(self) -> int:
        """Bytes of the public rows' factors and of M: all that is kept between steps."""
        return _bytes(self.bases)

    def __repr__(self) -> str:
        if not self.bases:
            return f"PublicSubspace(no public rows yet, at most {mebi(self.max_bytes)})"
        ranks, energies = sorted(self.ranks.values()), sorted(basis.energy for basis in self.bases.values())
        parts = [
            f"rank {_range([str(rank) for rank in ranks])}",
            f"{self.rows} public rows",
            f"{_range([f'{100 * energy:.1f}' for energy in energies])} % of their energy",
            f"{mebi(self.memory)} of at most {mebi(self.max_bytes)}",
        ]
        return f"PublicSubspace({', '.join(parts)})"

    # --- public rows ---------------------------------------------------------------------------------------------

    def refresh(self, loss: Callable[[], Tensor | Iterable[Tensor]]) -> bool:
        """Compute the subspace anew if it is due; call it before each batch.

        Args:
            loss: called only if it is due; runs the model on public rows, and on nothing else, and returns their loss,
                as the loop's own (same reduction and loss_scale), or yields that of some rows after another. Backward
                passes are made here.

        Returns:
            Whether it was computed.

        Raises:
            PrivacyError: between a backward pass and its step, whose coordinates would be those of another subspace.
            ValueError: the rows' factors take more than `max_bytes`; the message tells how many rows fit.
        """
        if not self.due:
            return False
        if self.sums.pending:
            raise PrivacyError("refresh(): a backward pass waits for its step; call it before the first one of a step")
        self.bases, self._made_at, self._new = {}, None, {}
        try:
            with torch.enable_grad():
                value = loss()
                for part in [value] if isinstance(value, Tensor) else value:
                    part.backward()
            bases = self._new
        finally:
            self._new = None
        if not bases:
            raise PrivacyError(
                "refresh(): no gradient of a parameter in the subspace came; return the loss of the model on public "
                "rows, outside of public()"
            )
        with torch.no_grad():
            for basis in bases.values():
                basis.compute(self._rank, self._energy)
        self.bases, self._made_at = bases, self._engine.steps
        return True

    def _keep(self, new: dict[Group, Basis], groups: Mapping[Group, list[Record]], samples: int) -> None:
        copies: dict[Any, Tensor] = {}  # layers with the same input share one; the originals may be written to later
        for group, parts in groups.items():
            if group.projected:
                basis = new.setdefault(group, Basis())
                basis.chunks.append({names_of(ps): copied(part, copies) for ps, part in parts})
                scale = torch.full((samples,), self._engine._sums.scale(samples), dtype=torch.float64)
                basis.scales.append(scale)
        size = _bytes(new)
        if size > self.max_bytes:
            kept = max(sum(map(len, basis.scales)) for basis in new.values())
            raise ValueError(
                f"max_bytes: factors of {kept} public rows take {mebi(size)} or more, above {mebi(self.max_bytes)}; "
                f"pass about {max(1, int(kept * self.max_bytes / size))} rows, or fewer parameters, or raise max_bytes"
            )

    @property
    def takes_public_rows(self) -> bool:
        """Whether a backward pass is one of `refresh`."""
        return self._new is not None

    def take(self, parts: Sequence[Record], layer: str | None) -> Tensor:
        """Gradients of a layer or the whole; squared norms `[B]` of what is clipped, as the loss scales it."""
        self._check_apart()
        samples = parts[0][1].samples
        groups: dict[Group, list[Record]] = {}
        for record in parts:
            groups.setdefault(self._group(record[0], layer), []).append(record)
        if self._new is not None:
            self._keep(self._new, groups, samples)
            return torch.zeros(samples, dtype=torch.float64)
        self.check_current()
        return self.sums.take(groups, samples)

    def _check_apart(self) -> None:
        if self._engine.public_rows is not None or isinstance(self._engine.max_grad_norm, PublicQuantile):
            raise PrivacyError(
                "mixed() and PublicQuantile do not go with public_subspace(): public rows are those of refresh(); pass "
                "them there, and quantile= to public_subspace()"
            )

    def check_current(self) -> None:
        self._check_apart()
        if self.due:
            old = f"it is of step {self._made_at}, and is to be computed anew every {self._every} steps"
            raise PrivacyError(
                f"subspace: {'there are no public rows yet' if self._made_at is None else old}; call refresh() with "
                "the loss of public rows before each batch"
            )

    # --- groups and thresholds -----------------------------------------------------------------------------------

    def inside(self, name: str) -> bool:
        return self._parameters is None or any(fnmatchcase(name, pattern) for pattern in self._parameters)

    def _group(self, parameters: Sequence[PrivateParameter], layer: str | None) -> Group:
        inside = {self.inside(p._dp_name) for p in parameters}
        if len(inside) > 1:
            names = [p._dp_name for p in parameters]
            raise PrivacyError(
                f"parameters: only some of {names} are in the subspace, and their gradients come together; name all "
                "of them, or none"
            )
        return Group(layer, inside.pop())

    def trained(self) -> set[Group]:
        """The groups that a step releases."""
        engine = self._engine
        by_layer = engine.strategy == "per_layer"
        return {
            Group(engine.layers[name] if by_layer else None, self.inside(name))
            for name, p in engine._attached.owned
            if p.requires_grad
        }

    def limit(self, group: Group) -> Limit:
        """The threshold of a group, in the backward pass that runs now or began last."""
        public = self._public_limit(group) if group.projected else None
        if public is not None:
            return public
        threshold = self._engine._sums.threshold
        limit = threshold.whole if group.layer is None else threshold.layer(group.layer)
        both = Group(group.layer, not group.projected) in self.trained() and self._quantile is None
        return limit / math.sqrt(2) if both else limit

    def _public_limit(self, group: Group) -> float | None:
        basis = self.bases.get(group)
        if self._quantile is None or basis is None or not len(basis.matrix):
            return None
        largest = basis.norm_sq.max()  # over which all are in the range of float32
        return (
            max(float(norm_quantile((basis.norm_sq / largest).float(), self._quantile)), _LEAST) * float(largest) ** 0.5
        )


def _bytes(bases: Mapping[Group, Basis]) -> int:
    kept = [x for basis in bases.values() for parts in basis.chunks for part in parts.values() for x in held(part)]
    kept += [basis.matrix for basis in bases.values()]
    return sum(size_of(x) for x in {x.data_ptr(): x for x in kept}.values())


def _range(ordered: Sequence[str]) -> str:
    return ordered[0] if ordered[0] == ordered[-1] else f"{ordered[0]} to {ordered[-1]}"
