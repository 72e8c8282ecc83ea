"""Arguments for any op, made from the axes that its spec gives: fitting ones, and ones with something wrong."""

from __future__ import annotations

import math
from random import Random
from typing import Any

import numpy as np
import torch
from tensors import FLOATS, dims, floats, integers, laid_out, size
from torch import Tensor

from adamix_kernels import Noise
from adamix_kernels.ops.conv import conv_axes
from adamix_kernels.spec import INT_DTYPES, Op

JUNK: list[Any] = [
    None, "x", "", -1, 0, 1, 2, 2**40, 2**70, 10**400, -0.0, 0.5, 1e-320, 1e308, math.nan, math.inf, -math.inf, True,
    False, [], [1], (1, 2), {}, 1j, b"x", object, np.float32(2), np.int64(3), np.ones(2), torch.ones(2),
    torch.tensor(2.0), torch.tensor(math.nan), torch.tensor(3), torch.tensor(True), torch.tensor(1j),
]  # fmt: skip


def threshold(r: Random) -> Any:
    value = 10.0 ** r.uniform(-30, 30) if r.random() < 0.5 else 10.0 ** r.uniform(-2, 2)
    return torch.tensor(value, dtype=r.choice([torch.float32, torch.float64])) if r.random() < 0.3 else value


def arguments(r: Random, op: Op[..., Any], dtype: torch.dtype | None = None) -> dict[str, Any]:
    """Arguments that fit. Tensors of one call have one type, or each its own."""
    shared = dtype or r.choice(FLOATS)
    mixed = dtype is None and r.random() < 0.1
    if op.name.startswith("conv"):
        sizes, given = _convolution(r)
    else:
        sizes, given = {}, {}
        sizes["..."], sizes["*"] = dims(r), dims(r)
    classes = r.choice([1, 2, 3, 10, 40])
    sizes |= {"O": classes, "V": classes} if "O" not in sizes else {}
    with_bias = r.random() < 0.5
    if op.name == "subspace_basis":
        sizes["N"] = size(r)  # an eigenproblem of thousands of rows takes seconds
    if op.name == "softmax_head_coordinates":
        sizes["I"], sizes["N"] = size(r), size(r)
        sizes["P"] = sizes["O"] * (sizes["I"] + with_bias)
    found: dict[str, Any] = {}
    for name in op._names:
        if name not in op.shapes:
            found[name] = given[name] if name in given else _setting(r, name, classes)
            continue
        axes = op._axes[name]
        if op._defaults.get(name, ...) is None and not with_bias:
            found[name] = None
            continue
        count = r.randrange(1, 4) if axes.many and r.random() < 0.4 else None
        shapes = [_shape(r, axes, sizes, fresh=axes.many) for _ in range(count or 1)]
        own = r.choice(FLOATS) if mixed or name in ("coef", "norm_sq") else shared
        parts = [_tensor(r, name, shape, axes, own, classes) for shape in shapes]
        found[name] = parts[0] if count is None else parts
    if op.name == "grad_gram":  # the others' gradients have the same shapes
        own, others, axes = found["grad_sample"], size(r), op._axes["other"]
        like = [
            _tensor(r, "other", [others, *x.shape[1:]], axes, shared, classes)
            for x in (own if isinstance(own, list) else [own])
        ]
        found["other"] = like if isinstance(own, list) else like[0]
    return found


def _tensor(r: Random, name: str, shape: list[int], axes: Any, dtype: torch.dtype, classes: int) -> Tensor:
    if axes.dtypes is INT_DTYPES:
        return laid_out(r, integers(r, shape, classes))
    x = floats(r, shape, dtype)
    if name in ("coef", "norm_sq"):
        x = x.abs().clamp(max=1) if name == "coef" else x.abs()
    return laid_out(r, x)


def _shape(r: Random, axes: Any, sizes: dict[str, Any], fresh: bool) -> list[int]:
    def one(axis: str) -> int:
        return sizes.setdefault(axis, size(r, 1 if axis == "M" else 0, large=math.prod(_known(sizes)) < 200))

    wild = [] if axes.wild is None else dims(r) if fresh else sizes[axes.wild if axes.wild == "*" else "..."]
    if axes.wild == "..." and "backprops spatial" in sizes:
        wild = sizes["backprops spatial" if "O" in axes.head else "..."]
    return [*(one(a) for a in axes.head), *wild, *(one(a) for a in axes.tail)]


def _known(sizes: dict[str, Any]) -> list[int]:
    return [max(1, n) for n in sizes.values() if isinstance(n, int)]


def _convolution(r: Random) -> tuple[dict[str, Any], dict[str, Any]]:
    count, groups = r.choice([1, 2, 2, 3]), r.choice([1, 1, 2, 3])
    kernel = tuple(r.randrange(1, 5) for _ in range(count))
    stride = r.choice([1, 1, 2, tuple(r.randrange(1, 4) for _ in range(count))])
    dilation = r.choice([1, 1, 2, tuple(r.randrange(1, 3) for _ in range(count))])
    padding = r.choice([0, 1, 3, "valid", tuple(r.randrange(3) for _ in range(count))])
    if stride == 1 and r.random() < 0.3:
        padding = "same"
    axes = conv_axes(kernel, stride, padding, dilation)
    spatial = [max(1, axis.span - axis.before - axis.after) + r.randrange(6) for axis in axes]
    inputs, outputs = r.choice([0, 1, 1, 2, 3]), r.choice([0, 1, 1, 2, 4])
    groups = groups if inputs or outputs else 1
    sizes = {
        "I": groups * inputs,
        "O": groups * outputs,
        "...": spatial,
        "backprops spatial": [axis.count(n) for axis, n in zip(axes, spatial, strict=True)],
        "B": size(r),
    }
    given = {"kernel_size": kernel, "stride": stride, "dilation": dilation, "padding": padding, "groups": groups}
    return sizes, given


def _setting(r: Random, name: str, classes: int) -> Any:  # noqa: PLR0911  a table
    if name == "max_grad_norm":
        return math.inf if r.random() < 0.1 else threshold(r)
    if name in ("noise_multiplier", "std"):
        return r.choice([0.0, 0.7])
    if name == "noise":
        return r.choice([None, Noise(seed=1), Noise(), Noise(mode="secure")])
    if name in ("q", "quantile"):
        return r.choice([0.0, 0.5, 0.9, 1.0, r.random()])
    if name in ("rank", "energy", "padding_idx"):
        return r.choice({"rank": [None, 1, 3, 100], "energy": [None, 0.5, 1.0], "padding_idx": [None, 0]}[name])
    if name == "num_embeddings":
        return classes + r.choice([0, 0, 7])
    if name == "grid":  # some fit the threshold
        return 2.0 ** r.choice([-24, -24, -20, r.randrange(-90, 40)])
    if name == "method":
        return r.choice(["auto", "gram", "direct"])
    if name == "offsets":  # of one tensor: a list of several is refused then
        return r.choice([None, None, None, [0], [2**33 + 1]])
    assert name == "bias", f"the fuzzer knows no value for the argument {name!r}: add one here"
    return r.random() < 0.5


def spoil(r: Random, found: dict[str, Any]) -> None:
    """Put something wrong, or at least unusual, in the place of one argument."""
    name = r.choice(list(found))
    value = found[name]
    found[name] = _wrong(r, value) if isinstance(value, Tensor) and r.random() < 0.8 else r.choice(JUNK)


def _wrong(r: Random, x: Tensor) -> Any:  # noqa: PLR0911  a table
    x = x.detach().to_dense().resolve_neg()
    kind = r.choice(["type", "more axes", "fewer axes", "size", "sparse", "out of range", "list", "numpy"])
    if kind == "type":
        return x.detach().to(r.choice([torch.int8, torch.int64, torch.bool, torch.complex64, torch.uint8]))
    if kind == "more axes":
        return x.unsqueeze(r.randrange(x.dim() + 1))
    if kind == "fewer axes" and x.dim():
        return x.sum(r.randrange(x.dim())).to(x.dtype)
    if kind == "size" and x.dim():
        axis = r.randrange(x.dim())
        return torch.cat([x, x.narrow(axis, 0, min(1, x.shape[axis]))], axis)
    if kind == "sparse":
        return x.detach().clone().to_sparse()
    if kind == "out of range" and not x.is_floating_point() and x.numel():
        return x + r.choice([-1, 1000, -(2**30)])
    if kind == "list":
        return r.choice([[], [x], (x, x), [x, None]])
    return x.detach().clone().float().numpy() if kind == "numpy" else x.detach().double() * 1e300
