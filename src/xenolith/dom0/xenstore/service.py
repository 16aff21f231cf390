"""The xenstore service of dom0: one store, reached by guests' rings, a UNIX socket and dom0's own code.

One thread serves rings and sockets in turns, at most :data:`TURN` requests each, so a client that floods waits for
the others after every few requests. The store itself sits behind one lock which is held for one turn or one call at a
time and never while waiting for a client, a callback or an event channel. dom0's watch callbacks run on a thread of
their own; a slow one delays other callbacks and no domain.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import logging
import os
import selectors
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Final, TypeAlias

from xenolith.dom0.unix_socket import ListeningSocket
from xenolith.dom0.xenstore.caller import Caller
from xenolith.dom0.xenstore.connection import Connection, ConnectionState
from xenolith.dom0.xenstore.errors import XsError
from xenolith.dom0.xenstore.host import HostCaller, HostStore
from xenolith.dom0.xenstore.quota import Quota
from xenolith.dom0.xenstore.ring import RingConnection
from xenolith.dom0.xenstore.socket_client import SocketConnection
from xenolith.dom0.xenstore.xenstored import Xenstored

TURN: Final = 16
"""Requests run for one client before the next has its turn."""

_log: Final = logging.getLogger(__name__)
_PEER_CREDENTIALS: Final = struct.Struct("3i")  # struct ucred: pid, uid, gid

MapDomain: TypeAlias = Callable[[int, int, int], tuple[memoryview, Callable[[], None]]]
"""INTRODUCE(domid, mfn, port) -> the interface page and how to notify the domain; raises XsError. It is called with
the store locked, so it must not call the service."""


class XenstoreService(HostStore):
    """dom0's xenstore: :class:`HostStore`'s requests and watches for our own code, and rings and a socket for others.

    :meth:`start` it once; any thread may call any method.
    """

    def __init__(self, quota: Quota | None = None, map_domain: MapDomain | None = None) -> None:
        """``map_domain`` serves INTRODUCE requests of tools; without it they get ENOENT."""
        daemon = Xenstored(quota)
        super().__init__(threading.Lock(), daemon, HostCaller(daemon), 0)
        self._ready: Final[deque[Connection]] = deque()
        self._queued: Final[set[Connection]] = set()
        self._later: Final[list[tuple[float, int, Connection]]] = []  # a heap: when (monotonic, s), a number, who
        self._alarms: Final = itertools.count()
        self._selector: Final = selectors.DefaultSelector()
        self._bell: Final = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._selector.register(self._bell, selectors.EVENT_READ)
        self._listener: ListeningSocket | None = None
        self._stopping = False
        self._serving_thread = 0
        self._threads: list[threading.Thread] = []
        self._daemon.release_request = self._release
        self._map_domain: Final = map_domain
        if map_domain is not None:
            self._daemon.introduce_request = self._introduce_for_tool

    # --- life

    def start(self) -> None:
        """Begin to serve."""
        if self._threads:
            raise RuntimeError("the xenstore service runs already; make a new one")
        self._threads = [
            threading.Thread(target=self._serve, name="xenstored", daemon=True),
            threading.Thread(target=self._host.run_callbacks, name="xenstore-watches", daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Hang up on everybody and end the threads."""
        self._stopping = True
        os.eventfd_write(self._bell, 1)
        self._host.stop()
        for thread in self._threads:
            thread.join()
        with self._lock:
            for connection in self._daemon.domains.values():
                if isinstance(connection, RingConnection):
                    connection.detach()
        for key in list(self._selector.get_map().values()):
            if isinstance(key.data, SocketConnection):
                key.data.stream.close()
        self._selector.close()
        os.close(self._bell)
        if self._listener is not None:
            self._listener.close()

    def listen(self, path: Path) -> None:
        """Serve tools on a UNIX socket at ``path`` (mode 0600; only our own user and root are let in).

        A socket that nobody serves any more is replaced; FileExistsError if somebody does, or if it is another file.
        """
        if self._listener is not None:
            raise RuntimeError(f"xenstore already listens on {self._listener.path}")
        listener = ListeningSocket(path, backlog=64, serving="xenstore")
        listener.socket.setblocking(False)
        with self._lock:
            self._listener = listener
            self._selector.register(listener.socket, selectors.EVENT_READ)

    # --- domains

    def introduce(
        self, domid: int, page: memoryview, notify: Callable[[], None], state: ConnectionState | None = None
    ) -> RingConnection:
        """Serve a domain through its interface ``page``; call ``on_event()`` of the result when its channel fires.

        With the ``state`` of a conversation that was begun elsewhere that goes on; XsError where there can be no such.
        """
        with self._lock:
            return self._introduce(domid, page, notify, state)

    def _introduce(
        self, domid: int, page: memoryview, notify: Callable[[], None], state: ConnectionState | None = None
    ) -> RingConnection:
        ring = RingConnection(self._daemon, domid, page, notify, self._wake, self._wake_at)
        if state is not None:
            try:
                ring.go_on(state)
            except XsError:
                ring.detach()
                self._daemon.reset(ring)
                raise
        former = self._daemon.domains.get(domid)
        if isinstance(former, RingConnection):
            former.detach()
        self._daemon.introduce(ring)
        self._wake(ring)  # it may have written requests before it was introduced
        return ring

    def _introduce_for_tool(self, domid: int, mfn: int, port: int) -> None:
        assert self._map_domain is not None
        page, notify = self._map_domain(domid, mfn, port)
        self._introduce(domid, page, notify)

    def hold(self, domid: int) -> ConnectionState:
        """Leave the page of a domain that stands still as it is, until `go_on`; where the conversation stands."""
        with self._lock:
            ring = self._ring(domid)
            ring.held = True
            return ring.state()

    def go_on(self, domid: int) -> None:
        """Serve a domain again that was held."""
        with self._lock:
            ring = self._ring(domid)
            ring.held = False
            self._wake(ring)

    def _ring(self, domid: int) -> RingConnection:
        ring = self._daemon.domains.get(domid)
        if not isinstance(ring, RingConnection):
            raise XsError("ENOENT", f"domain {domid} is not introduced")
        return ring

    def release(self, domid: int) -> None:
        """Forget a domain. When this returns its page is not touched any more."""
        with self._lock:
            if domid not in self._daemon.domains:
                raise XsError("ENOENT", f"domain {domid} is not introduced")
            self._release(domid)

    def _release(self, domid: int) -> None:
        ring = self._daemon.domains[domid]
        assert isinstance(ring, RingConnection)
        ring.detach()
        self._daemon.release(domid)

    def domain_event(self, event: str) -> None:
        """Fire ``@releaseDomain`` for a domain that has shut down but still exists (Xen does, on VIRQ_DOM_EXC)."""
        with self._lock:
            self._daemon.fire_domain_event(event.encode())

    # --- figures

    def statistics(self) -> dict[str, int]:
        """How much is in use: nodes, watches, transactions, domains, clients of the socket."""
        with self._lock:
            sockets = [key.data for key in self._selector.get_map().values() if isinstance(key.data, SocketConnection)]
            callers: list[Caller] = [self._host, *self._daemon.domains.values(), *sockets]
            return {
                "nodes": self._daemon.store.size(),
                "watches": len(self._daemon.watches),
                "transactions": sum(len(caller.transactions) for caller in callers),
                "domains": len(self._daemon.domains),
                "sockets": len(sockets),
            }

    # --- the serving thread

    def _wake(self, connection: Connection) -> None:
        """Give the connection a turn soon. Any thread, with or without the lock; never blocks."""
        if connection not in self._queued and not self._stopping:
            self._queued.add(connection)
            self._ready.append(connection)
            if threading.get_ident() != self._serving_thread:
                os.eventfd_write(self._bell, 1)

    def _wake_at(self, connection: Connection, moment: float) -> None:
        """Give the connection a turn at that moment (monotonic, s). The serving thread only."""
        heapq.heappush(self._later, (moment, next(self._alarms), connection))

    def _until_due(self) -> float | None:
        """How long nobody is to have a turn, in s; None: until something happens."""
        while self._later and self._later[0][0] <= time.monotonic():
            self._wake(heapq.heappop(self._later)[2])
        if self._ready:
            return 0
        return max(0.0, self._later[0][0] - time.monotonic()) if self._later else None

    def _serve(self) -> None:
        self._serving_thread = threading.get_ident()
        while not self._stopping:
            for key, mask in self._selector.select(self._until_due()):
                if key.fileobj == self._bell:
                    with contextlib.suppress(BlockingIOError):
                        os.eventfd_read(self._bell)
                elif self._listener is not None and key.fileobj is self._listener.socket:
                    self._accept(self._listener.socket)
                else:
                    self._socket_ready(key.data, mask)
            for _ in range(len(self._ready)):
                connection = self._ready.popleft()
                self._queued.discard(connection)
                self._turn(connection)

    def _turn(self, connection: Connection) -> None:
        """One client's turn. Nothing it can send raises; should something of ours, only this client is lost."""
        try:
            with self._lock:
                if isinstance(connection, RingConnection):
                    notify = connection.serve(TURN)
                    again = connection.wants_turn
                else:
                    assert isinstance(connection, SocketConnection)
                    notify = False
                    connection.serve(TURN)
                    again = connection.wants_turn
                    self._follow(connection)
            if notify and isinstance(connection, RingConnection):
                connection.notify()
            if again:
                self._wake(connection)
        except Exception:
            _log.exception("xenstore: giving up the connection of domain %d", connection.domid)
            with self._lock:
                self._give_up(connection)

    def _give_up(self, connection: Connection) -> None:
        self._daemon.reset(connection)
        if isinstance(connection, RingConnection):
            connection.detach()
        elif isinstance(connection, SocketConnection):
            connection.close()
            self._follow(connection)

    def _accept(self, listener: socket.socket) -> None:
        try:
            stream, _ = listener.accept()
        except OSError as error:
            _log.warning("xenstore: a tool could not connect: %s", error)
            return
        credentials = stream.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER_CREDENTIALS.size)
        pid, uid, _ = _PEER_CREDENTIALS.unpack(credentials)
        if uid not in (0, os.geteuid()):
            _log.warning("xenstore: process %d of user %d may not use this socket", pid, uid)
            stream.close()
            return
        connection = SocketConnection(self._daemon, stream, self._wake)
        with self._lock:
            self._selector.register(stream, selectors.EVENT_READ, connection)

    def _socket_ready(self, connection: SocketConnection, mask: int) -> None:
        if mask & selectors.EVENT_READ:
            with self._lock:
                connection.receive()
        if connection not in self._queued:
            self._turn(connection)

    def _follow(self, connection: SocketConnection) -> None:
        """Ask the selector for just what this client's next turn waits for."""
        if connection.closed:
            if connection.interest:
                connection.interest = 0
                self._selector.unregister(connection.stream)
                connection.stream.close()
            return
        wanted = selectors.EVENT_WRITE if connection.output_waiting else 0
        if connection.wants_input or not wanted:
            wanted |= selectors.EVENT_READ
        if connection.interest != wanted:
            connection.interest = wanted
            self._selector.modify(connection.stream, wanted, connection)
