"""A guest's way to the store: the page with a request ring, a response ring and four indices.

The guest may write the whole page at any moment and with anything. So each index is read once, checked (no more than a
ring's worth may be between producer and consumer), and only then used; request bytes are copied out before anyone looks
at them; our own two indices are kept here and only ever written to the page, never believed from it, each in one piece,
since the guest may look at any moment, too (``Struct.pack_into`` would clear the place first). A guest that breaks the
indices or the protocol gets the reason in the page's ``error`` field and is not served again until it asks for a fresh
start (``connection`` = reconnect, which we announce in ``server_features``), and no other domain notices.

*What a front-end hears of itself.* Linux 7 watches its own device directories; when one changes it compares the state
in the store with the one its driver has, and takes a device whose driver is just about to switch for one that was
reset: it unplugs it, and frees the ring that the back-end has mapped.  So a domain hears of its own writes there only
a while later, and not while it has a transaction open: by then its driver has switched.

Sources: public header io/xs_wire.h, docs/misc/xenstore-ring.txt.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Final

from xenolith.abi import xs_wire
from xenolith.abi.xs_wire import RING_SIZE, RingError
from xenolith.dom0.xenstore.connection import Connection, ConnectionState
from xenolith.dom0.xenstore.xenstored import Xenstored
from xenolith.machine.atomic import fence

_MASK: Final = 0xFFFFFFFF
_FEATURES: Final = xs_wire.SERVER_FEATURE_RECONNECTION | xs_wire.SERVER_FEATURE_ERROR
OWN_EVENTS_WAIT: Final = 0.05
"""How long, in s, a domain does not hear of its own writes to its devices' directories."""
OWN_EVENTS_WAIT_MOST: Final = 1.0
"""The same, if it has a transaction open all the time."""
OWN_EVENTS_MOST: Final = 256
"""If more wait, it hears of the others at once."""


class RingConnection(Connection):
    """A guest's connection. Everything but :meth:`on_event` needs the service's lock."""

    def __init__(
        self,
        daemon: Xenstored,
        domid: int,
        page: memoryview,
        notify: Callable[[], None],
        wake: Callable[[Connection], None],
        wake_at: Callable[[Connection, float], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``page``: the domain's 4096-byte interface page; ``notify()`` sends its event channel.

        ``wake_at(connection, moment)`` asks for a turn at a moment (in s) of the ``clock``'s.
        """
        if page.nbytes != xs_wire.INTERFACE_PAGE_SIZE or page.format != "B" or page.readonly:
            raise ValueError(
                f"domain {domid}: a writable 4096-byte page of bytes is needed, not {page.nbytes} of {page.format!r}"
            )
        super().__init__(daemon, domid, wake)
        self.notify: Final = notify
        """Called without the lock, and possibly once more while the domain is released: it must tolerate that."""
        self._page: memoryview | None = page
        self._req_cons = self._get(page, xs_wire.REQ_CONS)
        self._rsp_prod = self._get(page, xs_wire.RSP_PROD)
        self._put(page, xs_wire.SERVER_FEATURES, _FEATURES)
        if self._get(page, xs_wire.CONNECTION) != xs_wire.Connection.RECONNECT:  # or it was asked for before we came
            self._put(page, xs_wire.CONNECTION, xs_wire.Connection.CONNECTED)
        self._put(page, xs_wire.ERROR, RingError.NONE)
        self.held = False
        """Its domain stands still: the page is to be left as it is."""
        self._wake_at: Final = wake_at
        self._clock: Final = clock
        self._own_events: Final[dict[tuple[bytes, bytes], None]] = {}
        self._own_events_since = 0.0

    def detach(self) -> None:
        """Let go of the page: nothing touches it after this."""
        self._page = None

    def on_event(self) -> None:
        """The guest has sent its event channel. Any thread; never blocks."""
        self._wake(self)

    def serve(self, limit: int) -> bool:
        """One turn: take requests, run at most ``limit`` of them, give answers. True if the guest is to be notified."""
        page = self._page
        if page is None or self.held:
            return False
        moved = self._pull(page)
        self.process(limit)
        if self._own_events:
            self._tell_own_events()
        return self._push(page) or moved

    def deliver_event(self, path: bytes, token: bytes) -> None:
        own = self._processing and self._absolute(path).startswith(self.home + b"/device/")
        if not own or len(self._own_events) == OWN_EVENTS_MOST:
            super().deliver_event(path, token)
            return
        if not self._own_events:
            self._own_events_since = self._clock()
            self._wake_at(self, self._own_events_since + OWN_EVENTS_WAIT)
        self._own_events[path, token] = None

    def _tell_own_events(self) -> None:
        """Queue them if it is time, or else come back."""
        waited = self._clock() - self._own_events_since
        if waited < OWN_EVENTS_WAIT:
            return
        if self.transactions and waited < OWN_EVENTS_WAIT_MOST:
            self._wake_at(self, self._clock() + OWN_EVENTS_WAIT)
            return
        tokens = {token for _, token in self.watches}
        for path, token in self._own_events:
            if token in tokens:
                super().deliver_event(path, token)
        self._own_events.clear()

    def state(self) -> ConnectionState:
        state = super().state()
        own = [self._event(path, token) for path, token in self._own_events]
        return dataclasses.replace(state, output=(*state.output, *filter(None, own)))

    def forget_stream(self) -> None:
        super().forget_stream()
        self._own_events.clear()

    @property
    def wants_turn(self) -> bool:
        """Whether there is more to do without the guest's help."""
        page = self._page
        if page is None or self.failure or self.held:
            return False
        if self.has_request:
            return self.listening
        return self.wants_input and self._get(page, xs_wire.REQ_PROD) != self._req_cons

    def _pull(self, page: memoryview) -> bool:
        if self._get(page, xs_wire.CONNECTION) == xs_wire.Connection.RECONNECT:
            self._start_over(page)
            return True
        if not self.wants_input:
            return False
        produced = self._get(page, xs_wire.REQ_PROD)
        count = (produced - self._req_cons) & _MASK
        if count > RING_SIZE:
            self.fail(RingError.RINGIDX)
            return False
        if not count:
            return False
        self.feed(_copy_out(page, xs_wire.REQ_RING, self._req_cons, count))
        self._req_cons = produced
        self._put(page, xs_wire.REQ_CONS, produced)
        return True

    def _push(self, page: memoryview) -> bool:
        """Fill the response ring. What finds no room waits for an event, and Linux sends one if the ring was full."""
        if self.failure:
            return self._show_failure(page)
        pushed = False
        while self.output_waiting:
            used = (self._rsp_prod - self._get(page, xs_wire.RSP_CONS)) & _MASK
            if used > RING_SIZE:
                self.fail(RingError.RINGIDX)
                return self._show_failure(page)
            chunk = self.output(RING_SIZE - used)
            if not chunk:
                break
            _copy_in(page, xs_wire.RSP_RING, self._rsp_prod, chunk)
            self._rsp_prod = (self._rsp_prod + len(chunk)) & _MASK
            self._put(page, xs_wire.RSP_PROD, self._rsp_prod)
            self.sent(len(chunk))
            pushed = True
            fence()  # it may have taken something meanwhile, and seen a ring that was not full
        return pushed

    def _show_failure(self, page: memoryview) -> bool:
        if self._get(page, xs_wire.ERROR) == self.failure:
            return False
        self._put(page, xs_wire.ERROR, self.failure)
        return True

    def _start_over(self, page: memoryview) -> None:
        self.daemon.reset(self)
        self.forget_stream()
        self.failure = RingError.NONE
        self._req_cons = self._rsp_prod = 0
        for index in (xs_wire.REQ_CONS, xs_wire.REQ_PROD, xs_wire.RSP_CONS, xs_wire.RSP_PROD, xs_wire.ERROR):
            self._put(page, index, 0)
        self._put(page, xs_wire.CONNECTION, xs_wire.Connection.CONNECTED)

    @staticmethod
    def _get(page: memoryview, offset: int) -> int:
        value: int = page.cast("I")[offset >> 2]
        return value

    @staticmethod
    def _put(page: memoryview, offset: int, value: int) -> None:
        page.cast("I")[offset >> 2] = value


def _copy_out(page: memoryview, ring: int, index: int, count: int) -> bytes:
    start = index % RING_SIZE
    first = min(count, RING_SIZE - start)
    return bytes(page[ring + start : ring + start + first]) + bytes(page[ring : ring + count - first])


def _copy_in(page: memoryview, ring: int, index: int, chunk: bytes) -> None:
    start = index % RING_SIZE
    first = min(len(chunk), RING_SIZE - start)
    page[ring + start : ring + start + first] = chunk[:first]
    page[ring : ring + len(chunk) - first] = chunk[first:]
