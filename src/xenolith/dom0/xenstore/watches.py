"""Watches: who wants to hear of changes below which node.

An event at ``path`` goes to the watches on ``path`` and on every directory above it, in the order in which their
owners connected and then registered. Watches are indexed by the node they are on, so an event costs as many
dictionary look-ups as its path has components, however many domains watch elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from xenolith.dom0.xenstore.paths import upwards

if TYPE_CHECKING:
    from xenolith.dom0.xenstore.caller import Caller


@dataclass(frozen=True, slots=True, eq=False)
class Watch:
    """``name``: how its owner calls ``path``: relatively, or by the number that its domain had elsewhere."""

    caller: Caller
    path: bytes
    token: bytes
    name: bytes
    order: tuple[int, int]

    def said(self, path: bytes) -> bytes:
        """A path on or below the watched one, as its owner is told of it."""
        return self.name + path[len(self.path) :]


class WatchIndex:
    """All watches of all callers."""

    def __init__(self) -> None:
        self._by_path: Final[dict[bytes, dict[Watch, None]]] = {}
        self._registered = 0

    def add(self, caller: Caller, path: bytes, token: bytes, name: bytes) -> Watch:
        """Register a watch, after all the caller's earlier ones."""
        self._registered += 1
        watch = Watch(caller, path, token, name, (caller.number, self._registered))
        self._by_path.setdefault(path, {})[watch] = None
        return watch

    def discard(self, watch: Watch) -> None:
        """Forget a registered watch."""
        there = self._by_path[watch.path]
        del there[watch]
        if not there:
            del self._by_path[watch.path]

    def on(self, path: bytes) -> list[Watch]:
        """Watches on exactly this path."""
        return sorted(self._by_path.get(path, ()), key=_order)

    def over(self, path: bytes) -> list[Watch]:
        """Watches on this path or a directory above it."""
        by_path = self._by_path
        if not by_path:
            return []
        found = [watch for place in upwards(path) if place in by_path for watch in by_path[place]]
        found.sort(key=_order)
        return found

    def __len__(self) -> int:
        return sum(map(len, self._by_path.values()))


def _order(watch: Watch) -> tuple[int, int]:
    return watch.order
