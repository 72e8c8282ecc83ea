"""Rows of a user: feature files and image folders, read, checked and matched to the public classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from adamix.datasets import BENCHMARKS
from adamix.errors import InputError
from adamix.features import extract_features
from adamix.rows import (
    Rows,
    Split,
    check_classes_present,
    check_disjoint,
    check_no_overlap,
    check_private_rows,
    check_rows,
    check_same_shape,
    rank_in_class,
    row_digests,
)
from adamix.storage import read_npz

_SETS = ("public", "private", "test", "validation")
_OTHER_KEYS = {"X", "y", "digests", "Xt", "yt", "class_names", "users", "users_private"}


class Part(NamedTuple):
    """One set as it was read, unchecked."""

    x: Any
    y: Any
    class_names: tuple[str, ...] | None  # None: labels are plain numbers
    digests: Sequence[str] | None  # one per row; None: the file has none
    users: Any = None  # of private rows only: one number per row; None: records are protected


def load_source(path: Path, shots: int | None, seed: int, images: Mapping[str, Any]) -> dict[str, Part]:
    if path.is_dir():
        wanted = [name for name in _SETS if name != "validation" or (path / name).is_dir()]
        for name in wanted:
            if not (path / name).is_dir():
                raise InputError(f"source: {path} has no subfolder {name}/; it needs public/, private/ and test/")
        return {name: load_part(name, path / name, images) for name in wanted}
    if path.suffix != ".npz":
        raise InputError(
            f"source: {str(path)!r} is neither a built-in set ({', '.join(BENCHMARKS)}), nor a folder, "
            "nor an .npz file; check the name or path"
        )
    arrays: dict[str, Any] = dict(
        read_npz(path, str(path), {f"{key}_{name}" for name in _SETS for key in ("X", "y", "digests")} | _OTHER_KEYS)
    )
    names = _class_names(str(path), arrays)
    for key in "Xy":  # the short names of the test rows
        if f"{key}t" in arrays:
            arrays.setdefault(f"{key}_test", arrays[f"{key}t"])
    optional = ["X_validation", "y_validation"] if arrays.keys() & {"X_validation", "y_validation"} else []
    if "X" in arrays and not arrays.keys() & {"X_public", "X_private"}:
        _need(str(path), arrays, ["X", "y", "X_test", "y_test", *optional])
        if shots is None:
            raise InputError(
                f"shots: not given, and {path} has X, y without a public part; some rows must be declared public: "
                "pass shots (that many rows per class), or write X_public, y_public, X_private, y_private"
            )
        if "users" in arrays:
            raise InputError(
                f"{path}: users beside X, y without a public part; rows drawn as public could be those of a protected "
                "user: write X_public, y_public, X_private, y_private, users_private"
            )
        pool = check_rows(f"{path}: X, y", (arrays["X"], arrays["y"]))
        picked = _pick_public(pool, shots, seed)
        arrays["X_public"], arrays["y_public"] = pool.x[picked], pool.y[picked]
        arrays["X_private"], arrays["y_private"] = pool.x[~picked], pool.y[~picked]
        if (digests := _digests(str(path), arrays)) is not None:
            split = np.array(digests)
            arrays["digests_public"], arrays["digests_private"] = split[picked.numpy()], split[~picked.numpy()]
    _need(str(path), arrays, [f"{key}_{name}" for name in _SETS[:3] for key in "Xy"] + optional)
    parts = {
        name: Part(arrays[f"X_{name}"], arrays[f"y_{name}"], names, _digests(str(path), arrays, f"_{name}"))
        for name in _SETS
        if f"X_{name}" in arrays
    }
    if "users" in arrays:
        raise InputError(f"{path}: users beside X_private; call it users_private")
    return parts | {"private": parts["private"]._replace(users=arrays.get("users_private"))}


def load_part(name: str, path: Path, images: Mapping[str, Any]) -> Part:
    if path.is_dir():
        try:
            features = extract_features(path, **images)
        except InputError as error:
            if str(error).startswith("source: "):  # the argument of extract_features, here the set of that name
                raise InputError(f"{name}: {str(error).removeprefix('source: ')}") from error
            raise
        return Part(features.x, features.y, features.class_names, features.digests)
    if path.suffix != ".npz":
        raise InputError(f"{name}: {str(path)!r} is neither a folder nor an .npz file; check the path")
    arrays = read_npz(path, f"{name}: {path}", ("X", "y", "class_names", "digests", "users"))
    _need(f"{name}: {path}", arrays, ["X", "y"])
    return Part(
        arrays["X"],
        arrays["y"],
        _class_names(f"{name}: {path}", arrays),
        _digests(f"{name}: {path}", arrays),
        arrays.get("users") if name == "private" else None,
    )


def _need(name: str, arrays: Mapping[str, Any], keys: list[str]) -> None:
    if missing := [key for key in keys if key not in arrays]:
        raise InputError(f"{name}: key {missing[0]!r} is missing; the file needs {', '.join(keys)}")


def _class_names(name: str, arrays: Mapping[str, Any]) -> tuple[str, ...] | None:
    names = arrays.get("class_names")
    if names is None:
        return None
    if names.ndim != 1 or names.dtype.kind != "U" or len(set(names.tolist())) != len(names):
        raise InputError(
            f"{name}: class_names is {names.dtype} {list(names.shape)}; store distinct strings, one a class"
        )
    return tuple(names.tolist())


def _digests(name: str, arrays: Mapping[str, Any], suffix: str = "") -> list[str] | None:
    digests = arrays.get(f"digests{suffix}")
    if digests is None:
        return None
    if digests.dtype.kind != "U" or digests.shape != arrays[f"X{suffix}"].shape[:1]:
        raise InputError(
            f"{name}: digests{suffix} is {digests.dtype} {list(digests.shape)}; store one string per row of X{suffix}, "
            "or leave it out"
        )
    return digests.tolist()


def _pick_public(rows: Rows, shots: int, seed: int) -> Tensor:
    """bool [N]: the `shots` rows of each class whose hash, keyed by the seed, is smallest.

    The choice looks at each row alone, so a private row more or less leaves the public rows as they are.
    """
    digests = row_digests(rows.x, key=str(seed).encode()[:64])
    order = np.array(sorted(range(len(digests)), key=digests.__getitem__))
    picked = torch.zeros(len(order), dtype=torch.bool)
    picked[order[rank_in_class(rows.y.numpy()[order]) < shots]] = True
    return picked


def assemble(origin: Path, parts: Mapping[str, Part], shots: int | None, seed: int) -> Split:
    names = parts["public"].class_names
    public = check_rows("public", (parts["public"].x, parts["public"].y), None if names is None else len(names))
    # Without names the public labels alone say how many classes there are: the private rows must not.
    classes = int(public.y.max()) + 1 if names is None else len(names)
    check_classes_present(public.y, classes, names)
    rows: dict[str, Any] = {"public": public}
    rows |= {name: _match(name, part, names, classes) for name, part in parts.items() if name != "public"}
    rows.setdefault("validation", Rows(public.x[:0], public.y[:0]))
    for name, other in rows.items():
        check_same_shape(name, other, public)
    for pair in (("public", "private"), ("private", "test")):
        first, second = (parts[name].digests for name in pair)
        if first is not None and second is not None:
            check_no_overlap(first, second, pair)
        check_disjoint(rows[pair[0]].x, rows[pair[1]].x, pair)
    if shots is not None:
        fewest = int(torch.bincount(public.y).min())
        if fewest < shots:
            raise InputError(f"shots: {shots} given, but a class has {fewest} public rows; ask for fewer")
        keep = _pick_public(public, shots, seed)
        rows["public"] = Rows(public.x[keep], public.y[keep])
    if parts["private"].users is not None:
        rows["private"] = check_private_rows((*rows["private"], parts["private"].users), classes)
    return Split(
        name=origin.stem,
        source=f"user data from {origin}; licence not stated",
        benchmark=False,
        class_names=names or tuple(str(label) for label in range(classes)),
        expected_batch_size=None,
        **rows,
    )


def _match(name: str, part: Part, names: tuple[str, ...] | None, classes: int) -> Rows:
    """Check a set and renumber its labels to those of the public set."""
    if (names is None) != (part.class_names is None):
        raise InputError(f"{name}: class_names in one of public and {name} only; give them in both files or in neither")
    rows = check_rows(
        name, (part.x, part.y), classes if names is None else len(part.class_names or ()), allow_empty=name == "private"
    )
    if names is None or part.class_names is None or part.class_names == names:
        return rows
    if unknown := [label for label in part.class_names if label not in names]:
        raise InputError(
            f"{name}: class {unknown[0]!r} is not among the public classes ({', '.join(names)}); "
            "add public rows of it, or remove it"
        )
    return Rows(rows.x, torch.tensor([names.index(label) for label in part.class_names])[rows.y])
