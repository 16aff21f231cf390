"""The 9pfs back-end: folders of the host for guests (public/io/9pfs.h; Linux: net/9p/trans_xen.c).

A device has a few rings, each two streams of bytes in frames of the guest: whole 9P messages go out and come in.
All rings carry one session, of which every answer goes where its request came from.  The session is a server's
(`shares.server`), and everything between it and the guest passes `shares.relay`.

The device's thread takes requests and puts answers; another reads the server's answers and rings.  What a front-end
may have under way is bounded: beyond that its requests wait in the ring.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import ClassVar, Final

from xenolith.abi import p9
from xenolith.abi.x86 import PAGE_SIZE
from xenolith.dom0.bell import Bell
from xenolith.dom0.shares import ShareSpec
from xenolith.dom0.shares.relay import MAX_IN_FLIGHT, MAX_MSIZE, NewSession, ProtocolError, Relay, ServerError
from xenolith.dom0.shares.server import TREE, Server, owner
from xenolith.dom0.xenbus import Backend, FrontendError, FrontendNodes
from xenolith.hypervisor.python_domain import HypercallError, PythonDomain
from xenolith.machine.atomic import fence

MAX_RINGS: Final = 4
MAX_RING_ORDER: Final = 7  # frames: 256 KiB each way
_LIMIT: Final = 1 << 32
_MASK: Final = (1 << 32) - 1
# Until a ring that had no room is looked at again: a guest need not tell when it has.
_LEAST_PATIENCE_S: Final = 0.002
_MOST_PATIENCE_S: Final = 0.1
_PAUSE_S: Final = 0.25  # from the start of one server to that of the next: a guest that begins anew all the time waits
_END_S: Final = 5.0  # that the server has for what is under way when the device goes


class _Frames:
    """Half of a ring's data, as one row of bytes, of which positions count on without end."""

    def __init__(self, frames: list[memoryview]) -> None:
        self._frames: Final = frames
        self.size: Final = len(frames) * PAGE_SIZE

    def get(self, position: int, size: int) -> bytes:
        pieces = []
        while size:
            at = position % self.size
            start = at % PAGE_SIZE
            piece = bytes(self._frames[at // PAGE_SIZE][start : start + size])
            pieces.append(piece)
            position, size = position + len(piece), size - len(piece)
        return b"".join(pieces)

    def put(self, position: int, data: bytes) -> None:
        view = memoryview(data)
        while view:
            at = position % self.size
            start = at % PAGE_SIZE
            size = min(len(view), PAGE_SIZE - start)
            self._frames[at // PAGE_SIZE][start : start + size] = view[:size]
            position, view = position + size, view[size:]


class _Ring:
    """One ring of a device, with its event channel."""

    def __init__(self, dom0: PythonDomain, domid: int, ref: int, remote_port: int, bell: Bell) -> None:
        """Raises FrontendError."""
        with contextlib.ExitStack() as undo:

            def mapped(ref: int) -> memoryview:
                grant = dom0.map_grant(domid, ref)
                undo.callback(dom0.unmap_grant, grant)
                return grant.view

            try:
                first = mapped(ref)
                words = bytes(first[: 4 * (p9.FIRST_REF + (1 << MAX_RING_ORDER))])  # copied once
                numbers = memoryview(words).cast("I")
                order = numbers[p9.RING_ORDER]
                if not 1 <= order <= MAX_RING_ORDER:
                    raise FrontendError(f"its ring is of order {order}")
                frames = [mapped(ref) for ref in numbers[p9.FIRST_REF : p9.FIRST_REF + (1 << order)]]
                port = dom0.bind_interdomain(domid, remote_port)
                undo.callback(dom0.close, port)
            except HypercallError as error:
                raise FrontendError(f"its ring cannot be reached: {error}") from error
            half = len(frames) // 2
            self._words: Final = first.cast("I")
            self._in: Final = _Frames(frames[:half])
            self._out: Final = _Frames(frames[half:])
            self._produced = self._words[p9.IN_PROD]
            self._consumed = self._words[p9.OUT_CONS]
            self._dom0: Final = dom0
            self._port: Final = port
            dom0.set_handler(port, lambda _: bell.ring(), bell.descriptor)
            self._undo: Final = undo.pop_all()

    def close(self) -> None:
        self._undo.close()

    def notify(self) -> None:
        self._dom0.send(self._port)

    def take(self) -> bytes | None:
        """A copy of the next message, once it is there. Raises FrontendError."""
        there = self._words[p9.OUT_PROD] - self._consumed & _MASK
        if there > self._out.size:
            raise FrontendError(f"{there} bytes are in a ring of {self._out.size}")
        if there < p9.HEADER.size:
            return None
        size = int.from_bytes(self._out.get(self._consumed, 4), "little")
        if not p9.HEADER.size <= size <= min(MAX_MSIZE, self._out.size):
            raise FrontendError(f"a message of {size} bytes")
        if there < size:
            return None
        # The size that is checked is the copy's, which the guest may have changed since.
        message = self._out.get(self._consumed, size)
        self._consumed = self._consumed + size & _MASK
        self._words[p9.OUT_CONS] = self._consumed
        return message

    def put(self, message: bytes) -> bool:
        """Give the guest a message; False where it has no room yet. Raises FrontendError."""
        waiting = self._produced - self._words[p9.IN_CONS] & _MASK
        if waiting > self._in.size or len(message) > self._in.size:
            raise FrontendError(f"{waiting} bytes are unread in a ring of {self._in.size}")
        if self._in.size - waiting < len(message):
            return False
        self._in.put(self._produced, message)
        self._produced = self._produced + len(message) & _MASK
        fence()
        self._words[p9.IN_PROD] = self._produced
        return True


class P9Backend(Backend):
    """A folder, shared with a domain."""

    kind: ClassVar[str] = "9pfs"

    def __init__(self, dom0: PythonDomain, domid: int, spec: ShareSpec) -> None:
        """Raises ShareError."""
        self.dom0: Final = dom0
        self.domid: Final = domid
        self.spec: Final = spec
        self._rings: list[_Ring] = []
        self._wake: Callable[[], None] = _nothing
        self._answers: Final[deque[bytes | None]] = deque()  # the server's, not looked at yet
        self._come: Final = threading.Event()  # when there is another
        self._waiting: Final[deque[tuple[_Ring, bytes]]] = deque()  # for room in a ring
        self._ring_of: Final[dict[int, _Ring]] = {}  # where a tag came from
        self._timer: threading.Timer | None = None
        self._patience = _LEAST_PATIENCE_S
        self._started_s = time.monotonic()
        self._server: Server | None = Server(spec.path, spec.writable)  # now, as its failure is to be told now
        self._relay = self._new_relay()

    def _new_relay(self) -> Relay:
        return Relay(TREE, writable=self.spec.writable, owner=owner())

    def offer(self) -> Mapping[str, str]:
        return {"versions": "1", "max-rings": str(MAX_RINGS), "max-ring-page-order": str(MAX_RING_ORDER)}

    def connect(self, nodes: FrontendNodes, bell: Bell) -> None:
        if nodes.text("version", "") != "1":
            raise FrontendError("it does not have version 1 of the protocol")
        self._wake = bell.ring
        count = nodes.number("num-rings", MAX_RINGS + 1)
        if not count:
            raise FrontendError("it has no rings")
        for number in range(count):
            ref = nodes.number(f"ring-ref{number}", _LIMIT)
            port = nodes.number(f"event-channel-{number}", _LIMIT)
            self._rings.append(_Ring(self.dom0, self.domid, ref, port, bell))
        self._serve_anew()

    def _serve_anew(self) -> None:
        """A server and a relay that nobody has used."""
        if self._server is None:
            time.sleep(max(0.0, self._started_s + _PAUSE_S - time.monotonic()))
            self._started_s = time.monotonic()
            self._server = Server(self.spec.path, self.spec.writable)
        self._relay = self._new_relay()
        self._server.start(self._answered)

    def _answered(self, message: bytes | None) -> None:
        """On the server's thread."""
        self._answers.append(message)
        self._come.set()
        self._wake()

    def describe(self) -> Mapping[str, str]:
        return {}

    def serve(self) -> bool:
        self._take_answers()
        full = False
        for ring in self._rings:
            taken = False
            while not (full := self._under_way() >= MAX_IN_FLIGHT) and (message := ring.take()) is not None:
                taken = True
                self._request(ring, message)
            if taken:
                ring.notify()  # there is room
        self._deliver()
        return full and self._under_way() < MAX_IN_FLIGHT  # no event will tell of what is left in the rings

    def _under_way(self) -> int:
        return self._relay.in_flight + len(self._waiting)

    def _request(self, ring: _Ring, message: bytes) -> None:
        try:
            try:
                forward, answer = self._relay.request(message)
            except NewSession:
                self._end_session()
                self._serve_anew()
                forward, answer = self._relay.request(message)
        except ProtocolError as error:
            raise FrontendError(str(error)) from error
        if answer:
            self._waiting.append((ring, answer))
        else:
            self._ring_of[p9.HEADER.unpack_from(message)[2]] = ring
            assert self._server is not None
            self._server.send(forward)

    def _take_answers(self) -> None:
        while self._answers:
            message = self._answers.popleft()
            if message is None:
                raise OSError(f"the 9P server of {self.spec.path} has ended")
            ring = self._ring_of.pop(p9.HEADER.unpack_from(message)[2], None)
            answer = self._relay.response(message)
            if ring is not None:
                self._waiting.append((ring, answer))

    def _deliver(self) -> None:
        filled = set()
        for _ in range(len(self._waiting)):
            ring, message = self._waiting.popleft()
            if ring.put(message):
                filled.add(ring)
            else:
                self._waiting.append((ring, message))
        for ring in filled:
            ring.notify()
        self._patience = _LEAST_PATIENCE_S if filled else min(2 * self._patience, _MOST_PATIENCE_S)
        if self._waiting and self._timer is None:
            self._timer = threading.Timer(self._patience, self._look_again)
            self._timer.daemon = True
            self._timer.start()

    def _look_again(self) -> None:
        """On the timer's thread."""
        self._timer = None
        self._wake()

    def disconnect(self) -> None:
        self._end_session()
        self._wake = _nothing
        timer = self._timer
        if timer is not None:
            timer.cancel()
            timer.join()
            self._timer = None
        while self._rings:
            self._rings.pop().close()

    def _end_session(self) -> None:
        if self._server is not None:
            with contextlib.suppress(OSError, ServerError):
                self._wait_for_answers()
            self._server.close()
            self._server = None
        self._answers.clear()
        self._waiting.clear()
        self._ring_of.clear()

    def _wait_for_answers(self) -> None:
        """What was accepted is done."""
        deadline = time.monotonic() + _END_S
        while self._relay.in_flight and (left := deadline - time.monotonic()) > 0:
            self._come.wait(left)
            self._come.clear()
            self._take_answers()

    def close(self) -> None:
        self._end_session()

    def nodes(self) -> tuple[Mapping[str, str], Mapping[str, str]]:
        """What is in the front-end's and the back-end's directory from the beginning, as libxl writes it.

        Not the path of the folder ("path"): it is none of the guest's business.
        """
        return {"tag": self.spec.tag}, {"security_model": "none"}


def _nothing() -> None:
    pass
