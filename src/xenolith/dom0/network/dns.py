"""The router's DNS forwarder (RFC 1035): domains ask it, it asks the host's name servers with the host's own sockets.

A domain that may not reach all of the outside gets answers only for names that its rules allow.  What it was told for
such a name it may reach (`port.Names`), and nothing else: an address counts only if it follows from the name that was
asked for, by the answer's own chain of aliases, and if it is no private one, so that whoever owns an allowed name
cannot point it at the host's neighbours.  A domain's name, or NAME.xenolith, is answered with its address.

Both queries and answers come from people who may wish us ill: everything is read within bounds, and an answer counts
only if it comes from the server asked, on the socket of that query, with its random number and its question.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import selectors
import socket
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from struct import Struct
from typing import TYPE_CHECKING, Final

from xenolith.dom0.network.frame import Drop

if TYPE_CHECKING:
    from xenolith.dom0.network.port import VifPort
    from xenolith.dom0.network.router import Router

A: Final = 1
CNAME: Final = 5
AAAA: Final = 28
_IN: Final = 1
_FOR_NAMES: Final = frozenset({A, AAAA, CNAME, 65})  # and HTTPS: what a program asks before it connects

NOERROR: Final = 0
SERVFAIL: Final = 2
REFUSED: Final = 5

_HEADER: Final = Struct("!HHHHHH")
_FIXED: Final = Struct("!HHIH")
_QR: Final = 0x8000
_TC: Final = 0x0200
_OPCODE: Final = 0x7800
MAX_OUTSTANDING: Final = 32  # of each domain
MAX_RECORDS: Final = 128
ANSWER_BYTES: Final = 4096
TIMEOUT_SECONDS: Final = 3.0
ATTEMPTS: Final = 2  # of each server
MIN_TTL: Final = 60
MAX_TTL: Final = 3600
NEIGHBOURS: Final = tuple(
    map(
        IPv4Network,
        (
            *("0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12"),
            *("192.0.0.0/24", "192.168.0.0/16", "224.0.0.0/3"),
        ),
    )
)
"""Addresses that no name opens."""
LOCAL: Final = ".xenolith"
LOCAL_TTL: Final = 5


class BadMessage(Exception):
    """Not DNS as it should be."""


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked: a name in lower case without the last dot, and a type."""

    name: str
    kind: int
    end: int  # where in the message it ends


def read_question(message: bytes) -> Question:
    """The one question of a message. Raises BadMessage."""
    if len(message) < _HEADER.size or _HEADER.unpack_from(message)[2] != 1:
        raise BadMessage
    name, at = read_name(message, _HEADER.size)
    if at + 4 > len(message):
        raise BadMessage
    kind, cls = (int.from_bytes(message[at + offset : at + offset + 2], "big") for offset in (0, 2))
    if cls != _IN:
        raise BadMessage
    return Question(name, kind, at + 4)


def read_name(message: bytes, at: int) -> tuple[str, int]:
    """A name, with its compression undone, and where it ends. Raises BadMessage."""
    labels: list[str] = []
    end = None
    length = 0
    lowest = at
    while True:
        if at >= len(message):
            raise BadMessage
        size = message[at]
        if size >= 0xC0:
            if at + 2 > len(message):
                raise BadMessage
            target = (size & 0x3F) << 8 | message[at + 1]
            end = at + 2 if end is None else end
            if target >= lowest:
                raise BadMessage  # each goes further back than the last, so they end
            at = lowest = target
            continue
        if size > 63 or at + 1 + size > len(message):
            raise BadMessage
        at += 1
        if not size:
            return ".".join(labels), at if end is None else end
        label = message[at : at + size]
        if b"." in label or any(byte <= 0x20 or byte >= 0x7F for byte in label):
            raise BadMessage
        length += size + 1
        if length > 255:
            raise BadMessage
        labels.append(label.decode("ascii").lower())
        at += size


def addresses(message: bytes, question: Question) -> list[tuple[int, int]]:
    """The IPv4 addresses that an answer gives for its question's name, and for how long. Raises BadMessage."""
    count = _HEADER.unpack_from(message)[3]
    if count > MAX_RECORDS:
        raise BadMessage
    at = question.end
    aliases: list[tuple[str, str, int]] = []
    found: list[tuple[str, int, int]] = []
    for _ in range(count):
        owner, at = read_name(message, at)
        if at + _FIXED.size > len(message):
            raise BadMessage
        kind, cls, ttl, length = _FIXED.unpack_from(message, at)
        at += _FIXED.size
        if at + length > len(message):
            raise BadMessage
        if cls == _IN and kind == A and length == 4:
            found.append((owner, int.from_bytes(message[at : at + 4], "big"), ttl))
        elif cls == _IN and kind == CNAME:
            alias, _ = read_name(message, at)
            aliases.append((owner, alias, ttl))
        at += length
    names = {question.name: MAX_TTL}
    for _ in range(len(aliases)):
        for owner, alias, ttl in aliases:
            if owner in names and alias not in names:
                names[alias] = min(names[owner], ttl)
    return [(address, min(names[owner], ttl)) for owner, address, ttl in found if owner in names]


def reply(query: bytes, question: Question, code: int, records: Sequence[int] = (), truncated: bool = False) -> bytes:
    """An answer of our own, with these addresses."""
    number, flags, *_ = _HEADER.unpack_from(query)
    flags = _QR | flags & (_OPCODE | 0x0100) | 0x0080 | code | (_TC if truncated else 0)
    head = _HEADER.pack(number, flags, 1, len(records), 0, 0)
    body = b"".join(b"\xc0\x0c" + _FIXED.pack(A, _IN, LOCAL_TTL, 4) + each.to_bytes(4, "big") for each in records)
    return head + query[_HEADER.size : question.end] + body


def name_servers(path: Path = Path("/etc/resolv.conf")) -> list[str]:
    """The host's, as resolv.conf(5) has them."""
    try:
        lines = path.read_text(errors="replace").splitlines()
    except OSError:
        return []
    return [words[1] for line in lines if len(words := line.split()) > 1 and words[0] == "nameserver"]


@dataclass(slots=True)
class _Query:
    """A query on its way."""

    vif: VifPort
    client: tuple[int, int]
    message: bytes
    question: Question
    number: int
    servers: list[str]
    socket: socket.socket | None = None
    until: float = 0.0


class Forwarder:
    """Answers domains' DNS queries, on a thread of its own where it has to ask others."""

    def __init__(self, router: Router, servers: Callable[[], list[str]] = name_servers, port: int = 53) -> None:
        self._router: Final = router
        self._servers: Final = servers
        self._port: Final = port
        self._new: Final[deque[_Query]] = deque()
        self._outstanding: Final[dict[VifPort, int]] = {}
        self._selector: Final = selectors.DefaultSelector()
        self._wake: Final = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._selector.register(self._wake, selectors.EVENT_READ)
        self._stopping = False
        self._thread: threading.Thread | None = None

    def close(self) -> None:
        self._stopping = True
        if self._thread is not None:
            os.eventfd_write(self._wake, 1)
            self._thread.join()
        self._selector.close()
        os.close(self._wake)

    # --- in the router's turn

    def ask(self, vif: VifPort, client: tuple[int, int], query: bytes) -> None:
        """A domain's query. Raises Drop."""
        try:
            question = read_question(query)
        except BadMessage:
            raise Drop("bad DNS") from None
        flags = _HEADER.unpack_from(query)[1]
        if flags & (_QR | _OPCODE):
            raise Drop("bad DNS")
        local = self._local(question)
        if local is not None:
            self._router.answer_dns(vif, client, reply(query, question, NOERROR, local))
        elif not self._may_ask(vif, question):
            vif.drops["DNS refused"] += 1
            self._router.answer_dns(vif, client, reply(query, question, REFUSED))
        elif self._outstanding.get(vif, 0) >= MAX_OUTSTANDING:
            raise Drop("too many DNS queries")
        else:
            self._outstanding[vif] = self._outstanding.get(vif, 0) + 1
            servers = self._servers() * ATTEMPTS
            self._new.append(_Query(vif, client, query, question, secrets.randbelow(1 << 16), servers))
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="DNS", daemon=True)
                self._thread.start()
            os.eventfd_write(self._wake, 1)

    def _local(self, question: Question) -> list[int] | None:
        name = question.name.removesuffix(LOCAL)
        found = [vif.address for vif in self._router.vifs.values() if vif.domain.lower() == name]
        if not found and name == question.name:
            return None
        return found if question.kind == A else []

    @staticmethod
    def _may_ask(vif: VifPort, question: Question) -> bool:
        if vif.policy.open:
            return True
        return question.kind in _FOR_NAMES and vif.policy.may_resolve(question.name)

    # --- on the thread

    def _run(self) -> None:
        while not self._stopping:
            waiting = [key.data for key in self._selector.get_map().values() if key.data is not None]
            now = self._router.clock()
            timeout = min((query.until - now for query in waiting), default=None)
            for key, _ in self._selector.select(None if timeout is None else max(timeout, 0)):
                if key.data is None:
                    with contextlib.suppress(BlockingIOError):
                        os.eventfd_read(self._wake)
                else:
                    self._read(key.data)
            while self._new:
                self._send(self._new.popleft())
            now = self._router.clock()
            for query in waiting:
                if query.socket is not None and query.until <= now:
                    self._send(query)
        for key in list(self._selector.get_map().values()):
            if key.data is not None:
                self._forget(key.data)

    def _send(self, query: _Query) -> None:
        """To the next server, or the domain is told that there is none."""
        self._forget(query)
        while query.servers:
            server = query.servers.pop(0)
            family = socket.AF_INET6 if ":" in server else socket.AF_INET
            try:
                sock = socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
            except OSError:  # no descriptor is free, or the host has no such addresses
                continue
            try:
                sock.connect((server, self._port))  # so that none but this server's answers come
                sock.send(query.number.to_bytes(2, "big") + query.message[2:])
            except OSError:
                sock.close()
                continue
            query.socket, query.until = sock, self._router.clock() + TIMEOUT_SECONDS
            self._selector.register(sock, selectors.EVENT_READ, query)
            return
        self._finish(query, reply(query.message, query.question, SERVFAIL))

    def _forget(self, query: _Query) -> None:
        if query.socket is not None:
            self._selector.unregister(query.socket)
            query.socket.close()
            query.socket = None

    def _read(self, query: _Query) -> None:
        assert query.socket is not None
        try:
            answer = query.socket.recv(ANSWER_BYTES)
        except OSError:
            self._send(query)
            return
        try:
            question = read_question(answer)
            number, flags, *_ = _HEADER.unpack_from(answer)
            ours = (question.name, question.kind) == (query.question.name, query.question.kind)
            if number != query.number or not flags & _QR or not ours:
                return  # somebody guesses
            found = addresses(answer, question)
        except BadMessage:
            return
        self._forget(query)
        if len(answer) > query.vif.mtu - 28:
            self._finish(query, reply(query.message, query.question, NOERROR, truncated=True))
            return
        with self._router.turns:
            for address, ttl in found:
                if not any(IPv4Address(address) in network for network in NEIGHBOURS):
                    query.vif.names.tell(address, question.name, max(MIN_TTL, min(ttl, MAX_TTL)))
        self._finish(query, query.message[:2] + answer[2:])

    def _finish(self, query: _Query, answer: bytes) -> None:
        with self._router.turns:
            left = self._outstanding[query.vif] - 1
            if left:
                self._outstanding[query.vif] = left
            else:
                del self._outstanding[query.vif]
            self._router.answer_dns(query.vif, query.client, answer)
