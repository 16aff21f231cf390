"""A client of xenstore's UNIX socket: the requests that programs make most (Xen: libxenstore; abi.xs_wire)."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final, Self
from weakref import WeakSet

from xenolith.abi.xs_wire import HEADER, PAYLOAD_MAX, Op
from xenolith.dom0 import unix_socket
from xenolith.toolstack.client import ConnectionLost, ToolstackError

_SECONDS: Final = 30.0


class XenstoreError(ToolstackError):
    """xenstore refused a request; `name` is the error's, such as "ENOENT"."""

    def __init__(self, name: str, path: str) -> None:
        super().__init__(f"xenstore: {path}: {name}")
        self.name = name


class XenstoreConflict(XenstoreError):
    """A transaction changed nothing, since somebody else changed what it looked at. It may be tried again."""


class _Connection:
    """A socket that messages are sent to and received from, one after the other."""

    def __init__(self, path: Path) -> None:
        """Raises ConnectionLost."""
        self.path: Final = path
        self._received = bytearray()  # of a message that has not come to its end
        self._lock = threading.Lock()
        try:
            self._socket = unix_socket.connect(path, _SECONDS)
        except OSError as error:
            raise ConnectionLost(f"cannot connect to xenstore at {path}: {error.strerror or error}") from error

    def ask(self, operation: Op, transaction: int, payload: bytes, about: str) -> bytes:
        """A request's answer; the requests of several threads wait for each other. `about` is for error messages."""
        if len(payload) > PAYLOAD_MAX:
            raise XenstoreError("E2BIG", about)
        with self._lock:
            try:
                self._socket.settimeout(_SECONDS)
                self._socket.sendall(HEADER.pack(operation, 0, transaction, len(payload)) + payload)
                kind, content = self._receive(_SECONDS)
            except OSError as error:
                self._socket.close()  # an answer that comes late would be taken for the next request's
                raise ConnectionLost(f"xenstore does not answer: {error}") from error
        if kind == Op.ERROR:
            name = content.rstrip(b"\0").decode()
            raise (XenstoreConflict if name == "EAGAIN" else XenstoreError)(name, about)
        return content

    def message(self, timeout: float | None) -> bytes | None:
        """The next message's content, for a connection on which nothing is asked; b"" at the end, None in vain."""
        with self._lock:
            try:
                return self._receive(timeout)[1]
            except TimeoutError:
                return None
            except (OSError, ConnectionLost):
                return b""

    def _receive(self, timeout: float | None) -> tuple[int, bytes]:
        """The next message. Raises TimeoutError; what has come of it then is kept."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            if len(self._received) >= HEADER.size:
                kind, _, _, size = HEADER.unpack_from(self._received)
                if len(self._received) >= (end := HEADER.size + size):
                    content = bytes(self._received[HEADER.size : end])
                    del self._received[:end]
                    return kind, content
            # A timeout of 0 would mean not to block, which has another exception.
            self._socket.settimeout(None if deadline is None else max(deadline - time.monotonic(), 1e-6))
            piece = self._socket.recv(HEADER.size + PAYLOAD_MAX)
            if not piece:
                raise ConnectionLost("xenstore has closed the connection")
            self._received += piece

    def close(self) -> None:
        """End the connection; a thread that waits for a message gets the end."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        with self._lock:
            self._socket.close()


class XenstoreRequests:
    """Requests, within a transaction or outside. Any thread may make them; they raise XenstoreError."""

    def __init__(self, connection: _Connection, transaction: int) -> None:
        """Made by XenstoreClient. `transaction` 0 is none."""
        self._connection = connection
        self._transaction = transaction

    def read(self, path: str) -> str:
        """The value of a node."""
        return self._ask(Op.READ, path).decode(errors="replace")

    def write(self, path: str, value: str) -> None:
        """Set a node's value, making it if need be."""
        self._ask(Op.WRITE, path, value.encode())

    def directory(self, path: str) -> list[str]:
        """The names of a node's children."""
        return [name.decode(errors="replace") for name in self._ask(Op.DIRECTORY, path).split(b"\0") if name]

    def rm(self, path: str) -> None:
        """Remove a node and all below it."""
        self._ask(Op.RM, path)

    def _ask(self, operation: Op, path: str, argument: bytes = b"") -> bytes:
        return self._connection.ask(operation, self._transaction, path.encode() + b"\0" + argument, path)


class XenstoreClient(XenstoreRequests):
    """A connection to xenstore."""

    def __init__(self, path: Path) -> None:
        """Raises ConnectionLost."""
        super().__init__(_Connection(path), 0)
        self._watches: WeakSet[XenstoreWatch] = WeakSet()

    @contextmanager
    def transaction(self) -> Iterator[XenstoreRequests]:
        """Requests that take effect together when the block ends, or not at all if it is left by an exception.

        Raises XenstoreConflict if somebody else changed a node that they looked at.
        """
        started = self._connection.ask(Op.TRANSACTION_START, 0, b"\0", "transaction")
        number = int(started.rstrip(b"\0"))
        verdict = b"F\0"
        try:
            yield XenstoreRequests(self._connection, number)
            verdict = b"T\0"
        finally:
            self._connection.ask(Op.TRANSACTION_END, number, verdict, "transaction")

    def watch(self, path: str) -> XenstoreWatch:
        """Follow the changes of a node and of all below it; also @introduceDomain and @releaseDomain."""
        watch = XenstoreWatch(self._connection.path, path)
        self._watches.add(watch)
        return watch

    def close(self) -> None:
        """End the connection and all watches."""
        for watch in list(self._watches):
            watch.close()
        self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class XenstoreWatch:
    """The paths that change. The first is the watched path itself, at once; equal ones that wait are one.

    As an iterator it ends when it is closed, or the machine is; as a context manager it is closed in the end.
    """

    def __init__(self, socket_path: Path, path: str) -> None:
        """Made by XenstoreClient.watch. Raises XenstoreError and ConnectionLost."""
        self._connection = _Connection(socket_path)
        try:
            self._connection.ask(Op.WATCH, 0, path.encode() + b"\0watch\0", path)
        except BaseException:
            self._connection.close()
            raise

    def read(self, timeout: float | None = None) -> str | None:
        """The next path; "" when the watch has ended, None when `timeout` seconds passed without any."""
        event = self._connection.message(timeout)
        return event.partition(b"\0")[0].decode(errors="replace") if event is not None else None

    def close(self) -> None:
        """End it; also for a thread that waits in `read`."""
        self._connection.close()

    def __iter__(self) -> Iterator[str]:
        while path := self.read():
            yield path

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
