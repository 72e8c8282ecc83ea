"""What a saved result says of the machine: versions and the GPU, not the machine's name; date and commit it has anyway.

The files in `results` are what one command each has written, on a quiet machine, from a clean commit:

    pytest benchmarks/test_training_steps.py --benchmark-enable --benchmark-json=benchmarks/results/cpu_steps.json -s
    pytest benchmarks/test_{mixed_training,compiled_steps,subspace_steps,noise_modes}.py --benchmark-enable \
        --benchmark-json=benchmarks/results/cpu_scaling.json -s
    pytest benchmarks/test_plan.py --benchmark-enable --benchmark-json=benchmarks/results/cpu_plan.json -s

Of each benchmark `extra_info` has the medians, by contender; `stats` times one of them again.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch


def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    cpu = machine_info["cpu"]
    brand, count = cpu.get("brand_raw"), cpu.get("count")
    for name in set(machine_info) - {"machine", "python_version", "system"}:
        del machine_info[name]
    machine_info["cpu"], machine_info["cores"] = brand, count
    for package in ("adamix", "torch", "triton", "opacus", "numpy"):
        try:
            machine_info[package] = version(package)
        except PackageNotFoundError:
            machine_info[package] = None
    machine_info["threads"] = torch.get_num_threads()
    machine_info["gpu"] = torch.cuda.get_device_name() if torch.cuda.is_available() else None
