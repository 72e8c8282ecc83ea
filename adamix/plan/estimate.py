"""Memory, time and communication of a training step, from its trace and a machine's rates."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from adamix.errors import InputError
from adamix.plan.models import Work, size
from adamix.plan.rates import Rates
from adamix.plan.sharding import Message, Parameter, Spread, parameters_of
from adamix.plan.steps import Setting, Traced, trace_step
from adamix.plan.trace import Call
from adamix_kernels.spec import OPS

#: Micro-batches are not searched beyond.
_MOST_ROWS = 1 << 16
_TRACES = 8
NOISE = ("add_gaussian_noise_", "grid_release")


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
    """Bytes that one device sends in a step, by collective, where each runs over a ring (`adamix.plan.sharding`)."""

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
            reduce-scattered), "hsdp" (the same within each of `replicas` copies, and sums are all-reduced over copies).
        replicas: copies of the model, of "hsdp" alone.
    """

    work: Work
    setting: Setting
    batch: int
    devices: int = 1
    sharding: str = "none"
    replicas: int | None = None

    def __post_init__(self) -> None:
        for name in ("batch", "devices"):
            if getattr(self, name) < 1:
                raise InputError(f"{name}: {getattr(self, name)} is not valid here; pass a whole number above 0")
        by_layer = self.setting.strategy == "per_layer" and self.setting.noise_mode == "secure"
        if self.spread.devices > 1 and by_layer and self.setting.public_rows:
            raise InputError(
                "noise_mode: secure noise over several devices does not go with thresholds of layers that public rows "
                "set; pass strategy auto, or no public rows"
            )

    @functools.cached_property
    def spread(self) -> Spread:
        return Spread.of(self.sharding, self.devices, self.replicas)

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
        """Where a step holds most."""
        return max(self.memory_by_phase(micro_batch, rates), key=lambda memory: memory.total)

    def memory_by_phase(self, micro_batch: int, rates: Rates) -> list[Memory]:
        traced = self.traced(micro_batch)
        parameters = parameters_of(traced.model)
        return [
            Memory(sum(parts.values()), parts, phase)
            for phase, peak in traced.trace.peaks.items()
            for held in [self.spread.held(parameters, self.setting, peak, phase)]
            for parts in [{"reserved": rates.reserved} | held]
        ]

    def messages(self, traced: Traced, passes: int) -> list[Message]:
        layers = len({name.rpartition(".")[0] for name in traced.trained}) if self.by_layer else 1
        parameters: list[Parameter] = parameters_of(traced.model)
        return list(self.spread.messages(parameters, self.setting, passes, layers))

    @property
    def by_layer(self) -> bool:
        return self.setting.strategy == "per_layer"

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
        messages = self.messages(traced, repeats)
        communication = Communication({message.what: message.bytes for message in messages})
        return Estimate(
            parameters=size(traced.model),
            trained=size(traced.model, trained=True),
            rows=self.rows,
            micro_batch=micro_batch,
            micro_batches=repeats,
            memory=self.memory(micro_batch, rates),
            time=self._time(traced, repeats, messages, rates),
            communication=communication,
            missing=rates.missing({call.kind for call in traced.trace.calls}),
        )

    def _time(self, traced: Traced, repeats: int, messages: Sequence[Message], rates: Rates) -> Time:
        seconds: defaultdict[str, float] = defaultdict(float)
        phases: defaultdict[str, float] = defaultdict(float)
        calls = 0
        for call, count in traced.trace.calls.items():
            again = repeats - 1 if self.setting.public_rows else repeats  # public rows are in one pass
            times = count * (again if call.phase.startswith("private") else 1)
            own = self._share(call)
            by_flops, by_bytes = rates.of_flops(own), rates.of_bytes(own)
            spent = times * max(by_flops, by_bytes)
            seconds["compute" if by_flops > by_bytes else "memory"] += spent
            if call.kind.split(",")[0] in OPS:
                seconds["noise" if call.kind in NOISE else "norms_and_sums"] += spent
            phases[call.phase] += spent
            calls += times
        device = seconds["compute"] + seconds["memory"]
        host = calls * rates.host_per_call
        if self.setting.strategy is not None:
            host += len(traced.trained) * repeats * rates.host_per_use
        if rates.device == "cuda":
            host = max(0.0, host - device)  # the device works meanwhile
        moving = self._moving(messages, rates)
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
        spread = self.spread
        if call.phase == "update" and (spread.shards > 1 or call.kind in NOISE):
            return call._replace(bytes=math.ceil(call.bytes / spread.noise_shares))
        return call

    def _moving(self, messages: Sequence[Message], rates: Rates) -> float:
        seconds = 0.0
        for message in messages:
            link = rates.link if message.span <= rates.per_node else rates.network
            if link is None:
                raise InputError(
                    "bandwidth: the rates do not say how fast devices reach each other; pass it in bytes per second"
                )
            seconds += message.bytes / link
        return seconds

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
