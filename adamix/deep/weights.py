"""The trained weights and their optimizer; and what else of a model a forward pass may change."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from adamix.deep.sharding import local, placed_as, rest
from adamix.errors import InputError
from adamix.models import ParameterVector

MakeOptimizer = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


class Training(ParameterVector):
    """Trained parameters by name, and the optimizer that steps them. Of a sharded model the vector is this rank's part,
    `[p]` of `size` numbers."""

    def __init__(self, model: nn.Module, make: MakeOptimizer) -> None:
        rest(model)
        self.named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        super().__init__(list(self.named.values()))
        try:
            self.optimizer = make(self._parameters)
        except TypeError as error:
            raise InputError(
                f"optimizer: cannot be made of the parameters ({error}); pass a function of them"
            ) from error
        if isinstance(self.optimizer, torch.optim.LBFGS):
            raise InputError("optimizer: LBFGS evaluates the loss within a step, which has no noise; pass another one")
        if not isinstance(self.optimizer, torch.optim.Optimizer):
            raise InputError(
                f"optimizer: gives {type(self.optimizer).__name__}; pass 'adamw', 'sgd', or a function of the "
                "parameters that returns a torch.optim.Optimizer"
            )

    def _own(self) -> Sequence[Tensor]:
        return [local(p) for p in self._parameters]

    def weights(self) -> Tensor:
        """A copy, `[P]` float32, on the host: a device may have no room for it."""
        with torch._C.DisableTorchFunctionSubclass():
            return torch.cat([p.detach().cpu().flatten().float() for p in self._own()])

    def tensors_of(self, vector: Tensor) -> dict[str, Tensor]:
        """By parameter what of a vector is its own, as it is placed and of its type."""
        parts = vector.split([local(p).numel() for p in self._parameters])
        return {
            name: placed_as(p, part.view(local(p).shape).to(p.dtype))
            for (name, p), part in zip(self.named.items(), parts, strict=True)
        }

    @property
    def rate(self) -> float:
        """The learning rate, of the first of its groups."""
        return float(self.optimizer.param_groups[0]["lr"])

    def pull(self, anchor: Tensor, strength: float) -> None:
        """w <- (w + s anchor) / (1 + s): the pull of `private_phase.pulled_step`, stable for every strength s."""
        if not strength:
            return
        start = 0
        with torch.no_grad(), torch._C.DisableTorchFunctionSubclass():
            for p in self._own():
                p.lerp_(anchor[start : start + p.numel()].view_as(p).to(p.dtype), strength / (1 + strength))
                start += p.numel()

    def optimizer_state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Its tensors, as "parameter number.name", and the rest as JSON.

        Raises:
            InputError: it holds something else.
        """
        state = self.optimizer.state_dict()
        tensors: dict[str, Tensor] = {}
        rest: dict[str, Any] = {"state": {}, "param_groups": state["param_groups"]}
        for number, values in state["state"].items():
            for name, value in values.items():
                if isinstance(value, Tensor):
                    tensors[f"{number}.{name}"] = value
                else:
                    rest["state"].setdefault(str(number), {})[name] = value
        if odd := _odd(rest):
            raise InputError(
                f"optimizer: its state holds {odd}, which a checkpoint cannot; pass 'adamw' or 'sgd', or no checkpoint"
            )
        return tensors, rest

    def load_optimizer_state(self, tensors: Mapping[str, Tensor], rest: Mapping[str, Any]) -> None:
        """Take over what `optimizer_state` gave."""
        state: dict[int, dict[str, Any]] = {int(number): dict(values) for number, values in rest["state"].items()}
        for name, tensor in tensors.items():
            number, _, key = name.partition(".")
            state.setdefault(int(number), {})[key] = tensor
        groups = [dict(group) for group in rest["param_groups"]]
        for group, own in zip(groups, self.optimizer.param_groups, strict=True):
            # Tuples (AdamW's betas) are lists in JSON.
            group.update({key: tuple(x) for key, x in group.items() if isinstance(own.get(key), tuple)})
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})


def _odd(value: Any) -> str:
    if isinstance(value, Mapping):
        return next((found for x in value.values() if (found := _odd(x))), "")
    if isinstance(value, list | tuple):
        return next((found for x in value if (found := _odd(x))), "")
    return "" if value is None or isinstance(value, bool | int | float | str) else f"a {type(value).__name__}"


def maker(name: str | MakeOptimizer, rate: float) -> MakeOptimizer:
    """Of an optimizer by name.

    Raises:
        InputError: there is none of the name.
    """
    if callable(name):
        return name
    if name == "adamw":
        return lambda parameters: torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    if name == "sgd":
        return lambda parameters: torch.optim.SGD(parameters, lr=rate, momentum=0.9)
    raise InputError(f"optimizer: {name!r} is not valid here; pass 'adamw', 'sgd', or a function of the parameters")


@dataclass(frozen=True)
class Traces:
    """Tensors of a model that are no parameters: which they are, and how often they were written."""

    tensors: dict[str, tuple[Tensor, int]]

    def changed(self, now: Traces) -> str:
        """The name of one that is new or was written since, or nothing."""
        for name, (tensor, version) in now.tensors.items():
            before = self.tensors.get(name)
            if before is None or before[0] is not tensor or before[1] != version:
                return f"{name!r}"
        return ""


def traces_of(model: nn.Module) -> Traces:
    """Buffers, and tensors that are plain attributes of a module. What is kept elsewhere is not seen."""
    found = {}
    for prefix, module in model.named_modules():
        for name, value in (*module._buffers.items(), *vars(module).items()):
            if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
                found[f"{prefix}.{name}".lstrip(".")] = (value, value._version)
    return Traces(found)
