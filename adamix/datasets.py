"""The built-in public benchmark sets as plain arrays."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from importlib import resources
from pathlib import Path

import numpy as np

from adamix.benchmark_set import TEST_SPLIT_SEED, Benchmark
from adamix.errors import InputError
from adamix.features import extract_features
from adamix.glyphs import CHARACTERS, glyph_images
from adamix.images import FASHION_MNIST_CLASSES
from adamix.storage import one_line, read_npz
from adamix.tabular import digits, letter, pen_digits, satellite

_ASSET = "fashion_mnist_lite0_pca64.npz"
_TEST_FAMILIES = 52  # of 209


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


def fashion_mnist_96(cache_dir: Path | None = None) -> Benchmark:
    """All of Fashion-MNIST at 96 px: 60,000 pool rows and 10,000 test rows of 1,280 features, 10 classes.

    The first call takes some minutes; then they are in the cache.
    Raises InputError if the images (Debian's dataset-fashion-mnist) or the network's packages are absent.
    """
    train, test = (extract_features(f"fashion-mnist:{part}", cache_dir=cache_dir) for part in ("train", "test"))
    return Benchmark(
        train.x.numpy(),
        train.y.numpy(),
        test.x.numpy(),
        test.y.numpy(),
        FASHION_MNIST_CLASSES,
        "Fashion-MNIST (Zalando SE, MIT), 1,280 features of EfficientNet-lite0 (Apache-2.0) at 96 px",
        private_rows=3000,
        validation_rows=1500,
        stratified=False,
    )


def glyphs(cache_dir: Path | None = None) -> Benchmark:
    """62 letters and digits in 360 typefaces: features of an ImageNet network, [N, 1280]; no family in two parts.

    The first call takes some minutes; then they are in the cache.
    Raises InputError if font files (Debian's fonts-*) or the network's packages are absent.
    """
    images, families = glyph_images(cache_dir)
    found = extract_features(images, cache_dir=cache_dir)
    x, y = found.x.numpy(), found.y.numpy()
    held_out = np.isin(
        families, np.random.default_rng(TEST_SPLIT_SEED).permutation(families.max() + 1)[:_TEST_FAMILIES]
    )
    return Benchmark(
        x[~held_out],
        y[~held_out],
        x[held_out],
        y[held_out],
        images.class_names,
        "62 characters in typefaces of Debian's font packages, features of EfficientNet-lite0 (Apache-2.0) at 96 px",
        private_rows=50 * len(CHARACTERS),
        validation_rows=40 * len(CHARACTERS),
        stratified=True,
        groups=families[~held_out],
    )


BENCHMARKS: dict[str, Callable[[Path | None], Benchmark]] = {
    "fashion-mnist": fashion_mnist,
    "letter": letter,
    "digits": digits,
    "satellite": satellite,
    "pen-digits": pen_digits,
    "fashion-mnist-96": fashion_mnist_96,
    "glyphs": glyphs,
}
#: Sets whose features are computed when they are first asked for, in minutes.
COMPUTED = ("fashion-mnist-96", "glyphs")
