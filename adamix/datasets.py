"""The built-in public benchmark sets as plain arrays: fashion-mnist (shipped), letter, digits."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from adamix.errors import InputError
from adamix.images import FASHION_MNIST_CLASSES
from adamix.storage import find_data_file, one_line, read_npz, require

_ASSET = "fashion_mnist_lite0_pca64.npz"
_TEST_SPLIT_SEED = 20220611  # the held-out test rows of letter and digits never change with the user's seed
_LETTER_FOLDER = "/usr/lib/R/site-library/mlbench/data"  # of Debian's r-cran-mlbench
_LETTER_TEST_ROWS = 4000
_DIGITS_TEST_ROWS = 400


class Benchmark(NamedTuple):
    """A benchmark set without duplicate rows: a pool to draw from, fixed test rows, and the default draw."""

    x: NDArray[np.float32]  # [N, d]
    y: NDArray[np.int64]  # [N]
    x_test: NDArray[np.float32]  # [M, d]
    y_test: NDArray[np.int64]  # [M]
    class_names: tuple[str, ...]
    source: str
    private_rows: int
    validation_rows: int
    stratified: bool  # private and validation rows balanced over the classes


def fashion_mnist(cache_dir: Path | None = None) -> Benchmark:
    """The shipped features: 5,000 pool rows and 2,000 test rows, d = 64, 10 classes; needs no other file.

    Raises InputError if the shipped file is missing or is not the one named in SHA256SUMS.
    """
    assets = resources.files("adamix") / "assets"
    try:
        content = (assets / _ASSET).read_bytes()
        sums = (assets / "SHA256SUMS").read_text().split()
    except OSError as error:
        raise InputError(f"fashion-mnist: a shipped file is missing ({one_line(error)}); reinstall adamix") from error
    digest = hashlib.sha256(content).hexdigest()
    if (digest, _ASSET) not in zip(sums[::2], sums[1::2], strict=False):
        raise InputError(f"fashion-mnist: {_ASSET} is corrupt (its sha256 is {digest}); reinstall adamix")
    arrays = read_npz(content, _ASSET, ("X", "y", "Xt", "yt"))
    # The file holds int8; 1/127 brings every feature into [-1, 1] and the mean row norm to about 1.
    x, x_test = (arrays[key].astype(np.float32) / np.float32(127) for key in ("X", "Xt"))
    return Benchmark(
        x,
        arrays["y"].astype(np.int64),
        x_test,
        arrays["yt"].astype(np.int64),
        FASHION_MNIST_CLASSES,
        "Fashion-MNIST (Zalando SE, MIT), features of EfficientNet-lite0 (Apache-2.0) at 96 px, PCA to 64 numbers",
        private_rows=3000,
        validation_rows=1500,
        stratified=False,
    )


def letter(cache_dir: Path | None = None) -> Benchmark:
    """Letter Recognition: 26 classes, 1,024 random cosine features, 14,668 pool rows and 4,000 test rows.

    Raises InputError if LetterRecognition.rda or the package rdata is absent, or the file is not that data frame.
    """
    path = find_data_file(
        "LetterRecognition.rda",
        what="letter",
        package="r-cran-mlbench",
        system_dir=_LETTER_FOLDER,
        cache_dir=cache_dir,
    )
    attributes, y, names = read_letter(path)
    attributes, y = drop_duplicates(attributes, y)
    return _hold_out(
        cosine_features(attributes),
        y,
        _LETTER_TEST_ROWS,
        names,
        "Letter Recognition (P. W. Frey and D. J. Slate, UCI; GPL-2 package mlbench), 1,024 random cosine features",
        private_rows=50 * len(names),
        validation_rows=100 * len(names),
        stratified=True,
    )


def digits(cache_dir: Path | None = None) -> Benchmark:
    """The 8 x 8 digits of scikit-learn: 10 classes, 64 pixels in [0, 1], 1,397 pool rows and 400 test rows."""
    bunch = require("sklearn.datasets", "scikit-learn", "digits").load_digits()
    x, y = drop_duplicates(bunch.data / 16, bunch.target.astype(np.int64))
    return _hold_out(
        x.astype(np.float32),
        y,
        _DIGITS_TEST_ROWS,
        tuple(str(name) for name in bunch.target_names),
        "Optical Recognition of Handwritten Digits (E. Alpaydin and C. Kaynak, UCI, CC BY 4.0), from scikit-learn",
        private_rows=800,
        validation_rows=300,
        stratified=False,
    )


BENCHMARKS: dict[str, Callable[[Path | None], Benchmark]] = {
    "fashion-mnist": fashion_mnist,
    "letter": letter,
    "digits": digits,
}


def read_letter(path: Path) -> tuple[NDArray[np.float64], NDArray[np.int64], tuple[str, ...]]:
    """Attributes float64 [N, 16] in 0..15, labels int64 [N] and class names of LetterRecognition.rda."""
    rdata: Any = require("rdata", "rdata", "letter")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # rdata warns of guesses about old files; the checks below are the judge
            frame = rdata.read_rda(path)["LetterRecognition"]
        letters = frame.iloc[:, 0].cat
        x, y = frame.iloc[:, 1:].to_numpy(np.float64), letters.codes.to_numpy(np.int64)
        if x.shape[1] != 16 or not ((x >= 0) & (x <= 15)).all() or y.min(initial=0) < 0:
            raise ValueError(f"attributes of shape {x.shape}; expected 16 columns of 0..15")
    except Exception as error:  # rdata's parser raises many types on a damaged file
        raise InputError(
            f"letter: {path} is not mlbench's LetterRecognition ({one_line(error)}); reinstall r-cran-mlbench"
        ) from error
    return x, y, tuple(str(name) for name in letters.categories)


def cosine_features(attributes: NDArray[np.float64]) -> NDArray[np.float32]:
    """sqrt(2 / D) cos(W a + b), D = 1,024, of attributes in 0..15: float64 [N, 16] -> float32 [N, 1024], row norm ~ 1.

    W, b and the scaling are constants: nothing is estimated from rows that may be private.
    """
    # Bandwidth: logistic regression (C = 100) on 50 rows per class, tested on 4,000 other rows of the pool, 3 draws,
    # reached 80.4, 84.3, 84.5, 84.2, 82.3 % for a scale of 0.5, 1, 1.25, 1.5, 2 (best over C = 10..1000: also 1.25).
    scale, width = 1.25, 1024
    rng = np.random.default_rng(0)
    weight = scale * rng.standard_normal((attributes.shape[1], width))
    phase = rng.uniform(0, 2 * np.pi, width)
    scaled = (attributes - 7.5) / 7.5
    features: NDArray[np.float32] = (np.sqrt(2 / width) * np.cos(scaled @ weight + phase)).astype(np.float32)
    return features


def drop_duplicates(x: NDArray[Any], y: NDArray[np.int64]) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """The first of every group of equal rows of x, [N, d], in the old order: else copies would fall into two splits."""
    first = np.sort(np.unique(x, axis=0, return_index=True)[1])
    return x[first], y[first]


def _hold_out(
    x: NDArray[np.float32], y: NDArray[np.int64], test_rows: int, class_names: tuple[str, ...], source: str, **draw: Any
) -> Benchmark:
    if len(y) <= test_rows:
        raise InputError(f"{source}: {len(y)} distinct rows, too few to hold out {test_rows}; use the complete file")
    order = np.random.default_rng(_TEST_SPLIT_SEED).permutation(len(y))
    test, pool = order[:test_rows], order[test_rows:]
    return Benchmark(x[pool], y[pool], x[test], y[test], class_names, source, **draw)
