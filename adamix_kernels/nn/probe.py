"""Where the batch is as long as its sequences, `[T, B, D]` looks like `[B, T, D]`: one sample more tells them apart."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from adamix_kernels.nn import parameter
from adamix_kernels.nn.errors import PrivacyError
from adamix_kernels.nn.parameter import storage, tensors

if TYPE_CHECKING:
    from adamix_kernels.nn.engine import DPEngine


def tell_apart(engine: DPEngine, module: nn.Module, args: Any, kwargs: Any) -> None:
    """Run the forward pass again with the last sample twice: every rule checks dimension 0 against that size.

    It happens only where an input of a parameter has a second dimension of the batch's size, or was computed without a
    gradient and may hold no samples, and no other batch has told before: for most loops at the first forward pass or
    never. Nothing is kept for a backward pass.
    """
    rules, samples = engine._rules, engine._forwards.batch_size or 0
    doubtful = rules.doubtful - rules.told
    rules.doubtful = set()
    if engine.shards is not None and engine.shards.any(bool(doubtful)) and not doubtful:
        _join(engine, module, args, kwargs)
    if not doubtful:
        return

    def more(x: Any) -> Any:
        whole = not isinstance(x, Tensor) or x.dim() == 0 or x.shape[0] != samples
        return x if whole else torch.cat((x.detach(), x.detach()[-1:])).requires_grad_(x.requires_grad)

    args, kwargs = tree_map(more, (args, dict(kwargs)))
    cause: Exception | None = None
    with undone(engine, module):
        engine._forwards.batch_size = samples + 1
        engine._forwards.input_storages = {storage(x) for x in tensors(args, kwargs)}
        try:
            with torch.autograd.graph.saved_tensors_hooks(lambda _: None, _lost):
                module.forward(*args, **kwargs)
        except Exception as error:  # whatever the model makes of a wrong shape
            cause = error
    left = doubtful if cause is not None else doubtful - rules.told
    if left:
        names = ", ".join(repr(name) for name in sorted({name for name, _ in left}))
        raise PrivacyError(
            f"{names}: its batch has {samples} samples and its input another dimension of that size, or no gradient; "
            f"with one sample more the model {'fails' if cause else 'uses it otherwise'}, so it is not known which is "
            "the batch. It must be dimension 0 wherever a trainable parameter is used; if it is, begin with a batch of "
            "another size, and let the model take one sample more; constants belong into buffers"
        ) from cause


def _join(engine: DPEngine, module: nn.Module, args: Any, kwargs: Any) -> None:
    """Another rank runs it again: its layers are gathered from this one too."""
    with undone(engine, module, probing=False), torch.no_grad():
        module.forward(*args, **kwargs)


def _lost(_: Any) -> Tensor:
    raise RuntimeError("a forward pass that only tells the batch apart keeps nothing for a backward pass")


@contextmanager
def undone(engine: DPEngine, module: nn.Module, probing: bool = True) -> Iterator[None]:
    """A forward pass that leaves nothing behind: no expected gradients, buffers and random numbers as before."""
    rules, passes = engine._rules, engine._passes
    size, storages = engine._forwards.batch_size, engine._forwards.input_storages
    expected = dict(passes._expected)
    buffers = [(b, b._version, b.clone()) for b in module.buffers()]
    devices = {p.device.index for p in module.parameters() if p.device.type == "cuda"}
    rules.probing = probing
    if probing:
        parameter.probing.add(id(engine))
    gathered = engine.shards.gathered(module) if engine.shards is not None else nullcontext()
    try:
        with torch.random.fork_rng([d for d in devices if d is not None]), gathered:
            yield
    finally:
        engine._forwards.batch_size, engine._forwards.input_storages, rules.probing = size, storages, False
        parameter.probing.discard(id(engine))
        passes._expected = expected
        with torch.no_grad():
            for buffer, version, value in buffers:
                if buffer._version != version:
                    buffer.copy_(value)
