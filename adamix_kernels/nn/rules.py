"""What becomes of a torch function that is called with private parameters: the rule of each function."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from adamix_kernels.nn.errors import PrivacyError
from adamix_kernels.nn.factors import PerSample
from adamix_kernels.nn.parameter import Private, derive, names, tensors
from adamix_kernels.nn.tap import Build, rows, tap

if TYPE_CHECKING:
    from adamix_kernels.nn.engine import DPEngine

Rule = Callable[..., Any]
#: By torch function. A rule takes the `Rules` and the function's own arguments.
RULES: dict[Callable[..., Any], Rule] = {}


def rule(*functions: Callable[..., Any]) -> Callable[[Rule], Rule]:
    """Attach a rule to torch functions."""

    def attach(run: Rule) -> Rule:
        RULES.update(dict.fromkeys(functions, run))
        return run

    return attach


def trains(x: Any) -> bool:
    return isinstance(x, Private) and x.requires_grad


def plain(x: Any) -> Any:
    """Without its history if it is private."""
    return x.detach() if isinstance(x, Private) else x


class Rules:
    """The rules as one engine applies them."""

    def __init__(self, engine: DPEngine) -> None:
        self.engine = engine

    def use(self, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        found = list(tensors(args, kwargs))
        private = [x for x in found if trains(x)]
        if not private:
            return func(*args, **kwargs)
        if func in RULES:
            return RULES[func](self, *args, **kwargs)
        return self._other(func, args, kwargs, found)

    def _other(
        self, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], found: list[Tensor]
    ) -> Any:
        """A function without a rule: of parameters alone, or of each sample by itself."""
        from adamix_kernels.nn.rules_generic import TEMPLATES, by_vmap

        if func in TEMPLATES and not isinstance(args[0], Private):
            return func(*args, **kwargs)  # a parameter only tells a type or a shape
        if any(self.is_batch(x) and x.is_floating_point() for x in found):
            return by_vmap(self, func, args, kwargs)
        return self.derive(func(*args, **kwargs), found)

    @property
    def batch_size(self) -> int | None:
        return self.engine.batch_size

    def derive(self, out: Any, *parents: Any, pull: Any = None) -> Any:
        return derive(out, self.engine, [x for x in tensors(*parents) if isinstance(x, Private)], pull)

    def is_batch(self, x: Any) -> bool:
        """Whether a tensor may hold a row for each sample."""
        return (
            isinstance(x, Tensor)
            and not isinstance(x, Private)
            and x.dim() > 0
            and (x.requires_grad or self.batch_size in (None, x.shape[0]))
        )

    def shares_positions(self, indices: Tensor, weight: Any) -> bool:
        """Whether indices are the same for every sample: positions `[T]` or `[1, T]`."""
        samples = self.batch_size
        if samples is None or indices.dim() == 0:
            return False
        if indices.shape[0] != samples:
            return indices.dim() == 1 or indices.shape[0] == 1
        if indices.dim() == 1 and indices.untyped_storage().data_ptr() not in self.engine.input_storages:
            raise PrivacyError(
                f"{self.names([weight])}: embedding() gets {samples} indices, as many as the batch has samples, but "
                "they are not the model's input: they may be one per sample or positions that all samples share. Pass "
                "[B, 1] for the first or [1, T] for the second"
            )
        return False

    def check_batch(self, x: Tensor, what: str, *targets: Any) -> None:
        if x.dim() < 2 or self.batch_size not in (None, x.shape[0]):
            found = (
                "the model's inputs were not seen" if self.batch_size is None else f"the batch has {self.batch_size}"
            )
            raise PrivacyError(
                f"{self.names(targets)}: {what} gets an input of shape {list(x.shape)}, but {found} samples. Dimension "
                "0 must be the batch wherever a trainable parameter is used; reshape before it, or freeze the parameter"
            )

    @staticmethod
    def names(targets: Sequence[Any]) -> str:
        return names([x for x in targets if isinstance(x, Private)])

    @staticmethod
    def cast(x: Tensor) -> Tensor:
        """As autocast would: what is saved then is what is multiplied."""
        kind = x.device.type
        return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) and x.is_floating_point() else x

    def tap(self, out: Tensor, build: Build, saved: Sequence[Tensor], *targets: Any) -> Tensor:
        return tap(self.engine, out, build, saved, [x for x in targets if trains(x)])

    def rows(self, target: Any, dims: int, samples: int) -> Tensor:
        """A target as a tensor of `dims` dimensions, of which the first are the samples."""
        if target.dim() == dims:
            target = target if target.stride(0) or target.shape[0] == 1 else self.derive(target[:1], target)
            shape = [samples, *target.shape[1:]]
        else:
            shape = [samples, *[1] * (dims - 1 - target.dim()), *target.shape]
        own = target.shape

        def build(saved: Sequence[Tensor], g: Tensor, wanted: Sequence[bool]) -> PerSample:
            return PerSample([g.reshape(samples, *own)])

        return rows(self.engine, target, shape, build)


def refuse(what: str, remedy: str) -> Rule:
    def run(rules: Rules, *args: Any, **kwargs: Any) -> Any:
        raise PrivacyError(f"{rules.names(list(tensors(args, kwargs)))}: {what}; {remedy}")

    return run
