"""A private training step as others make it: each gives a function that runs one, and the model it trains."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from step_models import Work
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from adamix_kernels import DPEngine

MAX_GRAD_NORM, NOISE_MULTIPLIER, RATE = 1.0, 1.0, 0.01

Step = Callable[[], None]
Contender = tuple[nn.Module, Step]


def plain(work: Work, x: Tensor, y: Tensor) -> Contender:
    model = work.model().to(x.device)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)

    def step() -> None:
        optimizer.zero_grad()
        work.loss(model(x), y).backward()
        optimizer.step()

    return model, step


def engine(work: Work, x: Tensor, y: Tensor, noise: float, **settings: Any) -> Contender:
    model = work.model().to(x.device)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    dp = DPEngine(
        model,
        optimizer,
        max_grad_norm=MAX_GRAD_NORM,
        noise_multiplier=noise,
        expected_batch_size=len(x),
        **settings,
    )

    def step() -> None:
        optimizer.zero_grad()
        dp.backward(work.loss(model(x), y))
        optimizer.step()

    return model, step


def opacus(work: Work, x: Tensor, y: Tensor, noise: float, ghost: bool) -> Contender:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from opacus.grad_sample import GradSampleModule, GradSampleModuleFastGradientClipping
        from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping
        from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping
    model = work.model().to(x.device)
    settings = {"noise_multiplier": noise, "max_grad_norm": MAX_GRAD_NORM, "expected_batch_size": len(x)}
    sgd = torch.optim.SGD(model.parameters(), lr=RATE)
    if ghost:
        module = GradSampleModuleFastGradientClipping(
            model, max_grad_norm=MAX_GRAD_NORM, use_ghost_clipping=True, loss_reduction="mean"
        )
        optimizer: Any = DPOptimizerFastGradientClipping(sgd, loss_reduction="mean", **settings)
        loss: Any = DPLossFastGradientClipping(module, optimizer, nn.CrossEntropyLoss(), "mean")
    else:
        module = GradSampleModule(model, loss_reduction="mean")
        optimizer = DPOptimizer(sgd, loss_reduction="mean", **settings)
        loss = nn.CrossEntropyLoss()

    def step() -> None:
        optimizer.zero_grad()
        out = module(x)
        if out.dim() == 3 and ghost:
            loss(out.flatten(0, 1), y.flatten(), shape=y.shape).backward()
        else:
            loss(out.flatten(0, -2), y.flatten()).backward()
        optimizer.step()

    return model, step


def vmapped(work: Work, x: Tensor, y: Tensor, noise: float) -> Contender:
    model = work.model().to(x.device)
    parameters = dict(model.named_parameters())
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)

    def loss(params: dict[str, Tensor], one: Tensor, label: Tensor) -> Tensor:
        return work.loss(functional_call(model, params, (one[None],)), label[None])

    def step() -> None:
        grads = vmap(grad(loss), (None, 0, 0))({k: p.detach() for k, p in parameters.items()}, x, y)
        norm = torch.stack([g.flatten(1).norm(dim=1) for g in grads.values()]).norm(dim=0)
        coef = (MAX_GRAD_NORM / norm).clamp(max=1.0)
        for name, p in parameters.items():
            total = torch.einsum("b,b...->...", coef, grads[name])
            p.grad = (total + noise * MAX_GRAD_NORM * torch.randn_like(total)) / len(x)
        optimizer.step()

    return model, step


class BookKeeping:
    """fastDP's methods in torch (Bu et al. 2023, arXiv 2210.00038; 2022, arXiv 2205.10683).

    Norms by the cheaper of the Gram matrices and the gradients themselves, layer by layer; then one weighted product
    each, or (`two_pass`) a second backward pass.
    """

    def __init__(self, work: Work, x: Tensor, y: Tensor, noise: float, two_pass: bool) -> None:
        self.work, self.x, self.y, self.noise, self.two_pass = work, x, y, noise, two_pass
        self.model = work.model().to(x.device)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=RATE)
        self.layers = [m for m in self.model.modules() if list(m.parameters(recurse=False))]
        self.inputs: dict[nn.Module, Tensor] = {}
        self.outputs: dict[nn.Module, Tensor] = {}
        self.backprops: dict[nn.Module, Tensor] = {}
        for layer in self.layers:
            layer.register_forward_hook(self._keep)

    def _keep(self, layer: nn.Module, args: Any, out: Tensor) -> None:
        self.inputs[layer], self.outputs[layer] = args[0].detach(), out

    def factors(self, layer: nn.Module) -> tuple[Tensor, Tensor]:
        a, g = self.inputs[layer], self.backprops[layer]
        if isinstance(layer, nn.Conv2d):
            a = F.unfold(a, layer.kernel_size, layer.dilation, layer.padding, layer.stride).mT
            return a, g.flatten(2).mT
        return (a[:, None], g[:, None]) if a.dim() == 2 and not isinstance(layer, nn.Embedding) else (a, g)

    def norm_sq(self, layer: nn.Module) -> Tensor:
        a, g = self.factors(layer)
        if isinstance(layer, nn.LayerNorm):
            normal = F.layer_norm(a, layer.normalized_shape, eps=layer.eps)
            return (normal * g).sum(1).square().sum(1) + g.sum(1).square().sum(1)
        if isinstance(layer, nn.Embedding):
            return ((a[:, :, None] == a[:, None, :]) * torch.bmm(g, g.mT)).sum((1, 2))
        if 2 * a.shape[1] ** 2 <= a.shape[2] * g.shape[2]:
            weight = (torch.bmm(a, a.mT) * torch.bmm(g, g.mT)).sum((1, 2))
        else:
            weight = torch.bmm(g.mT, a).square().sum((1, 2))
        return weight + (g.sum(1).square().sum(1) if layer.bias is not None else 0)

    def sums(self, layer: nn.Module, coef: Tensor) -> None:
        a, g = self.factors(layer)
        g = g * coef[:, None, None]
        flat = g.flatten(0, 1)
        if isinstance(layer, nn.LayerNorm):
            layer.weight.grad = (F.layer_norm(a, layer.normalized_shape, eps=layer.eps) * g).sum((0, 1))
        elif isinstance(layer, nn.Embedding):
            layer.weight.grad = torch.zeros_like(layer.weight).index_add_(0, a.flatten(), flat)
        else:
            layer.weight.grad = (flat.T @ a.flatten(0, 1)).view_as(layer.weight)
        if getattr(layer, "bias", None) is not None:
            layer.bias.grad = flat.sum(0)

    def step(self) -> None:
        self.optimizer.zero_grad()
        samples = len(self.x)
        parameters = list(self.model.parameters())
        out = self.model(self.x)
        outputs = list(self.outputs.values())
        if self.two_pass:
            losses = F.cross_entropy(out.flatten(0, -2), self.y.flatten(), reduction="none").view(samples, -1).mean(1)
            grads = torch.autograd.grad(losses.sum(), [*outputs, *parameters], retain_graph=True)
        else:  # of outputs alone: the ordinary weight gradients are not made
            grads = torch.autograd.grad(self.work.loss(out, self.y) * samples, outputs)
        self.backprops = dict(zip(self.outputs, grads, strict=False))
        with torch.no_grad():
            norm_sq = torch.stack([self.norm_sq(layer) for layer in self.layers]).sum(0)
            coef = (MAX_GRAD_NORM / norm_sq.sqrt()).clamp(max=1.0)
        if self.two_pass:
            (losses * coef).sum().backward()
        else:
            with torch.no_grad():
                for layer in self.layers:
                    self.sums(layer, coef)
        self.inputs, self.outputs, self.backprops = {}, {}, {}
        with torch.no_grad():
            for p in parameters:
                p.grad = (p.grad + self.noise * MAX_GRAD_NORM * torch.randn_like(p)) / samples
        self.optimizer.step()


def contenders(work: Work, x: Tensor, y: Tensor, noise: float, materialise: bool) -> Iterator[tuple[str, Contender]]:
    yield "not private", plain(work, x, y)
    yield "adamix_kernels, flat", engine(work, x, y, noise)
    yield "adamix_kernels, per_layer", engine(work, x, y, noise, strategy="per_layer")
    yield "adamix_kernels, two_pass", engine(work, x, y, noise, strategy="two_pass")
    for name, two_pass in (("fastDP book-keeping", False), ("fastDP mixed", True)):
        keeper = BookKeeping(work, x, y, noise, two_pass)
        yield name, (keeper.model, keeper.step)
    yield "Opacus ghost", opacus(work, x, y, noise, True)
    if materialise:
        yield "Opacus hooks", opacus(work, x, y, noise, False)
        yield "vmap(grad)", vmapped(work, x, y, noise)
