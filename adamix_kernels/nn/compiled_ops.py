"""What a compiled model tells the engine: three opaque ops that run when the compiled code runs.

The engine's own bookkeeping cannot be traced. `enter` begins a forward pass, `use` announces one use of parameters in
it, `record` hands the engine the activations and backprops of a use in the compiled backward pass. They are tied
together by data: `enter` gives a token, every use depends on it, and what `record` returns is the token's gradient. So
none can be dropped as dead code, or run before its turn.
"""

from __future__ import annotations

import functools
import itertools
import json
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from adamix_kernels.nn.errors import PrivacyError
from adamix_kernels.nn.factors import PerSample
from adamix_kernels.nn.parameter import PrivateParameter, names
from adamix_kernels.nn.rules_layers import affine_factors, conv_factors, embedding_factors, linear_factors
from adamix_kernels.nn.tap import Build, executes

if TYPE_CHECKING:
    from adamix_kernels.nn.engine import DPEngine

#: A token is float64, so that it can have a gradient: [engine, forward pass or 0, backward pass that recomputes or -1].
TOKEN = 3

_WARM_UP = "Run the model once uncompiled before: with torch.compiler.set_stance('force_eager'): model(x)"

#: Of this process, by the number in a token.
_ENGINES: weakref.WeakValueDictionary[int, DPEngine] = weakref.WeakValueDictionary()
_numbers = itertools.count(1)


def donates_buffers() -> bool:
    from torch._functorch import config

    return bool(config.donated_buffer)


def announce(engine: DPEngine) -> tuple[int, Tensor]:
    """A number for an engine, and a leaf `[3]` that holds it: whose gradient compiled code makes."""
    number = next(_numbers)
    _ENGINES[number] = engine
    return number, torch.tensor([number, 0.0, 0.0], dtype=torch.float64, requires_grad=True)


# nondeterministic: equal calls are two uses, and none is made again to save memory; no CUDA graph may hold one, since
# its replay would run the kernels without the engine
_TAGS = (torch.Tag.nondeterministic_seeded, torch.Tag.cudagraph_unsafe)
_LIBRARY = torch.library.Library("adamix_kernels", "DEF")


def _define(schema: str, fake: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def attach(run: Callable[..., Any]) -> Callable[..., Any]:
        name = schema.partition("(")[0]
        _LIBRARY.define(schema, tags=_TAGS)
        _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"adamix_kernels::{name}", fake, lib=_LIBRARY)
        return run

    return attach


@_define(
    "enter(Tensor sink, Tensor[] inputs, Tensor? labels) -> Tensor",
    lambda sink, inputs, labels: sink.new_empty(TOKEN),
)
def _enter(sink: Tensor, inputs: Sequence[Tensor], labels: Tensor | None) -> Tensor:
    engine = _ENGINES[int(sink[0])]
    engine._begin_forward(inputs, {} if labels is None else {"labels": labels})
    return _token(engine, engine._forwards)


@_define("arrive(Tensor sink) -> Tensor", lambda sink: sink.new_empty(TOKEN))
def _arrive(sink: Tensor) -> Tensor:
    """In a part that is compiled by itself: the forward pass is the one that the engine is in."""
    engine = _ENGINES[int(sink[0])]
    return _token(engine, engine.forward_number or engine._forwards)


def _token(engine: DPEngine, forward: int) -> Tensor:
    task = torch._C._current_graph_task_id()
    return torch.tensor([engine._number, forward if task == -1 else 0, task], dtype=torch.float64)


@_define(
    "use(Tensor x, Tensor token, Tensor[] indices, str spec) -> Tensor",
    lambda x, token, indices, spec: token.new_empty(TOKEN + len(indices)),
)
def _use(x: Tensor, token: Tensor, indices: Sequence[Tensor], spec: str) -> Tensor:
    place = torch.cat([token, *(index[1:] for index in indices)])
    place[0] = indices[0][0]
    use, targets = _read(place)
    rules, now = use.engine._rules, torch._C._current_graph_task_id()
    if use.engine.strategy == "two_pass" and donates_buffers():
        raise PrivacyError(
            "strategy 'two_pass' goes through a compiled backward pass twice, which torch compiles for one unless "
            "torch._functorch.config.donated_buffer = False stands before the first forward pass"
        )
    _check(use.engine, x, _parsed(spec), targets)
    if not rules.probing and (use.task != -1 or now == -1):  # a part that compiled code recomputes is not a new use
        use.engine._passes.expect(use)
    return place


@_define(
    "record(Tensor[] saved, Tensor backprops, Tensor place, str spec) -> Tensor",
    lambda saved, backprops, place, spec: place.new_empty(TOKEN),
)
def _record(saved: Sequence[Tensor], backprops: Tensor, place: Tensor, spec: str) -> Tensor:
    use, targets = _read(place)
    engine = use.engine
    nothing = torch.zeros(TOKEN, dtype=torch.float64)
    if not executes(torch.autograd.graph.get_gradient_edge(engine._sink).node, targets):
        return nothing  # torch.autograd.grad() of the inputs alone
    if use.forward is not None and use.forward <= engine._passes.stale:
        raise PrivacyError(
            f"{names(targets)}: a step was taken between the forward pass of the compiled model and its backward(); "
            "call backward() before step()"
        )
    settings = _parsed(spec)
    wanted = [p.requires_grad for p in targets]
    if any(wanted):
        with torch.no_grad():
            reached = [p for p, want in zip(targets, wanted, strict=True) if want]
            build = _BUILD[settings["kind"]](settings)
            engine._passes.receive(use, reached, lambda: build(saved, backprops, wanted), lent=[*saved, backprops])
    return nothing


class Arrived:
    """A `tap.Use` that was announced by compiled code."""

    def __init__(self, engine: DPEngine, forward: int, task: int, targets: Sequence[PrivateParameter]) -> None:
        self.engine, self.task, self.forward = engine, task, forward or None
        self.layers = {engine.layers[p._dp_name] for p in targets}
        self.spent_in: int | None = None


def _read(place: Tensor) -> tuple[Arrived, list[PrivateParameter]]:
    number, forward, task, *indices = (int(x) for x in place.tolist())
    engine = _ENGINES.get(number)
    if engine is None or not engine._owned:
        raise PrivacyError("backward() goes through a compiled model whose DPEngine was detached; run forward() again")
    targets = [engine._owned[i][1] for i in indices]
    return Arrived(engine, forward, task, targets), targets


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
    rules, size = engine._rules, engine.batch_size
    doubtful, rules.doubtful = rules.doubtful - rules.told, set()
    if doubtful and not rules.probing:
        found = ", ".join(repr(name) for name in sorted({name for name, _ in doubtful}))
        raise PrivacyError(
            f"{found}: the batch has {size} samples and the input another dimension of that size, or no gradient; a "
            f"compiled model cannot be asked which is the batch. {_WARM_UP}"
        )


@functools.lru_cache(maxsize=4096)
def _parsed(spec: str) -> dict[str, Any]:
    settings: dict[str, Any] = json.loads(spec)
    return settings


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
