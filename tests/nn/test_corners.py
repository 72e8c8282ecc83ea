"""Paths that no other model of these tests takes: each against one sample at a time, and the refusals among them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from one_by_one import check
from plain_loop import engine
from torch import Tensor, nn
from zoo_models import Fn

from adamix_kernels import PrivacyError

IDS = torch.tensor([[1, 2, 2, 0], [0, 0, 0, 0], [3, 1, 4, 1], [5, 5, 5, 5], [2, 3, 0, 4]])


class Tied(nn.Module):
    """A language model whose last layer is its embedding, with a padding id that is not trained as an input."""

    def __init__(self, padding_idx: int, bias: bool) -> None:
        super().__init__()
        self.table = nn.Embedding(6, 3, padding_idx=padding_idx)
        self.head = nn.Linear(3, 6, bias=bias)
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.table(ids)))


@pytest.mark.parametrize("padding_idx", [0, -2], ids=["first", "from the end"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_tied_embedding_with_padding(padding_idx: int, bias: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    strategies = ("auto", "book_keeping", "materialize")  # the second by cross terms
    check(Tied(padding_idx, bias).to(dtype), [IDS], strategies=strategies)


MODELS: dict[str, Callable[[], Any]] = {
    "cat of parameters": lambda: Fn(lambda m, x: F.linear(x, torch.cat([m.a, m.b])), a=(2, 5), b=(3, 5)),
    "repeat of rows": lambda: Fn(lambda m, x: F.linear(x, m.a.repeat(2, 1)), a=(3, 5)),
    "product of parameters": lambda: Fn(lambda m, x: F.linear(x, m.a @ m.b), a=(4, 2), b=(2, 5)),
    "addmm with factors": lambda: Fn(lambda m, x: torch.addmm(m.b, x, m.a, beta=2.0, alpha=3.0), a=(5, 4), b=(4,)),
    "rms_norm of a parameter": lambda: Fn(lambda m, x: x * F.rms_norm(m.a, (5,), m.b), a=(5,), b=(5,)),
    "instance norm with fixed statistics": lambda: Fn(
        lambda m, x: F.instance_norm(
            x[:, :, None].expand(-1, 5, 4) * torch.linspace(1, 2, 4, dtype=x.dtype),
            torch.zeros(5, dtype=x.dtype),
            torch.full((5,), 2.0, dtype=x.dtype),
            m.a,
            m.b,
            use_input_stats=False,
        ),
        a=(5,),
        b=(5,),
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_agrees_with_one_sample_at_a_time(name: str) -> None:
    torch.manual_seed(0)
    check(MODELS[name]().double(), [torch.randn(7, 5, dtype=torch.float64)], strategies=("auto", "book_keeping"))


def test_a_mask_of_truth_values_for_attention() -> None:
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(4, 2, batch_first=True).double()
    mask = torch.ones(3, 3, dtype=torch.bool).triu(1)
    model = Fn(lambda m, x: m.attention(x, x, x, attn_mask=mask, is_causal=True)[0], attention=attention)
    check(model, [torch.randn(5, 3, 4, dtype=torch.float64)], strategies=("auto",))


def refused(call: Callable[[Any, Tensor], Any], message: str, *shape: int, **parts: Any) -> None:
    dp = engine(Fn(call, **parts).double())
    with pytest.raises(PrivacyError, match=message):
        dp.model(torch.randn(*shape, dtype=torch.float64))


def test_refusals_name_the_parameter() -> None:
    lstm, attention = nn.LSTM(3, 3, batch_first=True), nn.MultiheadAttention(4, 2, batch_first=True)
    refused(lambda m, x: m.lstm(m.a)[0] + x, "'a'.*gets it in place of samples", 5, 4, 3, lstm=lstm, a=(5, 4, 3))
    refused(
        lambda m, x: m.attention(x, x, x, attn_mask=m.a)[0],
        r"'a': as an attn_mask \[10, 3, 3\] has no rule; pass \[T, S\]",
        *(5, 3, 4),
        attention=attention,
        a=(10, 3, 3),
    )
    refused(
        lambda m, x: F.instance_norm(x, torch.zeros(3).double(), torch.ones(3).double(), m.a),
        "'a': instance_norm.. keeps running statistics",
        *(5, 3, 4),
        a=(3,),
    )


def test_validate_finds_what_no_rule_has_seen() -> None:
    class Hidden(torch.autograd.Function):
        """Uses a parameter without any torch function."""

        @staticmethod
        def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
            ctx.save_for_backward(x, weight)
            return x * weight

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Any:
            x, weight = ctx.saved_tensors
            return grad * weight, (grad * x).sum(0)

    model = Fn(lambda m, x: m.first(Hidden.apply(x, m.a)), first=nn.Linear(3, 2), a=(3,))
    dp = engine(model.double())
    with pytest.raises(PrivacyError, match="'a'"):
        dp.validate(torch.randn(5, 3, dtype=torch.float64))


def test_validate_needs_a_loss() -> None:
    dp = engine(Fn(lambda m, x: x, a=(3,)))
    with pytest.raises(ValueError, match="loss: the model returns no tensor that depends on its parameters"):
        dp.validate(torch.randn(5, 3, dtype=torch.float64))
