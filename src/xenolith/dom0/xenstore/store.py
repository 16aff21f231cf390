"""The store and its transactions.

:class:`Store` holds the current root. A :class:`Transaction` is another root that started as a copy of the store's
pointer, plus the generation of every node it looked at. Both are a :class:`View`, on which requests work alike.

Committing when the store has not moved is one assignment. Otherwise every node the transaction looked at must still
have the generation it had (else the commit fails with EAGAIN and the client tries again), and then the records which
the transaction changed are laid over the current root. Since creating a child changes its directory's record, two
transactions that create children in one directory conflict, as in Xen's C xenstored.
"""

from __future__ import annotations

from collections import Counter
from typing import Final

from xenolith.dom0.xenstore import paths
from xenolith.dom0.xenstore.errors import XsError
from xenolith.dom0.xenstore.permissions import DOM0_ONLY, Permission, Permissions
from xenolith.dom0.xenstore.tree import Node, empty_root, find, subtree, with_node


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

    def touched(self, path: bytes) -> None:
        """The record at ``path`` was changed, made or removed."""

    def replace(self, path: bytes, node: Node, data: bytes, permissions: Permissions) -> Node:
        """Give the existing ``node`` at ``path`` a new value and permissions."""
        if permissions is not node.permissions:
            self.account(node.permissions, -1)
            self.account(permissions, +1)
        changed = Node(data, permissions, node.children, self.next_generation())
        self.root = with_node(self.root, path, changed)
        self.touched(path)
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
        self.touched(place)
        for new in reversed(missing):
            self.touched(new)
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
        self.touched(place)
        for removed, _ in gone:
            self.touched(removed)
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
        """Make the transaction's changes real at once, or raise EAGAIN and change nothing."""
        if self.root is transaction.base:
            self.root = transaction.root
        else:
            self._check_unchanged(transaction)
            self._overlay(transaction)
        for domid, change in transaction.owned.items():
            _add(self._owned, domid, change)
        for domid, change in transaction.named.items():
            _add(self._named, domid, change)

    def _check_unchanged(self, transaction: Transaction) -> None:
        for path, generation in transaction.read.items():
            node = find(self.root, path)
            if (None if node is None else node.generation) != generation:
                raise XsError("EAGAIN", f"{path!r} changed since the transaction read it")

    def _overlay(self, transaction: Transaction) -> None:
        """Lay the changed records over the current tree.

        A changed record's value, permissions and child names come from the transaction, all else from the current tree:
        only records that were looked at may overwrite others' work. Each node above a change is rebuilt once, however
        many changes are below it.
        """
        changed_below: dict[bytes, set[bytes]] = {}
        for path in transaction.changed:
            while path != b"/":
                above, name = paths.split(path)
                known = above in changed_below
                changed_below.setdefault(above, set()).add(name)
                if known:
                    break
                path = above
        visits = [(b"/", self.root, transaction.root)]
        for path, current, new in visits:  # grows while it is walked: directories come before what they hold
            for name in changed_below.get(path, ()):
                if name in current.children and name in new.children:
                    visits.append((paths.join(path, name), current.children[name], new.children[name]))
        merged: dict[bytes, Node] = {}
        for path, current, new in reversed(visits):
            record = new if path in transaction.changed else current
            children = {}
            for name in record.children:
                both = merged.get(paths.join(path, name)) if path in changed_below else None
                children[name] = both or current.children.get(name) or new.children[name]
            merged[path] = Node(record.data, record.permissions, children, record.generation)
        self.root = merged[b"/"]


class Transaction(View):
    """A private view that started as the store was, and what must still hold for it to be committed."""

    def __init__(self, store: Store, node_limit: int | None) -> None:
        """``node_limit``: how many nodes an unprivileged client may look at in one transaction."""
        super().__init__(store.root)
        self._store: Final = store
        self._node_limit: Final = node_limit
        self.base: Final = store.root
        self.read: Final[dict[bytes, int | None]] = {}
        self.changed: Final[dict[bytes, None]] = {}
        self.owned: Final[Counter[int]] = Counter()
        """How many nodes more each domain owns here than in the store, and how many more permission entries it has."""
        self.named: Final[Counter[int]] = Counter()
        self.events: Final[dict[bytes, tuple[bool, Permissions]]] = {}
        """Watch events to send at commit: path -> (only for that very path, permissions the node had before)."""

    def lookup(self, path: bytes) -> Node | None:
        node = find(self.root, path)
        if path not in self.read:
            if self._node_limit is not None and len(self.read) >= self._node_limit:
                raise XsError("ENOSPC", f"the transaction looks at more than {self._node_limit} nodes")
            before = find(self.base, path)
            self.read[path] = None if before is None else before.generation
        return node

    def next_generation(self) -> int:
        return self._store.next_generation()

    def owned_by(self, domid: int) -> int:
        return self._store.owned_by(domid) + self.owned[domid]

    def account(self, permissions: Permissions, change: int) -> None:
        self.owned[permissions[0].domid] += change
        for entry in permissions:
            self.named[entry.domid] += change

    def touched(self, path: bytes) -> None:
        self.changed[path] = None

    def permissions_before(self, path: bytes) -> Permissions:
        """Whose eyes the node at ``path`` was for when the transaction began."""
        node = find(self.base, path)
        return DOM0_ONLY if node is None else node.permissions


def _add(counter: Counter[int], domid: int, change: int) -> None:
    counter[domid] += change
    if not counter[domid]:
        del counter[domid]
