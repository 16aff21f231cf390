"""A network front-end that the test plays, and the packets it sends."""

from __future__ import annotations

import functools
import struct
import threading
from collections.abc import Iterable
from ipaddress import IPv4Address
from typing import Final

from xenolith.abi import netif
from xenolith.abi.io_ring import REQ_EVENT, REQ_PROD, RSP_EVENT, RSP_PROD
from xenolith.abi.xenbus import XenbusState as S
from xenolith.dom0.backends.net import NetBackend, VifSpec
from xenolith.dom0.network.frame import UDP, ethernet, ipv4, mac_text, udp
from xenolith.dom0.network.network import Network
from xenolith.dom0.network.router import ROUTER_MAC
from xenolith.dom0.rings import SharedRing
from xenolith.dom0.xenbus import Device, Xenbus
from xenolith.dom0.xenstore import XenstoreService

from .frontends import DEADLINE_SECONDS, PAGE, FakeDom0, Follower, state

TX_REF, RX_REF, TX_PORT, RX_PORT = 8, 9, 3, 4
TX_DATA, RX_DATA = 100, 500  # grant references from here on
BUFFERS: Final = 256


@functools.cache
def why_no_passt() -> str:
    """Why passt does not start here; empty if it does."""
    from xenolith.dom0.network.link import UplinkError
    from xenolith.dom0.network.passt import Passt
    from xenolith.dom0.network.router import Router

    try:
        Passt(Router()).close()
    except (UplinkError, OSError) as error:
        return str(error)
    return ""


def number(text: str) -> int:
    return int(IPv4Address(text))


def datagram(source: int, destination: int, payload: bytes = b"payload", port: int = 9, mac: bytes = b"") -> bytes:
    return bytes(ethernet(ROUTER_MAC, mac, 0x0800)) + udp(source, 1234, destination, port, payload)


def tcp_segment(
    source: tuple[int, int],
    destination: tuple[int, int],
    flags: int,
    payload: bytes = b"",
    options: bytes = b"",
    sequence: int = 1,
) -> bytes:
    """An IPv4 packet with a right checksum, computed the slow way."""
    header = struct.pack(
        "!HHIIBBHHH", source[1], destination[1], sequence, 0, (20 + len(options)) // 4 << 4, flags, 8192, 0, 0
    )
    body = bytearray(header + options + payload)
    body[16:18] = checksum(pseudo_header(source[0], destination[0], 6, len(body)) + body).to_bytes(2, "big")
    return ipv4(6, source[0], destination[0], bytes(body))


def pseudo_header(source: int, destination: int, protocol: int, length: int) -> bytes:
    return struct.pack("!IIBBH", source, destination, 0, protocol, length)


def checksum(data: bytes | bytearray) -> int:
    """RFC 1071 by the letter."""
    total = 0
    padded = bytes(data) + b"\0" * (len(data) & 1)
    for (word,) in struct.iter_unpack("!H", padded):
        total += word
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def checksums_are_right(frame: bytes | bytearray) -> bool:
    """Of the IPv4 header and of the TCP, UDP or ICMP in it."""
    header, body = frame[14:34], frame[34:]
    if checksum(header):
        return False
    protocol = frame[23]
    if protocol == 1:
        return not checksum(body)
    if protocol == UDP and body[6:8] == b"\0\0":
        return True
    source, destination = struct.unpack_from("!II", frame, 26)
    return not checksum(pseudo_header(source, destination, protocol, len(body)) + body)


class NetFrontend:
    """A front-end, connected unless `connect` is False."""

    def __init__(
        self,
        store: XenstoreService,
        network: Network,
        *,
        domid: int = 7,
        name: str = "guest",
        connect: bool = True,
        nodes: dict[str, str] | None = None,
        **spec: object,
    ) -> None:
        self.store = store
        self.domid = domid
        self.mac = b"\0\x16\x3e\0" + domid.to_bytes(2, "big")
        self.dom0 = FakeDom0()
        self.xenbus = Xenbus(store, self.dom0.log)
        backend = NetBackend(
            self.dom0.hypercalls,
            domid,
            VifSpec(number=0, mac=self.mac, **spec),  # type: ignore[arg-type]
            network.router,
            lambda made, wake: network.attach(name, made, wake),
        )
        self.vif = backend.vif
        self.address = self.vif.address
        self.device: Device[NetBackend] = self.xenbus.plug(domid, 0, backend, *backend.nodes())
        self.nodes = {
            "tx-ring-ref": str(TX_REF),
            "rx-ring-ref": str(RX_REF),
            "event-channel-tx": str(TX_PORT),
            "event-channel-rx": str(RX_PORT),
            "request-rx-copy": "1",
            "feature-rx-notify": "1",
            "feature-sg": "1",
            "feature-gso-tcpv4": "1",
            **(nodes or {}),
        }
        self._state = Follower(store, f"{self.device.directory}/state")
        if connect:
            self.connect()

    def connect(self) -> None:
        self.tx = SharedRing(memoryview(self.dom0.grant(TX_REF)), netif.TX_ENTRY_SIZE)
        self.rx = SharedRing(memoryview(self.dom0.grant(RX_REF)), netif.RX_ENTRY_SIZE)
        for ring in (self.tx, self.rx):
            ring.words[REQ_EVENT] = ring.words[RSP_EVENT] = 1
        self.tx_produced = self.tx_consumed = self.rx_produced = self.rx_consumed = 0
        for name, value in self.nodes.items():
            self.store.write(f"{self.device.frontend}/{name}", value)
        self.offer_buffers(BUFFERS, tell=False)
        self.says(S.CONNECTED)

    def says(self, value: S) -> None:
        self.store.write(f"{self.device.frontend}/state", state(value))

    def sees(self, value: S) -> None:
        self._state.wait(state(value))

    def stop(self) -> None:
        self.device.stop()
        self._state.close()

    # --- sending

    def put(self, entry: bytes) -> None:
        at = self.tx.offset(self.tx_produced)
        self.tx.bytes[at : at + len(entry)] = entry
        self.tx_produced += 1

    def push(self) -> None:
        self.tx.words[REQ_PROD] = self.tx_produced & 0xFFFFFFFF
        self.dom0.event()

    def send(self, data: bytes, flags: int = 0, gso_size: int = 0, slot_size: int = PAGE) -> None:
        """A packet in as many slots as it takes, and an event."""
        parts = [data[at : at + slot_size] for at in range(0, len(data), slot_size)]
        for index, part in enumerate(parts):
            ref = TX_DATA + (self.tx_produced % 250)
            offset = (PAGE - len(part)) // 2
            self.dom0.grant(ref)[offset : offset + len(part)] = part
            more = netif.NETTXF_more_data if index < len(parts) - 1 else 0
            extra = netif.NETTXF_extra_info if gso_size and not index else 0
            size = len(data) if not index else len(part)
            self.put(netif.TX_REQUEST.pack(ref, offset, (0 if index else flags) | more | extra, index + 1, size))
            if extra:
                self.put(netif.EXTRA_GSO.pack(1, 0, gso_size, 1, 0, 0))
        self.push()

    def settle(self) -> None:
        """Wait until all that was sent is answered, or the device has failed."""
        while self.tx.words[RSP_PROD] != self.tx_produced and self.device.failure is None:
            done = threading.Event()
            self.device.call(done.set)
            assert done.wait(DEADLINE_SECONDS)

    def responses(self, count: int) -> list[int]:
        """Wait for so many of the tx ring: their status."""
        wanted = self.tx_consumed + count
        with self.dom0.notified:
            self.tx.words[RSP_EVENT] = wanted
            assert self.dom0.notified.wait_for(lambda: self.tx.words[RSP_PROD] >= wanted, DEADLINE_SECONDS)
        places = map(self.tx.offset, range(self.tx_consumed, wanted))
        self.tx_consumed = wanted
        return [netif.TX_RESPONSE.unpack_from(self.tx.bytes, at)[1] for at in places]

    # --- receiving

    def offer_buffers(self, count: int, tell: bool = True) -> None:
        for _ in range(count):
            slot = self.rx_produced % BUFFERS
            self.dom0.grant(RX_DATA + slot)
            entry = netif.RX_REQUEST.pack(slot, RX_DATA + slot)
            at = self.rx.offset(self.rx_produced)
            self.rx.bytes[at : at + len(entry)] = entry
            self.rx_produced += 1
        self.rx.words[REQ_PROD] = self.rx_produced
        if tell:
            self.dom0.event()

    def receive(self) -> tuple[bytes, int, int]:
        """Wait for a packet: its bytes, flags and GSO size."""
        data, first_flags, gso = b"", None, 0
        more = True
        while more:
            number, offset, flags, status = netif.RX_RESPONSE.unpack(self._response())
            assert status > 0, status
            data += self.dom0.frames[RX_DATA + number][offset : offset + status]
            if first_flags is None:
                first_flags = flags
                if flags & netif.NETRXF_extra_info:
                    kind, extra_flags, gso, gso_type, _, _ = netif.EXTRA_GSO.unpack(self._response())
                    assert (kind, extra_flags, gso_type) == (1, 0, 1)
            more = bool(flags & netif.NETRXF_more_data)
        assert first_flags is not None
        return data, first_flags & 3, gso

    def _response(self) -> bytes:
        wanted = self.rx_consumed + 1
        with self.dom0.notified:
            self.rx.words[RSP_EVENT] = wanted
            arrived = self.dom0.notified.wait_for(lambda: self.rx.words[RSP_PROD] >= wanted, DEADLINE_SECONDS)
            assert arrived, "no packet came"
        at = self.rx.offset(self.rx_consumed)
        self.rx_consumed = wanted
        return bytes(self.rx.bytes[at : at + 8])

    def received(self) -> int:
        """Responses in the rx ring that were not looked at."""
        return self.rx.words[RSP_PROD] - self.rx_consumed

    # --- packets

    def datagram(self, to: NetFrontend | int, payload: bytes = b"payload", port: int = 9) -> bytes:
        destination = to if isinstance(to, int) else to.address
        return datagram(self.address, destination, payload, port, self.mac)

    def frame(self, packet: bytes) -> bytes:
        return bytes(ethernet(ROUTER_MAC, self.mac, 0x0800)) + packet

    @property
    def mac_node(self) -> str:
        return mac_text(self.mac)


def stop_all(fronts: Iterable[NetFrontend]) -> None:
    for front in fronts:
        front.stop()
        assert front.dom0.mapped == {}, "every grant is given back"
        assert front.dom0.unbound == {3, 4, 5, 6}, "every event channel is closed"
