"""The system calls of `adamix.durable`, counted, with one fault: a kill, a power cut, or an error of the disk."""

from __future__ import annotations

import errno
import os
import signal
from typing import Any, NoReturn

CALLS = ("open", "write", "fsync", "close", "replace", "unlink", "ftruncate", "mkdir")
#: Die before the call, or in the middle of it (a write) and right after it (others). With the power cut, what was not
#: synced is lost: the data and the names, or the data alone.
DEATHS = ("kill", "torn", "power", "power but names")
#: The write fails: once, from now on, or by taking fewer bytes than it was given.
ERRORS = ("EIO", "ENOSPC", "short")


class FaultySystem:
    """Stands in for `os`; the call number `at` (of those that `fault` concerns) goes wrong.

    For the power cuts it remembers each file as it was when it was last synced, and each name not yet synced.
    """

    def __init__(self, fault: str | None = None, at: int = 0, only: str | None = None) -> None:
        self.fault, self.at, self.only, self.count, self.full = fault, at, only, 0, False
        self._paths: dict[int, str] = {}  # by inode
        self._synced: dict[int, bytes] = {}
        self._names: list[tuple[str, str, bytes | None]] = []

    def __getattr__(self, name: str) -> Any:
        call = getattr(os, name)
        if name not in CALLS:
            return call

        def counted(*arguments: Any, **more: Any) -> Any:
            if self.only in {None, name}:
                self.count += 1
                if self.count == self.at:
                    self._fail(name, arguments)
                    if self.fault == "short" and name == "write":
                        return os.write(arguments[0], arguments[1][: max(1, len(arguments[1]) // 2)])
            if self.full and name in {"write", "mkdir"}:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            before = self._before(name, arguments)
            result = call(*arguments, **more)
            self._note(name, arguments, result, before)
            return result

        return counted

    def _fail(self, name: str, arguments: tuple[Any, ...]) -> None:
        if self.fault == "torn":
            if name == "write":
                os.write(arguments[0], arguments[1][: len(arguments[1]) // 2])
            else:
                getattr(os, name)(*arguments)
            die()
        if self.fault in DEATHS:
            if self.fault != "kill":
                self._cut(names=self.fault == "power")
            die()
        if self.fault == "EIO":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        if self.fault == "ENOSPC":
            self.full = True
            if name == "write":
                os.write(arguments[0], arguments[1][: len(arguments[1]) // 2])
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _before(self, name: str, arguments: tuple[Any, ...]) -> bytes | None:
        if name in {"replace", "open"}:
            try:
                with open(arguments[name == "replace"], "rb") as file:
                    return file.read()
            except OSError:
                pass
        return None

    def _note(self, name: str, arguments: tuple[Any, ...], result: Any, before: bytes | None) -> None:
        if name == "open" and arguments[1] & (os.O_WRONLY | os.O_RDWR):
            inode = os.fstat(result).st_ino
            self._paths[inode] = str(arguments[0])
            self._synced.setdefault(inode, before or b"")
        elif name == "fsync":
            inode = os.fstat(arguments[0]).st_ino
            if inode in self._paths:
                with open(self._paths[inode], "rb") as file:
                    self._synced[inode] = file.read()
            else:
                self._names.clear()  # of a folder; one is used at a time
        elif name == "replace":
            old, new = map(str, arguments)
            inode = os.stat(new).st_ino
            if inode in self._paths:
                self._paths[inode] = new
            self._names.append((old, new, before))

    def _cut(self, *, names: bool) -> None:
        for inode, path in self._paths.items():
            if os.path.exists(path) and os.stat(path).st_ino == inode:
                with open(path, "wb") as file:
                    file.write(self._synced[inode])
        for old, new, content in reversed(self._names) if names else ():
            os.replace(new, old)
            if content is not None:
                with open(new, "wb") as file:
                    file.write(content)


def die() -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError
