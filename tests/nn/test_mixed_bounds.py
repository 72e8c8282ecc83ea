"""What private rows can do in a mixed batch: move the private sum by a threshold, and nothing else."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from plain_loop import STRATEGIES, batch, classifier, engine, step
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from adamix_kernels import DPEngine, Noise, PrivacyError, PublicQuantile

PUBLIC = 4
SPLITS = {"first": slice(0, PUBLIC), "mask": torch.tensor([1, 0, 1, 0, 1, 0, 1, 0, 0, 0]).bool()}
HOSTILE = {
    "nan": lambda x: x * torch.nan,
    "inf": lambda x: x * torch.inf,
    "1e38": lambda x: torch.full_like(x, 1e38),
    "1e18": lambda x: x * 1e18,
    "-1e4": lambda x: x * -1e4,
    "zero": torch.zeros_like,
}


def release(
    data: tuple[Tensor, Tensor], rows: Any, *, strategy: str, last: float = 1.0, **settings: Any
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Sums without noise, and the thresholds, of one step, whose last row's loss is multiplied by `last`."""
    options = {"max_grad_norm": PublicQuantile(0.5), "loss_reduction": "sum", "expected_batch_size": 1.0}
    dp = engine(classifier(data[0].dtype), strategy=strategy, **options | settings)
    with dp.mixed(rows):
        losses = F.cross_entropy(dp.model(data[0]), data[1], reduction="none")
        losses = losses * torch.tensor([*[1.0] * (len(losses) - 1), last])
        dp.backward(losses.mean() if dp.loss_reduction == "mean" else losses.sum())
    grads, found = step(dp), dp.thresholds
    return grads, found if isinstance(found, dict) else {"": found}


def spoiled(rows: Any, spoil: Any, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    x, y = batch(dtype=dtype)
    private = torch.ones(len(x), dtype=torch.bool)
    private[rows] = False
    x[private] = spoil(x[private])
    return x, y


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("spoil", HOSTILE)
@pytest.mark.parametrize("rows", SPLITS.values(), ids=SPLITS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_private_rows_do_not_reach_thresholds_or_the_public_part(
    strategy: str, rows: Any, spoil: str, reduction: str
) -> None:
    """Bit for bit: thresholds as with ordinary private rows; the public part, as a step releases it whose private rows
    are clipped to nothing, as well."""
    settings = {"strategy": strategy, "loss_reduction": reduction}
    _, before = release(batch(dtype=torch.float32), rows, **settings)
    _, after = release(spoiled(rows, HOSTILE[spoil]), rows, **settings)
    assert all(torch.equal(tau, after[name]) for name, tau in before.items()) and all(t > 0 for t in before.values())
    quiet = settings | {"max_grad_norm": 1e-30}  # beside public gradients less than a rounding
    public, _ = release(batch(dtype=torch.float32), rows, **quiet)
    again, _ = release(spoiled(rows, HOSTILE[spoil]), rows, **quiet)
    assert all(torch.equal(g, again[name]) and g.abs().max() > 0 for name, g in public.items())


@pytest.mark.parametrize("factor", [1e-3, 1.0, 1e6])
@pytest.mark.parametrize("clipping", ["flat", "automatic"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_private_row_moves_the_sum_by_at_most_the_threshold(strategy: str, clipping: str, factor: float) -> None:
    """Of the whole, or of each layer."""
    x, y = batch()
    settings: Any = {"strategy": strategy, "clipping": clipping}
    with_it, taus = release((x, y), slice(0, PUBLIC), last=factor, **settings)
    without, same = release((x[:-1], y[:-1]), slice(0, PUBLIC), **settings)
    scale = 1.0 + PUBLIC  # expected_batch_size and public rows of weight 1
    for layer, tau in taus.items():
        torch.testing.assert_close(tau, same[layer], rtol=1e-6, atol=0)
        parts = [g - without[name] for name, g in with_it.items() if name.startswith(layer)]
        moved = scale * torch.cat([part.flatten() for part in parts]).norm()
        assert moved <= tau * (1 + 1e-6)
        assert moved > 0.95 * tau or factor < 1e6


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_huge_public_gradient_rounds_no_private_sum(strategy: str) -> None:
    """In float32, where the public sum alone is 1e9 thresholds: private rows are as without it, and noise has its
    standard deviation in the sum that it is added to."""
    x, y = batch(dtype=torch.float32)
    dp = engine(classifier(torch.float32), strategy=strategy, loss_reduction="sum", max_grad_norm=0.7)
    alone = engine(classifier(torch.float32), strategy=strategy, loss_reduction="sum", max_grad_norm=0.7)
    factors = torch.ones(10)
    factors[0] = 1e9
    with dp.mixed(slice(0, 1)):
        dp.backward((F.cross_entropy(dp.model(x), y, reduction="none") * factors).sum())
    alone.backward(F.cross_entropy(alone.model(x[1:]), y[1:], reduction="sum"))
    for name, total in alone._sums.totals.items():
        torch.testing.assert_close(dp._sums.totals[name], total, rtol=1e-5, atol=1e-6)


# --- noise -----------------------------------------------------------------------------------------------------------


class Wide(nn.Module):
    """Layers whose gradients differ by orders of magnitude, and one whose gradients are zero, as LoRA begins."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Linear(20, 150), nn.Linear(150, 30), nn.Linear(30, 3)
        self.down, self.up = nn.Linear(20, 40, bias=False), nn.Linear(40, 3, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(torch.tanh(self.a(x))) * 0.05) + self.up(self.down(x))


def noisy(strategy: str, mode: str, micro: bool, sigma: float = 1.5) -> tuple[DPEngine, dict[str, Tensor]]:
    """What is left of a release without the sums."""
    torch.manual_seed(3)
    x, y = torch.randn(12, 20), torch.randint(0, 3, (12,))
    found = []
    for multiplier in (sigma, 0.0):
        module = Wide()
        dp = engine(
            module,
            strategy=strategy,
            max_grad_norm=PublicQuantile(0.9),
            noise_multiplier=multiplier,
            expected_batch_size=6.0,
            noise=Noise(mode=mode),
            loss_reduction="sum",
        )
        for part in (slice(0, 6), slice(6, 12)) if micro else (slice(0, 12),):
            with dp.mixed(slice(0, 3), weight=2.0):
                dp.backward(F.cross_entropy(module(x[part]), y[part], reduction="sum"))
        found.append(step(dp))
    return dp, {name: (g - found[1][name]).double() for name, g in found[0].items()}


@pytest.mark.parametrize("micro", [False, True], ids=["whole", "micro-batches"])
@pytest.mark.parametrize("mode", ["fast", "secure"])
def test_each_layer_has_noise_of_its_own_threshold(mode: str, micro: bool) -> None:
    """sigma sqrt(L) tau_l on the sum of layer l, over the expected batch size and the weighted public rows."""
    dp, noise = noisy("per_layer", mode, micro)
    taus = dp.thresholds
    assert isinstance(taus, dict) and len(taus) == 5
    assert taus["down"] == 0 and max(taus.values()) > 10 * min(tau for tau in taus.values() if tau)
    whole = 6.0 + 2.0 * (6 if micro else 3)
    seen = []
    for layer, tau in taus.items():
        values = torch.cat([g.flatten() for name, g in noise.items() if name.startswith(f"{layer}.")])
        std = 1.5 * math.sqrt(5) * float(tau) / whole
        if not tau:
            assert torch.equal(values, torch.zeros_like(values))
            continue
        z = values / std
        assert (
            abs(float(z.square().mean()) - 1) < 5 * math.sqrt(2 / len(z)) and abs(float(z.mean())) < 5 / len(z) ** 0.5
        )
        seen.append(z)
    for first, second in itertools.combinations(seen, 2):  # no layer repeats another's
        count = min(len(first), len(second))
        assert abs(float((first[:count] * second[:count]).mean())) < 5 / count**0.5


@pytest.mark.parametrize("strategy", [s for s in STRATEGIES if s != "per_layer"])
@pytest.mark.parametrize("mode", ["fast", "secure"])
def test_noise_of_the_whole_is_of_the_threshold(strategy: str, mode: str) -> None:
    if strategy == "two_pass" and mode == "secure":
        pytest.skip("secure noise needs all per-sample gradients, which two_pass never has")
    dp, noise = noisy(strategy, mode, False)
    z = torch.cat([g.flatten() for g in noise.values()]) / (1.5 * float(dp.thresholds) / 12.0)
    assert abs(float(z.square().mean()) - 1) < 5 * math.sqrt(2 / len(z)) and abs(float(z.mean())) < 5 / len(z) ** 0.5


@pytest.mark.parametrize("mode", ["fast", "secure"])
def test_noise_is_for_the_layers_that_were_clipped(mode: str) -> None:
    """The bias of `a` is clipped with the weight of `b`, and once that is frozen two parts of one layer are released:
    noise for one layer would be sqrt(2) too small."""

    class Across(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.b, self.a = nn.Linear(4, 3, bias=False), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.b.weight, self.a.bias) + F.linear(x, self.a.weight)

    model = Across()
    dp = engine(model, strategy="per_layer", max_grad_norm=PublicQuantile(1.0), noise=Noise(mode=mode),
                noise_multiplier=1.0, loss_reduction="sum")  # fmt: skip
    for frozen in (False, True):
        with dp.mixed(slice(0, 2)):
            model(torch.randn(5, 4)).sum().backward()
        model.b.weight.requires_grad_(not frozen)
        if frozen:
            with pytest.raises(PrivacyError, match="layer 'b': was frozen between backward"):
                dp.optimizer.step()
            dp.optimizer.zero_grad()
            with dp.mixed(slice(0, 2)):
                model(torch.randn(5, 4)).sum().backward()
        dp.optimizer.step()
        dp.optimizer.zero_grad()


def test_layers_take_one_draw_at_consecutive_offsets() -> None:
    source, model = Noise(seed=11), classifier(torch.float64)
    dp = engine(model, strategy="per_layer", max_grad_norm=PublicQuantile(1.0), noise_multiplier=1.0, noise=source)
    x, y = batch()
    with dp.mixed(torch.ones(10, dtype=torch.bool), weight=0.0):
        dp.backward(F.cross_entropy(model(x), y))
    got, taus = step(dp), dp.thresholds
    count = sum(g.numel() for g in got.values())
    z, offset = Noise(seed=11).normal(0, 0, count), 0
    for name, g in got.items():
        std = math.sqrt(3) * taus[name.rpartition(".")[0]]
        torch.testing.assert_close(g.flatten(), z[offset : offset + g.numel()] * std, rtol=1e-9, atol=1e-12)
        offset += g.numel()
    assert source.next_draw() == 1


LAYERS: dict[str, Any] = {
    "linear": (lambda: nn.Linear(4, 3, bias=False), (4,)),
    "positions": (lambda: nn.Linear(40, 30, bias=False), (50, 40)),
    "conv": (lambda: nn.Conv2d(3, 40, 3, bias=False), (3, 20, 20)),
}


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_gradients_of_zeros_give_a_threshold_of_zero(strategy: str, layer: str) -> None:
    """Then private rows add nothing, whatever they hold, and there is no noise."""
    make, size = LAYERS[layer]
    for mode in ["fast"] if strategy == "two_pass" else ["fast", "secure"]:
        model = make()
        dp = engine(
            model,
            strategy=strategy,
            max_grad_norm=PublicQuantile(0.9),
            noise_multiplier=1.0,
            noise=Noise(mode=mode),
            loss_reduction="sum",
        )
        x = torch.randn(6, *size) * 1e6
        x[:2] = 0
        with dp.mixed(slice(0, 2)):
            dp.backward(model(x).sum())
        (got,) = step(dp).values()
        assert torch.equal(got, torch.zeros_like(got))
        taus = dp.thresholds
        assert all(float(tau) == 0 for tau in (taus.values() if isinstance(taus, dict) else [taus]))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 1e30])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_public_rows_that_are_not_finite_are_no_threshold(strategy: str, bad: float) -> None:
    """Theirs is the largest norm of all; where it would be the threshold, the largest finite one is."""
    x, y = batch(dtype=torch.float32)
    x[1] = bad

    def loss(p: Any, a: Tensor, b: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(model, p, (a[None],)), b[None])

    model = classifier(torch.float32)
    rows = vmap(grad(loss), (None, 0, 0))({n: p.detach() for n, p in model.named_parameters()}, x[:4], y[:4])
    for q in (0.5, 1.0):
        _, taus = release((x, y), slice(0, 4), strategy=strategy, max_grad_norm=PublicQuantile(q))
        for layer, tau in taus.items():
            sizes = sum(g.flatten(1).double().square().sum(1) for n, g in rows.items() if n.startswith(layer)).sqrt()
            ordered = sizes[sizes.isfinite()].sort().values
            if len(ordered) == 4:  # a layer that is saturated has no gradient there
                ordered = sizes.sort().values
            want = ordered[min(math.ceil(4 * q), len(ordered)) - 1]
            torch.testing.assert_close(tau, want, rtol=1e-3, atol=0)


def test_metrics_are_of_private_rows() -> None:
    x, y = batch()
    dp = engine(classifier(), max_grad_norm=0.7)
    alone = engine(classifier(), max_grad_norm=0.7)
    with dp.mixed(SPLITS["mask"]):
        dp.backward(F.cross_entropy(dp.model(x), y))
    keep = ~SPLITS["mask"]
    alone.backward(F.cross_entropy(alone.model(x[keep]), y[keep]))
    step(dp), step(alone)
    torch.testing.assert_close(dp.metrics().norms.reveal(), alone.metrics().norms.reveal(), rtol=1e-6, atol=0)
    assert dp.metrics().samples.reveal() == 6
    assert dp.metrics().clipped_fraction.reveal() == alone.metrics().clipped_fraction.reveal()
