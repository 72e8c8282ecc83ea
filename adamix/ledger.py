"""The ledger of a private data set: what was spent on it, written down before it is spent.

One file per data set, one JSON object a line, each with the SHA-256 of itself and of the line before; it only grows.
A step is charged before its batch is drawn and before its noise: `Ledger.charge` returns when the line is on the disk
and counted in `<ledger>.head`, a second file, which tells when lines at the end are lost: the chain alone cannot. So
what the ledger says is never less than what was spent, whenever the process or the machine dies.

The data set has the name that its owner gives it. The ledger never holds a hash of private rows, nor their number: a
hash tells whoever can guess the rows that the guess is right, without any noise.

The two files guard against crashes, full disks, bit rot and restored backups. Whoever may write them can of course
write another history; and an older copy of both together is only found out by a checkpoint, which holds the hash of the
ledger's last line, or by a hash kept elsewhere (`Ledger.count`, `Ledger.head`).

Composition: for full batches the mu of all steps add in squares, and that holds too if later runs are chosen by what
earlier ones released (Smith and Thakurta 2022, arXiv 2210.17520). With Poisson batches the loss distributions are
composed as `privacy.spent_together` says; this holds for noise and rates that were not chosen by earlier results.
"""

from __future__ import annotations

import contextlib
import os
import threading
import uuid
import weakref
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from adamix import durable
from adamix.errors import InputError
from adamix.ledger_records import (
    NEIGHBOURS,
    Book,
    Run,
    head_path,
    missing,
    new_header,
    read_bytes,
    read_head,
    verify,
)
from adamix.locks import lock
from adamix.storage import one_line


class Ledger:
    """An existing ledger, verified from its first line and locked for this process until `close`.

        with Ledger("patients.ledger") as ledger:
            run = ledger.start_run(noise_multiplier=8.0, sample_rate=1.0, steps=20, delta=1e-5)
            for _ in range(20):
                ledger.charge(run)  # then draw the noise, not before
                ...
            ledger.end_run(run)

    A part of a line that a crash left behind is dropped: `charge` had not returned, so its noise was not drawn. A whole
    line that a crash kept from the head file stays and counts.

    Raises:
        InputError: the file is missing, truncated, altered, reordered or older than its head file; another process
            uses it; or locks do not work here (systems without `flock`, such as Windows, and some network disks): two
            processes could then spend the same budget, so it is refused.
    """

    def __init__(self, path: str | Path) -> None:
        path = Path(path).resolve()
        try:
            descriptor = durable._os.open(path, os.O_RDWR | os.O_APPEND)
        except FileNotFoundError as error:
            raise missing(path) from error
        except OSError as error:
            raise InputError(f"ledger: {path} cannot be opened ({one_line(error)}); name a ledger file") from error
        self._take(path, descriptor)
        try:
            self._load()
        except BaseException:
            self.close()
            raise

    @classmethod
    def create(
        cls,
        path: str | Path,
        *,
        data_set: str,
        epsilon: float | None = None,
        delta: float = 1e-5,
        unit: str = "record",
    ) -> Ledger:
        """A new ledger, which must not exist yet.

        Args:
            data_set: a name for the private rows, in words that may be public.
            epsilon: the budget that all runs together must not exceed; None: no limit, the ledger only counts.
            delta: at which it is counted.
            unit: what one neighbour more or less is: "record" or "user".
        """
        path = Path(path).resolve()
        header = new_header(data_set, epsilon, delta, unit)
        ledger = cls.__new__(cls)
        try:
            ledger._make(path, durable.seal(header))
        except OSError as error:
            raise InputError(f"ledger: {path} cannot be made ({one_line(error)}); name a file that can") from error
        return ledger

    def start_run(
        self, *, noise_multiplier: float, sample_rate: float, steps: int, delta: float, run: str | None = None
    ) -> str:
        """Note a run before it begins; returns its id (`run`, or a random one).

        Batches that a sampler cuts short (`max_batch_size`) cost more than Poisson ones of their rate: note them as
        full batches, `sample_rate` 1, with half of the noise, as one record more may push another one out.

        Raises:
            InputError: all its steps, with what the ledger holds, would exceed the budget.
        """
        run = uuid.uuid4().hex if run is None else run
        with self._mutex:  # two threads must not both be told that there is room
            self.check(noise_multiplier, sample_rate, steps)
            self._append(
                "start", run=run, noise_multiplier=float(noise_multiplier), sample_rate=float(sample_rate),
                planned=int(steps), delta=float(delta), neighbours=NEIGHBOURS, time=_now(),
            )  # fmt: skip
            self._active.add(run)
        return run

    def charge(self, run: str) -> int:
        """One more step of `run`: returns once it is safely written, and then its noise may be drawn.

        Returns:
            the number of steps charged to the run so far.

        Raises:
            InputError: it cannot be written, or the run has had all the steps it planned: draw nothing. Or the run was
                started before the ledger was opened, and others have since used the room of its steps.
        """
        with self._mutex:
            found = self._run(run)
            charged = found.charged + 1
            if charged > found.planned:
                raise InputError(
                    f"ledger: run {run} has been charged all {charged - 1} steps that it planned; start another"
                )
            if run not in self._active:  # nobody has kept room for it since
                self.resume_run(run, found.planned - found.charged)
            self._append("charge", run=run, charged=charged)
        return charged

    def resume_run(self, run: str, steps: int) -> None:
        """Let `run`, which was interrupted, take `steps` more steps.

        Raises:
            InputError: with these it would exceed the budget, or it has ended.
        """
        with self._mutex:
            found = self._run(run)
            self.check(found.noise_multiplier, found.sample_rate, steps, run)
            if found.planned != found.charged + steps:
                self._append("resume", run=run, planned=found.charged + int(steps), time=_now())
            self._active.add(run)

    def end_run(self, run: str) -> None:
        """No more steps will be charged to it."""
        self._run(run)
        self._append("end", run=run, time=_now())

    def check(
        self, noise_multiplier: float, sample_rate: float, steps: int, run: str | None = None, *, finished: int = 0
    ) -> None:
        """Refuse `steps` more steps (of `run`) that the budget does not allow, see `Book.check`.

        What runs of this process still plan is reserved; of others, that were cut off, what was charged counts.
        """
        self.book.check((noise_multiplier, sample_rate, steps), run=run, reserved=self._active, finished=finished)

    def spent(self, delta: float | None = None) -> float:
        """Epsilon of everything charged, at `delta`; None: the ledger's own."""
        return self.book.spent(delta)

    def left(self) -> float | None:
        """Epsilon of the largest full-batch run that fits the budget; None without one."""
        return self.book.left()

    @property
    def runs(self) -> list[Run]:
        return list(self.book.runs.values())

    @property
    def count(self) -> int:  # lines
        return len(self._hashes)

    @property
    def head(self) -> str:  # hash of the last line
        return self._hashes[-1]

    def require(self, count: int, head: str) -> None:
        """Refuse the ledger if it is older than when it had `count` lines ending in `head`, or is another one."""
        if self.count < count or self._hashes[count - 1] != head:
            raise InputError(
                f"ledger: {self.path} is older than the checkpoint, or another one (the checkpoint knows {count} lines "
                f"ending in {head[:12]}, the ledger has {self.count}); restore the latest ledger and its .head file"
            )

    def close(self) -> None:
        """Give up the lock."""
        self._finalizer()

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _take(self, path: Path, descriptor: int) -> None:
        self.path, self._descriptor, self._process = path, descriptor, os.getpid()
        self._finalizer = weakref.finalize(self, os.close, descriptor)
        self._mutex, self._failed, self._active = threading.RLock(), False, set[str]()
        try:
            lock(descriptor, path)
        except BaseException:
            self.close()
            raise

    def _load(self) -> None:
        content = verify(self.path, read_bytes(self.path), read_head(self.path))
        self.book, self._hashes, self._size = content.book, content.hashes, content.size
        if not content.ahead and not content.torn:
            return
        try:
            if content.torn:
                durable.truncate(self._descriptor, content.size)
            durable.sync(self._descriptor)
            self._write_head()
        except OSError as error:
            raise self._cannot_write(error) from error

    def _make(self, path: Path, header: bytes) -> None:
        """The head file comes first: a ledger without one is never right, so a crash in between cannot hide a loss."""
        temporary = path.with_name(f"{path.name}.new")
        descriptor = durable._os.open(temporary, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        self._take(path, descriptor)
        try:
            if path.exists():
                raise InputError(f"ledger: {path} exists already; open it, or name a new file")
            head = read_head(path)
            if head is not None and head[0] > 1:
                raise missing(path)
            durable.truncate(descriptor, 0)
            durable.write_all(descriptor, header)
            durable.sync(descriptor)
            record, digest = durable.unseal(header)
            self.book, self._hashes, self._size = Book(), [digest], len(header)
            self.book.apply(record)
            self._write_head()
            durable.rename(temporary, path)  # the lock stays with the file
        except BaseException:
            self.close()
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise

    def _append(self, kind: str, **fields: Any) -> None:
        with self._mutex:
            self._check_usable()
            record = {"kind": kind, "number": self.count, "previous": self.head, **fields}
            try:
                line = durable.seal(record)  # before it counts: what cannot be written must not
                self.book.apply(record)
            except (KeyError, TypeError, ValueError) as error:
                raise InputError(
                    f"ledger: this is no line for {self.path} ({one_line(error)}); pass other values"
                ) from error
            self._failed = True  # whatever interrupts the next lines, nothing is written after a torn one
            try:
                durable.write_all(self._descriptor, line)
                durable.sync(self._descriptor)
                self._hashes.append(durable.unseal(line)[1])
                self._size += len(line)
                self._write_head()
            except OSError as error:
                raise self._cannot_write(error) from error
            self._failed = False

    def _write_head(self) -> None:
        durable.replace_file(head_path(self.path), durable.seal({"count": self.count, "head": self.head}))

    def _check_usable(self) -> None:
        if self._process != os.getpid():
            raise InputError("ledger: it was opened before a fork; open it in the process that spends")
        if self._failed or not self._finalizer.alive:
            raise InputError(f"ledger: {self.path} could not be written to before, or is closed; open it again")
        try:
            own, named = os.fstat(self._descriptor), os.stat(self.path)
        except OSError as error:
            raise self._cannot_write(error) from error
        if (own.st_ino, own.st_dev, own.st_size) != (named.st_ino, named.st_dev, self._size):
            raise InputError(f"ledger: {self.path} was replaced or changed while in use; stop, and restore it")

    def _run(self, run: str) -> Run:
        found = self.book.runs.get(run)
        if found is None or found.ended:
            raise InputError(f"ledger: run {run} {'has ended' if found else 'is not in it'}; start a new run")
        return found

    def _cannot_write(self, error: OSError) -> InputError:
        return InputError(
            f"ledger: {self.path} cannot be written ({one_line(error)}), so no step was taken; mend that and resume"
        )


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
