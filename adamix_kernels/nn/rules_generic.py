"""Rules for functions of any kind: elementwise ones, and per-sample gradients of whatever else there is."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from adamix_kernels.nn.errors import PrivacyError
from adamix_kernels.nn.factors import PerSample, per_sample
from adamix_kernels.nn.parameter import Private
from adamix_kernels.nn.parameter import tensors as found_in
from adamix_kernels.nn.rules import Rules, name_of, plain, rule, trains
from adamix_kernels.spec import device_type

#: Functions whose first argument is converted to the likeness of the second.
TEMPLATES = {Tensor.to, Tensor.type_as, Tensor.view_as, Tensor.reshape_as, Tensor.expand_as}

#: Per-sample gradients made at a time by the generic rule.
_LIMIT = 1 << 26

_ARITHMETIC = "add sub mul div true_divide subtract multiply divide maximum minimum pow".split()
_SPECIAL = "add radd iadd sub rsub isub mul rmul imul truediv rtruediv itruediv pow rpow".split()
_IN_PLACE = {f"__{name}__" for name in _SPECIAL if name.startswith("i")}
ELEMENTWISE = [
    *(getattr(owner, name) for owner in (torch, Tensor) for name in _ARITHMETIC),
    *(getattr(Tensor, f"{name}_") for name in ("add", "sub", "mul", "div")),
    *(getattr(Tensor, f"__{name}__") for name in _SPECIAL),
    torch.where,
    Tensor.where,
    torch.addcmul,
    torch.lerp,
]


def _elementwise(function: Callable[..., Any]) -> None:
    @rule(function)
    def apply(rules: Rules, *args: Any, **kwargs: Any) -> Any:
        return elementwise(rules, function, args, kwargs)


def elementwise(rules: Rules, function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Parameters that are broadcast against samples: each gets a row per sample."""
    what = name_of(function)
    leaves, spec = tree_flatten((args, kwargs))
    given = [x for x in leaves if isinstance(x, Tensor)]
    shape = torch.broadcast_shapes(*(x.shape for x in given))
    others = [x for x in given if not isinstance(x, Private)]
    with_rows = [x for x in others if x.dim() == len(shape) > 0 and x.shape[:1] == shape[:1]]
    targets = [x for x in given if isinstance(x, Private)]
    if _in_place(function) and isinstance(args[0], Private):
        raise PrivacyError(f"{rules.names(targets)}: {what} changes it in place")
    covers = [x for x in targets if x.dim() == len(shape) > 0 and x.shape[0] != 1 and x.stride(0) != 0]
    if not any(rules.is_batch(x) for x in with_rows) or (covers and not any(x.requires_grad for x in others)):
        if any(x.requires_grad for x in others):
            raise PrivacyError(
                f"{rules.names(targets)}: {what} joins it with {_shapes(others)}, which depends on private "
                "samples but has no dimension for them. A penalty on parameters belongs into the optimizer "
                "(weight_decay), or within public()"
            )
        rules.check_no_samples(given, what)
        return rules.derive(function(*args, **kwargs), *targets)
    if covers:
        raise PrivacyError(
            f"{rules.names(covers)}: {what} meets samples along its own dimension 0; give it one of size 1 there"
        )
    if rules.batch_size not in (None, shape[0]):
        rules.check_batch(with_rows[0] if with_rows[0].dim() > 1 else with_rows[0][:, None], what, *targets)
    rules.tell(with_rows[0], what, *targets)
    leaves = [
        x if not isinstance(x, Private) else rules.rows(x, len(shape), shape[0]) if trains(x) else plain(x)
        for x in leaves
    ]
    args, kwargs = tree_unflatten(leaves, spec)
    return function(*args, **kwargs)


for _function in ELEMENTWISE:
    _elementwise(_function)


@rule(torch.cat, torch.concat, torch.concatenate)
def cat(rules: Rules, tensors: Sequence[Any], dim: int = 0, **kwargs: Any) -> Any:
    dim = kwargs.get("axis", dim)
    others = [x for x in tensors if not isinstance(x, Private)]
    if not any(rules.is_batch(x) for x in others):
        rules.check_no_samples(tensors, "cat()")
        return rules.derive(torch.cat(list(tensors), dim), list(tensors))
    samples, dims = others[0].shape[0], others[0].dim()
    rules.check_batch(others[0], "cat()", *tensors)
    parts = []
    for x in tensors:
        if trains(x) and (x.shape[0] != samples or (x.stride(0) and samples != 1) or dim % dims == 0):
            raise PrivacyError(
                f"{rules.names([x])}: cat() joins it with samples; expand it to [{samples}, ...] first, and join along "
                "another dimension than 0"
            )
        parts.append(rules.rows(x, dims, samples) if trains(x) else plain(x))
    return torch.cat(parts, dim)


@rule(Tensor.repeat)
def repeat(rules: Rules, input: Any, *sizes: Any) -> Any:
    """The first dimension is expanded instead, so that the others can tell that its rows are the same."""
    sizes = tuple(sizes[0]) if len(sizes) == 1 and not isinstance(sizes[0], int) else sizes
    grown = len(sizes) > input.dim()
    if not grown and input.shape[0] != 1:
        return rules.derive(input.repeat(*sizes), input)
    once = input.repeat(1, *sizes[1:])
    return rules.derive(once.expand(sizes[0], *once.shape[1:]), input)


def _shapes(values: Sequence[Tensor]) -> str:
    return ", ".join(f"a tensor {list(x.shape)}" for x in values)


def by_vmap(rules: Rules, function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Per-sample gradients of a function of a batch, one call for each sample under `torch.func.vmap`."""
    what = name_of(function)
    if _in_place(function):
        raise PrivacyError(
            f"{rules.names(list(found_in(args, kwargs)))}: {what} works in place and has no rule; use another"
        )
    if rules.engine._passes.recorded:
        raise PrivacyError(
            f"graphed(): {rules.names(list(found_in(args, kwargs)))}: {what} has no rule, and its rows are compared on "
            "the host in each forward pass; call backward() without a graph, or freeze the parameter"
        )
    leaves, spec = tree_flatten((list(args), dict(kwargs)))
    out = _call(function, spec, [plain(x) for x in leaves])
    leaves = [_of_one(rules, x) for x in leaves]
    targets = [x for x in leaves if trains(x)]
    if not any(isinstance(x, Tensor) and (x.is_floating_point() or x.is_complex()) for x in tree_leaves(out)):
        return out  # equal(), comparisons: nothing of it has a gradient
    others = [x for x in leaves if isinstance(x, Tensor) and not isinstance(x, Private)]
    if not isinstance(out, Tensor) or out.dim() == 0 or rules.batch_size not in (None, out.shape[0]):
        raise PrivacyError(
            f"{rules.names(targets)}: {what} has no rule, and its result is not one tensor with a row for each sample; "
            "use a function or module that has one, or freeze the parameter"
        )
    samples = out.shape[0]
    batch = [i for i, x in enumerate(leaves) if rules.is_batch(x) and x.shape[0] == samples]
    if any(x.requires_grad and x.shape[:1] != (samples,) for x in others) or not batch:
        raise PrivacyError(f"{rules.names(targets)}: {what} has no rule, and not every input has a row for each sample")
    fixed = [plain(x) if isinstance(x, Tensor) else x for x in leaves]
    places = [i for i, x in enumerate(leaves) if trains(x)]
    _check_rows(rules, function, spec, fixed, batch, out, targets)
    rules.tell(max((leaves[i] for i in batch), key=Tensor.dim), what, *targets)
    fixed = _placed(fixed, batch, [None] * len(batch))  # they are saved by autograd, not here
    kind = device_type(out)
    casts, half = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)

    def build(saved: Sequence[Tensor], g: Tensor, wanted: Sequence[bool]) -> PerSample:
        slots = [place for place, want in zip(places, wanted, strict=True) if want]
        weights = [fixed[slot] for slot in slots]
        if not len(g):
            return PerSample([g.new_zeros(0, *weight.shape) for weight in weights])

        def of_one(g: Tensor, *samples: Tensor) -> Any:
            def run(*inputs: Tensor) -> Tensor:
                values = _placed(fixed, [*batch, *slots], [*(x[None] for x in samples), *inputs])
                with torch.autocast(kind, half, enabled=casts):  # as in the forward pass
                    return _call(function, spec, values)

            return torch.func.vjp(run, *weights)[1](g[None])

        size = max(1, _LIMIT // max(1, sum(math.prod(w.shape) for w in weights)))
        parts = [per_sample(of_one, g[i : i + size], *(x[i : i + size] for x in saved)) for i in range(0, len(g), size)]
        return PerSample([torch.cat(grads) for grads in zip(*parts, strict=True)])

    # what the function returned may be a view, or saved for its own backward
    return rules.tap(out.clone(), build, [leaves[i] for i in batch], *targets)


def _in_place(function: Callable[..., Any]) -> bool:
    name = getattr(function, "__name__", "")
    return (name.endswith("_") and not name.endswith("__")) or name in _IN_PLACE


def _of_one(rules: Rules, x: Any) -> Any:
    """A target that was expanded to a row for each sample as one row."""
    return rules.derive(x[:1], x) if trains(x) and x.dim() and x.shape[0] > 1 and x.stride(0) == 0 else x


def _placed(values: Sequence[Any], places: Sequence[int], others: Sequence[Any]) -> list[Any]:
    result = list(values)
    for place, other in zip(places, others, strict=True):
        result[place] = other
    return result


def _call(function: Callable[..., Any], spec: Any, leaves: Sequence[Any]) -> Any:
    args, kwargs = tree_unflatten(leaves, spec)
    return function(*args, **kwargs)


def _check_rows(
    rules: Rules,
    function: Callable[..., Any],
    spec: Any,
    leaves: Sequence[Any],
    batch: Sequence[int],
    out: Tensor,
    targets: Sequence[Tensor],
) -> None:
    """The first and last sample alone must give their rows: what mixes samples, or has no batch, is seen here."""
    if not out.shape[0] or out.is_meta:  # without values nothing can be compared, nor trained
        return
    tolerance = 1e-6 if out.dtype == torch.float64 else 1e-2

    def same(b: slice) -> bool:
        among, alone = out[b], _call(function, spec, _placed(leaves, batch, [leaves[i][b] for i in batch]))
        scale = float(among.nan_to_num(0, 0, 0).abs().max()) if among.numel() else 0.0
        return alone.shape == among.shape and torch.allclose(
            alone, among, rtol=tolerance, atol=tolerance * scale, equal_nan=True
        )

    try:
        with torch.no_grad():
            alike = same(slice(0, 1)) and same(slice(len(out) - 1, len(out)))
    except RuntimeError:
        alike = False
    if not alike:
        raise PrivacyError(
            f"{rules.names(targets)}: {name_of(function)} has no rule, and gives a sample alone another result than "
            "among others; it mixes samples or dimension 0 is not the batch"
        )
