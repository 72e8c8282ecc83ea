"""Dimension 0 is the batch: what only looks like it is refused, or told apart."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm
from zoo import losses
from zoo_models import Conv1D, Fn, seq

from adamix_kernels import DPEngine, PrivacyError


def engine(module: nn.Module, **options: Any) -> DPEngine:
    optimizer = torch.optim.SGD(module.parameters(), lr=0.0)
    return DPEngine(module, optimizer, max_grad_norm=1e30, noise_multiplier=0.0, expected_batch_size=1, **options)


def train(module: nn.Module, *batch: Tensor) -> None:
    dp = engine(module, loss_reduction="sum")
    losses(module(*batch)).sum().backward()
    dp.optimizer.step()


def assigned(m: Any, x: Tensor) -> Tensor:
    h = m.lin(x)
    h[:, 0] = m.w
    return h


REFUSED: list[tuple[str, nn.Module, Tensor, str]] = [
    (
        "sequences first, as many as samples",
        Fn(lambda m, x: m.lin(x.transpose(0, 1)).transpose(0, 1), lin=nn.Linear(3, 2)),
        torch.randn(4, 4, 3),
        "lin.bias', 'lin.weight': its batch has 4 samples and its input another dimension",
    ),
    (
        "sequences first",
        Fn(lambda m, x: m.lin(x.transpose(0, 1)).transpose(0, 1), lin=nn.Linear(3, 2)),
        torch.randn(4, 5, 3),
        "linear.. gets an input of shape .5, 4, 3., but the batch has 4 samples",
    ),
    (
        "ids of sequences first",
        Fn(lambda m, x: m.table(x.T).transpose(0, 1), table=nn.Embedding(5, 3)),
        torch.randint(5, (4, 4)),
        "'table.weight': its batch has 4 samples",
    ),
    ("samples normalised", nn.LayerNorm((4, 3)), torch.randn(4, 3), "normalises .4, 3. over dimension 0"),
    (
        "rows of its own",
        Fn(lambda m, x: m.w + x, w=(4, 3)),
        torch.randn(4, 3).requires_grad_(),
        "along its own dimension 0",
    ),
    ("indexed", Fn(lambda m, x: m.w[x], w=(5, 3)), torch.randint(5, (4, 2)), "__getitem__.. joins it with an input"),
    (
        "weights of inputs",
        Fn(lambda m, x: F.linear(x, m.w * x), w=(4, 3)),
        torch.randn(4, 3),
        "mul.. joins it with an input .4, 3. of the model",
    ),
    (
        "each row less the one before",
        Fn(lambda m, x: torch.diff(x, dim=0, prepend=m.w), w=(1, 3)),
        torch.randn(4, 3),
        "diff.. has no rule, and gives a sample alone another result than among others",
    ),
    (
        "in place without a rule",
        Fn(lambda m, x: m.lin(x).addcmul_(x, m.w), lin=nn.Linear(3, 3), w=(3,)),
        torch.randn(4, 3),
        "'w': addcmul_.. works in place and has no rule",
    ),
    ("changed in place", Fn(lambda m, x: m.w.mul_(x), w=(4, 3)), torch.randn(4, 3), "'w': mul_.. changes it in place"),
    (
        "rows across samples",
        Fn(lambda m, x: m.lin(x.view(-1, 6)), lin=nn.Linear(6, 2)),
        torch.randn(4, 3),
        "linear.. gets an input of shape .2, 6., but the batch has 4 samples",
    ),
    (
        "positions or ids",
        Fn(lambda m, x: x + m.pos(torch.arange(4)), pos=nn.Embedding(4, 3)),
        torch.randn(4, 4, 3),
        "may be one",
    ),
    ("assigned", Fn(assigned, lin=nn.Linear(3, 3), w=(3,)), torch.randn(4, 2, 3), "'w': it is assigned to a part of"),
    (
        "positions of pairs",
        Fn(lambda m, x: x + m.bias(torch.arange(4)[None] + torch.arange(4)[:, None]).sum(1), bias=nn.Embedding(7, 3)),
        torch.randn(4, 4, 3),
        "'bias.weight': its batch has 4 samples",
    ),
    (
        "ids in one row",
        Fn(lambda m, x: m.table(x.clone().view(-1)).view(4, 2, 3), table=nn.Embedding(5, 3)),
        torch.randint(5, (4, 2)),
        "'table.weight' gets an ordinary gradient",
    ),
    ("bag", nn.EmbeddingBag(5, 3), torch.randint(5, (4, 2)), "embedding_bag.. has no rule; use an Embedding and a sum"),
    ("no batch", Fn(lambda m, x: m.lin(x.mean(0)), lin=nn.Linear(3, 2)), torch.randn(4, 3), "an input of shape .3."),
    ("batch last", Fn(lambda m, x: m.w @ x.T, w=(2, 3)), torch.randn(4, 3), "matmul.. has no rule"),
]


@pytest.mark.parametrize(
    ("module", "batch", "message"), [case[1:] for case in REFUSED], ids=[case[0] for case in REFUSED]
)
def test_what_is_no_batch_is_refused(module: nn.Module, batch: Tensor, message: str) -> None:
    with pytest.raises(PrivacyError, match=message):
        train(module, batch)


def test_parts_of_the_model_have_no_batch() -> None:
    module = seq(nn.Linear(3, 2), nn.Tanh())
    engine(module)
    with pytest.raises(PrivacyError, match=r"'0.weight', '0.bias': used while the size of the batch is not known"):
        module[0](torch.randn(4, 3))


@pytest.mark.parametrize("samples", [2, 5])
def test_sequences_first_are_refused_at_every_size(samples: int) -> None:
    module = Fn(lambda m, x: m.lin(x.transpose(0, 1).contiguous().view(-1, 3)).view(samples, -1, 4), lin=Conv1D(4, 3))
    with pytest.raises(PrivacyError, match=r"'lin.bias', 'lin.weight': its batch has"):
        train(module, torch.randn(samples, samples, 3))


@pytest.mark.parametrize("samples", [2, 5])
def test_batches_first_are_taken_at_every_size(samples: int) -> None:
    train(seq(Conv1D(4, 3), nn.Linear(4, samples)), torch.randn(samples, samples, 3))


@pytest.mark.parametrize("strategy", ["book_keeping", "per_layer"])
def test_as_many_positions_as_samples_are_told_apart_by_one_more_forward_pass(strategy: str) -> None:
    """Which leaves random numbers, buffers and results as they would be without it."""
    module = seq(spectral_norm(nn.Linear(3, 4)), nn.Dropout(0.5), nn.Linear(4, 4))
    other, x, calls = copy.deepcopy(module), torch.randn(4, 4, 3), []
    module[2].register_forward_hook(lambda *_: calls.append(1))
    dp = engine(module, strategy=strategy, loss_reduction="sum")
    for passes in (2, 3):
        found = []
        for each in (module, other):
            torch.manual_seed(1)
            each.zero_grad()
            outputs = each(x)
            found.append([outputs, torch.rand(3)])
            losses(outputs).sum().backward()
        dp.optimizer.step()
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True)) and len(calls) == passes
        assert all(torch.equal(a, b) for a, b in zip(module.buffers(), other.buffers(), strict=True))
        for a, b in zip(module.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad)


def test_positions_are_known_from_batches_of_another_size() -> None:
    module = Fn(lambda m, x: x + m.pos(torch.arange(4)), pos=nn.Embedding(4, 3))
    plain = copy.deepcopy(module)
    dp = engine(module, loss_reduction="sum")
    for samples in (5, 4, 1):
        x = torch.randn(samples, 4, 3)
        for each in (module, plain):
            each.zero_grad()
            losses(each(x)).sum().backward()
        dp.optimizer.step()
        torch.testing.assert_close(module.pos.weight.grad, plain.pos.weight.grad)
