"""The store's operations: what each request does, for whom, and which watch events follow.

This is Xen's C xenstored 4.17 as a data structure: no threads, no input or output. A caller names nodes by absolute
path here (:mod:`connection` and :mod:`service` make relative names absolute). Every method either does the whole
operation or raises :class:`XsError` having changed nothing.

Permission rules, all observable by a guest:

* A node is judged by its own permissions alone; the directories above need not be readable.
* What is not there: ENOENT if the nearest existing directory grants the access asked for, else EACCES, so a guest
  learns nothing about a tree it may not see.
* Creating needs write access to the nearest existing directory; removing needs write access to the node itself.
* New nodes inherit their directory's permissions, but a guest owns what it makes. Only dom0 changes owners.
* A watch event is sent to those who may read the node, or its directory, or might before the change. Events about
  domains (``@...``) go to those whom the event's own permissions let read; dom0 alone until SET_PERMS.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, Final, TypeVar, cast

from xenolith.abi.xs_wire import REL_PATH_MAX
from xenolith.dom0.xenstore import paths
from xenolith.dom0.xenstore.caller import Caller
from xenolith.dom0.xenstore.control import run_control
from xenolith.dom0.xenstore.errors import XsError
from xenolith.dom0.xenstore.permissions import DOM0_ONLY, OWNER, READ, WRITE, Permissions
from xenolith.dom0.xenstore.quota import Quota, record_size
from xenolith.dom0.xenstore.store import Store, Transaction, View
from xenolith.dom0.xenstore.tree import Node, subtree
from xenolith.dom0.xenstore.watches import WatchIndex

INTRODUCE_DOMAIN: Final = b"@introduceDomain"
RELEASE_DOMAIN: Final = b"@releaseDomain"


Method = TypeVar("Method", bound=Callable[..., Any])


def _request(method: Method) -> Method:
    """A request with (caller, view, path, ...): within a transaction it is kept, to be asked again (see `store`)."""

    @wraps(method)
    def operation(view: View, daemon: Xenstored, caller: Caller, *arguments: Any) -> Any:
        return method(daemon, caller, view, *arguments)

    @wraps(method)
    def ask(daemon: Xenstored, caller: Caller, view: View, *arguments: Any) -> Any:
        if isinstance(view, Transaction):
            return view.run(operation, daemon, caller, *arguments)
        return method(daemon, caller, view, *arguments)

    return cast(Method, ask)


class Xenstored:
    """The store, its watches and the domains it knows."""

    def __init__(self, quota: Quota | None = None) -> None:
        self.quota = Quota() if quota is None else quota
        self.store: Final = Store()
        self.watches: Final = WatchIndex()
        self.domains: Final[dict[int, Caller]] = {}
        self._event_permissions: Final = {INTRODUCE_DOMAIN: DOM0_ONLY, RELEASE_DOMAIN: DOM0_ONLY}
        self._callers = 0
        self.introduce_request: Callable[[int, int, int], None] = _no_introductions
        """Serves INTRODUCE(domid, mfn, port); set by whoever can map a domain's page. Raises XsError."""
        self.release_request: Callable[[int], None] = self.release
        """Serves RELEASE(domid) of a known domain."""

    def caller_number(self) -> int:
        """The age of a new caller."""
        self._callers += 1
        return self._callers

    def view(self, caller: Caller, transaction: int) -> View:
        """The tree that a request in ``transaction`` (0: none) works on."""
        if not transaction:
            return self.store
        view = caller.transactions.get(transaction)
        if view is None:
            raise XsError("ENOENT", f"no transaction {transaction} is open")
        return view

    # --- reading

    @_request
    def read(self, caller: Caller, view: View, path: bytes) -> bytes:
        """The node's value."""
        return self._node(caller, view, path, READ).data

    @_request
    def directory(self, caller: Caller, view: View, path: bytes) -> tuple[bytes, ...]:
        """The names of the node's children, oldest first."""
        return tuple(self._node(caller, view, path, READ).children)

    def generation(self, caller: Caller, view: View, path: bytes) -> int:
        """What changes whenever the node or the list of its children does."""
        return self._node(caller, view, path, READ).generation

    @_request
    def get_permissions(self, caller: Caller, view: View, path: bytes) -> Permissions:
        """The node's permission list."""
        return self._node(caller, view, path, READ).permissions

    def _node(self, caller: Caller, view: View, path: bytes, access: int) -> Node:
        node = self._find(caller, view, path, access)
        if node is None:
            raise XsError("ENOENT", f"{path!r} does not exist")
        return node

    def _find(self, caller: Caller, view: View, path: bytes, access: int) -> Node | None:
        """The node, if the caller has this access to it; None if it is missing and the caller may know that."""
        if not paths.is_valid(path, self.quota.path_length):
            raise XsError("EINVAL", f"{path[:80]!r} is no node name")
        node = view.lookup(path)
        allowed = node
        if allowed is None:
            allowed = view.missing(path)[2]
            if not caller.access(allowed.permissions) & access:
                raise XsError("EACCES", f"{path!r}")
        elif caller.access(allowed.permissions) & access != access:
            raise XsError("EACCES", f"{path!r}")
        return node

    # --- changing

    @_request
    def write(self, caller: Caller, view: View, path: bytes, data: bytes) -> None:
        """Set the node's value, making it and the directories above it if need be."""
        node = self._find(caller, view, path, WRITE)
        if node is None:
            self._create(caller, view, path, data)
            return
        self._check_size(caller, node, node.permissions, data)
        view.replace(path, node, data, node.permissions)
        self._changed(view, path, None)

    @_request
    def mkdir(self, caller: Caller, view: View, path: bytes) -> None:
        """Make sure the node exists."""
        if self._find(caller, view, path, WRITE) is None:
            self._create(caller, view, path, b"")

    def _create(self, caller: Caller, view: View, path: bytes, data: bytes) -> None:
        if not caller.privileged:
            self._check_room(caller, view, path, data)
        view.create(path, data, None if caller.privileged else caller.domid)
        self._changed(view, path, None)

    def _check_room(self, caller: Caller, view: View, path: bytes, data: bytes) -> None:
        lacking, _, place = view.missing(path)
        if view.owned_by(caller.domid) + len(lacking) > self.quota.nodes:
            raise XsError("ENOSPC", f"domain {caller.domid} owns {view.owned_by(caller.domid)} nodes")
        entries = len(place.permissions)
        first_name = len(paths.components(lacking[-1])[-1]) + 1
        sizes = [
            record_size(entries, len(data), 0),
            record_size(entries, len(place.data), _names_size(place) + first_name),
        ]
        if max(sizes) >= self.quota.node_size:
            raise XsError("ENOSPC", f"{path!r}: a node record of {max(sizes)} bytes")

    def _check_size(self, caller: Caller, node: Node, entries: Permissions, data: bytes) -> None:
        if caller.privileged:
            return
        size = record_size(len(entries), len(data), _names_size(node))
        if size >= self.quota.node_size:
            raise XsError("ENOSPC", f"a node record of {size} bytes")

    @_request
    def remove(self, caller: Caller, view: View, path: bytes) -> None:
        """Remove the node and all below it. Removing what is not there succeeds if its directory is."""
        node = self._find(caller, view, path, WRITE)
        if node is None:
            if view.lookup(paths.parent(path)) is None:
                raise XsError("ENOENT", f"{paths.parent(path)!r} does not exist")
            return
        if path == b"/":
            raise XsError("EINVAL", "the root cannot be removed")
        self._fire_removal(view, path, node)
        view.remove(path)

    def _fire_removal(self, view: View, path: bytes, top: Node) -> None:
        """While the nodes can be seen: events for watches on each node below, deepest first, then for ``path``."""
        if self.watches or view is not self.store:
            for below, node in subtree(path, top):
                if node is not top:
                    self._fire_or_queue(view, below, exact=node.permissions)
        self._changed(view, path, None)

    @_request
    def set_permissions(self, caller: Caller, view: View, path: bytes, wanted: Permissions) -> None:
        """Replace a node's (or an event's) permission list."""
        if not wanted:
            raise XsError("EINVAL", "a node needs an owner")
        if not caller.privileged and len(wanted) > self.quota.permissions:
            raise XsError("ENOSPC", f"{len(wanted)} permission entries")
        if path[:1] == b"@":
            self._set_event_permissions(caller, path, wanted)
            return
        node = self._node(caller, view, path, WRITE | OWNER)
        before = node.permissions
        if not caller.privileged and wanted[0].domid != before[0].domid:
            raise XsError("EPERM", "only dom0 changes a node's owner")
        self._check_size(caller, node, wanted, node.data)
        view.replace(path, node, node.data, wanted)
        self._changed(view, path, before)

    def _set_event_permissions(self, caller: Caller, event: bytes, wanted: Permissions) -> None:
        current = self._event_permissions.get(event)
        if current is None:
            raise XsError("EINVAL", f"{event!r} is no event")
        if not caller.privileged:
            raise XsError("EACCES", f"only dom0 decides who sees {event!r}")
        self._event_permissions[event] = wanted

    # --- watches

    def watch(self, caller: Caller, path: bytes, token: bytes, name: bytes) -> None:
        """Register a watch. The caller of this method sends the immediate first event once it has answered."""
        if path[:1] == b"@":
            valid = len(path) <= REL_PATH_MAX
        else:
            valid = paths.is_valid(path, self.quota.path_length)
        if not valid:
            raise XsError("EINVAL", f"{path[:80]!r} is no node name")
        if (path, token) in caller.watches:
            raise XsError("EEXIST", f"{path!r} is watched with this token")
        if not caller.privileged and len(caller.watches) >= self.quota.watches:
            raise XsError("E2BIG", f"domain {caller.domid} has {len(caller.watches)} watches")
        caller.watches[path, token] = self.watches.add(caller, path, token, name)

    def unwatch(self, caller: Caller, path: bytes, token: bytes) -> None:
        """Take a watch away."""
        watch = caller.watches.pop((path, token), None)
        if watch is None:
            raise XsError("ENOENT", f"{path!r} is not watched with this token")
        self.watches.discard(watch)

    def reset(self, caller: Caller) -> None:
        """Drop every watch and every open transaction of the caller."""
        for watch in caller.watches.values():
            self.watches.discard(watch)
        caller.watches.clear()
        caller.transactions.clear()

    def _changed(self, view: View, path: bytes, before: Permissions | None) -> None:
        """Something happened at ``path``; ``before``: the permissions it had, when they are what changed."""
        if isinstance(view, Transaction):
            view.events[path] = (False, before or view.permissions_before(path))
        elif self.watches:
            self._fire(view, path, before)

    def _fire_or_queue(self, view: View, path: bytes, *, exact: Permissions) -> None:
        if isinstance(view, Transaction):
            view.events[path] = (True, exact)
        else:
            self._fire_exactly(view, path, exact)

    def _fire(self, view: View, path: bytes, before: Permissions | None) -> None:
        for watch in self.watches.over(path):
            if self._may_see(watch.caller, view, path, before):
                watch.caller.deliver_event(watch.said(path), watch.token)

    def _fire_exactly(self, view: View, path: bytes, before: Permissions) -> None:
        for watch in self.watches.on(path):
            if self._may_see(watch.caller, view, path, before):
                watch.caller.deliver_event(watch.said(path), watch.token)

    def _may_see(self, caller: Caller, view: View, path: bytes, before: Permissions | None) -> bool:
        if caller.privileged:
            return True
        if before is not None and caller.access(before) & READ:
            return True
        node = view.lookup(path)
        if node is not None and caller.access(node.permissions) & READ:
            return True
        directory = view.lookup(paths.parent(path))
        return directory is not None and bool(caller.access(directory.permissions) & READ)

    def fire_domain_event(self, event: bytes) -> None:
        """``@introduceDomain`` or ``@releaseDomain``, to those who may see it."""
        for watch in self.watches.on(event):
            if watch.caller.access(self._event_permissions[event]) & READ:
                watch.caller.deliver_event(event, watch.token)

    # --- transactions

    def start_transaction(self, caller: Caller) -> int:
        """A new transaction's number."""
        if not caller.privileged and len(caller.transactions) >= self.quota.transactions:
            raise XsError("ENOSPC", f"domain {caller.domid} has {len(caller.transactions)} transactions open")
        number = caller.next_transaction
        while number in caller.transactions or not number:
            number = (number + 1) & 0xFFFFFFFF
        caller.next_transaction = (number + 1) & 0xFFFFFFFF
        caller.transactions[number] = self._transaction(caller)
        return number

    def resume_transaction(self, caller: Caller, number: int) -> None:
        """A transaction that the caller has open since before it came here. It will have to try it again."""
        transaction = caller.transactions[number] = self._transaction(caller)
        transaction.lost = True

    def _transaction(self, caller: Caller) -> Transaction:
        nodes, requests = self.quota.transaction_nodes, self.quota.transaction_requests
        limits = (None, None) if caller.privileged else (nodes, requests)
        return Transaction(self.store, *limits)

    def end_transaction(self, caller: Caller, number: int, *, commit: bool) -> None:
        """Close a transaction, either way; with ``commit`` its changes become real or EAGAIN is raised."""
        transaction = caller.transactions.pop(number, None)
        if transaction is None:
            raise XsError("ENOENT", f"no transaction {number} is open")
        if commit and transaction.lost:
            raise XsError("EAGAIN", "the transaction was begun on another machine")
        if not commit or not transaction.changed:
            return
        if transaction.base is not self.store.root:
            transaction = transaction.again()
        self.store.commit(transaction)
        if self.watches and transaction.events:
            self._fire_committed(transaction)

    def _fire_committed(self, transaction: Transaction) -> None:
        """One event for each node changed, in the order in which the transaction first looked at them."""
        for path in transaction.seen:
            event = transaction.events.get(path)
            if event is None:
                continue
            exact, before = event
            if exact:
                self._fire_exactly(self.store, path, before)
            else:
                self._fire(self.store, path, before)

    # --- control

    def control(self, payload: bytes) -> bytes:
        """CONTROL: the daemon's own affairs; ``command|argument|...``."""
        return run_control(self, payload)

    # --- domains

    def introduce(self, caller: Caller) -> None:
        """A domain has its connection; introducing it again replaces the connection and is no news."""
        former = self.domains.get(caller.domid)
        self.domains[caller.domid] = caller
        if former is None:
            self.fire_domain_event(INTRODUCE_DOMAIN)
        else:
            self.reset(former)

    def release(self, domid: int) -> None:
        """The domain is gone: so are its connection, the nodes it owns, and its rights to those of others."""
        caller = self.domains.pop(domid)
        self.reset(caller)
        self._forget(domid)
        for other in self.domains.values():
            if other.target == domid:
                other.target = None
        self.fire_domain_event(RELEASE_DOMAIN)

    def _forget(self, domid: int) -> None:
        """Nothing in the store may name a dead domain, for its number will be given to another."""
        for event, entries in self._event_permissions.items():
            self._event_permissions[event] = _without(entries, domid)
        store = self.store
        if not store.names(domid):
            return
        for path in [path for path, _ in subtree(b"/", store.root)][::-1]:
            node = store.lookup(path)
            if node is None:
                continue  # gone with a directory above, which was visited first
            if path != b"/" and node.permissions[0].domid == domid:
                self._fire_removal(store, path, node)
                store.remove(path)
            elif any(entry.domid == domid for entry in node.permissions):
                store.replace(path, node, node.data, _without(node.permissions, domid))


def _no_introductions(domid: int, mfn: int, port: int) -> None:
    raise XsError("ENOENT", f"nobody here can map frame {mfn:#x} of domain {domid}")


def _without(entries: Permissions, domid: int) -> Permissions:
    owner = entries[0] if entries[0].domid != domid else DOM0_ONLY[0]
    return (owner, *(entry for entry in entries[1:] if entry.domid != domid))


def _names_size(node: Node) -> int:
    return sum(map(len, node.children)) + len(node.children)
