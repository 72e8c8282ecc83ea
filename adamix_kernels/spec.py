"""The op contract: one `Op` per operation, made from its torch reference, is the single source of everything else.

An `Op` holds the argument checks, the float64 definition the tests compare with, the test cases, the cost model of
the microbenchmarks and the row of the README's op table. Backends attach with `Op.register`; calling the op checks the
arguments and dispatches. The reference itself is the backend named "torch" and runs everywhere.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Generic, ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")

#: Automatic dispatch tries backends in this order; the first that can run the call, and is worth it, wins.
AUTO_ORDER = ("cuda", "triton", "cpp", "torch")
FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INT_DTYPES = (torch.int64, torch.int32)

_LISTS = (list, tuple)  # to ask a tuple of types is faster than a union, and every call asks

OPS: dict[str, Op[..., Any]] = {}
_forced: ContextVar[str | Stand] = ContextVar("adamix_kernels_backend", default="auto")


class BackendError(RuntimeError):
    """The backend that was asked for by name cannot run this call; the message says why."""


@dataclass(frozen=True)
class Case:
    """One generated test: `build(generator)` gives the op's keyword arguments with float64 CPU tensors.

    The tests cast the floating tensors to each dtype, and lay them out with gaps when `strided`.
    """

    name: str
    build: Callable[[torch.Generator], dict[str, Any]]
    strided: bool = False


@dataclass(frozen=True)
class Out:
    """One result of an op and how near it must be to the float64 definition.

    `rtol` is relative to the element, or with `of_max` to the largest element (sums, where terms cancel).
    `never_below` marks what bounds a sensitivity: it may be above the truth by `rtol`, below it never. `floored`: it is
    at least float32's smallest normal number.
    """

    name: str
    axes: str
    rtol: float
    of_max: bool = False
    never_below: bool = False
    floored: bool = False


@dataclass(frozen=True)
class Cost:
    """Least memory traffic (bytes) and arithmetic (floating point operations) of one call."""

    bytes: int
    flops: int


@dataclass(frozen=True)
class Backend:
    """An implementation of one op for some floating dtypes. The last two callables return the reason against it."""

    name: str
    device: str
    dtypes: Sequence[torch.dtype]
    computes_in: Sequence[str] | None
    run: Callable[..., Any]
    unavailable: Callable[[], str | None]
    refuses: Callable[..., str | None]

    def why_not(self, bound: Mapping[str, Any], named: Iterable[str]) -> str | None:
        """Its reason against one call, whose tensor arguments are `named`."""
        if self.dtypes is not FLOAT_DTYPES:
            for name in named if self.computes_in is None else self.computes_in:
                value = bound[name]
                for tensor in value if isinstance(value, _LISTS) else (value,):
                    if isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.dtype not in self.dtypes:
                        return f"{name} has dtype {tensor.dtype}, which it does not compute in"
        return self.refuses(**bound)


@dataclass(eq=False)
class Op(Generic[P, R]):
    """A callable operation; see `define_op` for the fields. A reference may call other ops: they dispatch in turn."""

    name: str
    reference: Callable[P, R]
    shapes: Mapping[str, str]
    returns: tuple[Out, ...]
    oracle: Callable[..., Any]
    cases: Callable[[], Sequence[Case]]
    cost: Callable[..., Cost]
    validate: Callable[..., None] | None
    parts: Sequence[Op[..., Any]] = ()
    backends: dict[str, Backend] = field(default_factory=dict)

    def __post_init__(self) -> None:
        functools.update_wrapper(self, self.reference)
        parameters = inspect.signature(self.reference).parameters.values()
        self._names = tuple(p.name for p in parameters)
        self._defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
        self._axes = {name: _Axes.parse(text) for name, text in self.shapes.items()}
        OPS[self.name] = self

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        bound = {**self._defaults, **dict(zip(self._names, args, strict=False)), **kwargs}
        if len(bound) != len(self._names) or len(args) + len(kwargs) > len(self._names):
            inspect.signature(self.reference).bind(*args, **kwargs)  # raises Python's own message
        return self._run(bound, self.check(bound))

    def check(self, bound: Mapping[str, Any]) -> torch.device | None:
        """The tensors' device. Raise TypeError or ValueError naming the argument, what was given and expected."""
        sizes: dict[str, tuple[Any, str]] = {}
        device, source = None, ""
        for name, axes in self._axes.items():
            value = bound[name]
            if value is None and self._defaults.get(name, ...) is None:
                continue
            parts = ((name, value),) if isinstance(value, Tensor) else axes.tensors(self.name, name, value)
            for label, tensor in parts:
                axes.check(self.name, label, tensor, sizes)
                if device is None:
                    device, source = tensor.device, label
                elif tensor.device != device:
                    raise ValueError(
                        f"{self.name}: {label} is on {tensor.device} but {source} is on {device}; "
                        "move both to one device"
                    )
        if self.validate is not None:
            try:
                self.validate(**bound)
            except (TypeError, ValueError) as error:
                raise type(error)(f"{self.name}: {error}") from None
        return device

    def dtypes(self, backend: str) -> Sequence[torch.dtype]:
        """The floating types that a backend of this op takes."""
        if backend == "torch":
            return FLOAT_DTYPES
        if self._by_parts(backend):
            return [dtype for dtype in FLOAT_DTYPES if all(dtype in part.dtypes(backend) for part in self.parts)]
        return self.backends[backend].dtypes

    def register(
        self,
        name: str,
        *,
        device: str,
        dtypes: Sequence[torch.dtype] = FLOAT_DTYPES,
        computes_in: Sequence[str] | None = None,
        unavailable: Callable[[], str | None] = lambda: None,
        refuses: Callable[..., str | None] = lambda **_: None,
    ) -> Callable[[Callable[P, R]], Callable[P, R]]:
        """Attach an implementation for tensors on a type of device, of certain `dtypes` where they are floating.

        With `computes_in` only these arguments must be of them, the others may be of any floating type.
        `unavailable()` asks about the machine, `refuses(**arguments)` about one call.
        """
        if name not in AUTO_ORDER:
            raise ValueError(f"name: {name!r} is not a backend; expected one of {AUTO_ORDER}")

        def attach(run: Callable[P, R]) -> Callable[P, R]:
            self.backends[name] = Backend(name, device, dtypes, computes_in, run, unavailable, refuses)
            return run

        return attach

    def _run(self, bound: dict[str, Any], device: torch.device | None) -> R:
        forced = _forced.get()
        if forced != "auto":
            return self._run_on(forced, bound)
        for name in AUTO_ORDER:
            entry = self.backends.get(name)
            if entry is None or device is None or entry.device != device.type:
                continue  # without a word to a driver: a process that uses the CPU alone may yet fork
            if entry.unavailable() is None and entry.why_not(bound, self._axes) is None:
                return entry.run(**bound)
        return self._refer(bound)

    def _run_on(self, forced: str | Stand, bound: dict[str, Any]) -> R:
        if isinstance(forced, Stand):
            return forced.run(self, bound)
        if forced == "torch" or self._by_parts(forced):
            return self._refer(bound)
        reason = self.why_not(forced, bound)
        if reason is not None:
            raise BackendError(f"{self.name}: backend {forced!r} was asked for but {reason}")
        return self.backends[forced].run(**bound)

    def _by_parts(self, backend: str) -> bool:
        """Whether a backend, if not "auto", runs the ops that this one is made of."""
        return bool(self.parts) and backend != "auto" and backend not in self.backends

    def _refer(self, bound: dict[str, Any]) -> R:
        """Results have no history on any backend; but a leaf that requires grad is not to be written in place."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.name.endswith("_")):
            return self.reference(**bound)  # type: ignore[call-arg]

    def why_not(self, backend: str, bound: Mapping[str, Any] | None = None) -> str | None:
        """Why `backend` cannot run this op (or, with `bound`, this call); None if it can."""
        if backend == "torch":
            return None
        if self._by_parts(backend):
            return next((reason for part in self.parts if (reason := part.why_not(backend))), None)
        if backend not in self.backends:
            return f"this op has no {backend!r} implementation"
        entry = self.backends[backend]
        return entry.unavailable() or (entry.why_not(bound, self._axes) if bound is not None else None)


def define_op(
    *,
    shapes: Mapping[str, str],
    returns: Sequence[Out],
    oracle: Callable[..., Any],
    cases: Callable[[], Sequence[Case]],
    cost: Callable[..., Cost],
    validate: Callable[..., None] | None = None,
    parts: Sequence[Op[..., Any]] = (),
) -> Callable[[Callable[P, R]], Op[P, R]]:
    """Make an `Op` of the decorated torch reference.

    `shapes` maps each tensor argument to its axes: names separated by blanks, equal names mean equal sizes; `*` any
    number of axes, the same in every argument; `...` any number, unrelated; a prefix `int:` asks for integers; a
    suffix `[]` also takes a list of such tensors. `validate` raises on anything else that is wrong, in words that start
    with the argument's name. `oracle` is the definition, in float64, one sample at a time. A reference that only calls
    other ops names them as `parts`: on a backend that it does not have itself they run on theirs.
    """

    def wrap(reference: Callable[P, R]) -> Op[P, R]:
        return Op(reference.__name__, reference, shapes, tuple(returns), oracle, cases, cost, validate, parts)

    return wrap


def op_table() -> str:
    """The ops as a Markdown table, for the README."""
    lines = ["| op | what | arguments | results | backends besides torch |", "|---|---|---|---|---|"]
    for op in OPS.values():
        arguments = ", ".join(f"`{name} {axes.text}`" for name, axes in op._axes.items())
        results = ", ".join(f"`{out.name} [{', '.join(out.axes.split())}]`" for out in op.returns)
        what = (op.__doc__ or "").splitlines()[0].rstrip(".")
        faster = ", ".join(
            name
            for name in AUTO_ORDER
            if name in op.backends or (op.parts and all(name in part.backends for part in op.parts))
        )
        lines.append(f"| `{op.name}` | {what} | {arguments} | {results} | {faster or '-'} |")
    return "\n".join(lines)


@dataclass(frozen=True)
class Stand:
    """What stands in for every op, on meta tensors: `run(op, arguments)`, for a `device` that is planned for."""

    run: Callable[[Op[..., Any], dict[str, Any]], Any]
    device: str


@contextmanager
def stand_in(run: Callable[[Op[..., Any], dict[str, Any]], Any], device: str) -> Iterator[None]:
    """Every op inside the block is given to `run` instead of a backend: what it would take on `device`, without data.

    Meta tensors count as tensors on a device of that type, where a rule goes by it (`device_type`).
    """
    token = _forced.set(Stand(run, device))
    try:
        yield
    finally:
        _forced.reset(token)


def device_type(tensor: Tensor) -> str:
    """The type of a tensor's device; of a meta tensor the one that is planned for (`stand_in`)."""
    stand = _forced.get() if tensor.is_meta else None
    return stand.device if isinstance(stand, Stand) else tensor.device.type


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every op inside the block on backend `name` ("torch", "cpp", "triton", "cuda"), or "auto".

    An op that cannot run there raises `BackendError` instead of falling back.
    """
    if name not in ("auto", *AUTO_ORDER):
        raise ValueError(f"name: {name!r} is not a backend; expected 'auto' or one of {AUTO_ORDER}")
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)


def backends() -> dict[str, dict[str, str]]:
    """For each op, each backend: "runs", or the reason why it does not run on this machine."""
    return {op.name: {b: op.why_not(b) or "runs" for b in AUTO_ORDER} for op in OPS.values()}


@dataclass(frozen=True)
class _Axes:
    """The parsed shape of one tensor argument."""

    text: str
    head: tuple[str, ...]
    wild: str | None
    tail: tuple[str, ...]
    fixed: int
    dtypes: Sequence[torch.dtype]
    many: bool

    @classmethod
    def parse(cls, text: str) -> _Axes:
        body = text.removeprefix("int:").removesuffix("[]")
        axes = body.split()
        wild = next((a for a in axes if a in ("*", "...")), None)
        cut = axes.index(wild) if wild else len(axes)
        return cls(
            f"[{', '.join(axes)}]",
            tuple(axes[:cut]),
            wild,
            tuple(axes[cut + 1 :]),
            len(axes) - (wild is not None),
            INT_DTYPES if text.startswith("int:") else FLOAT_DTYPES,
            text.endswith("[]"),
        )

    def tensors(self, op: str, name: str, value: Any) -> list[tuple[str, Tensor]]:
        """Those of a list, each with its name."""
        items = [(name, value)]
        if self.many and isinstance(value, _LISTS):
            if not value:
                raise ValueError(f"{op}: {name} is an empty list; pass at least one tensor of shape {self.text}")
            items = [(f"{name}[{i}]", v) for i, v in enumerate(value)]
        for label, item in items:
            if not isinstance(item, Tensor):
                wanted = f"a tensor {self.text}" + (" or a list of them" if self.many else "")
                raise TypeError(f"{op}: {label} is {type(item).__name__}; expected {wanted}")
        return items

    def check(self, op: str, label: str, tensor: Tensor, sizes: dict[str, tuple[Any, str]]) -> None:
        if tensor.dtype not in self.dtypes:
            names = ", ".join(str(k).removeprefix("torch.") for k in self.dtypes)
            raise TypeError(f"{op}: {label} has dtype {tensor.dtype}; expected one of {names}")
        if tensor.layout is not torch.strided or tensor.is_nested:
            kind = "is nested" if tensor.is_nested else f"has layout {tensor.layout}"
            raise TypeError(f"{op}: {label} {kind}; pass a dense tensor {self.text}")
        shape = tensor.shape
        count, wild = len(shape), self.wild
        if count != self.fixed and (wild is None or count < self.fixed):
            raise ValueError(f"{op}: {label} has shape {list(shape)}; expected {self.text}")
        named: tuple[str, ...] = self.head
        values: tuple[Any, ...] = shape
        if wild is not None:
            first, stop = len(self.head), count - len(self.tail)
            named, values = named + self.tail, shape[:first] + shape[stop:]
            if wild == "*" and not self.many:
                named, values = (*named, "*"), (*values, shape[first:stop])
        for axis, size in zip(named, values, strict=True):
            known = sizes.setdefault(axis, (size, label))
            if known[0] != size:
                show = list(known[0]) if axis == "*" else known[0]
                raise ValueError(
                    f"{op}: {label} has shape {list(shape)}; expected {self.text} with {axis}={show} as in {known[1]}"
                )
