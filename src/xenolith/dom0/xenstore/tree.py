"""The store's nodes as a persistent tree: changing one makes a new root and shares everything untouched.

A :class:`Node` never changes after it was made, so a root pointer is a snapshot of the whole store and costs nothing to
keep; that is what a transaction starts from (the idea of oxenstored). ``generation`` changes whenever the node's own
record does, i.e. its value, its permissions or the *names* of its children, and is unique in the store's life; with it
DIRECTORY_PART tells that a list has changed. All walks are loops: a guest may nest a thousand deep.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from xenolith.dom0.xenstore.paths import components, join
from xenolith.dom0.xenstore.permissions import DOM0_ONLY, Permissions


class Node:
    """One node; immutable by convention. ``children`` is in creation order."""

    __slots__ = ("children", "data", "generation", "permissions")

    def __init__(self, data: bytes, permissions: Permissions, children: dict[bytes, Node], generation: int) -> None:
        self.data: Final = data
        self.permissions: Final = permissions
        self.children: Final = children
        self.generation: Final = generation


def empty_root() -> Node:
    """The root of a fresh store."""
    return Node(b"", DOM0_ONLY, {}, 0)


def find(root: Node, path: bytes) -> Node | None:
    """The node at the absolute ``path``."""
    node: Node | None = root
    if path == b"/":
        return root
    for name in path[1:].split(b"/"):
        assert node is not None
        node = node.children.get(name)
        if node is None:
            return None
    return node


def with_node(root: Node, path: bytes, node: Node) -> Node:
    """The tree with ``node`` at ``path``; the directory above must exist. Generations above are left alone."""
    names = components(path)
    above = [root]
    for name in names[:-1]:
        above.append(above[-1].children[name])
    for directory, name in zip(reversed(above), reversed(names), strict=bool(names)):
        children = directory.children.copy()
        children[name] = node
        node = Node(directory.data, directory.permissions, children, directory.generation)
    return node


def subtree(path: bytes, top: Node) -> Iterator[tuple[bytes, Node]]:
    """Every (path, node) below and including ``top``, children before their parent, siblings in creation order."""
    pending: list[tuple[bytes, Node, bool]] = [(path, top, False)]
    while pending:
        here, node, children_done = pending.pop()
        if children_done or not node.children:
            yield here, node
            continue
        pending.append((here, node, True))
        for name, child in reversed(node.children.items()):
            pending.append((join(here, name), child, False))
