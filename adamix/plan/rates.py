"""How fast a machine is: seconds of an operation by its kind and size, measured (`measure.py`) or from data sheets."""

from __future__ import annotations

import bisect
import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adamix.durable import make_folder, replace_file
from adamix.errors import InputError
from adamix.plan.trace import ROWS, Call
from adamix.report import to_json
from adamix.storage import cache_root, one_line

_FORMAT = 2
_CONV = ("conv_norm_sq", "conv_clip_sum", "conv_norm_clip_sum")
#: Kinds whose time goes by floating point operations, if those take longer than their bytes.
BY_FLOPS = {"matmul", "bmm", "conv", "attention", "pool", *ROWS, *ROWS.values(), *_CONV, "conv_grad_sample"}

Curve = Sequence[tuple[float, float]]  # amounts (operations or bytes), ascending, and seconds


@dataclass(frozen=True)
class Rates:
    """Of one machine.

    Args:
        name: what it is called, such as "h200" or the processor's name.
        source: where the numbers are from, for the reader.
        measured: whether they were measured on the machine; what is not is said to be an estimate of an estimate.
        device: "cpu" or "cuda".
        memory: bytes of the device.
        reserved: bytes of them that the process takes before the first tensor.
        curves: by kind and dtype, "matmul.bfloat16": points of amount and seconds, between which the logarithms are
            interpolated; above the last the time grows in proportion, below the first it stays.
        host_per_call: seconds of the host for one operation beside the curve (autograd, Python): added on a CPU; on a
            GPU, which works meanwhile, the larger of both sums counts.
        host_per_use: seconds of the host for one trained parameter in one private backward pass.
        link: bytes per second and direction between two devices of one node, or None.
        network: the same between nodes, for each device.
        per_node: devices of a node.
    """

    name: str
    source: str
    measured: bool
    device: str
    memory: int
    curves: Mapping[str, Curve]
    reserved: int = 0
    host_per_call: float = 0.0
    host_per_use: float = 0.0
    link: float | None = None
    network: float | None = None
    per_node: int = 1
    made: str = ""  # date, and versions of the packages that were measured
    versions: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def seconds(self, call: Call) -> float:
        """Of one call, without the host."""
        return max(self.of_flops(call), self.of_bytes(call))

    def of_flops(self, call: Call) -> float:
        """Seconds that its floating point operations take, of kinds that go by them."""
        if call.kind not in BY_FLOPS:
            return 0.0
        return interpolate(self._curve(call.kind, call.dtype) or self._curve("matmul", call.dtype), call.flops)

    def of_bytes(self, call: Call) -> float:
        """Seconds that reading and writing takes."""
        own = () if call.kind in BY_FLOPS else self._curve(call.kind, call.dtype)
        return interpolate(own or self._curve("memory", call.dtype), call.bytes)

    def _curve(self, kind: str, dtype: str) -> Curve:
        return self.curves.get(f"{kind}.{dtype}") or self.curves.get(f"{kind}.float32") or ()

    def missing(self, kinds: set[str]) -> list[str]:
        """Kinds that no curve is of: they are taken for products, or for reading and writing."""
        return sorted(kind for kind in kinds if not any(key.split(".")[0] == kind for key in self.curves))

    def save(self, path: Path) -> None:
        make_folder(path.parent)
        replace_file(path, to_json({"format": _FORMAT, **dataclasses.asdict(self)}, indent=1).encode())

    @classmethod
    def load(cls, path: Path) -> Rates:
        """Raises InputError if it is missing, damaged or of another format."""
        try:
            record = json.loads(path.read_bytes())
            if record.pop("format") != _FORMAT:
                raise ValueError("another format")
            return cls(**record)
        except Exception as error:
            raise InputError(
                f"rates: {path} cannot be read ({one_line(error)}); measure anew with adamix plan --measure"
            ) from error


def interpolate(curve: Curve, amount: float) -> float:
    """Seconds for an amount; 0 of an empty curve."""
    if not curve:
        return 0.0
    amounts = [x for x, _ in curve]
    if amount <= amounts[0]:
        return curve[0][1]
    if amount >= amounts[-1]:
        return curve[-1][1] * amount / amounts[-1]
    after = bisect.bisect(amounts, amount)
    (x0, y0), (x1, y1) = curve[after - 1], curve[after]
    share = math.log(amount / x0) / math.log(x1 / x0)
    return math.exp((1 - share) * math.log(y0) + share * math.log(y1))


def default_path(device: str) -> Path:
    """Where `adamix plan --measure` keeps the rates of this machine: $ADAMIX_CACHE, else ~/.cache/adamix."""
    return cache_root() / f"rates-{device}.json"


#: What a kernel reaches of a data sheet's numbers, and what a launch costs: assumed, not measured.
EFFICIENCY, LAUNCH = 0.5, 5e-6
#: Dense operations per second, bytes per second and bytes of memory, and NVLink per direction, by NVIDIA's data sheets
#: (A100 SXM 80 GB, H100 SXM, H200 SXM). float32 products run on TF32 tensor cores only if torch is told to: not here.
_SHEETS: dict[str, dict[str, Any]] = {
    "a100": {"bfloat16": 312e12, "float32": 19.5e12, "bandwidth": 2.039e12, "memory": 80e9, "link": 300e9},
    "h100": {"bfloat16": 989e12, "float32": 67e12, "bandwidth": 3.35e12, "memory": 80e9, "link": 450e9},
    "h200": {"bfloat16": 989e12, "float32": 67e12, "bandwidth": 4.8e12, "memory": 141e9, "link": 450e9},
}
PRESETS = tuple(_SHEETS)


def preset(name: str) -> Rates:
    """Rates of a GPU by its data sheet, times `EFFICIENCY`: datasheet, not measured."""
    sheet = _SHEETS[name]
    bandwidth = sheet["bandwidth"] * EFFICIENCY
    curves = {f"{kind}.{dtype}": _line(sheet[dtype]) for kind in ("matmul", *BY_FLOPS) for dtype in _FLOATS}
    return Rates(
        name=name,
        source=f"datasheet, not measured: NVIDIA's numbers times {EFFICIENCY:g}, {LAUNCH * 1e6:g} us a kernel",
        measured=False,
        device="cuda",
        memory=int(sheet["memory"]),
        reserved=int(1e9),  # context, cuBLAS and allocator: assumed
        curves=curves | {"memory.float32": [(1.0, LAUNCH), *((x, LAUNCH + x / bandwidth) for x in _AMOUNTS)]},
        link=sheet["link"] * EFFICIENCY,
        network=50e9 * EFFICIENCY,  # one 400 Gb/s adapter for each GPU, as in NVIDIA's DGX
        per_node=8,
    )


_FLOATS = ("float32", "bfloat16")
_AMOUNTS = [10.0 ** (k / 2) for k in range(8, 28)]


def _line(operations: float) -> Curve:
    return [(1.0, LAUNCH), *((x, LAUNCH + x / (operations * EFFICIENCY)) for x in (y * 1e3 for y in _AMOUNTS))]
