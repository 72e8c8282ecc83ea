"""Fuzzes every op in a process of its own: `python fuzz_ops.py outcomes|bounds EXAMPLES TRAIL [any]`.

A crash of the process is thus seen by whoever started it, and the file TRAIL then holds the call that it died in.
With `any` the examples are others each time, else they are always the same.
"""

from __future__ import annotations

import json
import math
import os
import sys
import warnings
from collections import Counter
from random import Random
from typing import Any

import torch
from calls import arguments, spoil, threshold
from grid_bounds import one_grid_bound
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tensors import FLOATS, described, norm, rounding
from torch import Tensor

import adamix_kernels as kernels
from adamix_kernels import BackendError, clip_coef, clip_sum, grad_norm_sq, use_backend
from adamix_kernels.ops._numerics import as_list
from adamix_kernels.spec import OPS

TINY = torch.finfo(torch.float32).tiny
seen: Counter[str] = Counter()
trail = -1


def leave_trail(text: str) -> None:
    os.pwrite(trail, f"example {seen['examples']}: {text}".encode().ljust(2000)[:2000], 0)


# --- every outcome is a result or an error that names an argument ----------------------------------------------------


def one_outcome(r: Random) -> None:
    op = OPS[r.choice(list(OPS))]
    found = arguments(r, op)
    for _ in range(r.choice([0, 0, 1, 1, 2])):
        spoil(r, found)
    backend = r.choice(["auto", "auto", "torch", "cpp"])
    text = f"{op.name} on {backend}: " + ", ".join(f"{n}={described(v)}" for n, v in found.items())
    leave_trail(text)
    try:
        # A leaf that requires grad is not written in place, in torch's own words.
        with use_backend(backend), torch.set_grad_enabled(not op.name.endswith("_")):
            result = op(**found)
    except BackendError:
        seen["backend cannot"] += 1
    except (TypeError, ValueError) as error:
        said = str(error)
        assert said.startswith(f"{op.name}: ") and any(name in said for name in found), f"{text}\nsays: {said}"
        seen["refused"] += 1
    except BaseException as error:
        raise AssertionError(f"{text}\nraises {type(error).__name__}: {error}") from error
    else:
        check_result(op.name, result, found, text)
        seen["result"] += 1


def check_result(name: str, result: Any, found: dict[str, Any], text: str) -> None:
    """What the contract says of finiteness: norms and factors are never NaN, clipped sums are finite."""
    if name.endswith("norm_sq"):
        named = {"norm_sq": result}
    elif name == "softmax_head_mixed_sum":
        named = {"private": result.private.weight, "norm_sq": result.private.norm_sq}
    else:
        named = result._asdict() if hasattr(result, "_asdict") else {"coef": result} if name == "clip_coef" else {}
    given = [x for x in as_list(found.get("norm_sq", [])) if isinstance(x, Tensor)]  # NaN stays NaN
    if isinstance(norms := named.get("norm_sq"), Tensor) and not any(x.isnan().any() for x in given):
        assert not norms.isnan().any() and (norms >= TINY).all(), f"{text}\ngives norms {norms}"
    if isinstance(coef := named.get("coef"), Tensor):
        limit = found["max_grad_norm"]
        if not (isinstance(limit, Tensor) and not limit >= 0):
            assert ((coef >= 0) & (coef <= 1)).all(), f"{text}\ngives factors {coef}"
    limit = found.get("max_grad_norm", math.inf)
    scale = max(1.0, float(found.get("noise_multiplier", 0)))  # else the noise itself leaves float32's range
    if "clip_sum" in name and isinstance(limit, float | Tensor) and float(limit) * scale < 1e30:
        for part in ("sum", "weight", "bias"):
            for x in named[part] if isinstance(named.get(part), list) else [named.get(part)]:
                assert not isinstance(x, Tensor) or x.isfinite().all(), f"{text}\ngives {part} {x}"


# --- no sample adds more than the threshold --------------------------------------------------------------------------

LAYERS = {
    "linear_norm_sq": "linear_clip_sum",
    "conv_norm_sq": "conv_clip_sum",
    "embedding_norm_sq": "embedding_clip_sum",
    "scale_shift_norm_sq": "scale_shift_clip_sum",
    "grad_norm_sq": "clip_sum",
}
ALONE = [
    "clip_sum_noise", "softmax_head_clip_sum_noise", "softmax_head_mixed_sum", "conv_norm_clip_sum", "conv_grad_sample",
    "softmax_head_coordinates",
]  # fmt: skip
EXACTLY = [*["grid_clip_sum"] * 4, "grid_release", "grid_for"]


def one_bound(r: Random) -> None:
    name = r.choice([*LAYERS, *ALONE, *EXACTLY])
    if name in EXACTLY:
        seen.update(one_grid_bound(r, name, leave_trail))
        return
    op = OPS[LAYERS.get(name, name)]
    found = arguments(r, op, dtype=r.choice(FLOATS))
    rows = [n for n in found if op.shapes.get(n, "").removeprefix("int:").split(" ")[0] in ("B", "N", "B[]")]
    count = len(found[rows[0]][0] if isinstance(found[rows[0]], list) else found[rows[0]])
    if not count:
        return
    limit, b, backend, flushed = threshold(r), r.randrange(count), r.choice(["auto", "torch", "cpp"]), r.random() < 0.1
    text = f"{name} on {backend}, row {b}, threshold {limit!r}{', denormals flushed' * flushed}: "
    text += ", ".join(f"{n}={described(v)}" for n, v in found.items())
    leave_trail(text)
    found.update({n: v for n, v in (("noise", None), ("noise_multiplier", 0.0), ("std", 0.0)) if n in found})
    if name in ALONE:  # a batch of one row, which keeps its strides
        found.update({n: row_of(found[n], b) for n in rows})
    try:
        torch.set_flush_denormal(flushed)
        with use_backend(backend):
            sums, limit = contribution(name, found, limit, b)
    except BackendError:
        seen["backend cannot"] += 1
        return
    finally:
        torch.set_flush_denormal(False)
    got, most = norm(sums), float(limit) * (1 + 1e-6) + rounding(sums)
    assert got <= most, f"{text}\nadds {got / max(float(limit), 1e-320):.9g} of the threshold {float(limit)!r}"
    seen[name] += 1


def row_of(value: Any, b: int) -> Any:
    return [x[b : b + 1] for x in value] if isinstance(value, list) else value[b : b + 1]


def contribution(name: str, found: dict[str, Any], limit: Any, b: int) -> tuple[Any, Any]:
    """What row b adds to the sum, and the threshold it was clipped to."""
    if name == "softmax_head_mixed_sum":
        out = kernels.softmax_head_mixed_sum(**found)
        return [out.private.weight, out.private.bias], out.max_grad_norm
    if name in ("conv_grad_sample", "softmax_head_coordinates"):
        made = OPS[name](**found)
        grads = [x for x in made if x is not None] if name == "conv_grad_sample" else made
        return clip_sum(grads, clip_coef(grad_norm_sq(grads), limit)), limit
    if name in ALONE:
        out = OPS[name](**{**found, "max_grad_norm": limit})
        return (out.sum if name == "clip_sum_noise" else [out.weight, out.bias]), limit
    others = {"coef", "noise", "std", "num_embeddings"}
    coef = clip_coef(OPS[name](**{n: v for n, v in found.items() if n not in others}), limit)
    alone = torch.zeros_like(coef)
    alone[b] = coef[b]
    return OPS[LAYERS[name]](**{**found, "coef": alone}), limit


def main(which: str, examples: int, path: str, fresh: bool) -> None:
    global trail  # noqa: PLW0603
    trail = os.open(path, os.O_RDWR | os.O_CREAT)
    warnings.simplefilter("ignore")
    body = {"outcomes": one_outcome, "bounds": one_bound}[which]

    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=not fresh,
        suppress_health_check=list(HealthCheck),
        report_multiple_bugs=True,
    )
    @given(st.randoms(use_true_random=False))
    def fuzz(r: Random) -> None:
        seen["examples"] += 1
        body(r)

    fuzz()
    print(json.dumps(seen))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3], "any" in sys.argv[4:])
