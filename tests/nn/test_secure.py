"""The engine in secure mode: contributions bounded exactly, releases on the grid, the float path's to within it."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_loop import assert_same, batch, classifier, engine, expected, run, step
from torch import Tensor, nn

import adamix_kernels.nn.secure
from adamix_kernels import DPEngine, Noise, PrivacyError, grid_clip_sum, grid_for
from adamix_kernels.ops.grid import bounds

STRATEGIES = ["auto", "book_keeping", "per_layer", "materialize"]
LIMIT = 0.7


def secure(model: nn.Module, **settings: Any) -> DPEngine:
    return engine(model, noise=Noise(mode="secure"), **settings)


class Words(nn.Module):
    """Embedding, normalisation, convolution and a layer that is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.norm = nn.Embedding(11, 6), nn.GroupNorm(2, 6)
        self.conv, self.twice, self.out = nn.Conv1d(6, 6, 3, padding=1), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.conv(self.norm(self.table(ids).mT)).mT
        return self.out(torch.tanh(self.twice(torch.tanh(self.twice(x)))).mean(1))


def words() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    g = torch.Generator().manual_seed(1)
    return Words(), torch.randint(0, 11, (9, 5), generator=g), torch.randint(0, 3, (9,), generator=g)


def exact_norm_sq(grads: dict[str, Tensor]) -> Fraction:
    return sum((Fraction(x) ** 2 for g in grads.values() for x in g.flatten().tolist()), Fraction(0))


# --- what one sample can add -----------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**20),
    reach=st.floats(-1, 1),
    limit=st.floats(1e-6, 1e6),
    strategy=st.sampled_from(STRATEGIES),
    reduction=st.sampled_from(["mean", "sum"]),
)
def test_a_sample_adds_at_most_the_threshold_exactly(
    seed: int, reach: float, limit: float, strategy: str, reduction: str
) -> None:
    """Compared in rational numbers, through the public loop: a step on one sample without noise."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1, 5, generator=generator) * 10.0 ** (reach * 37)
    dp = secure(classifier(torch.float32), max_grad_norm=limit, strategy=strategy, loss_reduction=reduction)
    run(dp, (x, torch.tensor([seed % 3])), reduction)
    assert exact_norm_sq(step(dp)) <= Fraction(limit) ** 2


@pytest.mark.parametrize("limit", [1.14658478811215, 1.492736941220514, 1.7572019052506351])
def test_layers_together_are_not_above_the_threshold_by_a_rounding(
    limit: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What three layers may add, in whole numbers: with these limits C / sqrt(3) is rounded up to one too many."""
    most: list[int] = []

    def noted(grads: Any, coef: Tensor, limit: float, grid: float) -> Any:
        most.append(bounds(limit, grid)[1])
        return grid_clip_sum(grads, coef, limit, grid)

    monkeypatch.setattr(adamix_kernels.nn.secure, "grid_clip_sum", noted)
    run(secure(classifier(), strategy="per_layer", max_grad_norm=limit), batch())
    assert len(most) == 3 and sum(most) <= bounds(limit, grid_for(limit, 0.0))[1]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_more_rows_than_a_sum_holds_are_refused(strategy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adamix_kernels.nn.secure, "MOST_ROWS", 50)
    dp = secure(classifier(), strategy=strategy)
    run(dp, batch())
    step(dp)
    with pytest.raises(PrivacyError, match=r"samples since the last step; 2\^36 are the most that fit"):
        for _ in range(6):
            run(dp, batch())


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("samples", [1, 3, 7])
def test_so_does_a_sample_among_others(strategy: str, samples: int) -> None:
    """With one sample more the integer sums move by a vector of norm at most C / grid; the others have no gradient."""
    grid = grid_for(LIMIT, 0.0)
    x, y = batch(1, torch.float32)
    clipped = 0
    for factor in (0.001, 1.0, 1e4, 1e9):
        dp = secure(classifier(torch.float32), strategy=strategy, loss_reduction="mean")
        others = torch.full((samples - 1, 5), torch.nan)  # they add exactly nothing
        run(dp, (torch.cat([x * factor, others]), torch.cat([y, y.repeat(samples - 1)])))
        whole = [q for total in dp._sums.totals.values() for q in total.flatten().tolist()]
        norm_sq = sum(q * q for q in whole)
        assert norm_sq * Fraction(grid) ** 2 <= Fraction(LIMIT) ** 2
        clipped += norm_sq * Fraction(grid) ** 2 > Fraction(0.99 * LIMIT) ** 2
        dp.optimizer.zero_grad()
    assert clipped or strategy == "per_layer"


def test_layers_together_are_within_the_whole() -> None:
    dp = secure(
        classifier(torch.float32),
        strategy="per_layer",
        max_grad_norm={"0": 0.1, "2": 0.37, "3": 0.2},
        loss_reduction="sum",
    )
    x, y = batch(1, torch.float32)
    for factor in (1.0, 1e3, 1e6):
        run(dp, (x * factor, y), "sum")
        grads = step(dp)
        for layer, limit in (("0", 0.1), ("2", 0.37), ("3", 0.2)):
            own = {name: g for name, g in grads.items() if name.startswith(layer)}
            assert exact_norm_sq(own) <= Fraction(limit) ** 2
        assert exact_norm_sq(grads) <= Fraction(0.1) ** 2 + Fraction(0.37) ** 2 + Fraction(0.2) ** 2


# --- the same as in floating point, to within the grid ---------------------------------------------------------------


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("parts", [1, 3])
def test_a_step_is_the_clipped_sum(strategy: str, reduction: str, parts: int) -> None:
    x, y = batch()
    dp = secure(classifier(), strategy=strategy, loss_reduction=reduction, expected_batch_size=4.0)
    for data in zip(x.chunk(parts), y.chunk(parts), strict=True):
        run(dp, data, reduction)
    want = {name: g / 4 for name, g in expected(classifier(), (x, y), strategy=strategy).items()}
    assert_same(step(dp), want, rtol=1e-5)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("clipping", ["flat", "automatic"])
def test_other_layers_agree_with_fast_mode(strategy: str, clipping: str) -> None:
    results = []
    for mode in ("fast", "secure"):
        model, ids, y = words()
        dp = engine(model, noise=Noise(mode=mode), strategy=strategy, clipping=clipping)
        run(dp, (ids, y))
        results.append(step(dp))
    error = 9 * grid_for(LIMIT, 0.0) * 1.1
    for name, g in results[0].items():
        torch.testing.assert_close(results[1][name], g, rtol=2e-3, atol=error * 20)
    assert any(not torch.equal(results[1][name], g) for name, g in results[0].items())


def test_loss_scale_and_half_precision() -> None:
    x, y = batch(16, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        dp = secure(classifier(torch.float32), loss_scale=1024.0)
        loss = F.cross_entropy(dp.model(x), y) * 1024.0
    loss.backward()
    want = expected(classifier(), (x.double(), y))
    assert_same(step(dp), want, rtol=0.05)


def test_micro_batches_in_any_order_are_the_same_bits() -> None:
    x, y = batch(8, torch.float32)
    results = []
    for order in itertools.islice(itertools.permutations(range(4)), 6):
        dp = secure(classifier(torch.float32), loss_reduction="sum")
        for i in order:
            run(dp, (x[2 * i : 2 * i + 2], y[2 * i : 2 * i + 2]), "sum")
        results.append(step(dp))
    for other in results[1:]:
        assert all(torch.equal(g, other[name]) for name, g in results[0].items())


# --- the release -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_output_is_a_multiple_of_the_grid(strategy: str, dtype: torch.dtype) -> None:
    dp = secure(classifier(dtype), strategy=strategy, noise_multiplier=1.3, expected_batch_size=8.0)
    grid = grid_for(LIMIT, 1.3 * LIMIT)
    for _ in range(5):
        run(dp, batch(10, dtype))
        for g in step(dp).values():
            steps = g.double() * 8 / grid
            assert torch.equal(steps, steps.round()) and bool((g != 0).all())


def test_fast_mode_is_off_that_grid() -> None:
    dp = engine(classifier(torch.float32), noise=Noise(), noise_multiplier=1.3, expected_batch_size=8.0)
    grid, off = grid_for(LIMIT, 1.3 * LIMIT), 0
    for _ in range(10):
        run(dp, batch(10, torch.float32))
        steps = torch.cat([g.flatten().double() * 8 / grid for g in step(dp).values()])
        off += int((steps != steps.round()).sum())
    assert off > 20


def test_the_noise_has_the_stated_standard_deviation() -> None:
    torch.manual_seed(0)
    dp = secure(nn.Linear(100, 300), max_grad_norm=0.5, noise_multiplier=3.0, expected_batch_size=7.0)
    run(dp, (torch.zeros(0, 100), torch.zeros(0, dtype=torch.int64)))
    values = torch.cat([g.flatten() for g in step(dp).values()])
    assert float(values.std()) == pytest.approx(3.0 * 0.5 / 7, rel=5 / math.sqrt(2 * len(values)))
    first = step(dp)
    assert all(g.any() for g in first.values()), "a step without a backward pass is noise alone"
    assert not torch.equal(first["weight"], step(dp)["weight"])


def test_a_step_draws_once_and_a_backward_pass_never() -> None:
    noise = Noise(mode="secure")
    dp = engine(classifier(), noise=noise, noise_multiplier=1.0)
    run(dp, batch())
    run(dp, batch())
    assert noise.next_draw() == 0
    step(dp)
    assert noise.next_draw() == 2


def test_metrics_tell_signal_and_norms() -> None:
    found = []
    for mode in ("fast", "secure"):
        dp = engine(classifier(), noise=Noise(mode=mode), noise_multiplier=1.0, measure_signal=True)
        run(dp, batch())
        step(dp)
        metrics = dp.metrics()
        values = metrics.signal_to_noise, metrics.clipped_fraction, metrics.norms
        found.append(tuple(value.reveal() for value in values))
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-5) and found[1][1] == found[0][1]
    torch.testing.assert_close(found[1][2], found[0][2], rtol=1e-4, atol=0.0)


# --- what is refused -------------------------------------------------------------------------------------------------


def test_the_threshold_may_change_between_steps_only() -> None:
    dp = secure(classifier(), loss_reduction="mean")
    want = expected(classifier(), batch())
    run(dp, batch())
    dp.max_grad_norm = 0.1
    with pytest.raises(PrivacyError, match="max_grad_norm: was changed between the backward passes"):
        run(dp, batch())
    dp.max_grad_norm = torch.tensor(LIMIT, dtype=torch.float64)
    assert_same(step(dp), want, rtol=1e-5)
    dp.max_grad_norm = 0.1
    run(dp, batch())
    assert_same(step(dp), expected(classifier(), batch(), limit=0.1), rtol=1e-5)


def test_a_noise_multiplier_that_changes_within_a_step_keeps_the_grid_of_the_sums() -> None:
    dp = secure(classifier(), noise_multiplier=1e-9)
    run(dp, batch())
    dp.noise_multiplier = 1e-8
    assert_same(step(dp), expected(classifier(), batch()), rtol=1e-4)
    run(dp, batch())
    dp.noise_multiplier = 1e4
    with pytest.raises(ValueError, match=r"std is .* below 2\^30 grids"):
        dp.optimizer.step()


def test_settings_that_do_not_go_with_it_are_refused() -> None:
    with pytest.raises(ValueError, match=r"strategy: is 'two_pass' with secure noise.*pass 'auto'"):
        secure(classifier(), strategy="two_pass")
    with pytest.raises(TypeError, match=r"noise: is str; pass adamix_kernels\.Noise"):
        engine(classifier(), noise="secure")
    for built, put in (("fast", "secure"), ("secure", "fast")):
        dp = engine(classifier(), noise=Noise(mode=built))
        run(dp, batch())
        dp.noise = Noise(mode=put)
        with pytest.raises(PrivacyError, match="noise: was replaced by one of another mode"):
            dp.optimizer.step()
    with pytest.raises(ValueError, match="max_grad_norm is 1e-30; pass a number in"):
        run(secure(classifier(), max_grad_norm=1e-30), batch())


def test_public_rows_and_validate_work_as_before() -> None:
    x, y = batch()
    dp = secure(classifier())
    assert dp.validate(x).samples == len(x)
    with dp.public():
        F.cross_entropy(dp.model(x), y).backward()
    public = {name: p.grad.clone() for name, p in dp.model.named_parameters() if p.grad is not None}
    run(dp, (x, y))
    want = {name: g + public[name] for name, g in expected(classifier(), (x, y)).items()}
    assert_same(step(dp), want, rtol=1e-5)
