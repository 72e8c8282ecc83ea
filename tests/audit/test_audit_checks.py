"""The checks of noise and sampling: each fault they are for is found, and honest draws pass."""

from __future__ import annotations

import math

import numpy as np
import pytest

from adamix.audit.checks import LEVEL, Check, reuse, sampling, standard_deviation

ROWS, STEPS, RATE = 1000, 200, 0.1


@pytest.fixture
def chance() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.mark.parametrize("factor", [0.99, 1.01])
def test_one_percent_of_noise_is_noticed(factor: float, chance: np.random.Generator) -> None:
    noise = [chance.normal(size=500_000) for _ in range(2)]
    assert standard_deviation("", noise).passed
    assert not standard_deviation("", [factor * part for part in noise]).passed


def test_reuse_is_noticed(chance: np.random.Generator) -> None:
    first, second = chance.normal(size=(2, 20_000))
    assert reuse("", [first, second]).passed
    assert not reuse("", [first, second, first]).passed
    assert not reuse("", [first, -first]).passed
    assert not reuse("", [first, 0.1 * first + second]).passed  # a weak share, at the same place
    assert not reuse("", [first, np.roll(first, 777)]).passed
    assert not reuse("", [np.tile(first[:5000], 4)]).passed  # within one vector


def test_a_measure_that_is_no_number_fails() -> None:
    assert not Check("", "", math.nan).passed


def faults(chance: np.random.Generator) -> dict[str, np.ndarray]:
    coins = chance.random((STEPS, ROWS)) < RATE
    shuffled = np.stack([chance.permutation(ROWS) for _ in range(STEPS)])
    epochs = np.concatenate([chance.permutation(ROWS).reshape(10, -1) for _ in range(STEPS // 10)])
    by_epoch = np.zeros((STEPS, ROWS), bool)
    np.put_along_axis(by_epoch, epochs, True, 1)
    return {
        "rate": chance.random((STEPS, ROWS)) < 1.05 * RATE,
        "batch sizes": shuffled < RATE * ROWS,  # fixed
        "times a row is taken": by_epoch,  # once in an epoch
        "step after step": np.repeat(coins[::2], 2, 0),
        "row beside row": np.repeat(coins[:, ::2], 2, 1),
    }


@pytest.mark.parametrize("fault", list(faults(np.random.default_rng(0))))
def test_faults_of_a_sampler_are_noticed(fault: str, chance: np.random.Generator) -> None:
    found = {check.name.split(": ")[1]: check for check in sampling("sampler", faults(chance)[fault], RATE)}
    assert not found[fault].passed


def test_few_steps_raise_no_false_alarm(chance: np.random.Generator) -> None:
    """The variance of twenty batch sizes is far from normal: 12 of 3000 would be below 0.001 if it were taken so."""
    tables = (chance.random((20, 300)) < RATE for _ in range(3000))
    p = [sampling("", table, RATE)[1].p_value for table in tables]
    assert sum(value < 1e-3 for value in p) < 9  # 3 are expected
    assert min(p) > LEVEL / 10


@pytest.mark.parametrize("rate", [0.02, 0.1, 0.6])
def test_honest_samplers_pass(rate: float) -> None:
    """The p-values are those of chance: of 300 about one in a hundred is below that."""
    chance = np.random.default_rng(7)
    p = [c.p_value for _ in range(60) for c in sampling("", chance.random((STEPS, ROWS)) < rate, rate)]
    assert min(p) > LEVEL
    assert np.mean(np.array(p) < 0.01) < 0.04
    assert 0.3 < np.mean(np.array(p) < 0.5) < 0.7
