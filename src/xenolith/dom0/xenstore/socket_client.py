"""A tool's way to the store: a stream socket. Tools speak for dom0.

The socket never blocks. What the tool does not read stays in the connection's bounded queue; what it does not finish
sending costs the bytes it has sent so far; when it goes away its watches and transactions go with it.
"""

from __future__ import annotations

import selectors
import socket
from collections.abc import Callable
from typing import Final

from xenolith.dom0.xenstore.connection import Connection
from xenolith.dom0.xenstore.xenstored import Xenstored

_RECEIVE: Final = 16384
_SEND: Final = 65536


class SocketConnection(Connection):
    """One accepted tool. Everything needs the service's lock."""

    def __init__(self, daemon: Xenstored, stream: socket.socket, wake: Callable[[Connection], None]) -> None:
        super().__init__(daemon, 0, wake)
        stream.setblocking(False)
        self.stream: Final = stream
        self.closed = False
        self.interest = selectors.EVENT_READ
        """What the service's selector watches the socket for; 0 once it is out of the selector."""

    def receive(self) -> None:
        """Take what the tool has sent, if it is listened to."""
        if not self.wants_input:
            return
        try:
            data = self.stream.recv(_RECEIVE)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if data:
            self.feed(data)
        else:
            self.close()

    def serve(self, limit: int) -> None:
        """One turn: run at most ``limit`` requests, send what the socket takes."""
        if self.closed:
            return
        self.process(limit)
        try:
            while self.output_waiting:
                self.sent(self.stream.send(self.output(_SEND)))
        except BlockingIOError:
            pass
        except OSError:
            self.close()
        if self.failure:
            self.close()

    @property
    def wants_turn(self) -> bool:
        """Whether there is more to do before the socket is ready again."""
        return not self.closed and not self.failure and self.has_request and self.listening

    def close(self) -> None:
        """Hang up and give back everything the tool held."""
        if not self.closed:
            self.closed = True
            self.daemon.reset(self)
            self.forget_stream()
