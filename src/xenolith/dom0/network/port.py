"""What the virtual firewall-router connects: virtual interfaces and ways to the outside."""

from __future__ import annotations

import struct
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import astuple, dataclass, field
from typing import TYPE_CHECKING, Final

from xenolith.dom0.network.fair import FairQueue
from xenolith.dom0.network.frame import MTU, Frame
from xenolith.dom0.network.rules import Policy

if TYPE_CHECKING:
    from xenolith.dom0.network.router import Router

MAX_CAPTURED: Final = 4 << 20  # bytes that wait for the reader of a capture
MAX_PLUGGED: Final = 16 << 20  # bytes of an interface that wait for an epoch to be acknowledged
MAX_NAMES: Final = 1024  # addresses of DNS names that one interface may have been told
MAX_NAMES_OF_ADDRESS: Final = 64  # the latest


@dataclass(slots=True)
class PortStatistics:
    """What came and went, as the machine at the port's other end sees it: rx is what it got."""

    rx_packets: int = 0
    rx_bytes: int = 0
    tx_packets: int = 0
    tx_bytes: int = 0
    rx_dropped: int = 0
    tx_dropped: int = 0

    @classmethod
    def total(cls, statistics: Iterable[PortStatistics]) -> PortStatistics:
        """The sum of several ports'."""
        return cls(*map(sum, zip(*map(astuple, statistics), strict=True)))


class Capture:
    """Copies of a port's frames in pcap's format (LINKTYPE_ETHERNET, nanoseconds), for one reader."""

    def __init__(self) -> None:
        self._chunks: Final[deque[bytes]] = deque()
        self._changed: Final = threading.Condition()
        self._bytes = 0
        self._closed = False
        self.missed = 0
        """Frames that were not kept because the reader was slow."""
        self._add(struct.pack("<IHHiIII", 0xA1B23C4D, 2, 4, 0, 0, 1 << 18, 1))

    def note(self, frame: Frame) -> None:
        """From the router: a frame passed."""
        data = bytes(frame.data)
        if self._bytes + len(data) > MAX_CAPTURED:
            self.missed += 1
            return
        now = time.time_ns()
        self._add(struct.pack("<IIII", now // 1_000_000_000, now % 1_000_000_000, len(data), len(data)) + data)

    def _add(self, chunk: bytes) -> None:
        with self._changed:
            self._chunks.append(chunk)
            self._bytes += len(chunk)
            self._changed.notify_all()

    def read(self, timeout: float | None = None) -> bytes | None:
        """What was captured since; b"" at the end, None when `timeout` seconds passed without any."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._chunks or self._closed, timeout):
                return None
            chunk = b"".join(self._chunks)
            self._chunks.clear()
            self._bytes = 0
            return chunk

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()


class Port:
    """Something that sends frames to the router and takes its frames from `queue` when woken."""

    mac: bytes  # of the machine at the other end
    mtu: int = MTU

    def __init__(self, number: int, name: str, wake: Callable[[], None]) -> None:
        self.number: Final = number
        self.name: Final = name
        self.wake: Final = wake
        self.queue: Final = FairQueue()
        self.statistics: Final = PortStatistics()
        self.drops: Final[Counter[str]] = Counter()
        """Frames that the other end sent and that went nowhere, by reason."""
        self.captures: tuple[Capture, ...] = ()

    def send(self, sender: int, frame: Frame) -> None:
        """Let a frame out, unless too many of its sender's wait already. In the router's turn."""
        for capture in self.captures:
            capture.note(frame)
        if self.queue.put(sender, frame):
            self.wake()
        else:
            self.statistics.rx_dropped += 1


@dataclass(frozen=True, slots=True)
class Publication:
    """A port of the host's that leads to a domain's."""

    protocol: int
    host_address: str
    host_port: int
    guest_port: int


@dataclass(slots=True)
class Names:
    """The addresses that our DNS forwarder told an interface, with their names, as long as they are valid.

    Used in the router's turn.
    """

    clock: Callable[[], float]
    _told: dict[int, dict[str, float]] = field(default_factory=dict)

    def tell(self, address: int, name: str, seconds: float) -> None:
        """It was told that `name` has this address."""
        now = self.clock()
        known = {each: until for each, until in self._told.pop(address, {}).items() if until >= now}
        known[name] = max(now + seconds, known.pop(name, 0.0))
        while len(known) > MAX_NAMES_OF_ADDRESS:
            del known[next(iter(known))]
        self._told[address] = known
        while len(self._told) > MAX_NAMES:
            del self._told[next(iter(self._told))]

    def of(self, address: int) -> Iterable[str]:
        """The names of an address that are valid now."""
        now = self.clock()
        known = self._told.get(address)
        if not known:
            return ()
        return [name for name, until in known.items() if until >= now]


class VifPort(Port):
    """A domain's virtual interface."""

    def __init__(
        self,
        number: int,
        name: str,
        wake: Callable[[], None],
        *,
        domain: str,
        mac: bytes,
        address: int,
        policy: Policy,
        clock: Callable[[], float],
        mtu: int = MTU,
        publications: tuple[Publication, ...] = (),
    ) -> None:
        super().__init__(number, name, wake)
        self.domain: Final = domain
        self.mac = mac
        self.address: Final = address
        self.mtu = mtu
        self.policy = policy
        self.names: Final = Names(clock)
        self.publications: Final = publications
        self.uplink: UplinkPort | None = None  # its own; else the machine's
        self.plug: Plug | None = None


class RemotePort(Port):
    """An interface of a domain of another daemon's (`trunk`)."""

    def __init__(
        self, number: int, name: str, wake: Callable[[], None], *, domain: str, mac: bytes, address: int, mtu: int
    ) -> None:
        super().__init__(number, name, wake)
        self.domain: Final = domain
        self.mac = mac
        self.address: Final = address
        self.mtu = mtu


class Plug:
    """Holds what an interface sends until it may be let out, an epoch at a time. Close it."""

    def __init__(self, router: Router, vif: VifPort) -> None:
        self._router: Final = router
        self._vif: Final = vif
        self._waiting: Final[deque[Frame]] = deque()
        self._bytes = 0
        self._marked = 0  # how many of the frames that wait belong to the epoch that ended
        with router.turns:
            vif.plug = self

    def hold(self, frame: Frame) -> bool:
        """In the router's turn: False where it is too much, and the frame is lost."""
        if self._bytes + len(frame.data) > MAX_PLUGGED:
            return False
        self._waiting.append(frame)
        self._bytes += len(frame.data)
        return True

    def mark(self) -> None:
        """An epoch ends."""
        with self._router.turns:
            self._marked = len(self._waiting)

    def release(self) -> None:
        """Let out what was sent in the epoch that ended."""
        with self._router.turns:
            marked, self._marked = self._marked, 0
            for _ in range(marked):
                self._let_out()

    def close(self) -> None:
        """Let out all that waits, and hold nothing any more."""
        with self._router.turns:
            self._vif.plug = None
            while self._waiting:
                self._let_out()

    def _let_out(self) -> None:
        frame = self._waiting.popleft()
        self._bytes -= len(frame.data)
        self._router.forward(self._vif, frame)


class UplinkPort(Port):
    """A way to the outside, where all domains are `address`."""

    def __init__(
        self, number: int, name: str, wake: Callable[[], None], *, mac: bytes, address: int, gateway: int, mtu: int
    ) -> None:
        super().__init__(number, name, wake)
        self.own_mac: Final = mac
        self.mac = b"\xff" * 6  # the gateway's, once it is known
        self.address: Final = address
        self.gateway: Final = gateway
        self.mtu = mtu
        self.published: dict[tuple[int, int], tuple[VifPort, int]] = {}
        """By protocol and port of `address`: whose it is, and which of his ports."""
