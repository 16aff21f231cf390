"""Front-ends for tests: a domain without a guest in it, whose frames and xenstore nodes the test writes itself."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Final, cast

from xenolith.abi.errno import EINVAL
from xenolith.abi.grant_table import GNTST_bad_gntref, GNTST_general_error
from xenolith.abi.xenbus import XenbusState
from xenolith.dom0.xenstore import HostStore, XenstoreService
from xenolith.hypervisor.events import Handler
from xenolith.hypervisor.python_domain import IS_PINNED, HypercallError, MappedGrant, Pins, PythonDomain
from xenolith.machine.native import buffer_address, function_address

DEADLINE_SECONDS: Final = 60
PAGE: Final = 4096


class FakeDom0:
    """dom0's hypercalls, as `PythonDomain` has them, towards one domain: its frames, its ports, and what was mapped."""

    def __init__(self) -> None:
        self.frames: dict[int, bytearray] = {}  # by grant reference
        self.read_only: set[int] = set()
        self.unbound = {3, 4, 5, 6}
        self.handlers: dict[int, Handler] = {}
        self.mapped: dict[int, int] = {}  # reference by handle
        self.notified = threading.Condition()
        self.maps = 0
        self.lines: list[str] = []
        self._bound: set[int] = set()

    @property
    def hypercalls(self) -> PythonDomain:
        return cast(PythonDomain, self)

    def grant(self, ref: int, data: bytes = b"") -> bytearray:
        self.frames[ref] = bytearray(data.ljust(PAGE, b"\0"))
        return self.frames[ref]

    def event(self) -> None:
        """What the guest does with EVTCHNOP_send."""
        for port, handler in list(self.handlers.items()):
            handler(port)

    # --- as PythonDomain has them

    def bind_interdomain(self, domid: int, remote_port: int) -> int:
        if remote_port not in self.unbound:
            raise HypercallError(f"port {remote_port}", -EINVAL)
        self.unbound.discard(remote_port)
        self._bound.add(remote_port)
        return remote_port

    def set_handler(self, port: int, handler: Handler, eventfd: int = -1) -> None:
        self.handlers[port] = handler

    def close(self, port: int) -> None:
        self._bound.discard(port)
        self.unbound.add(port)
        self.handlers.pop(port, None)

    def send(self, port: int) -> None:
        assert port in self._bound
        with self.notified:
            self.notified.notify_all()

    def map_grant(self, domid: int, ref: int, writable: bool = True) -> MappedGrant:
        if ref not in self.frames:
            raise HypercallError(f"grant {ref}", GNTST_bad_gntref)
        if writable and ref in self.read_only:
            raise HypercallError(f"grant {ref}", GNTST_general_error)
        self.maps += 1
        self.mapped[self.maps] = ref
        view = memoryview(self.frames[ref])
        return MappedGrant(domid, ref, writable, view if writable else view.toreadonly(), 1, self.maps, self.hypercalls)

    def grant_batch(self, domid: int) -> FakeGrantBatch:
        return FakeGrantBatch(self)

    def unmap_grant(self, grant: MappedGrant) -> None:
        del self.mapped[grant.handle]

    def log(self, text: str) -> None:
        self.lines.append(text)


class FakeGrantBatch:
    """As `GrantBatch`, of a FakeDom0."""

    def __init__(self, dom0: FakeDom0) -> None:
        self._dom0 = dom0
        self._frames: list[bytearray] = []  # whatever becomes of them, they stay as long as they are pinned
        self.pins = Pins()
        self.granter = 0
        rest = ctypes.CFUNCTYPE(ctypes.c_uint32, ctypes.c_uint64, ctypes.c_uint64)
        self._functions = rest(lambda *_: self.pins.count - self.pins.begin), rest(lambda *_: self.pins.count)
        self.native_pin, self.native_unpin = map(function_address, self._functions)

    def pin(self) -> None:
        pins, dom0 = self.pins, self._dom0
        for index in range(pins.begin, pins.count):
            ref = pins.refs[index]
            frame = dom0.frames.get(ref)
            if frame is not None and not (pins.writable[index] and ref in dom0.read_only):
                pins.states[index] = IS_PINNED
                self._frames.append(frame)
                pins.addresses[index] = buffer_address(frame)

    def copy(self, parts: Sequence[tuple[int, int, int]], local: bytearray, to_guest: bool) -> bool:
        frames = [self._dom0.frames.get(ref) for ref, _, _ in parts]
        if None in frames or (to_guest and any(ref in self._dom0.read_only for ref, _, _ in parts)):
            return False
        at = 0
        for frame, (_, offset, size) in zip(frames, parts, strict=True):
            assert frame is not None
            if to_guest:
                frame[offset : offset + size] = local[at : at + size]
            else:
                local[at : at + size] = frame[offset : offset + size]
            at += size
        return True

    def unpin(self) -> None:
        self.pins.states[: self.pins.count] = bytes(self.pins.count)
        self.pins.count = self.pins.begin = 0
        self._frames.clear()


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
