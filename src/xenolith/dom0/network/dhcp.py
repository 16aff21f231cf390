"""The router's DHCP server: each interface has one address, and is told it (RFC 2131, 2132)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from struct import Struct
from typing import Final

from xenolith.dom0.network.frame import Drop

SERVER_PORT: Final = 67
CLIENT_PORT: Final = 68
LEASE_SECONDS: Final = 86400

_HEADER: Final = Struct("!BBBBIHHIIII16s64s128sI")
_MAGIC: Final = 0x63825363
_BOOTREQUEST: Final = 1
_BOOTREPLY: Final = 2

_DISCOVER, _OFFER, _REQUEST, _DECLINE, _ACK, _NAK, _RELEASE, _INFORM = range(1, 9)

_SUBNET_MASK: Final = 1
_ROUTER: Final = 3
_DNS: Final = 6
_HOST_NAME: Final = 12
_MTU: Final = 26
_BROADCAST: Final = 28
_REQUESTED: Final = 50
_LEASE: Final = 51
_TYPE: Final = 53
_SERVER: Final = 54
_PAD: Final = 0
_END: Final = 255


@dataclass(frozen=True, slots=True)
class Lease:
    """What an interface is told."""

    address: int
    netmask: int
    router: int
    mtu: int
    host_name: str


def answer(message: bytes | bytearray, mac: bytes, lease: Lease) -> bytes | None:
    """The answer to a client's message, None where there is none. Raises Drop."""
    if len(message) < _HEADER.size:
        raise Drop("bad DHCP")
    op, htype, hlen, _, xid, _, flags, ciaddr, _, _, _, chaddr, _, _, magic = _HEADER.unpack_from(message)
    if (op, htype, hlen, magic) != (_BOOTREQUEST, 1, 6, _MAGIC):
        raise Drop("bad DHCP")
    if chaddr[:6] != mac:
        raise Drop("spoofed MAC")
    options = _options(message[_HEADER.size :])
    kind = options.get(_TYPE, b"")
    if len(kind) != 1:
        raise Drop("bad DHCP")
    server = options.get(_SERVER)
    if server is not None and server != _number(lease.router):
        return None  # it chose another server
    match kind[0]:
        case t if t == _DISCOVER:
            reply, address = _OFFER, lease.address
        case t if t == _REQUEST:
            wanted = options.get(_REQUESTED, _number(ciaddr))
            reply, address = (_ACK, lease.address) if wanted == _number(lease.address) else (_NAK, 0)
        case t if t == _INFORM:
            reply, address = _ACK, 0
        case _:
            return None
    confirmed = ciaddr if reply == _ACK else 0
    header = _HEADER.pack(
        _BOOTREPLY, 1, 6, 0, xid, 0, flags, confirmed, address, lease.router, 0, chaddr, b"", b"", _MAGIC
    )
    told: dict[int, bytes] = {_TYPE: bytes([reply]), _SERVER: _number(lease.router)}
    if reply != _NAK:
        told |= _told(lease)
        if address:
            told[_LEASE] = _number(LEASE_SECONDS)
    body = b"".join(bytes([code, len(value)]) + value for code, value in told.items()) + bytes([_END])
    return header + body.ljust(60, b"\0")  # BOOTP's least, 300 bytes


def _told(lease: Lease) -> Mapping[int, bytes]:
    network = lease.address & lease.netmask
    told = {
        _SUBNET_MASK: _number(lease.netmask),
        _BROADCAST: _number(network | ~lease.netmask & 0xFFFFFFFF),
        _ROUTER: _number(lease.router),
        _DNS: _number(lease.router),
        _MTU: lease.mtu.to_bytes(2, "big"),
    }
    if lease.host_name:
        told[_HOST_NAME] = lease.host_name.encode()
    return told


def _options(data: bytes | bytearray) -> dict[int, bytes]:
    """Options by code, the first of each. Raises Drop."""
    found: dict[int, bytes] = {}
    at = 0
    while at < len(data) and data[at] != _END:
        if data[at] == _PAD:
            at += 1
            continue
        if at + 2 > len(data) or at + 2 + data[at + 1] > len(data):
            raise Drop("bad DHCP")
        found.setdefault(data[at], bytes(data[at + 2 : at + 2 + data[at + 1]]))
        at += 2 + data[at + 1]
    return found


def _number(value: int) -> bytes:
    return value.to_bytes(4, "big")
