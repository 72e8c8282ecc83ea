"""What the two phases need of a model: its weights as one vector, and per-sample gradients in that order."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from adamix.errors import InputError
from adamix.rows import Rows
from adamix.storage import one_line
from adamix_kernels import project, softmax_head_clip_sum_noise, softmax_head_coordinates

#: Elements of per-sample gradients held at a time.
_CHUNK_ELEMENTS = 1 << 24


class Weights(Protocol):
    """What a checkpoint takes from a training."""

    def weights(self) -> Tensor:
        """Those that are trained, `[P]` float32."""

    def optimizer_state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors by name, and the rest as JSON can hold it."""


class ParameterVector:
    """Parameters as one vector `[P]`, in float32."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self._parameters = list(parameters)

    def _own(self) -> Sequence[Tensor]:
        """What the vector is of."""
        return self._parameters

    @property
    def size(self) -> int:
        return sum(p.numel() for p in self._parameters)

    def weights(self) -> Tensor:
        """A copy, `[P]` float32."""
        with torch._C.DisableTorchFunctionSubclass():  # those of an engine are of a class of its own
            return torch.cat([p.detach().flatten().float() for p in self._own()])

    def set_weights(self, weights: Tensor) -> None:
        start = 0
        with torch.no_grad(), torch._C.DisableTorchFunctionSubclass():
            for p in self._own():
                p.copy_(weights[start : start + p.numel()].view_as(p))
                start += p.numel()

    def optimizer_state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Plain steps have none."""
        return {}, {}


class Trainable(ParameterVector):
    """A classifier seen as a vector of its trainable parameters `[P]`; gradients come from `torch.func`.

    Gradients are taken in eval mode, each chunk on a fresh copy of the module that is then dropped, with generators as
    they were. Dropout masks would come from torch's generator, and counters or caches would stay in the module: either
    would let private rows be felt past the mechanism. What a forward pass writes elsewhere (globals, closures, files)
    is outside the guarantee.

    Args:
        module: any module that treats the samples of a batch independently and returns logits `[N, classes]`.

    Raises:
        InputError: it is no module, nothing is trainable, or a module mixes samples.
    """

    most_elements = _CHUNK_ELEMENTS

    def __init__(self, module: nn.Module) -> None:
        check_module(module)
        self.module = module
        named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
        if not named:
            raise InputError("model: it has no trainable parameter; set requires_grad on those to train")
        self._names = [name for name, _ in named]
        super().__init__([p for _, p in named])
        self.layers = _layer_slices(named)

    def check(self, public: Rows, classes: int) -> None:
        """Try the module on public rows before anything is trained.

        Raises:
            InputError: its output is not `[N, classes]` finite logits, depends on the other rows of a batch, or has no
                per-sample gradients.
        """
        few = Rows(public.x[:3], public.y[:3])
        try:
            with torch.no_grad():
                self._copy()(public.x)
                together, alone = self._copy()(few.x), self._copy()(few.x[:1])
            with eval_mode(self.module):
                self.module(few.x)
            self._copy()  # a module that keeps an activation can be copied before its first pass, not after
        except Exception as error:  # whatever a forward pass raises, the input and the model do not go together
            shape = list(few.x.shape)
            raise InputError(
                f"model: it fails on rows of shape {shape}, {few.x.dtype} ({one_line(error)}); see its message"
            ) from error
        if not isinstance(together, Tensor) or together.dim() != 2 or together.shape[1] < classes:
            found = list(together.shape) if isinstance(together, Tensor) else type(together).__name__
            raise InputError(
                f"model: its output for {len(few.y)} rows is {found}; return logits [N, {classes}], one per class"
            )
        if together.dtype != torch.float32 or not together.isfinite().all():
            raise InputError(
                f"model: its logits are {together.dtype} or not finite; pass a float32 model in good health"
            )
        if not torch.allclose(together[:1], alone, rtol=1e-3, atol=1e-4):
            raise InputError(
                "model: its output for a row changes with the other rows of the batch, so no per-sample gradient "
                "exists; keep the samples apart"
            )
        next(self.grad_sample(few))

    def loss(self, rows: Rows) -> Tensor:
        """Mean cross-entropy, differentiable."""
        with eval_mode(self.module):
            return cross_entropy(self.module(rows.x), rows.y)

    def grad_sample(self, rows: Rows) -> Iterator[Tensor]:
        """Per-sample gradients in chunks `[b, P]`, together `[N, P]`."""
        for part in self._chunks(rows):
            with _generators_kept():
                grads = self._chunk_grad_sample(self._copy(), part)
            yield grads

    def coordinates(self, rows: Rows, basis: Tensor) -> Iterator[Tensor]:
        """Per-sample gradients in a subspace with orthonormal `basis` `[K, P]`: chunks `[b, K]`, together `[N, K]`."""
        return (project(grads, basis) for grads in self.grad_sample(rows))

    def grad_sum(self, rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
        """For public rows: the exact gradient sum `[P]`, squared norms `[layers, N]` and summed loss, in one pass."""
        total = torch.zeros(self.size, dtype=torch.float64, device=rows.x.device)
        norms = []
        for grads in self.grad_sample(rows):
            total += grads.double().sum(0)
            norms.append(torch.stack([grads[:, layer].double().square().sum(1) for layer in self.layers]))
        with torch.no_grad():
            return total.float(), torch.cat(norms, 1).float(), self.loss(rows) * len(rows.y)

    def logit_gradients(self, rows: Rows) -> Tensor:
        """For public rows: the gradient `[N, P]` of the logits' combination with alternating signs and unit norm.

        Its squared norm tells how far noise in the weights moves a logit, its Gram matrix how curved the loss is:
        exactly for a softmax head, as an estimate otherwise.
        """

        def combined(logits: Tensor, _: Tensor) -> Tensor:
            return (logits[:, ::2].sum() - logits[:, 1::2].sum()) / logits.shape[1] ** 0.5

        return torch.cat([self._vmap_grad(self._copy(), combined, part) for part in self._chunks(rows)])

    def _copy(self) -> nn.Module:
        """A copy in eval mode that shares the parameters, for passes that must leave no trace."""
        shared = {id(p): p for p in self.module.parameters()}
        return copy.deepcopy(self.module, shared).eval()

    def _chunks(self, rows: Rows) -> Iterator[Rows]:
        size = max(1, min(_CHUNK_ELEMENTS, self.most_elements) // self.size)
        for x, y in zip(rows.x.split(size), rows.y.split(size), strict=True):
            if len(x):
                yield Rows(x, y)

    def _chunk_grad_sample(self, module: nn.Module, rows: Rows) -> Tensor:
        return self._vmap_grad(module, cross_entropy, rows)

    def _vmap_grad(self, module: nn.Module, criterion: Callable[[Tensor, Tensor], Tensor], rows: Rows) -> Tensor:
        trainable = {name: p.detach() for name, p in zip(self._names, self._parameters, strict=True)}
        fixed = {name: p.detach() for name, p in module.named_parameters() if name not in trainable}
        buffers = dict(module.named_buffers())

        def loss(weights: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
            logits = torch.func.functional_call(module, (weights, fixed, buffers), (x[None],))
            return criterion(logits, y[None])

        try:
            grads = torch.func.vmap(torch.func.grad(loss), (None, 0, 0), randomness="error")(trainable, rows.x, rows.y)
        except Exception as error:  # whatever a forward pass raises
            raise InputError(
                f"model: per-sample gradients of it failed ({one_line(error)}); use modules that torch.func.vmap "
                "takes, without randomness in eval mode"
            ) from error
        return torch.cat([grads[name].flatten(1) for name in self._names], dim=1)


class SoftmaxHead(Trainable):
    """An `nn.Linear` on fixed features, the paper's case: weight first, then bias, through the fused op."""

    most_elements = 1 << 20  # so that gradients are clipped while they are in cache: three times as fast in secure mode

    def __init__(self, module: nn.Linear) -> None:
        super().__init__(module)
        if not all(p.requires_grad for p in module.parameters()):
            raise InputError("model: part of the nn.Linear is frozen; wrap it in nn.Sequential to train the rest")
        self.head = module
        self.layers = [slice(0, self.size)]

    def clip_sum_noise(self, rows: Rows, **mechanism: object) -> tuple[Tensor, Tensor, Tensor]:
        """`softmax_head_clip_sum_noise` with the sum as one vector `[P]`; also norms `[N]` and summed loss."""
        with torch.no_grad():
            out = softmax_head_clip_sum_noise(rows.x, rows.y, self.head.weight, self.head.bias, **mechanism)  # type: ignore[arg-type]
        parts = [out.weight.flatten()] + ([] if out.bias is None else [out.bias])
        return torch.cat(parts).float(), out.norm_sq, out.loss

    def grad_sum(self, rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
        total, norm_sq, loss = self.clip_sum_noise(rows, max_grad_norm=math.inf)
        return total, norm_sq[None], loss

    def coordinates(self, rows: Rows, basis: Tensor) -> Iterator[Tensor]:
        """All at once: the gradients are not formed."""
        with torch.no_grad():
            yield softmax_head_coordinates(rows.x, rows.y, self.head.weight, basis, self.head.bias)

    def logit_gradients(self, rows: Rows) -> Tensor:
        """The features themselves, with a 1 for the bias: norms and Gram matrix are those of the gradients."""
        return rows.x if self.head.bias is None else torch.cat([rows.x, torch.ones_like(rows.x[:, :1])], dim=1)

    def _chunk_grad_sample(self, module: nn.Module, rows: Rows) -> Tensor:
        with torch.no_grad():
            residual = module(rows.x).softmax(1)
            residual[torch.arange(len(rows.y)), rows.y] -= 1
            weight = (residual[:, :, None] * rows.x[:, None, :]).flatten(1)
            return weight if self.head.bias is None else torch.cat([weight, residual], dim=1)


def check_module(module: nn.Module) -> None:
    """Refuse a model whose per-sample gradients do not exist, or that shows private rows to others.

    Raises:
        InputError: it is no module, has parameters without a shape, forward hooks, or a BatchNorm.
    """
    if not isinstance(module, nn.Module):
        raise InputError(f"model: is {type(module).__name__}; pass an nn.Module, or None for a softmax head")
    lazy = [name for name, p in module.named_parameters() if isinstance(p, nn.UninitializedParameter)]
    if lazy:
        raise InputError(f"model: parameter {lazy[0]} has no shape yet; run the model once on a batch")
    for name, child in module.named_modules():
        if any(map(_is_foreign, (*child._forward_hooks.values(), *child._forward_pre_hooks.values()))):
            raise InputError(
                f"model: {name or 'the model'} has forward hooks, which would see private rows; remove them (for "
                "weight and spectral norm use torch.nn.utils.parametrizations)"
            )
        if isinstance(child, nn.modules.batchnorm._BatchNorm):
            raise InputError(
                f"model: {name or 'the model'} is {type(child).__name__}, which mixes the samples of a batch, so "
                "no per-sample gradient exists; use GroupNorm or LayerNorm instead"
            )


def _is_foreign(hook: Callable[..., Any]) -> bool:
    """Whether a hook is none of those by which fully_shard gathers a module's parameters."""
    return not getattr(hook, "__module__", "").startswith("torch.distributed.fsdp.")


def trainable(module: nn.Module) -> Trainable:
    """The fastest view of `module`."""
    plain = type(module) is nn.Linear and list(module._parameters) == ["weight", "bias"]  # not a pruned one
    return SoftmaxHead(module) if isinstance(module, nn.Linear) and plain else Trainable(module)


@contextmanager
def _generators_kept() -> Iterator[None]:
    """Leaves Python's and NumPy's global generators as they were; torch's is refused by `vmap`."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


@contextmanager
def eval_mode(module: nn.Module) -> Iterator[None]:
    """Eval mode inside the block; afterwards each submodule is as it was."""
    training = {child: child.training for child in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for child, mode in training.items():
            child.training = mode


def error_rate(module: nn.Module, rows: Rows) -> float:
    """Wrong predictions in percent; dropout is off meanwhile."""
    with torch.no_grad(), eval_mode(module):
        wrong = [int((module(x).argmax(1) != y).sum()) for x, y in zip(*(t.split(4096) for t in rows), strict=True)]
    return 100 * sum(wrong) / len(rows.y)


def _layer_slices(named: list[tuple[str, nn.Parameter]]) -> list[slice]:
    """One slice for the parameters of each module, in the order of the weight vector."""
    slices: list[slice] = []
    owner, stop = None, 0
    for name, p in named:
        start, stop = stop, stop + p.numel()
        if owner == name.rpartition(".")[0]:
            slices[-1] = slice(slices[-1].start, stop)
        else:
            slices.append(slice(start, stop))
        owner = name.rpartition(".")[0]
    return slices
