"""Public and private rows in one backward pass: whose rows they are, and the exact sums of the public ones."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from adamix_kernels.nn.errors import PrivacyError
from adamix_kernels.ops._numerics import sum_dtype

if TYPE_CHECKING:
    from adamix_kernels.nn.ranks import Ranks

#: Rows of a batch: a slice takes a view, a tensor of indices a copy.
Index = slice | Tensor


@dataclass(frozen=True)
class Split:
    """A batch of `samples` rows, `count` of them public."""

    samples: int
    public: Index
    private: Index
    count: int
    weight: float


class PublicRows:
    """Which rows of the batches to come are public: a mask, or a slice."""

    def __init__(self, rows: Any, weight: Any) -> None:
        if not isinstance(weight, int | float) or isinstance(weight, bool):
            raise TypeError(f"weight: is {type(weight).__name__}; pass a number")
        if not 0 <= weight <= sys.float_info.max:
            raise ValueError(f"weight: is {weight}; pass a finite number, 0 or above")
        self.weight = float(weight)
        self._rows = _slice(rows) if isinstance(rows, slice) else self._of(_mask(rows))

    def split(self, samples: int) -> Split:
        """Of a batch of so many rows.

        Raises:
            PrivacyError: the rows are those of another batch.
        """
        rows = self._rows
        if isinstance(rows, slice):
            start, stop, step = rows.indices(samples)
            if step != 1 or not all(-samples <= (end or 0) <= samples for end in (rows.start, rows.stop)):
                raise PrivacyError(
                    f"public_rows: is {rows} for a batch of {samples} rows; pass a slice of some of them"
                )
            return self._run(samples, start, max(start, stop))
        if rows.samples != samples:
            raise PrivacyError(
                f"public_rows: is a mask of {rows.samples} rows for a batch of {samples}; pass one bool each"
            )
        return rows

    def _of(self, mask: Tensor) -> Split:
        public = mask.nonzero().flatten()
        if not len(public) or int(public[-1]) - int(public[0]) == len(public) - 1:
            first = int(public[0]) if len(public) else 0
            return self._run(len(mask), first, first + len(public))
        return Split(len(mask), public, (~mask).nonzero().flatten(), len(public), self.weight)

    def _run(self, samples: int, start: int, stop: int) -> Split:
        """Rows one after another; so are the others if they are all before or all after them."""
        private: Index
        if start == 0:
            private = slice(stop, samples)
        elif stop == samples:
            private = slice(0, start)
        else:
            private = torch.tensor([*range(start), *range(stop, samples)])
        return Split(samples, slice(start, stop), private, stop - start, self.weight)


def _slice(rows: slice) -> slice:
    try:
        rows.indices(0)
    except (TypeError, ValueError) as error:
        raise TypeError(f"public_rows: is {rows} ({error}); pass a slice of ints, such as slice(0, n)") from None
    return rows


def _mask(rows: Any) -> Tensor:
    """On the host: the sizes of both parts are needed there. A mask on a device is waited for, once."""
    try:
        found = torch.as_tensor(rows)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"public_rows: is {type(rows).__name__}; pass a bool mask [B], or a slice") from None
    if found.dtype != torch.bool and found.numel():
        raise TypeError(
            f"public_rows: has dtype {found.dtype}; pass a bool mask [B], True for a public row, or a slice"
        )
    if found.dim() != 1:
        raise ValueError(f"public_rows: has shape {list(found.shape)}; pass a bool mask [B], or a slice")
    return found.detach().to("cpu", torch.bool, copy=True)


class PublicSums:
    """Sums of public gradients by parameter, each pass's times its weight. They never meet a private row's numbers
    before these have noise: a public gradient however large cannot round them."""

    def __init__(self) -> None:
        self._staged: dict[str, Tensor] = {}  # of the backward pass that runs now
        self._totals: dict[str, Tensor] = {}
        self._weight = 0.0  # of all public rows since the last step

    def begin_pass(self) -> None:
        self._staged.clear()

    def add(self, name: str, total: Tensor) -> None:
        _accumulate(self._staged, name, total.to(sum_dtype(total)))

    def end_pass(self, split: Split | None) -> None:
        for name, total in self._staged.items():
            _accumulate(self._totals, name, total)
        self._staged.clear()
        if split is not None:
            self._weight += split.weight * split.count

    def stage(self, totals: Mapping[str, Tensor]) -> None:
        """Sums over all ranks, of the pass that ends."""
        self._staged.update(totals)

    @property
    def weight(self) -> float:
        """Of all public rows since the last step."""
        return self._weight

    def join(self, ranks: Ranks, trained: Sequence[tuple[str, Tensor]], weight: float) -> None:
        """The sums and the weight of all ranks."""
        self._weight = weight
        if ranks.shards is None:  # whose sums are added pass by pass
            sums = [
                self._totals[name]
                if name in self._totals
                else torch.zeros(p.shape, dtype=sum_dtype(p), device=p.device)
                for name, p in trained
            ]
            self._totals = dict(zip((name for name, _ in trained), ranks.added(sums), strict=True))

    def drop(self, name: str) -> None:
        self._totals.pop(name, None)

    def forget(self) -> None:
        self._staged.clear()
        self._totals.clear()
        self._weight = 0.0

    def mix_(self, released: Sequence[Tensor], names: Sequence[str], expected_batch_size: float) -> None:
        """(private release + weighted public sum) / (expected batch size + weighted number of public rows), in place
        of the private release over the expected batch size."""
        if not self._weight:
            return
        whole = expected_batch_size + self._weight
        torch._foreach_mul_(list(released), expected_batch_size / whole)
        for total, name in zip(released, names, strict=True):
            if name in self._totals:
                total.add_(self._totals[name], alpha=1 / whole)


def _accumulate(sums: dict[str, Tensor], name: str, total: Tensor) -> None:
    sums[name] = sums[name].add_(total) if name in sums else total
