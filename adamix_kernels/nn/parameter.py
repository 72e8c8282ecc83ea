"""Parameters whose every use is seen: any torch function that meets one asks the engine for its rule.

The engine changes the class of a model's parameters in place, as `UninitializedParameter` does when it materialises:
the objects, which optimizers and modules hold, stay the same, and so do modules, their forward and the state_dict.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._C._dynamo import eval_frame

if TYPE_CHECKING:
    from adamix_kernels.nn.engine import DPEngine
    from adamix_kernels.nn.factors import Factors

#: Takes gradients `[B, *shape]` with respect to a derived tensor to parameters and their factors.
Pull = Callable[[Tensor], "tuple[tuple[PrivateParameter, ...], Factors]"]


class PrivateParameter(nn.Parameter):
    """A parameter of a model that an engine is attached to."""

    _dp_engine: DPEngine
    _dp_name: str
    _dp_index: Tensor  # [2] int64: the engine's number, and the parameter's in it
    _dp_guarded: bool = False

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return _dispatch(func, args, kwargs or {})

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Parameter:
        """A copy belongs to no engine."""
        with torch._C.DisableTorchFunctionSubclass():
            copy = nn.Parameter(self.detach().clone(memory_format=torch.preserve_format), self.requires_grad)
        memo[id(self)] = copy
        return copy

    def __reduce_ex__(self, protocol: Any) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            return nn.Parameter(self.detach(), self.requires_grad).__reduce_ex__(protocol)


class Derived(Tensor):
    """What is computed from parameters alone, no sample: a transposed or masked weight, rows of positions."""

    _dp_engine: DPEngine
    _dp_bases: tuple[PrivateParameter, ...]
    _dp_pull: Pull | None = None

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return _dispatch(func, args, kwargs or {})


Private = PrivateParameter | Derived
PRIVATE = (PrivateParameter, Derived)  # asking a tuple is faster than asking a union

_REQUIRES_GRAD, _GRAD = (getattr(Tensor, name) for name in ("requires_grad", "grad"))
_THAWS = {Tensor.requires_grad_, _REQUIRES_GRAD.__set__}
_SETS_GRAD = {_GRAD.__set__, _GRAD.__delete__}

_WATCHED = _THAWS | _SETS_GRAD

#: What tells of a tensor, or changes it, but computes nothing of its values.
_PLAIN = {
    *(
        getattr(Tensor, name).__get__
        for name in "is_cuda is_meta shape dtype device grad requires_grad data is_leaf layout ndim grad_fn".split()
    ),
    *(getattr(Tensor, name).__get__ for name in ("_version", "_base", "grad_dtype")),
    *(getattr(Tensor, name).__set__ for name in "data grad grad_dtype requires_grad".split()),  # not of a detached one
    Tensor.size,
    Tensor.dim,
    Tensor.numel,
    Tensor.stride,
    Tensor.is_floating_point,
    Tensor.is_contiguous,
    Tensor.detach,
    *_THAWS,
    *_SETS_GRAD,
}


#: Engines whose model runs with one sample more, also without gradients: a part may be recomputed with them.
probing: set[int] = set()


def _dispatch(func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    if torch.compiler.is_compiling():
        from adamix_kernels.nn.compiled import dispatch

        return dispatch(func, args, kwargs, func in _PLAIN, func in _WATCHED)
    return by_rule(func, args, kwargs)


def untraced(function: Any) -> Any:
    """Dynamo leaves a function, and what it calls, alone where it meets them outside of what it traces."""
    skip = eval_frame._FrameExecStrategy(eval_frame._FrameAction.SKIP, eval_frame._FrameAction.SKIP)
    eval_frame.set_code_exec_strategy(function.__code__, skip)
    return function


@untraced
def by_rule(func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """A function's result where nothing is traced."""
    with torch._C.DisableTorchFunctionSubclass():
        if func not in _PLAIN and (torch.is_grad_enabled() or probing):
            found = tensors(args, kwargs)
            engine = next((x._dp_engine for x in found if isinstance(x, PRIVATE)), None)
            if engine is not None and not engine.is_public and (torch.is_grad_enabled() or engine._rules.probing):
                return engine._rules.use(func, args, kwargs, found)
        result = func(*args, **kwargs)
        if func in _THAWS and isinstance(args[0], PrivateParameter):
            args[0]._dp_engine._attached.watch()  # before any use of it
        elif func in _SETS_GRAD and isinstance(args[0], PrivateParameter):
            args[0]._dp_engine._attached.grad_set(args[0])
        return result


def tensors(*values: Any) -> list[Tensor]:
    """The tensors in nested arguments."""
    found: list[Tensor] = []
    _collect(values, found)
    return found


_LEAVES = {int, float, bool, str, type(None), torch.dtype, torch.device}  # most arguments; asked first, for speed


def _collect(values: Iterable[Any], found: list[Tensor]) -> None:
    for value in values:
        if type(value) in _LEAVES:
            continue
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):  # a union is slower, and every call asks
            _collect(value, found)
        elif isinstance(value, Mapping):
            _collect(value.values(), found)


def storage(x: Tensor) -> int:
    """What views of a tensor have in common; of one that has no storage, such as a sparse one, itself."""
    try:
        whole = x.untyped_storage()
        return whole._cdata if x.is_meta else whole.data_ptr()  # meta tensors have no memory
    except (NotImplementedError, RuntimeError):
        return id(x)


def bases(values: Sequence[Tensor]) -> tuple[PrivateParameter, ...]:
    """The parameters behind private tensors, each once."""
    found: dict[int, PrivateParameter] = {}
    for value in values:
        for base in value._dp_bases if isinstance(value, Derived) else (value,):
            if isinstance(base, PrivateParameter):
                found[id(base)] = base
    return tuple(found.values())


def derive(out: Any, engine: DPEngine, parents: Sequence[Tensor], pull: Pull | None = None) -> Any:
    """What a function made of private tensors alone, marked as such where it has a history."""
    if isinstance(out, list | tuple) and any(isinstance(x, Tensor) for x in out):
        marked = [derive(x, engine, parents) for x in out]
        return type(out)(marked) if type(out) in (list, tuple) else type(out)(*marked)
    if not isinstance(out, Tensor) or isinstance(out, Private) or not out.requires_grad:
        return out
    result = out.as_subclass(Derived)
    result._dp_engine, result._dp_bases, result._dp_pull = engine, bases(parents), pull
    return result


def names(values: Sequence[Tensor]) -> str:
    """Of the parameters behind private tensors, for messages."""
    return ", ".join(repr(base._dp_name) for base in bases(values))
