"""dom0's own way to the store: function calls, in text.

Node values may be any bytes; here they are ``str`` such that reading a value and writing it back never changes it
(UTF-8 with surrogate escapes). Permissions are lists such as ``["n0", "r5"]``. Failures are :class:`XsError`.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Final, TypeAlias

from xenolith.dom0.xenstore import paths, permissions
from xenolith.dom0.xenstore.caller import Caller
from xenolith.dom0.xenstore.errors import XsError
from xenolith.dom0.xenstore.permissions import Permissions
from xenolith.dom0.xenstore.store import View
from xenolith.dom0.xenstore.xenstored import Xenstored

_log: Final = logging.getLogger(__name__)

WatchCallback: TypeAlias = Callable[[str], None]
"""Called with the path that changed, relative if the watch was."""


class HostCaller(Caller):
    """dom0's own code as a caller. Watch events go to callbacks, which run one at a time on a thread of their own."""

    def __init__(self, daemon: Xenstored) -> None:
        super().__init__(0, daemon.caller_number())
        self._callbacks: Final[dict[bytes, WatchCallback]] = {}
        self._tokens = 0
        self._waiting: Final[set[tuple[bytes, bytes]]] = set()
        self._events: Final[queue.SimpleQueue[tuple[bytes, bytes] | None]] = queue.SimpleQueue()

    def add_callback(self, callback: WatchCallback) -> bytes:
        """A token whose events go to ``callback``."""
        self._tokens += 1
        token = b"%d" % self._tokens
        self._callbacks[token] = callback
        return token

    def remove_callback(self, token: bytes) -> None:
        """Events for this token, waiting ones too, go nowhere from now on."""
        self._callbacks.pop(token, None)

    def deliver_event(self, path: bytes, token: bytes) -> None:
        event = (path, token)
        if event not in self._waiting:
            self._waiting.add(event)
            self._events.put(event)

    def run_callbacks(self) -> None:
        """Call back for each event until :meth:`stop`."""
        while (event := self._events.get()) is not None:
            self._waiting.discard(event)
            path, token = event
            callback = self._callbacks.get(token)
            if callback is None:
                continue
            try:
                callback(_decode(path))
            except Exception:
                _log.exception("xenstore: a watch callback for %s failed", _decode(path))

    def stop(self) -> None:
        """End :meth:`run_callbacks` after the events that wait already."""
        self._events.put(None)


class HostRequests:
    """The requests, outside any transaction (``transaction`` 0) or within one. Any thread may call them."""

    def __init__(self, lock: threading.Lock, daemon: Xenstored, host: HostCaller, transaction: int) -> None:
        self._lock: Final = lock
        self._daemon: Final = daemon
        self._host: Final = host
        self._transaction: Final = transaction

    def read(self, path: str) -> str:
        """The value of a node; ENOENT if there is no such node."""
        with self._lock:
            return _decode(self._daemon.read(self._host, self._view(), self._at(path)))

    def get(self, path: str) -> str | None:
        """The value of a node, or None if there is no such node."""
        try:
            return self.read(path)
        except XsError as error:
            if error.name == "ENOENT":
                return None
            raise

    def exists(self, path: str) -> bool:
        """Whether there is such a node."""
        return self.get(path) is not None

    def write(self, path: str, value: str, perms: Sequence[str] = ()) -> None:
        """Set a node's value, making it if need be; with ``perms`` also its permissions, before anyone sees it."""
        wanted = _parse(perms)
        with self._lock:
            self._daemon.write(self._host, self._view(), self._at(path), _encode(value))
            self._permit(path, wanted)

    def mkdir(self, path: str, perms: Sequence[str] = ()) -> None:
        """Make sure that a node exists; with ``perms`` set its permissions too."""
        wanted = _parse(perms)
        with self._lock:
            self._daemon.mkdir(self._host, self._view(), self._at(path))
            self._permit(path, wanted)

    def _permit(self, path: str, wanted: Permissions) -> None:
        if wanted:
            self._daemon.set_permissions(self._host, self._view(), self._at(path), wanted)

    def rm(self, path: str) -> None:
        """Remove a node and all below it; it need not exist."""
        with self._lock:
            try:
                self._daemon.remove(self._host, self._view(), self._at(path))
            except XsError as error:
                if error.name != "ENOENT":
                    raise

    def directory(self, path: str) -> list[str]:
        """The names of a node's children, oldest first."""
        with self._lock:
            children = self._daemon.directory(self._host, self._view(), self._at(path))
        return [_decode(name) for name in children]

    def get_perms(self, path: str) -> list[str]:
        """A node's permissions: first its owner (and what everybody else may do), then single domains."""
        with self._lock:
            entries = self._daemon.get_permissions(self._host, self._view(), self._at(path))
        return [_decode(entry) for entry in permissions.format_list(entries).split(b"\0")[:-1]]

    def set_perms(self, path: str, perms: Sequence[str]) -> None:
        """Set a node's permissions, or who sees ``@introduceDomain`` or ``@releaseDomain``."""
        wanted = _parse(perms)
        with self._lock:
            self._daemon.set_permissions(self._host, self._view(), self._at(path), wanted)

    def _view(self) -> View:
        return self._daemon.view(self._host, self._transaction)

    def _at(self, path: str) -> bytes:
        return paths.absolute(_encode(path), self._host.home)


class HostStore(HostRequests):
    """Requests, transactions and watches for dom0's code."""

    @contextlib.contextmanager
    def transaction(self) -> Iterator[HostRequests]:
        """Requests that take effect together when the block ends.

        Raises EAGAIN instead if somebody changed what they looked at; :meth:`transact` would try again. An exception
        in the block abandons them.
        """
        with self._lock:
            number = self._daemon.start_transaction(self._host)
        commit = False
        try:
            yield HostRequests(self._lock, self._daemon, self._host, number)
            commit = True
        finally:
            with self._lock:
                self._daemon.end_transaction(self._host, number, commit=commit)

    def transact(self, body: Callable[[HostRequests], None]) -> None:
        """Run ``body`` in a transaction, again and again until nobody interferes."""
        while True:
            try:
                with self.transaction() as transaction:
                    body(transaction)
                return
            except XsError as error:
                if error.name != "EAGAIN":
                    raise

    def watch(self, path: str, callback: WatchCallback) -> HostWatch:
        """Call ``callback(changed path)`` once now and after every change at or below ``path``, until cancelled.

        Equal events that no callback has handled yet are one event.
        """
        name = _encode(path)
        absolute = self._at(path)
        with self._lock:
            token = self._host.add_callback(callback)
            try:
                self._daemon.watch(self._host, absolute, token, name)
            except XsError:
                self._host.remove_callback(token)
                raise
            self._host.deliver_event(name, token)
        return HostWatch(self._lock, self._daemon, self._host, absolute, token)


class HostWatch:
    """A registered watch."""

    def __init__(self, lock: threading.Lock, daemon: Xenstored, host: HostCaller, path: bytes, token: bytes) -> None:
        self._lock: Final = lock
        self._daemon: Final = daemon
        self._host: Final = host
        self._path: Final = path
        self._token: Final = token

    def cancel(self) -> None:
        """No callback begins after this (one that runs already may still be running). A second call does nothing."""
        with self._lock:
            self._host.remove_callback(self._token)
            if (self._path, self._token) in self._host.watches:
                self._daemon.unwatch(self._host, self._path, self._token)


def _parse(perms: Sequence[str]) -> Permissions:
    return tuple([permissions.parse(_encode(entry)) for entry in perms])


def _encode(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


def _decode(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")
