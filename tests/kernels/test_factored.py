"""Factored ops against torch's own per-sample gradients, and what they refuse."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hostile_samples import generator, randn
from torch import Tensor
from torch.func import grad, vmap
from torch.nn import functional

from adamix_kernels.ops import _factored
from adamix_kernels.ops.conv import conv_clip_sum, conv_norm_sq
from adamix_kernels.ops.embedding import embedding_clip_sum, embedding_norm_sq
from adamix_kernels.ops.linear import linear_clip_sum, linear_norm_sq
from adamix_kernels.ops.noise import Noise
from adamix_kernels.ops.scale_shift import scale_shift_clip_sum, scale_shift_norm_sq
from adamix_kernels.spec import use_backend

OPS = [
    linear_norm_sq,
    linear_clip_sum,
    embedding_norm_sq,
    embedding_clip_sum,
    conv_norm_sq,
    conv_clip_sum,
    scale_shift_norm_sq,
    scale_shift_clip_sum,
]


@pytest.fixture(autouse=True)
def on_torch() -> Iterator[None]:
    with use_backend("torch"):
        yield


# --- The same gradients as torch.func ---------------------------------------------------------------------------------


def torch_grads(layer: Callable[..., Tensor], parameters: list[Tensor], x: Tensor, backprops: Tensor) -> list[Tensor]:
    """Per-sample gradients `[B, *]` of each parameter."""

    def loss(params: list[Tensor], one: Tensor, backprop: Tensor) -> Tensor:
        return (layer(one[None], *params) * backprop[None]).sum()

    return list(vmap(grad(loss), in_dims=(None, 0, 0))(parameters, x, backprops))


def assert_same(norms: list[Tensor], sums: Any, coef: Tensor, grads: list[Tensor]) -> None:
    """To 1e-9, and for the norms one rounding up to float32."""
    exact = torch.stack([g.flatten(1).square().sum(1) for g in grads]).sum(0).clamp(min=torch.finfo(torch.float32).tiny)
    for norm_sq in norms:
        assert norm_sq.dtype == torch.float32
        assert (norm_sq.double() >= exact * (1 - 1e-14)).all()
        below = torch.nextafter(norm_sq, torch.zeros_like(norm_sq)).double()
        assert (below <= exact * (1 + 1e-9)).all()
    results = [sums] if isinstance(sums, Tensor) else [part for part in sums if part is not None]
    for result, g in zip(results, grads, strict=True):
        expected = torch.tensordot(coef, g, 1)
        assert result.dtype == torch.float64
        torch.testing.assert_close(result, expected, rtol=0, atol=1e-9 * float(expected.abs().max()))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("middle", "inner", "outer"), [((), 5, 3), ((1,), 4, 6), ((9,), 30, 20), ((3, 40), 4, 5)])
def test_linear_is_torch(middle: tuple[int, ...], inner: int, outer: int, bias: bool) -> None:
    x, g, coef = randn(1, 6, *middle, inner), randn(2, 6, *middle, outer), randn(3, 6).abs()
    parameters = [randn(4, outer, inner), randn(5, outer)][: 1 + bias]
    norms = [linear_norm_sq(x, g, bias, method) for method in ("auto", "gram", "direct")]
    grads = torch_grads(functional.linear, parameters, x, g)
    assert_same(norms, linear_clip_sum(x, g, coef, bias), coef, grads)


@pytest.mark.parametrize("padding_idx", [None, 0, 3])
@pytest.mark.parametrize(("middle", "ids"), [((), 8), ((1,), 8), ((50,), 8), ((4, 5), 300)])
def test_embedding_is_torch(middle: tuple[int, ...], ids: int, padding_idx: int | None) -> None:
    indices = torch.randint(ids, (5, *middle), generator=generator(1))
    g, coef = randn(2, 5, *middle, 7), randn(3, 5).abs()

    def layer(one: Tensor, weight: Tensor) -> Tensor:
        return functional.embedding(one, weight, padding_idx)

    sums = embedding_clip_sum(indices, g, coef, ids, padding_idx)
    grads = torch_grads(layer, [randn(4, ids, 7)], indices, g)
    assert_same([embedding_norm_sq(indices, g, padding_idx)], sums, coef, grads)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("shape", "outputs", "kernel", "settings"),
    [
        ((4, 19), 6, (3,), {"stride": 2, "padding": 1, "dilation": 2, "groups": 2}),
        ((3, 8), 2, (4,), {"padding": "same"}),
        ((2, 7, 6), 3, (2, 4), {"padding": "same", "dilation": (3, 1)}),
        ((6, 8, 9), 9, (3, 2), {"stride": (2, 3), "padding": (0, 1), "groups": 3}),
        ((5, 6, 6), 10, (3, 3), {"padding": "valid", "groups": 5}),
        ((2, 30, 31), 3, (5, 5), {}),
        ((4, 4, 5, 6), 2, (2, 3, 1), {"stride": (1, 2, 1), "padding": (1, 0, 2), "groups": 2}),
    ],
)
def test_conv_is_torch(
    shape: tuple[int, ...], outputs: int, kernel: tuple[int, ...], settings: dict[str, Any], bias: bool
) -> None:
    conv = [functional.conv1d, functional.conv2d, functional.conv3d][len(kernel) - 1]

    def layer(one: Tensor, weight: Tensor, shift: Tensor | None = None) -> Tensor:
        return conv(one, weight, shift, **settings)

    weight = randn(1, outputs, shape[0] // settings.get("groups", 1), *kernel)
    parameters = [weight, randn(2, outputs)][: 1 + bias]
    x, coef = randn(3, 4, *shape), randn(4, 4).abs()
    g = randn(5, *layer(x, weight).shape)
    norm_sq = conv_norm_sq(x, g, kernel, **settings, bias=bias)
    sums = conv_clip_sum(x, g, coef, kernel, **settings, bias=bias)
    assert_same([norm_sq], sums, coef, torch_grads(layer, parameters, x, g))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("middle", [(), (1,), (60,), (4, 5)])
def test_scale_shift_is_torch(middle: tuple[int, ...], bias: bool) -> None:
    x, g, coef = randn(1, 4, *middle, 12), randn(2, 4, *middle, 12), randn(3, 4).abs()

    def layer(one: Tensor, weight: Tensor, shift: Tensor | None = None) -> Tensor:
        return functional.layer_norm(one, (12,), weight, shift)

    grads = torch_grads(layer, [randn(4, 12), randn(5, 12)][: 1 + bias], x, g)
    normal = functional.layer_norm(x, (12,))
    assert_same([scale_shift_norm_sq(normal, g, bias)], scale_shift_clip_sum(normal, g, coef, bias), coef, grads)


def test_scale_shift_is_group_norm_with_channels_last() -> None:
    x, g, coef = randn(1, 4, 6, 5, 5), randn(2, 4, 6, 5, 5), randn(3, 4).abs()

    def layer(one: Tensor, weight: Tensor, shift: Tensor) -> Tensor:
        return functional.group_norm(one, 3, weight, shift)

    grads = torch_grads(layer, [randn(4, 6), randn(5, 6)], x, g)
    normal, last = functional.group_norm(x, 3).movedim(1, -1), g.movedim(1, -1)
    assert_same([scale_shift_norm_sq(normal, last)], scale_shift_clip_sum(normal, last, coef), coef, grads)


# --- The rest ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_blocks_do_not_change_the_result(op: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for case in op.cases():
        whole = op(**case.build(generator(0)))
        with monkeypatch.context() as patch:
            patch.setattr(_factored, "_LIMIT", 40)
            parts = op(**case.build(generator(0)))
        tolerance = {"rtol": 2e-7, "atol": 1e-44} if "norm" in op.name else {"rtol": 1e-12, "atol": 1e-12}
        torch.testing.assert_close(parts, whole, **tolerance)


@pytest.mark.parametrize("bias", [False, True])
def test_linear_noise_is_one_draw_over_weight_and_bias(bias: bool) -> None:
    noise = Noise(seed=3)
    a, g = torch.full((2, 3, 4), torch.nan), torch.full((2, 3, 5), torch.inf)
    weight, shift = linear_clip_sum(a, g, torch.zeros(2), bias, noise, 0.5)
    expected = 0.5 * Noise(seed=3).normal(0, 0, 25 if bias else 20)
    got = weight.reshape(-1) if shift is None else torch.cat([weight.reshape(-1), shift])
    torch.testing.assert_close(got.double(), expected, rtol=1e-6, atol=0)
    assert noise.next_draw() == 1


def test_embedding_needs_no_table_of_positions_by_ids() -> None:
    """2^20 ids and 2^10 positions: a one-hot would take 8 GB."""
    ids = torch.tensor([[5, 1 << 19, 5, (1 << 20) - 1] * 256])
    total = embedding_clip_sum(ids, torch.ones(1, 1024, 1), torch.ones(1), 1 << 20)
    assert total[ids[0, :4], 0].tolist() == [512, 256, 512, 256] and float(total.sum()) == 1024
    assert embedding_norm_sq(ids, torch.ones(1, 1024, 1))[0] == pytest.approx(512**2 + 2 * 256**2, rel=1e-6)


X = torch.ones(2, 3, 4)
IDS = torch.zeros(2, 3, dtype=torch.int64)
IMAGE, COEF = torch.ones(2, 4, 6, 6), torch.ones(2)


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (ValueError, "linear_norm_sq: backprops has shape [2, 5, 4]; expected [B, *, O] with *=[3] as in activations",
         lambda: linear_norm_sq(X, torch.ones(2, 5, 4))),
        (TypeError, "linear_norm_sq: activations has dtype torch.int64", lambda: linear_norm_sq(X.long(), X)),
        (ValueError, "linear_norm_sq: method is 'ghost'; pass", lambda: linear_norm_sq(X, X, method="ghost")),
        (TypeError, "linear_norm_sq: bias is Tensor; pass True", lambda: linear_norm_sq(X, X, bias=COEF)),
        (ValueError, "linear_clip_sum: coef has shape [3]; expected [B] with B=2 as in activations",
         lambda: linear_clip_sum(X, X, torch.ones(3))),
        (ValueError, "linear_clip_sum: std is -1.0; pass a finite", lambda: linear_clip_sum(X, X, COEF, std=-1.0)),
        (TypeError, "linear_clip_sum: noise is NoneType; pass", lambda: linear_clip_sum(X, X, COEF, std=1.0)),
        (ValueError, "linear_clip_sum: std has shape [2]; pass",
         lambda: linear_clip_sum(X, X, COEF, std=COEF, noise=Noise())),
        (TypeError, "embedding_norm_sq: indices has dtype torch.float32", lambda: embedding_norm_sq(X[..., 0], X)),
        (ValueError, "embedding_norm_sq: padding_idx is -1; pass", lambda: embedding_norm_sq(IDS, X, -1)),
        (ValueError, "embedding_clip_sum: indices holds 7; expected 0 <= index < num_embeddings=7",
         lambda: embedding_clip_sum(IDS + 7, X, COEF, 7)),
        (ValueError, "embedding_clip_sum: indices holds -1;", lambda: embedding_clip_sum(IDS - 1, X, COEF, 7)),
        (ValueError, "embedding_clip_sum: padding_idx is 7;", lambda: embedding_clip_sum(IDS, X, COEF, 7, 7)),
        (ValueError, "embedding_clip_sum: num_embeddings is 0;", lambda: embedding_clip_sum(IDS, X, COEF, 0)),
        (ValueError, "conv_norm_sq: backprops has shape [2, 4, 6, 6]; expected [2, 4, 4, 4], the output of activations "
         "[2, 4, 6, 6] with kernel_size (3, 3), stride 1, padding 0, dilation 1",
         lambda: conv_norm_sq(IMAGE, IMAGE, (3, 3))),
        (ValueError, "conv_norm_sq: kernel_size is 3; pass a tuple", lambda: conv_norm_sq(IMAGE, IMAGE, 3)),
        (ValueError, "conv_norm_sq: kernel_size is (0, 1); pass", lambda: conv_norm_sq(IMAGE, IMAGE, (0, 1))),
        (ValueError, "conv_norm_sq: kernel_size is (9, 9); larger", lambda: conv_norm_sq(IMAGE, IMAGE, (9, 9))),
        (ValueError, "conv_norm_sq: activations has shape [2, 4, 6, 6]; expected [B, I] and 1 spatial",
         lambda: conv_norm_sq(IMAGE, IMAGE, (1,))),
        (ValueError, "conv_norm_sq: stride is (1,); pass", lambda: conv_norm_sq(IMAGE, IMAGE, (1, 1), (1,))),
        (ValueError, "conv_norm_sq: dilation is 0; pass", lambda: conv_norm_sq(IMAGE, IMAGE, (1, 1), dilation=0)),
        (ValueError, "conv_norm_sq: padding is 'full'; pass", lambda: conv_norm_sq(IMAGE, IMAGE, (1, 1), 1, "full")),
        (ValueError, "conv_norm_sq: padding is 'same' with stride 2;",
         lambda: conv_norm_sq(IMAGE, IMAGE, (1, 1), 2, "same")),
        (ValueError, "conv_norm_sq: groups is 3; expected a divisor of I=4 and of O=4",
         lambda: conv_norm_sq(IMAGE, IMAGE, (1, 1), groups=3)),
        (ValueError, "conv_clip_sum: coef has shape [3]", lambda: conv_clip_sum(IMAGE, IMAGE, torch.ones(3), (1, 1))),
        (ValueError, "scale_shift_norm_sq: backprops has shape [2, 3, 3]; expected [B, *, D] with D=4",
         lambda: scale_shift_norm_sq(X, X[..., :3])),
        (TypeError, "scale_shift_clip_sum: bias is NoneType; pass",
         lambda: scale_shift_clip_sum(X, X, COEF, None)),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(error: type[Exception], message: str, call: Callable[[], Any]) -> None:
    with pytest.raises(error, match=re.escape(message)):
        call()
