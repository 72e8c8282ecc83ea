"""`dp.validate`: what it reports, what it finds, and that it leaves everything as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from plain_loop import STRATEGIES, assert_same, batch, classifier, engine, expected, step
from torch import Tensor, nn

from adamix_kernels import Noise, PrivacyError


class Zoo(nn.Module):
    """Every kind of factors once."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(9, 6)
        self.conv = nn.Conv1d(6, 6, 3, padding=1)
        self.norm = nn.LayerNorm(6)
        self.shift = nn.Parameter(torch.zeros(6))
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(6, 9, bias=False)
        self.head.weight = self.table.weight
        self.unused = nn.Linear(2, 2)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, ids: Tensor) -> Tensor:
        self.calls += 1
        x = self.table(ids)
        x = self.conv(x.mT).mT
        return self.head(self.drop(self.norm(x) + self.shift))


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_every_kind_agrees_with_one_sample_at_a_time(strategy: str, reduction: str) -> None:
    dp = engine(Zoo().double(), strategy=strategy, loss_reduction=reduction, loss_scale=4.0)
    report = dp.validate(torch.randint(0, 9, (5, 7)))
    rows = {row.name: row for row in report.parameters}
    assert set(rows) == {name for name, _ in dp.model.named_parameters()}
    assert all(row.norm_error < 1e-5 and row.sum_error < 1e-7 for row in report.parameters)
    assert rows["unused.weight"].rule == "unused"
    if strategy == "book_keeping":
        kinds = {"table.weight": "tied", "norm.weight": "scaleshift", "shift": "per sample", "conv.weight": "conv"}
        assert {name: rows[name].rule for name in kinds} == kinds
        assert rows["conv.bias"].together_with == "conv.weight"
        assert rows["conv.weight"].flops > 0 and rows["table.weight"].factor_bytes > 0
        assert rows["conv.weight"].sample_bytes == 5 * 6 * 6 * 3 * 8
    elif strategy == "auto":
        assert rows["norm.weight"].rule == "per sample"
        for row in report.parameters:  # whichever is smaller
            assert row.rule in ("unused", "tied", "embedding") or row.factor_bytes <= 2 * row.sample_bytes, row
    text = str(report)
    assert "table.weight" in text and "dropout was off: 1 modules" in text
    assert ("auto" if strategy == "auto" else "book_keeping") in text


def test_nothing_is_disturbed() -> None:
    noise = Noise(seed=0)
    dp = engine(Zoo().double(), noise=noise, noise_multiplier=1e-9)
    ids = torch.randint(0, 9, (4, 7))
    dp.model.eval()
    dp.model(ids).square().mean().backward()
    dp.model.train()
    with dp.public():
        dp.model(ids).square().mean().backward()
    grads = [None if p.grad is None else p.grad.clone() for p in dp.model.parameters()]
    sums = {name: total.clone() for name, total in dp._sums.totals.items()}
    calls, random = dp.model.calls.clone(), torch.get_rng_state()
    held = [vars(dp), vars(dp._sums)]
    before = [{key: value for key, value in each.items() if key not in ("layers", "totals")} for each in held]
    dp.validate(ids)
    for p, grad in zip(dp.model.parameters(), grads, strict=True):
        assert (p.grad is None and grad is None) or torch.equal(p.grad, grad)
    assert dp._sums.totals.keys() == sums.keys() and all(
        torch.equal(dp._sums.totals[name], sums[name]) for name in sums
    )
    assert torch.equal(calls, dp.model.calls) and torch.equal(random, torch.get_rng_state())
    assert all(module.training for module in dp.model.modules())
    assert noise.next_draw() == 0 and dp.steps == 0
    for each, was in zip(held, before, strict=True):
        assert all(each[key] is value or each[key] == value for key, value in was.items())


def test_the_training_after_it_is_the_same() -> None:
    x, y = batch()
    dp = engine(classifier())
    F.cross_entropy(dp.model(x[:4]), y[:4]).backward()
    dp.validate((x,))
    F.cross_entropy(dp.model(x[4:]), y[4:]).backward()
    assert_same(step(dp), expected(classifier(), (x, y)))


def test_batches_of_every_form_and_an_own_loss() -> None:
    class Keyed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = classifier()

        def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
            out = self.inner(x)
            if labels is None:
                return {"logits": out}
            return type("Output", (), {"loss": F.cross_entropy(out, labels), "logits": out})()

    x, y = batch()
    dp = engine(Keyed())
    for given in (x, (x,), [x, y], {"x": x}, {"x": x, "labels": y}):
        assert dp.validate(given).samples == 10
    dp.validate((x, y), lambda model, b: F.cross_entropy(model(b[0])["logits"], b[1]))
    with pytest.raises(ValueError, match="batch: holds no tensor with a row for each sample"):
        dp.validate({"x": 3})
    with pytest.raises(ValueError, match="batch: holds no tensor with a row for each sample"):
        dp.validate(x[:0])


def test_a_loss_in_which_samples_meet_is_found() -> None:
    x, y = batch()
    dp = engine(classifier())
    passes = dp._passes

    def contrastive(model: nn.Module, b: tuple[Tensor, Tensor]) -> Tensor:
        out = model(b[0])
        return F.cross_entropy(out @ out.mT, torch.arange(len(out)))

    with pytest.raises(
        PrivacyError, match=r"parameter '.*': its norms differ.*no sample may enter the loss of another"
    ):
        dp.validate((x, y), contrastive)
    assert dp._passes is passes and dp.steps == 0


def test_a_wrong_reduction_is_found() -> None:
    x, y = batch()
    dp = engine(classifier(), loss_reduction="sum")
    with pytest.raises(PrivacyError, match=r"parameter '0.weight': its norms differ.*as loss_reduction says"):
        dp.validate((x, y), lambda model, b: F.cross_entropy(model(b[0]), b[1]))


def test_a_wrong_batch_dimension_is_found() -> None:
    class TimeFirst(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x.transpose(0, 1)).transpose(0, 1).tanh()

    dp = engine(TimeFirst())
    square = torch.randn(4, 4, 5)  # as long as it is wide: no shape tells
    with pytest.raises(PrivacyError, match=r"'layer.weight': .*dimension 0"):
        dp.validate(square)


def test_a_sample_that_reads_another_is_found() -> None:
    class Neighbours(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x - x.mean(0)).tanh()

    with pytest.raises(PrivacyError, match=r"'layer.weight'"):
        engine(Neighbours()).validate(torch.randn(4, 5))


def test_functional_dropout_is_off_too() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.drop_prob = nn.Linear(5, 3), 0.5

        def forward(self, x: Tensor) -> Tensor:
            return F.dropout(self.layer(x), self.drop_prob, self.training)

    dp = engine(Block())
    assert dp.validate(torch.randn(4, 5)).notes
    assert dp.model.drop_prob == 0.5


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_half_precision_is_held_to_its_rounding(kind: torch.dtype) -> None:
    dp = engine(classifier(torch.float32), max_grad_norm=0.1)
    with torch.autocast("cpu", kind):
        report = dp.validate(batch(6, torch.float32)[0])
    assert all(row.norm_error < 0.05 for row in report.parameters)
    halves = engine(classifier(kind), max_grad_norm=0.1)
    halves.validate(batch(6, kind)[0])


def test_frozen_parameters_are_left_out() -> None:
    dp = engine(classifier())
    dp.model[0].requires_grad_(False)
    assert {row.name for row in dp.validate(batch()[0]).parameters} == {"2.weight", "2.bias", "3.weight", "3.bias"}


def test_a_sample_without_finite_gradients() -> None:
    x, _ = batch()
    x[2] = torch.nan
    dp = engine(classifier())
    assert all(row.sum_error < 1e-7 for row in dp.validate(x).parameters)


def test_a_transformer() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=17, n_positions=8, n_embd=8, n_layer=1, n_head=2, attn_implementation="eager"
    )
    dp = engine(transformers.GPT2LMHeadModel(config), loss_reduction="sum")
    ids = torch.randint(0, 17, (3, 6))
    labels = ids.clone()
    labels[1, 3:] = -100
    report = dp.validate({"input_ids": ids, "labels": labels, "num_items_in_batch": 1})
    assert report.samples == 3 and report.notes
    mean = engine(transformers.GPT2LMHeadModel(config))
    mean.validate({"input_ids": ids, "labels": ids})
    with pytest.raises(PrivacyError, match="labels: hold ignored positions"):
        mean.validate({"input_ids": ids, "labels": labels})
