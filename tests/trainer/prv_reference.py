"""Bounds on epsilon of Poisson batches by an independent accountant, recorded in prv_reference.json.

Gopi et al. 2021 (arXiv 2106.02848), numerical composition with proven bounds, package prv-accountant:

    pip install prv-accountant==0.2.0
    python tests/trainer/prv_reference.py > tests/trainer/prv_reference.json
"""

from __future__ import annotations

import json
from typing import Any

#: sample rate, noise multiplier, steps, delta
GRID = [
    (q, sigma, steps, delta)
    for q, sigma in [
        (0.001, 0.6),
        (0.004, 0.8),
        (0.01, 1.0),
        (0.02, 2.0),
        (0.1, 1.5),
        (0.1, 4.0),
        (0.5, 3.0),
        (0.9, 8.0),
    ]
    for steps in (1, 20, 1000)
    for delta in (1e-5, 1e-7)
]
EPS_ERROR = 0.01


def bounds(q: float, sigma: float, steps: int, delta: float) -> dict[str, Any]:
    from prv_accountant import PoissonSubsampledGaussianMechanism, PRVAccountant

    mechanism = PoissonSubsampledGaussianMechanism(noise_multiplier=sigma, sampling_probability=q)
    accountant = PRVAccountant(mechanism, max_self_compositions=steps, eps_error=EPS_ERROR, delta_error=delta / 1000)
    low, _, high = accountant.compute_epsilon(delta, [steps])
    case = {"sample_rate": q, "noise_multiplier": sigma, "steps": steps, "delta": delta}
    return case | {"lower": float(low), "upper": float(high)}


if __name__ == "__main__":
    print("[\n" + ",\n".join(json.dumps(bounds(*case)) for case in GRID) + "\n]")
