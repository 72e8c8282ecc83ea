"""Splits from the user's feature files, and the npz files themselves."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from adamix.data import Split, load_split
from adamix.errors import InputError
from adamix.rows import Rows, UserRows
from adamix.storage import read_npz, write_npz

SETS = ("public", "private", "validation", "test")


def rows(n=6, d=3, classes=2, seed=0):
    """x float32 [n, d], distinct rows, and y int64 [n] cycling through the classes."""
    rng = np.random.default_rng(seed)
    return rng.standard_normal((n, d)).astype(np.float32), np.arange(n) % classes


def split_arrays(**changes):
    arrays = {}
    for seed, name in enumerate(("public", "private", "test")):
        arrays[f"X_{name}"], arrays[f"y_{name}"] = rows(seed=seed)
    return {key: value for key, value in (arrays | changes).items() if value is not None}


def digests_of(x):
    return {row.numpy().tobytes() for row in x}


@pytest.fixture
def npz(tmp_path):
    def save(name="flowers.npz", /, **arrays):
        np.savez(tmp_path / name, **arrays)
        return str(tmp_path / name)

    return save


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"public": "a", "private": "b"}, "test: not given; pass public, private and test together"),
        ({"source": "digits", "public": "a"}, "source: 'digits' given together with public, private or test"),
        ({"source": "fasion"}, r"source: 'fasion' is neither a built-in set \(fashion-mnist, letter, .*\)"),
        ({"source": "none.npz"}, "none.npz: no such file"),
    ],
)
def test_load_split_refuses(options, message):
    with pytest.raises(InputError, match=message):
        load_split(**options)


def assert_user_split(split: Split, name: str):
    assert (split.name, split.benchmark, split.expected_batch_size) == (name, False, None)
    for set_name in SETS:
        part = getattr(split, set_name)
        assert (part.x.dtype, part.y.dtype, len(part.x)) == (torch.float32, torch.int64, len(part.y))


def test_npz_with_its_own_split(npz):
    split = load_split(npz(**split_arrays()))
    assert_user_split(split, "flowers")
    assert split.class_names == ("0", "1")
    assert (len(split.validation.x), split.validation.x.shape[1]) == (0, 3)
    assert torch.equal(split.private.x, torch.from_numpy(rows(seed=1)[0]))
    x, y = rows(seed=9)
    split = load_split(npz(**split_arrays(X_validation=x, y_validation=y, class_names=np.array(["a", "b"]))), shots=2)
    assert split.class_names == ("a", "b")
    assert torch.equal(split.validation.x, torch.from_numpy(x))
    assert torch.bincount(split.public.y).tolist() == [2, 2]
    assert len(load_split(npz(**split_arrays(X_private=x[:0], y_private=y[:0]))).private.x) == 0


@pytest.mark.parametrize("test_keys", [("X_test", "y_test"), ("Xt", "yt")])
def test_npz_with_declared_shots(npz, test_keys):
    (x, y), test = rows(40, classes=3), rows(seed=1)
    path = npz(X=x, y=y, **dict(zip(test_keys, test, strict=True)))
    split = load_split(path, shots=2)
    assert_user_split(split, "flowers")
    assert torch.bincount(split.public.y).tolist() == [2, 2, 2]
    assert len(split.private.x) == 34
    assert digests_of(split.public.x) | digests_of(split.private.x) == digests_of(torch.from_numpy(x))
    assert torch.equal(load_split(path, shots=2).public.x, split.public.x)
    assert not torch.equal(load_split(path, shots=2, seed=1).public.x, split.public.x)
    with pytest.raises(InputError, match=r"shots: not given, .*some rows must be declared public"):
        load_split(path)
    with pytest.raises(InputError, match="shots: 14 given, but a class has 13 public rows"):
        load_split(path, shots=14)


def test_declared_public_rows_do_not_depend_on_private_rows(npz):
    (x, y), (x_test, y_test) = rows(40, classes=3), rows(seed=1)
    split = load_split(npz(X=x, y=y, X_test=x_test, y_test=y_test), shots=2)
    gone = next(i for i in range(40) if x[i].tobytes() in digests_of(split.private.x))
    smaller = npz(X=np.delete(x, gone, 0), y=np.delete(y, gone), X_test=x_test, y_test=y_test)
    assert digests_of(load_split(smaller, shots=2).public.x) == digests_of(split.public.x)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"y_test": None}, r"flowers.npz: key 'y_test' is missing; the file needs X_public, y_public"),
        ({"X_public": None}, "flowers.npz: key 'X_public' is missing"),
        ({"X_validation": rows()[0]}, "flowers.npz: key 'y_validation' is missing"),
        ({"y_public": np.zeros(6, int)}, "private: y has label 1 in row 1; labels must be in 0..0"),
        ({"y_public": np.arange(6) % 2 * 2}, "public: 1 of 3 classes have no row: 1;"),
        ({"X_private": rows(d=4)[0]}, r"private: rows have shape \[4\] but public rows have \[3\]"),
        ({"X_private": rows(seed=0)[0]}, "private: 6 of 6 rows are also public rows"),
        ({"X_test": rows(seed=1)[0][::-1]}, r"test: 6 of 6 rows are also private rows \(test 0 = private 5, "),
        ({"digests_test": np.arange(6)}, r"digests_test is int64 \[6\]; store one string per row of X_test, or leave"),
        ({"digests_public": np.array(["a"])}, r"flowers.npz: digests_public is <U1 \[1\]; store one string per row"),
        ({"X_test": rows()[0][0]}, r"test: x has shape \[3\]"),
        ({"X_test": rows()[0].astype(str)}, "test: x has dtype"),
        ({"y_private": np.array([0, 1, "a", 2, 3, 4], object)}, "flowers.npz: key 'y_private' cannot be read as npz"),
        ({"class_names": np.array(["a", "a"])}, "flowers.npz: class_names is .* store distinct strings"),
        (
            {"users_private": np.arange(5)},
            r"private: users has shape \[5\] but y has \[6\]; pass one user number per row",
        ),
        ({"users_private": np.arange(6.0)}, "private: users has dtype"),
        ({"users": np.arange(6)}, "flowers.npz: users beside X_private; call it users_private"),
        ({"class_names": np.array(["a", "b", "c"])}, r"public: 1 of 3 classes have no row: 2 \(c\)"),
    ],
)
def test_npz_refuses(npz, changes, message):
    with pytest.raises(InputError, match=message):
        load_split(npz(**split_arrays(**changes)))


def test_users_of_private_rows(npz):
    users = np.array([4, 4, -1, 4, 9, 9])
    private = load_split(npz(**split_arrays(users_private=users))).private
    assert isinstance(private, UserRows) and private.users.tolist() == users.tolist()
    names = {
        name: npz(f"{name}.npz", X=rows(seed=i)[0], y=rows(seed=i)[1], users=users)
        for i, name in enumerate(("public", "private", "test"))
    }
    split = load_split(**names)
    assert split.private.users.tolist() == users.tolist() and isinstance(split.test, Rows)
    x, y = rows(40)
    with pytest.raises(InputError, match=r"users beside X, y without a public part; .* write X_public"):
        load_split(npz(X=x, y=y, X_test=rows(seed=1)[0], y_test=rows(seed=1)[1], users=np.arange(40)), shots=2)


def test_digests_tell_equal_rows(npz):
    """As `adamix features` writes them; x of equal images may differ."""
    public, private = np.array(list("abcdef")), np.array(list("ghijkl"))
    load_split(npz(**split_arrays(digests_public=public, digests_private=private, digests_test=public)))
    load_split(npz(**split_arrays(digests_public=public, digests_test=public)))
    private[[1, 4]] = "c", "a"
    with pytest.raises(
        InputError, match=r"^private: 2 of 6 rows are also public rows \(private 1 = public 2, private 4"
    ):
        load_split(npz(**split_arrays(digests_public=public, digests_private=private)))
    with pytest.raises(InputError, match=r"^test: 6 of 6 rows are also private rows \(test 0 = private 0, "):
        load_split(npz(**split_arrays(digests_private=private, digests_test=private)))

    (x, y), (x_test, y_test) = rows(40), rows(seed=1)
    pool = {"X": x, "y": y, "X_test": x_test, "y_test": y_test}
    digests = np.arange(40).astype(str)
    split = load_split(npz(**pool, digests=digests), shots=1)
    declared, kept = (
        next(i for i in range(40) if x[i].tobytes() in digests_of(part.x)) for part in (split.public, split.private)
    )
    digests[kept] = digests[declared]
    with pytest.raises(InputError, match=r"^private: 1 of 38 rows are also public rows"):
        load_split(npz(**pool, digests=digests), shots=1)
    with pytest.raises(
        InputError, match=r"flowers.npz: digests is <U21 \[39\]; store one string per row of X, or leave"
    ):
        load_split(npz(**pool, digests=digests[1:]), shots=1)


def test_overlap_is_found_among_all_public_rows(npz):
    """Also in those that `shots` leaves out: the rows of a message are those of the file."""
    x, y = rows(40)
    with pytest.raises(InputError, match=r"^private: 40 of 40 rows are also public rows \(private 0 = public 0, "):
        load_split(npz(**split_arrays(X_public=x, y_public=y, X_private=x, y_private=y)), shots=1)


def test_npz_corrupt(tmp_path, npz):
    path = tmp_path / "flowers.npz"
    path.write_bytes(b"not a zip")
    with pytest.raises(InputError, match=r"flowers.npz: it cannot be read as npz \(not a zip archive\)"):
        load_split(str(path))
    content = bytearray(Path(npz(**split_arrays())).read_bytes())
    content[len(content) // 8] ^= 0xFF  # inside the first array: the checksum of the zip entry fails
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"flowers\.npz: key 'X_public' cannot be read as npz"):
        load_split(str(path))


def test_user_data_is_not_drawn_from(npz):
    path = npz(**split_arrays())
    with pytest.raises(InputError, match="private_rows: only for the built-in sets"):
        load_split(path, private_rows=3)
    with pytest.raises(InputError, match="validation_rows: only for the built-in sets"):
        load_split(path, validation_rows=3)


def test_separate_npz_files(npz):
    files = {}
    for seed, name in enumerate(("public", "private", "test")):
        x, y = rows(seed=seed)
        files[name] = npz(f"{name}.npz", X=x, y=y)
    split = load_split(**files)
    assert_user_split(split, "private")
    assert torch.equal(split.test.x, torch.from_numpy(rows(seed=2)[0]))

    x, y = rows(seed=1)
    files["private"] = npz("named.npz", X=x, y=y, class_names=np.array(["b", "a"]))
    with pytest.raises(InputError, match="private: class_names in one of public and private only"):
        load_split(**files)
    x, y = rows()
    files["public"] = npz("public.npz", X=x, y=y, class_names=np.array(["a", "b"]))
    files["test"] = npz("test.npz", X=rows(seed=2)[0], y=y, class_names=np.array(["a", "b"]))
    assert load_split(**files).private.y.tolist() == [1, 0, 1, 0, 1, 0]  # renumbered by name

    files["test"] = npz("other.npz", X=rows(seed=2)[0], y=y, class_names=np.array(["a", "z"]))
    with pytest.raises(InputError, match=r"test: class 'z' is not among the public classes \(a, b\)"):
        load_split(**files)
    files["test"] = npz("short.npz", X=x)
    with pytest.raises(InputError, match=r"test: .*short.npz: key 'y' is missing; the file needs X, y"):
        load_split(**files)
    with pytest.raises(InputError, match=r"test: 'nowhere' is neither a folder nor an \.npz file"):
        load_split(**files | {"test": "nowhere"})


def test_write_npz(tmp_path):
    arrays = {"X": rows()[0], "names": np.array(["a", "bc"])}
    for name in ("one.npz", "two.npz"):
        write_npz(tmp_path / "new" / name, arrays, compress=True)
    assert (tmp_path / "new/one.npz").read_bytes() == (tmp_path / "new/two.npz").read_bytes()
    assert read_npz(tmp_path / "new/one.npz", "one", ("names",))["names"].tolist() == ["a", "bc"]
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"cannot write .*file/out.npz .*give a writable folder"):
        write_npz(tmp_path / "file" / "out.npz", arrays)
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == ["one.npz", "two.npz"]  # no temporary files
