"""Xenbus, the back-ends' side: how the two halves of a split device find each other (public/io/xenbus.h; paper 3.4).

A device has two directories in xenstore, one for each half.  dom0 makes both; each half then writes its own `state` and
watches the other's.  The back-end says what it offers (InitWait), the front-end where its rings are (Initialised), the
back-end maps them (Connected), the front-end follows.  This module is that handshake, once for all kinds of devices; a
`Backend` fills in what differs.

Each device has a thread of its own, on which all methods of its back-end are called: a device that waits for a
slow disk delays no other.  What happens outside (xenstore watches, events of the rings) only rings the thread's bell.

Closing.  A front-end that goes away says Closing and waits to *see* the back-end at Closing too; only then does it say
Closed, which the back-end answers with Closed.  Answering both at once would cost the guest five seconds of its
power-off.  Unplugging begins at the back-end's end: Closing there, upon which the front-end says Closed.

Everything the front-end writes is its own choice.  Values are checked when they are read; what makes no sense, and a
ring that lies, closes that device (`FrontendError`): the guest sees it die, and nothing else notices.  A device that
failed in this way, or by an error of ours, stays closed.  A front-end that begins again (its driver was loaded
anew, its domain resumed) gets a new connection.
"""

from __future__ import annotations

import re
import threading
import time
import traceback
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import suppress
from typing import ClassVar, Final, Generic, TypeVar

from xenolith.abi.xenbus import XenbusState
from xenolith.dom0.bell import Bell
from xenolith.dom0.xenstore import HostRequests, HostStore

UNPLUG_SECONDS: Final = 10.0  # that a front-end has to let go of its device, as libxl gives it

_NUMBER: Final = re.compile(r"[0-9]{1,10}", re.ASCII)


class FrontendError(Exception):
    """The front-end does not keep to the protocol; the text says what it did."""


class DeviceGone(Exception):
    """The device has ended, and nothing can be asked of it."""


class FrontendNodes:
    """What a front-end wrote into its directory. Nothing of it can be relied on."""

    def __init__(self, store: HostStore, directory: str) -> None:
        self._store: Final = store
        self._directory: Final = directory

    def text(self, name: str, default: str) -> str:
        """A node's value, at most 64 characters of it."""
        value = self._store.get(f"{self._directory}/{name}")
        return default if value is None else value[:64]

    def number(self, name: str, limit: int, default: int | None = None) -> int:
        """A number below `limit`. Raises FrontendError for anything else, and for none where there is no default."""
        value = self.text(name, "")
        if not value and default is not None:
            return default
        if not _NUMBER.fullmatch(value) or int(value) >= limit:
            raise FrontendError(f"its node {name} is {value!r} and no number below {limit}")
        return int(value)


class Backend(ABC):
    """What one kind of device does. All methods are called on the device's thread."""

    kind: ClassVar[str]  # the directory of its kind: "vbd", "vif"

    @abstractmethod
    def offer(self) -> Mapping[str, str]:
        """The nodes that tell a front-end what this device can do."""

    @abstractmethod
    def connect(self, nodes: FrontendNodes, bell: Bell) -> None:
        """Map the front-end's rings. Its events must ring the bell.

        Raises FrontendError. `disconnect` follows in any case.
        """

    @abstractmethod
    def describe(self) -> Mapping[str, str]:
        """The nodes that tell a connected front-end what the device is."""

    @abstractmethod
    def serve(self) -> bool:
        """Do what the front-end asked for; True where it has asked for more meanwhile. Raises FrontendError."""

    def settle(self) -> None:  # noqa: B027  most have nothing to bring anywhere
        """Bring what was accepted to where it outlives this process; the domain stands still."""

    @abstractmethod
    def disconnect(self) -> None:
        """Give up the rings, as far as `connect` got. What was accepted is finished and answered first."""

    @abstractmethod
    def close(self) -> None:
        """Give up everything else; the last call."""


Kind = TypeVar("Kind", bound=Backend)


class Device(Generic[Kind]):
    """A split device of a domain's, seen from dom0."""

    def __init__(self, xenbus: Xenbus, domid: int, number: int, backend: Kind) -> None:
        self.backend: Final[Kind] = backend
        self.number: Final = number
        self.domid: Final = domid
        self.frontend: Final = f"/local/domain/{domid}/device/{backend.kind}/{number}"
        self.directory: Final = f"/local/domain/0/backend/{backend.kind}/{domid}/{number}"
        self.name: Final = f"{backend.kind} {number} of d{domid}"
        self.failure: str | None = None
        """Why it was closed before its time."""
        self._store: Final = xenbus.store
        self._log: Final = xenbus.log
        self._state = XenbusState.INIT_WAIT
        self._changed = threading.Condition()  # of _state
        self._bell: Final = Bell()
        self._look = False  # at the front-end's state
        self._calls: Final[deque[Callable[[], None]]] = deque()
        self._connected = False  # the back-end has the front-end's rings
        self._busy = False  # there is more to serve, of which no event will tell
        self._unplugging = False
        self._going_on = threading.Event()  # of the hold that it is in
        self._stopping = False
        self._over = False  # nothing is called any more
        self._watch = self._store.watch(f"{self.frontend}/state", self._frontend_changed)
        self._thread: Final = threading.Thread(target=self._run, name=self.name, daemon=True)
        try:
            self._thread.start()
        except RuntimeError:  # the host gives no thread
            self._watch.cancel()
            self._bell.close()
            raise

    @property
    def state(self) -> XenbusState:
        return self._state

    # --- from any thread -----------------------------------------------------------------------------

    def _frontend_changed(self, path: str) -> None:
        self._look = True
        self._bell.ring()

    def call(self, work: Callable[[], None]) -> None:
        """Have something done on the device's thread. Raises DeviceGone."""
        with self._changed:
            if self._over:
                raise DeviceGone(f"{self.name} is no more: its domain has shut down, or it was unplugged")
            self._calls.append(work)
        self._bell.ring()

    def ask(self, work: Callable[[], None]) -> None:
        """Have something done on the device's thread and wait for it; raises what that raises."""
        done: Future[None] = Future()

        def carry_out() -> None:
            try:
                work()
                done.set_result(None)
            except Exception as error:
                done.set_exception(error)

        self.call(carry_out)
        done.result()

    def hold(self) -> Callable[[], None]:
        """Finish what the front-end, which stands still, has asked for, and leave its memory alone from then on.

        Returns what lets the device go on.
        """
        held = threading.Event()
        self._going_on = going_on = threading.Event()

        def stand() -> None:
            try:
                while self._connected and self.backend.serve():
                    pass
                self.backend.settle()
            finally:
                held.set()
                going_on.wait()

        with suppress(DeviceGone):
            self.call(stand)
            held.wait()
        return going_on.set

    def refresh(self) -> None:
        """Tell a connected front-end anew what the device is, because it changed (its size, its medium)."""
        self.call(self._tell)

    def unplug(self) -> None:
        """Ask the front-end to let go of the device."""
        self._unplugging = True
        self._look = True
        self._bell.ring()

    def cpu_time_ns(self) -> int:
        """What its thread has used of the host's processors."""
        ident = self._thread.ident
        return time.clock_gettime_ns(time.pthread_getcpuclockid(ident)) if ident and self._thread.is_alive() else 0

    def wait_closed(self, timeout: float) -> bool:
        """Wait until the two halves are apart; False when the time is up."""
        with self._changed:
            return self._changed.wait_for(lambda: self._state is XenbusState.CLOSED, timeout)

    def stop_soon(self) -> None:
        """End the device without asking the front-end, which does not run any more."""
        self._stopping = True
        self._going_on.set()
        self._bell.ring()

    def stop(self) -> None:
        """The same, and wait for it. A second call does nothing."""
        self.stop_soon()
        self._thread.join()

    # --- on the device's thread ------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._stopping:
            if not self._busy:
                self._bell.wait()
            self._guarded(self._work)
        self._watch.cancel()
        self._guarded(self._disconnect)
        with self._changed:
            self._over = True
        self._guarded(self._carry_out_calls)
        self._guarded(self.backend.close)
        self._bell.close()

    def _guarded(self, work: Callable[[], None]) -> None:
        """Whatever goes wrong concerns this device alone."""
        try:
            work()
        except FrontendError as error:
            self._fail(f"its front-end broke the protocol: {error}")
        except Exception:
            self._fail(f"its back-end failed:\n{traceback.format_exc()}")

    def _work(self) -> None:
        if self._look:
            self._look = False
            self._follow()
        self._carry_out_calls()
        self._busy = self._connected and self.backend.serve()

    def _carry_out_calls(self) -> None:
        while self._calls:
            self._calls.popleft()()

    def _follow(self) -> None:
        """Do what the front-end's state asks for."""
        theirs = self._frontend_state()
        if self.failure is not None:
            if theirs in (XenbusState.CLOSED, XenbusState.UNKNOWN):
                self._switch(XenbusState.CLOSED)
        elif theirs in (XenbusState.INITIALISED, XenbusState.CONNECTED):
            if self._state is XenbusState.INIT_WAIT and not self._unplugging:
                self._connect()
        elif theirs is XenbusState.CLOSING:
            self._switch(XenbusState.CLOSING)
        elif theirs in (XenbusState.CLOSED, XenbusState.UNKNOWN):
            self._disconnect()
            self._switch(XenbusState.CLOSED)
        elif self._state is not XenbusState.INIT_WAIT and theirs is XenbusState.INITIALISING and not self._unplugging:
            self._disconnect()  # it begins again
            self._switch(XenbusState.INIT_WAIT)
        if self._unplugging and self._state is not XenbusState.CLOSED:
            connected = self._state in (XenbusState.CONNECTED, XenbusState.CLOSING)
            self._switch(XenbusState.CLOSING if connected else XenbusState.CLOSED)

    def _frontend_state(self) -> XenbusState:
        value = FrontendNodes(self._store, self.frontend).text("state", "0")
        return XenbusState(int(value)) if value in ("1", "2", "3", "4", "5", "6", "7", "8") else XenbusState.UNKNOWN

    def _connect(self) -> None:
        self._connected = True
        self.backend.connect(FrontendNodes(self._store, self.frontend), self._bell)
        self._describe()
        self._switch(XenbusState.CONNECTED)

    def _disconnect(self) -> None:
        if self._connected:
            self._connected = self._busy = False
            self.backend.disconnect()

    def _describe(self) -> None:
        for name, value in self.backend.describe().items():
            self._store.write(f"{self.directory}/{name}", value)

    def _tell(self) -> None:
        if self._state is XenbusState.CONNECTED:
            self._describe()
            self._store.write(f"{self.directory}/state", str(int(XenbusState.CONNECTED)))

    def _fail(self, why: str) -> None:
        self._log(f"{self.name}: {why}")
        if self.failure is None:
            self.failure = why
            self._store.write(f"{self.directory}/error", why.splitlines()[-1])
            self._guarded(self._disconnect)
            self._switch(XenbusState.CLOSING)
            self._frontend_changed("")

    def _switch(self, state: XenbusState) -> None:
        if state is not self._state:
            self._store.write(f"{self.directory}/state", str(int(state)))
            with self._changed:
                self._state = state
                self._changed.notify_all()


class Xenbus:
    """Makes and removes devices."""

    def __init__(self, store: HostStore, log: Callable[[str], None]) -> None:
        self.store: Final = store
        self.log: Final = log

    def plug(
        self, domid: int, number: int, backend: Kind, front: Mapping[str, str], back: Mapping[str, str]
    ) -> Device[Kind]:
        """Give a domain a device, before it runs or while it does.

        `front` and `back` are nodes of the two directories besides those that every device has.  Raises ValueError
        where the domain has a device of that kind and number, or the host has no thread or descriptor for it.
        """
        frontend = f"/local/domain/{domid}/device/{backend.kind}/{number}"
        directory = f"/local/domain/0/backend/{backend.kind}/{domid}/{number}"
        front_nodes = {
            "backend": directory,
            "backend-id": "0",
            "state": str(int(XenbusState.INITIALISING)),
            **front,
        }
        back_nodes = {
            "frontend": frontend,
            "frontend-id": str(domid),
            "online": "1",
            **back,
            **backend.offer(),
            "state": str(int(XenbusState.INIT_WAIT)),
        }

        def write(store: HostRequests) -> None:
            if store.exists(directory):
                raise ValueError(f"domain {domid} has a {backend.kind} {number} already")
            store.mkdir(directory, ["n0", f"r{domid}"])
            store.mkdir(frontend, [f"n{domid}", "r0"])
            for name, value in back_nodes.items():
                store.write(f"{directory}/{name}", value)
            for name, value in front_nodes.items():
                store.write(f"{frontend}/{name}", value)

        self.store.transact(write)
        return self._made(domid, number, backend, frontend, directory)

    def _made(self, domid: int, number: int, backend: Kind, frontend: str, directory: str) -> Device[Kind]:
        try:
            return Device(self, domid, number, backend)
        except (OSError, RuntimeError) as error:
            self._forget(frontend, directory)
            raise ValueError(f"the host gives nothing for another device: {error}") from error

    def adopt(
        self, domid: int, number: int, backend: Kind, front: Mapping[str, str], back: Mapping[str, str]
    ) -> Device[Kind]:
        """A device of a domain that came here with its nodes in xenstore. It connects where it was connected.

        `front` and `back` are nodes that are another's than where it came from.  Raises ValueError where there are no
        nodes of such a device, and as `plug` does.
        """
        frontend = f"/local/domain/{domid}/device/{backend.kind}/{number}"
        directory = f"/local/domain/0/backend/{backend.kind}/{domid}/{number}"

        def write(store: HostRequests) -> None:
            if not store.exists(directory) or not store.exists(frontend):
                raise ValueError(f"domain {domid} has no {backend.kind} {number}")
            for name, value in {**back, "frontend": frontend, "frontend-id": str(domid)}.items():
                store.write(f"{directory}/{name}", value)
            for name, value in {**front, "backend": directory}.items():
                store.write(f"{frontend}/{name}", value)

        self.store.transact(write)
        return self._made(domid, number, backend, frontend, directory)

    def unplug(self, device: Device[Kind], timeout: float = UNPLUG_SECONDS, force: bool = False) -> bool:
        """Take a device from a running domain.

        False where the front-end does not let go of it in time; with `force` it then loses the device all the same.
        """
        self.store.write(f"{device.directory}/online", "0")
        device.unplug()
        if not device.wait_closed(timeout) and not force:
            return False
        self.remove(device)
        return True

    def remove(self, device: Device[Kind]) -> None:
        """End a device whose front-end has let go of it, or does not run any more."""
        device.stop()
        self._forget(device.frontend, device.directory)

    def _forget(self, frontend: str, directory: str) -> None:
        def remove(store: HostRequests) -> None:
            store.rm(frontend)
            store.rm(directory)

        self.store.transact(remove)
