"""A plain CNN trained privately: on Fashion-MNIST with a GPU, `--tiny` on the digits of scikit-learn in seconds."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adamix.datasets import digits
from adamix.images import open_images
from adamix.privacy import calibrate, spent
from adamix_kernels import DPEngine


def data(tiny: bool) -> tuple[Tensor, ...]:
    if tiny:
        x, y, x_test, y_test = map(torch.as_tensor, digits()[:4])
        return x.view(-1, 1, 8, 8), y, x_test.view(-1, 1, 8, 8), y_test
    parts = []
    for source in map(open_images, ("fashion-mnist:train", "fashion-mnist:test")):
        images = np.stack([np.asarray(source.read(row).convert("L")) for row in range(len(source.y))])
        parts += [torch.from_numpy(images)[:, None] / 255, torch.from_numpy(source.y)]
    return tuple(parts)


def main(argv: Sequence[str] | None = None) -> float:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="what runs where there is no GPU")
    tiny = parser.parse_args(argv).tiny or not torch.cuda.is_available()
    device = "cpu" if tiny else "cuda"
    x, y, x_test, y_test = (part.to(device) for part in data(tiny))
    width, rate, steps = (16, 0.2, 60) if tiny else (64, 1 / 30, 600)
    delta, expected = 1 / (10 * len(x)), rate * len(x)
    noise_multiplier = calibrate(8.0, delta=delta, steps=steps, sample_rate=rate)

    layers: list[nn.Module] = []
    for channels in (1, width):
        layers += [nn.Conv2d(channels, width, 3, padding=1), nn.GroupNorm(4, width), nn.ReLU(), nn.MaxPool2d(2)]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(width * (x.shape[-1] // 4) ** 2, 10)).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.9)
    DPEngine(model, optimizer, max_grad_norm=1.0, noise_multiplier=noise_multiplier, expected_batch_size=expected)
    for _ in range(steps):
        rows = torch.rand(len(x), device=device) < rate  # a Poisson batch: each row by itself
        F.cross_entropy(model(x[rows]), y[rows]).backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        accuracy = (model(x_test).argmax(1) == y_test).float().mean().item()
    epsilon = spent(noise_multiplier, delta=delta, steps=steps, sample_rate=rate)
    print(f"accuracy {accuracy:.3f}, epsilon {epsilon:.2f}, delta {delta:.1e}")
    return accuracy


if __name__ == "__main__":
    main()
