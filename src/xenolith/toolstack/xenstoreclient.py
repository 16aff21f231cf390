"""A client of xenstore's UNIX socket: the requests that programs make most (Xen: libxenstore; abi.xs_wire)."""

from __future__ import annotations

import socket
import threading
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from xenolith.abi.xs_wire import HEADER, PAYLOAD_MAX, Op
from xenolith.toolstack.client import ConnectionLost, ToolstackError

_SECONDS: Final = 30.0


class XenstoreError(ToolstackError):
    """xenstore refused a request; `name` is the error's, such as "ENOENT"."""

    def __init__(self, name: str, path: str) -> None:
        super().__init__(f"xenstore: {path}: {name}")
        self.name = name


class XenstoreClient:
    """A connection. Any thread may use it; requests wait for each other."""

    def __init__(self, path: Path) -> None:
        """Raises ConnectionLost."""
        self._lock = threading.Lock()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.settimeout(_SECONDS)
        try:
            self._socket.connect(str(path))
        except OSError as error:
            self._socket.close()
            raise ConnectionLost(f"cannot connect to xenstore at {path}: {error.strerror or error}") from error

    def read(self, path: str) -> str:
        """The value of a node. Raises XenstoreError, as all requests do."""
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

    def close(self) -> None:
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _ask(self, operation: Op, path: str, argument: bytes = b"") -> bytes:
        payload = path.encode() + b"\0" + argument
        if len(payload) > PAYLOAD_MAX:
            raise XenstoreError("E2BIG", path)
        try:
            with self._lock:
                self._socket.sendall(HEADER.pack(operation, 0, 0, len(payload)) + payload)
                answer, _, _, size = HEADER.unpack(self._receive(HEADER.size))
                content = self._receive(size)
        except OSError as error:
            raise ConnectionLost(f"xenstore does not answer: {error}") from error
        if answer == Op.ERROR:
            raise XenstoreError(content.rstrip(b"\0").decode(), path)
        return content

    def _receive(self, size: int) -> bytes:
        data = bytearray()
        while len(data) < size:
            piece = self._socket.recv(size - len(data))
            if not piece:
                raise ConnectionLost("xenstore has closed the connection")
            data += piece
        return bytes(data)
