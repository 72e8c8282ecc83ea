"""The subspace on layers of every kind, against the one that is made; and that it makes no gradient of all rows."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from one_by_one import gradients, losses, plain_call
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from zoo_models import Fn, LoRA, frozen

from adamix_kernels import DPEngine, clip_coef, clip_sum, grad_norm_sq, lift, linear_gram, project, subspace_basis

Make = Callable[[int, torch.Generator], list[Tensor]]


def reals(*shape: int) -> Make:
    return lambda n, g: [torch.randn(n, *shape, generator=g, dtype=torch.float64)]


def ids(vocabulary: int, positions: int) -> Make:
    return lambda n, g: [torch.randint(vocabulary, (n, positions), generator=g)]


def tied(self: Any, x: Tensor) -> Tensor:
    return F.linear(torch.tanh(self.inner(self.table(x))), self.table.weight)


MODELS: dict[str, tuple[Callable[[], nn.Module], Make]] = {
    "mlp": (lambda: nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 4, bias=False)), reals(6)),
    "positions": (lambda: nn.Sequential(nn.Linear(6, 9), nn.LayerNorm(9), nn.Linear(9, 4)), reals(5, 6)),
    "convolution": (
        lambda: nn.Sequential(nn.Conv2d(3, 6, 3), nn.GroupNorm(2, 6), nn.Tanh(), nn.Conv2d(6, 6, 2, groups=3)),
        reals(3, 6, 6),
    ),
    "embedding": (lambda: nn.Sequential(nn.Embedding(11, 5, padding_idx=2), nn.Linear(5, 3)), ids(11, 7)),
    "tied": (lambda: Fn(tied, table=nn.Embedding(11, 5), inner=nn.Linear(5, 5)), ids(11, 7)),
    "tied with padding": (
        lambda: Fn(tied, table=nn.Embedding(11, 5, padding_idx=3), inner=nn.Linear(5, 5)),
        ids(11, 7),
    ),
    "used twice": (lambda: Fn(lambda m, x: m.a(torch.tanh(m.a(x))), a=nn.Linear(5, 5)), reals(4, 5)),
    "position table": (lambda: Fn(lambda m, x: m.a(x + m.table), a=nn.Linear(5, 3), table=(4, 5)), reals(4, 5)),
    "transposed": (lambda: Fn(lambda m, x: torch.addmm(m.b, x, m.w), w=(5, 3), b=(3,)), reals(5)),
    "attention": (
        lambda: Fn(lambda m, x: m.a(x, x, x, need_weights=False)[0], a=nn.MultiheadAttention(8, 2, batch_first=True)),
        reals(5, 8),
    ),
    "lstm": (lambda: Fn(lambda m, x: m.a(x)[0], a=nn.LSTM(4, 6, batch_first=True)), reals(5, 4)),
    "lora": (lambda: LoRA(6, 5, 2), reals(3, 6)),
    "bias only": (lambda: frozen(nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 4)), "weight"), reals(5, 6)),
}


#: Whose inner products are made in parts.
LARGE = ("positions", "convolution", "embedding", "tied with padding", "lstm")


def flat(rows: list[dict[str, Tensor]]) -> Tensor:
    return torch.stack([torch.cat([g.double().flatten() for g in row.values()]) for row in rows])


@pytest.mark.parametrize("name", LARGE)
def test_parts_of_what_is_too_large_add_up(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adamix_kernels.ops._factored._LIMIT", 150)
    check_model(name, "auto")


@pytest.mark.parametrize("strategy", ["auto", "book_keeping", "materialize"])
@pytest.mark.parametrize("name", MODELS)
def test_any_model_gives_what_a_basis_that_is_made_gives(name: str, strategy: str) -> None:
    check_model(name, strategy)


def check_model(name: str, strategy: str) -> None:
    torch.manual_seed(0)
    make, inputs = MODELS[name]
    model, g = make().double(), torch.Generator().manual_seed(1)
    public, private = inputs(9, g), inputs(6, g)
    reference = copy.deepcopy(model)
    basis = subspace_basis(flat(gradients(reference, public, plain_call)), rank=4)
    coordinates = project(flat(gradients(reference, private, plain_call)), basis)
    limit = float(coordinates.norm(dim=1).median())
    want = lift(clip_sum(coordinates, clip_coef(grad_norm_sq(coordinates), limit)), basis)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    settings = {"noise_multiplier": 0.0, "expected_batch_size": 1.0, "loss_reduction": "sum", "strategy": strategy}
    dp = DPEngine(model, optimizer, max_grad_norm=limit, **settings)
    subspace = dp.public_subspace(rank=4)
    subspace.refresh(lambda: losses(model(*public)).sum())
    losses(model(*private)).sum().backward()
    optimizer.step()
    got = torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])
    torch.testing.assert_close(got.data, want, rtol=1e-5, atol=1e-6 * float(want.abs().max()))
    assert subspace.ranks == {"": 4}


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that an operation of torch gives."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, Tensor) and x.untyped_storage().nbytes() >= x.numel() * x.element_size():
                self.elements = max(self.elements, x.numel())
        return result


@pytest.mark.parametrize("method", ["gram", "direct"])
def test_no_tensor_of_rows_or_directions_times_parameters_is_made(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights of 512 x 512, 24 public rows, 16 directions: 786,432 parameters in all, and 4 positions."""
    from adamix_kernels.nn import inner_products

    monkeypatch.setattr(inner_products, "linear_gram", lambda *args: linear_gram(*args, method))
    monkeypatch.setattr("adamix_kernels.ops._factored._LIMIT", 1 << 19)
    torch.manual_seed(0)
    width, rows, rank = 512, 24, 16
    model = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(3)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    dp = DPEngine(model, optimizer, max_grad_norm=1.0, noise_multiplier=1.0, expected_batch_size=4.0)
    subspace = dp.public_subspace(rank=rank)
    public, private = torch.randn(rows, 4, width), torch.randn(4, 4, width)
    with Largest() as largest:
        subspace.refresh(lambda: model(public).square().mean())
        model(private).square().mean().backward()
        optimizer.step()
    assert subspace.ranks == {"": rank}
    assert width * width <= largest.elements < 4 * width * width  # the sum itself; less than of 4 private rows


def test_the_probe_sees_gradients_that_are_made() -> None:
    with Largest() as largest:
        subspace_basis(torch.randn(24, 10_000), rank=3)
    assert largest.elements >= 24 * 10_000


def test_gram_matrices_are_symmetric_and_positive_up_to_rounding() -> None:
    g = torch.Generator().manual_seed(0)
    for shape in ((12, 1, 70, 30), (12, 9, 7, 5), (12, 40, 33, 31)):
        a, b = torch.randn(shape[:3], generator=g), torch.randn(*shape[:2], shape[3], generator=g)
        for method in ("gram", "direct"):
            gram = linear_gram(a, b, a, b, True, method)
            assert torch.equal(gram, gram.T)
            eigenvalues = torch.linalg.eigvalsh(gram)
            assert eigenvalues[0] > -1e-6 * eigenvalues[-1]


def test_rows_of_one_kind_meet_those_of_another_a_row_at_a_time() -> None:
    """Where public rows have factors and private ones gradients, as a change of the strategy between them makes."""
    from adamix_kernels.nn.factors import LinearFactors, PerSample
    from adamix_kernels.nn.inner_products import inner_products

    a, g = torch.randn(5, 3, 4).double(), torch.randn(5, 3, 6).double()
    own = LinearFactors(a, g, True)
    there = PerSample(own.grad_sample())
    torch.testing.assert_close(inner_products(own, there), inner_products(own, own), rtol=1e-12, atol=1e-12)
    assert math.isclose(float(inner_products(own, there)[2, 2]), float(own.norm_sq()[2]), rel_tol=1e-5)
