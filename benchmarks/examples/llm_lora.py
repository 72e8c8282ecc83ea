"""LoRA on a language model with random weights, trained privately on sequences of a Markov chain; `--tiny` on a CPU."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from adamix.privacy import calibrate, spent
from adamix_kernels import DPEngine


def sequences(count: int, length: int, vocabulary: int) -> Tensor:
    """Each token follows the one before by one of two rules: `[count, length]`, about ln 2 a token at best."""
    tokens = torch.randint(vocabulary, (count, length))
    for t in range(1, length):
        tokens[:, t] = (3 * tokens[:, t - 1] + 1 + torch.randint(2, (count,))) % vocabulary
    return tokens


def main(argv: Sequence[str] | None = None) -> float:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="what runs where there is no GPU")
    tiny = parser.parse_args(argv).tiny or not torch.cuda.is_available()
    device = "cpu" if tiny else "cuda"
    width, layers, length, count, vocabulary = (64, 2, 16, 2048, 32) if tiny else (1024, 24, 512, 20_000, 1000)
    steps, rate = (40, 1 / 16) if tiny else (500, 1 / 400)
    delta = 1 / (10 * count)
    noise_multiplier = calibrate(8.0, delta=delta, steps=steps, sample_rate=rate)

    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "num_attention_heads": width // 16}
    config = LlamaConfig(vocab_size=vocabulary, num_hidden_layers=layers, max_position_embeddings=length, **sizes)
    lora = LoraConfig(r=8, target_modules=["q_proj", "v_proj", "up_proj"], modules_to_save=["lm_head"])
    model = get_peft_model(LlamaForCausalLM(config), lora).to(device)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2 if tiny else 2e-3)
    # A mean over tokens would depend on the other samples' lengths: sum, and let the engine divide.
    settings = {"noise_multiplier": noise_multiplier, "expected_batch_size": rate * count, "loss_reduction": "sum"}
    DPEngine(model, optimizer, max_grad_norm=1.0, **settings)
    tokens, loss = sequences(count, length, vocabulary).to(device), float("nan")
    for step in range(steps):
        batch = tokens[torch.rand(count, device=device) < rate]
        total = model(input_ids=batch, labels=batch, num_items_in_batch=1).loss
        total.backward()
        optimizer.step()
        optimizer.zero_grad()
        loss = total.item() / max(1, batch[:, 1:].numel())  # of private samples: for a look, not for a release
        if step % (steps // 4) == 0 or step == steps - 1:
            print(f"step {step}: {loss:.3f} a token")
    print(f"epsilon {spent(noise_multiplier, delta=delta, steps=steps, sample_rate=rate):.2f}, delta {delta:.1e}")
    return loss


if __name__ == "__main__":
    main()
