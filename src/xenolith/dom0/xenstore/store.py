"""The store and its transactions.

:class:`Store` holds the current root. A :class:`Transaction` is another root that started as a copy of the store's
pointer, plus what was asked of it. Both are a :class:`View`, on which requests work alike.

Committing when the store has not moved is one assignment. Otherwise the requests of the transaction are asked again, of
the store as it is now: if all answers are the same, what that made is the commit, else it fails with EAGAIN and the
client tries again. So a transaction conflicts with what it has seen of others' work and with nothing else; that a
sibling of a node it makes came or went does not matter, as in oxenstored, the daemon that Debian starts (C xenstored
compares whole records, the directory's too). One that changed nothing happened when it began.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any, Final, TypeAlias

from xenolith.dom0.xenstore import paths
from xenolith.dom0.xenstore.errors import XsError
from xenolith.dom0.xenstore.permissions import DOM0_ONLY, Permission, Permissions
from xenolith.dom0.xenstore.tree import Node, empty_root, find, subtree, with_node

Operation: TypeAlias = Callable[..., Any]
"""What is asked of a transaction: a function of the view and of hashable arguments, whose answers can be compared."""


class View:
    """A tree that requests read and change: the store itself or a transaction's copy of it."""

    def __init__(self, root: Node) -> None:
        self.root = root

    def lookup(self, path: bytes) -> Node | None:
        """The node at ``path``."""
        return find(self.root, path)

    def next_generation(self) -> int:
        """A generation that no node has had."""
        raise NotImplementedError

    def owned_by(self, domid: int) -> int:
        """How many nodes ``domid`` owns here."""
        raise NotImplementedError

    def account(self, permissions: Permissions, change: int) -> None:
        """Note that there are ``change`` more nodes with these permissions."""
        raise NotImplementedError

    def replace(self, path: bytes, node: Node, data: bytes, permissions: Permissions) -> Node:
        """Give the existing ``node`` at ``path`` a new value and permissions."""
        if permissions is not node.permissions:
            self.account(node.permissions, -1)
            self.account(permissions, +1)
        changed = Node(data, permissions, node.children, self.next_generation())
        self.root = with_node(self.root, path, changed)
        return changed

    def missing(self, path: bytes) -> tuple[list[bytes], bytes, Node]:
        """What ``path``, which does not exist, lacks: the nodes to make (deepest first), the directory they go into."""
        lacking = [path]
        place = paths.parent(path)
        while (directory := self.lookup(place)) is None:
            lacking.append(place)
            place = paths.parent(place)
        return lacking, place, directory

    def create(self, path: bytes, data: bytes, owner: int | None) -> Node:
        """Make ``path``, which must not exist, and the directories it lacks.

        New nodes inherit the permissions of the directory they are made in; ``owner`` (an unprivileged creator's
        domid) replaces the owner in them.
        """
        missing, place, directory = self.missing(path)
        permissions = directory.permissions
        if owner is not None and permissions[0].domid != owner:
            permissions = (Permission(owner, permissions[0].access), *permissions[1:])
        self.account(permissions, len(missing))
        made = node = Node(data, permissions, {}, self.next_generation())
        for inner in missing[:-1]:
            node = Node(b"", permissions, {paths.split(inner)[1]: node}, self.next_generation())
        top = missing[-1]
        children = directory.children.copy()
        children[paths.split(top)[1]] = node
        grown = Node(directory.data, directory.permissions, children, self.next_generation())
        self.root = with_node(self.root, place, grown)
        return made

    def remove(self, path: bytes) -> list[tuple[bytes, Node]]:
        """Take ``path`` (not the root) and all below it out; returns what went, children before parents."""
        top = find(self.root, path)
        place = paths.parent(path)
        directory = self.lookup(place)
        assert top is not None and directory is not None
        gone = list(subtree(path, top))
        for removed, _ in gone:
            self.lookup(removed)
        for _, node in gone:
            self.account(node.permissions, -1)
        children = directory.children.copy()
        del children[paths.split(path)[1]]
        shrunk = Node(directory.data, directory.permissions, children, self.next_generation())
        self.root = with_node(self.root, place, shrunk)
        return gone


class Store(View):
    """The live tree."""

    def __init__(self) -> None:
        super().__init__(empty_root())
        self._generation = 0
        self._owned: Final[Counter[int]] = Counter({0: 1})
        self._named: Final[Counter[int]] = Counter({0: 1})
        self.create(b"/tool/xenstored", b"", None)

    def next_generation(self) -> int:
        self._generation += 1
        return self._generation

    def owned_by(self, domid: int) -> int:
        return self._owned[domid]

    def account(self, permissions: Permissions, change: int) -> None:
        _add(self._owned, permissions[0].domid, change)
        for entry in permissions:
            _add(self._named, entry.domid, change)

    def names(self, domid: int) -> bool:
        """Whether any node's permissions mention ``domid``."""
        return domid in self._named

    def size(self) -> int:
        """How many nodes there are."""
        return sum(self._owned.values())

    def value_bytes(self) -> int:
        """The length of all nodes' values together."""
        return sum(len(node.data) for _, node in subtree(b"/", self.root))

    def commit(self, transaction: Transaction) -> None:
        """Make the changes of a transaction real that started from the store as it is now."""
        assert self.root is transaction.base
        self.root = transaction.root
        for domid, change in transaction.owned.items():
            _add(self._owned, domid, change)
        for domid, change in transaction.named.items():
            _add(self._named, domid, change)


class Transaction(View):
    """A private view that started as the store was, and the requests that were made of it."""

    def __init__(self, store: Store, node_limit: int | None, request_limit: int | None) -> None:
        """How many nodes an unprivileged client may look at in one transaction, and how many requests are kept."""
        super().__init__(store.root)
        self._store: Final = store
        self._node_limit: Final = node_limit
        self.base: Final = store.root
        self._request_limit: Final = request_limit
        self.seen: Final[dict[bytes, None]] = {}
        self.requests: Final[dict[tuple[Operation, tuple[Any, ...], int], Any]] = {}
        """What was asked, in order, with the answers; what is asked again before anything changed is kept once."""
        self.lost = False
        """It was begun on another machine, where what it saw and changed has stayed: it can only be tried again."""
        self._changes = 0
        self.owned: Final[Counter[int]] = Counter()
        """How many nodes more each domain owns here than in the store, and how many more permission entries it has."""
        self.named: Final[Counter[int]] = Counter()
        self.events: Final[dict[bytes, tuple[bool, Permissions]]] = {}
        """Watch events to send at commit: path -> (only for that very path, permissions the node had before)."""

    def lookup(self, path: bytes) -> Node | None:
        node = find(self.root, path)
        if path not in self.seen:
            if self._node_limit is not None and len(self.seen) >= self._node_limit:
                raise XsError("ENOSPC", f"the transaction looks at more than {self._node_limit} nodes")
            self.seen[path] = None
        return node

    @property
    def changed(self) -> bool:
        """Whether there is anything to commit."""
        return self.root is not self.base

    def run(self, operation: Operation, *arguments: Any) -> Any:
        """Ask this view and keep the answer, or the error, for a commit that has to ask again. Raises XsError."""
        before = self.root
        request = (operation, arguments, self._changes)
        limit = self._request_limit
        if limit is not None and len(self.requests) >= limit and request not in self.requests:
            raise XsError("ENOSPC", f"the transaction makes more than {limit} requests")
        try:
            answer = self.requests[request] = operation(self, *arguments)
        except XsError as error:
            self.requests[request] = error.name
            raise
        finally:
            self._changes += self.root is not before
        return answer

    def again(self) -> Transaction:
        """The same requests, of the store as it is now. Raises EAGAIN when an answer is another one."""
        fresh = Transaction(self._store, self._node_limit, self._request_limit)
        for (operation, arguments, _), answer in self.requests.items():
            try:
                now = fresh.run(operation, *arguments)
            except XsError as error:
                now = error.name
            if now != answer:
                raise XsError("EAGAIN", f"{operation.__name__} {arguments!r} has another answer now")
        return fresh

    def next_generation(self) -> int:
        return self._store.next_generation()

    def owned_by(self, domid: int) -> int:
        return self._store.owned_by(domid) + self.owned[domid]

    def account(self, permissions: Permissions, change: int) -> None:
        self.owned[permissions[0].domid] += change
        for entry in permissions:
            self.named[entry.domid] += change

    def permissions_before(self, path: bytes) -> Permissions:
        """Whose eyes the node at ``path`` was for when the transaction began."""
        node = find(self.base, path)
        return DOM0_ONLY if node is None else node.permissions


def _add(counter: Counter[int], domid: int, change: int) -> None:
    counter[domid] += change
    if not counter[domid]:
        del counter[domid]
