"""A trunk: the routers of two daemons are one network, on which domains of both reach each other.

Each router tells the other which interfaces it has; each of those is a `RemotePort` there, to which packets go and from
which they come as if it were here.  Packets are judged where they are sent and again where they arrive, each side by
the rules of its own domains.  A domain that is relocated to the other side is announced by it when it has been made
there: from then on its packets go there, and those of its connections with domains here stay what they were.

Between three daemons there are three trunks: what came over one leaves over no other.  Whoever is at the other end is
believed which interfaces it has, as it is believed which domains it sends.

A message is its kind (u8), 1 where a checksum is to be filled in (u8), the size of a GSO packet's segments (u16) and
the length of its body (u32), big-endian; then the body: a frame; an address (u32), MTU (u16), MAC and the domain's
name; an address; or nothing, every so often, for the other side to see that we are there.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from enum import IntEnum
from struct import Struct
from typing import TYPE_CHECKING, BinaryIO, Final

from xenolith.dom0.network.frame import MAX_FRAME, Frame, address_text
from xenolith.dom0.network.port import RemotePort

if TYPE_CHECKING:
    from xenolith.dom0.network.port import VifPort
    from xenolith.dom0.network.router import Router

ALIVE_SECONDS: Final = 20.0
_HEADER: Final = Struct("!BBHI")
_INTERFACE: Final = Struct("!IH6s")
_ADDRESS: Final = Struct("!I")
_LONGEST_NAME: Final = 1024
_BATCH_BYTES: Final = 256 << 10


class _Kind(IntEnum):
    ALIVE = 0
    HERE = 1  # an interface is here now
    GONE = 2
    FRAME = 3


class TrunkError(Exception):
    """The other end does not keep to the protocol."""


class Trunk:
    """One end of a connection between two routers, from `run` to its end or to `close`."""

    def __init__(
        self,
        router: Router,
        source: BinaryIO,
        out: BinaryIO,
        hang_up: Callable[[], None],
        log: Callable[[str], None],
    ) -> None:
        """`hang_up` ends the connection, whoever reads or writes."""
        self._router: Final = router
        self._source: Final = source
        self._out: Final = out
        self._hang_up: Final = hang_up
        self._log: Final = log
        self._work: Final = threading.Condition()  # of what follows
        self._told: Final[deque[bytes]] = deque()
        self._woken = False
        self._ended = False
        self._remotes: Final[dict[int, RemotePort]] = {}  # in the router's turn

    def run(self) -> None:
        """Carry packets until the connection ends."""
        writer = threading.Thread(target=self._write_all, name="trunk out", daemon=True)
        writer.start()
        with self._router.turns:
            self._router.attach_trunk(self)
        try:
            while True:
                self._take_messages()
        except (OSError, TrunkError) as error:
            if not self._ended:
                self._log(f"network: the trunk to another daemon has ended: {error}")
        finally:
            self.close()
            with self._router.turns:
                self._router.detach_trunk(self)
                while self._remotes:
                    self._router.detach_remote(self._remotes.popitem()[1])
            writer.join()

    def close(self) -> None:
        """End it; `run` returns."""
        with self._work:
            self._ended = True
            self._work.notify()
        self._hang_up()

    # --- what the router tells, in its turn ----------------------------------------------------------------

    def announce(self, vif: VifPort) -> None:
        """An interface is here."""
        body = _INTERFACE.pack(vif.address, vif.mtu, vif.mac) + vif.domain.encode()[:_LONGEST_NAME]
        self._tell(_HEADER.pack(_Kind.HERE, 0, 0, len(body)) + body)

    def withdraw(self, address: int) -> None:
        """It is here no more."""
        self._tell(_HEADER.pack(_Kind.GONE, 0, 0, _ADDRESS.size) + _ADDRESS.pack(address))

    def _tell(self, message: bytes) -> None:
        with self._work:
            self._told.append(message)
            self._work.notify()

    def _wake(self) -> None:
        with self._work:
            self._woken = True
            self._work.notify()

    # --- to the other side -----------------------------------------------------------------------------------

    def _write_all(self) -> None:
        with suppress(OSError):
            while (messages := self._next()) is not None:
                self._out.write(messages)
                self._out.flush()
        self.close()

    def _next(self) -> bytes | None:
        """What is to be written next; None at the end."""
        with self._work:
            if not self._woken and not self._told and not self._ended:
                self._work.wait(ALIVE_SECONDS)
            if self._ended:
                return None
            messages = bytearray().join(self._told)
            self._told.clear()
            self._woken = False
        for remote in list(self._remotes.values()):
            while len(messages) < _BATCH_BYTES and (frame := remote.queue.take()) is not None:
                remote.statistics.rx_packets += 1
                remote.statistics.rx_bytes += len(frame.data)
                messages += _HEADER.pack(_Kind.FRAME, frame.csum_blank, frame.gso_size, len(frame.data)) + frame.data
            if remote.queue:
                self._wake()
        return bytes(messages) or _HEADER.pack(_Kind.ALIVE, 0, 0, 0)

    # --- from the other side ---------------------------------------------------------------------------------

    def _take_messages(self) -> None:
        """Wait for a message, and take it with those that have come by then."""
        kind, blank, gso_size, length = _HEADER.unpack(self._read(_HEADER.size))
        if length > MAX_FRAME:
            raise TrunkError(f"a message of {length} bytes")
        body = self._read(length)
        with self._router.turns:
            if kind == _Kind.FRAME:
                self._take_frame(Frame(bytearray(body), bool(blank), gso_size))
            elif kind == _Kind.HERE:
                self._take_interface(body)
            elif kind == _Kind.GONE and length == _ADDRESS.size:
                remote = self._remotes.pop(int.from_bytes(body, "big"), None)
                if remote is not None:
                    self._router.detach_remote(remote)
            elif kind != _Kind.ALIVE:
                raise TrunkError(f"a message of kind {kind}")

    def _read(self, size: int) -> bytes:
        data = self._source.read(size)
        if len(data) < size:
            raise TrunkError("it has closed the connection")
        return data

    def _take_frame(self, frame: Frame) -> None:
        """From one of its interfaces; anything else goes nowhere."""
        remote = self._remotes.get(int.from_bytes(frame.data[26:30], "big"))
        if remote is not None:
            self._router.receive(remote, frame)

    def _take_interface(self, body: bytes) -> None:
        if not _INTERFACE.size < len(body) <= _INTERFACE.size + _LONGEST_NAME:
            raise TrunkError(f"an interface in {len(body)} bytes")
        address, mtu, mac = _INTERFACE.unpack_from(body)
        name = body[_INTERFACE.size :].decode("utf-8", "replace")
        router = self._router
        remote = RemotePort(
            router.number(),
            f"{address_text(address)} elsewhere",
            self._wake,
            domain=name,
            mac=mac,
            address=address,
            mtu=mtu,
        )
        if router.attach_remote(remote):
            known = self._remotes.get(address)
            if known is not None:
                router.detach_remote(known)
            self._remotes[address] = remote
        else:
            self._log(f"network: another interface here has {address_text(address)}, which {name} has elsewhere")
