"""What is trained of a model, as one argument."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small import PRIVATE, PUBLIC, conv_net, fit, vector
from torch import nn

from adamix import InputError
from adamix.deep import tune
from adamix.deep.tuning import find_head

pytestmark = pytest.mark.filterwarnings("ignore:epsilon. inf")


def transformer(kind: str) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    if kind == "vit":
        small = {"image_size": 4, "patch_size": 2, "num_channels": 1, "num_labels": 3, "intermediate_size": 32}
        return transformers.ViTForImageClassification(transformers.ViTConfig(**small, **shape))
    words = {"vocab_size": 20, "bos_token_id": 0, "eos_token_id": 0}
    if kind == "llama":
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(intermediate_size=32, **words, **shape))
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(n_positions=8, **words, **shape))


@pytest.mark.parametrize(
    ("kind", "mode", "head", "expected"),
    [
        ("vit", "head", None, {"classifier.weight", "classifier.bias"}),
        ("vit", "head", "vit.layernorm", {"vit.layernorm.weight", "vit.layernorm.bias"}),
        ("vit", "classifier.bias *position*", None, {"classifier.bias", "vit.embeddings.position_embeddings"}),
        ("gpt2", "head", None, {"transformer.wte.weight"}),  # tied to the head
        ("llama", "head", None, {"lm_head.weight"}),
    ],
)
def test_the_parameters_of_a_mode(kind: str, mode: str, head: str | None, expected: set[str]) -> None:
    model = transformer(kind)
    tuned = tune(model, mode, head=head)
    assert set(tuned.names) == expected == {n for n, p in model.named_parameters() if p.requires_grad}
    sizes = {n: p.numel() for n, p in model.named_parameters()}
    assert tuned.count == sum(sizes[n] for n in expected) and tuned.total == sum(sizes.values())
    assert f"{tuned.count:,} of {tuned.total:,} parameters are trained" in str(tuned)


@pytest.mark.parametrize("kind", ["vit", "gpt2"])
def test_biases(kind: str) -> None:
    model = transformer(kind)
    names = set(tune(model, "bias").names)
    assert names - {"classifier.weight"} == {n for n, _ in model.named_parameters() if n.endswith("bias")}
    assert ("classifier.weight" in names) == (kind == "vit")
    recurrent = nn.Sequential(nn.LSTM(4, 4), nn.MultiheadAttention(4, 1), nn.Linear(4, 3))
    names = set(tune(recurrent, "bias").names)
    assert names == {"0.bias_ih_l0", "0.bias_hh_l0", "1.in_proj_bias", "1.out_proj.bias", "2.weight", "2.bias"}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(("kind", "adapters"), [("vit", 12), ("gpt2", 8), ("llama", 14), ("plain", 1)])
def test_adapters(kind: str, adapters: int) -> None:
    pytest.importorskip("peft")
    plain = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.MultiheadAttention(8, 1), nn.Linear(8, 3))
    model = plain if kind == "plain" else transformer(kind)
    cls, before = type(model), {n: p.clone() for n, p in model.named_parameters()}
    tuned = tune(model, "lora", lora_rank=2)
    assert type(model) is cls
    found = [n for n in tuned.names if "lora_A" in n]
    assert len(found) == adapters and all(model.get_parameter(n).shape[0] == 2 for n in found)
    rest = set(tuned.names) - {n for n in tuned.names if ".lora_" in n}
    head = {"vit": "classifier", "plain": "3"}.get(kind)
    assert rest == ({f"{head}.weight", f"{head}.bias"} if head else set())
    now = {n.replace(".base_layer", ""): p for n, p in model.named_parameters()}
    assert all(torch.equal(now[n], p) for n, p in before.items())
    assert tune(model, "lora", lora_rank=2) == tuned, "no adapters on adapters"


@pytest.mark.parametrize(
    ("model", "given", "message"),
    [
        (
            conv_net(),
            {"mode": "lor"},
            "tune: 'lor' is none of full, head, bias, lora, and matches no parameter; pass one of them,",
        ),
        (conv_net(), {"mode": "4.* 7.*"}, "tune: '7.*' is none of"),
        (conv_net(), {"mode": "head", "head": "5"}, "head: '5' is no module with parameters in the model; its linear"),
        (conv_net(), {"mode": "lora"}, "tune: 'lora' given, but the model has no nn.Linear beside its head"),
        (nn.Sequential(nn.Conv2d(1, 1, 1)), {"mode": "head"}, "head: the model has no linear layer"),
        (nn.Linear(2, 2, bias=False), {"mode": "bias"}, "tune: 'bias' given, but the model has no bias"),
        (nn.Linear(2, 2).requires_grad_(False), {"mode": "full"}, "tune: 'full' given, but no parameter of the model"),
        (nn.ReLU(), {"mode": "full"}, "model: it has no parameters"),
    ],
)
def test_where_nothing_fits_it_says_what_there_is(model: nn.Module, given: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        tune(model, **given)
    assert str(caught.value).startswith(message)


def test_the_head_is_found() -> None:
    assert find_head(transformer("vit")) == "classifier" and find_head(transformer("gpt2")) == "lm_head"
    assert find_head(conv_net()) == "4"
    named = nn.ModuleDict({"fc": nn.Linear(2, 2), "aux": nn.Linear(2, 2)})
    assert find_head(named) == "fc"


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("mode", ["full", "head", "bias", "lora", ["4.*", "1.weight"]])
def test_a_run_trains_these_and_nothing_else(mode: Any) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.Tanh(), nn.LayerNorm(8), nn.Linear(8, 3))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    result = fit(model, tune=mode, public=PUBLIC, private=PRIVATE, strategy="per_layer")
    for name, p in model.named_parameters():
        old = before.get(name.replace(".base_layer", ""))
        same = old is not None and torch.equal(old, p)
        assert same == (name not in result.tuned.names), name
    assert set(result.trained_state()) == set(result.tuned.names) == set(result.public_state)
    assert vector(result).isfinite().all()
