"""Rules of the virtual firewall-router: (pattern, action) pairs (paper 3.4.1).

A rule in words:

    allow out tcp/443 to *.debian.org        deny in from domains
    allow out udp/53,123 to 192.0.2.0/24     allow in tcp/8000-8010 from outside
    deny out to 10.0.0.0/8                   allow out

that is: allow or deny; out (connections that the domain opens) or in (that are opened to it); tcp, udp or icmp, perhaps
with ports, or nothing for all; and the peer: an address, a network, `domains`, `outside`, a domain as `domain:NAME`, or
a DNS name, of which the first label may be `*` for any number of labels.  A name stands for the addresses that our own
DNS forwarder told this domain for it, as long as they are valid.

The first rule whose pattern fits a connection's first packet decides.  Where none does, a direction with an `allow`
rule among its rules is closed, and one without is open.  Replies belong to their connection and need no rule.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from enum import StrEnum
from ipaddress import IPv4Network
from typing import Final, TypeAlias

from xenolith.dom0.network.frame import ICMP, TCP, UDP

_PROTOCOLS: Final = {"tcp": TCP, "udp": UDP, "icmp": ICMP}
_NAMES: Final = {number: name for name, number in _PROTOCOLS.items()}
_LABEL: Final = re.compile(r"(?!-)[a-z0-9_-]{1,63}(?<!-)", re.ASCII)
_DIGITS: Final = re.compile(r"[0-9.]+(/[0-9]*)?", re.ASCII)
MAX_RULES: Final = 1000


class RuleError(ValueError):
    """A rule cannot be understood; the text says what of it."""


class Action(StrEnum):
    """What becomes of a connection."""

    ALLOW = "allow"
    DENY = "deny"


class Direction(StrEnum):
    """Who opens it: the domain, or somebody else."""

    OUT = "out"
    IN = "in"


@dataclass(frozen=True, slots=True)
class DnsName:
    """A name, or all names below it."""

    suffix: str
    wildcard: bool = False

    def covers(self, name: str) -> bool:
        """Whether a name, in lower case and without the last dot, is meant."""
        return name.endswith("." + self.suffix) if self.wildcard else name == self.suffix

    def __str__(self) -> str:
        return "*." * self.wildcard + self.suffix


@dataclass(frozen=True, slots=True)
class DomainName:
    """A domain of this machine."""

    name: str

    def __str__(self) -> str:
        return f"domain:{self.name}"


class Place(StrEnum):
    """A kind of peer."""

    DOMAINS = "domains"
    OUTSIDE = "outside"


PeerPattern: TypeAlias = IPv4Network | DnsName | DomainName | Place | None


@dataclass(frozen=True, slots=True)
class Peer:
    """The other end of a connection, as far as rules can know it."""

    address: int
    domain: str | None  # its name, for a domain of this machine
    names: Callable[[int], Iterable[str]]  # DNS names of an address, as the domain was told


@dataclass(slots=True, eq=False)
class Rule:
    """A pattern and an action, with what it decided."""

    action: Action
    direction: Direction
    protocol: int | None = None
    ports: tuple[range, ...] = ()
    peer: PeerPattern = None
    packets: int = field(default=0)
    bytes: int = field(default=0)

    def fits(self, protocol: int, port: int, peer: Peer) -> bool:
        """Whether it decides about a connection to this port, and this peer."""
        if self.protocol is not None and protocol != self.protocol:
            return False
        if self.ports and not any(port in ports for ports in self.ports):
            return False
        match self.peer:
            case None:
                return True
            case Place():
                return (peer.domain is not None) == (self.peer is Place.DOMAINS)
            case DomainName():
                return peer.domain == self.peer.name
            case DnsName():
                return peer.domain is None and any(self.peer.covers(name) for name in peer.names(peer.address))
        return _contains(self.peer, peer.address)

    def __str__(self) -> str:
        words = [str(self.action), str(self.direction)]
        if self.protocol is not None:
            ports = ",".join(str(each[0]) if len(each) == 1 else f"{each[0]}-{each[-1]}" for each in self.ports)
            words.append(_NAMES[self.protocol] + ("/" + ports if ports else ""))
        if self.peer is not None:
            peer = self.peer
            text = str(peer.network_address) if isinstance(peer, IPv4Network) and peer.prefixlen == 32 else str(peer)
            words += ["to" if self.direction is Direction.OUT else "from", text]
        return " ".join(words)


def _contains(network: IPv4Network, address: int) -> bool:
    return address & int(network.netmask) == int(network.network_address)


def parse_rule(text: str) -> Rule:
    """A rule in words. Raises RuleError."""
    words = text.split()
    try:
        action, direction = Action(words[0]), Direction(words[1])
    except (ValueError, IndexError):
        raise RuleError(f"{text!r} is no rule: it begins with allow or deny, and then out or in") from None
    rule, rest = Rule(action, direction), words[2:]
    preposition = "to" if direction is Direction.OUT else "from"
    if rest and rest[0] != preposition:
        rule.protocol, rule.ports = _service(rest.pop(0), text)
    if rest:
        if len(rest) != 2 or rest[0] != preposition:
            raise RuleError(f"{text!r}: after {action} {direction} and the protocol comes {preposition} and a peer")
        rule.peer = _peer(rest[1], text)
    return rule


def parse_rules(text: str) -> tuple[Rule, ...]:
    """Rules with semicolons or ends of lines between. Raises RuleError."""
    rules = tuple(parse_rule(part.strip()) for part in re.split(r"[;\n]", text) if part.strip())
    if len(rules) > MAX_RULES:
        raise RuleError(f"{len(rules)} rules are more than {MAX_RULES}")
    return rules


def _service(word: str, text: str) -> tuple[int, tuple[range, ...]]:
    name, slash, ports = word.partition("/")
    if name not in _PROTOCOLS or (slash and (not ports or name == "icmp")):
        raise RuleError(f"{text!r}: {word!r} is no protocol: tcp, udp, tcp/PORTS, udp/PORTS or icmp")
    return _PROTOCOLS[name], tuple(_port_range(part, text) for part in ports.split(",")) if ports else ()


def _port_range(part: str, text: str) -> range:
    first, dash, last = part.partition("-")
    numbers = [first, last if dash else first]
    if not all(re.fullmatch(r"[0-9]{1,5}", number, re.ASCII) for number in numbers):
        raise RuleError(f"{text!r}: {part!r} is no port and no range of ports")
    low, high = map(int, numbers)
    if not 0 < low <= high < 65536:
        raise RuleError(f"{text!r}: the ports {part} are not in order between 1 and 65535")
    return range(low, high + 1)


def _peer(word: str, text: str) -> PeerPattern:
    if word in list(Place):
        return Place(word)
    if word.startswith("domain:"):
        return DomainName(word.removeprefix("domain:"))
    if _DIGITS.fullmatch(word):
        try:
            return IPv4Network(word)
        except ValueError as error:
            raise RuleError(f"{text!r}: {error}") from None
    name = word.lower().rstrip(".")
    wildcard = name.startswith("*.")
    suffix = name.removeprefix("*.")
    if len(suffix) > 253 or not all(_LABEL.fullmatch(label) for label in suffix.split(".")):
        raise RuleError(f"{text!r}: {word!r} is no address, network, DNS name, domains, outside or domain:NAME")
    return DnsName(suffix, wildcard)


class Policy:
    """The rules of one interface."""

    def __init__(self, rules: Iterable[Rule] = ()) -> None:
        self.rules: Final = tuple(rules)
        self._directions: Final = {
            direction: tuple(rule for rule in self.rules if rule.direction is direction) for direction in Direction
        }
        self._otherwise: Final = {
            direction: not any(rule.action is Action.ALLOW for rule in rules)
            for direction, rules in self._directions.items()
        }

    def verdict(self, direction: Direction, protocol: int, port: int, peer: Peer) -> tuple[bool, Rule | None]:
        """Whether a connection may be, and the rule that says so."""
        for rule in self._directions[direction]:
            if rule.fits(protocol, port, peer):
                return rule.action is Action.ALLOW, rule
        return self._otherwise[direction], None

    def may_resolve(self, name: str) -> bool:
        """Whether a DNS query for a name serves something that the domain may reach."""
        for rule in self._directions[Direction.OUT]:
            match rule.peer:
                case DnsName() if rule.peer.covers(name):
                    if rule.action is Action.ALLOW:
                        return True
                    if rule.protocol is None:
                        return False
                case None | Place.OUTSIDE:
                    if rule.action is Action.ALLOW:
                        return True
                    if rule.protocol is None:
                        return False
        return self._otherwise[Direction.OUT]

    @property
    def open(self) -> bool:
        """Whether names are free to be asked for, for their own sake."""
        for rule in self._directions[Direction.OUT]:
            if rule.peer in (None, Place.OUTSIDE) and rule.protocol in (None, UDP) and not rule.ports:
                return rule.action is Action.ALLOW
        return self._otherwise[Direction.OUT]

    def __str__(self) -> str:
        return "; ".join(map(str, self.rules))
