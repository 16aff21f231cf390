"""What one guest can take, and what it can find out about others."""

from __future__ import annotations

import pytest

from xenolith.abi.xs_wire import Op
from xenolith.dom0.xenstore.quota import Quota
from xenolith.dom0.xenstore.xenstored import Xenstored

from .wire import Client, pack


@pytest.fixture
def dom0() -> Client:
    return Client(Xenstored())


def guest_with_home(dom0: Client, domid: int) -> Client:
    dom0.ok(Op.MKDIR, b"/local/domain/%d/data\0" % domid)
    dom0.ok(Op.SET_PERMS, b"/local/domain/%d\0n0\0r%d\0" % (domid, domid))
    dom0.ok(Op.SET_PERMS, b"/local/domain/%d/data\0n%d\0" % (domid, domid))
    return Client(dom0.connection.daemon, domid)


def test_a_guest_owns_at_most_its_quota_of_nodes_and_gets_room_by_removing(dom0: Client) -> None:
    guest = guest_with_home(dom0, 3)
    made = 1  # data
    for number in range(100):
        for name in (b"data/%d" % number, *(b"data/%d/%d" % (number, inner) for inner in range(12))):
            if made < 1000:
                guest.ok(Op.MKDIR, name + b"\0")
                made += 1
            else:
                assert guest.error(Op.MKDIR, name + b"\0") == "ENOSPC"
    assert guest.error(Op.WRITE, b"data/one/too/many\0x") == "ENOSPC"
    guest.ok(Op.RM, b"data/0\0")
    guest.ok(Op.MKDIR, b"data/again\0")
    dom0.ok(Op.WRITE, b"/local/domain/3/data/by-dom0\0x")


def test_nodes_made_in_a_transaction_count_at_once_and_not_after_it_is_abandoned(dom0: Client) -> None:
    dom0.connection.daemon.quota = Quota(nodes=10)
    guest = guest_with_home(dom0, 3)
    tx = int(guest.ok(Op.TRANSACTION_START, b"\0")[:-1])
    for number in range(9):
        guest.ok(Op.MKDIR, b"data/%d\0" % number, tx)
    assert guest.error(Op.MKDIR, b"data/more\0", tx) == "ENOSPC"
    guest.ok(Op.TRANSACTION_END, b"F\0", tx)
    guest.ok(Op.MKDIR, b"data/outside\0")
    assert dom0.connection.daemon.store.owned_by(3) == 2


def test_watches_and_transactions_are_limited(dom0: Client) -> None:
    guest = guest_with_home(dom0, 3)
    for number in range(128):
        guest.ok(Op.WATCH, b"data\0%d\0" % number)
    assert guest.error(Op.WATCH, b"data\0more\0") == "E2BIG"
    guest.ok(Op.UNWATCH, b"data\x007\0")
    guest.ok(Op.WATCH, b"data\0more\0")
    for _ in range(10):
        guest.ok(Op.TRANSACTION_START, b"\0")
    assert guest.error(Op.TRANSACTION_START, b"\0") == "ENOSPC"
    guest.ok(Op.RESET_WATCHES, b"\0")
    guest.ok(Op.TRANSACTION_START, b"\0")
    guest.ok(Op.WATCH, b"data\0fresh\0")


def test_a_node_record_is_limited_by_value_permissions_and_names(dom0: Client) -> None:
    guest = guest_with_home(dom0, 3)
    guest.ok(Op.WRITE, b"data/v\0" + b"x" * 2015)
    assert guest.error(Op.WRITE, b"data/v\0" + b"x" * 2016) == "ENOSPC"
    assert guest.error(Op.SET_PERMS, b"data/v\0n3\0r4\0") == "ENOSPC"
    assert guest.error(Op.WRITE, b"data/w\0" + b"x" * 2016) == "ENOSPC"
    guest.ok(Op.RM, b"data/v\0")
    names = 0
    while guest.ask(Op.MKDIR, b"data/%044d\0" % names)[0] == "MKDIR":
        names += 1
    assert names == (2047 - 24 - 8) // 45
    assert guest.error(Op.MKDIR, b"data/%044d\0" % names) == "ENOSPC"


def test_a_transaction_looks_at_a_limited_number_of_nodes_and_stays_usable(dom0: Client) -> None:
    guest = guest_with_home(dom0, 3)
    tx = int(guest.ok(Op.TRANSACTION_START, b"\0")[:-1])
    guest.ok(Op.READ, b"data\0", tx)
    answers = [guest.error(Op.READ, b"data/%d\0" % number, tx) for number in range(1100)]
    assert answers == ["ENOENT"] * 1023 + ["ENOSPC"] * 77
    guest.ok(Op.READ, b"data\0", tx)
    guest.ok(Op.TRANSACTION_END, b"T\0", tx)


def test_nodes_nested_a_thousand_deep_can_be_made_walked_and_removed(dom0: Client) -> None:
    deep = b"/local/domain/3/data" + b"/d" * 990
    guest = guest_with_home(dom0, 3)
    guest.ok(Op.WRITE, deep + b"\0v")
    assert dom0.ok(Op.READ, deep + b"\0") == b"v"
    tx = int(dom0.ok(Op.TRANSACTION_START, b"\0")[:-1])
    dom0.ok(Op.RM, b"/local/domain/3/data\0", tx)
    dom0.ok(Op.WRITE, b"/elsewhere\0x")
    dom0.ok(Op.TRANSACTION_END, b"T\0", tx)
    assert dom0.connection.daemon.store.owned_by(3) == 0


def test_requests_of_a_transaction_are_limited_but_not_asking_the_same_again(dom0: Client) -> None:
    guest = guest_with_home(dom0, 3)
    tx = int(guest.ok(Op.TRANSACTION_START, b"\0")[:-1])
    for _ in range(2000):
        guest.ok(Op.READ, b"data\0", tx)
    for number in range(1023):
        guest.ok(Op.WRITE, b"data\0%d" % number, tx)
    assert guest.error(Op.WRITE, b"data\0x", tx) == "ENOSPC"
    dom0.ok(Op.WRITE, b"/elsewhere\0x")
    guest.ok(Op.TRANSACTION_END, b"T\0", tx)
    assert guest.ok(Op.READ, b"data\0") == b"1022"


def test_a_long_directory_is_listed_in_parts_of_one_generation(dom0: Client) -> None:
    names = [b"child-%05d" % number for number in range(1500)]
    for name in names:
        dom0.ok(Op.MKDIR, b"/dir/%b\0" % name)
    assert dom0.error(Op.DIRECTORY, b"/dir\0") == "E2BIG"
    listed, generations = b"", set()
    while not listed.endswith(b"\0\0"):
        generation, _, part = dom0.ok(Op.DIRECTORY_PART, b"/dir\0%d\0" % len(listed)).partition(b"\0")
        generations.add(generation)
        listed += part
    assert listed.split(b"\0")[:-2] == names
    assert len(generations) == 1
    dom0.ok(Op.MKDIR, b"/dir/new\0")
    assert dom0.ok(Op.DIRECTORY_PART, b"/dir\x000\0").split(b"\0")[0] not in generations


def test_what_a_dead_domain_owned_or_was_allowed_does_not_pass_to_the_next_with_its_number(dom0: Client) -> None:
    daemon = dom0.connection.daemon
    guest = guest_with_home(dom0, 3)
    guest.ok(Op.WRITE, b"data/mine\0x")
    dom0.ok(Op.WRITE, b"/for-three\0secret")
    dom0.ok(Op.SET_PERMS, b"/for-three\0n0\0r3\0")
    dom0.ok(Op.SET_PERMS, b"@releaseDomain\0n0\0r3\0")
    daemon.release(3)
    successor = Client(daemon, 3)
    assert successor.error(Op.READ, b"/local/domain/3/data/mine\0") == "EACCES"
    assert successor.error(Op.READ, b"/for-three\0") == "EACCES"
    successor.ok(Op.WATCH, b"@releaseDomain\0t\0")
    successor.take_events()
    Client(daemon, 4)
    daemon.release(4)
    assert successor.take_events() == []
    assert daemon.store.owned_by(3) == 0


@pytest.mark.parametrize("junk", [b"", b"\0", b"\0\0\0\0", b"x", b"\xff" * 4096, b"/" * 4096, b"a\0" * 2048])
def test_any_payload_of_any_request_is_answered(dom0: Client, junk: bytes) -> None:
    guest = guest_with_home(dom0, 3)
    for op in Op:
        for client in (dom0, guest):
            kind, _ = client.ask(op, junk)
            assert kind in ("ERROR", op.name)


def test_control_tells_what_a_domain_uses_and_what_there_is(dom0: Client) -> None:
    guest = guest_with_home(dom0, 3)
    guest.ok(Op.WRITE, b"data/x\0twelve bytes")
    guest.ok(Op.WATCH, b"data\0token\0")
    guest.ok(Op.TRANSACTION_START, b"\0")
    guest.take_events()
    guest.connection.feed(pack(Op.READ, b"data/x\0"))
    guest.connection.process(1)  # 16 bytes of header and the value wait to be fetched
    usage = dom0.ok(Op.CONTROL, b"quota\x003\0").decode()
    assert " ".join(usage.split()) == "Domain 3: nodes : 2 watches : 1 transactions : 1 outstanding : 1 memory : 28 \0"
    report = dom0.ok(Op.CONTROL, b"memreport\0").decode()[:-1].splitlines()
    assert {name.strip(): int(figure) for name, figure in (line.split(":") for line in report)} == {
        "nodes": 8,  # / tool tool/xenstored local local/domain local/domain/3 and the guest's two
        "bytes of values": 12,
        "watches": 1,
        "domains": 1,
        "transactions of domains": 1,
        "bytes unread by domains": 28,
    }


@pytest.mark.parametrize("command", [b"live-update\0-s", b"logfile\0f", b"quota-soft", b"memreport\0f", b"what"])
def test_control_refuses_what_it_does_not_know(dom0: Client, command: bytes) -> None:
    assert dom0.error(Op.CONTROL, command + b"\0") == "EINVAL"
