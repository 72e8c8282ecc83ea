"""What a compiled model tells the engine: two opaque ops that run when the compiled code runs.

The engine's own bookkeeping cannot be traced. `enter` begins a forward pass, `record` hands the engine the activations
and backprops of a use in the compiled backward pass. They are tied together by data: `enter` gives a token, every
`record` depends on it, and what `record` returns is the token's gradient. So none can be dropped as dead code, or run
before its turn. A use is checked in the backward pass, before anything of it is summed.
"""

from __future__ import annotations

import itertools
import json
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, library

from adamix_kernels.nn.errors import PrivacyError
from adamix_kernels.nn.factors import PerSample
from adamix_kernels.nn.parameter import PrivateParameter, names
from adamix_kernels.nn.rules_layers import affine_factors, conv_factors, embedding_factors, linear_factors
from adamix_kernels.nn.tap import Build, executes

if TYPE_CHECKING:
    from adamix_kernels.nn.engine import DPEngine

#: A token is float64, so that it can have a gradient: [engine, forward pass, samples or -1].
TOKEN = 3

_WARM_UP = "Run the model once uncompiled before: with torch.compiler.set_stance('force_eager'): model(x)"

#: Of this process, by the number in a token.
_ENGINES: weakref.WeakValueDictionary[int, DPEngine] = weakref.WeakValueDictionary()
_numbers = itertools.count(1)


def _donates_buffers() -> bool:
    from torch._functorch import config

    return bool(config.donated_buffer)


def announce(engine: DPEngine) -> tuple[int, Tensor]:
    """A number for an engine, and a leaf `[3]` that begins with it: the gradients of all tokens come here."""
    number = next(_numbers)
    _ENGINES[number] = engine
    return number, torch.tensor([number, 0.0, 0.0], dtype=torch.float64, requires_grad=True)


# no CUDA graph may hold one: its replay would run the kernels without the engine
_TAGS = (torch.Tag.cudagraph_unsafe,)
_LIBRARY = library.Library("adamix_kernels", "DEF")


def _define(schema: str, fake: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def attach(run: Callable[..., Any]) -> Callable[..., Any]:
        name = schema.partition("(")[0]
        _LIBRARY.define(schema, tags=_TAGS)
        _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
        library.register_fake(f"adamix_kernels::{name}", fake, lib=_LIBRARY)
        return run

    return attach


@_define(
    "enter(Tensor sink, Tensor[] inputs, Tensor? labels) -> Tensor",
    lambda sink, inputs, labels: sink.new_empty(TOKEN),
)
def _enter(sink: Tensor, inputs: Sequence[Tensor], labels: Tensor | None) -> Tensor:
    engine = _ENGINES[int(sink[0])]
    engine._forwards.begin(inputs, {} if labels is None else {"labels": labels})
    return numbers_of(engine)


def numbers_of(engine: DPEngine) -> Tensor:
    """A token of the forward pass that has begun, without its history."""
    forwards = engine._forwards
    samples = -1 if forwards.batch_size is None else forwards.batch_size
    return torch.tensor([engine._number, forwards.count, samples], dtype=torch.float64)


def token(engine: DPEngine) -> Tensor:
    """That of a forward pass which is not compiled, for parts of it that are."""
    return engine._sink + (numbers_of(engine) - engine._sink.detach())


@_define(
    "record(Tensor x, Tensor backprops, Tensor token, Tensor[] indices, str spec) -> Tensor",
    lambda x, backprops, token, indices, spec: token.new_empty(TOKEN),
)
def _record(x: Tensor, backprops: Tensor, token: Tensor, indices: Sequence[Tensor], spec: str) -> Tensor:
    number, forward, samples = (int(value) for value in token.tolist())
    engine = _ENGINES.get(number)
    if engine is None or not engine._attached.owned:
        raise PrivacyError("backward() goes through a compiled model whose DPEngine was detached; run forward() again")
    targets = [engine._attached.owned[int(index[1])][1] for index in indices]
    nothing = torch.zeros(TOKEN, dtype=torch.float64)
    if not executes(torch.autograd.graph.get_gradient_edge(engine._sink).node, targets):
        return nothing  # torch.autograd.grad() of the inputs alone
    if forward <= engine._passes.stale:
        raise PrivacyError(
            f"{names(targets)}: a step was taken between the forward pass of the compiled model and its backward(); "
            "call backward() before step()"
        )
    if engine.strategy == "two_pass" and _donates_buffers():
        raise PrivacyError(
            "strategy 'two_pass' goes through a compiled backward pass twice, which torch compiles for one unless "
            "torch._functorch.config.donated_buffer = False stands before the first forward pass"
        )
    settings = json.loads(spec)
    with torch.no_grad(), _forward_of(engine, forward, None if samples < 0 else samples):
        _check(engine, x, settings, targets)
        wanted = [p.requires_grad for p in targets]
        if any(wanted):
            reached = [p for p, want in zip(targets, wanted, strict=True) if want]
            build = _BUILD[settings["kind"]](settings)
            use = Arrived(engine, forward, targets)
            engine._passes.receive(use, reached, lambda: build([x], backprops, wanted), lent=[x, backprops])
    return nothing


@contextmanager
def _forward_of(engine: DPEngine, forward: int, samples: int | None) -> Iterator[None]:
    """Rules see the batch of a forward pass, which need not be the last one."""
    forwards = engine._forwards
    kept = forwards.batch_size, forwards.input_storages
    forwards.batch_size = samples
    if forward != forwards.count:
        forwards.input_storages = set()  # not known any more: what was an input is in doubt
    try:
        yield
    finally:
        forwards.batch_size, forwards.input_storages = kept


class Arrived:
    """A `tap.Use` of compiled code, whose gradient has come."""

    def __init__(self, engine: DPEngine, forward: int, targets: Sequence[PrivateParameter]) -> None:
        self.engine, self.forward, self.task = engine, forward, -1
        self.layers = {engine.layers[p._dp_name] for p in targets}
        self.spent_in: int | None = None


def _check(engine: DPEngine, x: Tensor, settings: Mapping[str, Any], targets: Sequence[PrivateParameter]) -> None:
    """What the ordinary rules check of an input; but what leaves them in doubt is refused, as nothing can be probed."""
    rules = engine._rules
    if settings["kind"] == "embedding":
        if rules.shares_positions(x, targets[0]):
            raise PrivacyError(
                f"{names(targets)}: embedding() gets indices {list(x.shape)} that all samples share, which compiled "
                f"code cannot take to them; {_WARM_UP}, and it stays uncompiled"
            )
        rules.check_ids(x, *targets)
    else:
        rules.check_batch(x, settings["what"], *targets, with_history=settings["with_history"])
    check_doubts(engine)


def check_doubts(engine: DPEngine) -> None:
    rules, size = engine._rules, engine._forwards.batch_size
    doubtful, rules.doubtful = rules.doubtful - rules.told, set()
    if doubtful and not rules.probing:
        found = ", ".join(repr(name) for name in sorted({name for name, _ in doubtful}))
        raise PrivacyError(
            f"{found}: the batch has {size} samples and the input another dimension of that size, or no gradient; a "
            f"compiled model cannot be asked which is the batch. {_WARM_UP}"
        )


def _linear(s: Mapping[str, Any]) -> Build:
    return linear_factors(False, *s["trained"])


def _conv(s: Mapping[str, Any]) -> Build:
    return conv_factors({key: _tupled(value) for key, value in s["shape"].items()}, *s["trained"])


def _embedding(s: Mapping[str, Any]) -> Build:
    return embedding_factors(s["entries"], s["padding_idx"])


def _affine(s: Mapping[str, Any]) -> Build:
    shape, eps = tuple(s["shape"]), s["eps"]

    def normalise(x: Tensor) -> Tensor:
        if s["groups"] is not None:
            return F.group_norm(x, s["groups"], eps=eps)
        return F.rms_norm(x, shape, eps=eps) if s["rms"] else F.layer_norm(x, shape, eps=eps)

    weight, bias = s["trained"]
    return affine_factors(shape, weight, bias, None if s["groups"] is not None else len(shape), normalise)


def _rows(s: Mapping[str, Any]) -> Build:
    return lambda saved, g, wanted: PerSample([g.reshape(len(g), *s["shape"])])


def _tupled(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


#: The factors that the ordinary rules of the same functions build, from the constants of a use.
_BUILD: dict[str, Callable[[Mapping[str, Any]], Build]] = {
    "linear": _linear,
    "conv": _conv,
    "embedding": _embedding,
    "affine": _affine,
    "rows": _rows,
}
