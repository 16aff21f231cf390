"""Ethernet frames as the router sees them: headers, checksums, segmentation (RFC 791, 793, 1071, 1624).

A `Frame` may be one that no wire carries: a TCP packet of up to 64 KiB that stands for many (GSO), with a checksum that
nobody has computed because nothing can have damaged it.  It stays so as long as everyone on its way can take it.

A guest may send any bytes.  `read_ipv4` accepts a packet only if every length in its headers lies inside what was
received and nothing in it is a way round a rule that looks at addresses and ports; everything else is a `Drop`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import IPv4Address
from struct import Struct
from typing import Final

import numpy as np

ETHERNET_HEADER: Final = 14
IPV4_HEADER: Final = 20  # packets with options are dropped
L4: Final = ETHERNET_HEADER + IPV4_HEADER
MAX_FRAME: Final = ETHERNET_HEADER + 65535
MTU: Final = 1500
LEAST_SEGMENT: Final = 48  # of TCP data: no sender cuts finer (Linux: TCP_MIN_SND_MSS), and cutting takes our time

ETHERTYPE_IPV4: Final = 0x0800
ETHERTYPE_ARP: Final = 0x0806
ICMP: Final = 1
TCP: Final = 6
UDP: Final = 17

BROADCAST: Final = b"\xff" * 6

ICMP_ECHO_REPLY: Final = 0
ICMP_ECHO_REQUEST: Final = 8

TCP_FIN: Final = 1
TCP_SYN: Final = 2
TCP_RST: Final = 4
TCP_PSH: Final = 8
TCP_ACK: Final = 16
TCP_CWR: Final = 128

_IPV4: Final = Struct("!BBHHHBBHII")  # version and length, TOS, total length, id, fragment, TTL, protocol, checksum
_PORTS: Final = Struct("!HH")
_WORD: Final = Struct("!H")
_ADDRESSES: Final = Struct("!II")
_CHECKSUM: Final = {TCP: 16, UDP: 6, ICMP: 2}  # where in the header
_DONT_FRAGMENT: Final = 0x4000
_MORE_FRAGMENTS: Final = 0x2000
_NUMPY_FROM: Final = 3000  # bytes from which on numpy sums faster


class Drop(Exception):
    """A packet that goes no further. The reason is one of a small set: there is a counter for each."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason: Final = reason


@dataclass(slots=True)
class Frame:
    """An Ethernet frame, with what its sender left to be done."""

    data: bytearray
    csum_blank: bool = False  # the TCP or UDP checksum's field holds the pseudo-header's sum alone
    gso_size: int = 0  # of TCP data in each of the packets that it stands for; 0: it is one


@dataclass(slots=True)
class Packet:
    """An IPv4 packet in a frame. Addresses and ports are numbers; an ICMP echo's port is its identifier."""

    frame: Frame
    protocol: int
    source: int
    destination: int
    source_port: int = 0
    destination_port: int = 0
    flags: int = 0  # TCP's
    identification: int = 0
    fragment_offset: int = 0  # bytes
    more_fragments: bool = False


def ones_sum(data: bytes | bytearray | memoryview) -> int:
    """The one's complement sum of the 16-bit words, below 65536. An odd last byte has a zero behind it."""
    size = len(data)
    if size < _NUMPY_FROM:  # a number of base 65536 is congruent to the sum of its digits, modulo 65535
        total = int.from_bytes(data, "big") << 8 * (size & 1)
        return total % 65535 or (65535 if total else 0)
    whole = size & ~3
    total = int(np.frombuffer(data, "<u4", whole >> 2).sum(dtype=np.uint64))
    total = total % 65535 or (65535 if total else 0)
    total = (total >> 8 | total << 8) & 0xFFFF  # the sum of swapped words is the swapped sum
    return fold(total + ones_sum(data[whole:])) if size & 3 else total


def fold(total: int) -> int:
    """A sum of 16-bit words with its carries added in."""
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total


def pseudo_header_sum(data: bytes | bytearray, protocol: int, l4_length: int) -> int:
    """Of an IPv4 packet's TCP or UDP."""
    return fold(ones_sum(data[26:34]) + protocol + l4_length)


def read_ipv4(frame: Frame, mtu: int = MTU) -> Packet:
    """Check an IPv4 packet and take its padding off. Raises Drop."""
    data = frame.data
    if len(data) < L4:
        raise Drop("truncated")
    version, _, total, identification, fragment, _, protocol, _, source, destination = _IPV4.unpack_from(data, 14)
    if version != 0x45:
        raise Drop("IP options" if version >> 4 == 4 and version > 0x45 else "malformed")
    if not IPV4_HEADER <= total <= len(data) - ETHERNET_HEADER:
        raise Drop("truncated")
    if ones_sum(data[14:34]) != 0xFFFF:
        raise Drop("bad checksum")
    if len(data) > ETHERNET_HEADER + total:
        del data[ETHERNET_HEADER + total :]
    if not frame.gso_size and total > mtu:
        raise Drop("oversized")
    packet = Packet(frame, protocol, source, destination)
    if fragment & ~_DONT_FRAGMENT:
        _read_fragment(packet, fragment, identification)
    if not packet.fragment_offset:
        _read_transport(packet, mtu)
    if frame.csum_blank and protocol not in (TCP, UDP):
        raise Drop("malformed")
    return packet


def _read_fragment(packet: Packet, fragment: int, identification: int) -> None:
    if fragment & 0x8000 or packet.frame.gso_size or packet.frame.csum_blank or packet.protocol == TCP:
        raise Drop("bad fragment")  # TCP never needs them: it knows the MTU
    packet.identification = identification
    packet.fragment_offset = (fragment & 0x1FFF) << 3
    packet.more_fragments = bool(fragment & _MORE_FRAGMENTS)
    length = len(packet.frame.data) - L4
    if (packet.more_fragments and length & 7) or packet.fragment_offset + length > 65535 - IPV4_HEADER or not length:
        raise Drop("bad fragment")


def _read_transport(packet: Packet, mtu: int) -> None:
    data, protocol = packet.frame.data, packet.protocol
    length = len(data) - L4
    if protocol == TCP:
        if length < 20 or not 20 <= (header := data[L4 + 12] >> 4 << 2) <= length:
            raise Drop("truncated")
        packet.flags = data[L4 + 13]
        if packet.frame.gso_size:
            if not packet.frame.csum_blank or packet.frame.gso_size > mtu - IPV4_HEADER - header:
                raise Drop("malformed")
            if length - header <= packet.frame.gso_size:
                packet.frame.gso_size = 0  # it is one packet
            elif packet.flags & (TCP_SYN | TCP_RST) or packet.frame.gso_size < LEAST_SEGMENT:
                raise Drop("malformed")
    elif packet.frame.gso_size:
        raise Drop("malformed")
    elif protocol == UDP:
        if length < 8:
            raise Drop("truncated")
        claimed = _WORD.unpack_from(data, L4 + 4)[0]
        if claimed < 8 or (claimed <= length if packet.more_fragments else claimed != length):
            raise Drop("malformed")
    elif protocol == ICMP:
        if length < 8:
            raise Drop("truncated")
        identifier = _WORD.unpack_from(data, L4 + 4)[0]
        if data[L4] == ICMP_ECHO_REQUEST:
            packet.source_port = identifier
        elif data[L4] == ICMP_ECHO_REPLY:
            packet.destination_port = identifier
        return
    else:
        raise Drop("protocol")
    packet.source_port, packet.destination_port = _PORTS.unpack_from(data, L4)


def rewrite(
    packet: Packet,
    source: int | None = None,
    source_port: int | None = None,
    destination: int | None = None,
    destination_port: int | None = None,
) -> None:
    """Change addresses and ports; an ICMP echo has one identifier, its source's or its destination's port.

    The checksums follow by what changed (RFC 1624), so that one that was wrong stays wrong.
    """
    frame, protocol = packet.frame, packet.protocol
    data = frame.data
    old_addresses, old_ports = bytes(data[26:34]), b""
    if source is not None:
        data[26:30] = source.to_bytes(4, "big")
        packet.source = source
    if destination is not None:
        data[30:34] = destination.to_bytes(4, "big")
        packet.destination = destination
    new_addresses = data[26:34]
    _adjust(data, 24, old_addresses, new_addresses)
    if packet.fragment_offset:
        return
    new_ports = b""
    if protocol in (TCP, UDP):
        old_ports = bytes(data[L4 : L4 + 4])
        if source_port is not None:
            packet.source_port = source_port
        if destination_port is not None:
            packet.destination_port = destination_port
        _PORTS.pack_into(data, L4, packet.source_port, packet.destination_port)
        new_ports = bytes(data[L4 : L4 + 4])
    elif protocol == ICMP and data[L4] in (ICMP_ECHO_REPLY, ICMP_ECHO_REQUEST):
        identifier = source_port if data[L4] == ICMP_ECHO_REQUEST else destination_port
        if identifier is not None:
            old_ports = bytes(data[L4 + 4 : L4 + 6])
            new_ports = identifier.to_bytes(2, "big")
            data[L4 + 4 : L4 + 6] = new_ports
    at = L4 + _CHECKSUM[protocol]
    if frame.csum_blank:
        _WORD.pack_into(data, at, pseudo_header_sum(data, protocol, len(data) - L4))
    elif protocol == ICMP:
        _adjust(data, at, old_ports, new_ports)
    elif protocol == TCP or data[at : at + 2] != b"\0\0":  # UDP without a checksum stays so
        _adjust(data, at, old_addresses + old_ports, bytes(new_addresses) + new_ports)
        if protocol == UDP and data[at : at + 2] == b"\0\0":
            data[at : at + 2] = b"\xff\xff"


def _adjust(data: bytearray, at: int, old: bytes, new: bytes | bytearray) -> None:
    """Make the checksum at `at` that of data in which `old` became `new`."""
    checksum = _WORD.unpack_from(data, at)[0]
    total = (~checksum & 0xFFFF) + (~ones_sum(old) & 0xFFFF) + ones_sum(new)
    _WORD.pack_into(data, at, ~fold(total) & 0xFFFF)


def decrement_ttl(packet: Packet) -> None:
    """As a router must. Raises Drop."""
    data = packet.frame.data
    if data[22] <= 1:
        raise Drop("TTL")
    old = bytes(data[22:24])
    data[22] -= 1
    _adjust(data, 24, old, data[22:24])


def fill_checksum(frame: Frame) -> None:
    """Compute the checksum that the sender left out."""
    if not frame.csum_blank:
        return
    data = frame.data
    protocol = data[23]
    at = L4 + _CHECKSUM[protocol]
    length = len(data) - L4
    data[at : at + 2] = b"\0\0"
    checksum = ~fold(ones_sum(memoryview(data)[L4:]) + pseudo_header_sum(data, protocol, length)) & 0xFFFF
    if protocol == UDP and not checksum:
        checksum = 0xFFFF
    _WORD.pack_into(data, at, checksum)
    frame.csum_blank = False


def blank_checksum(frame: Frame) -> None:
    """Leave the checksum of a TCP packet to whoever needs it."""
    _WORD.pack_into(frame.data, L4 + 16, pseudo_header_sum(frame.data, TCP, len(frame.data) - L4))
    frame.csum_blank = True


def tcp_payload(data: bytes | bytearray) -> int:
    """The offset of a TCP packet's data in its frame."""
    return L4 + (data[L4 + 12] >> 4 << 2)


def segments(frame: Frame) -> Iterator[Frame]:
    """The packets that a TCP frame stands for, each with its checksums (what a network card does for TSO)."""
    if not frame.gso_size:
        fill_checksum(frame)
        yield frame
        return
    data, size = frame.data, frame.gso_size
    start = tcp_payload(data)
    header = data[:start]
    sequence = int.from_bytes(header[L4 + 4 : L4 + 8], "big")
    identification = _WORD.unpack_from(header, 18)[0]
    flags = header[L4 + 13]
    for number, at in enumerate(range(start, len(data), size)):
        piece = header + data[at : at + size]
        last = at + size >= len(data)
        _WORD.pack_into(piece, 16, len(piece) - ETHERNET_HEADER)
        _WORD.pack_into(piece, 18, identification + number & 0xFFFF)
        _WORD.pack_into(piece, 24, 0)
        _WORD.pack_into(piece, 24, ~ones_sum(piece[14:34]) & 0xFFFF)
        piece[L4 + 4 : L4 + 8] = (sequence + at - start & 0xFFFFFFFF).to_bytes(4, "big")
        piece[L4 + 13] = flags & ~(0 if last else TCP_FIN | TCP_PSH) & ~(TCP_CWR if number else 0)
        cut = Frame(piece, csum_blank=True)
        fill_checksum(cut)
        yield cut


def set_mss(packet: Packet, mss: int) -> None:
    """Write a maximum segment size into a SYN that has one."""
    data = packet.frame.data
    at, end = L4 + 20, tcp_payload(data)
    while at < end and data[at]:
        if data[at] == 1:
            at += 1
            continue
        length = data[at + 1] if at + 1 < end else 0
        if length < 2 or at + length > end:
            return
        if data[at] == 2 and length == 4:
            old = bytes(data[at + 2 : at + 4])
            _WORD.pack_into(data, at + 2, mss)
            if packet.frame.csum_blank:
                return
            if (at - L4) & 1:
                packet.frame.csum_blank = True  # its bytes straddle words of the sum
                fill_checksum(packet.frame)
            else:
                _adjust(data, L4 + 16, old, data[at + 2 : at + 4])
            return
        at += length


def ethernet(destination: bytes, source: bytes, ethertype: int) -> bytearray:
    """A header."""
    return bytearray(destination + source + ethertype.to_bytes(2, "big"))


def ipv4(protocol: int, source: int, destination: int, payload: bytes, ttl: int = 64) -> bytes:
    """A packet of our own; TCP and UDP checksums are the caller's."""
    header = bytearray(
        _IPV4.pack(0x45, 0, IPV4_HEADER + len(payload), 0, _DONT_FRAGMENT, ttl, protocol, 0, source, destination)
    )
    _WORD.pack_into(header, 10, ~ones_sum(header) & 0xFFFF)
    return bytes(header) + payload


def udp(source: int, source_port: int, destination: int, destination_port: int, payload: bytes) -> bytes:
    """An IPv4 packet with a datagram in it."""
    length = 8 + len(payload)
    datagram = bytearray(_PORTS.pack(source_port, destination_port) + _PORTS.pack(length, 0) + payload)
    total = fold(ones_sum(datagram) + ones_sum(_ADDRESSES.pack(source, destination)) + UDP + length)
    _WORD.pack_into(datagram, 6, ~total & 0xFFFF or 0xFFFF)
    return ipv4(UDP, source, destination, bytes(datagram))


def tcp_reset(packet: Packet) -> bytes | None:
    """The IPv4 packet that ends the connection of a TCP packet with an acknowledgement (RFC 9293, 3.10.7.1)."""
    if packet.protocol != TCP or packet.flags & (TCP_ACK | TCP_RST) != TCP_ACK:
        return None
    acknowledged = bytes(packet.frame.data[L4 + 8 : L4 + 12])
    ports = _PORTS.pack(packet.destination_port, packet.source_port)
    header = bytearray(ports + acknowledged + bytes(4) + bytes((5 << 4, TCP_RST)) + bytes(6))
    addresses = _ADDRESSES.pack(packet.destination, packet.source)
    _WORD.pack_into(header, 16, ~fold(ones_sum(header) + ones_sum(addresses) + TCP + len(header)) & 0xFFFF)
    return ipv4(TCP, packet.destination, packet.source, bytes(header))


def address_text(address: int) -> str:
    """An IPv4 address for people."""
    return str(IPv4Address(address))


def mac_text(mac: bytes | bytearray) -> str:
    return mac.hex(":")
