"""Front-ends for tests: a domain without a guest in it, whose frames and xenstore nodes the test writes itself."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

from xenolith.abi.errno import EINVAL
from xenolith.abi.grant_table import GNTST_bad_gntref, GNTST_general_error
from xenolith.abi.xenbus import XenbusState
from xenolith.dom0.peer import GrantError
from xenolith.dom0.xenstore import HostStore, XenstoreService

DEADLINE_SECONDS: Final = 60
PAGE: Final = 4096


class FakePeer:
    """The domain of a front-end: frames it granted, ports that can be bound, and how often each was notified."""

    def __init__(self, domid: int = 7) -> None:
        self.domid = domid
        self.frames: dict[int, bytearray] = {}  # by grant reference
        self.read_only: set[int] = set()
        self.unbound = {3, 4, 5, 6}
        self.ports: dict[int, Callable[[], None]] = {}
        self.mapped: dict[int, int] = {}  # reference by handle
        self.notifications = 0
        self.notified = threading.Condition()
        self.maps = 0
        self._handles = 0

    def grant(self, ref: int, data: bytes = b"") -> bytearray:
        self.frames[ref] = bytearray(data.ljust(PAGE, b"\0"))
        return self.frames[ref]

    def event(self) -> None:
        """What the guest does with EVTCHNOP_send."""
        for handler in list(self.ports.values()):
            handler()

    # --- as peer.Peer has it

    def bind(self, remote_port: int, handler: Callable[[], None]) -> int:
        if remote_port not in self.unbound:
            return -EINVAL
        self.unbound.discard(remote_port)
        self.ports[remote_port] = handler
        return remote_port

    def close_port(self, port: int) -> None:
        del self.ports[port]
        self.unbound.add(port)

    def notify(self, port: int) -> None:
        assert port in self.ports
        with self.notified:
            self.notifications += 1
            self.notified.notify_all()

    def map(self, ref: int, writable: bool) -> tuple[int, memoryview]:
        if ref not in self.frames:
            raise GrantError(f"GNTST {GNTST_bad_gntref}")
        if writable and ref in self.read_only:
            raise GrantError(f"GNTST {GNTST_general_error}")
        self.maps += 1
        self._handles += 1
        self.mapped[self._handles] = ref
        view = memoryview(self.frames[ref])
        return self._handles, view if writable else view.toreadonly()

    def unmap(self, handle: int) -> None:
        del self.mapped[handle]


class Follower:
    """Waits for nodes of xenstore to become what they should."""

    def __init__(self, store: HostStore, path: str) -> None:
        self._store = store
        self._path = path
        self._changed = threading.Condition()
        self._watch = store.watch(path, self._note)

    def _note(self, path: str) -> None:
        with self._changed:
            self._changed.notify_all()

    def wait(self, value: str | None) -> None:
        with self._changed:
            arrived = self._changed.wait_for(lambda: self._store.get(self._path) == value, DEADLINE_SECONDS)
        assert arrived, f"{self._path} is {self._store.get(self._path)!r}, not {value!r}"

    def close(self) -> None:
        self._watch.cancel()


@contextmanager
def running_store() -> Iterator[XenstoreService]:
    store = XenstoreService()
    store.start()
    try:
        yield store
    finally:
        store.stop()


def state(value: XenbusState) -> str:
    return str(int(value))
