"""Uses that a review found refused, crashed or wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from one_by_one import check
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from zoo_models import Fn, seq

from adamix_kernels import DPEngine, PrivacyError


def draw(*sizes: int) -> Tensor:
    return torch.randn(sizes, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def engine(module: nn.Module, **options: Any) -> DPEngine:
    settings = {"max_grad_norm": 1.0, "noise_multiplier": 0.0, "expected_batch_size": 1.0, **options}
    return DPEngine(module, torch.optim.SGD(module.parameters(), lr=0.1), **settings)


SCALARS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "times 2": lambda m, x: m.layer(x) * (m.scale * 2),
    "1 over it": lambda m, x: m.layer(x) * (1 / m.scale),
    "of two": lambda m, x: m.layer(x) * torch.minimum(m.scale**2 + 1, torch.tensor(3.0)),
}


@pytest.mark.parametrize("name", SCALARS)
def test_a_parameter_without_dimensions_takes_numbers(name: str) -> None:
    torch.manual_seed(0)
    model = Fn(SCALARS[name], layer=nn.Linear(5, 3), scale=()).double()
    check(model, [draw(4, 5)])


def test_a_penalty_on_parameters_is_refused_by_name() -> None:
    model = nn.Linear(5, 3)
    engine(model)
    with pytest.raises(PrivacyError, match="weight_decay"):
        (model(torch.randn(4, 5)).sum() + sum(p.pow(2).sum() for p in model.parameters())).backward()


def distances(x: Tensor, y: Tensor) -> Tensor:
    return torch.arange(x.shape[1])[:, None] - torch.arange(y.shape[1])[None] + y.shape[1]


@pytest.mark.parametrize(
    "model",
    [
        Fn(lambda m, x, y: x @ y.mT + m.bias(distances(x, y)).squeeze(-1), bias=nn.Embedding(20, 1)),
        Fn(lambda m, x, y: x @ y.mT + m.bias(distances(x, y)[..., None].to(x)).squeeze(-1), bias=nn.Linear(1, 1)),
        Fn(lambda m, x, y: x @ y.mT + distances(x, y).to(x) * m.slope, slope=(1,)),
        Fn(lambda m, x, y: (x * m.slope) @ y.mT + distances(x, y).to(x) * m.slope, slope=(1,)),
    ],
    ids=["embedding", "linear", "elementwise", "elementwise and of samples"],
)
def test_distances_with_as_many_steps_as_samples_are_no_batch(model: nn.Module) -> None:
    """`[T, S]` with T = B was taken for B samples: their clipped sums were not per sample."""
    engine(model)
    with pytest.raises(PrivacyError, match="begin with a batch of another size"):
        model(torch.randn(4, 4, 3), torch.randn(4, 6, 3))


def test_what_is_computed_of_a_buffer_is_no_batch() -> None:
    """As the bias of positions in Swin v2, an MLP of their distances."""
    torch.manual_seed(0)
    mlp = seq(nn.Linear(2, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 1))
    model = Fn(lambda m, x: x @ x.mT + m.mlp(m.table).view(36)[m.index], mlp=mlp, table=draw(36, 2))
    model.register_buffer("index", torch.randint(0, 36, (4, 4)))
    for samples in (3, 4, 36):
        check(model.double(), [draw(samples, 4, 5)], strategies=("book_keeping", "two_pass", "materialize"))


@pytest.mark.parametrize(("bias", "dropout"), [((1, 1, 4, 4), 0.0), ((4, 4), 0.0), ((4, 4), 0.1)])
def test_a_bias_of_attention_gets_a_row_per_sample(bias: tuple[int, ...], dropout: float) -> None:
    """Dropout was taken for a mixture of samples, as in T5."""

    def run(m: Any, x: Tensor) -> Tensor:
        q, k, v = m.qkv(x)[:, None].chunk(3, -1)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=m.bias * 1, dropout_p=dropout)

    torch.manual_seed(0)
    model = Fn(run, qkv=nn.Linear(5, 15), bias=bias).double()
    if dropout:
        dp = engine(model)
        model(draw(3, 4, 5)).sum().backward()
        dp.optimizer.step()
    else:
        check(model, [draw(3, 4, 5)])


def test_a_penalty_on_gradients_is_refused() -> None:
    """It was left out of the weights' gradient, or torch could not differentiate twice."""
    model = seq(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 1))
    dp = engine(model)
    x = torch.randn(4, 5, requires_grad=True)
    out = model(x).sum()
    with pytest.raises(PrivacyError, match=r"'2\.weight', '2\.bias': .* create_graph=True"):
        torch.autograd.grad(out, x, create_graph=True)
    with dp.public():
        torch.autograd.grad(model(x).sum(), x, create_graph=True)[0].norm().backward()


def test_function_transforms_are_refused() -> None:
    model = nn.Linear(5, 3)
    dp = engine(model)
    with pytest.raises(PrivacyError, match=r"called within torch\.func"):
        torch.func.jacrev(model)(torch.randn(4, 5))
    with dp.public():
        torch.func.jacrev(model)(torch.randn(4, 5))


def test_sparse_inputs() -> None:
    """The neighbours of a graph, for instance, which have no storage."""
    model = Fn(lambda m, rows, x: torch.sparse.mm(rows, m.layer(x)), layer=nn.Linear(5, 3))
    dp = engine(model)
    model(torch.eye(4).to_sparse(), torch.randn(4, 5)).sum().backward()
    dp.optimizer.step()


@pytest.mark.parametrize("strategy", ["book_keeping", "two_pass"])
def test_recomputed_parts_as_wide_as_the_batch(strategy: str) -> None:
    """The forward pass that tells the batch apart has no gradients within a reentrant checkpoint."""
    part = seq(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
    model = Fn(lambda m, x: checkpoint(m.part, m.first(x), use_reentrant=True), first=nn.Linear(5, 8), part=part)
    dp = engine(model, strategy=strategy)
    for _ in range(3):
        dp.backward(model(torch.randn(8, 5)).sum())
        dp.optimizer.step()


def test_complex_weights_are_views_of_real_parameters() -> None:
    """As in Fourier neural operators; they were refused as ordinary gradients."""

    def run(m: Any, x: Tensor) -> Tensor:
        modes = torch.einsum("bix,iox->box", torch.fft.rfft(x), torch.view_as_complex(m.weight))
        return torch.fft.irfft(modes, n=6)

    torch.manual_seed(0)
    check(Fn(run, weight=(3, 2, 4, 2)).double(), [draw(4, 3, 6)])
    with pytest.raises(PrivacyError, match=r"'weight' is complex; .*view_as_complex"):
        engine(nn.Linear(5, 3, dtype=torch.complex64))


def test_parameters_are_set_even_if_they_are_as_long_as_the_batch() -> None:
    """`p.data = x`, which `model.to()` does too, was lost where x had as many rows as the batch."""
    model = nn.Linear(5, 8)
    dp = engine(model)
    model(torch.randn(8, 5)).sum().backward()
    dp.optimizer.step()
    model.weight.data = torch.ones(8, 5)
    model.weight.grad = torch.full((8, 5), 2.0)
    assert model.weight.eq(1).all()
    assert model.weight.grad.eq(2).all()
    model.double()
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    model(torch.randn(8, 5, dtype=torch.float64)).sum().backward()


def test_a_function_without_a_rule_under_autocast() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ConvTranspose2d(3, 2, 3), nn.Flatten(), nn.Linear(72, 2))
    x, limit = torch.randn(4, 2, 6, 6), 0.5
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    DPEngine(model, optimizer, max_grad_norm=limit, noise_multiplier=0.0, expected_batch_size=1.0)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(x).square().sum(1).mean()
    loss.backward()
    optimizer.step()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    assert len(grads) == 6 and all(g.dtype == torch.float32 and g.abs().max() > 0 for g in grads)
    assert torch.stack([g.norm() for g in grads]).norm() <= 4 * limit * (1 + 1e-5)
