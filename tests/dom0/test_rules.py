"""Rules of the firewall-router: how they are written, and what they say."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xenolith.dom0.network.frame import ICMP, TCP, UDP
from xenolith.dom0.network.rules import Direction, Peer, Policy, RuleError, parse_rule, parse_rules

from .netfront import number

NAMES = {number("198.51.100.7"): ["deb.debian.org"], number("198.51.100.8"): ["debian.org.evil.example"]}


def outside(address: str = "198.51.100.1") -> Peer:
    return Peer(number(address), None, lambda address: NAMES.get(address, ()))


def domain(name: str) -> Peer:
    return Peer(number("10.213.0.9"), name, lambda address: ())


def allows(rules: str, direction: Direction, protocol: int, port: int, peer: Peer) -> bool:
    return Policy(parse_rules(rules)).verdict(direction, protocol, port, peer)[0]


@pytest.mark.parametrize(
    "text",
    [
        "allow out",
        "deny in",
        "allow out tcp/443 to *.debian.org",
        "allow out udp/53,123 to 192.0.2.0/24",
        "deny out to 10.0.0.0/8",
        "allow in tcp/8000-8010 from outside",
        "deny in icmp from domain:two",
        "allow in tcp from domains",
        "allow out to 192.0.2.1",
    ],
)
def test_a_rule_is_written_as_it_was_read(text: str) -> None:
    assert str(parse_rule(text)) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "allow",
        "permit out",
        "allow out sctp",
        "allow out tcp/",
        "allow out tcp/0",
        "allow out tcp/65536",
        "allow out tcp/90-80",
        "allow out tcp/http",
        "allow out icmp/8",
        "allow out from outside",
        "allow in to outside",
        "allow out to",
        "allow out to 192.0.2.1 please",
        "allow out to 192.0.2.1/24",
        "allow out to 192.0.2.256",
        "allow out to -x.example",
        "allow out to a..b",
        "allow out to *",
        "allow out to http://example.org",
        "allow out tcp/٤",
    ],
)
def test_what_is_no_rule_is_refused_with_its_text(text: str) -> None:
    with pytest.raises(RuleError) as error:
        parse_rule(text)
    assert repr(text) in str(error.value)


@given(st.text(max_size=60))
def test_any_text_is_a_rule_or_refused(text: str) -> None:
    try:
        rules = parse_rules(text)
    except RuleError:
        return
    assert [str(rule) for rule in parse_rules("; ".join(map(str, rules)))] == list(map(str, rules))


def test_without_rules_everything_is_allowed() -> None:
    assert allows("", Direction.OUT, TCP, 80, outside())
    assert allows("", Direction.IN, UDP, 80, domain("one"))


def test_an_allow_rule_closes_its_direction_for_all_else() -> None:
    rules = "allow out tcp/443 to 198.51.100.0/24"
    assert allows(rules, Direction.OUT, TCP, 443, outside())
    assert not allows(rules, Direction.OUT, TCP, 80, outside())
    assert not allows(rules, Direction.OUT, UDP, 443, outside())
    assert not allows(rules, Direction.OUT, TCP, 443, outside("203.0.113.1"))
    assert allows(rules, Direction.IN, TCP, 22, domain("one")), "the other direction is as open as before"


def test_a_deny_rule_leaves_the_rest_open() -> None:
    rules = "deny out to 10.0.0.0/8"
    assert not allows(rules, Direction.OUT, TCP, 80, outside("10.1.2.3"))
    assert allows(rules, Direction.OUT, TCP, 80, outside("11.1.2.3"))


def test_the_first_rule_that_fits_decides() -> None:
    assert not allows("deny out tcp/25; allow out", Direction.OUT, TCP, 25, outside())
    assert allows("deny out tcp/25; allow out", Direction.OUT, TCP, 26, outside())
    assert allows("allow out; deny out tcp/25", Direction.OUT, TCP, 25, outside())


def test_peers_by_place_and_domain() -> None:
    assert not allows("deny in from domains", Direction.IN, TCP, 80, domain("one"))
    assert allows("deny in from domains", Direction.IN, TCP, 80, outside())
    assert not allows("deny in icmp from domain:one", Direction.IN, ICMP, 0, domain("one"))
    assert allows("deny in icmp from domain:one", Direction.IN, ICMP, 0, domain("two"))
    assert not allows("allow out to outside", Direction.OUT, TCP, 80, domain("one"))


def test_a_name_is_an_address_that_was_told_for_it() -> None:
    rules = "allow out tcp/443 to *.debian.org"
    assert allows(rules, Direction.OUT, TCP, 443, outside("198.51.100.7"))
    assert not allows(rules, Direction.OUT, TCP, 443, outside("198.51.100.8"))
    assert not allows(rules, Direction.OUT, TCP, 443, outside("198.51.100.1")), "an address that was never told"
    assert allows("allow out to deb.debian.org", Direction.OUT, TCP, 1, outside("198.51.100.7"))
    assert not allows("allow out to debian.org", Direction.OUT, TCP, 1, outside("198.51.100.7"))


@pytest.mark.parametrize(
    ("rules", "name", "may"),
    [
        ("", "anything.example", True),
        ("deny out", "anything.example", False),
        ("allow out tcp/443 to deb.debian.org", "deb.debian.org", True),
        ("allow out tcp/443 to deb.debian.org", "debian.org", False),
        ("allow out tcp/443 to *.debian.org", "a.b.debian.org", True),
        ("allow out tcp/443 to *.debian.org", "xdebian.org", False),
        ("allow out to 192.0.2.1", "anything.example", False),
        ("deny out to *.evil.example; allow out", "x.evil.example", False),
        ("deny out to *.evil.example; allow out", "x.good.example", True),
        ("allow out tcp/443", "anything.example", True),
    ],
)
def test_names_that_may_be_asked_for(rules: str, name: str, may: bool) -> None:
    assert Policy(parse_rules(rules)).may_resolve(name) is may


def test_only_so_many_rules() -> None:
    with pytest.raises(RuleError):
        parse_rules("deny out;" * 1001)
