"""Where the rows of a run come from: a public benchmark set, a feature file (.npz), or folders of images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from adamix.datasets import BENCHMARKS
from adamix.errors import InputError
from adamix.features import extract_features
from adamix.rows import Rows, check_classes_present, check_disjoint, check_rows, row_digests
from adamix.storage import read_npz

__all__ = ["Rows", "Split", "check_classes_present", "check_disjoint", "check_rows", "load_split"]

DEFAULT_SOURCE = "fashion-mnist"
_DEFAULT_SHOTS = 5
_SETS = ("public", "private", "test", "validation")
_OTHER_KEYS = {"X", "y", "Xt", "yt", "class_names"}


@dataclass(frozen=True)
class Split:
    """The four sets of a run: disjoint for a benchmark, public and private disjoint for user data."""

    name: str  # "fashion-mnist", "letter", "digits", or the stem of the file or folder
    source: str  # one line: where the data come from, licence
    benchmark: bool  # True only for the built-in public benchmark sets: every row is already public knowledge
    class_names: tuple[str, ...]
    public: Rows
    private: Rows
    validation: Rows  # may have 0 rows
    test: Rows
    expected_batch_size: int | None  # a PUBLIC constant: the private size of a benchmark; None for user data


def load_split(
    source: str = DEFAULT_SOURCE,
    *,
    public: str | None = None,
    private: str | None = None,
    test: str | None = None,
    shots: int | None = None,
    private_rows: int | None = None,
    validation_rows: int | None = None,
    seed: int = 0,
    backbone: str = "efficientnet-lite0",
    cache_dir: Path | None = None,
    progress: bool = True,
) -> Split:
    """Load `source`, or the three sets named by `public`, `private` and `test`.

    source: "fashion-mnist", "letter" or "digits": `shots` public rows per class (default 5), `private_rows` and
    `validation_rows` in total (defaults belong to the set), drawn by `seed`, and fixed test rows.
    source: a path to an .npz file with X_public, y_public, X_private, y_private, X_test, y_test (and optionally
    X_validation, y_validation, class_names), or with X, y, X_test, y_test (or Xt, yt) and `shots`: then `shots` rows
    per class, picked by `seed`, are declared public and the rest is private.
    source: a path to a folder with public/, private/ and test/ (optionally validation/), each with one subfolder of
    images per class. Images go through `extract_features` with `backbone`, `cache_dir` and `progress`.
    public, private, test: each a folder with one subfolder of images per class, or an .npz file with X and y.

    For user data `shots` keeps that many public rows per class, and all private rows are used.
    Raises InputError for anything missing, malformed or contradictory, for a class without public rows, and for a row
    that is public and private.
    """
    _check_counts(
        shots=(shots, 1), private_rows=(private_rows, 1), validation_rows=(validation_rows, 0), seed=(seed, 0)
    )
    images = {"backbone": backbone, "cache_dir": cache_dir, "progress": progress}
    named = {"public": public, "private": private, "test": test}
    if any(path is not None for path in named.values()):
        if source != DEFAULT_SOURCE:
            raise InputError(f"source: {source!r} given together with public, private or test; pass one or the other")
        if missing := [name for name, path in named.items() if path is None]:
            raise InputError(f"{missing[0]}: not given; pass public, private and test together")
        parts = {name: _load_part(name, Path(str(path)), images) for name, path in named.items()}
        origin = Path(str(private))
    elif source in BENCHMARKS:
        return _draw_benchmark(
            source,
            shots=shots,
            private_rows=private_rows,
            validation_rows=validation_rows,
            seed=seed,
            cache_dir=cache_dir,
        )
    else:
        origin = Path(source)
        parts = _load_source(origin, shots, seed, images)
    if private_rows is not None or validation_rows:
        # Which rows a draw leaves out depends on how many there are, so one record more or less would change two.
        name = "private_rows" if private_rows is not None else "validation_rows"
        raise InputError(f"{name}: only for the built-in sets; choose the rows before you write the file or folder")
    return _assemble(origin, parts, shots, seed)


class _Part(NamedTuple):
    """One set as it was read, unchecked."""

    x: Any
    y: Any
    class_names: tuple[str, ...] | None  # None: labels are plain numbers


def _check_counts(**given: tuple[Any, int]) -> None:
    for name, (value, least) in given.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
            raise InputError(f"{name}: {value!r} given; pass an integer >= {least}")


# ---- built-in sets


def _draw_benchmark(
    name: str,
    *,
    shots: int | None,
    private_rows: int | None,
    validation_rows: int | None,
    seed: int,
    cache_dir: Path | None,
) -> Split:
    data = BENCHMARKS[name](cache_dir)
    shots = _DEFAULT_SHOTS if shots is None else shots
    private_rows = data.private_rows if private_rows is None else private_rows
    validation_rows = data.validation_rows if validation_rows is None else validation_rows
    order = np.random.default_rng(seed).permutation(len(data.y))
    rank = _rank_in_class(data.y[order])
    if (smallest := int(np.bincount(data.y, minlength=len(data.class_names)).min())) < shots:
        raise InputError(f"shots: {shots} given, but the smallest class of {name} has {smallest} rows; ask for fewer")
    public, rest = order[rank < shots], order[rank >= shots]
    if private_rows + validation_rows > len(rest):
        raise InputError(
            f"private_rows: {private_rows} private and {validation_rows} validation rows asked, but {name} has "
            f"{len(rest)} besides {len(public)} public and {len(data.y_test)} test rows; ask for fewer"
        )
    if data.stratified:  # one row of every class in turn
        rest = rest[np.argsort(_rank_in_class(data.y[rest]), kind="stable")]
    # Validation comes first, so that it stays the same when only private_rows changes.
    validation, private = np.split(rest[: validation_rows + private_rows], [validation_rows])

    def take(rows: NDArray[np.int64]) -> Rows:
        return Rows(torch.from_numpy(data.x[rows]), torch.from_numpy(data.y[rows]))

    return Split(
        name=name,
        source=data.source,
        benchmark=True,
        class_names=data.class_names,
        public=take(public),
        private=take(private),
        validation=take(validation),
        test=Rows(torch.from_numpy(data.x_test), torch.from_numpy(data.y_test)),
        expected_batch_size=private_rows,
    )


def _rank_in_class(y: NDArray[np.int64]) -> NDArray[np.int64]:
    """For each row of y, [N]: how many rows of the same class stand before it."""
    rank = np.empty(len(y), np.int64)
    for label in np.unique(y):
        rows = np.flatnonzero(y == label)
        rank[rows] = np.arange(len(rows))
    return rank


# ---- user data


def _load_source(path: Path, shots: int | None, seed: int, images: Mapping[str, Any]) -> dict[str, _Part]:
    if path.is_dir():
        wanted = [name for name in _SETS if name != "validation" or (path / name).is_dir()]
        for name in wanted:
            if not (path / name).is_dir():
                raise InputError(f"source: {path} has no subfolder {name}/; it needs public/, private/ and test/")
        return {name: _load_part(name, path / name, images) for name in wanted}
    if path.suffix != ".npz":
        raise InputError(
            f"source: {str(path)!r} is neither a built-in set ({', '.join(BENCHMARKS)}), nor a folder, "
            "nor an .npz file; check the name or path"
        )
    arrays: dict[str, Any] = dict(
        read_npz(path, str(path), {f"{key}_{name}" for name in _SETS for key in "Xy"} | _OTHER_KEYS)
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
        pool = check_rows(f"{path}: X, y", (arrays["X"], arrays["y"]))
        picked = _pick_public(pool, shots, seed)
        arrays["X_public"], arrays["y_public"] = pool.x[picked], pool.y[picked]
        arrays["X_private"], arrays["y_private"] = pool.x[~picked], pool.y[~picked]
    _need(str(path), arrays, [f"{key}_{name}" for name in _SETS[:3] for key in "Xy"] + optional)
    return {name: _Part(arrays[f"X_{name}"], arrays[f"y_{name}"], names) for name in _SETS if f"X_{name}" in arrays}


def _load_part(name: str, path: Path, images: Mapping[str, Any]) -> _Part:
    if path.is_dir():
        features = extract_features(path, **images)
        return _Part(features.x, features.y, features.class_names)
    if path.suffix != ".npz":
        raise InputError(f"{name}: {str(path)!r} is neither a folder nor an .npz file; check the path")
    arrays = read_npz(path, f"{name}: {path}", ("X", "y", "class_names"))
    _need(f"{name}: {path}", arrays, ["X", "y"])
    return _Part(arrays["X"], arrays["y"], _class_names(f"{name}: {path}", arrays))


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


def _pick_public(rows: Rows, shots: int, seed: int) -> Tensor:
    """bool [N]: the `shots` rows of each class whose hash, keyed by the seed, is smallest.

    The choice looks at each row alone, so a private row more or less leaves the public rows as they are.
    """
    digests = row_digests(rows.x, key=str(seed).encode()[:64])
    order = np.array(sorted(range(len(digests)), key=digests.__getitem__))
    picked = torch.zeros(len(order), dtype=torch.bool)
    picked[order[_rank_in_class(rows.y.numpy()[order]) < shots]] = True
    return picked


def _assemble(origin: Path, parts: Mapping[str, _Part], shots: int | None, seed: int) -> Split:
    names = parts["public"].class_names
    public = check_rows("public", (parts["public"].x, parts["public"].y), None if names is None else len(names))
    # Without names the public labels alone say how many classes there are: the private rows must not.
    classes = int(public.y.max()) + 1 if names is None else len(names)
    check_classes_present(public.y, classes, names)
    if shots is not None:
        fewest = int(torch.bincount(public.y).min())
        if fewest < shots:
            raise InputError(f"shots: {shots} given, but a class has {fewest} public rows; ask for fewer")
        keep = _pick_public(public, shots, seed)
        public = Rows(public.x[keep], public.y[keep])
    rows = {name: _match(name, part, names, classes) for name, part in parts.items() if name != "public"}
    rows.setdefault("validation", Rows(public.x[:0], public.y[:0]))
    for name, other in rows.items():
        if other.x.shape[1:] != public.x.shape[1:]:
            raise InputError(
                f"{name}: rows have shape {list(other.x.shape[1:])} but public rows have {list(public.x.shape[1:])}; "
                "make all sets with the same network and settings"
            )
    check_disjoint(public.x, rows["private"].x)
    return Split(
        name=origin.stem,
        source=f"user data from {origin}; licence not stated",
        benchmark=False,
        class_names=names or tuple(str(label) for label in range(classes)),
        public=public,
        expected_batch_size=None,
        **rows,
    )


def _match(name: str, part: _Part, names: tuple[str, ...] | None, classes: int) -> Rows:
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
