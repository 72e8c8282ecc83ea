import itertools

import pytest
import torch
from one_by_one import check, losses
from torch import nn

from adamix_kernels.nn import DPEngine, PrivacyError

LAYERS = [
    pytest.param(nn.LSTM, {}, id="lstm"),
    pytest.param(nn.LSTM, {"proj_size": 3}, id="lstm-projected"),
    pytest.param(nn.GRU, {}, id="gru"),
    pytest.param(nn.RNN, {"nonlinearity": "tanh"}, id="tanh"),
    pytest.param(nn.RNN, {"nonlinearity": "relu"}, id="relu"),
]
CELLS = [
    pytest.param(nn.LSTMCell, {}, id="lstm"),
    pytest.param(nn.GRUCell, {}, id="gru"),
    pytest.param(nn.RNNCell, {"nonlinearity": "tanh"}, id="tanh"),
    pytest.param(nn.RNNCell, {"nonlinearity": "relu"}, id="relu"),
]
B, T, H = 4, 6, 7
I = 5  # noqa: E741  as the shapes are written


def first(result):
    """Outputs, and states with the samples first."""
    out, states = result
    return out, *(h.transpose(0, 1) for h in (states if isinstance(states, tuple) else (states,)))


def batch_first(model, x, *states):
    states = tuple(h.transpose(0, 1).contiguous() for h in states)
    return first(model(x, *([states if len(states) > 1 else states[0]] if states else [])))


def engine(model, **options):
    options = {"max_grad_norm": 1.0, "noise_multiplier": 0.0, "expected_batch_size": 4.0, **options}
    return DPEngine(model, torch.optim.SGD(model.parameters(), lr=0.0), **options)


@pytest.mark.parametrize(("layer", "options"), LAYERS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_is_the_sum_of_clipped_gradients(layer, options, dtype):
    torch.manual_seed(0)
    for layers, bidirectional, bias in itertools.product((1, 2), (False, True), (True, False)):
        model = layer(
            I, H, layers, batch_first=True, bidirectional=bidirectional, bias=bias, dtype=dtype, **options,
        )  # fmt: skip
        check(model, [torch.randn(B, T, I, dtype=dtype)], batch_first)


@pytest.mark.parametrize(("layer", "options"), LAYERS)
def test_states_and_their_gradients(layer, options):
    torch.manual_seed(0)

    class Learned(nn.Module):
        """States that are computed of samples, and one that is learned."""

        def __init__(self):
            super().__init__()
            self.layer = layer(I, H, 2, batch_first=True, **options)
            self.to_state, self.to_cell = nn.Linear(I, options.get("proj_size", H)), nn.Linear(I, H)
            self.start = nn.Parameter(torch.randn(1, 1, options.get("proj_size", H)))

        def forward(self, x):
            state = self.to_state(x[:, 0])[None] + torch.zeros(2, 1, 1, dtype=x.dtype)
            cell = self.to_cell(x[:, 1])[None].expand(2, -1, -1).contiguous()
            out, ends = first(self.layer(x, (state, cell) if layer is nn.LSTM else state))[:2]
            learned = self.start.expand(2, len(x), -1)
            again = self.layer(x.flip(1), (learned, cell) if layer is nn.LSTM else learned)
            return out, ends, *first(again)

    check(Learned().double(), [torch.randn(B, T, I, dtype=torch.float64)])


def test_last_states_alone():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(9, I), nn.LSTM(I, H, batch_first=True, bidirectional=True))
    check(model.double(), [torch.randint(9, (B, T))], lambda m, x: m(x)[1][1].transpose(0, 1))
    check(model.double(), [torch.randint(9, (B, T))], lambda m, x: m(x)[0][:, -1])


@pytest.mark.parametrize(("layer", "options"), LAYERS)
def test_steps_first(layer, options):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.layer, self.head = nn.Embedding(9, I), layer(I, H, **options), None
            self.head = nn.Linear(options.get("proj_size", H), 3)

        def forward(self, ids):
            return self.head(self.layer(self.embedding(ids).transpose(0, 1))[0][-1])

    torch.manual_seed(0)
    check(Model().double(), [torch.randint(9, (B, T))])
    model = Model()
    engine(model)
    with pytest.raises(PrivacyError, match=r"as many steps as samples.*batch_first=True"):
        model(torch.randint(9, (T, T)))


def test_steps_first_needs_samples():
    model = nn.LSTM(I, H)
    engine(model)
    with pytest.raises(PrivacyError, match=r"weight_ih_l0.*batch_first=True"):
        model(torch.randn(T, B, I))


@pytest.mark.parametrize(("cell", "options"), CELLS)
@pytest.mark.parametrize("bias", [True, False])
def test_cells(cell, options, bias):
    class Loop(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell, self.start = cell(I, H, bias, **options), nn.Linear(I, H)

        def forward(self, x):
            start = self.start(x[:, 0])
            states, outs = (start, start.tanh()) if cell is nn.LSTMCell else start, []
            for t in range(x.shape[1]):
                states = self.cell(x[:, t], states)
                outs.append(states[0] if cell is nn.LSTMCell else states)
            return torch.stack(outs, 1), states

    torch.manual_seed(0)
    for dtype in (torch.float64, torch.float32):
        check(Loop().to(dtype), [torch.randn(B, T, I, dtype=dtype)])
        check(cell(I, H, bias, **options).to(dtype), [torch.randn(B, I, dtype=dtype)])


def test_dropout_between_layers():
    torch.manual_seed(0)
    x = torch.randn(B, T, I)
    for p in (0.0, 1.0):
        check(nn.GRU(I, H, 3, batch_first=True, dropout=p), [x], batch_first)
    model = nn.GRU(I, H, 2, batch_first=True, dropout=0.5)
    plain = model(x)[0]
    engine(model)
    assert not torch.equal(model(x)[0], model(x)[0])
    model.eval()
    assert torch.equal(model(x)[0], model(x)[0])
    assert model(x)[0].shape == plain.shape


def test_inputs_get_torchs_gradient():
    torch.manual_seed(0)
    model = nn.LSTM(I, H, 2, batch_first=True, bidirectional=True)
    x = torch.randn(B, T, I, requires_grad=True)
    expected = torch.autograd.grad(losses(batch_first(model, x)).sum(), x)
    engine(model, loss_reduction="sum")
    losses(batch_first(model, x)).sum().backward()
    torch.testing.assert_close(x.grad, expected[0])


def test_frozen_parts():
    torch.manual_seed(0)
    x = torch.randn(B, T, I, dtype=torch.float64)
    for frozen in ("weight_ih_l0", "bias_hh_l1", "weight_hh_l0", "l0", "weight"):
        model = nn.GRU(I, H, 2, batch_first=True, dtype=torch.float64)
        for name, p in model.named_parameters():
            p.requires_grad_(frozen not in name)
        check(model, [x], batch_first)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint(reentrant):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.layer = nn.Linear(I, I), nn.LSTM(I, H, batch_first=True)

        def forward(self, x):
            run = torch.utils.checkpoint.checkpoint
            return run(lambda y: self.layer(y)[0], self.first(x), use_reentrant=reentrant)

    class Plain(Model):
        def forward(self, x):
            return self.layer(self.first(x))[0]

    torch.manual_seed(0)
    x, model = torch.randn(B, T, I), Plain()
    results = []
    for kind in (Plain, Model):
        model.__class__ = kind
        dp = engine(model, max_grad_norm=0.5)
        dp.backward(losses(model(x)).mean())
        dp.optimizer.step()
        results.append([p.grad.clone() for p in model.parameters()])
        model.zero_grad()
        dp.detach()
    torch.testing.assert_close(*results)


@pytest.mark.parametrize(("layer", "options"), LAYERS)
def test_narrow_numbers(layer, options):
    torch.manual_seed(0)
    x, model = torch.randn(B, T, I), layer(I, H, batch_first=True, **options)
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(x)[0]
        dp = engine(model, max_grad_norm=0.1, expected_batch_size=1.0)
        out = model(x)[0]
    assert out.dtype == expected.dtype
    assert torch.equal(out, expected)
    out.float().square().sum((1, 2)).mean().backward()
    dp.optimizer.step()
    total = sum(float(p.grad.square().sum()) for p in model.parameters()) ** 0.5
    assert 0 < total <= B * 0.1


def test_learned_input_of_a_cell():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell, self.start = nn.GRUCell(I, H), nn.Parameter(torch.randn(H))
            self.expands = False

        def forward(self, x):
            zeros = x.new_zeros(len(x), H)
            return self.cell(x, self.start.expand(len(x), -1) if self.expands else self.start + zeros)

    torch.manual_seed(0)
    model, x = Model().double(), torch.randn(B, I, dtype=torch.float64)
    check(model, [x])
    model.expands = True
    engine(model)
    with pytest.raises(PrivacyError, match=r"'start'.*zeros"):
        model(x)


def test_empty_batch():
    model = nn.LSTM(I, H, batch_first=True)
    dp = engine(model)
    losses(batch_first(model, torch.zeros(0, T, I))).sum().backward()
    dp.optimizer.step()
    assert all(not p.grad.any() for p in model.parameters())


def test_refusals():
    model = nn.GRU(I, H, batch_first=True)
    engine(model)
    x = torch.randn(B, T, I)
    with pytest.raises(PrivacyError, match="pad"):
        model(nn.utils.rnn.pack_padded_sequence(x, [6, 5, 2, 1], batch_first=True))
    with pytest.raises(PrivacyError, match="Dimension 0 must be the batch"):
        model(x[0])

    class Start(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.start = nn.GRU(I, H, batch_first=True), nn.Parameter(torch.zeros(1, 1, H))

        def forward(self, x):
            return self.layer(x, self.start.repeat(1, len(x), 1))

    model = Start()
    engine(model)
    with pytest.raises(PrivacyError, match=r"'start'.*expand"):
        model(x)
