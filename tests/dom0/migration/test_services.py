"""What dom0's services know of a domain goes along: console, xenstore connection, nodes, devices."""

from __future__ import annotations

import json
from uuid import uuid4

import pytest

from xenolith.abi.xs_wire import HEADER, Op
from xenolith.dom0.migration.services import Node, ServicesRecord, gather, put
from xenolith.dom0.xenstore import XenstoreService
from xenolith.dom0.xenstore.connection import ConnectionState
from xenolith.dom0.xenstore.errors import XsError
from xenolith.hypervisor.domain_record.kinds import Record, RecordError

PAGE = 4096


def message(kind: int, *parts: bytes, request: int = 7, transaction: int = 0) -> bytes:
    payload = b"".join(parts)
    return HEADER.pack(kind, request, transaction, len(payload)) + payload


@pytest.fixture
def stores() -> tuple[XenstoreService, XenstoreService]:
    return XenstoreService(), XenstoreService()


def connected(store: XenstoreService, domid: int, state: ConnectionState | None = None):  # type: ignore[no-untyped-def]
    store.mkdir(f"/local/domain/{domid}", [f"n{domid}"])
    return store.introduce(domid, memoryview(bytearray(PAGE)), lambda: None, state)


def said(ring, *requests: bytes) -> list[tuple[int, bytes]]:  # type: ignore[no-untyped-def]
    """What comes back for requests: kind and payload of each message."""
    for request in requests:
        ring.feed(request)
    ring.process(100)
    data = ring.output(1 << 20)
    ring.sent(len(data))
    found = []
    while data:
        kind, _, _, length = HEADER.unpack_from(data)
        found.append((kind, data[HEADER.size : HEADER.size + length]))
        data = data[HEADER.size + length :]
    return found


def test_watches_say_paths_as_the_guest_knows_them(stores: tuple[XenstoreService, XenstoreService]) -> None:
    here, there = stores
    ring = connected(here, 3)
    said(ring, message(Op.WATCH, b"device\0", b"rel\0"), message(Op.WATCH, b"/local/domain/0/backend/vbd/3/1\0abs\0"))
    state = here.hold(3)
    moved = connected(there, 8, state)
    there.write("/local/domain/8/device/vbd/1/state", "4", ["n8"])
    there.write("/local/domain/0/backend/vbd/8/1/state", "4", ["n0", "r8"])
    assert said(moved) == [
        (Op.WATCH_EVENT, b"device/vbd/1/state\0rel\0"),
        (Op.WATCH_EVENT, b"/local/domain/0/backend/vbd/3/1/state\0abs\0"),
    ]
    # By the number it had it still reaches its own nodes, and nobody else's.
    assert said(moved, message(Op.READ, b"/local/domain/0/backend/vbd/3/1/state\0")) == [(Op.READ, b"4")]
    assert said(moved, message(Op.READ, b"/local/domain/3/device/vbd/1/state\0")) == [(Op.READ, b"4")]
    assert said(moved, message(Op.READ, b"/local/domain/8/device/vbd/1/state\0")) == [(Op.READ, b"4")]
    assert said(moved, message(Op.UNWATCH, b"/local/domain/0/backend/vbd/3/1\0abs\0")) == [(Op.UNWATCH, b"OK\0")]


def test_half_a_request_and_half_an_answer_go_along(stores: tuple[XenstoreService, XenstoreService]) -> None:
    here, there = stores
    here.write("/local/domain/3/x", "1234567890", ["n3"])
    ring = connected(here, 3)
    request = message(Op.READ, b"x\0")
    ring.feed(request + request[:9])
    ring.process(5)
    first = ring.output(20)
    ring.sent(20)
    there.write("/local/domain/8/x", "other", ["n8"])
    moved = connected(there, 8, here.hold(3))
    moved.feed(request[9:])
    moved.process(5)
    second = moved.output(1000)
    moved.sent(len(second))
    assert first + second + moved.output(1000) == message(Op.READ, b"1234567890") + message(Op.READ, b"other")


def test_a_transaction_that_was_open_is_to_be_tried_again(stores: tuple[XenstoreService, XenstoreService]) -> None:
    here, there = stores
    ring = connected(here, 3)
    [(_, number)] = said(ring, message(Op.TRANSACTION_START, b"\0"))
    transaction = int(number[:-1])
    said(ring, message(Op.WRITE, b"y\0lost", transaction=transaction))
    moved = connected(there, 8, here.hold(3))
    assert said(moved, message(Op.WRITE, b"z\0v", transaction=transaction)) == [(Op.WRITE, b"OK\0")]
    assert said(moved, message(Op.TRANSACTION_END, b"T\0", transaction=transaction)) == [(Op.ERROR, b"EAGAIN\0")]
    assert not there.exists("/local/domain/8/y")
    [(_, number)] = said(moved, message(Op.TRANSACTION_START, b"\0"))
    assert int(number[:-1]) != transaction


def test_a_held_connection_leaves_the_page_alone(stores: tuple[XenstoreService, XenstoreService]) -> None:
    here, _ = stores
    page = bytearray(PAGE)
    here.mkdir("/local/domain/3", ["n3"])
    ring = here.introduce(3, memoryview(page), lambda: None)
    here.hold(3)
    before = bytes(page)
    ring.feed(message(Op.READ, b"x\0"))
    assert not ring.serve(5)
    assert bytes(page) == before
    here.go_on(3)
    assert ring.serve(5)


def test_nodes_are_dom0s_again_and_the_guests_own_stay_its_own(
    stores: tuple[XenstoreService, XenstoreService],
) -> None:
    here, there = stores
    uuid, other = uuid4(), uuid4()
    here.write("/local/domain/3", "", ["n0", "r3"])
    here.write("/local/domain/3/data/own", "v\udcff", ["n3", "r0", "b5"])
    here.write("/local/domain/0/backend/vbd/3/1/state", "4", ["n0", "r3"])
    here.write("/local/domain/0/backend/vbd/4/1/state", "4", ["n0", "r4"])
    here.write(f"/vm/{uuid}/name", "n", ["n0", "r3"])
    nodes = gather(here, 3, uuid)
    put(there, nodes, 8, other)
    assert there.read("/local/domain/8/data/own") == "v\udcff"
    assert there.get_perms("/local/domain/8/data/own") == ["n8", "r0"]
    assert there.read("/local/domain/0/backend/vbd/8/1/state") == "4"
    assert there.directory("/local/domain/0/backend/vbd") == ["8"]
    assert there.read(f"/vm/{other}/name") == "n"
    put(there, (Node("backend/vbd/2/online", "1", ("bself",)), Node("vm/x", "y", ("nself",))), 8, other)
    assert there.get_perms("/local/domain/0/backend/vbd/8/2/online") == ["n0", "r8"]
    assert there.get_perms(f"/vm/{other}/x") == ["n0", "r8"]


def record_of(state: ConnectionState) -> ServicesRecord:
    return ServicesRecord(5, 1, b"printed", 6, 2, state, (Node("home/data", "x", ("nself",)),))


EMPTY = ConnectionState(0, b"", (), 0, (), (), 1, frozenset({3}))


def test_the_record_says_the_same_when_it_is_read_back() -> None:
    state = ConnectionState(2, b"in", (message(1, b"x"),), 3, ((b"name", b"token"),), (4, 9), 10, frozenset({3, 7}))
    plain = json.loads(json.dumps(record_of(state).plain()))
    assert ServicesRecord.of(Record(plain, "services")) == record_of(state)


@pytest.mark.parametrize(
    "node",
    [
        ["home/../x", "", "n0"],
        ["home//x", "", "n0"],
        ["/local/domain/0/x", "", "n0"],
        ["backend/vbd/1", "", "n7"],
        ["backend", "", "n0"],
        ["backend/unheard/1", "", "n0"],
        ["home", "\ud800", "n0"],
        ["home", ""],
        ["vmx", "", "n0"],
    ],
)
def test_a_node_that_is_none_is_refused(node: list[str]) -> None:
    plain = record_of(EMPTY).plain() | {"nodes": [node]}
    with pytest.raises(RecordError):
        ServicesRecord.of(Record(plain, "services"))


@pytest.mark.parametrize(
    "state",
    [
        {"input": bytes(10_000)},
        {"output": (b"short",)},
        {"output": (message(1, b"x") + b"y",)},
        {"sent_of_first": 3},
        {"transactions": tuple(range(1, 100))},
        {"watches": ((b"a b", b"t"),)},
        {"watches": tuple((b"a", b"%d" % number) for number in range(1000))},
    ],
)
def test_a_conversation_that_cannot_have_been_is_refused(
    stores: tuple[XenstoreService, XenstoreService], state: dict[str, object]
) -> None:
    _, there = stores
    with pytest.raises(XsError):
        connected(there, 8, ConnectionState(**{**vars(EMPTY), **state}))
    assert there.statistics()["watches"] == there.statistics()["domains"] == 0
