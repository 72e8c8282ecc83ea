"""Rows of datasets: collated, compared by content, and drawn."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from adamix import InputError
from adamix.deep.data import Data, PublicBatches, collate_rows, content_digest, secret_generators


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ((torch.ones(2, 3), 0), (np.ones((2, 3), np.float64), 5), True),  # labels do not count
        ((torch.tensor([0.0, 1.0]), 0), (torch.tensor([-0.0, 1.0]), 0), True),
        ((torch.tensor([0, 1]), 0), ([0.0, 1.0], 0), True),
        ((torch.tensor([0.1]), 0), (np.array([0.1]), 0), True),
        ((torch.tensor([1.0, 2.0]), 0), (torch.tensor([2.0, 1.0]), 0), False),
        ({"input_ids": [1, 2], "labels": [1, 2]}, {"labels": [3, 4], "input_ids": torch.tensor([1, 2])}, True),
        ({"input_ids": [1, 2], "label": 0}, {"input_ids": [1, 3], "label": 0}, False),
        ({"a": [1], "b": [2]}, {"a": [2], "b": [1]}, False),
        ({"text": "cat"}, {"text": "dog"}, False),
        ({"text": "cat", "label": 1}, {"text": "cat", "label": 2}, True),
        ((torch.ones(1), torch.zeros(2), 0), (torch.ones(1), torch.zeros(2), 1), True),  # the last of several parts
        ((torch.ones(1), torch.zeros(2), 0), (torch.ones(1), torch.ones(2), 0), False),
        ([1, 2, 3], [1, 2, 4], False),
        (({"x": torch.ones(1), "y": torch.zeros(1)}, 1), ({"x": torch.ones(1), "y": torch.ones(1)}, 1), False),
    ],
)
def test_rows_are_compared_by_content(one: Any, other: Any, same: bool) -> None:
    assert (content_digest(one) == content_digest(other)) == same


def test_images_are_compared_by_pixels() -> None:
    image = pytest.importorskip("PIL.Image")
    pixels = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    one = image.fromarray(pixels)
    assert content_digest((one, 0)) == content_digest((pixels.copy(), 1))
    assert content_digest((one, 0)) != content_digest((image.fromarray(pixels[::-1].copy()), 0))


def test_what_rows_may_look_like() -> None:
    x, y = collate_rows([(torch.ones(3), 1), (torch.ones(3), torch.tensor(2))])
    assert x.shape == (2, 3) and y.tolist() == [1, 2]
    batch = collate_rows([{"input_ids": [1, 2], "score": 0.5}, {"input_ids": [3, 4], "score": 1.0}])
    assert batch["input_ids"].tolist() == [[1, 2], [3, 4]] and batch["score"].shape == (2,)
    rows = [(torch.ones(2), 0), (torch.ones(3), 0)]
    with pytest.raises(
        InputError, match=r"private: its rows cannot be collated .*; give all of them one shape, or pass"
    ):
        Data("private", rows).batch(rows)
    assert Data("private", rows, lambda r: torch.zeros(len(r), 4)).batch(rows).shape == (2, 4)
    with pytest.raises(InputError, match=r"collate gives tensors of \[0\] rows for 2"):
        Data("private", rows, lambda _: torch.tensor(1.0)).batch(rows)
    low = Data("public", rows, dtype=torch.bfloat16).batch([rows[0], rows[0]])
    assert low[0].dtype == torch.bfloat16 and low[1].dtype == torch.int64


def test_threads_load_the_same_rows() -> None:
    rows = [(torch.full((2,), i), i) for i in range(20)]
    assert [y for _, y in Data("private", rows, workers=3).rows([4, 1, 19])] == [4, 1, 19]

    class Broken(list[Any]):
        def __getitem__(self, i: Any) -> Any:
            raise OSError("disk\nfull")

    with pytest.raises(InputError, match=r"^private: a row cannot be loaded \(disk full\)"):
        Data("private", Broken([1]), workers=1).rows([0])


def test_public_batches_follow_from_the_seed_alone() -> None:
    data = Data("public", list(range(50)))
    batches = PublicBatches(data, 8, 3)
    torch.manual_seed(0)
    one = batches.rows(2, 5)
    assert one == PublicBatches(data, 8, 3).rows(2, 5) and len(set(one)) == 8
    assert one not in (batches.rows(2, 6), batches.rows(1, 5), PublicBatches(data, 8, 4).rows(2, 5))
    assert sorted(PublicBatches(data, 99, 0).rows(1, 1)) == list(range(50))


def test_generators_are_secret_within_and_kept() -> None:
    def draw() -> tuple[Tensor, float, float]:
        return torch.rand(4), random.random(), float(np.random.rand())

    def seed() -> None:
        torch.manual_seed(0), random.seed(0), np.random.seed(0)

    seed()
    expected = draw()
    drawn = []
    for count in (1, 3):
        seed()
        with secret_generators(torch.device("cpu")):
            for _ in range(count):
                drawn.append(draw())
        found = draw()
        assert torch.equal(found[0], expected[0]) and found[1:] == expected[1:]
    assert len({(x.sum().item(), a, b) for x, a, b in [*drawn, expected]}) == 5
