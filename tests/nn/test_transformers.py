"""Models of Hugging Face transformers, as they are: norms and clipped sums as one sample at a time gives them."""

import pytest
import torch
import torch.nn.functional as F

transformers = pytest.importorskip("transformers")

from adamix_kernels import DPEngine  # noqa: E402

B, T, CLIP = 3, 7, 0.7
SIZES = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
TEXT = dict(SIZES, vocab_size=61)
STILL = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
GROUPED = dict(TEXT, num_key_value_heads=2)


def words():
    torch.manual_seed(0)
    mask = torch.ones(B, T, dtype=torch.long)
    mask[1, 5:] = 0
    return {"input_ids": torch.randint(4, 61, (B, T)), "attention_mask": mask}


def ended():
    """With an end of sequence, which Bart looks for."""
    return {"input_ids": F.pad(words()["input_ids"][:, :-1], (0, 1), value=2)}


def pictures():
    torch.manual_seed(0)
    return {"pixel_values": torch.randn(B, 3, 16, 16)}


def next_word(model, batch, labels):
    """The loss that the model makes itself, of the positions that are not padding, as a sum."""
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    return model(**batch, labels=labels, num_items_in_batch=1).loss


def classes(model, batch, labels):
    return F.cross_entropy(model(**batch).logits, labels, reduction="sum")


# class, its configuration, the batch, the loss
MODELS = {
    "gpt2": (  # its last layer is its embedding, its linear layers are Conv1D
        "GPT2LMHeadModel",
        dict(vocab_size=61, n_positions=16, n_embd=32, n_layer=2, n_head=4, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0),
        words,
        next_word,
    ),
    "llama": ("LlamaForCausalLM", GROUPED, words, next_word),
    "mistral": ("MistralForCausalLM", GROUPED, words, next_word),
    "qwen2": ("Qwen2ForCausalLM", GROUPED, words, next_word),
    "qwen3": ("Qwen3ForCausalLM", dict(GROUPED, head_dim=8), words, next_word),
    "phi": ("PhiForCausalLM", TEXT, words, next_word),
    "gpt-neox": ("GPTNeoXForCausalLM", TEXT, words, next_word),
    "mamba": (
        "MambaForCausalLM",
        dict(vocab_size=61, hidden_size=32, num_hidden_layers=2, state_size=4),
        words,
        next_word,
    ),
    "bert": ("BertForSequenceClassification", dict(TEXT, **STILL), words, classes),
    "roberta": ("RobertaForSequenceClassification", dict(TEXT, **STILL), words, classes),
    "electra": ("ElectraForSequenceClassification", dict(TEXT, embedding_size=16, **STILL), words, classes),
    "albert": (  # one layer, used twice
        "AlbertForSequenceClassification",
        dict(TEXT, embedding_size=16, classifier_dropout_prob=0, **STILL),
        words,
        classes,
    ),
    "bart": (
        "BartForSequenceClassification",
        dict(vocab_size=61, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4, dropout=0,
             decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=16),
        ended,
        classes,
    ),
    "vit": ("ViTForImageClassification", dict(SIZES, image_size=16, patch_size=8, **STILL), pictures, classes),
    "deit": ("DeiTForImageClassification", dict(SIZES, image_size=16, patch_size=8, **STILL), pictures, classes),
}  # fmt: skip


def case(name):
    kind, settings, batch, loss = MODELS[name]
    torch.manual_seed(1)
    model = getattr(transformers, kind)
    return model(model.config_class(**settings)).train(), batch(), torch.arange(B) % 2, loss


def one_at_a_time(model, batch, labels, loss):
    """Squared norms `[B]` and clipped sums, by plain autograd."""
    trained = list(model.parameters())
    norms, sums = [], [torch.zeros_like(p, dtype=torch.float64) for p in trained]
    for b in range(B):
        sample = {key: value[b : b + 1] for key, value in batch.items()}
        value = loss(model, sample, labels[b : b + 1])
        grads = torch.autograd.grad(value, trained, allow_unused=True, materialize_grads=True)
        norm = sum(g.double().square().sum() for g in grads)
        norms.append(norm)
        for total, grad in zip(sums, grads, strict=True):
            total.add_(grad.double(), alpha=min(1.0, CLIP / norm.sqrt().item()))
    return torch.stack(norms), sums


@pytest.mark.parametrize("name", MODELS)
def test_norms_and_clipped_sums(name):
    model, *given = case(name)
    norms, sums = one_at_a_time(model, *given)
    assert (norms.sqrt() > CLIP).any()
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    settings = {"max_grad_norm": CLIP, "noise_multiplier": 0, "expected_batch_size": 1, "loss_reduction": "sum"}
    dp = DPEngine(model, optimizer, **settings)
    loss = given[-1]
    loss(model, *given[:-1]).backward()
    torch.testing.assert_close(dp._sums.norm_sq[0].double(), norms, rtol=1e-4, atol=0)
    optimizer.step()
    largest = max(total.abs().max().item() for total in sums)
    for (key, p), total in zip(model.named_parameters(), sums, strict=True):
        torch.testing.assert_close(p.grad.double(), total, rtol=0, atol=1e-4 * largest, msg=key)
