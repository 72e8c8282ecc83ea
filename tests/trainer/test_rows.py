"""The checks of labelled rows: what is converted, and that every bad input is refused with a message that helps."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from adamix.errors import InputError
from adamix.rows import check_classes_present, check_disjoint, check_rows, check_same_shape

RNG = np.random.default_rng(0)
X, Y = RNG.standard_normal((6, 3)).astype(np.float32), np.arange(6) % 2


def test_check_rows_converts():
    x, y = X, Y
    for given in (
        (x, y),
        (torch.from_numpy(x), torch.from_numpy(y)),
        (x.astype(np.float64)[:, ::-1][:, ::-1], y.astype(np.uint8)),
        (torch.from_numpy(x).requires_grad_(), torch.from_numpy(y).int()),
        (x.astype(">f4"), list(y)),
    ):
        out = check_rows("private", given, 2)
        assert (out.x.dtype, out.y.dtype, out.x.requires_grad) == (torch.float32, torch.int64, False)
        assert torch.equal(out.x, torch.from_numpy(x))
        assert torch.equal(out.y, torch.from_numpy(y))
    assert check_rows("private", (np.ones((2, 3, 4, 4), np.int8), [0, 5])).x.shape == (2, 3, 4, 4)
    assert len(check_rows("private", (x[:0], y[:0]), 2, allow_empty=True).x) == 0
    frozen = x.copy()
    frozen.flags.writeable = False
    check_rows("private", (frozen, y))  # must not warn


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (X, r"private: expected a pair \(x, y\), got ndarray"),
        ((X, Y[:5]), "private: x has 6 rows but y has 5; pass one label per row"),
        ((X[:, 0], Y), r"private: x has shape \[6\]; pass \[rows, features\]"),
        ((X[:, :0], Y), r"private: x has shape \[6, 0\]"),
        ((X, Y[:, None]), r"private: y has shape \[6, 1\]; pass one class number per row"),
        ((X[:0], Y[:0]), "private: x has 0 rows"),
        ((X, Y.astype(np.float32)), "private: y has dtype float32; pass integer class numbers"),
        ((X, torch.from_numpy(Y).double()), "private: y has dtype float64"),
        ((X, Y == 1), "private: y has dtype bool"),
        ((X.astype(str), Y), r"private: x has dtype <U\d+; pass floats or integers"),
        ((X.astype(complex), Y), "private: x has dtype complex128"),
        ((torch.from_numpy(X) > 0, Y), "private: x has dtype bool"),
        (([[1.0], [1.0, 2.0]], [0, 0]), "private: x is not an array"),
        ((torch.from_numpy(X).to_sparse(), Y), r"private: x is a torch.sparse_coo tensor; pass a dense one"),
        (
            (np.where(np.arange(6)[:, None] >= 4, np.nan, X), Y),
            "private: x has NaN or Inf .* in 2 rows, first in row 4",
        ),
        ((np.where(np.arange(6)[:, None] == 3, 1e300, X.astype(float)), Y), r"in 1 rows, first in row 3"),
        ((X, Y + 1), r"private: y has label 2 in row 1; labels must be in 0..1 \(2 classes\)"),
        ((X, Y - 1), "private: y has label -1 in row 0"),
    ],
)
def test_check_rows_refuses(given, message):
    with pytest.raises(InputError, match=message) as caught:
        check_rows("private", given, 2)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", ["int32", "int64", ">i8"])
def test_check_rows_keeps_integers(dtype):
    big = np.array([[2**24 + 1, 3], [5, -1]], dtype)  # float32 would round the first
    given = [big] if dtype == ">i8" else [big, torch.from_numpy(big)]
    for x in given:
        out = check_rows("private", (x, [0, 1]), 2, keep_integers=True)
        assert (out.x.dtype, out.x.tolist()) == (torch.int64, big.tolist())
        assert check_rows("private", (x, [0, 1]), 2).x.dtype == torch.float32
    for other in (big.astype(np.int16), torch.ones(2, 3, dtype=torch.uint8), X[:2], X[:2].astype(np.float64)):
        assert check_rows("private", (other, [0, 1]), 2, keep_integers=True).x.dtype == torch.float32
    with pytest.raises(InputError, match="private: x has dtype bool"):
        check_rows("private", (big > 0, [0, 1]), keep_integers=True)
    with pytest.raises(InputError, match="private: x has NaN or Inf"):
        check_rows("private", (X[:2] * np.nan, [0, 1]), keep_integers=True)


def test_same_shape():
    public, wide = check_rows("public", (X, Y)), check_rows("test", (np.ones((2, 4)), [0, 1]))
    check_same_shape("private", check_rows("private", (X[:2], Y[:2])), public)
    message = r"^test: rows have shape \[4\] but public rows have \[3\]; pass the same features for both$"
    with pytest.raises(InputError, match=message):
        check_same_shape("test", wide, public)


def test_check_rows_without_class_count():
    assert check_rows("public", (X, Y + 40)).y.max() == 41
    with pytest.raises(InputError, match="public: y has label -1 in row 0; labels must be >= 0"):
        check_rows("public", (X, Y - 1))


def test_classes_present():
    check_classes_present(torch.tensor([0, 1, 2]), 3)
    with pytest.raises(InputError, match=r"public: 1 of 3 classes have no row: 1 \(cat\); add at least one public row"):
        check_classes_present(torch.tensor([0, 2]), 3, ("ant", "cat", "dog"))
    with pytest.raises(InputError, match=r"public: 999999999 of 1000000000 classes have no row: 0, 1, 2, 3, 4, \.\.\."):
        check_classes_present(torch.tensor([999_999_999]), 1_000_000_000)


def test_disjoint():
    public, private = torch.randn(20, 4), torch.randn(5000, 4)
    check_disjoint(public, private)
    check_disjoint(public, private[:0])
    private[7], private[4500] = public[3], public[3]
    with pytest.raises(
        InputError,
        match=r"private: 2 of 5000 rows are also public rows \(private 7 = public 3, private 4500 = public 3\)",
    ):
        check_disjoint(public, private)
    with pytest.raises(
        InputError,
        match=r"^test: 1 of 20 rows are also private rows \(test 3 = private 7\); remove them from one of the two",
    ):
        check_disjoint(private, public, ("private", "test"))


def test_disjoint_compares_integers_exactly():
    tokens = torch.tensor([[2**24 + 1, 3]])
    check_disjoint(tokens, tokens - torch.tensor([1, 0]))  # equal as float32
    for first, second in ((tokens, tokens.int()), (torch.tensor([[3, 5]]), torch.tensor([[3.0, 5.0]]))):
        with pytest.raises(InputError, match="private: 1 of 1 rows"):
            check_disjoint(first, second)


def test_disjoint_takes_minus_zero_as_zero():
    with pytest.raises(InputError, match="private: 1 of 1 rows"):
        check_disjoint(torch.tensor([[0.0, 1.0]]), torch.tensor([[-0.0, 1.0]]))
    with pytest.raises(InputError, match="private: 1 of 1 rows"):  # compared as float32
        check_disjoint(torch.ones(1, 2, 2, dtype=torch.float64), torch.ones(1, 2, 2))
