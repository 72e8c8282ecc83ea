"""`python -m adamix_kernels`: versions, what runs where and why not, and how near the kernels come to this machine's
memory bandwidth."""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from typing import Any

import torch

from adamix_kernels import ClippedSum, Noise, backends, clip_sum_noise
from adamix_kernels.spec import AUTO_ORDER, OPS, use_backend

_PACKAGES = ("adamix", "torch", "triton", "numpy")
_SAMPLES, _PARAMETERS = 64, 1_000_000  # of the gradients that are timed: 256 MB, more than a cache holds
_CALLS = 9


def main(arguments: list[str] | None = None) -> None:
    """Print the report; with `--json` as one line for programs."""
    parser = argparse.ArgumentParser(prog="python -m adamix_kernels", description=__doc__)
    parser.add_argument("--json", action="store_true", help="one line of JSON instead of text")
    parser.add_argument("--no-bandwidth", action="store_true", help="measure nothing")
    options = parser.parse_args(arguments)
    report: dict[str, Any] = {"versions": versions(), "devices": devices(), "backends": backends()}
    if not options.no_bandwidth:
        report["bandwidth"] = {device: bandwidth(device) for device in report["devices"]}
    print(json.dumps(report) if options.json else "\n".join(text(report)))


def versions() -> dict[str, str | None]:
    """Of Python and the packages that matter; None for one that is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def devices() -> dict[str, str]:
    """Each device by torch's name for it."""
    found = {"cpu": f"{platform.machine()}, {torch.get_num_threads()} threads"}
    for index in range(torch.cuda.device_count()):
        found[f"cuda:{index}"] = torch.cuda.get_device_name(index)
    return found


def bandwidth(device: str) -> dict[str, Any]:
    """Bytes per second: `memory` of adding one tensor to another, `clip_sum_noise` by the least traffic that it needs.

    Raises:
        AssertionError: the op's result is not the reference's, so its time would say nothing.
    """
    grad_sample = torch.randn(_SAMPLES, _PARAMETERS, device=device)

    def call() -> ClippedSum:
        return clip_sum_noise(grad_sample, max_grad_norm=1.0, noise_multiplier=1.0, noise=Noise(seed=0))

    with use_backend("torch"):
        expected = call()
    torch.testing.assert_close(call().sum, expected.sum, rtol=1e-4, atol=1e-4)
    seconds = _seconds(call, device)
    least = OPS["clip_sum_noise"].cost(grad_sample=grad_sample).bytes
    other = torch.zeros_like(grad_sample)
    memory = 3 * other.nbytes / _seconds(lambda: other.add_(grad_sample), device)
    return {"memory": memory, "clip_sum_noise": least / seconds, "seconds": seconds}


def text(report: dict[str, Any]) -> Iterator[str]:
    """The report in lines: a table of ops, with a letter for each reason why a backend does not run."""
    yield ", ".join(f"{name} {found or 'not installed'}" for name, found in report["versions"].items())
    for device, description in report["devices"].items():
        yield f"{device}: {description}"
        if measured := report.get("bandwidth", {}).get(device):
            yield (
                f"  memory {measured['memory'] / 1e9:.1f} GB/s; clip_sum_noise of [{_SAMPLES}, {_PARAMETERS}] "
                f"{measured['clip_sum_noise'] / 1e9:.1f} GB/s ({1e3 * measured['seconds']:.1f} ms, checked)"
            )
    yield ""
    letters: dict[str, str] = {}
    width = max(map(len, report["backends"]))
    yield "  ".join(["op".ljust(width), *(name.ljust(6) for name in AUTO_ORDER)]).rstrip()
    for op, states in report["backends"].items():
        cells = []
        for name in AUTO_ORDER:
            state = states[name]
            cells.append("runs" if state == "runs" else letters.setdefault(state, chr(ord("a") + len(letters))))
        yield "  ".join([op.ljust(width), *(cell.ljust(6) for cell in cells)]).rstrip()
    yield ""
    for reason, letter in letters.items():
        yield f"{letter}: {reason}"


def _seconds(call: Callable[[], Any], device: str) -> float:
    """The median of `_CALLS`."""
    times = []
    for _ in range(_CALLS):
        begin = time.perf_counter()
        call()
        if device != "cpu":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


if __name__ == "__main__":
    main()
