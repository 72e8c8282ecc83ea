"""The forward passes of a model that an engine is attached to, which tell the rules what the batch is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from adamix_kernels.nn import compiled
from adamix_kernels.nn.checks import check_labels, check_modules, mixing
from adamix_kernels.nn.errors import PrivacyError
from adamix_kernels.nn.hooks import Hook
from adamix_kernels.nn.parameter import storage, untraced
from adamix_kernels.nn.probe import tell_apart
from adamix_kernels.nn.tap import check_autograd

if TYPE_CHECKING:
    from adamix_kernels.nn.engine import DPEngine


class Forwards:
    """Those of one engine."""

    def __init__(self, engine: DPEngine) -> None:
        self._engine = engine
        self._mixing = mixing(engine.model)
        check_modules(self._mixing)
        self.count = 0
        self.number: int | None = None  # of the one that runs
        self.batch_size: int | None = None
        self.input_storages: set[int] = set()
        self.token: Tensor | None = None  # of a forward pass, for what of it is compiled
        self.entered: Tensor | None = None  # the same of one that is compiled as a whole

    def before(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if torch.compiler.is_compiling():
            self.token = compiled.enter(self._engine, _leaves(args, kwargs), kwargs.get("labels"))
            return
        self.token = None
        if not torch.is_grad_enabled() or self._engine.is_public:
            return
        self.begin([x for x in _leaves(args, kwargs) if x.dim() > 0], kwargs)
        self.number = self.count
        self.token = compiled.token(self._engine)

    @untraced
    def begin(self, found: Sequence[Tensor], kwargs: Mapping[str, Any]) -> None:
        check_autograd()
        check_modules(self._mixing)
        if self._engine.loss_reduction == "mean":
            check_labels(kwargs, self._engine._passes.recorded)
        self._engine._attached.watch()
        if any(torch._C._functorch.is_functorch_wrapped_tensor(x) for x in found):
            raise PrivacyError(
                "model: called within torch.func, whose gradients are not clipped; for public rows do it within "
                "public(), or use torch.autograd.grad() for gradients of the inputs"
            )
        self.batch_size = found[0].shape[0] if found else None
        self.input_storages = {storage(x) for x in found if x.shape[0] == self.batch_size}
        self.count += 1

    def after(self, module: nn.Module, args: Any, kwargs: Any, outputs: Any) -> None:
        if torch.compiler.is_compiling():
            self.token = None
            return
        began, self.number = self.number, None
        if began is not None and outputs is not None:
            for x in _leaves((outputs,), {}):
                if x.grad_fn is not None:
                    x.grad_fn.register_prehook(Hook(lambda _, began=began: self._engine._passes.come_through(began)))
            if self._engine.shards is not None:
                self._engine.shards.check_placed()
            tell_apart(self._engine, module, args, kwargs)


def _leaves(args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """The tensors in arguments, or in whatever a model gives."""
    if not kwargs and all(isinstance(x, Tensor) for x in args):
        return list(args)
    return [x for x in tree_leaves((args, dict(kwargs))) if isinstance(x, Tensor)]
