"""Connections that the router knows, and address translation (paper 3.4.1; RFC 4787, RFC 5382 in spirit).

A connection's first packet is judged by the rules; what they said is kept with the connection and holds for all its
packets both ways, until any rule changes.  Towards the outside the domains share one address, so a connection is known
there by a port of the router's choice.  Each way has a `Path`: who gets the packets, and what is written into them.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, TypeAlias

from xenolith.dom0.network.frame import TCP, TCP_FIN, TCP_RST, UDP, Drop

if TYPE_CHECKING:
    from xenolith.dom0.network.frame import Packet
    from xenolith.dom0.network.port import Port
    from xenolith.dom0.network.rules import Rule

MAX_FLOWS: Final = 4096  # that one port may have opened
SECOND_CHANCES: Final = 16
IDLE_SECONDS: Final = {TCP: 7200.0, UDP: 180.0}
IDLE_SECONDS_OTHERS: Final = 60.0
CLOSING_SECONDS: Final = 60.0  # after FIN or RST
FRESH_SECONDS: Final = 30.0  # a table that is full keeps what was used so lately

Key: TypeAlias = tuple[int, int, int, int, int, int]
"""The port it comes from, protocol, source, its port, destination, its port."""


@dataclass(slots=True, eq=False)
class Flow:
    """A connection."""

    origin: Port
    target: Port
    protocol: int
    key: Key  # of its first packet
    destination: int  # where its rules see it going, after translation
    destination_port: int
    generation: int  # of the rules that judged it
    allowed: bool = False
    rules: tuple[Rule, ...] = ()  # that judged it
    last_used: float = 0.0
    closing: bool = False
    paths: list[Path] = field(default_factory=list)

    def expired(self, now: float) -> bool:
        limit = CLOSING_SECONDS if self.closing else IDLE_SECONDS.get(self.protocol, IDLE_SECONDS_OTHERS)
        return now - self.last_used > limit


@dataclass(slots=True, eq=False)
class Path:
    """One way of a connection. What is None stays as it is."""

    flow: Flow
    key: Key
    port: Port
    source: int | None = None
    source_port: int | None = None
    destination: int | None = None
    destination_port: int | None = None

    @property
    def translates(self) -> bool:
        return self.source is not None or self.destination is not None


def key_of(port: Port, packet: Packet) -> Key:
    return (
        port.number,
        packet.protocol,
        packet.source,
        packet.source_port,
        packet.destination,
        packet.destination_port,
    )


class Flows:
    """The table of all connections. Used in the router's turn."""

    def __init__(self) -> None:
        self._paths: Final[dict[Key, Path]] = {}
        self._opened: Final[dict[Port, dict[Flow, None]]] = {}  # by who opened them, oldest first

    def __len__(self) -> int:
        return len(self._paths)

    def find(self, key: Key, now: float) -> Path | None:
        """The way that a packet goes, if its connection is known."""
        path = self._paths.get(key)
        if path is not None and path.flow.expired(now):
            self._forget(path.flow)
            return None
        return path

    def open(self, origin: Port, target: Port, packet: Packet, generation: int, now: float) -> Path:
        """A connection within this machine."""
        key = key_of(origin, packet)
        flow = Flow(
            origin, target, packet.protocol, key, packet.destination, packet.destination_port, generation, last_used=now
        )
        _, protocol, source, source_port, destination, destination_port = key
        flow.paths = [
            Path(flow, key, target),
            Path(flow, (target.number, protocol, destination, destination_port, source, source_port), origin),
        ]
        return self._add(flow, now)

    def open_outwards(
        self, origin: Port, target: Port, public: int, packet: Packet, generation: int, now: float
    ) -> Path:
        """A connection to the outside, where it comes from the address `public`. Raises Drop."""
        key = key_of(origin, packet)
        flow = Flow(
            origin, target, packet.protocol, key, packet.destination, packet.destination_port, generation, last_used=now
        )
        _, protocol, source, source_port, destination, destination_port = key
        public_port = self._free_port(target, protocol, destination, destination_port, public, source_port)
        back = (target.number, protocol, destination, destination_port, public, public_port)
        flow.paths = [
            Path(flow, key, target, source=public, source_port=public_port),
            Path(flow, back, origin, destination=source, destination_port=source_port),
        ]
        return self._add(flow, now)

    def _free_port(self, target: Port, protocol: int, address: int, port: int, public: int, wanted: int) -> int:
        for _ in range(64):
            if wanted >= 1024 and (target.number, protocol, address, port, public, wanted) not in self._paths:
                return wanted
            wanted = 1024 + secrets.randbelow(64512)
        raise Drop("no free port")

    def open_inwards(
        self, origin: Port, target: Port, address: int, port: int, packet: Packet, generation: int, now: float
    ) -> Path:
        """A connection from the outside to a published port, which is `port` of `address`."""
        key = key_of(origin, packet)
        flow = Flow(origin, target, packet.protocol, key, address, port, generation, last_used=now)
        _, protocol, source, source_port, public, public_port = key
        flow.paths = [
            Path(flow, key, target, destination=address, destination_port=port),
            Path(
                flow,
                (target.number, protocol, address, port, source, source_port),
                origin,
                source=public,
                source_port=public_port,
            ),
        ]
        return self._add(flow, now)

    def note(self, flow: Flow, packet: Packet, now: float) -> None:
        """A packet went this way."""
        flow.last_used = now
        if packet.flags & (TCP_FIN | TCP_RST):
            flow.closing = True

    def forget_port(self, port: Port) -> None:
        """A port is gone, and with it its connections."""
        for flow in {path.flow for path in self._paths.values() if port in (path.flow.origin, path.flow.target)}:
            self._forget(flow)
        self._opened.pop(port, None)

    def _add(self, flow: Flow, now: float) -> Path:
        opened = self._opened.setdefault(flow.origin, {})
        if len(opened) >= MAX_FLOWS:
            self._make_room(opened, now)
        for path in flow.paths:
            known = self._paths.get(path.key)
            if known is not None:
                self._forget(known.flow)
            self._paths[path.key] = path
        opened[flow] = None
        return flow.paths[0]

    def _make_room(self, opened: dict[Flow, None], now: float) -> None:
        """Give up the oldest that was not used of late, or just the oldest."""
        for _ in range(SECOND_CHANCES):
            flow = next(iter(opened))
            if not flow.allowed or flow.closing or now - flow.last_used > FRESH_SECONDS:
                break
            opened[flow] = opened.pop(flow)
        self._forget(next(iter(opened)))

    def _forget(self, flow: Flow) -> None:
        for path in flow.paths:
            if self._paths.get(path.key) is path:
                del self._paths[path.key]
        self._opened.get(flow.origin, {}).pop(flow, None)
