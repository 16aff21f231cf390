"""Daemons that talk to each other without anybody between: addresses, connections, and who may come.

    unix:/run/other.sock    a UNIX socket; only this user and root may come
    tls:HOST:PORT           TCP with TLS, both sides with a certificate

For TLS a daemon has a directory (XENOLITH_TLS, else `~/.config/xenolith/tls`) with `cert.pem`, `key.pem` and `ca.pem`;
whoever has a certificate of that authority may come, and a host must be the one that its certificate says.

The first line that a caller sends says what for: `relocate`, `settle TOKEN`, `protect`, `network`.
"""

from __future__ import annotations

import io
import os
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final

from xenolith.toolstack.daemon.protocol import PEER_CREDENTIALS
from xenolith.toolstack.errors import InvalidRequest, ToolstackError

PATIENCE_SECONDS: Final = 120.0  # for the other side to do anything at all
GREETING_SECONDS: Final = 20.0
BUFFER: Final = 1 << 20
MOST_CALLERS: Final = 64
GREETING_BYTES: Final = 200
HAS_COME: Final = b"it has come\n"
HAS_NOT_COME: Final = b"it has not come\n"
TLS_VARIABLE: Final = "XENOLITH_TLS"


@dataclass(frozen=True)
class Connection:
    """To another daemon, or somebody who passes bytes on to one."""

    source: BinaryIO
    out: BinaryIO
    hang_up: Callable[[], None]

    def answer(self, line: bytes) -> None:
        """Raises OSError."""
        self.out.write(line)
        self.out.flush()


def is_address(text: str) -> bool:
    """Whether this is the address of a daemon."""
    return text.startswith(("unix:", "tls:"))


@contextmanager
def connected(to: str, greeting: str) -> Iterator[Connection]:
    """A connection to an address, or to the socket of this absolute path, where nobody expects the greeting.

    Raises ToolstackError.
    """
    try:
        connection = _dial(to)
    except OSError as error:
        raise ToolstackError(f"cannot connect to {to}: {error.strerror or error}") from error
    with over(connection) as found:
        if is_address(to):
            found.out.write(greeting.encode() + b"\n")
        yield found


@contextmanager
def over(connection: socket.socket) -> Iterator[Connection]:
    """A socket, which is closed afterwards."""

    def hang_up() -> None:
        with suppress(OSError):
            connection.shutdown(socket.SHUT_RDWR)

    with connection:
        out = io.BufferedWriter(connection.makefile("wb", 0), BUFFER)
        with connection.makefile("rb", 0) as raw, io.BufferedReader(raw, BUFFER) as source:
            try:
                yield Connection(source, out, hang_up)
                with suppress(OSError):
                    out.flush()
            finally:
                hang_up()  # what could not be sent is not to be sent now
                with suppress(OSError):
                    out.close()


def _dial(to: str) -> socket.socket:
    """Raises OSError."""
    if to.startswith("tls:"):
        host, port = _host_and_port(to)
        plain = socket.create_connection((host, port), PATIENCE_SECONDS)
        try:
            plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return _tls(ssl.Purpose.SERVER_AUTH).wrap_socket(plain, server_hostname=host)
        except BaseException:
            plain.close()
            raise
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.settimeout(PATIENCE_SECONDS)
        connection.connect(to.removeprefix("unix:"))
    except BaseException:
        connection.close()
        raise
    return connection


def _host_and_port(address: str) -> tuple[str, int]:
    host, _, port = address.removeprefix("tls:").rpartition(":")
    if not host or not port.isascii() or not port.isdigit() or not 0 < int(port) < 1 << 16:
        raise InvalidRequest(f"{address} is no address: it should be tls:HOST:PORT.")
    return host.strip("[]"), int(port)


def _tls(purpose: ssl.Purpose) -> ssl.SSLContext:
    """Raises OSError, of which SSLError is one."""
    chosen = os.environ.get(TLS_VARIABLE)
    directory = Path(chosen) if chosen else Path.home() / ".config" / "xenolith" / "tls"
    context = ssl.create_default_context(purpose, cafile=directory / "ca.pem")
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_cert_chain(directory / "cert.pem", directory / "key.pem")
    return context


class Listener:
    """Waits at an address for other daemons; each is served by a thread. Close it."""

    def __init__(self, address: str, serve: Callable[[str, Connection], None], log: Callable[[str], None]) -> None:
        """`serve` is called with the first line that a caller sends. Raises ToolstackError."""
        self.address: Final = address
        self._serve = serve
        self._log = log
        self._callers = threading.BoundedSemaphore(MOST_CALLERS)
        self._context: ssl.SSLContext | None = None
        try:
            self._socket = self._listen(address)
        except OSError as error:
            raise ToolstackError(f"cannot listen at {address}: {error.strerror or error}") from error
        threading.Thread(target=self._accept, name=f"listener at {address}", daemon=True).start()

    def _listen(self, address: str) -> socket.socket:
        if address.startswith("tls:"):
            host, port = _host_and_port(address)
            self._context = _tls(ssl.Purpose.CLIENT_AUTH)
            return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
        if not address.startswith("unix:/"):
            raise InvalidRequest(f"{address} is no address: it should be unix:/PATH or tls:HOST:PORT.")
        path = Path(address.removeprefix("unix:"))
        with suppress(OSError):
            if path.is_socket():
                path.unlink()
        listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            listening.bind(str(path))
            path.chmod(0o600)
            listening.listen()
        except BaseException:
            listening.close()
            raise
        return listening

    def _accept(self) -> None:
        while True:
            self._callers.acquire()
            try:
                caller, _ = self._socket.accept()
                threading.Thread(target=self._greet, args=(caller,), daemon=True).start()
            except (OSError, RuntimeError):  # closed; or the host gives no thread
                return

    def _greet(self, caller: socket.socket) -> None:
        try:
            caller.settimeout(GREETING_SECONDS)
            if self._context is not None:
                caller.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                caller = self._context.wrap_socket(caller, server_side=True)
            else:
                credentials = caller.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, PEER_CREDENTIALS.size)
                _, user, _ = PEER_CREDENTIALS.unpack(credentials)
                if user not in (0, os.getuid()):
                    raise ToolstackError(f"user {user} may not come")
            with over(caller) as connection:
                greeting = connection.source.readline(GREETING_BYTES).decode("ascii", "replace").rstrip("\n")
                caller.settimeout(PATIENCE_SECONDS)
                self._serve(greeting, connection)
        except (OSError, ToolstackError) as error:
            self._log(f"{self.address}: {error}")
        finally:
            caller.close()
            self._callers.release()

    def close(self) -> None:
        """Let nobody come any more; who is there stays."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        if self.address.startswith("unix:"):
            Path(self.address.removeprefix("unix:")).unlink(missing_ok=True)
