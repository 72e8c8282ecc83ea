"""Sources of labelled images: a folder with one subfolder per class, or the IDX files of Fashion-MNIST."""

from __future__ import annotations

import gzip
import hashlib
import re
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adamix.errors import InputError
from adamix.storage import Array, find_data_file, one_line, require

_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".webp"})
_FASHION_MNIST_FOLDER = "/usr/share/datasets/fashion-mnist"  # of Debian's dataset-fashion-mnist
_FASHION_MNIST = re.compile(r"fashion-mnist:(train|test)(?:\[(\d*):(\d*)\])?")
FASHION_MNIST_CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip


@dataclass(frozen=True)
class ImageSource:
    """N labelled images, read one at a time."""

    name: str
    y: NDArray[np.int64]  # [N]
    class_names: tuple[str, ...]
    digest: str  # sha256 over names, sizes and contents: the key of the cache
    default_size: int | None  # side to feed to a network; None: the network's own
    whole: bool  # use the whole image, not the network's usual central crop
    read: Callable[[int], Any]  # row -> PIL image in RGB; InputError if it cannot be read


def open_images(source: str | Path, cache_dir: str | Path | None = None) -> ImageSource:
    """The images of a folder, or of "fashion-mnist:train" / "fashion-mnist:test" (also a slice: "...train[0:5000]").

    Raises InputError if there is no such source or it has no image.
    """
    if match := _FASHION_MNIST.fullmatch(str(source)):
        part, start, stop = match.groups()
        return _fashion_mnist(str(source), part, slice(int(start or 0), int(stop) if stop else None), cache_dir)
    return _folder(Path(source))


def pixel_digest(image: Any) -> str:
    """Hex digest of the size and pixels of an RGB image; a renamed or losslessly re-encoded copy has the same."""
    return hashlib.blake2b(b"%dx%d:" % image.size + image.tobytes(), digest_size=16).hexdigest()


def _folder(root: Path) -> ImageSource:
    if not root.is_dir():
        raise InputError(
            f"source: {str(root)!r} is neither an image folder nor fashion-mnist:train or fashion-mnist:test; "
            "check the path"
        )
    image = require("PIL.Image", "pillow", "reading images")
    image_ops = require("PIL.ImageOps", "pillow", "reading images")
    class_names = tuple(sorted(p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith(".")))
    files = [
        (file, label)
        for label, name in enumerate(class_names)
        for file in sorted((root / name).rglob("*"))
        if file.suffix.lower() in _SUFFIXES and file.is_file() and not file.name.startswith(".")
    ]
    if not files:
        raise InputError(
            f"source: {root} has no images; it needs one subfolder per class with {'/'.join(sorted(_SUFFIXES))} files"
        )
    digest = hashlib.sha256(repr(class_names).encode())  # an empty class has no file but is part of the result
    for file, _ in files:
        content = _bytes(file)
        line = (file.relative_to(root).as_posix(), len(content), hashlib.sha256(content).hexdigest())
        digest.update(repr(line).encode())

    def read(row: int) -> Any:
        try:
            with image.open(files[row][0]) as picture:
                return image_ops.exif_transpose(picture).convert("RGB")
        except Exception as error:  # decoders raise many types on damaged files
            raise InputError(
                f"source: image {files[row][0]} cannot be read ({one_line(error)}); replace or remove it"
            ) from error

    y = np.array([label for _, label in files], dtype=np.int64)
    return ImageSource(str(root), y, class_names, digest.hexdigest(), None, False, read)


def _bytes(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise InputError(f"source: image {file} cannot be read ({one_line(error)}); replace or remove it") from error


def _fashion_mnist(name: str, part: str, rows: slice, cache_dir: str | Path | None) -> ImageSource:
    stem = {"train": "train", "test": "t10k"}[part]
    pixels, pixels_digest = _read_idx(f"{stem}-images-idx3-ubyte.gz", 3, cache_dir)
    labels, labels_digest = _read_idx(f"{stem}-labels-idx1-ubyte.gz", 1, cache_dir)
    if len(pixels) != len(labels) or labels.max(initial=0) >= len(FASHION_MNIST_CLASSES):
        raise InputError(
            f"fashion-mnist: {len(pixels)} images do not go with {len(labels)} labels; reinstall dataset-fashion-mnist"
        )
    pixels, y = pixels[rows], labels[rows].astype(np.int64)
    if not len(y):
        raise InputError(f"source: {name!r} has no rows; the set has {len(labels)}")
    image = require("PIL.Image", "pillow", "reading images")
    digest = hashlib.sha256(repr((pixels_digest, labels_digest, rows.start, rows.stop)).encode()).hexdigest()

    def read(row: int) -> Any:
        return image.fromarray(pixels[row]).convert("RGB")

    # 96 px: the whole 28 px image, enlarged enough for a network made for 224 px, at a fifth of its cost.
    return ImageSource(name, y, FASHION_MNIST_CLASSES, digest, 96, True, read)


def _read_idx(name: str, ndim: int, cache_dir: str | Path | None) -> tuple[Array, str]:
    """A gzipped IDX file of bytes as a uint8 array of `ndim` dimensions, and the sha256 of the file."""
    path = find_data_file(
        name,
        what="fashion-mnist",
        package="dataset-fashion-mnist",
        system_dir=_FASHION_MNIST_FOLDER,
        cache_dir=cache_dir,
    )
    try:
        packed = path.read_bytes()
        data = gzip.decompress(packed)
        magic, *shape = struct.unpack_from(f">I{ndim}I", data)
        if magic != 0x0800 + ndim:  # type code 8 (unsigned bytes), then the number of dimensions
            raise ValueError(f"magic number {magic:#x}")
        array = np.frombuffer(data, np.uint8, offset=4 + 4 * ndim).reshape(shape)
    except (OSError, EOFError, ValueError, struct.error, zlib.error) as error:
        raise InputError(
            f"fashion-mnist: {path} is corrupt ({one_line(error)}); reinstall dataset-fashion-mnist"
        ) from error
    return array, hashlib.sha256(packed).hexdigest()
