"""Features of images from a fixed public network, cached on disk; and their npz files."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from adamix.backbones import Backbone, find_backbone
from adamix.errors import InputError
from adamix.images import ImageSource, open_images, pixel_digest
from adamix.storage import cache_root, read_npz, require, write_npz

_CACHE_FORMAT = 2  # count up when the preprocessing or the keys change, so that older files are not used


@dataclass(frozen=True)
class Features:
    """x float32 [N, d], y int64 [N] (index into class_names), and where they come from (JSON types)."""

    x: Tensor
    y: Tensor
    class_names: tuple[str, ...]
    digests: tuple[str, ...]  # [N], `pixel_digest` of each image: x of a copy may differ in its lowest bits
    meta: dict[str, str | int] = field(default_factory=dict)


def extract_features(
    source: str | Path | ImageSource,
    *,
    backbone: str = "efficientnet-lite0",
    image_size: int | None = None,
    batch_size: int = 64,
    cache_dir: str | Path | None = None,
    device: str | torch.device | None = None,
    progress: bool = True,
) -> Features:
    """Features of every image of `source`: the pooled output of the network before its classifier.

    source: a folder with one subfolder per class, "fashion-mnist:train" / "fashion-mnist:test", or opened images.
    image_size: side of the network's input; None: the network's own (96 for the small images of Fashion-MNIST).
    device: None takes CUDA where there is one. progress: a bar on stderr, if that is a terminal.

    The result is always kept in features/ (mode 0700 when it is made here) of `cache_dir`, else $ADAMIX_CACHE, else
    ~/.cache/adamix, keyed by the contents of the images, network and size: features and digests of private images are
    then on disk as well, until you delete that folder. A damaged cache file is computed again, with a warning.
    Raises InputError for a bad argument, an unreadable image (named), or a missing package (with the pip command).
    """
    for name, value in (("batch_size", batch_size), ("image_size", image_size)):
        if value is not None and (not isinstance(value, int) or value < 1):
            raise InputError(f"{name}: {value!r} given; pass an integer >= 1")
    images = source if isinstance(source, ImageSource) else open_images(source, cache_dir)
    network = find_backbone(backbone)
    size = image_size or images.default_size or network.image_size
    crop = 1.0 if images.whole else network.crop
    key = repr((_CACHE_FORMAT, images.digest, network.name, network.identity, size, crop))
    path = cache_root(cache_dir) / "features" / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.npz"
    found = _read_cache(path, len(images.y))
    if found is None:
        found = _run(
            images,
            network,
            size=size,
            crop=crop,
            batch_size=batch_size,
            device=_device(device),
            progress=progress,
        )
        write_npz(path, {"X": found[0].numpy(), "digests": np.array(found[1])})
    x, digests = found
    meta: dict[str, str | int] = {"source": images.name, "backbone": backbone, "image_size": size}
    return Features(x, torch.from_numpy(images.y), images.class_names, digests, meta)


def save_features(features: Features, path: str | Path) -> None:
    """Write X float32 [N, d], y int64 [N], class_names, digests (unicode), meta (JSON) to an npz file, atomically."""
    write_npz(
        path,
        {
            "X": features.x.cpu().numpy(),
            "y": features.y.cpu().numpy(),
            "class_names": np.array(features.class_names, dtype=np.str_),
            "digests": np.array(features.digests, dtype=np.str_),
            "meta": np.array(json.dumps(features.meta)),
        },
    )


def features_to_npz(source: str | Path, out: str | Path, **options: Any) -> Features:
    """`extract_features(source, **options)` written to `out`; returns the features."""
    if Path(out).suffix != ".npz":
        raise InputError(f"out: {str(out)!r} does not end in .npz; the loader would not know it as a feature file")
    features = extract_features(source, **options)
    save_features(features, out)
    return features


def _read_cache(path: Path, rows: int) -> tuple[Tensor, tuple[str, ...]] | None:
    """The cached features, float32 [rows, d], and digests, [rows], or None."""
    if not path.is_file():
        return None
    try:
        arrays = read_npz(path, "cache", ("X", "digests"))
        x, digests = arrays["X"], arrays["digests"]
        sound = x.dtype == np.float32 and x.ndim == 2 and len(x) == rows and bool(np.isfinite(x).all())
        sound = sound and digests.dtype.kind == "U" and digests.shape == (rows,)
    except (InputError, KeyError):
        sound = False
    if not sound:
        warnings.warn(f"cached features {path} are damaged and will be computed again", stacklevel=3)
        return None
    return torch.from_numpy(x), tuple(digests.tolist())


def _device(device: str | torch.device | None) -> torch.device:
    try:
        chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=chosen)
    except Exception as error:  # an unknown name, or a backend that this torch or machine lacks
        raise InputError(f"device: {device!r} cannot be used here; pass 'cpu' or leave it out") from error
    return chosen


def _run(
    images: ImageSource,
    network: Backbone,
    *,
    size: int,
    crop: float,
    batch_size: int,
    device: torch.device,
    progress: bool,
) -> tuple[Tensor, tuple[str, ...]]:
    """Features, float32 [N, d] on the CPU, and digests, [N], of all images."""
    model = network.load(size, device)
    mean = torch.tensor(network.mean, device=device).view(3, 1, 1)
    std = torch.tensor(network.std, device=device).view(3, 1, 1)
    parts, digests = [], []
    starts = range(0, len(images.y), batch_size)
    with torch.inference_mode(), _bar(starts, f"features of {images.name}", progress) as bar:
        for start in bar:
            pictures = [images.read(row) for row in range(start, min(start + batch_size, len(images.y)))]
            digests += [pixel_digest(picture) for picture in pictures]
            pixels = np.stack([_pixels(picture, size, crop, network.interpolation) for picture in pictures])
            batch = torch.from_numpy(pixels).to(device).permute(0, 3, 1, 2).float() / 255  # [B, 3, size, size]
            parts.append(model((batch - mean) / std).float().cpu())
    return torch.cat(parts), tuple(digests)  # outside inference mode: an ordinary tensor, which autograd takes


@contextmanager
def _bar(steps: Iterable[int], text: str, progress: bool) -> Iterator[Iterable[int]]:
    """`steps`, with a bar on a terminal's stderr that is gone when the block ends, be it by an error."""
    console = require("rich.console", "rich", "the progress bar").Console(stderr=True)
    if not (progress and console.is_interactive and console.file.isatty()):  # FORCE_COLOR makes a pipe "interactive"
        yield steps
        return
    escape = require("rich.markup", "rich", "the progress bar").escape
    with require("rich.progress", "rich", "the progress bar").Progress(console=console, transient=True) as bar:
        yield bar.track(steps, description=escape(text))


def _pixels(image: Any, size: int, crop: float, interpolation: str) -> Any:
    """The central square of an RGB image, resized: uint8 [size, size, 3]."""
    side = crop * min(image.size)
    left, top = (image.width - side) / 2, (image.height - side) / 2
    resample = require("PIL.Image", "pillow", "reading images").Resampling[interpolation.upper()]
    square = image.resize((size, size), resample, box=(left, top, left + side, top + side))
    return np.asarray(square, dtype=np.uint8)
