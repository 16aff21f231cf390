"""The network back-end: virtual interfaces for guests (paper 3.4.1; public/io/netif.h; Linux: xen-netback).

Two rings.  From the tx ring packets are taken, copied once out of the frames that the guest granted and handed to the
virtual firewall-router; what the router has for the guest is copied into frames that it offers on the rx ring.  One
packet may take several slots (scatter-gather), and may stand for many (GSO) whose checksums nobody has computed: if the
guest on the other side takes such packets, nothing is ever cut up; if not, it is done here.

The guest decides what is in the rings.  A request is copied once and every field checked: what no front-end would ever
write closes the device, as in Linux; a frame that was not granted costs the guest that packet.  In one turn of the
router an interface sends a limited number of bytes; what waits for the guest is bounded by `fair.FairQueue`.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Final

from xenolith.abi import netif
from xenolith.abi.x86 import PAGE_SIZE
from xenolith.dom0.bell import Bell
from xenolith.dom0.network.fair import FRAME_BYTES, TURN_BYTES
from xenolith.dom0.network.frame import ETHERNET_HEADER, MTU, Frame, fill_checksum, mac_text, segments
from xenolith.dom0.network.port import Publication
from xenolith.dom0.rings import RequestReader, ResponseWriter, RingError, SharedRing
from xenolith.dom0.xenbus import Backend, FrontendError, FrontendNodes
from xenolith.hypervisor.python_domain import HypercallError, PythonDomain

if TYPE_CHECKING:
    from xenolith.dom0.network.network import Attachment
    from xenolith.dom0.network.router import Router

MAX_SLOTS: Final = netif.NETIF_NR_SLOTS_MIN
FATAL_SLOTS: Final = 20  # more than any front-end ever used
MAX_EXTRAS: Final = 4
CONTENDED_SLOTS: Final = 64  # that a guest has not looked at yet, where several send to it
LOOK_AGAIN_SECONDS: Final = 0.01
RECEIVE_BYTES: Final = 512 << 10  # that go to the guest before its own requests are looked at again
_REF_LIMIT: Final = 1 << 32
_PORT_LIMIT: Final = 1 << 32


@dataclass(frozen=True, kw_only=True)
class VifSpec:
    """A virtual network interface for a domain."""

    number: int
    mac: bytes
    ip: str | None = None  # None: the router chooses
    mtu: int = MTU
    rate: tuple[int, int] | None = None  # bytes in an interval, which is in microseconds
    rules: str = ""
    bridge: str = ""  # as the configuration calls it; there is but one network
    publications: tuple[Publication, ...] = ()


class Rate:
    """How much a guest may send (rate= in xl.cfg): so many bytes in each interval."""

    def __init__(self, limit: int, interval_us: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._limit: Final = limit
        self._interval: Final = interval_us / 1e6
        self._clock: Final = clock
        self._credit = limit
        self._next = clock() + self._interval

    def wait(self) -> float:
        """0.0 if it may send now; else the seconds until it may."""
        now = self._clock()
        if now >= self._next:
            self._credit = min(self._credit, 0) + self._limit  # a packet larger than what was left is paid back
            self._next = now + self._interval
        return 0.0 if self._credit > 0 else self._next - now

    def spend(self, size: int) -> None:
        self._credit -= size


class _Alarm:
    """Rings a bell later, once for any number of times that it is set before."""

    def __init__(self, ring: Callable[[], None]) -> None:
        self._ring: Final = ring
        self._timer: threading.Timer | None = None

    @property
    def is_set(self) -> bool:
        return self._timer is not None

    def set(self, seconds: float) -> None:
        if self._timer is None:
            self._timer = threading.Timer(seconds, self._go_off)
            self._timer.daemon = True
            self._timer.start()

    def _go_off(self) -> None:
        self._timer = None
        self._ring()

    def cancel(self) -> None:
        if (timer := self._timer) is not None:
            timer.cancel()
            self._timer = None


class _Ring:
    """One of the two rings, its event channel aside."""

    def __init__(self, dom0: PythonDomain, domid: int, ref: int, entry_size: int, undo: contextlib.ExitStack) -> None:
        """Raises HypercallError."""
        grant = dom0.map_grant(domid, ref)
        undo.callback(dom0.unmap_grant, grant)
        ring = SharedRing(grant.view, entry_size)
        self.responses: Final = ResponseWriter(ring)
        self.requests: Final = RequestReader(ring)
        self.port = 0


class _Connection:
    """A connected front-end."""

    def __init__(self, backend: NetBackend, nodes: FrontendNodes, bell: Bell) -> None:
        """Raises FrontendError."""
        self._backend: Final = backend
        self._dom0: Final = backend.dom0
        self._domid: Final = backend.domid
        self._vif: Final = backend.vif
        self._router: Final = backend.router
        tx_ref, rx_ref = nodes.number("tx-ring-ref", _REF_LIMIT), nodes.number("rx-ring-ref", _REF_LIMIT)
        if not nodes.number("request-rx-copy", 2, default=0):
            raise FrontendError("it does not receive copies (request-rx-copy)")
        self._sg: Final = bool(nodes.number("feature-sg", 2, default=0))
        self._gso: Final = self._sg and bool(nodes.number("feature-gso-tcpv4", 2, default=0))
        self._blank: Final = not nodes.number("feature-no-csum-offload", 2, default=0)
        single = nodes.number("event-channel", _PORT_LIMIT, default=0)
        ports = [single] if single else [nodes.number(f"event-channel-{way}", _PORT_LIMIT) for way in ("tx", "rx")]
        self._tx_waiting: Final[deque[bytes]] = deque()
        self._rx_waiting: Final[deque[bytes]] = deque()
        self._most_offered = 0  # slots that it has in the ring when it has looked at all
        self._outgoing: Final[deque[Frame]] = deque()  # taken from the queue, and as this front-end can have them
        self._bell: Final = bell
        self._credit_comes: Final = _Alarm(bell.ring)
        self._look_again: Final = _Alarm(bell.ring)  # whether the guest has looked at what is in the ring
        with contextlib.ExitStack() as undo:
            try:
                self._tx: Final = _Ring(self._dom0, self._domid, tx_ref, netif.TX_ENTRY_SIZE, undo)
                self._rx: Final = _Ring(self._dom0, self._domid, rx_ref, netif.RX_ENTRY_SIZE, undo)
                bound = [self._bind(port, undo) for port in ports]
                self._grants: Final = self._dom0.grant_batch(self._domid)
            except HypercallError as error:
                raise FrontendError(f"its rings cannot be reached: {error}") from error
            self._tx.port, self._rx.port = bound[0], bound[-1]
            undo.callback(self._credit_comes.cancel)
            undo.callback(self._look_again.cancel)
            self._undo: Final = undo.pop_all()

    def _bind(self, remote_port: int, undo: contextlib.ExitStack) -> int:
        port = self._dom0.bind_interdomain(self._domid, remote_port)
        undo.callback(self._dom0.close, port)
        self._dom0.set_handler(port, lambda _: self._bell.ring(), self._bell.descriptor)
        return port

    def close(self) -> None:
        self._undo.close()

    def serve(self) -> bool:
        """Both ways; True where there is more to do of which no event will tell."""
        try:
            busy = self._transmit()
            return self._receive() or busy
        except RingError as error:
            raise FrontendError(str(error)) from error

    # --- from the guest ---------------------------------------------------------------------------------------

    def _transmit(self) -> bool:
        waiting = self._tx_waiting
        waiting.extend(self._tx.requests.take())
        rate = self._backend.rate
        if waiting:
            credit = TURN_BYTES
            with self._router.turns:
                while waiting and credit > 0:
                    if rate is not None and (delay := rate.wait()):
                        self._credit_comes.set(delay)
                        break
                    size = self._take_packet()
                    credit -= size + FRAME_BYTES
                    if rate is not None:
                        rate.spend(size)
            if self._tx.responses.push():
                self._dom0.send(self._tx.port)
            if waiting:
                return not self._credit_comes.is_set
        return self._tx.requests.rearm()

    def _take_packet(self) -> int:
        """The next packet, to the router; the bytes that it counts for. Raises FrontendError."""
        waiting = self._tx_waiting
        gref, offset, flags, number, size = netif.TX_REQUEST.unpack(waiting.popleft())
        numbers = [number]
        gso_size = extras = 0
        more_extra = flags & netif.NETTXF_extra_info
        while more_extra:
            extras += 1
            if not waiting or extras > MAX_EXTRAS:
                raise FrontendError("a packet's extra information is missing, or does not end")
            kind, more_extra, segment, gso_type, _, _ = netif.EXTRA_GSO.unpack_from(waiting.popleft())
            more_extra &= netif.NETIF_EXTRA_FLAG_MORE
            if kind != netif.NETIF_EXTRA_TYPE_GSO or gso_type != netif.NETIF_GSO_TYPE_TCPV4 or not segment:
                raise FrontendError(f"it sent extra information of the kind {kind}, which was not offered")
            gso_size = segment
        slots = [(gref, offset, size)]
        more = flags & netif.NETTXF_more_data
        remaining = size
        while more:
            if not waiting:
                raise FrontendError("a packet's rest is missing")
            ref, at, more, number, part = netif.TX_REQUEST.unpack(waiting.popleft())
            more &= netif.NETTXF_more_data
            numbers.append(number)
            slots.append((ref, at, part))
            remaining -= part
            if part == 0 or remaining < 0 or len(slots) > FATAL_SLOTS:
                raise FrontendError(f"a packet of {size} bytes in {len(slots)} slots, the last of {part} bytes")
        slots[0] = (gref, offset, remaining)
        for _, at, part in slots:
            if at + part > PAGE_SIZE:
                raise FrontendError(f"{part} bytes at {at} are not in a page")
        status = netif.NETIF_RSP_ERROR
        if remaining and size >= ETHERNET_HEADER and len(slots) <= MAX_SLOTS:
            data = self._copy(slots)
            if data is not None:
                status = netif.NETIF_RSP_OKAY
                blank = bool(flags & netif.NETTXF_csum_blank)
                self._router.receive(self._vif, Frame(data, blank, gso_size))
        if status:
            self._vif.drops["not granted"] += 1
            self._vif.statistics.tx_dropped += 1
        self._respond(numbers, extras, status)
        return int(size) + PAGE_SIZE // 16 * len(slots)  # small packets cost too

    def _copy(self, slots: list[tuple[int, int, int]]) -> bytearray | None:
        """The packet's bytes; None where some were not granted."""
        data = bytearray(sum(part for _, _, part in slots))
        return data if self._grants.copy(slots, data, to_guest=False) else None

    def _respond(self, numbers: list[int], extras: int, status: int) -> None:
        put, pack = self._tx.responses.put, netif.TX_RESPONSE.pack
        put(pack(numbers[0], status))
        for _ in range(extras):
            put(pack(0, netif.NETIF_RSP_NULL))
        for number in numbers[1:]:
            put(pack(number, status))

    # --- to the guest ---------------------------------------------------------------------------------------------

    def _receive(self) -> bool:
        offered = self._rx_waiting
        queue, outgoing = self._vif.queue, self._outgoing
        if not queue and not outgoing:
            return False
        offered.extend(self._rx.requests.take())
        budget = RECEIVE_BYTES
        starving = False
        kept = self._slots_to_keep() if queue.contended else 0
        while budget > 0:
            if not outgoing:
                frame = queue.take()
                if frame is None:
                    break
                outgoing.extend(self._as_it_takes_them(frame))
            size = len(outgoing[0].data)
            slots = (size + PAGE_SIZE - 1) // PAGE_SIZE + bool(outgoing[0].gso_size)
            if slots > len(offered) - kept:
                starving = True
                break
            self._give(outgoing.popleft())
            budget -= size
        if self._rx.responses.push():
            self._dom0.send(self._rx.port)
        if starving:
            if kept:
                self._look_again.set(LOOK_AGAIN_SECONDS)  # it may have, and offer fewer slots than before
            return self._rx.requests.rearm()
        return budget <= 0

    def _slots_to_keep(self) -> int:
        """So many of the slots that it offers are not filled now.

        What is in the ring leaves in the order in which it came: a flood would make all others wait for 250 frames of
        its own each time.  So frames wait in the queue, which is fair.
        """
        offered = len(self._rx_waiting)
        if offered > self._most_offered or self._rx.responses.drained():
            self._most_offered = offered
        return max(self._most_offered - CONTENDED_SLOTS, 0)

    def _as_it_takes_them(self, frame: Frame) -> Iterator[Frame]:
        if frame.gso_size and not self._gso:
            yield from segments(frame)
            return
        if frame.csum_blank and not self._blank:
            fill_checksum(frame)
        yield frame

    def _give(self, frame: Frame) -> None:
        """Copy a frame into as many slots as it takes, which are there."""
        size = len(frame.data)
        flags = netif.NETRXF_data_validated | netif.NETRXF_csum_blank if frame.csum_blank else 0
        take = self._rx_waiting.popleft
        requests = [netif.RX_REQUEST.unpack(take())]
        extra = take() if frame.gso_size else None
        requests += [netif.RX_REQUEST.unpack(take()) for _ in range(PAGE_SIZE, size, PAGE_SIZE)]
        put, pack = self._rx.responses.put, netif.RX_RESPONSE.pack
        statistics = self._vif.statistics
        starts = range(0, size, PAGE_SIZE)
        parts = [(ref, 0, min(PAGE_SIZE, size - start)) for (_, ref), start in zip(requests, starts, strict=True)]
        if not self._grants.copy(parts, frame.data, to_guest=True):
            statistics.rx_dropped += 1
            if extra is not None:
                requests.insert(1, netif.RX_REQUEST.unpack(extra))
            for number, _ in requests:
                put(pack(number, 0, 0, netif.NETIF_RSP_ERROR))
            return
        statistics.rx_packets += 1
        statistics.rx_bytes += size
        last = len(requests) - 1
        for index, (number, _) in enumerate(requests):
            more = netif.NETRXF_more_data if index < last else 0
            length = min(PAGE_SIZE, size - index * PAGE_SIZE)
            if index:
                put(pack(number, 0, more, length))
            else:
                put(pack(number, 0, flags | more | (netif.NETRXF_extra_info if extra is not None else 0), length))
                if extra is not None:
                    kind, gso = netif.NETIF_EXTRA_TYPE_GSO, netif.NETIF_GSO_TYPE_TCPV4
                    put(netif.EXTRA_GSO.pack(kind, 0, frame.gso_size, gso, 0, 0))


class NetBackend(Backend):
    """A virtual interface, attached to the router from its making to its end."""

    kind: ClassVar[str] = "vif"

    def __init__(self, dom0: PythonDomain, domid: int, spec: VifSpec, router: Router, attach: Attach) -> None:
        """An interface for the domain `domid`. Raises RuleError and AddressError."""
        self.dom0: Final = dom0
        self.domid: Final = domid
        self.spec: Final = spec
        self.router: Final = router
        self.rate: Final = Rate(*spec.rate) if spec.rate else None
        self.ring: Callable[[], None] = _nothing
        self._connection: _Connection | None = None
        self.attachment: Final = attach(spec, lambda: self.ring())
        self.vif: Final = self.attachment.vif

    def offer(self) -> Mapping[str, str]:
        return {
            "feature-rx-copy": "1",
            "feature-rx-flip": "0",
            "feature-sg": "1",
            "feature-gso-tcpv4": "1",
            "feature-gso-tcpv6": "0",
            "feature-ipv6-csum-offload": "0",
            "feature-split-event-channels": "1",
            "feature-multicast-control": "0",
            "feature-ctrl-ring": "0",
            "multi-queue-max-queues": "1",
        }

    def connect(self, nodes: FrontendNodes, bell: Bell) -> None:
        self._connection = _Connection(self, nodes, bell)
        self.ring = bell.ring

    def describe(self) -> Mapping[str, str]:
        return {"hotplug-status": "connected"}

    def serve(self) -> bool:
        assert self._connection is not None
        return self._connection.serve()

    def disconnect(self) -> None:
        self.ring = _nothing
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        self.vif.queue.clear()

    def close(self) -> None:
        self.attachment.detach()

    def nodes(self) -> tuple[Mapping[str, str], Mapping[str, str]]:
        """What is in the front-end's and the back-end's directory from the beginning, as libxl writes it."""
        spec, mac = self.spec, mac_text(self.spec.mac)
        front = {"handle": str(spec.number), "mac": mac, "mtu": str(spec.mtu), "trusted": "1"}
        back = {
            "handle": str(spec.number),
            "mac": mac,
            "mtu": str(spec.mtu),
            "bridge": spec.bridge or "xenbr0",
            "script": "",
            "type": "vif",
        }
        if spec.rate:
            back["rate"] = f"{spec.rate[0]},{spec.rate[1]}"
        return front, back


Attach = Callable[[VifSpec, Callable[[], None]], "Attachment"]
"""Makes a port of the router's for an interface, with what wakes its back-end."""


def _nothing() -> None:
    pass
