"""The private step of a softmax classifier on features beside the ordinary gradient and the peers' private ones.

pytest benchmarks/test_head_step.py --benchmark-enable -s             on the CPU
pytest benchmarks/test_head_step.py --benchmark-enable -s -m gpu      on a GPU
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from head_peers import autograd, joined, not_private, peers
from interleaved import medians, show
from torch import Tensor, nn

import adamix_kernels as kernels
from adamix.config import Config
from adamix.mechanism import Mechanism
from adamix.models import trainable
from adamix.private_phase import private_phase
from adamix.rows import Rows

MAX_GRAD_NORM = 10.0


def works() -> list[Any]:
    """Rows, inputs, classes, dtype of the features, whether peers that form per-sample gradients take part, rounds."""
    cpu = [
        ("2000 x 1280 -> 10", 2000, 1280, 10, torch.float32, True, 15),
        ("5000 x 2048 -> 100", 5000, 2048, 100, torch.float32, False, 11),
        ("50000 x 2048 -> 100", 50_000, 2048, 100, torch.float32, False, 5),
        ("50000 x 2048 -> 1000", 50_000, 2048, 1000, torch.float32, False, 3),
        ("5000 x 2048 -> 100, bf16", 5000, 2048, 100, torch.bfloat16, False, 7),
    ]
    gpu = [
        ("5000 x 2048 -> 100", 5000, 2048, 100, torch.float32, True, 15),
        ("1e6 x 2048 -> 1000, bf16", 1_000_000, 2048, 1000, torch.bfloat16, False, 9),
    ]
    params = [pytest.param("cpu", *work, id=f"cpu-{work[0]}") for work in cpu]
    return params + [pytest.param("cuda", *work, id=f"cuda-{work[0]}", marks=pytest.mark.gpu) for work in gpu]


def exact(x: Tensor, y: Tensor, head: nn.Linear, rows: int = 4096) -> Tensor:
    """The definition, in float64."""
    total = torch.zeros(head.out_features, head.in_features + 1, dtype=torch.float64, device=x.device)
    weight, bias = head.weight.detach().double(), head.bias.detach().double()
    for block, label in zip(x.split(rows), y.split(rows), strict=True):
        wide = block.double()
        r = torch.addmm(bias, wide, weight.T).softmax(1)
        r[torch.arange(len(label), device=x.device), label] -= 1
        norm = (r.square().sum(1) * (wide.square().sum(1) + 1)).sqrt()
        r *= (MAX_GRAD_NORM / norm).clamp(max=1.0)[:, None]
        total += joined(r.T @ wide, r.sum(0))
    return total


@pytest.mark.parametrize(("device", "name", "rows", "inputs", "classes", "dtype", "materialise", "rounds"), works())
def test_head_step(
    benchmark: Any,
    capsys: Any,
    device: str,
    name: str,
    rows: int,
    inputs: int,
    classes: int,
    dtype: torch.dtype,
    materialise: bool,
    rounds: int,
) -> None:
    torch.manual_seed(0)
    x = torch.randn(rows, inputs, device=device).to(dtype)
    y = torch.randint(classes, (rows,), device=device)
    head = nn.Linear(inputs, classes, device=device)
    noise = kernels.Noise(seed=0)

    def ours(noise_multiplier: float) -> Tensor:
        with torch.no_grad():
            out = kernels.softmax_head_clip_sum_noise(
                x, y, head.weight, head.bias, MAX_GRAD_NORM, noise_multiplier, noise
            )
        return joined(out.weight, out.bias)

    expected = exact(x, y, head)
    contenders: dict[str, Any] = {"adamix_kernels": lambda: ours(0.0)}
    if dtype == torch.float32:  # they would need a bfloat16 head, which rounds its sums
        contenders.update(peers(x, y, head, MAX_GRAD_NORM, materialise))
    for contender, run in contenders.items():
        error = float((run().double() - expected).abs().max() / expected.abs().max())
        assert error < 1e-4, f"{contender} is off by {error:.3g} of the largest number"
    wide = x if dtype == torch.float32 else x.float()
    contenders["not private"] = lambda: not_private(wide, y, head)
    contenders["not private, autograd"] = lambda: autograd(wide, y, head)
    plain = contenders["not private"]()
    torch.testing.assert_close(
        contenders["not private, autograd"](), plain, rtol=1e-3, atol=1e-4 * float(plain.abs().max())
    )
    unclipped = kernels.softmax_head_clip_sum_noise(wide, y, head.weight.detach(), head.bias.detach())
    torch.testing.assert_close(
        joined(unclipped.weight, unclipped.bias), plain, rtol=1e-3, atol=1e-4 * float(plain.abs().max())
    )
    contenders["ours with noise"] = lambda: ours(1.0)
    z = (ours(1.0).double() - expected) / MAX_GRAD_NORM
    assert abs(float(z.std()) - 1) < 6 / (2 * z.numel()) ** 0.5 + 1e-3, "its noise has another standard deviation"
    times = medians(contenders, device, rounds)
    with capsys.disabled():
        show(f"{device} head step {name}", times, {"not private": times["not private"]})
    benchmark.group = f"head step {device}"
    benchmark.extra_info.update(device=device, work=name, seconds=times, flops=4 * rows * inputs * classes)
    benchmark.pedantic(contenders["ours with noise"], rounds=1)


def test_adamix_step(benchmark: Any, capsys: Any) -> None:
    """The trainer's own full-batch step, threshold and update included, beside an ordinary step on the same rows."""
    private, public, inputs, classes = 50_000, 1000, 2048, 100
    torch.manual_seed(0)
    x = torch.nn.functional.normalize(torch.randn(private + public, inputs), dim=1)
    y = torch.randint(classes, (private + public,))
    rows, few = Rows(x[public:], y[public:]), Rows(x[:public], y[:public])
    model = trainable(nn.Linear(inputs, classes))
    start = model.weights()
    settings = Config(epsilon=3.0, expected_batch_size=private, steps=100, geometry=None)
    mechanism = Mechanism(5.0, kernels.Noise(seed=0))
    steps = private_phase(model, few, rows, settings, mechanism, start=start, anchor=start)
    next(steps)  # makes the schedule
    plain = nn.Linear(inputs, classes)

    def ordinary() -> None:
        grad = not_private(x, y, plain)
        with torch.no_grad():
            plain.weight -= 1e-6 * grad[:, :-1]
            plain.bias -= 1e-6 * grad[:, -1]

    contenders = {"AdaMix step": lambda: next(steps), "not private": ordinary}
    grad = not_private(x[public:], y[public:], model.head)
    quiet, norm_sq, _ = model.clip_sum_noise(rows, max_grad_norm=float("inf"))
    torch.testing.assert_close(quiet, torch.cat([grad[:, :-1].flatten(), grad[:, -1]]), rtol=1e-3, atol=1e-3)
    assert len(norm_sq) == private
    times = medians(contenders, "cpu", 5)
    with capsys.disabled():
        title = f"full-batch step, {private} private and {public} public rows x {inputs} -> {classes}"
        show(title, times, {"not private": times["not private"]})
    assert (model.weights() - start).norm() > 0
    benchmark.group = "head step cpu"
    benchmark.extra_info.update(device="cpu", work="AdaMix step", seconds=times)
    benchmark.pedantic(contenders["AdaMix step"], rounds=1)
