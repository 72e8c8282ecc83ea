"""What an engine puts on a model and its optimizer, and takes off again: classes of parameters, hooks, `zero_grad`."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from adamix_kernels.nn.distributed import Undo, Unsynchronised
from adamix_kernels.nn.errors import PrivacyError
from adamix_kernels.nn.hooks import Hook, ZeroGrad
from adamix_kernels.nn.parameter import PrivateParameter, untraced

if TYPE_CHECKING:
    from adamix_kernels.nn.engine import DPEngine


class Attachment:
    """Of one engine. Until `attach` is called there is nothing."""

    def __init__(self, engine: DPEngine) -> None:
        self._engine = engine
        self.owned: list[tuple[str, PrivateParameter]] = []
        self.stepped: list[tuple[str, Tensor]] = []  # the same, or what is sharded of them
        self.handles: list[Any] = []
        self.known_grads: set[str] = set()  # parameters whose .grad is of public rows, or of a step
        self._pulls = 0

    def attach(self, wrapper: nn.Module) -> None:
        """To the engine's model, which `wrapper` is or holds, and to its optimizer."""
        engine = self._engine
        named = list(engine.model.named_parameters())
        for name, parameter in named if engine.shards is None else engine.shards.unsharded():
            parameter.__class__ = PrivateParameter
            assert isinstance(parameter, PrivateParameter)
            parameter._dp_engine, parameter._dp_name = engine, name
            parameter._dp_index = torch.tensor([engine._number, len(self.owned)])
            self.owned.append((name, parameter))
        self.stepped += named
        for module in engine.model.modules():
            _renew(module._parameters)
        self.watch()
        self.handles += [
            engine.model.register_forward_pre_hook(Hook(engine._forwards.before, traced=True), with_kwargs=True),
            engine.model.register_forward_hook(
                Hook(engine._forwards.after, traced=True), with_kwargs=True, always_call=True
            ),
            engine.optimizer.register_step_pre_hook(Hook(engine._before_step)),
            engine.optimizer.register_step_post_hook(Hook(self.make_private)),
        ]
        vars(engine.model)["zero_grad"] = ZeroGrad(engine.model, self._drop_all)
        self.zero_grad = engine.optimizer.zero_grad
        self._own_zero_grad = vars(engine.optimizer).get("zero_grad")
        engine.optimizer.zero_grad = engine.zero_grad  # type: ignore[method-assign]
        if wrapper is not engine.model:
            self._wrap(wrapper)

    def _wrap(self, wrapper: nn.Module) -> None:
        """The model's DistributedDataParallel, which has no gradients to add."""
        self.handles.append(Unsynchronised(wrapper))
        vars(wrapper)["zero_grad"] = ZeroGrad(wrapper, self._drop_all)
        self.handles.append(Undo(lambda: vars(wrapper).pop("zero_grad")))

    def detach(self) -> None:
        """The model and the optimizer are as they were."""
        model, optimizer = self._engine.model, self._engine.optimizer
        for handle in self.handles:
            handle.remove()
        self.handles.clear()
        for _, parameter in self.owned:
            parameter.__class__ = nn.Parameter  # type: ignore[assignment]
            for mark in ("_dp_engine", "_dp_name", "_dp_index", "_dp_guarded"):
                vars(parameter).pop(mark, None)
            if not parameter._backward_hooks:
                parameter._backward_hooks = None
        if self.owned:
            del optimizer.zero_grad, vars(model)["zero_grad"]
            if self._own_zero_grad is not None:
                optimizer.zero_grad = self._own_zero_grad  # type: ignore[method-assign]
        self.owned.clear()
        self.stepped.clear()

    def watch(self) -> None:
        """An ordinary gradient that reaches a private parameter came by a way without a rule."""
        with torch._C.DisableTorchFunctionSubclass():
            for name, parameter in self.owned:
                parameter.__class__ = PrivateParameter  # where a step failed it is not
                if parameter.requires_grad and not parameter._dp_guarded:
                    self.handles.append(parameter.register_hook(Hook(functools.partial(self._refuse, name))))
                    parameter._dp_guarded = True

    @untraced
    def _refuse(self, name: str, grad: Tensor | None) -> None:
        if grad is not None and self._engine._public:
            self.known_grads.add(name)
        elif grad is not None and not self._pulls:
            raise PrivacyError(
                f"parameter {name!r} gets an ordinary gradient, which no rule has clipped. If the rows are public, run "
                "forward() and backward() within public(); if it is used by a compiled function or through indexing, "
                "use it in a torch function that has a rule, or freeze it"
            )

    @contextmanager
    def pulling(self) -> Iterator[None]:
        """Inside, ordinary gradients are the engine's own."""
        self._pulls += 1
        try:
            with torch.enable_grad():
                yield
        finally:
            self._pulls -= 1

    def add_grads(self, trained: Sequence[tuple[str, Tensor]], totals: Iterable[Tensor]) -> None:
        """What a step releases, to `.grad`."""
        shards = self._engine.shards
        for (_, p), total in zip(trained, totals, strict=True):
            wanted = p.grad_dtype or total.dtype  # that of p, unless it was set; None is any
            grad = total.to(wanted) if shards is None else shards.as_grad(p, total)
            p.grad = grad if p.grad is None else p.grad.add_(grad)
        self.known_grads = {name for name, _ in trained}

    def make_ordinary(self) -> None:
        """For a step: an optimizer is fast on these."""
        for _, p in self.owned:
            p.__class__ = nn.Parameter  # type: ignore[assignment]

    def make_private(self, *args: Any) -> None:
        """After it."""
        for _, p in self.owned:
            p.__class__ = PrivateParameter

    def grad_set(self, parameter: PrivateParameter) -> None:
        """Its `.grad` was assigned."""
        if self._engine.shards is not None:
            return  # FSDP moves it to the shards
        if parameter.grad is None:
            self._engine._sums.drop(parameter._dp_name)
            self.known_grads.discard(parameter._dp_name)
        elif self._engine._public:
            self.known_grads.add(parameter._dp_name)

    def _drop_all(self) -> None:
        self._engine._passes.check_unrecorded("zero_grad()")
        self.known_grads.clear()
        self._engine._passes.drop()  # which an adapter may have put in place of the first


def _renew(parameters: dict[str, Any]) -> None:
    """The same dict, changed: that is all that torch 2.11 asks before it runs what it compiled of a model and has run
    often, which without an engine makes ordinary gradients."""
    same = dict(parameters)
    parameters.clear()
    parameters.update(same)
