"""Rows of map-style datasets: loaded, collated, checked, and compared by content one at a time."""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.data import default_collate

from adamix.errors import InputError
from adamix.rows import row_digests
from adamix.storage import one_line

#: Keys of a row that hold its label: two rows are the same if all else is.
LABELS = frozenset({"label", "labels"})
#: So many rows of a set are loaded twice: a flip with probability 1/2 leaves them all alike once in 65,536 times.
_LOADED_TWICE = 16

Collate = Callable[[list[Any]], Any]


class Data:
    """A set of rows, called `name` in messages.

    Args:
        dataset: has `len()` and gives rows by index: `(x, label)` pairs, dicts, or what `collate` takes. If it changes
            rows at random (augmentation), it needs a method `digest(index)` that gives the same for the same row.
        collate: makes a batch of a list of rows, with the batch in dimension 0 of every tensor.
        device, dtype: where the batch goes; floats become `dtype` (None: stay as they are).
        workers: threads that load rows.

    Raises:
        InputError: it is no such dataset.
    """

    def __init__(
        self,
        name: str,
        dataset: Any,
        collate: Collate | None = None,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        workers: int = 0,
    ) -> None:
        if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
            raise InputError(
                f"{name}: is {type(dataset).__name__}; pass a map-style dataset, with len() and rows by index (read an "
                "iterable one into a list)"
            )
        self.name, self._dataset = name, dataset
        self._collate, self._device, self._dtype = collate or collate_rows, device, dtype
        self._pool = ThreadPoolExecutor(workers) if workers else None

    def __len__(self) -> int:
        return len(self._dataset)

    def rows(self, indices: Sequence[int]) -> list[Any]:
        try:
            if self._pool is not None:
                return list(self._pool.map(self._dataset.__getitem__, indices))
            if hasattr(self._dataset, "__getitems__"):
                return list(self._dataset.__getitems__(list(indices)))
            return [self._dataset[i] for i in indices]
        except InputError:
            raise
        except Exception as error:  # a dataset may raise anything
            raise InputError(f"{self.name}: a row cannot be loaded ({one_line(error)}); mend or remove it") from error

    def batch(self, rows: list[Any]) -> Any:
        """Collated, on the device."""
        try:
            batch = self._collate(rows)
        except Exception as error:
            raise InputError(
                f"{self.name}: its rows cannot be collated ({one_line(error)}); give all of them one shape, or pass "
                "collate= (of transformers for instance DataCollatorWithPadding)"
            ) from error
        sizes = {len(x) if isinstance(x, Tensor) and x.dim() else 0 for x in tree_leaves(batch)}
        if sizes != {len(rows)}:
            raise InputError(
                f"{self.name}: collate gives tensors of {sorted(sizes)} rows for {len(rows)}; it must give tensors "
                "alone, with the batch in dimension 0 (remove columns of text)"
            )
        return tree_map(self._to_device, dict(batch) if isinstance(batch, Mapping) else batch)

    def _to_device(self, x: Tensor) -> Tensor:
        dtype = self._dtype if x.is_floating_point() and self._dtype is not None else x.dtype
        return x.to(self._device, dtype, non_blocking=True)

    def batches(self, size: int) -> Iterator[Any]:
        for start in range(0, len(self), size):
            yield self.batch(self.rows(range(start, min(start + size, len(self)))))

    def digests(self, like: Any = None, classes: int | None = None) -> list[Hashable]:
        """What stands for the content of each row but its label, row by row: nothing is kept in memory but this.

        Args:
            like: a row that the others must have the form of.
            classes: labels must be below; None: any.

        Raises:
            InputError: a row with NaN or Inf, of another form, or with a label out of range; or rows that are not
                the same when they are loaded again.
        """
        own = getattr(self._dataset, "digest", None)
        found: list[Hashable] = []
        for i in range(len(self)):
            (row,) = self.rows([i])
            if like is not None and _form(row) != _form(like):
                raise InputError(f"{self.name}: row {i} has not the form of public row 0; pass rows of one make")
            self._check(i, row, classes)
            if own is None and not _comparable(row):
                raise InputError(
                    f"{self.name}: row {i} is {type(row).__name__} without numbers or text that can be compared; pass "
                    "(x, label) rows or dicts, or give the dataset a method digest(index)"
                )
            found.append(content_digest(row) if own is None else own(i))
            if i < _LOADED_TWICE and own is None and content_digest(*self.rows([i])) != found[i]:
                raise InputError(
                    f"{self.name}: row {i} differs when it is loaded again, so that rows which are public and private "
                    "could not be found; give the dataset a method digest(index) of the row before it is changed"
                )
        return found

    def _check(self, i: int, row: Any, classes: int | None) -> None:
        arrays = [x for x in map(_array, tree_leaves(row)) if x is not None]
        if not all(bool(np.isfinite(x).all()) for x in arrays if x.dtype.kind == "f"):
            raise InputError(f"{self.name}: row {i} has NaN or Inf; clean or remove it")
        if classes is not None:
            label = _array(labels_of(row if isinstance(row, Mapping | tuple | list) else self.batch([row])))
            if label is None or label.dtype.kind not in "iu" or not ((label >= 0) & (label < classes)).all():
                raise InputError(
                    f"{self.name}: the label of row {i} is not a whole number in 0..{classes - 1}, the classes of the "
                    "model; renumber it or remove the row"
                )


def collate_rows(rows: list[Any]) -> Any:
    """torch's `default_collate`; numbers and lists of them, as rows of `datasets` have them, are tensors first."""
    return default_collate([_with_tensors(row) for row in rows])


def _with_tensors(row: Any) -> Any:
    if isinstance(row, Mapping):
        return {key: _tensor(x) for key, x in row.items()}
    return tuple(map(_tensor, row)) if isinstance(row, tuple | list) else row


def _tensor(value: Any) -> Any:
    return torch.as_tensor(value) if isinstance(value, list | int | float | np.generic | np.ndarray) else value


def labels_of(batch: Any) -> Any:
    """Of a batch or a row: None where there are none, or they cannot be told."""
    if isinstance(batch, Mapping):
        return next((batch[key] for key in batch if key in LABELS), None)
    return batch[1] if isinstance(batch, tuple | list) and len(batch) == 2 else None


def _content(row: Any) -> list[tuple[str, Any]]:
    """The parts of a row but its label: of several parts the last."""
    if isinstance(row, Mapping):
        return [(str(key), row[key]) for key in sorted(row, key=str) if key not in LABELS]
    several = (isinstance(row, tuple) and len(row) > 1) or (isinstance(row, list) and len(row) == 2)
    return [("x", part) for part in row[:-1]] if several else [("x", row)]  # a longer list may be of tokens


def _comparable(row: Any) -> bool:
    leaves = tree_leaves([part for _, part in _content(row)])
    return any(isinstance(leaf, str | bytes) or _array(leaf) is not None for leaf in leaves)


def content_digest(row: Any) -> bytes:
    """blake2b (16 bytes) of a row without its label; numbers compare as in `adamix.rows.row_digests`."""
    digest = hashlib.blake2b(digest_size=16)
    for key, part in _content(row):
        digest.update(key.encode() + b"\0")
        whole = _array(part)
        for leaf in tree_leaves(part) if whole is None else [whole]:
            array = _array(leaf)
            if array is not None:
                digest.update(row_digests(torch.from_numpy(np.array(array)).reshape(1, -1))[0])
            elif isinstance(leaf, str | bytes):
                digest.update(leaf.encode() if isinstance(leaf, str) else leaf)
    return digest.digest()


def _array(value: Any) -> Any:
    """As a NumPy array, if it is one, a tensor, numbers, or an image."""
    if isinstance(value, Tensor):
        return value.detach().cpu().float().numpy() if value.is_floating_point() else value.detach().cpu().numpy()
    if isinstance(value, str | bytes) or value is None:
        return None
    try:
        array = np.asarray(value)
    except (ValueError, TypeError):
        return None
    return array if array.dtype.kind in "biuf" else None


def _form(row: Any) -> Any:
    """Keys, or number of parts."""
    if isinstance(row, Mapping):
        return sorted(map(str, row))
    return len(row) if isinstance(row, tuple | list) else type(row).__name__


class PublicBatches:
    """Which public rows are in a step, by the seed alone: a resumed run sees those of the whole one."""

    def __init__(self, data: Data, size: int, seed: int) -> None:
        self.data, self.size, self._seed = data, min(size, len(data)), seed

    def rows(self, phase: int, step: int) -> list[Any]:
        key = hashlib.blake2b(f"{self._seed}/{phase}/{step}".encode(), digest_size=7).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(key, "little"))
        return self.data.rows(torch.randperm(len(self.data), generator=generator)[: self.size].tolist())


@contextmanager
def secret_generators(device: torch.device) -> Iterator[None]:
    """Python's, NumPy's and torch's generators have secret seeds within, and are as they were afterwards.

    What is drawn while private rows are loaded would tell from outside how many there were.
    """
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        seed = int.from_bytes(os.urandom(8), "little")
        torch.manual_seed(seed)
        random.seed(os.urandom(32))
        np.random.seed(seed % 2**32)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
