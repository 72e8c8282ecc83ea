"""One process at a time, by `flock`: systems without it are refused, never trusted."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from adamix.errors import InputError
from adamix.storage import one_line

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


def lock(descriptor: int, path: Path) -> None:
    """Take the exclusive lock of the open file, which ends with the process or when the file is closed.

    Raises:
        InputError: another process has it (named, where the system tells), or there are no locks here.
    """
    try:
        if fcntl is None:
            raise OSError("this system has no flock")
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        holder = _holder(os.fstat(descriptor).st_ino)
        raise InputError(f"ledger: {path} is in use by {holder}; wait until that has ended") from error
    except OSError as error:
        raise InputError(
            f"ledger: {path} cannot be locked ({one_line(error)}); keep it on a disk that can, on Linux or macOS"
        ) from error


def _holder(inode: int) -> str:
    """The process that has the lock, as far as Linux tells."""
    with contextlib.suppress(OSError):
        locks = [line.split() for line in Path("/proc/locks").read_text().splitlines()]
        holders = {words[4] for words in locks if "FLOCK" in words and words[5].endswith(f":{inode}")}
        if len(holders) == 1 and (holder := holders.pop()) not in {"0", "-1"}:
            return f"process {holder}"
    return "another process"
