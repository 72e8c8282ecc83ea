"""Features of images from a fixed public network, cached on disk; and their npz files."""

from __future__ import annotations

import hashlib
import json
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from adamix.backbones import Backbone, find_backbone
from adamix.errors import InputError
from adamix.images import ImageSource, open_images
from adamix.storage import cache_root, read_npz, require, write_npz

_CACHE_FORMAT = 1  # count up when the preprocessing changes, so that older files are not used


@dataclass(frozen=True)
class Features:
    """x float32 [N, d], y int64 [N] (index into class_names), and where they come from (JSON types)."""

    x: Tensor
    y: Tensor
    class_names: tuple[str, ...]
    meta: dict[str, str | int] = field(default_factory=dict)


def extract_features(
    source: str | Path,
    *,
    backbone: str = "efficientnet-lite0",
    image_size: int | None = None,
    batch_size: int = 64,
    cache_dir: str | Path | None = None,
    device: str | torch.device | None = None,
    progress: bool = True,
) -> Features:
    """Features of every image of `source`: the pooled output of the network before its classifier.

    source: a folder with one subfolder per class, or "fashion-mnist:train" / "fashion-mnist:test".
    image_size: side of the network's input; None: the network's own (96 for the small images of Fashion-MNIST).
    device: None takes CUDA where there is one. progress: a bar on stderr.

    The result is kept under `cache_root(cache_dir)`, keyed by the contents of the images, network and size; features
    of private images are then on disk as well. A damaged cache file is computed again, with a warning.
    Raises InputError for a bad argument, an unreadable image (named), or a missing package (with the pip command).
    """
    for name, value in (("batch_size", batch_size), ("image_size", image_size)):
        if value is not None and (not isinstance(value, int) or value < 1):
            raise InputError(f"{name}: {value!r} given; pass an integer >= 1")
    images = open_images(source, cache_dir)
    network = find_backbone(backbone)
    size = image_size or images.default_size or network.image_size
    crop = 1.0 if images.whole else network.crop
    key = repr((_CACHE_FORMAT, images.digest, network.name, network.identity, size, crop))
    path = cache_root(cache_dir) / "features" / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.npz"
    x = _read_cache(path, len(images.y))
    if x is None:
        x = _run(
            images,
            network,
            size=size,
            crop=crop,
            batch_size=batch_size,
            device=_device(device),
            progress=progress,
        )
        write_npz(path, {"X": x.numpy()})
    meta: dict[str, str | int] = {"source": images.name, "backbone": backbone, "image_size": size}
    return Features(x, torch.from_numpy(images.y), images.class_names, meta)


def save_features(features: Features, path: str | Path) -> None:
    """Write X float32 [N, d], y int64 [N], class_names (unicode) and meta (JSON) to an npz file, atomically."""
    write_npz(
        path,
        {
            "X": features.x.cpu().numpy(),
            "y": features.y.cpu().numpy(),
            "class_names": np.array(features.class_names, dtype=np.str_),
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


def _read_cache(path: Path, rows: int) -> Tensor | None:
    """The cached features, float32 [rows, d], or None."""
    if not path.is_file():
        return None
    try:
        x = read_npz(path, "cache", ("X",)).get("X")
    except InputError:
        x = None
    if x is None or x.dtype != np.float32 or x.ndim != 2 or len(x) != rows or not np.isfinite(x).all():
        warnings.warn(f"cached features {path} are damaged and will be computed again", stacklevel=3)
        return None
    return torch.from_numpy(x)


def _device(device: str | torch.device | None) -> torch.device:
    try:
        chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:  # an unknown name, or a backend that this torch or machine lacks
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
) -> Tensor:
    """Features of all images, float32 [N, d] on the CPU."""
    rich_progress = require("rich.progress", "rich", "the progress bar")
    console = require("rich.console", "rich", "the progress bar").Console(stderr=True)
    model = network.load(size, device)
    mean = torch.tensor(network.mean, device=device).view(3, 1, 1)
    std = torch.tensor(network.std, device=device).view(3, 1, 1)
    parts = []
    starts = range(0, len(images.y), batch_size)
    bar = rich_progress.track(starts, f"features of {images.name}", console=console, disable=not progress)
    with torch.inference_mode():
        for start in bar:
            rows = range(start, min(start + batch_size, len(images.y)))
            pixels = np.stack([_pixels(images.read(row), size, crop, network.interpolation) for row in rows])
            batch = torch.from_numpy(pixels).to(device).permute(0, 3, 1, 2).float() / 255  # [B, 3, size, size]
            parts.append(model((batch - mean) / std).float().cpu())
    return torch.cat(parts)  # outside inference mode: an ordinary tensor, which autograd takes


def _pixels(image: Any, size: int, crop: float, interpolation: str) -> Any:
    """The central square of an RGB image, resized: uint8 [size, size, 3]."""
    side = crop * min(image.size)
    left, top = (image.width - side) / 2, (image.height - side) / 2
    resample = require("PIL.Image", "pillow", "reading images").Resampling[interpolation.upper()]
    square = image.resize((size, size), resample, box=(left, top, left + side, top + side))
    return np.asarray(square, dtype=np.uint8)
