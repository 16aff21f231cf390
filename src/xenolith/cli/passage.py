"""Passing bytes on between a UNIX socket, to which the daemon comes, and a command or this process's own streams.

So a domain travels over whatever a person reaches another host by (ssh with their keys and their terminal, socat, ...),
and the daemons need know nothing of it.
"""

from __future__ import annotations

import os
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Final, Self

PIECE: Final = 1 << 18


class Far:
    """The other end of a passage: descriptors to read from and to write to."""

    def __init__(self, passage: Passage, source: int, sink: int) -> None:
        self._passage = passage
        self._source, self._sink = source, sink
        self._passing_on = False
        self._passed_on = threading.Event()

    def banner(self, size: int) -> bytes:
        """The first bytes that come, fewer if no more do."""
        data = b""
        while len(data) < size and (piece := os.read(self._source, size - len(data))):
            data += piece
        return data

    def say(self, data: bytes) -> None:
        """Bytes to go before all others."""
        _write(self._sink, data)

    def pass_on(self) -> None:
        """From now on pass on what comes, in both directions, on threads of their own."""
        self._passing_on = True
        threading.Thread(target=self._serve, daemon=True).start()

    def wait_until_passed_on(self) -> None:
        """Wait until all that the daemon had to say has been passed on; it has gone, or has not come."""
        if self._passing_on:
            self._passed_on.wait()

    def _serve(self) -> None:
        try:
            with suppress(OSError):
                near, _ = self._passage.listener.accept()
                threading.Thread(target=self._bring_back, args=(near,), daemon=True).start()
                _copy(near.fileno(), self._sink)
        finally:
            os.close(self._sink)  # the other side sees the end
            self._passed_on.set()

    def _bring_back(self, near: socket.socket) -> None:
        _copy(self._source, near.fileno())
        with suppress(OSError):
            near.shutdown(socket.SHUT_WR)


class Passage:
    """A socket for the daemon to come to, in a directory that nobody else can enter."""

    def __init__(self) -> None:
        self._directory = TemporaryDirectory(prefix="xl-passage-")
        self.socket = Path(self._directory.name) / "domain"
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.listener.bind(str(self.socket))
        self.listener.listen(1)

    @contextmanager
    def to_command(self, line: str) -> Iterator[Far]:
        """A shell's command line at the other end. It is waited for."""
        process = subprocess.Popen(["/bin/sh", "-c", line], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert process.stdin is not None and process.stdout is not None
        far = Far(self, process.stdout.fileno(), os.dup(process.stdin.fileno()))
        process.stdin.close()
        try:
            yield far
        except BaseException:
            process.terminate()
            raise
        finally:
            self._stop_listening()
            far.wait_until_passed_on()
            process.wait()

    @contextmanager
    def to_standard_streams(self) -> Iterator[Far]:
        """This process's own stdin and stdout."""
        far = Far(self, 0, os.dup(1))
        try:
            yield far
        finally:
            self._stop_listening()
            far.wait_until_passed_on()

    def _stop_listening(self) -> None:
        with suppress(OSError):
            self.listener.shutdown(socket.SHUT_RDWR)  # which ends a thread's wait for somebody to come
        self.listener.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self._stop_listening()
        self._directory.cleanup()


def _write(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def _copy(source: int, sink: int) -> None:
    """Until the end of either."""
    with suppress(OSError):
        while data := os.read(source, PIECE):
            _write(sink, data)
