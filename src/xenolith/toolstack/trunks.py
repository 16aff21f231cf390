"""Trunks: connections to other daemons, by which their networks and this one are one (`dom0.network.trunk`)."""

from __future__ import annotations

import threading
from contextlib import ExitStack
from typing import TYPE_CHECKING, Final

from xenolith.dom0.network.trunk import Trunk
from xenolith.toolstack.client import ToolstackError
from xenolith.toolstack.peers import Connection, connected

if TYPE_CHECKING:
    from xenolith.dom0.services import Dom0

GREETING: Final = "network"
_WELCOME: Final = "welcome"
_LINE: Final = 200


class Trunks:
    """All of a daemon. Methods may be called by any thread."""

    def __init__(self, dom0: Dom0) -> None:
        self._router: Final = dom0.network.router
        self._log: Final = dom0.domain.log
        self._lock: Final = threading.Lock()  # of what follows
        self._trunks: dict[Trunk, str] = {}  # and where to
        self._threads: set[threading.Thread] = set()

    def join(self, to: str) -> None:
        """Begin one to a daemon that listens there. Raises ToolstackError."""
        with self._lock:
            if to in self._trunks.values():
                raise ToolstackError(f"The network of {to} is joined already.")
        network = str(self._router.network)
        with ExitStack() as resources:
            connection = resources.enter_context(connected(to, f"{GREETING} {network}"))
            try:
                connection.out.flush()
                answer = connection.source.readline(_LINE).decode("utf-8", "replace").strip()
            except OSError as error:
                raise ToolstackError(f"{to} does not answer: {error}") from error
            if answer != _WELCOME:
                raise ToolstackError(f"{to} does not join its network: {answer or 'it has closed the connection'}.")
            trunk = self._begin(connection, to)
            held = resources.pop_all()
        thread = threading.Thread(target=self._run, args=(trunk, held), name=f"trunk to {to}", daemon=True)
        with self._lock:
            self._threads.add(thread)
        thread.start()

    def serve(self, network: str, connection: Connection) -> None:
        """One that another daemon begins, to its end. Raises OSError."""
        if network != str(self._router.network):
            connection.answer(f"this network is {self._router.network}, not {network}\n".encode())
            return
        connection.answer(f"{_WELCOME}\n".encode())
        self._run(self._begin(connection, ""), ExitStack())

    def _begin(self, connection: Connection, to: str) -> Trunk:
        trunk = Trunk(self._router, connection.source, connection.out, connection.hang_up, self._log)
        with self._lock:
            self._trunks[trunk] = to
        return trunk

    def _run(self, trunk: Trunk, resources: ExitStack) -> None:
        with resources:
            try:
                trunk.run()
            finally:
                with self._lock:
                    del self._trunks[trunk]
                    self._threads.discard(threading.current_thread())

    def joined(self) -> list[str]:
        """Where they lead that were begun here."""
        with self._lock:
            return sorted(to for to in self._trunks.values() if to)

    def leave(self) -> None:
        """End them all."""
        with self._lock:
            trunks, threads = list(self._trunks), list(self._threads)
        for trunk in trunks:
            trunk.close()
        for thread in threads:
            thread.join()
