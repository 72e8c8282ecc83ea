"""What the rules are while torch.compile traces a model: layers stay in the graph, what the engine is told does not.

The parameters are detached in the graph, so no ordinary gradient of them is made; an identity on each layer's output
hands its backprops to the engine (`compiled_ops`). Functions without a rule here run uncompiled, by the ordinary rules,
behind a graph break that says so. What is written here is traced by Dynamo, and never runs as it stands.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._compile import _disable_dynamo

from adamix_kernels.nn import compiled_ops as _compiled_ops
from adamix_kernels.nn.parameter import PRIVATE, PrivateParameter, by_rule, tensors
from adamix_kernels.nn.rules import Rules

if TYPE_CHECKING:
    from adamix_kernels.nn.engine import DPEngine

announce, token = _compiled_ops.announce, _compiled_ops.token
RULES: dict[Callable[..., Any], Callable[..., Any]] = {}


def rule(*functions: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Attach a rule, which returns NotImplemented for what must run uncompiled."""

    def attach(run: Callable[..., Any]) -> Callable[..., Any]:
        RULES.update(dict.fromkeys(functions, run))
        return run

    return attach


def describe(kind: str, what: str, with_history: bool, **settings: Any) -> str:
    """All that the ops need to know, as a constant of the graph. The number keeps two equal uses two."""
    return json.dumps({"kind": kind, "what": what, "with_history": with_history, "number": next(_uses), **settings})


_uses = itertools.count()
describe._dynamo_marked_constant = True  # type: ignore[attr-defined]  # called while tracing, as torch.compiler says


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, sink: Tensor, labels: Tensor | None, *inputs: Tensor) -> Tensor:
        ctx.count = len(inputs)
        return torch.ops.adamix_kernels.enter(sink, inputs, labels)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad, None, *[None] * ctx.count


class _Tap(torch.autograd.Function):
    """An identity of `out`, which was computed from detached parameters."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, token: Tensor, x: Tensor, spec: str, *indices: Tensor) -> Tensor:
        ctx.save_for_backward(x, token, *indices)
        ctx.spec, ctx.count = spec, len(indices)
        return torch.ops.aten._unsafe_view(out, out.shape)  # which, unlike a view, may be written to

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, token, *indices = ctx.saved_tensors
        token_grad = torch.ops.adamix_kernels.record(x, grad, token, indices, ctx.spec)
        return grad, token_grad, None, None, *[None] * ctx.count


def tap(out: Tensor, x: Tensor, spec: str, *targets: Any) -> Tensor:
    trained = [p for p in targets if p is not None and p.requires_grad]
    token = trained[0]._dp_engine._forwards.token
    result: Tensor = _Tap.apply(out, token, x.detach(), spec, *[p._dp_index for p in trained])
    return result


def enter(engine: DPEngine, inputs: Sequence[Tensor], labels: Any) -> Tensor | None:
    """A forward pass of the model begins: its token."""
    if not torch.is_grad_enabled() or engine._public > 0:
        return None
    found = [x.detach() for x in inputs if x.dim() > 0]
    begun: Tensor = _Enter.apply(engine._sink, labels if isinstance(labels, Tensor) else None, *found)
    # a result of the graph, or the partitioner moves enter() to the backward pass
    engine._forwards.entered = begun.detach()
    return begun


def dispatch(
    func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], plain: bool, watched: bool
) -> Any:
    """`parameter._dispatch` while it is traced; `plain` functions compute nothing of a parameter's values, and of
    `watched` ones the engine must know."""
    with torch._C.DisableTorchFunctionSubclass():
        if plain and not watched:
            return func(*args, **kwargs)
        private = [x for x in (*args, *kwargs.values()) if isinstance(x, PRIVATE)]
        ordinary = not torch.is_grad_enabled() or (private and private[0]._dp_engine._public > 0)
        if private and ordinary and not watched:
            return func(*args, **kwargs)
        if func in RULES and private and private[0]._dp_engine._forwards.token is not None:
            result = RULES[func](*args, **kwargs)
            if result is not NotImplemented:
                return result
    return uncompiled(func, args, kwargs)


def _uncompiled(func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    with torch._C.DisableTorchFunctionSubclass():
        engine = next(x._dp_engine for x in tensors(args, kwargs) if isinstance(x, PRIVATE))
        result = by_rule(func, args, kwargs)
        _compiled_ops.check_doubts(engine)
        return result


uncompiled = _disable_dynamo(_uncompiled)
uncompiled._torchdynamo_disable = True  # type: ignore[attr-defined]  # so that Dynamo gives the reason
uncompiled._torchdynamo_disable_msg = (  # type: ignore[attr-defined]
    "adamix_kernels: this use of a private parameter has no compiled rule and runs uncompiled, by its ordinary rule"
)


# --- the rules -----------------------------------------------------------------------------------------------------


def _plain(x: Any) -> Any:
    return x.detach() if isinstance(x, PRIVATE) else x


def _takes(x: Any, *targets: Any) -> bool:
    """Whether a rule here can take a use: samples meet whole parameters, and one of these is trained."""
    given = [p for p in targets if p is not None]
    whole = all(isinstance(p, PrivateParameter) for p in given)
    return whole and any(p.requires_grad for p in given) and not isinstance(x, PRIVATE) and x.dim() > 1


def _trained(*targets: Any) -> list[bool]:
    return [p is not None and p.requires_grad for p in targets]


@rule(F.linear)
def linear(input: Any, weight: Any, bias: Any = None) -> Any:
    if not _takes(input, weight, bias):
        return NotImplemented
    x = Rules.cast(input)
    spec = describe("linear", "linear()", input.requires_grad, trained=_trained(weight, bias))
    return tap(F.linear(x, _plain(weight), _plain(bias)), x, spec, weight, bias)


def _conv(dims: int, function: Any) -> None:
    what = f"conv{dims}d()"

    @rule(function)
    def conv(
        input: Any,
        weight: Any,
        bias: Any = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> Any:
        if not _takes(input, weight, bias) or input.dim() != dims + 2:
            return NotImplemented
        x = Rules.cast(input)
        out = function(x, _plain(weight), _plain(bias), stride, padding, dilation, groups)
        shape = {
            "kernel_size": tuple(weight.shape[2:]),
            "stride": stride,
            "padding": padding,
            "dilation": dilation,
            "groups": groups,
        }
        spec = describe("conv", what, input.requires_grad, trained=_trained(weight, bias), shape=shape)
        return tap(out, x, spec, weight, bias)


for _dims, _function in ((1, F.conv1d), (2, F.conv2d), (3, F.conv3d)):
    _conv(_dims, _function)


@rule(F.embedding)
def embedding(
    input: Any,
    weight: Any,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Any:
    if max_norm is not None or scale_grad_by_freq or sparse or not _takes(input, weight):
        return NotImplemented
    if weight._dp_name in weight._dp_engine._rules._positions:
        return NotImplemented  # positions that all samples share
    entries = weight.shape[0]
    if padding_idx is not None and padding_idx < 0:
        padding_idx += entries
    out = F.embedding(input, _plain(weight), padding_idx)
    spec = describe("embedding", "embedding()", False, entries=entries, padding_idx=padding_idx)
    return tap(out, input, spec, weight)


def _affine(out: Tensor, x: Tensor, what: str, weight: Any, bias: Any, groups: int | None, eps: float) -> Any:
    shape = tuple((weight if weight is not None else bias).shape)
    settings = {"shape": shape, "groups": groups, "eps": eps, "rms": what == "rms_norm()"}
    spec = describe("affine", what, x.requires_grad, trained=_trained(weight, bias), **settings)
    return tap(out, x, spec, weight, bias)


@rule(F.layer_norm)
def layer_norm(input: Any, normalized_shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5) -> Any:
    shape = tuple(normalized_shape)
    if not _takes(input, weight, bias) or input.dim() <= len(shape):
        return NotImplemented
    out = F.layer_norm(input, shape, _plain(weight), _plain(bias), eps)
    return _affine(out, input, "layer_norm()", weight, bias, None, eps)


@rule(F.rms_norm)
def rms_norm(input: Any, normalized_shape: Any, weight: Any = None, eps: float | None = None) -> Any:
    shape = tuple(normalized_shape)
    if not _takes(input, weight) or input.dim() <= len(shape):
        return NotImplemented
    least = torch.finfo(input.dtype).eps if eps is None else eps
    return _affine(F.rms_norm(input, shape, _plain(weight), eps), input, "rms_norm()", weight, None, None, least)


@rule(F.group_norm)
def group_norm(input: Any, num_groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5) -> Any:
    if not _takes(input, weight, bias):
        return NotImplemented
    out = F.group_norm(input, num_groups, _plain(weight), _plain(bias), eps)
    return _affine(out, input, "group_norm()", weight, bias, num_groups, eps)


def _row(function: Callable[..., Any]) -> None:
    @rule(function)
    def apply(input: Any, other: Any) -> Any:
        """A class token, a scale or a table of positions that meets samples: one row of it for each."""
        x, p = (other, input) if isinstance(input, PRIVATE) else (input, other)
        if not isinstance(x, Tensor) or not _takes(x, p) or not x.requires_grad or p.dim() > x.dim():
            return NotImplemented
        if p.dim() == x.dim() and p.shape[0] != 1:
            return NotImplemented
        own = tuple(p.shape)
        spec = describe("rows", f"{function.__name__}()", True, shape=own)
        expanded = p.detach().expand(x.shape[0], *((1,) * (x.dim() - p.dim()) + own)[1:])
        expanded = tap(expanded, x, spec, p)
        return function(expanded, x) if x is other else function(x, expanded)


for _joins in (torch.add, torch.mul, Tensor.add, Tensor.mul, Tensor.__add__, Tensor.__mul__):
    _row(_joins)
