"""Autograd functions that see the backprops of an output, and leave the ordinary weight gradient out.

The output is computed from detached parameters, so torch's own backward makes the gradient of the inputs alone. The
tap is laid on the output, as an in-place identity that depends on the parameters: its backward is where a use of them
becomes factors of per-sample gradients.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from adamix_kernels.nn.errors import PrivacyError
from adamix_kernels.nn.factors import Factors
from adamix_kernels.nn.parameter import bases, names, untraced

if TYPE_CHECKING:
    from adamix_kernels.nn.engine import DPEngine

#: Makes factors for the wanted targets of what was saved and the backprops: a tensor, or several of a `Joint`.
Build = Callable[[Sequence[Tensor], Any, Sequence[bool]], Factors]


class Use:
    """One use of parameters in a forward pass, until its gradient has come."""

    def __init__(self, engine: DPEngine, build: Build, targets: Sequence[Tensor]) -> None:
        self.engine, self.build, self.targets = engine, build, targets
        self.layers = {engine.layers[base._dp_name] for base in bases(targets)}
        self.task = torch._C._current_graph_task_id()  # of the backward pass that recomputes this forward, or -1
        # what is recomputed belongs to the forward pass that the task came through, a part used alone to the last one
        self.forward = (engine._forwards.number or engine._forwards.count or None) if self.task == -1 else None
        self.spent_in: int | None = None
        engine._passes.expect(self)

    def receive(self, nodes: Sequence[Any], saved: Sequence[Tensor], backprops: Any) -> None:
        if torch.is_grad_enabled():
            raise PrivacyError(
                f"{names(self.targets)}: gradients are taken with create_graph=True, and second derivatives have no "
                "rule; leave it off, or freeze the parameter"
            )
        with torch._C.DisableTorchFunctionSubclass():
            pairs = zip(self.targets, nodes, strict=True)
            wanted = [target.requires_grad and executes(node, self.targets) for target, node in pairs]
            if any(wanted):
                targets = [target for target, want in zip(self.targets, wanted, strict=True) if want]
                self.engine._passes.receive(self, targets, lambda: self.build(saved, backprops, wanted))


def check_autograd() -> None:
    """A backward pass that is compiled as a whole does not say when it ends: nothing of it would be summed."""
    state = sys.modules.get("torch._dynamo.compiled_autograd")
    if state is not None and (state.compiled_autograd_enabled or state.in_compiled_autograd_region):
        raise PrivacyError(
            "backward(): is compiled by compiled autograd, which does not tell the engine where it ends; leave "
            "torch._dynamo.config.compiled_autograd False. torch.compile of the model compiles its backward pass too"
        )


@untraced
def executes(node: Any, targets: Sequence[Tensor]) -> bool:
    """Whether this backward pass is to reach a target; `torch.autograd.grad` of the inputs alone is not."""
    check_autograd()
    if node is None:
        return False
    try:
        return bool(torch._C._will_engine_execute_node(node))
    except RuntimeError:
        raise PrivacyError(
            f"{names(targets)}: torch.autograd.grad() asks for the gradient of a private parameter; call backward(), "
            "or compute it within public() if the rows are public"
        ) from None


class Tap(torch.autograd.Function):
    """`out`, which nobody else holds yet, with the targets in its history."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, use: Use, saved: Sequence[Tensor], *targets: Tensor) -> Tensor:
        ctx.use = use
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*saved)
        ctx.mark_dirty(out)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> Any:
        if grad is not None:
            ctx.use.receive([node for node, _ in ctx.next_functions[-len(ctx.use.targets) :]], ctx.saved_tensors, grad)
        return grad, None, None, *[None] * len(ctx.use.targets)


class Joint(torch.autograd.Function):
    """Several outputs that nobody else holds yet, with the same targets: the factors need the backprops of all."""

    @staticmethod
    def forward(ctx: Any, use: Use, saved: Sequence[Tensor], count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.use = use
        ctx.save_for_backward(*saved)
        return tuple(out.detach() for out in tensors[:count])  # autograd refuses several in place

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        nodes = [node for node, _ in ctx.next_functions[-len(ctx.use.targets) :]]
        ctx.use.receive(nodes, ctx.saved_tensors, grads)
        return None, None, None, *grads, *[None] * len(ctx.use.targets)


class Rows(torch.autograd.Function):
    """A target expanded to one row per sample, `[B, 1, .., *shape]`."""

    @staticmethod
    def forward(ctx: Any, use: Use, shape: Sequence[int], target: Tensor) -> Tensor:
        ctx.use = use
        ctx.set_materialize_grads(False)
        return target.detach().expand(shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> Any:
        if grad is not None:
            ctx.use.receive([ctx.next_functions[-1][0]], [], grad)
        return None, None, None


def tap(engine: DPEngine, out: Tensor, build: Build, saved: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
    use = Use(engine, build, targets)
    result: Tensor = Tap.apply(out, use, [x.detach() for x in saved], *targets)
    return result


def joint(
    engine: DPEngine, outs: Sequence[Tensor], build: Build, saved: Sequence[Tensor], targets: Sequence[Tensor]
) -> Sequence[Tensor]:
    use = Use(engine, build, targets)
    result: tuple[Tensor, ...] = Joint.apply(use, [x.detach() for x in saved], len(outs), *outs, *targets)
    return result


def rows(engine: DPEngine, target: Tensor, shape: Sequence[int], build: Build) -> Tensor:
    result: Tensor = Rows.apply(Use(engine, build, [target]), shape, target)
    return result
