"""Privacy by user: gradients of one user's rows are added before they are clipped."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from adamix_kernels.nn.errors import PrivacyError
from adamix_kernels.nn.factors import Factors, PerSample
from adamix_kernels.nn.parameter import PrivateParameter
from adamix_kernels.ops._numerics import sum_dtype

Record = tuple[tuple[PrivateParameter, ...], Factors]


class Users:
    """Whose rows a backward pass has. Sums of a user stand in the place of their first row, the other rows are zero."""

    def __init__(self) -> None:
        self._ids: Tensor | None = None  # [B] of the pass that runs now
        self._seen: set[int] = set()  # in passes since the last step

    @contextmanager
    def of(self, ids: Any) -> Iterator[None]:
        """`ids` [B] tell the users of the rows of the backward passes inside."""
        outer, self._ids = self._ids, _checked(ids)
        try:
            yield
        finally:
            self._ids = outer

    def summed(self, parts: Sequence[Record]) -> list[Record]:
        """Gradients `[B, *]` by user."""
        owners = self._owners(parts[0][1].samples)
        return [(ps, PerSample([_fold(g, owners) for g in factors.grad_sample()])) for ps, factors in parts]

    def end_pass(self, norm_sq: Tensor) -> Tensor:
        """Note the users of a pass that has ended well; of its squared norms `[B]` those of users."""
        owners = self._owners(len(norm_sq))
        assert self._ids is not None  # _owners
        self._seen |= set(self._ids.tolist())
        return norm_sq[owners.unique().to(norm_sq.device)]

    @property
    def seen(self) -> set[int]:
        """Users of passes since the last step."""
        return self._seen

    def forget(self) -> None:
        self._seen.clear()

    def _owners(self, samples: int) -> Tensor:
        """`[B]`: the first row of each row's user."""
        if self._ids is None:
            raise PrivacyError(
                "backward(): unit is 'user', and nothing tells whose rows these are; call it within users(ids)"
            )
        if len(self._ids) != samples:
            raise PrivacyError(f"users: {len(self._ids)} ids for a batch of {samples} rows; pass one id per row")
        again = len(self._seen & set(self._ids.tolist()))
        if again:
            raise PrivacyError(
                f"users: {again} users of this backward pass were in one before it in the same step, and would be "
                "clipped twice and count twice; put all rows of a user into one backward pass"
            )
        found, index = self._ids.unique(return_inverse=True)
        first = torch.full_like(found, samples).scatter_reduce_(0, index, torch.arange(samples), "amin")
        return first[index]


def _checked(ids: Any) -> Tensor:
    try:
        found = torch.as_tensor(ids)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"ids: is {type(ids).__name__}; pass integers [B], one for each row of the batch") from None
    if found.numel() and (found.is_floating_point() or found.is_complex() or found.dtype == torch.bool):
        raise TypeError(f"ids: has dtype {found.dtype}; pass integers [B], one for each row of the batch")
    if found.dim() != 1:
        raise ValueError(f"ids: has shape {list(found.shape)}; pass integers [B], one for each row of the batch")
    return found.detach().to("cpu", torch.int64, copy=True)


def _fold(grads: Tensor, owners: Tensor) -> Tensor:
    wide = grads.to(sum_dtype(grads))
    return torch.zeros_like(wide).index_add_(0, owners.to(wide.device), wide)
