"""How a step is spread over devices: what each sends by which collective, and what each holds.

Bytes are those that one device sends where a collective runs over a ring, which sends least: of an all-gather or a
reduce-scatter of n devices n - 1 of its parts, of an all-reduce 2 (n - 1) / n of the whole. Parts are padded as torch
and `adamix_kernels.nn.ranks` pad them, so that they are exact.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import nn

from adamix.deep.sharding import blocks_of
from adamix.errors import InputError
from adamix.plan.steps import Setting
from adamix_kernels.nn.ranks import BUCKET

SHARDINGS = ("none", "ddp", "fsdp", "hsdp")
#: What ranks tell each other where they meet, and before a step beside a number for each parameter: float64.
_MEETING, _ROW, _NUMBER = 16, 11, 8
_SUM, _GRID_SUM = 4, 8  # bytes of a number of a clipped sum: float32, or int64 in secure mode


class Parameter(NamedTuple):
    """One of the model, by its place in it."""

    shape: tuple[int, ...]
    itemsize: int
    trained: bool
    unit: int  # of those that FSDP gathers one by one; 0 is the root

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def part(self, shards: int) -> int:
        """Numbers of a shard: whole rows, of the first rank as many as of any."""
        return -(-self.shape[0] // shards) * math.prod(self.shape[1:])


@dataclass(frozen=True)
class Message:
    """What one device sends by all calls of one kind in a step."""

    what: str
    bytes: int
    span: int  # of ranks that it goes over, neighbours first: whether that leaves a node


@dataclass(frozen=True)
class Spread:
    """Devices, and what each of them has.

    Args:
        kind: one of `SHARDINGS`.
        devices: in all.
        copies: of the model: 1 of "fsdp", as many as devices of "ddp", in between of "hsdp".
    """

    kind: str
    devices: int
    copies: int

    @classmethod
    def of(cls, kind: str, devices: int, copies: int | None) -> Spread:
        """Raises InputError, which names what does not fit."""
        if kind not in SHARDINGS:
            raise InputError(f"sharding: {kind!r} is not valid here; pass one of {', '.join(SHARDINGS)}")
        if (kind == "none") != (devices == 1):
            raise InputError(f"sharding: {kind!r} does not go with {devices} devices; "
                             "pass none for one device, ddp, fsdp or hsdp for more")  # fmt: skip
        if (kind == "hsdp") != (copies is not None):
            raise InputError(
                f"replicas: {copies} given with sharding {kind!r}; pass the number of copies of the model with hsdp, "
                "and with nothing else"
            )
        if copies is not None and not (1 < copies < devices and devices % copies == 0):
            raise InputError(
                f"replicas: {copies} copies do not share {devices} devices evenly; pass a divisor between 1 and that"
            )
        return cls(kind, devices, copies if copies is not None else devices if kind == "ddp" else 1)

    @property
    def shards(self) -> int:
        """Devices that hold one copy together."""
        return self.devices // self.copies

    @property
    def noise_shares(self) -> int:
        """Into how many parts the noise of a step is cut; copies of a shard draw the same."""
        return self.devices if self.kind == "ddp" else self.shards

    # --- what is sent ------------------------------------------------------------------------------------------------

    def messages(
        self, parameters: Sequence[Parameter], setting: Setting, passes: int, layers: int
    ) -> Iterator[Message]:
        """Of a step of so many forward passes, of which the first has the public rows.

        Args:
            layers: that have thresholds of their own, 1 if there is one for all.
        """
        if self.kind == "none":
            return
        if self.kind == "ddp":
            yield from self._replicated(parameters, setting)
        else:
            yield from self._sharded(parameters, setting, passes)
        if setting.strategy is not None:
            numbers = _ROW + (len(parameters) if self.kind == "ddp" else 0)
            told = _MEETING + _NUMBER * numbers
            if self.kind != "ddp":
                told += 2 * passes * _MEETING  # in each forward and each backward pass
            if setting.public_rows:  # whose norms set the thresholds
                told += layers * (_MEETING + _NUMBER * setting.public_rows)
            yield Message("agreement of all", (self.devices - 1) * told, self.devices)

    def _replicated(self, parameters: Sequence[Parameter], setting: Setting) -> Iterator[Message]:
        n, trained = self.devices, [p for p in parameters if p.trained]
        if setting.strategy is None:
            whole = sum(p.size * p.itemsize for p in trained)
            yield Message("all-reduce of gradients", math.ceil(2 * (n - 1) * whole / n), n)
            return
        width = sum(-(-size // n) for size in buckets([p.size for p in trained]))
        yield Message("reduce-scatter of sums", (n - 1) * width * sum_width(setting), n)
        yield Message("all-gather of the noisy sums", (n - 1) * width * _SUM, n)
        if setting.public_rows:
            yield Message("reduce-scatter and all-gather of public sums", 2 * (n - 1) * width * _SUM, n)

    def _sharded(self, parameters: Sequence[Parameter], setting: Setting, passes: int) -> Iterator[Message]:
        n = self.shards
        gathered = sum(p.part(n) * p.itemsize for p in parameters)
        root = sum(p.part(n) * p.itemsize for p in parameters if not p.unit)
        # the root stays whole from a forward pass to the end of the backward pass
        again = 2 * gathered - root if setting.strategy == "two_pass" else gathered - root
        yield Message("all-gather of parameters, forward", passes * (n - 1) * gathered, n)
        yield Message("all-gather of parameters, backward", passes * (n - 1) * again, n)
        if setting.strategy is None:
            part, sums = sum(p.part(n) * p.itemsize for p in parameters if p.trained), passes
        else:
            numbers = sum(p.part(n) for p in parameters if p.trained)
            part, sums = numbers * sum_width(setting), passes
            if setting.public_rows:
                yield Message("reduce-scatter of public sums", (n - 1) * numbers * _SUM, n)
                yield from self._between_copies("public sums", numbers * _SUM)
        what = "gradients" if setting.strategy is None else "sums"
        yield Message(f"reduce-scatter of {what}", sums * (n - 1) * part, n)
        yield from self._between_copies(what, sums * part)

    def _between_copies(self, what: str, part: int) -> Iterator[Message]:
        if self.copies > 1:
            whole = math.ceil(2 * (self.copies - 1) * part / self.copies)
            yield Message(f"all-reduce of {what} between copies", whole, self.devices)

    # --- what is held ------------------------------------------------------------------------------------------------

    def held(
        self, parameters: Sequence[Parameter], setting: Setting, peak: Mapping[str, int], phase: str
    ) -> dict[str, int]:
        """Of what one process would hold at its peak in a phase of the step, what the first device does, whose shards
        are the largest."""
        trained = [p for p in parameters if p.trained]
        parts = dict(peak)
        if self.kind == "ddp" and setting.strategy is None:
            parts["buckets of gradients"] = sum(p.size * p.itemsize for p in trained)
        elif self.kind == "ddp" and phase == "update":
            whole = sum(-(-size // self.devices) * self.devices for size in buckets([p.size for p in trained]))
            parts["sums on their way"] = _SUM * whole + sum_width(setting) * whole // self.devices
        if self.kind not in ("fsdp", "hsdp"):
            return parts
        n = self.shards

        # numbers of the parameters that are trained, of each as many bytes
        whole, own = sum(p.size for p in trained), sum(p.part(n) for p in trained)
        for name in ("sums", "gradients", "optimizer", "temporaries of the update"):
            if name in parts:
                parts[name] = math.ceil(parts[name] * own / whole)
        parts["parameters"] = sum(p.part(n) * p.itemsize for p in parameters)
        if phase != "update":
            parts["gathered parameters"] = self._gathered(parameters)
            if phase.endswith("backward"):
                parts["sums on their way"] = self._on_their_way(trained, setting)
                if setting.strategy is not None:
                    return max(parts, self._at_the_end(parts, trained, setting), key=lambda held: sum(held.values()))
        return parts

    @staticmethod
    def _at_the_end(parts: Mapping[str, int], trained: Sequence[Parameter], setting: Setting) -> dict[str, int]:
        """Of a backward pass: layers are gone, the last sums are copied side by side to be sent."""
        gone = ("activations", "backprops and temporaries", "gathered parameters", "copies within convolutions")
        left = {name: size for name, size in parts.items() if name not in gone}
        return left | {"sums on their way": 2 * sum_width(setting) * max(buckets([p.size for p in reversed(trained)]))}

    def _gathered(self, parameters: Sequence[Parameter]) -> int:
        """The root's own stay from the forward pass to the backward pass; of the blocks one is used, one prefetched."""
        units: dict[int, int] = {}
        for p in parameters:
            units[p.unit] = units.get(p.unit, 0) + p.part(self.shards) * self.shards * p.itemsize
        root = units.pop(0, 0)
        return root + sum(sorted(units.values())[-2:])

    @staticmethod
    def _on_their_way(trained: Sequence[Parameter], setting: Setting) -> int:
        """Whole sums that wait to be scattered together, and the copy that is sent; of an ordinary step a block's."""
        if setting.strategy is None:
            units: dict[int, int] = {}
            for p in trained:
                units[p.unit] = units.get(p.unit, 0) + p.size * p.itemsize
            return max(units.values(), default=0)
        sent = buckets([p.size for p in reversed(trained)])
        return sum_width(setting) * max(sent) * (1 if len(sent) == 1 else 2)  # of one that is full, in the midst of it


def sum_width(setting: Setting) -> int:
    """Bytes of one number of a clipped sum, whatever the parameters are."""
    return _GRID_SUM if setting.noise_mode == "secure" else _SUM


def buckets(sizes: Sequence[int]) -> list[int]:
    """Numbers that are sent together, as `adamix_kernels.nn.ranks` fills its buckets."""
    found: list[int] = []
    for size in sizes:
        if not found or found[-1] >= BUCKET:
            found.append(0)
        found[-1] += size
    return found


def parameters_of(model: nn.Module) -> list[Parameter]:
    """In their order, each once; units are the blocks of the largest list of modules, and the rest is the root's."""
    blocks = blocks_of(model)
    unit = {id(p): number for number, block in enumerate(blocks, 1) for p in block.parameters()}
    if len(blocks) == 1:
        unit = {}
    return [
        Parameter(tuple(p.shape), p.element_size(), p.requires_grad, unit.get(id(p), 0)) for p in model.parameters()
    ]
