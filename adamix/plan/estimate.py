"""Memory, time and communication of a training step, from its trace and a machine's rates."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from adamix.deep.sharding import blocks_of
from adamix.errors import InputError
from adamix.plan.models import Work, size
from adamix.plan.rates import Rates
from adamix.plan.steps import PRECISIONS, Setting, Traced, trace_step
from adamix.plan.trace import Call
from adamix_kernels.spec import OPS

SHARDINGS = ("none", "ddp", "fsdp")
#: Micro-batches are not searched beyond.
_MOST_ROWS = 1 << 16
_TRACES = 8


@dataclass(frozen=True)
class Memory:
    """Bytes of one device where a step holds most of them."""

    total: int
    parts: Mapping[str, int]
    phase: str  # of the step, in which it does


@dataclass(frozen=True)
class Time:
    """Seconds of a step. `total` has communication after the rest; overlapped with it a step takes `overlapped`."""

    total: float
    overlapped: float
    compute: float  # operations that are bound by arithmetic
    memory: float  # by reading and writing
    host: float  # Python and autograd; on a GPU what of it the device does not hide
    communication: float
    norms_and_sums: float  # of compute and memory: the ops of adamix_kernels but the noise
    noise: float
    phases: Mapping[str, float]  # of compute and memory, by part of the step


@dataclass(frozen=True)
class Communication:
    """Bytes that one device sends in a step, by collective."""

    parts: Mapping[str, int]

    @property
    def total(self) -> int:
        return sum(self.parts.values())


@dataclass(frozen=True)
class Estimate:
    """Of one device's step. Nothing of it is measured, only the rates may be."""

    parameters: int
    trained: int
    rows: int  # private rows of this device in a step
    micro_batch: int
    micro_batches: int
    memory: Memory
    time: Time
    communication: Communication
    missing: list[str]  # kinds of operations that the rates do not know


@dataclass(frozen=True)
class Job:
    """A training step to be planned.

    Args:
        work: the model, its inputs and its loss.
        setting: how one device trains.
        batch: private rows of a step, of all devices together: the expected batch size.
        devices: how many share them.
        sharding: "none" (one device), "ddp" (every device holds everything; the clipped sums are reduce-scattered, each
            device adds the noise of its part, the result is all-gathered), "fsdp" (parameters, sums and optimizer state
            are sharded; parameters are all-gathered block by block in the forward and in the backward pass, the sums
            reduce-scattered).
    """

    work: Work
    setting: Setting
    batch: int
    devices: int = 1
    sharding: str = "none"

    def __post_init__(self) -> None:
        for name in ("batch", "devices"):
            if getattr(self, name) < 1:
                raise InputError(f"{name}: {getattr(self, name)} is not valid here; pass a whole number above 0")
        if self.sharding not in SHARDINGS:
            raise InputError(f"sharding: {self.sharding!r} is not valid here; pass one of {', '.join(SHARDINGS)}")
        if (self.sharding == "none") != (self.devices == 1):
            raise InputError(f"sharding: {self.sharding!r} does not go with {self.devices} devices; "
                             "pass none for one device, ddp or fsdp for more")  # fmt: skip

    @property
    def rows(self) -> int:
        """Private rows of one device, rounded up."""
        return math.ceil(self.batch / self.devices)

    def without_privacy(self) -> Job:
        return dataclasses.replace(self, setting=dataclasses.replace(self.setting, strategy=None))

    def traced(self, micro_batch: int) -> Traced:
        accumulate = micro_batch < self.rows
        return _traced(self.work, self.setting, micro_batch, accumulate)

    def memory(self, micro_batch: int, rates: Rates) -> Memory:
        traced = self.traced(micro_batch)
        found = [
            Memory(sum(parts.values()), parts, phase)
            for phase, peak in traced.trace.peaks.items()
            for parts in [{"reserved": rates.reserved} | self._held(traced, peak)]
        ]
        return max(found, key=lambda memory: memory.total)

    def _held(self, traced: Traced, peak: Mapping[str, int]) -> dict[str, int]:
        """What one device holds of it."""
        if self.sharding != "fsdp":
            return dict(peak)
        sharded = ("parameters", "optimizer", "sums", "gradients", "temporaries of the update")
        parts = {name: math.ceil(n / self.devices) if name in sharded else n for name, n in peak.items()}
        blocks = blocks_of(traced.model)
        block, width = max(map(size, blocks)), PRECISIONS[self.setting.precision].itemsize
        root = size(traced.model) - sum(map(size, blocks)) if len(blocks) > 1 else 0
        # the root's own stay from the forward pass to the backward pass; of the blocks one is used, one prefetched
        parts["gathered parameters"] = width * (max(0, root) + min(2, len(blocks)) * block)
        parts["a block's sums before they are scattered"] = self._sum_width * max(size(b, trained=True) for b in blocks)
        return parts

    @property
    def _sum_width(self) -> int:
        """Bytes of one number of what is reduced: clipped sums are float32, ordinary gradients as the parameters."""
        return PRECISIONS[self.setting.precision].itemsize if self.setting.strategy is None else 4

    def communication(self, traced: Traced, micro_batches: int) -> Communication:
        share = (self.devices - 1) / self.devices
        whole, trained = size(traced.model), size(traced.model, trained=True)
        passes = micro_batches + bool(self.setting.public_rows)
        sums = math.ceil(self._sum_width * trained * share)
        if self.sharding == "ddp":
            parts = {"reduce-scatter of sums": sums, "all-gather of the noisy sums": sums}
        elif self.sharding == "fsdp":
            gathered = math.ceil(PRECISIONS[self.setting.precision].itemsize * whole * share)
            parts = {
                "all-gather of parameters, forward": passes * gathered,
                "all-gather of parameters, backward": passes * gathered,
                "reduce-scatter of sums": passes * sums,
            }
        else:
            parts = {}
        return Communication(parts)

    def estimate(self, micro_batch: int, rates: Rates) -> Estimate:
        """Of a step in micro-batches of so many rows.

        Raises:
            InputError: names the argument that does not fit, or says why the engine refuses the model.
        """
        if not 1 <= micro_batch <= self.rows:
            raise InputError(
                f"micro_batch: {micro_batch} is not valid here; pass 1 to {self.rows}, the rows of a device"
            )
        traced, repeats = self.traced(micro_batch), math.ceil(self.rows / micro_batch)
        communication = self.communication(traced, repeats)
        return Estimate(
            parameters=size(traced.model),
            trained=size(traced.model, trained=True),
            rows=self.rows,
            micro_batch=micro_batch,
            micro_batches=repeats,
            memory=self.memory(micro_batch, rates),
            time=self._time(traced, repeats, communication, rates),
            communication=communication,
            missing=rates.missing({call.kind for call in traced.trace.calls}),
        )

    def _time(self, traced: Traced, repeats: int, communication: Communication, rates: Rates) -> Time:
        seconds: defaultdict[str, float] = defaultdict(float)
        phases: defaultdict[str, float] = defaultdict(float)
        calls = 0
        for call, count in traced.trace.calls.items():
            times = count * (repeats if call.phase.startswith("private") else 1)
            own = self._share(call)
            by_flops, by_bytes = rates.of_flops(own), rates.of_bytes(own)
            spent = times * max(by_flops, by_bytes)
            seconds["compute" if by_flops > by_bytes else "memory"] += spent
            if call.kind.split(",")[0] in OPS:
                seconds["noise" if call.kind == "add_gaussian_noise_" else "norms_and_sums"] += spent
            phases[call.phase] += spent
            calls += times
        device = seconds["compute"] + seconds["memory"]
        host = calls * rates.host_per_call
        if self.setting.strategy is not None:
            host += traced.uses * repeats * rates.host_per_use
        if rates.device == "cuda":
            host = max(0.0, host - device)  # the device works meanwhile
        moving = self._moving(communication, rates)
        return Time(
            total=device + host + moving,
            overlapped=max(device + host, moving),
            compute=seconds["compute"],
            memory=seconds["memory"],
            host=host,
            communication=moving,
            norms_and_sums=seconds["norms_and_sums"],
            noise=seconds["noise"],
            phases=dict(phases),
        )

    def _share(self, call: Call) -> Call:
        """What one device does of it: its part of the noise, with FSDP of the whole update."""
        sharded = self.sharding == "fsdp" and call.phase == "update"
        if sharded or (self.sharding == "ddp" and call.kind == "add_gaussian_noise_"):
            return call._replace(bytes=math.ceil(call.bytes / self.devices))
        return call

    def _moving(self, communication: Communication, rates: Rates) -> float:
        if not communication.parts:
            return 0.0
        link = rates.link if self.devices <= rates.per_node else rates.network
        if link is None:
            raise InputError(
                "bandwidth: the rates do not say how fast devices reach each other; pass it in bytes per second"
            )
        return communication.total / link

    def largest_micro_batch(self, limit: int, rates: Rates) -> int:
        """A number of rows, of any batch, whose step takes at most `limit` bytes, and hardly 5 % below the largest; 0
        if one row takes more. Memory grows by nearly as much with each row, so few tries find it."""
        job = dataclasses.replace(self, batch=_MOST_ROWS * self.devices)
        known = {rows: job.memory(rows, rates).total for rows in (1, 16)}
        if known[1] > limit:
            return 0
        for _ in range(_TRACES):
            below = max(rows for rows, held in known.items() if held <= limit)
            above = min((rows for rows, held in known.items() if held > limit), default=_MOST_ROWS)
            near = above if above in known else max(rows for rows in known if rows != below)
            slope = max(1.0, (known[near] - known[below]) / (near - below))  # bytes of a row
            room = int((limit - known[below]) / slope)
            if above - below <= 1 or room <= below // 20:
                break
            rows = min(below + max(1, room - room // 100), above - 1)
            known[rows] = job.memory(rows, rates).total
        return max(rows for rows, held in known.items() if held <= limit)


@functools.lru_cache(maxsize=32)
def _traced(work: Work, setting: Setting, micro_batch: int, accumulate: bool) -> Traced:
    return trace_step(work, setting, micro_batch, accumulate)
