"""What becomes of a torch function that is called with private parameters: the rule of each function."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from adamix_kernels.nn.errors import PrivacyError
from adamix_kernels.nn.factors import PerSample
from adamix_kernels.nn.parameter import PRIVATE, Private, bases, derive, names, storage, tensors
from adamix_kernels.nn.tap import Build, rows, tap
from adamix_kernels.spec import device_type

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


def name_of(function: Callable[..., Any]) -> str:
    return f"{getattr(function, '__name__', str(function))}()"


def trains(x: Any) -> bool:
    return isinstance(x, PRIVATE) and x.requires_grad


def plain(x: Any) -> Any:
    """Without its history if it is private."""
    return x.detach() if isinstance(x, PRIVATE) else x


class Rules:
    """The rules as one engine applies them."""

    def __init__(self, engine: DPEngine) -> None:
        self.engine = engine
        self.probing = False
        self.told: set[tuple[str, str]] = set()  # parameters and functions that surely have the batch in dimension 0
        self.doubtful: set[tuple[str, str]] = set()  # of this forward pass, perhaps not
        self._positions: set[str] = set()  # tables that are looked up by positions all samples share
        self._buffers: set[int] = set()
        self._buffers_of: int | None = None

    def use(self, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], found: list[Tensor]) -> Any:
        """A function's result; `found` are the tensors among its arguments."""
        if not any(trains(x) for x in found):
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
        rows = [x for x in found if self.is_batch(x) and (x.is_floating_point() or x.is_complex())]
        if any(x.requires_grad or self._is_input(x) for x in rows):
            return by_vmap(self, func, args, kwargs)
        if rows:
            try:
                return by_vmap(self, func, args, kwargs)
            except PrivacyError:  # no samples, but as large by chance; if they are, an ordinary gradient will tell
                if self.engine._passes.recorded:
                    raise
        self.check_no_samples(found, name_of(func))
        return self.derive(func(*args, **kwargs), found)

    @property
    def batch_size(self) -> int | None:
        return self.engine._forwards.batch_size

    def derive(self, out: Any, *parents: Any, pull: Any = None) -> Any:
        return derive(out, self.engine, [x for x in tensors(*parents) if isinstance(x, Private)], pull)

    def is_batch(self, x: Any) -> bool:
        """Whether a tensor may hold a row for each sample."""
        return (
            isinstance(x, Tensor)
            and not isinstance(x, Private)
            and x.dim() > 0
            and (x.requires_grad or (self.batch_size in (None, x.shape[0]) and not self._is_buffer(x)))
        )

    def _is_buffer(self, x: Tensor) -> bool:
        """Whether a tensor is the model's own: no samples, even if it is as large as a batch."""
        if self._buffers_of != self.engine._forwards.count:
            self._buffers_of = self.engine._forwards.count
            self._buffers = {storage(b) for b in self.engine.model.buffers() if b.numel()}
        return storage(x) in self._buffers

    def is_constant(self, x: Any) -> bool:
        """Whether a tensor is a buffer of the model: what parameters make of it is no sample's."""
        return isinstance(x, Tensor) and not isinstance(x, Private) and not x.requires_grad and self._is_buffer(x)

    def _is_input(self, x: Tensor) -> bool:
        return storage(x) in self.engine._forwards.input_storages

    def check_no_samples(self, found: Sequence[Tensor], what: str) -> None:
        """What is derived of parameters may not hold samples: their rows could not be told apart any more."""
        for x in found:
            if isinstance(x, Private) or x.dim() == 0 or self.batch_size == 1:
                continue
            if self._is_input(x):
                raise PrivacyError(
                    f"{self.names(found)}: {what} joins it with an input {list(x.shape)} of the model, but not row by "
                    "row; look rows up by embedding(), or give the parameter a dimension of size 1 for the samples"
                )

    def shares_positions(self, indices: Tensor, weight: Any) -> bool:
        """Whether indices are the same for every sample: positions `[T]` or `[1, T]`, their differences `[T, T]`.

        If they are of samples after all, the rows derived here reach the loss as an ordinary gradient and are refused.
        """
        samples = self.batch_size
        if samples is None or indices.dim() == 0:
            return False
        if indices.shape[0] != samples:
            if samples > 1 and self._is_input(indices):
                return False
            self._positions.update(self._names_of([weight]))
            return True
        if samples < 2:
            return False
        if not self._names_of([weight]) - self._positions:
            return True  # as in batches of another size
        if indices.dim() == 1 and not self._is_input(indices):
            raise PrivacyError(
                f"{self.names([weight])}: embedding() gets {samples} indices, as many as the batch has samples, but "
                "they are not the model's input: they may be one per sample or positions that all samples share. Pass "
                "[B, 1] for the first or [1, T] for the second"
            )
        return False

    @staticmethod
    def _names_of(targets: Sequence[Any]) -> set[str]:
        return {base._dp_name for base in bases([x for x in targets if trains(x)])}

    def tell(self, x: Tensor, what: str, *targets: Any, with_history: bool = False) -> None:
        """Doubt a use whose input has another dimension of the batch's size, unless one of another size was seen.

        Sequences `[T, B, D]` would pass for `[B, T, D]` where T = B, and what the model computes of constants alone,
        such as distances `[T, S]`, for samples: `probe` then tells them apart.
        """
        if self.batch_size is None:
            raise PrivacyError(
                f"{self.names(targets)}: used while the size of the batch is not known; call the model itself, not one "
                "of its methods or parts, with tensors as arguments or in lists and dicts"
            )
        if self.batch_size > 1:
            # what is computed without gradients may be constant: no other use of the parameter may tell of this one
            outside = with_history or x.requires_grad or self._is_input(x) or not torch.is_grad_enabled()
            sure = self.probing or (outside and x.dim() > 1 and self.batch_size not in x.shape[1:])
            use = what if outside else f"{what} of what is computed"
            (self.told if sure else self.doubtful).update(
                (base._dp_name, use) for base in bases([x for x in targets if trains(x)])
            )

    def check_normalised(self, x: Tensor, shape: Sequence[int], what: str, *targets: Any) -> None:
        if x.dim() <= len(shape):
            raise PrivacyError(
                f"{self.names(targets)}: {what} normalises {list(x.shape)} over dimension 0, the samples"
            )
        self.check_batch(x, what, *targets)

    def check_batch(self, x: Tensor, what: str, *targets: Any, with_history: bool = False) -> None:
        if x.dim() < 2 or self.batch_size not in (None, x.shape[0]):
            found = (
                "the model's inputs were not seen" if self.batch_size is None else f"the batch has {self.batch_size}"
            )
            raise PrivacyError(
                f"{self.names(targets)}: {what} gets an input of shape {list(x.shape)}, but {found} samples. Dimension "
                "0 must be the batch wherever a trainable parameter is used; reshape before it, or freeze the parameter"
            )
        self.tell(x, what, *targets, with_history=with_history)

    def check_ids(self, indices: Tensor, weight: Any) -> None:
        if indices.dim() == 0 or self.batch_size not in (None, indices.shape[0]):
            self.check_batch(indices if indices.dim() else indices[None], "embedding()", weight)
        self.tell(indices, "embedding()", weight)

    @staticmethod
    def names(targets: Sequence[Any]) -> str:
        return names([x for x in targets if isinstance(x, Private)])

    @staticmethod
    def cast(x: Tensor) -> Tensor:
        """As autocast would: what is saved then is what is multiplied."""
        kind = device_type(x)
        cast = torch.is_autocast_enabled(kind) and x.is_floating_point() and x.dtype != torch.float64
        return x.to(torch.get_autocast_dtype(kind)) if cast else x

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
        raise PrivacyError(f"{rules.names(tensors(args, kwargs))}: {what}; {remedy}")

    return run
