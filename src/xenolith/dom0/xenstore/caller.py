"""A caller of the store: a guest on its ring, a tool on the socket, or dom0's own code.

A caller is who permissions are checked for and who owns watches and transactions. How it is reached is its own affair:
a subclass sends messages (:mod:`connection`) or calls functions (:mod:`service`).
"""

from __future__ import annotations

from typing import Final

from xenolith.dom0.xenstore import paths
from xenolith.dom0.xenstore.permissions import EVERYTHING, Permissions, access_of
from xenolith.dom0.xenstore.store import Transaction
from xenolith.dom0.xenstore.watches import Watch


class Caller:
    """Identity, watches and transactions of one client."""

    def __init__(self, domid: int, number: int) -> None:
        """``number`` orders callers by age; domain 0 is privileged."""
        self.domid: Final = domid
        self.number: Final = number
        self.privileged: Final = domid == 0
        self.home: Final = paths.home(domid)
        self.target: int | None = None
        """The domain in whose name this one may act (SET_TARGET; a device model's guest)."""
        self.former_domids: frozenset[int] = frozenset()
        """The numbers that its domain had where it came from, by which it may still name its own directories."""
        self.watches: Final[dict[tuple[bytes, bytes], Watch]] = {}
        self.transactions: Final[dict[int, Transaction]] = {}
        self.next_transaction = 1

    @property
    def unfetched(self) -> tuple[int, int]:
        """How many answers, and how many bytes of answers and events, the client has not fetched."""
        return 0, 0

    def access(self, permissions: Permissions) -> int:
        """What this caller may do with a node that has these permissions."""
        return EVERYTHING if self.privileged else access_of(permissions, self.domid, self.target)

    def deliver_event(self, path: bytes, token: bytes) -> None:
        """Queue one watch event for the client."""
        raise NotImplementedError
