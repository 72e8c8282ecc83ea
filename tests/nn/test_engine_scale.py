"""What the loss and the batch are scaled with leaves what is clipped, and what is released, as stated."""

from __future__ import annotations

import pytest
import torch.nn.functional as F
from plain_loop import STRATEGIES, assert_same, batch, classifier, engine, expected, per_sample, run, step


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("expected_batch_size", [1.0, 64.0])
def test_a_scaled_loss_is_clipped_as_the_loss_itself(strategy: str, expected_batch_size: float) -> None:
    """Some samples are above the threshold and some below."""
    x, y = batch()
    grads = per_sample(classifier(), lambda m, b: F.cross_entropy(m(x[b : b + 1]), y[b : b + 1]), len(x))
    norms = sorted(sum(float(g.square().sum()) for g in row.values()) ** 0.5 for row in grads)
    limit = norms[5]
    assert norms[0] < 0.9 * limit < 1.1 * limit < norms[-1]
    settings = {"strategy": strategy, "max_grad_norm": limit, "expected_batch_size": expected_batch_size}
    dp = engine(classifier(), loss_scale=2.0**12, **settings)
    dp.backward(F.cross_entropy(dp.model(x), y) * 2.0**12)
    released = {name: g * expected_batch_size for name, g in step(dp).items()}
    assert_same(released, expected(classifier(), (x, y), limit, strategy))


def test_the_expected_batch_size_of_the_step_is_what_sums_are_divided_by() -> None:
    """Whatever it was in the backward passes: the noise is that of the step as well."""
    want = {name: 2 * g / 8 for name, g in expected(classifier(), batch()).items()}
    dp = engine(classifier())
    for size in (1.0, 4.0):
        dp.expected_batch_size = size
        run(dp, batch())
    dp.expected_batch_size = 8.0
    assert_same(step(dp), want)
