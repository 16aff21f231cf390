"""A bare xenstore client for tests: messages to and from a :class:`Connection`, with nothing in between."""

from __future__ import annotations

from typing import Final

from xenolith.abi.xs_wire import HEADER, Op
from xenolith.dom0.xenstore.connection import Connection
from xenolith.dom0.xenstore.xenstored import Xenstored

Message = tuple[Op, int, int, bytes]
"""type, req_id, tx_id, payload"""


def pack(op: int, payload: bytes = b"", tx: int = 0, req: int = 0) -> bytes:
    """One message as it travels."""
    return HEADER.pack(op, req, tx, len(payload)) + payload


def unpack(stream: bytes) -> list[Message]:
    """The messages of a stream, which must end where a message ends."""
    messages = []
    while stream:
        kind, req, tx, length = HEADER.unpack_from(stream)
        messages.append((Op(kind), req, tx, stream[HEADER.size : HEADER.size + length]))
        assert len(stream) >= HEADER.size + length
        stream = stream[HEADER.size + length :]
    return messages


class Client:
    """Sends one request at a time; ``events`` collects the watch events that came in between."""

    def __init__(self, daemon: Xenstored, domid: int = 0) -> None:
        self.connection: Final = Connection(daemon, domid, lambda connection: None)
        self.events: list[tuple[bytes, bytes]] = []
        self._req = 0
        if domid:
            daemon.introduce(self.connection)

    def ask(self, op: int, payload: bytes = b"", tx: int = 0) -> tuple[str, bytes]:
        """The answer's type and payload; its ids are checked here."""
        self._req += 1
        self.connection.feed(pack(op, payload, tx, self._req))
        self.connection.process(1)
        answers = [message for message in self._fetch() if message[0] != Op.WATCH_EVENT]
        assert len(answers) == 1
        kind, req, tx_id, data = answers[0]
        assert (req, tx_id) == (self._req, tx)
        return kind.name, data

    def ok(self, op: int, payload: bytes = b"", tx: int = 0) -> bytes:
        """The payload of an answer that must not be an error."""
        kind, data = self.ask(op, payload, tx)
        assert kind == Op(op).name, data
        return data

    def error(self, op: int, payload: bytes = b"", tx: int = 0) -> str:
        """The error name which the request must be answered with."""
        kind, data = self.ask(op, payload, tx)
        assert kind == "ERROR", (kind, data)
        return data[:-1].decode()

    def take_events(self) -> list[tuple[bytes, bytes]]:
        """(path, token) of the events since the last call."""
        self._fetch()
        events, self.events = self.events, []
        return events

    def _fetch(self) -> list[Message]:
        stream = b""
        while chunk := self.connection.output(1 << 20):
            self.connection.sent(len(chunk))
            stream += chunk
        messages = unpack(stream)
        for message in messages:
            if message[0] == Op.WATCH_EVENT:
                path, token, _ = message[3].split(b"\0")
                self.events.append((path, token))
        return messages
