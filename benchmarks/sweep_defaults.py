"""The one-at-a-time sweep behind the defaults of `adamix.Config`: prints the table of `benchmarks/defaults.md`.

    python benchmarks/sweep_defaults.py [--seeds 5]

Every figure is the error on VALIDATION rows, mean over seeds, in percent; test rows are not read. Only public benchmark
sets: a search like this on private rows would need a budget of its own.
"""

from __future__ import annotations

import argparse
import statistics
import warnings
from typing import Any

from rich.console import Console
from rich.progress import track

from adamix import AdaMix, Split, load_split

EPSILONS = (1.0, 3.0)
SETTINGS: dict[str, dict[str, Any]] = {
    "FM 5/1000": {"source": "fashion-mnist", "shots": 5, "private_rows": 1000},
    "FM 5/3000": {"source": "fashion-mnist", "shots": 5, "private_rows": 3000},
    "FM 2/1000": {"source": "fashion-mnist", "shots": 2, "private_rows": 1000},
    "Letter 5/1300": {"source": "letter", "shots": 5, "private_rows": 1300},
    "Letter 5/520": {"source": "letter", "shots": 5, "private_rows": 520},
    "Letter 2/1300": {"source": "letter", "shots": 2, "private_rows": 1300},
    "Pen 5/500": {"source": "pen-digits", "shots": 5, "private_rows": 500},
    "Satellite 5/300": {"source": "satellite", "shots": 5, "private_rows": 300},
}
VARIANTS: list[dict[str, Any]] = [
    {},
    *({"logit_noise": v} for v in (0.2, 0.4, 0.6, 0.8, 1.0, 1.5)),
    *({"steps": v} for v in (5, 10, 40)),
    *({"quantile": v} for v in (0.5, 0.75, 1.0)),
    {"quantile": None, "max_grad_norm": 1.0},
    *({"public_weight": v} for v in (0.0, 5.0, 20.0)),
    *({"anchor": v} for v in (0.0, 1e-4, 1e-3)),
    *({"public_l2": v} for v in (1e-4, 3e-4, 3e-3, 1e-2)),
    {"warm_start": False},
    {"geometry": None},
    {"subspace_energy": 0.95},
]


def validation_error(split: Split, epsilon: float, variant: dict[str, Any], seed: int) -> float:
    trainer = AdaMix(epsilon=epsilon, expected_batch_size=split.expected_batch_size, noise_seed=seed, **variant)
    result = trainer.fit(public=split.public, private=split.private, test=split.validation)
    assert result.test_error is not None
    return result.test_error


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    seeds = range(parser.parse_args().seeds)
    warnings.filterwarnings("ignore", "noise_seed")
    splits = {name: [load_split(**how, seed=seed) for seed in seeds] for name, how in SETTINGS.items()}
    columns = [f"{name} @{epsilon:g}" for name in SETTINGS for epsilon in EPSILONS]
    print("| variant | " + " | ".join(columns) + " | mean |\n|---|" + "--:|" * (len(columns) + 1))
    for variant in track(VARIANTS, description="variants", console=Console(stderr=True)):
        errors = [
            statistics.fmean(validation_error(splits[name][seed], epsilon, variant, seed) for seed in seeds)
            for name in SETTINGS
            for epsilon in EPSILONS
        ]
        title = ", ".join(f"{key}={value}" for key, value in variant.items()) or "default"
        cells = " | ".join(f"{error:.1f}" for error in errors)
        print(f"| {title} | {cells} | {statistics.fmean(errors):.2f} |", flush=True)


if __name__ == "__main__":
    main()
