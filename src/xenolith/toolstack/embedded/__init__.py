"""The toolstack in one's own process: `Client` on top of a dom0 that runs here (design decision 9).

A program that imports xenolith uses this directly; the daemon serves the same object to others.  What a request asks of
dom0 is asked at once, in the caller's thread; what happens to domains is told by dom0's event thread through an
`EventHub`, so that no listener is ever waited for.

`table` has the domains and says whose turn it is with one; `building` makes them; `agents` talks to what runs in them.
On these stand the verbs, each part an abstract Client that answers those of one subject: `looking`, `life`,
`resources`, `devices`, `state`, `relocation`, `inside`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from xenolith.toolstack.client import EventStream, ToolstackError
from xenolith.toolstack.embedded.devices import Devices
from xenolith.toolstack.embedded.inside import Inside
from xenolith.toolstack.embedded.life import ACKNOWLEDGE_SECONDS, Life
from xenolith.toolstack.embedded.looking import Looking
from xenolith.toolstack.embedded.relocation import Relocation
from xenolith.toolstack.embedded.resources import Resources
from xenolith.toolstack.embedded.state import State
from xenolith.toolstack.embedded.table import DomainTable

if TYPE_CHECKING:
    from xenolith.dom0.services import Dom0


class EmbeddedToolstack(Looking, Life, Resources, Devices, State, Relocation, Inside):
    """A Client for the domains of `dom0`. Closing it destroys them; dom0 is closed with it."""

    def __init__(
        self,
        dom0: Dom0,
        acknowledge_seconds: float = ACKNOWLEDGE_SECONDS,
        xenstore_socket: Path | None = None,
    ) -> None:
        """`xenstore_socket` is where xenstore is to listen for tools, if it is. Raises ToolstackError."""
        if xenstore_socket is not None:
            try:
                dom0.xenstore.listen(xenstore_socket)
            except OSError as error:
                raise ToolstackError(f"xenstore cannot listen on {xenstore_socket}: {error.strerror}") from error
        super().__init__(DomainTable(dom0))
        self._acknowledge_seconds = acknowledge_seconds
        self._xenstore_socket = xenstore_socket

    def close(self) -> None:
        """End all domains and listeners."""
        if self._table.closed:
            return
        self._templates.close()
        self._table.closed = True
        self._trunks.leave()
        self.listen("")
        self._table.close()
        self.dom0.close()
        self._table.clone_disks.close()

    def subscribe(self) -> EventStream:
        self._table.check_open()
        return self._table.hub.subscribe()
