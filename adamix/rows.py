"""Labelled rows and the checks that every set of rows passes before training."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from adamix.errors import InputError
from adamix.storage import one_line

_SHOWN = 5  # how many classes or rows a message lists


class Rows(NamedTuple):
    """Labelled rows: x float32 (int64 if asked for) [N, ...], y int64 [N]."""

    x: Tensor
    y: Tensor


class UserRows(NamedTuple):
    """Labelled rows of users, whose privacy is that of all their rows together: users int64 [N], any numbers."""

    x: Tensor
    y: Tensor
    users: Tensor


@dataclass(frozen=True)
class Split:
    """The four sets of a run: disjoint for a benchmark; for user data no private row is public or a test row."""

    name: str  # "fashion-mnist", "letter", "digits", or the stem of the file or folder
    source: str  # one line: where the data come from, licence
    benchmark: bool  # True only for the built-in public benchmark sets: every row is already public knowledge
    class_names: tuple[str, ...]
    public: Rows
    private: Rows | UserRows
    validation: Rows  # may have 0 rows
    test: Rows
    expected_batch_size: int | None  # a PUBLIC constant: the private size of a benchmark; None for user data


def check_rows(
    name: str, rows: Any, num_classes: int | None = None, *, allow_empty: bool = False, keep_integers: bool = False
) -> Rows:
    """Validate and convert one set of rows; `name` ("private", ...) starts every message.

    rows: a pair (x, y) of torch tensors or things numpy takes. x holds floats or integers, [N, ...] with >= 2
    dimensions; y holds integers, [N], in [0, num_classes) (>= 0 if num_classes is None). Tensors stay on their device;
    memory is shared where nothing has to change. x becomes float32; with `keep_integers`, int32 and int64 become int64
    (numbers of tokens).

    Raises InputError for any other type or shape, for N == 0 unless `allow_empty`, for a NaN or Inf in x (also one
    that only float32 makes), and for a label out of range.
    """
    if not isinstance(rows, (tuple, list)) or len(rows) != 2:
        raise InputError(f"{name}: expected a pair (x, y), got {type(rows).__name__}; pass features and labels")
    x = _to_tensor(f"{name}: x", rows[0], torch.float32, keep_integers)
    y = _to_tensor(f"{name}: y", rows[1], torch.int64)
    if x.ndim < 2 or 0 in x.shape[1:]:
        raise InputError(f"{name}: x has shape {list(x.shape)}; pass [rows, features], with at least one feature")
    if y.ndim != 1:
        raise InputError(f"{name}: y has shape {list(y.shape)}; pass one class number per row, shape [{len(x)}]")
    if len(x) != len(y):
        raise InputError(f"{name}: x has {len(x)} rows but y has {len(y)}; pass one label per row")
    if len(x) == 0 and not allow_empty:
        raise InputError(f"{name}: x has 0 rows; pass at least one row")
    bad_rows = torch.nonzero(~torch.isfinite(x).flatten(1).all(1)).flatten().tolist()
    if bad_rows:
        raise InputError(
            f"{name}: x has NaN or Inf (as float32) in {len(bad_rows)} rows, first in row {bad_rows[0]}; "
            "clean or remove these rows"
        )
    outside = torch.nonzero((y < 0) if num_classes is None else ((y < 0) | (y >= num_classes))).flatten().tolist()
    if outside:
        allowed = ">= 0" if num_classes is None else f"in 0..{num_classes - 1} ({num_classes} classes)"
        raise InputError(
            f"{name}: y has label {int(y[outside[0]])} in row {outside[0]}; labels must be {allowed}; "
            "renumber them or remove these rows"
        )
    return Rows(x, y)


def check_private_rows(rows: Any, num_classes: int, *, keep_integers: bool = False) -> Rows | UserRows:
    """`check_rows` of private rows, a pair (x, y), or a triple (x, y, users) for privacy by user.

    users: integers, [N]; rows with the same number are one user's, who is protected as a whole.
    """
    if not isinstance(rows, (tuple, list)) or len(rows) != 3:
        return check_rows("private", rows, num_classes, allow_empty=True, keep_integers=keep_integers)
    x, y = check_rows("private", rows[:2], num_classes, allow_empty=True, keep_integers=keep_integers)
    users = _to_tensor("private: users", rows[2], torch.int64)
    if users.shape != y.shape:
        raise InputError(
            f"private: users has shape {list(users.shape)} but y has {list(y.shape)}; pass one user number per row"
        )
    return UserRows(x, y, users.to(y.device))


def check_classes_present(y_public: Tensor, num_classes: int, class_names: Sequence[str] | None = None) -> None:
    """InputError if one of the classes 0..num_classes-1 has no row in y_public, int64 [N]."""
    present = set(torch.unique(y_public).tolist())
    absent = num_classes - len(present)
    if absent > 0:
        shown = list(islice((c for c in range(num_classes) if c not in present), _SHOWN))
        listed = ", ".join(f"{c} ({class_names[c]})" if class_names is not None else str(c) for c in shown)
        raise InputError(
            f"public: {absent} of {num_classes} classes have no row: {listed}{', ...' if absent > _SHOWN else ''}; "
            "add at least one public row per class, or remove the class"
        )


def check_same_shape(name: str, rows: Rows, public: Rows) -> None:
    """InputError if a row of `rows` has not the shape and type of a public row."""
    if rows.x.shape[1:] != public.x.shape[1:]:
        raise InputError(
            f"{name}: rows have shape {list(rows.x.shape[1:])} but public rows have {list(public.x.shape[1:])}; "
            "pass the same features for both"
        )
    if rows.x.dtype != public.x.dtype:
        raise InputError(f"{name}: x is {rows.x.dtype} but public x is {public.x.dtype}; pass the same type for both")


def check_disjoint(first_x: Tensor, second_x: Tensor, names: tuple[str, str] = ("public", "private")) -> None:
    """InputError if a row of second_x, [M, ...], is also a row of first_x, [N, ...]; compared by `row_digests`.

    A public row spends no budget and a test error is published without noise, so a private row that is also a public
    or a test row would be used without protection.
    """
    check_no_overlap(row_digests(first_x), row_digests(second_x), names)


def check_no_overlap(
    first: Sequence[Hashable], second: Sequence[Hashable], names: tuple[str, str] = ("public", "private")
) -> None:
    """InputError if one of `second`, a value that stands for each row, is also in `first`; `names` are the sets'."""
    first_row: dict[Hashable, int] = {}
    for row, value in enumerate(first):
        first_row.setdefault(value, row)
    pairs = [(row, first_row[value]) for row, value in enumerate(second) if value in first_row]
    if pairs:
        shown = ", ".join(f"{names[1]} {row} = {names[0]} {other}" for row, other in pairs[:_SHOWN])
        more = ", ..." if len(pairs) > _SHOWN else ""
        raise InputError(
            f"{names[1]}: {len(pairs)} of {len(second)} rows are also {names[0]} rows ({shown}{more}); "
            "remove them from one of the two sets"
        )


def row_digests(x: Tensor, key: bytes = b"") -> list[bytes]:
    """blake2b (16 bytes, keyed by `key` of at most 64 bytes) over the values of each row of x, [N, ...].

    Floats are compared as float32, -0.0 as 0.0; integers exactly up to 2**53, and like floats of the same value.
    """
    digests: list[bytes] = []
    for part in torch.split(x.detach(), 1024):  # bounds the memory of the copies
        rounded = part.float() if part.is_floating_point() else part
        flat = rounded.flatten(1).cpu().double() + 0.0  # + 0.0 turns -0.0 into 0.0
        digests += [blake2b(row.tobytes(), digest_size=16, key=key).digest() for row in flat.numpy()]
    return digests


def _to_tensor(name: str, value: Any, dtype: torch.dtype, keep_integers: bool = False) -> Tensor:
    """`value` as a dense tensor of `dtype` (float32 takes floats and integers, int64 only integers), or InputError.

    With `keep_integers`, int32 and int64 become int64 instead.
    """
    if not isinstance(value, Tensor):
        try:
            array = np.asarray(value)
        except (ValueError, TypeError) as error:
            raise InputError(f"{name} is not an array ({one_line(error)}); pass a tensor or numpy array") from error
        _check_kind(name, str(array.dtype), array.dtype.kind in "iu", array.dtype.kind == "f", dtype)
        keep = keep_integers and array.dtype.kind == "i" and array.dtype.itemsize >= 4
        numpy_dtype = np.float32 if dtype == torch.float32 and not keep else np.int64
        with np.errstate(over="ignore"):  # float64 beyond float32: becomes Inf, which check_rows reports with its row
            array = np.ascontiguousarray(array.astype(numpy_dtype, copy=False))
        return torch.from_numpy(array if array.flags.writeable else array.copy())
    if value.layout != torch.strided:
        raise InputError(f"{name} is a {value.layout} tensor; pass a dense one (x.to_dense())")
    integer = value.dtype in _TORCH_INTEGERS
    _check_kind(name, str(value.dtype).removeprefix("torch."), integer, value.is_floating_point(), dtype)
    keep = keep_integers and value.dtype in (torch.int32, torch.int64)
    return value.detach().to(torch.int64 if keep else dtype).contiguous()


_TORCH_INTEGERS = frozenset(
    {torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.uint16, torch.uint32, torch.uint64}
)


def _check_kind(name: str, given: str, integer: bool, floating: bool, wanted: torch.dtype) -> None:
    if not integer and wanted == torch.int64:
        what = "user" if name.endswith("users") else "class"
        raise InputError(f"{name} has dtype {given}; pass integer {what} numbers (for example y.astype('int64'))")
    if not (integer or floating):
        raise InputError(f"{name} has dtype {given}; pass floats or integers")


def rank_in_class(y: NDArray[np.int64]) -> NDArray[np.int64]:
    """For each row of y, [N]: how many rows of the same class stand before it."""
    rank = np.empty(len(y), np.int64)
    for label in np.unique(y):
        rows = np.flatnonzero(y == label)
        rank[rows] = np.arange(len(rows))
    return rank
