"""Norms and clipped sums of layers whose gradients are never formed, beside what others do, on the CPU.

pytest benchmarks/test_layers.py --benchmark-enable -s
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peers
import pytest
import torch
from interleaved import medians, show
from torch import Tensor
from torch.nn import functional

import adamix_kernels as kernels

SAMPLES, WIDTH, ROUNDS = 32, 768, 11
TOKENS, WORDS = 256, 50_257
PATCHES, GROUPS = 196, 32
Run = Callable[[], Any]


def compare(benchmark: Any, capsys: Any, title: str, contenders: dict[str, Run], others: dict[str, Run]) -> None:
    """Times contenders, whose results agree, and `others`, which are there to compare with only. Ours is the first."""
    mine = next(iter(contenders))
    expected = contenders[mine]()
    for name, run in contenders.items():
        for one, other in zip(run(), expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4 * float(other.abs().max()), msg=name)
    times = medians({**contenders, **others}, "cpu", ROUNDS)
    with capsys.disabled():
        show(f"{title}, {torch.get_num_threads()} threads", times, {"ours": times[mine]})
    benchmark.group = title
    benchmark.extra_info.update(work=title, seconds=times)
    benchmark.pedantic(contenders[mine], rounds=3)


def agree(op: Any, *arguments: Any) -> None:
    """With the reference, in float64."""
    with kernels.use_backend("torch"):
        expected = op(*(x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in arguments))
    for one, other in zip(op(*arguments), expected, strict=True):
        torch.testing.assert_close(one.double(), other.double(), rtol=1e-6, atol=1e-6 * float(other.abs().max()))


def words() -> Tensor:
    """The ids of a text: the k-th most frequent word stands in it 1/k as often as the first."""
    return torch.multinomial(1 / torch.arange(1.0, WORDS + 1), SAMPLES * TOKENS, True).reshape(SAMPLES, TOKENS)


def test_embedding_norms(benchmark: Any, capsys: Any) -> None:
    torch.manual_seed(0)
    ids, g = words(), torch.randn(SAMPLES, TOKENS, WIDTH)
    agree(kernels.embedding_norm_sq, ids, g)

    def gram() -> tuple[Tensor]:
        """The formula of ghost clipping, as fastDP has it: T^2 dot products a sample."""
        same = ids[:, :, None] == ids[:, None, :]
        return ((g @ g.mT).where(same, 0.0).sum((1, 2)),)

    contenders: dict[str, Run] = {"ours": lambda: (kernels.embedding_norm_sq(ids, g),), "Gram matrices": gram}
    norms = peers.opacus_sampler(torch.nn.Embedding(1, 1), norms=True)
    if norms is not None:
        contenders["Opacus norm sampler"] = lambda: (norms(ids, g)[0].square(),)
    compare(benchmark, capsys, "norms of an embedding", contenders, {"one reading (torch.sum)": g.sum})


@pytest.mark.parametrize("rows", [WORDS, 1000])
def test_embedding_sum(benchmark: Any, capsys: Any, rows: int) -> None:
    torch.manual_seed(0)
    ids, g, coef = words() % rows, torch.randn(SAMPLES, TOKENS, WIDTH), torch.rand(SAMPLES)
    agree(kernels.embedding_clip_sum, ids, g, coef, rows)

    def added() -> tuple[Tensor]:
        terms = (g * coef[:, None, None]).flatten(0, 1)
        return (torch.zeros(rows, WIDTH).index_add_(0, ids.flatten(), terms),)

    def autograd() -> tuple[Tensor]:
        """The second backward pass of Opacus's fast gradient clipping, with the loss weighted."""
        return (torch.ops.aten.embedding_dense_backward(g * coef[:, None, None], ids, rows, -1, False),)

    contenders: dict[str, Run] = {
        "ours": lambda: (kernels.embedding_clip_sum(ids, g, coef, rows),),
        "index_add": added,
        "torch's own backward": autograd,
    }
    others: dict[str, Run] = {"zeros of that size": lambda: torch.zeros(rows, WIDTH)}
    compare(benchmark, capsys, f"clipped sum of an embedding of {rows}", contenders, others)


@pytest.mark.parametrize("sums", [False, True], ids=["norms", "norms and sum"])
@pytest.mark.parametrize("kind", ["layer norm", "group norm"])
def test_affine(benchmark: Any, capsys: Any, kind: str, sums: bool) -> None:
    """From a layer's input: each normalises it first. Others keep per-sample gradients from the norms for the sum."""
    torch.manual_seed(0)
    side = round(PATCHES**0.5)
    shape, layer = (
        ((SAMPLES, PATCHES, WIDTH), torch.nn.LayerNorm(WIDTH))
        if kind == "layer norm"
        else ((SAMPLES, WIDTH, side, side), torch.nn.GroupNorm(GROUPS, WIDTH))
    )
    x, g, coef = torch.randn(shape), torch.randn(shape), torch.rand(SAMPLES)

    def inputs() -> tuple[Tensor, Tensor]:
        if kind == "layer norm":
            return functional.layer_norm(x, (WIDTH,)), g
        return functional.group_norm(x, GROUPS).movedim(1, -1), g.movedim(1, -1)

    def mine() -> list[Tensor]:
        a, b = inputs()
        return [kernels.scale_shift_norm_sq(a, b), *(kernels.scale_shift_clip_sum(a, b, coef) if sums else [])]

    agree(kernels.scale_shift_clip_sum, *inputs(), coef)
    contenders: dict[str, Run] = {"ours": mine}
    sampler = peers.opacus_sampler(layer)
    if sampler is not None:

        def theirs() -> list[Tensor]:
            grads = sampler(x, g)
            norms = torch.stack([one.square().sum(1) for one in grads]).sum(0)
            return [norms, *(torch.einsum("b,bd->d", coef, one) for one in grads if sums)]

        contenders["Opacus grad sampler"] = theirs
    a, b = inputs()
    others: dict[str, Run] = {
        "normalisation alone": inputs,
        "our norms alone": lambda: kernels.scale_shift_norm_sq(a, b),
        "one reading (torch.sum)": lambda: (x.sum(), g.sum()),
    }
    compare(benchmark, capsys, f"{'norms and sum' if sums else 'norms'} of a {kind}", contenders, others)
