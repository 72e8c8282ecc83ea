"""A `timm` vision transformer trained privately on digits; `--tiny` in seconds on a CPU.

Random weights learn little within a budget: begin with pretrained ones, `create_model(..., pretrained=True)`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import timm
import torch
import torch.nn.functional as F
from torch import Tensor

from adamix.datasets import digits
from adamix.privacy import calibrate, spent
from adamix_kernels import DPEngine


def images(flat: Tensor, size: int) -> Tensor:
    """The 8 x 8 digits as RGB images."""
    return F.interpolate(flat.view(-1, 1, 8, 8), size, mode="bilinear").expand(-1, 3, -1, -1) * 2 - 1


def main(argv: Sequence[str] | None = None) -> float:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="what runs where there is no GPU")
    tiny = parser.parse_args(argv).tiny or not torch.cuda.is_available()
    device = "cpu" if tiny else "cuda"
    found = digits()
    size = 8 if tiny else 224
    x, x_test = (images(torch.from_numpy(part), size).to(device) for part in (found.x, found.x_test))
    y, y_test = (torch.from_numpy(part).to(device) for part in (found.y, found.y_test))
    steps, rate = (60, 0.4) if tiny else (300, 0.2)
    delta = 1 / (10 * len(x))
    noise_multiplier = calibrate(8.0, delta=delta, steps=steps, sample_rate=rate)

    shape = {"img_size": 8, "patch_size": 2, "embed_dim": 24, "depth": 2} if tiny else {}
    name = "vit_tiny_patch16_224" if tiny else "vit_small_patch16_224"
    model = timm.create_model(name, num_classes=10, **shape).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2 if tiny else 1e-3)
    expected = rate * len(x)
    DPEngine(model, optimizer, max_grad_norm=1.0, noise_multiplier=noise_multiplier, expected_batch_size=expected)
    for _ in range(steps):
        rows = torch.rand(len(x), device=device) < rate  # a Poisson batch: each row by itself
        F.cross_entropy(model(x[rows]), y[rows]).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    with torch.no_grad():
        accuracy = (model(x_test).argmax(1) == y_test).float().mean().item()
    epsilon = spent(noise_multiplier, delta=delta, steps=steps, sample_rate=rate)
    print(f"accuracy {accuracy:.3f}, epsilon {epsilon:.2f}, delta {delta:.1e}")
    return accuracy


if __name__ == "__main__":
    main()
