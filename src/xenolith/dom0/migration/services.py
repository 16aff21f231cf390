"""What dom0's services know of a domain, and what it could miss if they forgot it: console, xenstore.

A domain's nodes go along with it, under names that say whose they are and not by which number; numbers of other
domains in permissions go nowhere.  Where they arrive, nodes that belong to dom0 belong to dom0 again, whatever
the record says: only what the guest owns has the permissions that it gave.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final
from uuid import UUID

from xenolith.dom0.domain_tree import home
from xenolith.dom0.xenstore import HostRequests
from xenolith.dom0.xenstore.connection import ConnectionState
from xenolith.dom0.xenstore.errors import XsError
from xenolith.hypervisor.domain_record.kinds import (
    U32,
    U64,
    Array,
    Listing,
    Number,
    Octets,
    Plain,
    Record,
    RecordError,
    Text,
)

MOST_NODES: Final = 4096
MOST_VALUE: Final = 4096
MOST_SCROLLBACK: Final = 1 << 20
MOST_STREAM: Final = 4 << 20
_BACKENDS: Final = "/local/domain/0/backend"
_PLACE: Final = re.compile(r"(home|vm|backend/(?:console|vbd|vif|9pfs|vkbd|vfb))((?:/[A-Za-z0-9_@-]+)*)", re.ASCII)
_PERMISSION: Final = re.compile(r"([nrwb])(0|self)", re.ASCII)
_OWN: Final = "self"


@dataclass(frozen=True)
class Node:
    """A node of a domain's: `place` is `home`, `vm` or `backend/KIND`, and a path below that."""

    place: str
    value: str
    permissions: tuple[str, ...]


@dataclass(frozen=True)
class ServicesRecord:
    """A domain as dom0's services know it."""

    console_mfn: int
    console_port: int
    scrollback: bytes
    store_mfn: int
    store_port: int
    connection: ConnectionState
    nodes: tuple[Node, ...]

    def plain(self) -> Plain:
        """As JSON can say it."""
        connection = self.connection
        return {
            "console": {"mfn": self.console_mfn, "port": self.console_port, "scrollback": self.scrollback.hex()},
            "store": {
                "mfn": self.store_mfn,
                "port": self.store_port,
                "failure": connection.failure,
                "input": connection.input.hex(),
                "output": [message.hex() for message in connection.output],
                "sent_of_first": connection.sent_of_first,
                "watches": [[name.hex(), token.hex()] for name, token in connection.watches],
                "transactions": list(connection.transactions),
                "next_transaction": connection.next_transaction,
                "former_domids": sorted(connection.former_domids),
            },
            "nodes": [[node.place, node.value, *node.permissions] for node in self.nodes],
        }

    @classmethod
    def of(cls, record: Record) -> ServicesRecord:
        """Read one back. Raises RecordError."""
        console, store = record.record("console"), record.record("store")
        token = Octets(0, MOST_VALUE)
        connection = ConnectionState(
            failure=store.get("failure", Number(4)),
            input=store.get("input", Octets(0, MOST_STREAM)),
            output=tuple(store.get("output", Listing(Octets(0, MOST_STREAM), MOST_STREAM))),
            sent_of_first=store.get("sent_of_first", U32),
            watches=tuple((name, kept) for name, kept in store.get("watches", Listing(Array(token, 2), MOST_NODES))),
            transactions=tuple(store.get("transactions", Listing(U32, MOST_NODES))),
            next_transaction=store.get("next_transaction", U32),
            former_domids=frozenset(store.get("former_domids", Listing(Number(1 << 15), 1 << 15))),
        )
        nodes = record.get("nodes", Listing(Listing(Text(MOST_VALUE), 16), MOST_NODES))
        return cls(
            console_mfn=console.get("mfn", U64),
            console_port=console.get("port", U32),
            scrollback=console.get("scrollback", Octets(0, MOST_SCROLLBACK)),
            store_mfn=store.get("mfn", U64),
            store_port=store.get("port", U32),
            connection=connection,
            nodes=tuple(map(_node, nodes)),
        )


def _node(plain: list[str]) -> Node:
    if len(plain) < 3 or not _PLACE.fullmatch(plain[0]) or not all(map(_PERMISSION.fullmatch, plain[2:])):
        raise RecordError(f"a node of its xenstore is none: {plain[:1]}")
    return Node(plain[0], plain[1], tuple(plain[2:]))


def _roots(domid: int, uuid: UUID) -> dict[str, str]:
    return {"home": home(domid), "vm": f"/vm/{uuid}"}


def gather(store: HostRequests, domid: int, uuid: UUID) -> tuple[Node, ...]:
    """All nodes that are a domain's, directories before what is in them."""
    roots = _roots(domid, uuid)
    for kind in store.directory(_BACKENDS) if store.exists(_BACKENDS) else []:
        roots[f"backend/{kind}"] = f"{_BACKENDS}/{kind}/{domid}"
    return tuple(node for name, path in roots.items() for node in _below(store, name, path, domid))


def _below(store: HostRequests, place: str, path: str, domid: int) -> Iterator[Node]:
    pending = [(place, path)]
    while pending:
        here, there = pending.pop()
        value = store.get(there)
        if value is None:
            continue
        permissions = [text[0] + (_OWN if text[1:] == str(domid) else text[1:]) for text in store.get_perms(there)]
        known = tuple(text for text in permissions if _PERMISSION.fullmatch(text)) or ("n0",)
        yield Node(here, value, known)
        pending += [(f"{here}/{name}", f"{there}/{name}") for name in reversed(store.directory(there))]


def put(store: HostRequests, nodes: tuple[Node, ...], domid: int, uuid: UUID) -> None:
    """Write a domain's nodes where it has arrived. Raises RecordError."""
    roots = _roots(domid, uuid)
    for node in nodes:
        match = _PLACE.fullmatch(node.place)
        assert match is not None
        root = roots.get(match[1]) or f"{_BACKENDS}/{match[1].removeprefix('backend/')}/{domid}"
        owned = match[1] == "home" and node.permissions[0][1:] == _OWN
        permissions = node.permissions if owned else ("n0", f"r{_OWN}")
        try:
            store.write(root + match[2], node.value, [text.replace(_OWN, str(domid)) for text in permissions])
        except XsError as error:
            raise RecordError(f"a node of its xenstore cannot be written: {error}") from error
