"""What a ledger says: its lines checked one against the other and against `<ledger>.head`, and added up."""

from __future__ import annotations

import math
import uuid
from collections.abc import Collection
from dataclasses import dataclass, field
from numbers import Integral
from pathlib import Path
from typing import Any, NamedTuple

from adamix.durable import unseal
from adamix.errors import InputError
from adamix.privacy import _number, left_of, spent_together

FORMAT = 1
UNITS = ("record", "user")
NEIGHBOURS = "add or remove one"
#: The "previous hash" of the first line.
ORIGIN = "0" * 64
_REMEDY = (
    "restore the ledger and its .head file from the same backup, the latest one; if there is none, count the budget "
    "of these rows as spent"
)


@dataclass
class Run:
    """One run: `planned` steps were checked against the budget, noise was drawn for at most `charged` of them."""

    id: str
    noise_multiplier: float
    sample_rate: float
    planned: int
    delta: float
    charged: int = 0
    ended: bool = False
    started: str = ""

    def cost(self, steps: int | None = None) -> tuple[float, float, int]:
        """As `spent_together` takes it, for `steps` steps in all; None: those charged."""
        return self.noise_multiplier, self.sample_rate, self.charged if steps is None else steps


@dataclass
class Book:
    """The sum of all lines; `apply` takes them in order and refuses what makes no sense."""

    data_set: str = ""
    unit: str = "record"
    epsilon: float | None = None
    delta: float = 0.0
    runs: dict[str, Run] = field(default_factory=dict)

    def apply(self, record: dict[str, Any]) -> None:
        """One more line.

        Raises:
            KeyError, TypeError, ValueError: it cannot follow the lines before.
        """
        kind = record["kind"]
        if (kind == "ledger") != (record["number"] == 0):
            raise ValueError("a ledger has one header, in its first line")
        if kind == "ledger":
            self._open(record)
        elif kind == "start":
            self._start(record)
        elif kind == "charge":
            run = self._running(record)
            if record["charged"] != run.charged + 1 or run.charged >= run.planned:
                raise ValueError(f"step {record['charged']} of run {run.id} cannot follow {run.charged}")
            run.charged += 1
        elif kind == "resume":
            run = self._running(record)
            if not isinstance(record["planned"], int) or record["planned"] < run.charged:
                raise ValueError(f"run {run.id} was charged more steps than it plans")
            run.planned = record["planned"]
        elif kind == "end":
            self._running(record).ended = True
        else:
            raise ValueError(f"{kind!r} is no kind of line")

    def spent(self, delta: float | None = None) -> float:
        """Epsilon of all that was charged, at `delta`; None: the ledger's own."""
        costs = [run.cost() for run in self.runs.values()]
        return spent_together(costs, delta=self.delta if delta is None else delta)

    def left(self) -> float | None:
        """Epsilon of the largest full-batch run that fits the budget; None without a budget."""
        if self.epsilon is None:
            return None
        return left_of(self.epsilon, [run.cost() for run in self.runs.values()], delta=self.delta)

    def check(
        self, more: tuple[float, float, int], *, run: str | None, reserved: Collection[str], finished: int = 0
    ) -> None:
        """Refuse steps that the budget does not allow, with what it does allow.

        Args:
            more: noise multiplier, sample rate, and steps to take (of `run`, beyond those charged).
            run: the run that goes on with them; None: a new one.
            reserved: runs of which all planned steps count, not only those charged.
            finished: steps of `run` that need not be taken again, for the message.

        Raises:
            InputError: too many, or no valid steps.
        """
        noise, rate, steps = more
        whole = isinstance(steps, Integral) and not isinstance(steps, bool) and steps >= 0
        if not 0 <= _number(noise) < math.inf or not 0 < _number(rate) <= 1 or not whole:
            raise InputError(
                f"ledger: {steps} steps with noise multiplier {noise} and sample rate {rate} are no run; pass steps "
                ">= 0, a finite multiplier >= 0 and a rate in (0, 1]"
            )
        others = [
            r.cost(r.planned if r.id in reserved and not r.ended else None) for r in self.runs.values() if r.id != run
        ]
        charged = 0 if run is None else self.runs[run].charged

        def total(count: int) -> float:
            return spent_together([*others, (noise, rate, charged + count)], delta=self.delta)

        limit = self.epsilon
        if limit is None or total(steps) <= limit:
            return
        if run is None:
            remedy = f"start a run with epsilon <= {self.left():.4g}"
        else:
            fits, too_many = 0, steps
            while too_many - fits > 1:
                middle = (fits + too_many) // 2
                fits, too_many = (middle, too_many) if total(middle) <= limit else (fits, middle)
            remedy = f"resume with steps={finished + fits}, which fits"
            remedy = remedy if finished + fits else "no step of it fits, start another run"
        raise InputError(
            f"ledger: {steps} steps with noise multiplier {noise:.4g} and the epsilon {total(0):.6g} already spent or "
            f"planned come to {total(steps):.6g}, above the budget of {limit:g} at delta {self.delta:g}; {remedy}"
        )

    def _open(self, record: dict[str, Any]) -> None:
        if record["format"] != FORMAT:
            raise ValueError(f"its format is {record['format']}, this version reads {FORMAT}")
        self.data_set, self.unit = str(record["data_set"]), record["unit"]
        self.epsilon, self.delta = record["epsilon"], float(record["delta"])
        if self.unit not in UNITS or not (self.epsilon is None or float(self.epsilon) > 0) or not 0 < self.delta < 1:
            raise ValueError("its header is not valid")

    def _start(self, record: dict[str, Any]) -> None:
        run = Run(
            str(record["run"]), float(record["noise_multiplier"]), float(record["sample_rate"]), record["planned"],
            float(record["delta"]), started=str(record["time"]),
        )  # fmt: skip
        numbers = math.isfinite(run.noise_multiplier) and run.noise_multiplier >= 0 and 0 < run.sample_rate <= 1
        if run.id in self.runs or not numbers or not isinstance(run.planned, int) or run.planned < 1:
            raise ValueError(f"run {run.id} is not valid here")
        self.runs[run.id] = run

    def _running(self, record: dict[str, Any]) -> Run:
        run = self.runs[record["run"]]
        if run.ended:
            raise ValueError(f"run {run.id} has ended")
        return run


def new_header(data_set: Any, epsilon: Any, delta: Any, unit: Any) -> dict[str, Any]:
    """The first line; its random id tells two ledgers apart that are alike otherwise."""
    if not isinstance(data_set, str) or not data_set.strip():
        raise InputError(f"data_set: {data_set!r} given; pass a name for the private rows")
    if epsilon is not None and not 0 < epsilon <= 1000:
        raise InputError(f"epsilon: {epsilon!r} is not valid for a ledger; pass a number in (0, 1000], or None")
    if not 0 < delta < 1:
        raise InputError(f"delta: {delta!r} is not valid for a ledger; pass a number in (0, 1)")
    if unit not in UNITS:
        raise InputError(f"unit: {unit!r} is not valid for a ledger; pass one of {UNITS}")
    return {
        "kind": "ledger", "format": FORMAT, "id": uuid.uuid4().hex, "data_set": data_set, "unit": unit,
        "neighbours": NEIGHBOURS, "epsilon": epsilon, "delta": delta, "number": 0, "previous": ORIGIN,
    }  # fmt: skip


class Content(NamedTuple):
    """A ledger that was verified: `hashes` of its lines, `size` of these in bytes.

    `ahead`: the last line is not in the head file yet; `torn`: bytes follow that are no whole line.
    """

    book: Book
    hashes: list[str]
    size: int
    ahead: bool
    torn: bool


def head_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.head")


def read_head(path: Path) -> tuple[int, str] | None:
    """Count and last hash as `<ledger>.head` says, None where there is no such file.

    Raises:
        InputError: it cannot be read, or was changed.
    """
    head = head_path(path)
    try:
        record, _ = unseal(head.read_bytes())
        return int(record["count"]), str(record["head"])
    except FileNotFoundError:
        return None
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"ledger: {head} was altered or cannot be read ({error}); {_REMEDY}") from error


def verify(path: Path, content: bytes, head: tuple[int, str] | None) -> Content:
    """Check `content`, the bytes of the ledger at `path`, as a chain and against its head file.

    A line is on the disk before the head file counts it, and the head file before the step it stands for is taken. So
    a crash leaves the ledger at most one whole line ahead, which counts as spent, or with a part of a line after the
    last counted one, which stands for nothing that happened. Anything else was not left by a crash.

    Raises:
        InputError: the ledger was truncated, altered, reordered, or is not the one that the head file belongs to.
    """
    if head is None:
        raise InputError(f"ledger: {head_path(path)} is missing; {_REMEDY}")
    lines = content.split(b"\n")
    tail = lines.pop()
    book, hashes = Book(), [ORIGIN]
    for number, line in enumerate(lines):
        try:
            record, digest = unseal(line + b"\n")
            if record["number"] != number or record["previous"] != hashes[-1]:
                raise ValueError("it does not follow the line before")
            book.apply(record)
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"ledger: {path} was altered in line {number + 1} ({error}); {_REMEDY}") from error
        hashes.append(digest)
    count, last = head
    del hashes[0]
    if len(hashes) < max(count, 1):
        raise InputError(
            f"ledger: {path} is truncated or an older copy: it has {len(hashes)} whole lines, its .head file counts "
            f"{count}; {_REMEDY}"
        )
    if count < 1 or hashes[count - 1] != last or len(hashes) > count + (not tail):
        raise InputError(f"ledger: {path} and its .head file are not of the same moment; {_REMEDY}")
    return Content(book, hashes, len(content) - len(tail), len(hashes) > count, bool(tail))


def read_ledger(path: str | Path) -> Book:
    """What the ledger says, without locking it, so also while a run goes on; nothing is written.

    Raises:
        InputError: it is missing or not in order.
    """
    path = Path(path).resolve()
    for attempt in range(10):
        head = read_head(path)
        try:
            return verify(path, read_bytes(path), head).book
        except InputError:
            # A run may have written lines between the two readings.
            if attempt == 9 or read_head(path) == head:
                raise
    raise AssertionError


def read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise missing(path) from error
    except OSError as error:
        raise InputError(f"ledger: {path} cannot be read ({error.strerror}); name a ledger file") from error


def missing(path: Path) -> InputError:
    if head_path(path).exists():
        return InputError(f"ledger: {path} is missing, but its .head file is there; {_REMEDY}")
    return InputError(
        f"ledger: {path} does not exist; check the path, or make one once per private data set with Ledger.create "
        "(--new-ledger NAME)"
    )
