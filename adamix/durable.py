"""Files that survive a crash: on the disk before a call returns, replaced whole, each record with its own checksum."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
from pathlib import Path
from typing import Any

#: Every system call that changes a file goes through this name, so that tests can let each of them fail.
_os = os

_MARK = b',"sha256":"'


def write_all(descriptor: int, data: bytes) -> None:
    """Write every byte: a single `write` may take fewer, on a full disk for instance."""
    while data:
        written = _os.write(descriptor, data)
        if written <= 0:
            raise OSError(errno.EIO, "the system wrote nothing")
        data = data[written:]


def sync(descriptor: int) -> None:
    """Wait until the file's bytes are on the disk."""
    _os.fsync(descriptor)


def truncate(descriptor: int, size: int) -> None:
    _os.ftruncate(descriptor, size)


def sync_folder(folder: Path) -> None:
    """Wait until the names in `folder` are on the disk: a new or renamed file can be lost without it."""
    descriptor = _os.open(folder, os.O_RDONLY)
    try:
        _os.fsync(descriptor)
    finally:
        _os.close(descriptor)


def replace_file(path: Path, data: bytes) -> None:
    """Give `path` new content: afterwards it is on the disk, and at no instant is there anything but old or new.

    The temporary name is fixed, so that crashes leave at most one such file: callers exclude each other.
    """
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        descriptor = _os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        try:
            write_all(descriptor, data)
            _os.fsync(descriptor)
        finally:
            _os.close(descriptor)
        rename(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)  # a full disk needs the room
        raise


def rename(old: Path, new: Path) -> None:
    """Atomically, and on the disk when it returns."""
    _os.replace(old, new)
    sync_folder(new.parent)


def make_folder(folder: Path) -> None:
    """With the folders above it, all of them on the disk."""
    for missing in [f for f in (folder, *folder.parents) if not f.exists()][::-1]:
        _os.mkdir(missing)
        sync_folder(missing.parent)


def remove(path: Path) -> None:
    _os.unlink(path)


def seal(record: dict[str, Any]) -> bytes:
    """One line of JSON that ends with the SHA-256 of what stands before; `record` has a key at least."""
    body = json.dumps(record, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
    return body[:-1] + _MARK + hashlib.sha256(body).hexdigest().encode() + b'"}\n'


def unseal(line: bytes) -> tuple[dict[str, Any], str]:
    """The record of a line that `seal` made, and its hash.

    Raises:
        ValueError: a single bit is different. Nothing is parsed then.
    """
    body, _, rest = line.rpartition(_MARK)
    digest = hashlib.sha256(body + b"}").hexdigest()
    if rest != digest.encode() + b'"}\n':
        raise ValueError("its checksum is wrong")
    try:
        record = json.loads(body + b"}")
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if not isinstance(record, dict):
        raise ValueError("it is no record")
    return record, digest
