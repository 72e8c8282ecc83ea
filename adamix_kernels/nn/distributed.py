"""Whether a model is trained by one process or by the ranks of a job, and how it is spread over them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from adamix_kernels.nn.adaptive import PublicQuantile
from adamix_kernels.nn.errors import PrivacyError
from adamix_kernels.nn.ranks import Ranks, Replicas
from adamix_kernels.ops.noise import Noise

if TYPE_CHECKING:
    from adamix_kernels.nn.engine import DPEngine

#: As `process_group`: this process trains a model of its own, whatever others do.
LOCAL = "local"


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel, or itself."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def ranks_of(model: nn.Module, process_group: Any) -> Ranks | None:
    """The ranks that train a model; None if it is trained by this process alone.

    Raises:
        PrivacyError: several processes run, and it is not said whether they train one model; or this one is not in the
            group; or the model is spread in a way that cannot be made private.
        TypeError, ValueError: the group is none, or another one than the model's.
    """
    if not dist.is_available() or not dist.is_initialized():
        if process_group not in (None, LOCAL):
            raise ValueError("process_group: torch.distributed is not initialised; call init_process_group() first")
        return None
    for name, module in model.named_modules():
        if type(module).__name__ == "FullyShardedDataParallel":
            raise PrivacyError(f"module {name!r} is FSDP's first version; use torch.distributed.fsdp.fully_shard()")
    _check_group(process_group)
    if any(type(p) is not nn.Parameter and hasattr(p, "device_mesh") for p in model.parameters()):
        from adamix_kernels.nn.sharded import Shards  # imports much that others do not need

        if process_group is not None:
            raise ValueError("process_group: a sharded model has that of its device mesh; pass None")
        return Shards(model)
    if isinstance(model, DistributedDataParallel):
        if model.mixed_precision is not None:
            raise PrivacyError("model: DistributedDataParallel with mixed_precision is not supported; use autocast")
        if process_group not in (None, model.process_group):
            raise ValueError("process_group: is not that of the DistributedDataParallel model; pass None")
        process_group = model.process_group
    if process_group is None and dist.get_world_size() > 1:
        raise PrivacyError(
            f"process_group: torch.distributed runs {dist.get_world_size()} processes, and the model is neither in "
            "DistributedDataParallel nor sharded; pass torch.distributed.group.WORLD if they train one model together, "
            f"or {LOCAL!r} if each trains its own"
        )
    if process_group in (None, LOCAL) or dist.get_world_size(process_group) == 1:
        return None
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    return Replicas(process_group, device)


def _check_group(process_group: Any) -> None:
    if process_group == dist.GroupMember.NON_GROUP_MEMBER:  # what new_group() returns outside of it
        raise PrivacyError(
            f"process_group: rank {dist.get_rank()} is not in it; make the DPEngine on its members alone, or pass "
            f"{LOCAL!r} if this process trains a model of its own"
        )
    if process_group is not None and process_group != LOCAL and not isinstance(process_group, dist.ProcessGroup):
        kind = type(process_group).__name__
        raise TypeError(f"process_group: is {kind}; pass a torch.distributed.ProcessGroup, {LOCAL!r} or None")


def agreed_noise(ranks: Ranks | None, noise: Noise) -> Noise:
    """The noise of rank 0 on all ranks."""
    return noise if ranks is None else ranks.shared(noise)


def settings_of(engine: DPEngine, unit: str) -> dict[str, Any]:
    """What must be equal on all ranks."""
    limit: Any = engine.max_grad_norm
    adaptive = isinstance(limit, PublicQuantile)
    shapes = [(name, list(p.shape), str(p.dtype), p.requires_grad) for name, p in engine.model.named_parameters()]
    return {
        "max_grad_norm": dict(limit) if isinstance(limit, Mapping) else limit if adaptive else float(limit),
        "noise_multiplier": engine.noise_multiplier,
        "expected_batch_size": engine.expected_batch_size,
        "strategy": engine.strategy,
        "clipping": engine.clipping,
        "loss_reduction": engine.loss_reduction,
        "loss_scale": engine.loss_scale,
        "unit": unit,
        "model": hashlib.blake2b(repr(shapes).encode(), digest_size=8).hexdigest(),
    }


class Undo:
    """What is done when the engine is detached."""

    def __init__(self, action: Callable[[], Any]) -> None:
        self.remove = action


class Unsynchronised:
    """DistributedDataParallel as in `no_sync()`, for good: it has no gradients to add, the step adds the sums."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model if isinstance(model, DistributedDataParallel) else None
        if self._model is not None:
            self._before = self._model.require_backward_grad_sync, self._model.require_forward_param_sync
            self._model.require_backward_grad_sync = self._model.require_forward_param_sync = False

    def remove(self) -> None:
        if self._model is not None:
            self._model.require_backward_grad_sync, self._model.require_forward_param_sync = self._before
            self._model = None
