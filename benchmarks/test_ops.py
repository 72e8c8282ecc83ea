"""Microbenchmarks of the ops, each result checked against the reference before it is timed.

pytest benchmarks --benchmark-enable            on the CPU
pytest benchmarks --benchmark-enable -m gpu     on a GPU
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

import adamix_kernels as kernels
from adamix_kernels.spec import AUTO_ORDER, OPS, use_backend


def gradients(device: str) -> Tensor:
    return torch.randn(64, 1_000_000, device=device)


def head(device: str) -> dict[str, Any]:
    return {
        "features": torch.randn(2000, 1280, device=device),
        "labels": torch.randint(0, 10, (2000,), device=device),
        "weight": torch.zeros(10, 1280, device=device),
        "max_grad_norm": 1.0,
    }


SIZES: dict[str, Callable[[str], dict[str, Any]]] = {
    "grad_norm_sq": lambda device: {"grad_sample": gradients(device)},
    "clip_coef": lambda device: {"norm_sq": torch.rand(50_000, device=device), "max_grad_norm": 0.5},
    "clip_sum": lambda device: {"grad_sample": gradients(device), "coef": torch.rand(64, device=device)},
    "norm_quantile": lambda device: {"norm_sq": torch.rand(50_000, device=device), "q": 0.9},
    "clip_sum_noise": lambda device: {"grad_sample": gradients(device), "max_grad_norm": 1.0},
    "softmax_head_clip_sum_noise": head,
    "linear_norm_sq": lambda device: {
        "activations": torch.randn(16, 64, 256, device=device),
        "backprops": torch.randn(16, 64, 256, device=device),
    },
    "add_gaussian_noise_": lambda device: {
        "tensor": torch.zeros(10_000_000, device=device),
        "std": 1.0,
        "noise": kernels.Noise(seed=0),
    },
}


def runs() -> Iterator[Any]:
    for name, backend in itertools.product(SIZES, AUTO_ORDER):
        if OPS[name].why_not(backend) is None:
            for device in {"torch": ("cpu", "cuda"), "cpp": ("cpu",)}.get(backend, ("cuda",)):
                marks = [pytest.mark.gpu] if device == "cuda" else []
                yield pytest.param(name, backend, device, id=f"{name}-{backend}-{device}", marks=marks)


@pytest.mark.parametrize(("name", "backend", "device"), list(runs()))
def test_op(benchmark: Any, name: str, backend: str, device: str) -> None:
    torch.manual_seed(0)
    op, arguments = OPS[name], SIZES[name](device)

    def call() -> Any:
        with use_backend(backend):
            result = op(**arguments)
        if device == "cuda":
            torch.cuda.synchronize()
        return result

    torch.manual_seed(0)
    expected = op.reference(**SIZES[name](device))
    rtol = max(1e-5, *(out.rtol for out in op.returns))
    for one, other in zip(tree_leaves(call()), tree_leaves(expected), strict=True):
        if other is None:
            assert one is None
            continue
        torch.testing.assert_close(one, other, rtol=rtol, atol=1e-5 * float(other.abs().max()))
    cost = op.cost(**{**op._defaults, **arguments})
    benchmark.extra_info.update(bytes=cost.bytes, flops=cost.flops, device=device)
    benchmark.group = f"{name} {device}"
    benchmark.pedantic(call, rounds=7, warmup_rounds=1)
