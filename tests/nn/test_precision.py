"""Half precision, recomputed parts and captured graphs: what is bounded, what is float32, what is refused."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from plain_loop import STRATEGIES, batch, classifier, engine, run, step
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from adamix_kernels import DPEngine, Noise, PrivacyError

HALVES = [torch.bfloat16, torch.float16]


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (y.unflatten(2, (2, 4)).transpose(1, 2) for y in self.qkv(x).chunk(3, 2))
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


KINDS: dict[str, tuple[Callable[[], nn.Module], Callable[[torch.Generator], Tensor]]] = {
    "linear": (lambda: nn.Linear(8, 5), lambda g: torch.randn(6, 40, 8, generator=g)),
    "conv": (lambda: nn.Conv1d(8, 5, 3), lambda g: torch.randn(6, 8, 40, generator=g)),
    "embedding": (lambda: nn.Embedding(5, 8), lambda g: torch.randint(5, (6, 40), generator=g)),
    "layer norm": (lambda: nn.LayerNorm(8), lambda g: torch.randn(6, 40, 8, generator=g)),
    "rms norm": (lambda: nn.RMSNorm(8), lambda g: torch.randn(6, 40, 8, generator=g)),
    "group norm": (lambda: nn.GroupNorm(2, 8), lambda g: torch.randn(6, 8, 40, generator=g)),
    "attention": (Attention, lambda g: torch.randn(6, 40, 8, generator=g)),
}


def hostile(x: Tensor, row: int) -> Tensor:
    """Rows whose gradients cancel over positions, are huge, vanish, or are ordinary."""
    if not x.is_floating_point():
        return x
    return x * [1.0, 1e3, 1e-3, 3e4, 1e-7, 0.0][row]


def weights(out: Tensor, row: int) -> Tensor:
    """Backprops `[1, ...]`: of opposite signs in turn for every other row, so that sums over positions cancel."""
    signs = torch.ones(out[0].numel()) if row % 2 else (-1.0) ** torch.arange(out[0].numel())
    return (signs * (1 + 2**-7 * torch.arange(out[0].numel()) % 3)).view_as(out[:1])


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("kind", KINDS)
def test_no_sample_in_half_precision_adds_more_than_the_threshold(kind: str, strategy: str) -> None:
    """What a sample adds to the float32 sum, before noise, is at most C: with half parameters and under autocast."""
    make, inputs = KINDS[kind]
    limit = 0.01
    for dtype, autocast in itertools.product(HALVES, (False, True)):
        torch.manual_seed(0)
        model = make() if autocast else make().to(dtype)
        dp = engine(model, strategy=strategy, max_grad_norm=limit, loss_reduction="sum")
        rows = inputs(torch.Generator().manual_seed(1))
        for row in range(6):
            x = hostile(rows[row : row + 1], row)
            x = x if autocast or not x.is_floating_point() else x.to(dtype)
            with torch.autocast("cpu", dtype, enabled=autocast):
                out = dp.model(x)
            dp.backward((out.float() * weights(out, row)).sum())
            totals = dp._sums.totals
            assert all(t.dtype == torch.float32 for t in totals.values())
            norm = sum(float(t.double().square().sum()) for t in totals.values()) ** 0.5
            assert norm <= limit * (1 + 1e-6), (dtype, autocast, row)
            dp.optimizer.zero_grad()


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_sum_is_rounded_once_after_its_noise(strategy: str, dtype: torch.dtype) -> None:
    """Samples, micro-batches and noise are added in float32; only what is released has the parameter's type."""
    model = classifier(torch.float32).to(dtype)
    dp = engine(model, strategy=strategy, noise_multiplier=1.0, noise=Noise(seed=3), max_grad_norm=0.5)
    x, y = batch(16, torch.float32)
    for part in range(4):
        rows = slice(4 * part, 4 * part + 4)
        dp.backward(F.cross_entropy(dp.model(x[rows].to(dtype)).float(), y[rows]))
    totals = {name: dp._sums.totals[name].clone() for name, _ in dp.model.named_parameters()}
    draw, noise, offset = 0, Noise(seed=3), 0
    got = step(dp)
    for name, total in totals.items():
        z = noise.normal(draw, offset, total.numel()).view_as(total)
        offset += total.numel()
        torch.testing.assert_close(got[name], (total.double() + 0.5 * z).float().to(dtype), rtol=0, atol=0)


def test_a_gradient_may_have_another_type_than_its_parameter() -> None:
    """`grad_dtype` of torch: an optimizer with master weights of its own gets the sum unrounded."""
    x, y = batch(16, torch.float32)
    dp = engine(classifier(torch.float32).bfloat16(), max_grad_norm=0.5)
    for p in dp.model.parameters():
        p.grad_dtype = torch.float32
    run(dp, (x.bfloat16(), y))
    totals = {name: total.clone() for name, total in dp._sums.totals.items()}
    for name, g in step(dp).items():
        assert g.dtype == torch.float32
        torch.testing.assert_close(g, totals[name], rtol=0, atol=0)


def test_float32_master_weights_take_small_steps() -> None:
    """The recipe of the README: parameters in float32, arithmetic in bfloat16 by autocast."""
    x, y = batch(16, torch.float32)
    moved = {}
    for autocast in (False, True):
        model = classifier(torch.float32)
        model = model if autocast else model.to(torch.bfloat16)
        before = [p.detach().float().clone() for p in model.parameters()]
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-5)
        dp = DPEngine(model, optimizer, max_grad_norm=1.0, noise_multiplier=0.0, expected_batch_size=16)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            dp.backward(F.cross_entropy(model(x if autocast else x.bfloat16()).float(), y))
        optimizer.step()
        after = [p.detach().float() for p in model.parameters()]
        moved[autocast] = float(torch.cat([(a - b).flatten() for a, b in zip(after, before, strict=True)])[:35].norm())
    assert moved[False] < moved[True] / 2  # bfloat16 weights keep 8 bits: most of such a step is lost


class Recomputed(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.inner, self.reentrant = classifier(torch.float32), reentrant

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner[0](x)
        for part in self.inner[1:]:
            x = checkpoint(part, x, use_reentrant=self.reentrant)
        return x


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("precision", ["float32", "autocast", "bfloat16"])
def test_recomputed_parts_in_each_precision(strategy: str, reentrant: bool, precision: str) -> None:
    """The same bits as without recomputing."""
    found = []
    for model in (classifier(torch.float32), Recomputed(reentrant)):
        dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
        dp = engine(model.to(dtype), strategy=strategy, max_grad_norm=0.1)
        x, y = batch(8, torch.float32)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
            loss = F.cross_entropy(dp.model(x.to(dtype)).float(), y)
        dp.backward(loss)
        found.append(list(step(dp).values()))
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)


# --- graphs that are captured and replayed ---------------------------------------------------------------------------


@pytest.fixture
def capturing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)


@pytest.mark.parametrize("mode", ["fast", "secure"])
@pytest.mark.usefixtures("capturing")
def test_noise_is_not_captured(mode: str) -> None:
    """A graph holds its draw as a constant: each replay would add the same noise."""
    noise = Noise(mode=mode)
    with pytest.raises(RuntimeError, match="CUDA graph"):
        noise.next_draw()
    with pytest.raises(RuntimeError, match="CUDA graph"):
        noise.uniform(3)
    assert noise._draws == 0


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_private_pass_is_not_captured(strategy: str, request: pytest.FixtureRequest) -> None:
    dp = engine(classifier(), strategy=strategy)
    request.getfixturevalue("capturing")
    with pytest.raises(PrivacyError, match="CUDA graph"):
        run(dp, batch())
    assert not dp._sums.totals


def test_nothing_is_asked_of_a_driver_that_is_not_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: pytest.fail("asked"))
    Noise().next_draw()


class NoReading(TorchDispatchMode):
    """Fails where the host would wait for a device: numbers that are read, shapes that depend on values."""

    WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero", "equal")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name()
        assert not any(f"aten::{wait}" in name for wait in self.WAITS), f"{name} reads a tensor on the host"
        assert name != "aten::index.Tensor" or all(i is None or i.dtype != torch.bool for i in args[1]), name
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("strategy", [s for s in STRATEGIES if s != "two_pass"])  # which compares its passes
def test_nothing_of_a_pass_is_read_on_the_host(strategy: str) -> None:
    """With a threshold that is a tensor. Its own check on the CPU is made before, as it is not made on a device."""
    from adamix_kernels import use_backend

    dp = engine(classifier(torch.float32), strategy=strategy, noise_multiplier=1.0)
    dp.max_grad_norm = torch.tensor(0.5)
    x, y = batch(8, torch.float32)
    with use_backend("torch"), NoReading():
        run(dp, (x, y))
    with pytest.raises(AssertionError, match="on the host"), NoReading():
        float(x.sum())
