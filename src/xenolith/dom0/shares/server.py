"""diod, the 9P server of a folder, as a process that is confined to it (`confined`), and the connection to it."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from threading import Thread
from typing import Final

from xenolith.abi import p9
from xenolith.dom0.shares import ShareError
from xenolith.dom0.shares.relay import MAX_MSIZE

TREE: Final = b"/share"
START_SECONDS: Final = 20.0


class Server:
    """One server process with one client. Raises ShareError where there can be none."""

    def __init__(self, folder: Path, writable: bool) -> None:
        diod = shutil.which("diod") or shutil.which("diod", path="/usr/sbin")
        if diod is None:
            raise ShareError("sharing a folder needs diod, which is not installed (Debian: apt install diod)")
        if not folder.is_dir():
            raise ShareError(f"{folder} is no folder that could be shared")
        ours, theirs = socket.socketpair()
        program = Path(__file__).with_name("confined.py")
        access = "rw" if writable else "ro"
        try:
            with theirs:
                self._process: Final = subprocess.Popen(
                    [sys.executable, "-I", str(program), diod, str(folder), access, str(theirs.fileno())],
                    pass_fds=[theirs.fileno()],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.PIPE,
                )
        except OSError as error:
            ours.close()
            raise ShareError(f"diod cannot be started: {error.strerror}") from error
        self._stream: Final = ours
        self._thread: Thread | None = None
        try:
            self._begin_session(folder)
        except BaseException:
            self.close()
            raise

    def _begin_session(self, folder: Path) -> None:
        assert self._process.stderr is not None
        version = p9.HEADER.pack(p9.HEADER.size + 6 + len(p9.VERSION), p9.TVERSION, p9.NOTAG)
        version += MAX_MSIZE.to_bytes(4, "little") + len(p9.VERSION).to_bytes(2, "little") + p9.VERSION
        self._stream.settimeout(START_SECONDS)
        answer = None
        try:
            self._stream.sendall(version)
            answer = self._receive()
        except OSError:
            pass
        if answer != version[:4] + bytes([p9.TVERSION + 1]) + version[5:]:
            self._process.kill()
            said = self._process.stderr.read(4096).decode("utf-8", "replace").strip()
            raise ShareError(f"{folder} cannot be shared: {said or 'diod does not answer'}")
        self._stream.settimeout(None)

    @property
    def pid(self) -> int:
        return self._process.pid

    def start(self, answered: Callable[[bytes | None], None]) -> None:
        """Have `answered` called with each answer, on a thread of its own, and with None when the server has ended."""

        def carry() -> None:
            try:
                while (message := self._receive()) is not None:
                    answered(message)
            except OSError:
                pass
            answered(None)

        self._thread = Thread(target=carry, name="9p answers", daemon=True)
        self._thread.start()

    def send(self, message: bytes) -> None:
        """Raises OSError."""
        self._stream.sendall(message)

    def close(self) -> None:
        """What it was asked and has not answered may be done or not."""
        self._process.kill()
        self._process.wait()
        if self._thread is not None:
            self._thread.join()
        self._stream.close()
        if self._process.stderr is not None:
            self._process.stderr.close()

    def _receive(self) -> bytes | None:
        """The next message; None at the end. Raises OSError."""
        head = self._exactly(p9.HEADER.size)
        if head is None:
            return None
        size = int.from_bytes(head[:4], "little")
        if not p9.HEADER.size <= size <= MAX_MSIZE:
            return None
        rest = self._exactly(size - p9.HEADER.size)
        return None if rest is None else head + rest

    def _exactly(self, size: int) -> bytes | None:
        data = bytearray()
        while len(data) < size:
            piece = self._stream.recv(size - len(data))
            if not piece:
                return None
            data += piece
        return bytes(data)


def owner() -> tuple[int, int] | None:
    """The user and group that a server is, where it can be no other."""
    return (os.getuid(), os.getgid()) if os.getuid() else None
