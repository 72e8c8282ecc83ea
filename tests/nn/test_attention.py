import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from one_by_one import check, losses
from torch import nn

from adamix_kernels.nn import DPEngine, PrivacyError

B, T, S, E, HEADS = 4, 5, 6, 8, 2
DTYPES = [torch.float64, torch.float32]
PROJECTIONS = [
    pytest.param({}, id="packed"),
    pytest.param({"bias": False}, id="packed-without-bias"),
    pytest.param({"add_bias_kv": True, "add_zero_attn": True}, id="added-keys"),
    pytest.param({"kdim": 3, "vdim": 7}, id="separate"),
    pytest.param({"kdim": 3, "vdim": 7, "bias": False, "add_bias_kv": True}, id="separate-without-bias"),
]


def inputs(options, dtype=torch.float64, samples=B):
    torch.manual_seed(1)
    widths = (E, options.get("kdim", E), options.get("vdim", E))
    q, k, v = (torch.randn(samples, n, w, dtype=dtype) for n, w in zip((T, S, S), widths, strict=True))
    return q, k, v


def engine(model, **options):
    options = {"max_grad_norm": 1.0, "noise_multiplier": 0.0, "expected_batch_size": 4.0, **options}
    return DPEngine(model, torch.optim.SGD(model.parameters(), lr=0.0), **options)


def self_attention(model, x):
    return model(x, x, x)[0]


@pytest.mark.parametrize("options", PROJECTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_is_the_sum_of_clipped_gradients(options, dtype):
    torch.manual_seed(0)
    model = nn.MultiheadAttention(E, HEADS, batch_first=True, dtype=dtype, **options)
    if model.in_proj_bias is not None:
        nn.init.normal_(model.in_proj_bias)
    q, k, v = inputs(options, dtype)
    check(model, [q, k, v])
    check(model, [q, k, v], lambda m, *x: m(*x, need_weights=False)[0])
    if "kdim" not in options:
        check(model, [q], self_attention)
        check(model, [q, k], lambda m, q, k: m(q, k, k))
        check(model, [k, v], lambda m, k, v: m(k, k, v))
        check(model, [k, v], lambda m, k, v: m(k, v, k))


@pytest.mark.parametrize("options", PROJECTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_outputs_are_torchs(options, dtype):
    torch.manual_seed(0)
    small = 1e-10 if dtype == torch.float64 else 1e-5
    causal = torch.ones(T, S, dtype=torch.bool).triu(1)
    each = torch.rand(B * HEADS, T, S) > 0.7
    each[..., 0] = False
    padding = torch.arange(S) >= torch.tensor([[3], [6], [1], [5]])
    masks = [None, causal, torch.randn(T, S, dtype=dtype), each, torch.randn(B * HEADS, T, S, dtype=dtype)]
    paddings = [None, padding, torch.randn(B, S, dtype=dtype)]
    for batch_first, training, dropout in itertools.product((True, False), (True, False), (0.0, 0.4)):
        plain = nn.MultiheadAttention(E, HEADS, dropout, batch_first=batch_first, dtype=dtype, **options)
        private = copy.deepcopy(plain)
        engine(private)
        given = [x if batch_first else x.transpose(0, 1) for x in inputs(options, dtype)]
        private.train(training), plain.train(training)
        for mask, pad, need, average in itertools.product(masks, paddings, (True, False), (True, False)):
            for is_causal in (False, True) if mask is causal else (False,):
                call = {"attn_mask": mask, "key_padding_mask": pad, "need_weights": need}
                call |= {"average_attn_weights": average, "is_causal": is_causal}
                results = []
                for model in (plain, private):
                    torch.manual_seed(3)
                    # the model's input names the samples: dimension 0 of what it is called with
                    results.append(_Named(model, batch_first)(given, call))
                for got, expected in zip(results[1], results[0], strict=True):
                    torch.testing.assert_close(got, expected, rtol=small, atol=small, equal_nan=True)


class _Named:
    """Calls attention whose samples are in dimension 1 as a model would that has them in dimension 0."""

    def __init__(self, model, batch_first):
        self.model, self.batch_first = model, batch_first

    def __call__(self, given, call):
        if self.batch_first:
            return self.model(*given, **call)
        query, key, value = given
        weight = self.model.in_proj_weight if self.model.in_proj_weight is not None else self.model.q_proj_weight
        if hasattr(weight, "_dp_engine"):
            weight._dp_engine._forwards.batch_size = query.shape[1]
        return type(self.model).forward(self.model, query, key, value, **call)


def test_frozen_parts_and_learned_inputs():
    class Model(nn.Module):
        """Learned queries and a learned mask."""

        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(E, HEADS, batch_first=True)
            self.query, self.mask = nn.Parameter(torch.randn(1, T, E)), nn.Parameter(torch.randn(T, S))

        def forward(self, x):
            out = self.attention(self.query.expand(len(x), -1, -1), x, x, attn_mask=self.mask)
            again = self.attention(self.query.repeat(len(x), 1, 1), x, x, attn_mask=self.mask, need_weights=False)
            return *out, again[0]

    torch.manual_seed(0)
    x = torch.randn(B, S, E, dtype=torch.float64)
    check(Model().double(), [x])
    for frozen in ("in_proj_weight", "in_proj_bias", "in_proj", "out_proj", "out_proj.bias", "query"):
        model = Model().double()
        for name, p in model.named_parameters():
            p.requires_grad_(frozen not in name)
        check(model, [x])


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_transformer_layers(norm_first, dtype):
    torch.manual_seed(0)
    options = {"dim_feedforward": 12, "dropout": 0.0, "batch_first": True, "norm_first": norm_first, "dtype": dtype}
    encoder = nn.TransformerEncoderLayer(E, HEADS, **options)
    decoder = nn.TransformerDecoderLayer(E, HEADS, **options)
    q, k, _ = inputs({}, dtype)
    causal = nn.Transformer.generate_square_subsequent_mask(T, dtype=dtype)
    check(encoder, [q])
    check(encoder, [q], lambda m, x: m(x, src_mask=causal, is_causal=True))
    check(encoder, [q, torch.arange(T) >= torch.tensor([[3], [5], [1], [4]])], lambda m, x, p: m(x, None, p))
    check(decoder, [q, k], lambda m, q, k: m(q, k, tgt_mask=causal, tgt_is_causal=True))
    check(nn.Transformer(E, HEADS, 1, 1, **options), [q, k])
    stack = nn.TransformerEncoder(encoder, 2, enable_nested_tensor=False)
    check(stack, [q[:, :4]])  # as many steps as samples


@pytest.mark.parametrize("pattern", ["self", "cross", "both"])
def test_used_twice(pattern):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(E, HEADS, batch_first=True)

        def forward(self, x, y):
            first = self.attention(x, *((x, x) if pattern == "self" else (y, y)))[0]
            return self.attention(first, *((y, y) if pattern == "cross" else (first, first)))[0]

    torch.manual_seed(0)
    q, k, _ = inputs({})
    check(Twice().double(), [q, k])


def test_parametrized_weight():
    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.rand(3 * E, 1))

        def forward(self, weight):
            return weight * self.scale

    torch.manual_seed(0)
    model = nn.MultiheadAttention(E, HEADS, batch_first=True)
    nn.utils.parametrize.register_parametrization(model, "in_proj_weight", Scale())
    q, k, _ = inputs({})
    for call in (lambda m, q, k: m(q, q, q)[0], lambda m, q, k: m(q, k, k)[0]):
        check(model.double(), [q, k], call, ["book_keeping", "materialize", "two_pass"])


def test_samples_in_dimension_1():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention, self.head = nn.MultiheadAttention(E, HEADS), nn.Linear(E, 3)

        def forward(self, x):
            steps = x.transpose(0, 1)
            return self.head(self.attention(steps, steps, steps)[0].transpose(0, 1))

    torch.manual_seed(0)
    check(Model().double(), [torch.randn(B, T, E, dtype=torch.float64)])
    model = Model()
    engine(model)
    with pytest.raises(PrivacyError, match=r"as many steps as samples.*batch_first=True"):
        model(torch.randn(T, T, E))


def test_inputs_get_torchs_gradient():
    torch.manual_seed(0)
    model = nn.MultiheadAttention(E, HEADS, batch_first=True)
    given = [x.float().requires_grad_() for x in inputs({})]
    expected = torch.autograd.grad(losses(model(*given)).sum(), given)
    engine(model, loss_reduction="sum")
    losses(model(*given)).sum().backward()
    torch.testing.assert_close([x.grad for x in given], list(expected))


def test_empty_batch():
    model = nn.TransformerDecoderLayer(E, HEADS, 12, 0.0, batch_first=True)
    dp = engine(model)
    q, k, _ = inputs({}, torch.float32, 0)
    losses(model(q, k)).sum().backward()
    dp.optimizer.step()
    assert all(not p.grad.any() for p in model.parameters())


def test_refusals():
    model = nn.MultiheadAttention(E, HEADS)
    dp = engine(model)
    x = torch.randn(T, B, E)
    with pytest.raises(PrivacyError, match=r"'in_proj_weight'.*batch_first=True"):
        model(x, x, x)
    with pytest.raises(PrivacyError, match="without a dimension for samples"):
        model(x[0], x[0], x[0])
    dp._forwards.batch_size = B
    with pytest.raises(ValueError, match="as many samples of each"):
        nn.MultiheadAttention.forward(model, x, x[:, :1], x[:, :1])
    args = (x, x, x, E, HEADS, model.in_proj_weight, model.in_proj_bias, None, None, False, 0.0)
    with pytest.raises(PrivacyError, match="static_k"):
        F.multi_head_attention_forward(
            *args, model.out_proj.weight, model.out_proj.bias, static_k=torch.randn(B * HEADS, T, E // HEADS)
        )
    for wrong in ({"attn_mask": torch.zeros(1, T)}, {"key_padding_mask": torch.zeros(B, 1)}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            F.multi_head_attention_forward(*args, model.out_proj.weight, model.out_proj.bias, **wrong)
