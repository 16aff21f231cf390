"""What one unprivileged domain may take of the store, with Xen 4.17's default limits (``xenstored --help``)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Quota:
    """Limits for each guest; dom0 and its tools have none but the protocol's own."""

    nodes: int = 1000
    watches: int = 128
    transactions: int = 10
    node_size: int = 2048
    """Bytes of one node's record: 24, 8 a permission entry, the value, and each child's name with its NUL."""
    permissions: int = 5
    """Entries in one node's permission list."""
    path_length: int = 2048
    transaction_nodes: int = 1024
    """Nodes looked at in one transaction."""
    transaction_requests: int = 1024
    """Requests in one transaction that are kept, to be asked again if others change the store (oxenstored's limit)."""
    outstanding: int = 20
    """Answers the guest has not fetched; with more it is not listened to until it fetches some."""
    unread_bytes: int = 2_621_440
    """Bytes of answers and events the guest has not fetched; with more its connection is closed."""


def record_size(permissions: int, data: int, names: int) -> int:
    """Bytes a node counts for: how many permission entries, value bytes, and child-name bytes (NULs included)."""
    return 24 + 8 * permissions + data + names
