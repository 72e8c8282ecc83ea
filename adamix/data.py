"""Where the rows of a run come from: a public benchmark set, a feature file (.npz), or folders of images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from adamix.benchmark_set import Benchmark
from adamix.datasets import BENCHMARKS
from adamix.errors import InputError
from adamix.rows import Rows, Split, rank_in_class
from adamix.user_data import assemble, load_part, load_source

__all__ = ["DEFAULT_SOURCE", "Split", "load_split"]

DEFAULT_SOURCE = "fashion-mnist"
_DEFAULT_SHOTS = 5


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

    source: a built-in set, as "fashion-mnist", "letter" or "digits" (`adamix.datasets.BENCHMARKS`): `shots` public rows
    per class (default 5), `private_rows` and `validation_rows` in total (defaults belong to the set), drawn by `seed`,
    and fixed test rows.
    source: a path to an .npz file with X_public, y_public, X_private, y_private, X_test, y_test (and optionally
    X_validation, y_validation, class_names), or with X, y, X_test, y_test (or Xt, yt) and `shots`: then `shots` rows
    per class, picked by `seed`, are declared public and the rest is private.
    source: a path to a folder with public/, private/ and test/ (optionally validation/), each with one subfolder of
    images per class. Images go through `extract_features` with `backbone`, `cache_dir` and `progress`, which always
    keeps the features, also of private images, in features/ (mode 0700) of `cache_dir`, else $ADAMIX_CACHE, else
    ~/.cache/adamix: name a folder that may hold them, and delete it when it must not stay.
    public, private, test: each a folder with one subfolder of images per class, or an .npz file with X and y.

    For user data `shots` keeps that many public rows per class, and all private rows are used. An .npz file may also
    have one string per row that tells equal images (`adamix features` writes it): digests beside X, and
    digests_public, ... beside X_public, ... With integers `users` (`users_private` beside X_private), one per private
    row, all rows of a user are protected together.
    Raises InputError for anything missing, malformed or contradictory, for a class without public rows, and for a row
    of user data that is private and also public or a test row: by the digests where both sets have them, and by x.
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
        parts = {name: load_part(name, Path(str(path)), images) for name, path in named.items()}
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
        parts = load_source(origin, shots, seed, images)
    if private_rows is not None or validation_rows:
        # Which rows a draw leaves out depends on how many there are, so one record more or less would change two.
        name = "private_rows" if private_rows is not None else "validation_rows"
        raise InputError(f"{name}: only for the built-in sets; choose the rows before you write the file or folder")
    return assemble(origin, parts, shots, seed)


def _check_counts(**given: tuple[Any, int]) -> None:
    for name, (value, least) in given.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
            raise InputError(f"{name}: {value!r} given; pass an integer >= {least}")


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
    if (smallest := int(np.bincount(data.y, minlength=len(data.class_names)).min())) < shots:
        raise InputError(f"shots: {shots} given, but the smallest class of {name} has {smallest} rows; ask for fewer")
    order = np.random.default_rng(seed).permutation(len(data.y))
    if data.groups is None:
        rank = rank_in_class(data.y[order])
        public, rest = order[rank < shots], order[rank >= shots]
        rest = _in_turn(data, rest)
        # Validation comes first, so that it stays the same when only private_rows changes.
        validation, private = np.split(rest, [min(validation_rows, len(rest))])
    else:
        public, validation, private = _by_groups(data, data.groups, order, shots, validation_rows)
    if private_rows > len(private) or validation_rows > len(validation):
        raise InputError(
            f"private_rows: {private_rows} private and {validation_rows} validation rows asked, but {name} has "
            f"{len(validation) + len(private)} besides {len(public)} public and {len(data.y_test)} test rows; ask for "
            "fewer"
        )
    validation, private = validation[:validation_rows], private[:private_rows]

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


def _by_groups(
    data: Benchmark, groups: NDArray[np.int64], order: NDArray[np.int64], shots: int, validation_rows: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Public rows, and rows to take validation and private ones from: no group is in two of them."""
    _, first = np.unique(groups[order], return_index=True)
    place = np.empty(len(first), np.int64)
    place[np.argsort(first)] = np.arange(len(first))  # of each group, by its first row in `order`
    at = place[np.unique(groups, return_inverse=True)[1]]
    ordered = order[np.argsort(at[order], kind="stable")]
    rank = rank_in_class(data.y[ordered])
    public = ordered[rank < shots]
    rest = ordered[at[ordered] > at[public].max()]
    last = at[rest[:validation_rows]].max(initial=-1)
    validation, private = rest[at[rest] <= last], rest[at[rest] > last]
    return public, _in_turn(data, validation), _in_turn(data, private)


def _in_turn(data: Benchmark, rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """For a stratified set: one row of every class in turn."""
    return rows[np.argsort(rank_in_class(data.y[rows]), kind="stable")] if data.stratified else rows
