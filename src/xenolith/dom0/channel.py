"""A channel: a PV console of a domain's beside its primary one, for a program in it (Xen: docs/misc/channel.txt).

To Linux it is another /dev/hvc<number>, to xenstore a device of the kind `console` with a `name`.  Its ring is the
primary console's (`dom0.console`); other than there, the guest grants the page and says in xenstore where it is.

A channel has no thread.  What happens to it is noted and done on dom0's event thread: the handshake with the
front-end, as `dom0.xenbus` describes it, and the carrying of bytes.  Of a domain that came from elsewhere with its
front-end connected, nothing is mapped until somebody uses the channel.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, Final

from xenolith.abi.xenbus import XenbusState
from xenolith.dom0.console import Console
from xenolith.dom0.domain_tree import home
from xenolith.dom0.xenbus import FrontendError, FrontendNodes
from xenolith.dom0.xenstore.errors import XsError
from xenolith.hypervisor.python_domain import HypercallError, PythonDomain

if TYPE_CHECKING:
    from xenolith.dom0.event_thread import EventThread
    from xenolith.dom0.xenstore import HostRequests, HostStore
    from xenolith.dom0.xenstore.host import HostWatch

_LIMIT: Final = 1 << 32  # of ports and grant references


def _frontend(domid: int, number: int) -> str:
    return f"{home(domid)}/device/console/{number}"


def _backend(domid: int, number: int) -> str:
    return f"/local/domain/0/backend/console/{domid}/{number}"


def describe(store: HostRequests, domid: int, number: int, name: str) -> None:
    """Write the nodes of a new domain's channel, as libxl does."""
    frontend, backend = _frontend(domid, number), _backend(domid, number)
    store.mkdir(frontend, [f"n{domid}", "r0"])
    store.mkdir(backend, ["n0", f"r{domid}"])
    state = str(int(XenbusState.INITIALISING))
    for path, value in {
        f"{backend}/frontend": frontend,
        f"{backend}/frontend-id": str(domid),
        f"{backend}/online": "1",
        f"{backend}/protocol": "vt100",
        f"{backend}/name": name,
        f"{backend}/state": state,
        f"{frontend}/backend": backend,
        f"{frontend}/backend-id": "0",
        f"{frontend}/type": "ioemu",
        f"{frontend}/name": name,
        f"{frontend}/state": state,
    }.items():
        store.write(path, value)


class Channel:
    """One channel of a domain's, whose nodes are in xenstore. Its methods may be called by any thread."""

    def __init__(self, dom0: PythonDomain, store: HostStore, thread: EventThread, domid: int, number: int) -> None:
        self._dom0: Final = dom0
        self._store: Final = store
        self._thread: Final = thread
        self._domid: Final = domid
        self._name: Final = f"channel {number} of d{domid}"
        self._frontend: Final = _frontend(domid, number)
        self._backend: Final = _backend(domid, number)
        self._changed: Final = threading.Condition()  # of what follows
        self._console: Console | None = None
        self._connection = ExitStack()
        self._closed = False
        self._held = False
        self._told = False  # of a front-end that breaks the protocol
        self._watch: HostWatch | None = None
        self._look: Final[Callable[[int], None]] = thread.on_event(self._follow)
        if self._frontend_state() is not XenbusState.CONNECTED:
            self.attend()

    def attend(self) -> None:
        """The domain runs: follow what its front-end does."""
        with self._changed:
            if self._watch is None and not self._closed:
                self._watch = self._store.watch(f"{self._frontend}/state", lambda path: self._look(0))

    def open(self, timeout: float | None) -> Console | None:
        """The console, once the front-end has connected, at most `timeout` seconds from now; None: it has not.

        Of a domain that has shut down it is the one that there was.
        """
        self.attend()
        self._follow()
        with self._changed:
            self._changed.wait_for(lambda: self._console or self._closed, timeout)
            return self._console

    def hold(self) -> None:
        """Leave the domain's memory alone, until `go_on`."""
        with self._changed:
            self._held = True
            if self._console is not None:
                self._console.hold()

    def go_on(self) -> None:
        with self._changed:
            self._held = False
            if self._console is not None:
                self._console.go_on()
        self._look(0)

    def close(self) -> None:
        """The domain has shut down, or goes. Readers get what is left, and the end."""
        with self._changed:
            self._closed = True
            watch, self._watch = self._watch, None
            console = self._console
            self._disconnect()
            self._console = console
            self._changed.notify_all()
        if watch is not None:
            watch.cancel()

    # --- usually on dom0's event thread --------------------------------------------------------------------------

    def _follow(self) -> None:
        with self._changed:
            if self._closed or self._held:
                return
            theirs = self._frontend_state()
            if theirs in (XenbusState.INITIALISED, XenbusState.CONNECTED):
                if self._console is None:
                    self._connect()
            elif theirs is XenbusState.CLOSING:
                self._switch(XenbusState.CLOSING)
            elif theirs in (XenbusState.CLOSED, XenbusState.UNKNOWN):
                self._disconnect()
                self._switch(XenbusState.CLOSED)
            elif theirs is XenbusState.INITIALISING:
                self._disconnect()
                self._switch(XenbusState.INIT_WAIT)

    def _frontend_state(self) -> XenbusState:
        value = FrontendNodes(self._store, self._frontend).text("state", "0")
        return XenbusState(int(value)) if value in ("1", "2", "3", "4", "5", "6", "7", "8") else XenbusState.UNKNOWN

    def _connect(self) -> None:
        nodes = FrontendNodes(self._store, self._frontend)
        try:
            with ExitStack() as undo:
                grant = self._dom0.map_grant(self._domid, nodes.number("ring-ref", _LIMIT))
                undo.callback(self._dom0.unmap_grant, grant)
                port = self._dom0.bind_interdomain(self._domid, nodes.number("port", _LIMIT))
                undo.callback(self._dom0.close, port)
                console = Console(grant.view, lambda: self._dom0.send(port))
                undo.callback(console.close)
                self._dom0.set_handler(port, self._thread.on_event(console.service))
                self._connection = undo.pop_all()
        except (FrontendError, HypercallError) as error:
            if not self._told:  # a guest that goes on and on gets no more of the log
                self._dom0.log(f"{self._name}: its ring cannot be reached: {error}")
                self._told = True
            self._switch(XenbusState.CLOSING)
            return
        self._console = console
        self._switch(XenbusState.CONNECTED)
        self._changed.notify_all()

    def _disconnect(self) -> None:
        self._console = None
        self._connection.close()

    def _switch(self, state: XenbusState) -> None:
        with suppress(XsError):  # the domain is going, and its nodes with it
            if self._store.get(f"{self._backend}/state") != str(int(state)):
                self._store.write(f"{self._backend}/state", str(int(state)))
