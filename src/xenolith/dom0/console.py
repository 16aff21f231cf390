"""The console back-end (Xen: tools/console/daemon; public/io/console.h).

Every domain has a console: a page with two byte rings, shared with dom0, and an event channel.  The guest puts what
it prints into one ring and sends an event; dom0 takes it out, hands it to whoever reads, and sends an event back,
upon which a guest that waited for room goes on.  Input travels the same way in the other ring.

Several readers may follow one console.  Each gets every byte from when it was opened, the scroll-back before it, and
has a bounded buffer.  What happens when that is full is the reader's choice: the guest waits until it reads
(Overflow.WAIT: nothing may get lost, as when a command's output is a result), or the oldest bytes are lost
(Overflow.DROP_OLDEST: nobody's terminal may stop the guest).  With no reader a console never stops the guest.

The indices in the page are the guest's to write, all of them.  Each is read once and checked; where they are
impossible, the domain's console stands still until they make sense again, and nothing else is touched.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from enum import Enum
from typing import Final

from xenolith.abi import console_ring as abi

SCROLLBACK_BYTES: Final = 64 << 10
READER_BYTES: Final = 64 << 10
_DRAIN_ROUNDS: Final = 8
_INDEX_MASK: Final = (1 << 32) - 1


class Overflow(Enum):
    """What happens when a reader's buffer is full."""

    WAIT = "the guest waits"
    DROP_OLDEST = "the oldest bytes are lost"


class ConsoleClosed(Exception):
    """The domain of this console is gone."""


class Console:
    """One domain's console.

    `page` is the ring page as bytes, `notify` sends the event to the guest; it is called with the console's lock held
    and must take no lock itself.  All methods may be called by any thread.
    """

    def __init__(self, page: memoryview, notify: Callable[[], None], scrollback: bytes = b"") -> None:
        self._bytes = page
        self._index = page.cast("I")
        self._notify = notify
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._scrollback = deque[bytes]([scrollback] if scrollback else [])
        self._scrollback_size = len(scrollback)
        self._held = False
        self._readers: list[Reader] = []
        self.closed = False

    # --- the guest's side ---

    def service(self) -> None:
        """Look at the ring: what to do upon each event from the guest."""
        with self._lock:
            if not self.closed:
                self._drain()
                self._changed.notify_all()  # the guest may have made room for input

    def hold(self) -> None:
        """Leave the page of a domain that stands still as it is, until `go_on`."""
        with self._lock:
            self._held = True

    def go_on(self) -> None:
        """Serve it again."""
        with self._lock:
            self._held = False
        self.service()

    def _room(self) -> int:
        """How many bytes may be taken before some reader that must lose nothing has no place for more."""
        return min((reader.room for reader in self._readers), default=abi.OUT_SIZE)

    def _drain(self) -> None:
        """Take what the ring holds and the readers have room for, and tell the guest.

        A guest that goes on writing meanwhile is left after a few rounds: other consoles must get their turn, and
        it sends another event for what it wrote last.
        """
        for _ in range(_DRAIN_ROUNDS):
            data = self._take(self._room())
            if not data:
                return
            self._deliver(data)
            self._notify()

    def _take(self, limit: int) -> bytes:
        if self._held:
            return b""
        index = self._index
        produced, consumed = index[abi.OUT_PROD], index[abi.OUT_CONS]
        available = produced - consumed & _INDEX_MASK
        count = min(available, limit)
        if not 0 < available <= abi.OUT_SIZE or not count:
            return b""
        start = consumed % abi.OUT_SIZE
        first = min(count, abi.OUT_SIZE - start)
        base = abi.OUT
        data = bytes(self._bytes[base + start : base + start + first]) + bytes(self._bytes[base : base + count - first])
        index[abi.OUT_CONS] = consumed + count & _INDEX_MASK
        return data

    def _deliver(self, data: bytes) -> None:
        self._scrollback.append(data)
        self._scrollback_size += len(data)
        while self._scrollback_size - len(self._scrollback[0]) >= SCROLLBACK_BYTES:
            self._scrollback_size -= len(self._scrollback.popleft())
        for reader in self._readers:
            reader.append(data)
        self._changed.notify_all()

    def close(self) -> None:
        """The domain has shut down: take what is left in the ring, whatever the readers' buffers hold, and end them."""
        with self._lock:
            if self.closed:
                return
            data = self._take(abi.OUT_SIZE)
            if data:
                self._deliver(data)
            self.closed = True
            self._index.release()
            self._bytes.release()
            self._changed.notify_all()

    # --- dom0's side ---

    @property
    def scrollback(self) -> bytes:
        """The latest output, SCROLLBACK_BYTES of it or a little more."""
        with self._lock:
            return b"".join(self._scrollback)

    def write(self, data: bytes, timeout: float | None = None) -> int:
        """Type `data` on the console; waits while the guest does not read, at most `timeout` seconds in all.

        How many bytes the guest was given: all of them unless the time was up.  Raises ConsoleClosed.
        """
        written = 0
        until = None if timeout is None else time.monotonic() + timeout
        with self._lock:
            while written < len(data):
                if self.closed:
                    raise ConsoleClosed
                accepted = self._put(data[written:])
                written += accepted
                if accepted:
                    continue
                left = None if until is None else until - time.monotonic()
                if left is not None and left <= 0:
                    break
                self._changed.wait(left)  # also ends when the guest has printed something
        return written

    def offer(self, data: bytes) -> int:
        """Type as much of `data` as the guest has room for now; how many bytes. Raises ConsoleClosed."""
        with self._lock:
            if self.closed:
                raise ConsoleClosed
            return self._put(data)

    def _put(self, data: bytes) -> int:
        if self._held:
            return 0
        index = self._index
        produced, consumed = index[abi.IN_PROD], index[abi.IN_CONS]
        used = produced - consumed & _INDEX_MASK
        if used >= abi.IN_SIZE:
            return 0
        count = min(len(data), abi.IN_SIZE - used)
        start = produced % abi.IN_SIZE
        first = min(count, abi.IN_SIZE - start)
        self._bytes[abi.IN + start : abi.IN + start + first] = data[:first]
        self._bytes[abi.IN : abi.IN + count - first] = data[first:count]
        index[abi.IN_PROD] = produced + count & _INDEX_MASK
        if count:
            self._notify()
        return count

    @property
    def input_room(self) -> int:
        """How many bytes can be typed now."""
        with self._lock:
            if self.closed or self._held:
                return 0
            return max(0, abi.IN_SIZE - (self._index[abi.IN_PROD] - self._index[abi.IN_CONS] & _INDEX_MASK))

    def open_reader(self, overflow: Overflow, capacity: int = READER_BYTES) -> Reader:
        """Follow the console from now on; the scroll-back comes first. For a closed console that is all."""
        with self._lock:
            reader = Reader(self, overflow, capacity)
            for data in self._scrollback:
                reader.append(data)
            if not self.closed:
                self._readers.append(reader)
            return reader


class Reader:
    """One follower of a console."""

    def __init__(self, console: Console, overflow: Overflow, capacity: int) -> None:
        self._console = console
        self._overflow = overflow
        self._capacity = capacity
        self._pieces = deque[bytes]()
        self._size = 0
        self._detached = False

    # Called with the console's lock held.

    @property
    def room(self) -> int:
        """How many bytes of the ring it can take now."""
        if self._overflow is Overflow.DROP_OLDEST:
            return abi.OUT_SIZE
        return max(0, self._capacity - self._size)

    def append(self, data: bytes) -> None:
        """Take bytes of the console."""
        self._pieces.append(data)
        self._size += len(data)
        if self._overflow is Overflow.DROP_OLDEST:
            while self._size - len(self._pieces[0]) >= self._capacity:
                self._size -= len(self._pieces.popleft())

    # For its user.

    def read(self, timeout: float | None = None) -> bytes | None:
        """The next bytes, waiting for some at most `timeout` seconds (None: for ever).

        b"" when the console has ended or the reader was closed, None when the time is up.
        """
        console = self._console
        with console._lock:
            ready = console._changed.wait_for(lambda: self._size or console.closed or self._detached, timeout)
            if not ready:
                return None
            data = b"".join(self._pieces)
            self._pieces.clear()
            self._size = 0
            if not console.closed:
                console._drain()  # into the room just made; the guest may be waiting for it
            return data

    def close(self) -> None:
        """Stop following. Somebody waiting in `read` gets b""."""
        console = self._console
        with console._lock:
            self._detached = True
            self._pieces.clear()
            self._size = 0
            if self in console._readers:
                console._readers.remove(self)
            console._changed.notify_all()
            if not console.closed:
                console._drain()

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
