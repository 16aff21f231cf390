"""UNIX sockets in the file system: at paths of any length, and removed only by those who made them.

The kernel's sockaddr_un has room for 107 bytes; a longer path is reached through a descriptor of its directory. A
program that ended without cleaning up leaves its socket's file, which its successor may replace; a file that is no
socket, or a socket that somebody serves, is never touched.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import socket
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Final

_ADDRESS_BYTES: Final = 107  # of sun_path, without its NUL
_KINDS: Final = (
    (stat.S_ISREG, "a file"),
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISLNK, "a symbolic link"),
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


class InTheWay(FileExistsError):
    """Something that is not ours is where a socket should be; it was left alone."""

    def __init__(self, reason: str) -> None:
        super().__init__(errno.EEXIST, reason)

    def __str__(self) -> str:
        return str(self.strerror)


def connect(path: Path, timeout: float | None = None) -> socket.socket:
    """A stream to whoever listens at `path`. Raises OSError, among others InTheWay when that is no socket."""
    status = path.stat()
    if not stat.S_ISSOCK(status.st_mode):
        raise InTheWay(f"{path} is no socket but {_kind(status.st_mode)}")
    with _reachable(path, existing=True) as name:
        stream = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            stream.settimeout(timeout)
            stream.connect(name)
        except BaseException:
            stream.close()
            raise
    return stream


class ListeningSocket:
    """A socket of ours at a path (mode 0600). Closing it removes the file, if it is still the one that we made."""

    def __init__(self, path: Path, backlog: int, serving: str) -> None:
        """`serving` is what for, for people. Raises OSError, among others InTheWay."""
        clear(path, serving)
        self.path: Final = path
        self.socket: Final = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            os.fchmod(self.socket.fileno(), 0o600)  # on Linux the file that bind() makes takes its mode from here
            self._bind()
            self._made: Final = _identity(path)
            self.socket.listen(backlog)
        except BaseException:
            self.socket.close()
            raise

    def _bind(self) -> None:
        """Under a short name first where its own does not fit, in the same directory."""
        short = self.path.with_name(f".{secrets.token_hex(8)}")
        fits = len(os.fsencode(self.path.name)) < len(short.name)
        place = self.path if fits or len(os.fsencode(self.path)) <= _ADDRESS_BYTES else short
        with _reachable(place, existing=False) as name:
            self.socket.bind(name)
        if place is short:
            try:
                os.link(short, self.path)  # which, unlike renaming, replaces nothing
            finally:
                short.unlink()

    def close(self) -> None:
        self.socket.close()
        with contextlib.suppress(OSError):
            if _identity(self.path) == self._made:
                self.path.unlink()


def is_there(path: Path) -> bool:
    """Whether there is a socket at `path`. Raises InTheWay for anything else."""
    try:
        status = path.lstat()
    except FileNotFoundError:
        return False
    if not stat.S_ISSOCK(status.st_mode):
        raise InTheWay(f"{path} is no socket but {_kind(status.st_mode)}; it is left as it is: name another")
    return True


def clear(path: Path, serving: str) -> None:
    """Remove the socket of somebody who has ended. Raises InTheWay for anything else that is there."""
    if not is_there(path):
        return
    try:
        connect(path, timeout=0).close()
    except ConnectionRefusedError:
        path.unlink(missing_ok=True)
        return
    except FileNotFoundError:
        return
    except BlockingIOError:
        pass  # its backlog is full
    raise InTheWay(f"another daemon serves {serving} on {path}; stop it or name another socket")


@contextlib.contextmanager
def _reachable(path: Path, *, existing: bool) -> Iterator[str]:
    """A name for the path that fits into an address."""
    if len(os.fsencode(path)) <= _ADDRESS_BYTES:
        yield str(path)
        return
    descriptor = os.open(path if existing else path.parent, os.O_PATH | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{descriptor}" + ("" if existing else f"/{path.name}")
    finally:
        os.close(descriptor)


def _identity(path: Path) -> tuple[int, int]:
    status = path.lstat()
    return status.st_dev, status.st_ino


def _kind(mode: int) -> str:
    return next((words for test, words in _KINDS if test(mode)), "something else")
