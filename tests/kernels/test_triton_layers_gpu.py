"""The Triton kernels of layers on a GPU: what neither the interpreter nor the compiler can show."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from test_triton_gpu import random, room_for
from torch import Tensor

import adamix_kernels as kernels
from adamix_kernels import clip_coef, use_backend
from adamix_kernels.triton import unavailable

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(unavailable() is not None or not torch.cuda.is_available(), reason=str(unavailable())),
]
NARROW = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def on_triton() -> Iterator[None]:
    with use_backend("triton"):
        yield


def agree(norm: Any, total: Any, rtol: float, *factors: Any, **settings: Any) -> None:
    """With the reference on the GPU: norms to `rtol`, sums to 2e-6 of their largest element. The same bits twice."""
    with use_backend("torch"):
        wanted = norm(*factors, **settings)
        coef = clip_coef(wanted, float(wanted.sqrt().mean()))
        coef[::3] = 0.0
        sums = parts(total, *factors, coef, **settings)
    norm_sq = norm(*factors, **settings)
    torch.testing.assert_close(norm_sq, wanted, rtol=rtol, atol=0)
    assert torch.equal(norm_sq, norm(*factors, **settings))
    for one, other, again in zip(
        parts(total, *factors, coef, **settings), sums, parts(total, *factors, coef, **settings), strict=True
    ):
        assert float((one.double() - other.double()).abs().max()) <= 2e-6 * float(other.abs().max())
        assert torch.equal(one, again)


def parts(total: Any, *arguments: Any, **settings: Any) -> list[Tensor]:
    sums = total(*arguments, **settings)
    return [sums] if isinstance(sums, Tensor) else [part for part in sums if part is not None]


@pytest.mark.parametrize("dtype", [*NARROW, torch.float64])
@pytest.mark.parametrize("shape", [(64, 197, 768), (5, 3000, 64), (3000, 7), (33, 50, 1030), (2, 70_000, 3)])
def test_scale_shift(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = random(*shape, dtype=dtype)
    agree(kernels.scale_shift_norm_sq, kernels.scale_shift_clip_sum, 1e-6, x, x.flip(0))


@pytest.mark.parametrize("dtype", [*NARROW, torch.float64])
@pytest.mark.parametrize(("shape", "ids"), [((32, 512, 768), 5000), ((8, 4000, 100), 3), ((2, 60_000, 64), 1)])
def test_embedding(shape: tuple[int, ...], ids: int, dtype: torch.dtype) -> None:
    """The last: one id, at 60,000 positions of a sample."""
    indices = torch.randint(ids, shape[:-1], generator=torch.Generator().manual_seed(0)).cuda()
    g = random(*shape, dtype=dtype)

    def total(indices: Tensor, g: Tensor, coef: Tensor) -> Tensor:
        return kernels.embedding_clip_sum(indices, g, coef, ids + 1)

    agree(kernels.embedding_norm_sq, total, 1e-6, indices, g)


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize(
    ("inputs", "outputs", "kernel", "settings"),
    [
        ((3, 32, 32), 64, (3, 3), {"padding": 1, "bias": True}),
        ((64, 28, 28), 128, (3, 3), {"padding": 1, "stride": 2}),
        ((200, 14, 14), 70, (1, 1), {"bias": True}),
        ((96, 14, 14), 96, (5, 5), {"padding": "same", "groups": 96}),
        ((32, 300), 48, (7,), {"dilation": 3, "groups": 2, "bias": True}),
        ((16, 9, 10, 11), 20, (2, 3, 3), {"padding": (0, 1, 1)}),
    ],
)
def test_conv(
    inputs: tuple[int, ...], outputs: int, kernel: tuple[int, ...], settings: dict[str, Any], dtype: torch.dtype
) -> None:
    conv = [torch.conv1d, torch.conv2d, torch.conv3d][len(kernel) - 1]
    rest = {key: value for key, value in settings.items() if key != "bias"}
    x = random(13, *inputs, dtype=dtype)
    weight = random(outputs, inputs[0] // rest.get("groups", 1), *kernel, dtype=dtype)
    g = random(*conv(x, weight, **rest).shape, dtype=dtype)

    def norm(x: Tensor, g: Tensor) -> Tensor:
        return kernels.conv_norm_sq(x, g, kernel, **settings)

    def total(x: Tensor, g: Tensor, coef: Tensor) -> Any:
        return kernels.conv_clip_sum(x, g, coef, kernel, **settings)

    agree(norm, total, 3e-3, x, g)


def test_nothing_waits_for_the_device() -> None:
    x, image, ids = random(8, 50, 64), random(8, 16, 14, 14), torch.arange(400, device="cuda").reshape(8, 50)

    def step() -> None:
        kernels.scale_shift_clip_sum(x, x, clip_coef(kernels.scale_shift_norm_sq(x, x), 1.0))
        kernels.embedding_clip_sum(ids, x, clip_coef(kernels.embedding_norm_sq(ids, x), 1.0), 400)
        norm_sq = kernels.conv_norm_sq(image, image, (3, 3), padding=1)
        kernels.conv_clip_sum(image, image, clip_coef(norm_sq, 1.0), (3, 3), padding=1)

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_beyond_32_bit_indices() -> None:
    room_for(40)
    x = torch.ones(3, 1_000_000, 1000, dtype=torch.bfloat16, device="cuda")
    total = kernels.scale_shift_clip_sum(x, x, torch.tensor([0.0, 0.5, 1.0], device="cuda"))
    assert bool((total.weight == 1_500_000).all()) and bool((total.bias == 1_500_000).all())
    assert bool((kernels.scale_shift_norm_sq(x, x) >= 2e15).all())
    ids = (torch.arange(3_000_000, device="cuda") % 1_500_000).reshape(3, -1)
    total = kernels.embedding_clip_sum(ids, x, torch.ones(3, device="cuda"), 1_500_000)
    assert float(total.min()) == float(total.max()) == 2
    del total
    assert bool((kernels.embedding_norm_sq(ids, x) >= 1e9).all())
    image = x.view(3, 1000, 1000, 1000)
    total = kernels.conv_clip_sum(image, image[:, :2], torch.tensor([0.0, 0.0, 1.0], device="cuda"), (1, 1))
    assert bool((total.weight == 1_000_000).all())
