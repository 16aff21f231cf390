"""What is said over the daemon's socket: messages, their schema and their framing.

Every message is a JSON object, sent as its length in bytes (four bytes, big-endian) and its UTF-8 text. The client
speaks first, with `Hello`; the daemon answers with `Welcome`. Then each request is answered by any number of
`Progress` messages and exactly one `Result` or `Error`; requests of one connection are dealt with one after the other.

A request whose method returns an EventStream is answered with a Result and then one `Event` after the other, one that
returns a ConsoleStream with a Result and then `Output` messages, while the client may send `Input`; each keeps the
connection to itself. A stream ends with `End`, or when either side closes the connection. A ProcessStream
is a Result, then `ProcessOutput` and in the end `ProcessEnd`, while the client may send `Input`, `EndOfInput`, `Signal`
and `Resize`.

The requests are the verbs of `client.Client` and `client.Supervision`; their arguments and results are checked
against the types of those methods (see `codec` for how types become JSON). docs/control-protocol.md is the description
for people who write a client in another language.
"""

from __future__ import annotations

import json
import socket
import struct
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Final

from xenolith.toolstack.client import (
    Client,
    ConnectionLost,
    DomainEvent,
    DomainNotFound,
    EngineUnavailable,
    InvalidRequest,
    NotAcknowledged,
    NotSupported,
    ProcessEnd,
    ProcessOutput,
    Progress,
    Supervision,
    ToolstackError,
    Undetermined,
)
from xenolith.toolstack.daemon.codec import CodecError, Json, decode, encode
from xenolith.toolstack.verbs import verbs_of

VERSION: Final = 1
MAX_MESSAGE_BYTES: Final = 4 << 20

PEER_CREDENTIALS: Final = struct.Struct("3i")  # pid, uid, gid: what SO_PEERCRED gives (struct ucred)

_LENGTH = struct.Struct(">I")


@dataclass(frozen=True, slots=True)
class Hello:
    """The first message: which version of this protocol the client speaks."""

    version: int


@dataclass(frozen=True, slots=True)
class Welcome:
    """The daemon's answer: the version that both speak, and who it is."""

    version: int
    pid: int


@dataclass(frozen=True, slots=True)
class Request:
    """A method and its arguments by name."""

    method: str
    arguments: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Result:
    """What a request gave."""

    value: Any = None


@dataclass(frozen=True, slots=True)
class Error:
    """Why a request was not fulfilled. `kind` is the name of an exception, `rc` libxl's number for it."""

    kind: str
    text: str
    rc: int
    domid: int | None = None


@dataclass(frozen=True, slots=True)
class Event:
    event: DomainEvent


@dataclass(frozen=True, slots=True)
class Input:
    data: bytes


@dataclass(frozen=True, slots=True)
class Output:
    data: bytes


@dataclass(frozen=True, slots=True)
class EndOfInput:
    """A process gets no more input."""


@dataclass(frozen=True, slots=True)
class Signal:
    """Send a process a signal."""

    number: int


@dataclass(frozen=True, slots=True)
class Resize:
    """The terminal of a process has another size."""

    rows: int
    columns: int


@dataclass(frozen=True, slots=True)
class End:
    """A stream is over."""


MESSAGES: Final = {
    "hello": Hello,
    "welcome": Welcome,
    "request": Request,
    "result": Result,
    "error": Error,
    "progress": Progress,
    "event": Event,
    "input": Input,
    "output": Output,
    "process_output": ProcessOutput,
    "process_end": ProcessEnd,
    "end_of_input": EndOfInput,
    "signal": Signal,
    "resize": Resize,
    "end": End,
}
"""Message types by the name that they have on the wire: a message is an object with that one member."""

Message = (
    Hello
    | Welcome
    | Request
    | Result
    | Error
    | Progress
    | Event
    | Input
    | Output
    | ProcessOutput
    | ProcessEnd
    | EndOfInput
    | Signal
    | Resize
    | End
)

_NAMES: Final = {kind: name for name, kind in MESSAGES.items()}
_UNTYPED: Final = (Request, Result)  # their contents are typed by the method


METHODS: Final = verbs_of(Client) | verbs_of(Supervision)
"""The requests by name."""

_ERRORS: Final = {
    kind.__name__: kind
    for kind in (
        ToolstackError,
        InvalidRequest,
        NotAcknowledged,
        NotSupported,
        ConnectionLost,
        EngineUnavailable,
        Undetermined,
    )
}


def error_message(error: ToolstackError) -> Error:
    """The message for an exception."""
    domid = error.domid if isinstance(error, DomainNotFound) else None
    return Error(type(error).__name__, str(error), error.rc, domid)


def exception(error: Error) -> ToolstackError:
    """The exception for a message; an unknown kind becomes a plain ToolstackError."""
    if error.kind == DomainNotFound.__name__ and error.domid is not None:
        return DomainNotFound(error.domid)
    return _ERRORS.get(error.kind, ToolstackError)(error.text)


def check_arguments(request: Request) -> dict[str, Any]:
    """The arguments of a request, checked and decoded. Raises CodecError."""
    method = METHODS.get(request.method)
    if method is None:
        raise CodecError(f"there is no request '{request.method[:60]}'")
    missing = method.arguments.keys() - method.optional - request.arguments.keys()
    unknown = request.arguments.keys() - method.arguments.keys()
    if missing or unknown:
        names = ", ".join(sorted(map(repr, missing or unknown)))
        raise CodecError(f"{request.method} {'lacks' if missing else 'has no'} argument {names}")
    return {name: decode(method.arguments[name], value) for name, value in request.arguments.items()}


def to_bytes(message: Message) -> bytes:
    """A message with its length in front."""
    text = json.dumps({_NAMES[type(message)]: encode(message)}, ensure_ascii=False, separators=(",", ":"))
    body = text.encode("utf-8", errors="surrogatepass")
    return _LENGTH.pack(len(body)) + body


def from_bytes(body: bytes) -> Message:
    """The message that a frame's bytes hold. Raises CodecError."""
    try:
        value: Json = json.loads(body.decode("utf-8", errors="surrogatepass"))
    except (ValueError, RecursionError) as error:
        raise CodecError(f"a message is not JSON: {error}") from None
    if not isinstance(value, dict) or len(value) != 1:
        raise CodecError("a message must be an object with one member")
    ((name, content),) = value.items()
    kind = MESSAGES.get(name)
    if kind is None:
        raise CodecError(f"there is no message '{name[:60]}'")
    if kind in _UNTYPED:
        return _decode_untyped(kind, content)
    message: Message = decode(kind, content)
    return message


def _decode_untyped(kind: Any, content: Json) -> Message:
    if not isinstance(content, dict) or content.keys() - {"method", "arguments", "value"}:
        raise CodecError(f"a {_NAMES[kind]} has other fields")
    if kind is Result:
        return Result(content.get("value"))
    method, arguments = content.get("method"), content.get("arguments", {})
    if not isinstance(method, str) or not isinstance(arguments, dict):
        raise CodecError("a request has a 'method', which is text, and 'arguments', which are an object")
    return Request(method, arguments)


class Channel:
    """Messages over a connected socket. One thread may send while another receives."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection

    def send(self, message: Message) -> None:
        """Raises ConnectionLost when the peer is gone or does not read for the socket's timeout."""
        try:
            self._socket.sendall(to_bytes(message))
        except OSError as error:
            raise ConnectionLost(f"the connection was lost: {error.strerror or error}") from error

    def receive(self) -> Message | None:
        """The next message; None when the peer has closed the connection. Raises CodecError and ConnectionLost."""
        header = self._read(_LENGTH.size)
        if header is None:
            return None
        (length,) = _LENGTH.unpack(header)
        if length > MAX_MESSAGE_BYTES:
            raise CodecError(f"a message of {length} bytes is too long")
        body = self._read(length)
        if body is None:
            raise ConnectionLost("the connection was closed in the middle of a message")
        return from_bytes(body)

    def messages(self) -> Iterator[Message]:
        """All messages up to the end of the connection."""
        while (message := self.receive()) is not None:
            yield message

    def _read(self, count: int) -> bytes | None:
        """Exactly `count` bytes; None at the end of the stream."""
        parts = bytearray()
        while len(parts) < count:
            try:
                part = self._socket.recv(min(count - len(parts), 1 << 16))
            except OSError as error:
                raise ConnectionLost(f"the connection was lost: {error.strerror or error}") from error
            if not part:
                if parts:
                    raise ConnectionLost("the connection was closed in the middle of a message")
                return None
            parts += part
        return bytes(parts)

    def close(self) -> None:
        """End the connection, also for a thread that waits in `receive`."""
        with suppress(OSError):  # the peer may have been quicker
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
