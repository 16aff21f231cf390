"""The DNS forwarder: what it lets through, and what an answer opens."""

from __future__ import annotations

import random
import socket
import struct
import threading
from collections.abc import Callable, Iterator

import pytest

from xenolith.dom0.network.dns import (
    NOERROR,
    SERVFAIL,
    BadMessage,
    Forwarder,
    Question,
    addresses,
    name_servers,
    read_name,
    read_question,
)
from xenolith.dom0.network.frame import Drop
from xenolith.dom0.network.port import MAX_NAMES_OF_ADDRESS, Names, VifPort
from xenolith.dom0.network.router import Router
from xenolith.dom0.network.rules import Direction, Peer, Policy, parse_rules

from .frontends import DEADLINE_SECONDS
from .netfront import number

CLIENT = (number("10.213.0.9"), 4444)
Answer = Callable[[bytes], list[bytes]]


def encode(name: str) -> bytes:
    return b"".join(bytes([len(label)]) + label.encode() for label in name.split(".") if label) + b"\0"


def query(name: str, kind: int = 1, identifier: int = 0x1234, flags: int = 0x0100) -> bytes:
    return struct.pack("!HHHHHH", identifier, flags, 1, 0, 0, 0) + encode(name) + struct.pack("!HH", kind, 1)


def record(owner: str, kind: int, data: bytes, ttl: int = 300) -> bytes:
    return encode(owner) + struct.pack("!HHIH", kind, 1, ttl, len(data)) + data


def a(owner: str, address: str, ttl: int = 300) -> bytes:
    return record(owner, 1, number(address).to_bytes(4, "big"), ttl)


def answer(asked: bytes, *records: bytes) -> bytes:
    return asked[:2] + struct.pack("!HHHHH", 0x8180, 1, len(records), 0, 0) + asked[12:] + b"".join(records)


class Server:
    """A name server on the loopback device, that answers as `behave` says."""

    def __init__(self) -> None:
        self.socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.socket.bind(("127.0.0.1", 0))
        self.behave: Answer = lambda asked: []
        self.asked: list[bytes] = []
        self.thread = threading.Thread(target=self._serve, daemon=True)
        self.thread.start()

    def _serve(self) -> None:
        while True:
            asked, sender = self.socket.recvfrom(4096)
            if asked == b"stop":
                return
            self.asked.append(asked)
            for message in self.behave(asked):
                self.socket.sendto(message, sender)

    def stop(self) -> None:
        self.socket.sendto(b"stop", self.socket.getsockname())
        self.thread.join()
        self.socket.close()


class Domain:
    """An interface with rules, whose DNS answers are collected."""

    def __init__(self, router: Router, rules: str) -> None:
        self.router = router
        self.answers: list[bytes] = []
        self.changed = threading.Condition()
        mac = b"\0\x16\x3e\0\0\1"
        self.vif = VifPort(
            router.number(),
            "one",
            self._wake,
            domain="one",
            mac=mac,
            address=router.address_for(mac),
            policy=Policy(parse_rules(rules)),
            clock=router.clock,
        )
        router.attach(self.vif)

    def _wake(self) -> None:
        with self.changed:
            frame = self.vif.queue.take()
            assert frame is not None
            self.answers.append(bytes(frame.data[42:]))
            self.changed.notify_all()

    def ask(self, message: bytes) -> bytes:
        with self.router.turns:
            assert self.router.resolver is not None
            self.router.resolver.ask(self.vif, CLIENT, message)
        with self.changed:
            assert self.changed.wait_for(lambda: self.answers, DEADLINE_SECONDS)
            return self.answers.pop()

    def may_reach(self, address: str, port: int = 443) -> bool:
        peer = Peer(number(address), None, self.vif.names.of)
        return self.vif.policy.verdict(Direction.OUT, 6, port, peer)[0]


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    yield made
    made.stop()


@pytest.fixture
def domain(server: Server, request: pytest.FixtureRequest) -> Iterator[Domain]:
    router = Router()
    port = server.socket.getsockname()[1]
    forwarder = Forwarder(router, lambda: ["127.0.0.1"], port)
    router.resolver = forwarder
    yield Domain(router, request.param)
    forwarder.close()


with_rules = pytest.mark.parametrize("domain", ["allow out tcp/443 to *.good.example"], indirect=True, ids=["rules"])
without_rules = pytest.mark.parametrize("domain", [""], indirect=True, ids=["open"])


def code(message: bytes) -> int:
    return message[3] & 15


@with_rules
def test_the_answer_for_an_allowed_name_opens_its_address_and_no_other(domain: Domain, server: Server) -> None:
    server.behave = lambda asked: [
        answer(
            asked,
            record("www.good.example", 5, encode("cdn.other.example")),
            a("cdn.other.example", "203.0.113.7"),
            a("bank.example", "203.0.113.8"),
        )
    ]
    got = domain.ask(query("WWW.good.example"))
    assert got[:2] == b"\x12\x34"
    assert code(got) == 0
    assert domain.may_reach("203.0.113.7")
    assert not domain.may_reach("203.0.113.7", 80)
    assert not domain.may_reach("203.0.113.8"), "a record that belongs to no name that was asked for"
    assert not domain.may_reach("203.0.113.9"), "an address that nobody told"


@with_rules
def test_names_that_no_rule_allows_are_not_asked_for(domain: Domain, server: Server) -> None:
    for name, kind in (("evil.example", 1), ("secret.good.example", 16), ("good.example", 1), ("xgood.example", 28)):
        assert code(domain.ask(query(name, kind))) == 5
    assert server.asked == []
    assert domain.vif.drops["DNS refused"] == 4


@with_rules
def test_an_allowed_name_cannot_lead_to_the_neighbours(domain: Domain, server: Server) -> None:
    inside = [
        "10.0.0.1",
        "127.0.0.1",
        "192.168.1.1",
        "172.16.5.5",
        "169.254.169.254",
        "100.64.0.1",
        "0.0.0.0",
        "224.0.0.1",
    ]
    server.behave = lambda asked: [answer(asked, *(a("www.good.example", each) for each in inside))]
    domain.ask(query("www.good.example"))
    assert not any(domain.may_reach(each) for each in inside)


@with_rules
def test_answers_to_something_else_do_not_count(domain: Domain, server: Server) -> None:
    def forge(asked: bytes) -> list[bytes]:
        right = answer(asked, a("www.good.example", "203.0.113.1"))
        wrong_number = bytes([asked[0] ^ 1]) + answer(asked, a("www.good.example", "203.0.113.2"))[1:]
        other = asked[:2] + query("www.evil.example")[2:]
        wrong_question = answer(other, a("www.evil.example", "203.0.113.3"))
        return [b"", b"x", wrong_number, wrong_question, asked, right[: len(right) - 3], right]

    server.behave = forge
    domain.ask(query("www.good.example"))
    assert domain.may_reach("203.0.113.1")
    assert not domain.may_reach("203.0.113.2")
    assert not domain.may_reach("203.0.113.3")


@with_rules
def test_what_was_told_is_valid_for_a_time(domain: Domain, server: Server) -> None:
    server.behave = lambda asked: [answer(asked, a("www.good.example", "203.0.113.1", ttl=1 << 31))]
    domain.ask(query("www.good.example"))
    names = domain.vif.names
    assert list(names.of(number("203.0.113.1"))) == ["www.good.example"]
    real = names.clock
    names.clock = lambda: real() + 3700
    assert list(names.of(number("203.0.113.1"))) == []


@without_rules
def test_an_open_domain_may_ask_for_anything(domain: Domain, server: Server) -> None:
    server.behave = lambda asked: [answer(asked, record("x.example", 16, b"\4text"))]
    assert b"\4text" in domain.ask(query("x.example", 16))


@without_rules
def test_a_domain_is_known_by_its_name(domain: Domain, server: Server) -> None:
    for name in ("one", "ONE.xenolith"):
        got = domain.ask(query(name))
        assert got.endswith(domain.vif.address.to_bytes(4, "big"))
    assert code(domain.ask(query("one", 28))) == 0
    assert server.asked == []


@without_rules
def test_an_answer_that_is_too_long_is_marked_truncated(domain: Domain, server: Server) -> None:
    server.behave = lambda asked: [answer(asked, *(a("x.example", "203.0.113.1") for _ in range(100)))]
    got = domain.ask(query("x.example"))
    assert got[2] & 2
    assert len(got) < 100


@without_rules
def test_queries_that_make_no_sense(domain: Domain) -> None:
    good = query("x.example")
    bad = [
        b"",
        good[:11],
        good[:-1],
        good[:2] + b"\x81\x80" + good[4:],
        good[:4] + b"\0\2" + good[6:],
        good[:12] + b"\xc0\x0c\0\1\0\1",
        good[:12] + b"\x40x\0\0\1\0\1",
        good[:-1] + b"\3",
    ]
    assert domain.router.resolver is not None
    for message in bad:
        with pytest.raises(Drop):
            domain.router.resolver.ask(domain.vif, CLIENT, message)


def test_a_name_is_read_within_bounds() -> None:
    with pytest.raises(BadMessage):
        read_name(b"\xc0\x00", 0)
    with pytest.raises(BadMessage):
        read_name(b"\x01a\xc0\x02", 2)
    with pytest.raises(BadMessage):
        read_name(b"\x3f" + b"a" * 63 + b"\x3f" + b"b" * 63 + b"\x3f" + b"c" * 63 + b"\x3f" + b"d" * 63 + b"\0", 0)
    assert read_name(b"\x01a\0\x01b\xc0\x00", 3) == ("b.a", 7)


@pytest.mark.parametrize("seed", range(3))
def test_random_messages_never_raise_anything_else(seed: int) -> None:
    chance = random.Random(seed)
    asked = query("www.good.example")
    good = answer(asked, record("www.good.example", 5, b"\xc0\x10"), a("good.example", "203.0.113.1"))
    for _ in range(30_000):
        message = bytearray(good)
        for _ in range(chance.randrange(6)):
            message[chance.randrange(len(message))] = chance.choice([0, 0xC0, chance.randrange(256)])
        data = bytes(message[: chance.choice([len(message), chance.randrange(len(message))])])
        try:
            question = read_question(data)
            addresses(data, question)
        except BadMessage:
            continue
        assert isinstance(question, Question)


def test_name_servers_are_read_from_resolv_conf(tmp_path: object) -> None:
    from pathlib import Path

    path = Path(str(tmp_path)) / "resolv.conf"
    path.write_text("# comment\nsearch example\nnameserver 192.0.2.53\nnameserver fd00::53 \nnameserver\n")
    assert name_servers(path) == ["192.0.2.53", "fd00::53"]
    assert name_servers(path / "missing") == []


def test_an_address_has_only_so_many_names_and_loses_those_that_are_over() -> None:
    now = 0.0
    names = Names(lambda: now)
    for at in range(1000):
        names.tell(1, f"name{at}", 60)
    assert set(names.of(1)) == {f"name{at}" for at in range(1000 - MAX_NAMES_OF_ADDRESS, 1000)}
    now = 61.0
    names.tell(1, "last", 60)
    assert names._told == {1: {"last": 121.0}}


@without_rules
def test_a_host_without_a_socket_to_spare_fails_that_query_alone(
    domain: Domain, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(24, "Too many open files")

    server.behave = lambda asked: [answer(asked, a("www.debian.org", "192.0.2.7"))]
    with monkeypatch.context() as patch:
        patch.setattr("xenolith.dom0.network.dns.socket.socket", refuse)
        assert code(domain.ask(query("www.debian.org"))) == SERVFAIL
    assert code(domain.ask(query("www.debian.org"))) == NOERROR
