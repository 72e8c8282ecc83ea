"""The clipped gradient of a linear classifier as others compute it, without noise: `[O, I + 1]`, weight and bias."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.functional import cross_entropy, linear

Peer = Callable[[], Tensor]


def joined(weight: Tensor, bias: Tensor) -> Tensor:
    return torch.cat([weight, bias[:, None]], dim=1)


def residual(x: Tensor, y: Tensor, head: nn.Linear) -> Tensor:
    r = torch.addmm(head.bias, x, head.weight.T).softmax(1)
    r[torch.arange(len(y), device=y.device), y] -= 1
    return r


def not_private(x: Tensor, y: Tensor, head: nn.Linear) -> Tensor:
    """Two products of matrices and a softmax: what privacy is measured against."""
    with torch.no_grad():
        r = residual(x, y, head)
        return joined(r.T @ x, r.sum(0))


def autograd(x: Tensor, y: Tensor, head: nn.Linear) -> Tensor:
    """The same by torch's autograd."""
    loss = cross_entropy(linear(x, head.weight, head.bias), y, reduction="sum")
    return joined(*torch.autograd.grad(loss, (head.weight, head.bias)))


def book_keeping(x: Tensor, y: Tensor, head: nn.Linear, max_grad_norm: float) -> Tensor:
    """fastDP's method (Bu et al. 2023, arXiv 2210.00038): norms from the factors, then one weighted product."""
    logits = linear(x, head.weight, head.bias)
    (g,) = torch.autograd.grad(cross_entropy(logits, y, reduction="sum"), logits)
    norm = (g.square().sum(1) * (x.square().sum(1) + 1)).sqrt()
    g = g * (max_grad_norm / norm).clamp(max=1.0)[:, None]
    return joined(g.T @ x, g.sum(0))


def two_pass(x: Tensor, y: Tensor, head: nn.Linear, max_grad_norm: float) -> Tensor:
    """fastDP's mixed ghost clipping (Bu et al. 2022, arXiv 2205.10683): a second backward pass of weighted losses."""
    logits = linear(x, head.weight, head.bias)
    losses = cross_entropy(logits, y, reduction="none")
    g, *_ = torch.autograd.grad(losses.sum(), (logits, head.weight, head.bias), retain_graph=True)
    norm = (g.square().sum(1) * (x.square().sum(1) + 1)).sqrt()
    weighted = (losses * (max_grad_norm / norm).clamp(max=1.0)).sum()
    return joined(*torch.autograd.grad(weighted, (head.weight, head.bias)))


def vmapped(x: Tensor, y: Tensor, head: nn.Linear, max_grad_norm: float, rows: int = 256) -> Tensor:
    """torch.func per-sample gradients, as few rows at a time as their memory allows."""
    parameters = {name: p.detach() for name, p in head.named_parameters()}

    def loss(params: dict[str, Tensor], one: Tensor, label: Tensor) -> Tensor:
        return cross_entropy(functional_call(head, params, (one[None],)), label[None])

    total = torch.zeros_like(joined(head.weight, head.bias))
    for one, label in zip(x.split(rows), y.split(rows), strict=True):
        grads = vmap(grad(loss), (None, 0, 0))(parameters, one, label)
        norm = (grads["weight"].square().sum((1, 2)) + grads["bias"].square().sum(1)).sqrt()
        coef = (max_grad_norm / norm).clamp(max=1.0)
        total += joined(torch.einsum("b,boi->oi", coef, grads["weight"]), coef @ grads["bias"])
    return total


def opacus(x: Tensor, y: Tensor, head: nn.Linear, max_grad_norm: float, ghost: bool) -> Peer | None:
    """Opacus: its hooks and optimizer, or its ghost clipping; None if it is not installed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from opacus.grad_sample import GradSampleModule, GradSampleModuleFastGradientClipping
            from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping
            from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping
    except ImportError:
        return None
    own = nn.Linear(head.in_features, head.out_features, device=x.device)
    own.load_state_dict(head.state_dict())
    settings = {"noise_multiplier": 0.0, "max_grad_norm": max_grad_norm, "expected_batch_size": len(x)}
    sgd = torch.optim.SGD(own.parameters(), lr=0.0)
    if ghost:
        module = GradSampleModuleFastGradientClipping(
            own, max_grad_norm=max_grad_norm, use_ghost_clipping=True, loss_reduction="sum"
        )
        optimizer = DPOptimizerFastGradientClipping(sgd, loss_reduction="sum", **settings)
        criterion = DPLossFastGradientClipping(module, optimizer, nn.CrossEntropyLoss(reduction="sum"), "sum")
    else:
        module = GradSampleModule(own, loss_reduction="sum")
        optimizer = DPOptimizer(sgd, loss_reduction="sum", **settings)
        criterion = nn.CrossEntropyLoss(reduction="sum")

    def step() -> Tensor:
        optimizer.zero_grad()
        criterion(module(x), y).backward()
        optimizer.pre_step()
        return joined(own.weight.grad, own.bias.grad)

    return step


def peers(x: Tensor, y: Tensor, head: nn.Linear, max_grad_norm: float, materialise: bool) -> Iterator[tuple[str, Peer]]:
    """Each with its name; those that form per-sample gradients only where they are to."""
    given = (x, y, head, max_grad_norm)
    yield "fastDP book-keeping", lambda: book_keeping(*given)
    yield "fastDP mixed", lambda: two_pass(*given)
    for name, ghost in [("Opacus ghost", True), ("Opacus hooks", False)]:
        if (ghost or materialise) and (step := opacus(*given, ghost)) is not None:
            yield name, step
    if materialise:
        yield "vmap(grad)", lambda: vmapped(*given)
