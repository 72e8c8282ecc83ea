import copy

import pytest
import torch
from one_by_one import STRATEGIES
from torch import nn

from adamix_kernels.nn import DPEngine

MODELS = [
    pytest.param(lambda: nn.LSTM(4, 4, 2, batch_first=True), id="lstm"),
    pytest.param(lambda: nn.GRU(4, 4, batch_first=True, bidirectional=True), id="gru"),
    pytest.param(lambda: nn.RNN(4, 4, batch_first=True), id="rnn"),
    pytest.param(lambda: nn.TransformerDecoderLayer(4, 2, 8, 0.0, batch_first=True), id="attention"),
]


@pytest.mark.parametrize("make", MODELS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_sample_that_is_no_number_adds_nothing(make, strategy):
    torch.manual_seed(0)
    model, x = make(), torch.randn(3, 5, 4)

    def grads(y):
        private = copy.deepcopy(model)
        dp = DPEngine(
            private,
            torch.optim.SGD(private.parameters(), lr=0.0),
            max_grad_norm=0.1,
            noise_multiplier=0.0,
            expected_batch_size=1.0,
            strategy=strategy,
            loss_reduction="sum",
        )
        out = private(y, y.flip(1)) if isinstance(model, nn.TransformerDecoderLayer) else private(y)[0]
        dp.backward(out.square().sum())
        dp.optimizer.step()
        return [p.grad.data for p in private.parameters()]

    expected = grads(x[[0, 2]])
    for bad in (torch.nan, torch.inf):
        hostile = x.clone()
        hostile[1, 2] = bad
        torch.testing.assert_close(grads(hostile), expected)
