"""Which transactions end with EAGAIN: answers of oxenstored 4.17, the daemon that Debian starts, to the same requests.

Each begins with /m/d/old and /m/d/old2 (value "o"); the requests of the transaction come first, then somebody else's.
"""

from __future__ import annotations

import pytest

from xenolith.abi.xs_wire import Op
from xenolith.dom0.xenstore.xenstored import Xenstored

from .wire import Client

Requests = list[tuple[Op, bytes]]

NEW, SIBLING, OLD = b"/m/d/new", b"/m/d/sibling", b"/m/d/old"


def write(path: bytes, value: bytes = b"1") -> tuple[Op, bytes]:
    return Op.WRITE, path + b"\0" + value


def ask(op: Op, path: bytes) -> tuple[Op, bytes]:
    return op, path + b"\0"


def permit(path: bytes) -> tuple[Op, bytes]:
    return Op.SET_PERMS, path + b"\0n3\0"


COMMITTED: dict[str, tuple[Requests, Requests, list[bytes]]] = {
    "a sibling was made": ([write(NEW)], [write(SIBLING)], [b"new", b"old", b"old2", b"sibling"]),
    "a sibling was made by mkdir": (
        [ask(Op.MKDIR, NEW)],
        [ask(Op.MKDIR, SIBLING)],
        [b"new", b"old", b"old2", b"sibling"],
    ),
    "a sibling went": ([write(NEW)], [ask(Op.RM, OLD)], [b"new", b"old2"]),
    "the directory was written": ([write(NEW)], [write(b"/m/d")], [b"new", b"old", b"old2"]),
    "the directory has other permissions": ([write(NEW)], [permit(b"/m/d")], [b"new", b"old", b"old2"]),
    "the directory went": ([write(NEW)], [ask(Op.RM, b"/m/d")], [b"new"]),
    "both made it": ([write(NEW, b"mine")], [write(NEW, b"theirs")], [b"new", b"old", b"old2"]),
    "a sibling of what was removed was made": ([ask(Op.RM, OLD)], [write(SIBLING)], [b"old2", b"sibling"]),
    "two siblings were removed": ([ask(Op.RM, OLD)], [ask(Op.RM, b"/m/d/old2")], []),
    "made and removed": ([write(NEW), ask(Op.RM, NEW)], [write(SIBLING)], [b"old", b"old2", b"sibling"]),
    "what it read was written anew with the same value": (
        [ask(Op.READ, OLD), write(NEW)],
        [write(OLD, b"o")],
        [b"new", b"old", b"old2"],
    ),
    "it changed nothing": ([ask(Op.DIRECTORY, b"/m/d")], [write(SIBLING)], [b"old", b"old2", b"sibling"]),
}

REFUSED: dict[str, tuple[Requests, Requests]] = {
    "what it read was written": ([ask(Op.READ, OLD), write(NEW)], [write(OLD, b"2")]),
    "what it read went": ([ask(Op.READ, OLD), write(NEW)], [ask(Op.RM, OLD)]),
    "what it looked for came": ([ask(Op.READ, SIBLING), write(NEW)], [write(SIBLING)]),
    "what it listed grew": ([ask(Op.DIRECTORY, b"/m/d"), write(NEW)], [write(SIBLING)]),
    "whose permissions it read have changed": ([ask(Op.GET_PERMS, OLD), write(NEW)], [permit(OLD)]),
}


def after(transaction: Requests, others: Requests) -> tuple[str, Client]:
    daemon = Xenstored()
    client, other = Client(daemon), Client(daemon)
    for path in (OLD, b"/m/d/old2"):
        other.ok(*write(path, b"o"))
    number = int(client.ok(Op.TRANSACTION_START, b"\0")[:-1])
    for request in transaction:
        client.ask(*request, number)
    for request in others:
        other.ok(*request)
    _, answer = client.ask(Op.TRANSACTION_END, b"T\0", number)
    return answer[:-1].decode(), other


@pytest.mark.parametrize("case", COMMITTED)
def test_a_transaction_is_committed_though(case: str) -> None:
    transaction, others, children = COMMITTED[case]
    answer, client = after(transaction, others)
    assert answer == "OK"
    assert sorted(client.ok(Op.DIRECTORY, b"/m/d\0").split(b"\0")[:-1]) == children


@pytest.mark.parametrize("case", REFUSED)
def test_a_transaction_is_refused_since(case: str) -> None:
    answer, client = after(*REFUSED[case])
    assert answer == "EAGAIN"
    assert client.error(Op.READ, NEW + b"\0") == "ENOENT"


def test_what_is_removed_goes_with_what_came_into_it_meanwhile() -> None:
    answer, client = after([ask(Op.RM, b"/m/d")], [write(SIBLING)])
    assert answer == "OK"
    assert client.error(Op.READ, SIBLING + b"\0") == "ENOENT"
    assert client.connection.daemon.store.owned_by(0) == 4
