"""The virtual firewall-router to which every virtual interface is attached (paper 3.4.1, "VFR").

It looks like a router with a network behind it on which all domains are: it answers every ARP request for another
machine itself, so that a frame goes by its IP destination, never by a MAC address that somebody claimed.  A domain
receives what is meant for its address and nothing else; what it sends must have its MAC and its IP address.  No
broadcast and no multicast goes from domain to domain; DHCP, ARP and DNS are answered here.  Only IPv4 is routed.

Each packet is of a connection (`flows`); a new one is judged by the rules of the domain that opens it and of the domain
that it is opened to (`rules`).  A change of any rules lets each connection be judged again by its next packet.

`receive` is called in the port's turn (`turns`), and so is all that changes the router.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from hashlib import sha256
from ipaddress import IPv4Address, IPv4Network
from struct import Struct
from typing import Final, Protocol

from xenolith.dom0.network import dhcp
from xenolith.dom0.network.fair import Turns
from xenolith.dom0.network.flows import Flows, Path, key_of
from xenolith.dom0.network.frame import (
    BROADCAST,
    ETHERNET_HEADER,
    ETHERTYPE_ARP,
    ETHERTYPE_IPV4,
    ICMP,
    ICMP_ECHO_REPLY,
    ICMP_ECHO_REQUEST,
    IPV4_HEADER,
    L4,
    TCP,
    TCP_ACK,
    TCP_SYN,
    UDP,
    Drop,
    Frame,
    Packet,
    blank_checksum,
    decrement_ttl,
    ethernet,
    fill_checksum,
    ones_sum,
    read_ipv4,
    rewrite,
    segments,
    set_mss,
    tcp_payload,
    tcp_reset,
    udp,
)
from xenolith.dom0.network.port import Capture, Port, Publication, RemotePort, UplinkPort, VifPort
from xenolith.dom0.network.rules import Direction, Peer, Policy, Rule

ROUTER_MAC: Final = bytes.fromhex("02 58 65 6e 00 01")
DEFAULT_NETWORK: Final = IPv4Network("10.213.0.0/16")
DNS_PORT: Final = 53
MAX_FRAGMENTED: Final = 256  # datagrams of one port's of which more fragments may come
MAX_PASST_FRAME: Final = 65535

_ARP: Final = Struct("!HHBBH6sI6sI")
_MARTIANS: Final = tuple(
    (int(network.network_address), int(network.netmask))
    for network in map(IPv4Network, ("0.0.0.0/8", "127.0.0.0/8", "169.254.0.0/16", "192.0.0.0/24", "224.0.0.0/3"))
)


class Resolver(Protocol):
    """Whoever answers DNS queries."""

    def ask(self, vif: VifPort, client: tuple[int, int], query: bytes) -> None:
        """In the router's turn: a domain's query from this address and port. Raises Drop."""


class TrunkEnd(Protocol):
    """Whoever tells the router at the other end of a trunk which interfaces are here. In the router's turn."""

    def announce(self, vif: VifPort) -> None: ...

    def withdraw(self, address: int) -> None: ...


class AddressError(ValueError):
    """An interface cannot have the address, or none is left."""


class Router:
    """The virtual firewall-router of a machine."""

    def __init__(self, network: IPv4Network = DEFAULT_NETWORK, clock: Callable[[], float] = time.monotonic) -> None:
        self.network: Final = network
        self.address: Final = int(network.network_address) + 1
        self.netmask: Final = int(network.netmask)
        self.turns: Final = Turns()
        self.clock: Final = clock
        self.flows: Final = Flows()
        self.uplink: UplinkPort | None = None
        self.open_uplink: Callable[[], UplinkPort | None] = lambda: None
        """Called in a turn when a domain that may reach the outside does so for the first time."""
        self.resolver: Resolver | None = None
        self.vifs: Final[dict[int, VifPort]] = {}  # by address
        self.remotes: Final[dict[int, RemotePort]] = {}  # by address: interfaces at the other end of a trunk
        self._left: Final[dict[int, VifPort]] = {}  # those here that one of them has the address of: they went there
        self._trunks: Final[list[TrunkEnd]] = []
        self._generation = 0  # of the rules
        self._numbers = 0
        self._fragments: Final[dict[Port, dict[tuple[int, int, int, int], Path]]] = {}

    # --- ports, in the router's turn ------------------------------------------------------------------------

    def number(self) -> int:
        """One that no other port has."""
        self._numbers += 1
        return self._numbers

    def address_for(self, mac: bytes, wanted: str | None = None) -> int:
        """A free address: the wanted one, or one that follows from the MAC, the same ever again if possible.

        Raises AddressError.
        """
        if wanted is not None:
            try:
                address = int(IPv4Address(wanted))
            except ValueError as error:
                raise AddressError(f"{wanted!r} is no IPv4 address") from error
            if not self._is_host(address):
                raise AddressError(f"{wanted} is no host of {self.network}, in which all interfaces are")
            if not self._is_free(address, mac):
                raise AddressError(f"another interface has the address {wanted}")
            return address
        size = self.network.num_addresses
        first = int.from_bytes(sha256(mac).digest()[:4], "big")
        for attempt in range(size):
            address = int(self.network.network_address) + (first + attempt) % size
            if self._is_host(address) and self._is_free(address, mac):
                return address
        raise AddressError(f"no address of {self.network} is left")

    def _is_host(self, address: int) -> bool:
        return (
            IPv4Address(address) in self.network
            and address not in (int(self.network.network_address), self.address)
            and address != int(self.network.broadcast_address)
        )

    def _is_free(self, address: int, mac: bytes) -> bool:
        """Also where it is that of the same interface, which comes here from elsewhere."""
        remote = self.remotes.get(address)
        return address not in self.vifs and (remote is None or remote.mac == mac)

    def attach(self, vif: VifPort) -> None:
        """Let an interface take part."""
        self.vifs[vif.address] = vif
        self.change_policy(vif, vif.policy)
        remote = self.remotes.get(vif.address)
        if remote is not None:
            self.flows.forget_port(remote)
        for trunk in self._trunks:
            trunk.announce(vif)

    def attach_uplink(self, uplink: UplinkPort, publications: Iterable[tuple[VifPort, Publication]] = ()) -> None:
        """Let a way to the outside be used for these published ports."""
        for vif, publication in publications:
            uplink.published[publication.protocol, publication.host_port] = (vif, publication.guest_port)

    def detach(self, port: Port) -> None:
        """A port takes part no more."""
        if isinstance(port, VifPort):
            if self.vifs.get(port.address) is port:
                del self.vifs[port.address]
                for trunk in self._trunks:
                    trunk.withdraw(port.address)
            if self._left.get(port.address) is port:
                del self._left[port.address]
        if port is self.uplink:
            self.uplink = None
        self.flows.forget_port(port)
        self._fragments.clear()
        port.queue.clear()
        for capture in port.captures:
            capture.close()

    def attach_trunk(self, trunk: TrunkEnd) -> None:
        """Tell a trunk of all interfaces, from now on."""
        self._trunks.append(trunk)
        for vif in self.vifs.values():
            trunk.announce(vif)

    def detach_trunk(self, trunk: TrunkEnd) -> None:
        self._trunks.remove(trunk)

    def attach_remote(self, remote: RemotePort) -> bool:
        """An interface is elsewhere, where one with the same MAC went if it was here; False where another is here."""
        vif = self.vifs.get(remote.address)
        if not self._is_host(remote.address) or (vif is not None and vif.mac != remote.mac):
            return False
        if vif is not None:
            del self.vifs[remote.address]
            self._left[remote.address] = vif
            self.flows.forget_port(vif)
            while (frame := vif.queue.take()) is not None:  # what its domain has not taken yet
                remote.send(0, frame)
        former = self.remotes.get(remote.address)
        if former is not None:
            self.flows.forget_port(former)
        self.remotes[remote.address] = remote
        return True

    def detach_remote(self, remote: RemotePort) -> None:
        """It is there no more; the one that went there has come back if it is still here."""
        if self.remotes.get(remote.address) is remote:
            del self.remotes[remote.address]
            vif = self._left.pop(remote.address, None)
            if vif is not None:
                self.attach(vif)
        self.flows.forget_port(remote)
        self._fragments.clear()
        remote.queue.clear()

    def change_policy(self, vif: VifPort, policy: Policy) -> None:
        """Other rules for an interface, from the next packet on."""
        vif.policy = policy
        self._generation += 1

    def capture(self, port: Port) -> Capture:
        """Begin to copy a port's frames. In no turn."""
        capture = Capture()
        with self.turns:
            port.captures = (*port.captures, capture)
        return capture

    def end_capture(self, port: Port, capture: Capture) -> None:
        """In no turn."""
        with self.turns:
            port.captures = tuple(each for each in port.captures if each is not capture)
        capture.close()

    # --- frames, in the sender's turn --------------------------------------------------------------------------

    def receive(self, port: Port, frame: Frame) -> None:
        """A frame from the other end of a port. What it does not deliver it counts."""
        statistics = port.statistics
        statistics.tx_packets += 1
        statistics.tx_bytes += len(frame.data)
        for capture in port.captures:
            capture.note(frame)
        if isinstance(port, VifPort) and port.plug is not None:
            if not port.plug.hold(frame):
                statistics.tx_dropped += 1
                port.drops["not acknowledged"] += 1
            return
        self.forward(port, frame)

    def forward(self, port: Port, frame: Frame) -> None:
        """The same for a frame that was counted already."""
        statistics = port.statistics
        try:
            if isinstance(port, VifPort):
                self._from_domain(port, frame)
            elif isinstance(port, RemotePort):
                self._from_elsewhere(port, frame)
            else:
                assert isinstance(port, UplinkPort)
                self._from_outside(port, frame)
        except Drop as drop:
            statistics.tx_dropped += 1
            port.drops[drop.reason] += 1

    def _from_domain(self, vif: VifPort, frame: Frame) -> None:
        data = frame.data
        if len(data) < ETHERNET_HEADER:
            raise Drop("truncated")
        if data[6:12] != vif.mac:
            raise Drop("spoofed MAC")
        ethertype = data[12] << 8 | data[13]
        if ethertype == ETHERTYPE_ARP:
            self._answer_arp(vif, data)
            return
        if ethertype != ETHERTYPE_IPV4:
            raise Drop("not IPv4")
        packet = read_ipv4(frame, vif.mtu)
        if self._is_dhcp(packet):
            self._answer_dhcp(vif, packet)
            return
        if packet.source != vif.address:
            raise Drop("spoofed IP")
        if data[0:6] != ROUTER_MAC:
            raise Drop("multicast" if data[0] & 1 else "another's MAC")
        if packet.destination == self.address:
            self._for_router(vif, packet)
            return
        path = self._known_path(vif, packet) or self._new_path(vif, packet)
        self._deliver(vif, packet, path)

    def _from_elsewhere(self, remote: RemotePort, frame: Frame) -> None:
        """From a domain of another daemon's, to one of ours."""
        packet = read_ipv4(frame, remote.mtu)
        vif = self.vifs.get(packet.destination)
        if vif is None or self.remotes.get(packet.source) is not remote:
            raise Drop("no host")
        path = self._known_path(remote, packet)
        if path is None:
            path = self._judged(self.flows.open(remote, vif, packet, self._generation, self.clock()), packet)
        self._deliver(remote, packet, path)

    def _from_outside(self, uplink: UplinkPort, frame: Frame) -> None:
        data = frame.data
        if len(data) < ETHERNET_HEADER:
            raise Drop("truncated")
        ethertype = data[12] << 8 | data[13]
        if ethertype == ETHERTYPE_ARP:
            self._outside_arp(uplink, data)
            return
        if ethertype != ETHERTYPE_IPV4:
            raise Drop("not IPv4")
        if data[0:6] not in (uplink.own_mac, bytes(6)):  # passt sends so until it has heard from us
            raise Drop("multicast" if data[0] & 1 else "another's MAC")
        packet = read_ipv4(frame, uplink.mtu)
        if packet.destination != uplink.address or packet.source & self.netmask == int(self.network.network_address):
            raise Drop("martian")
        path = self._known_path(uplink, packet) or self._new_path_inwards(uplink, packet)
        self._deliver(uplink, packet, path)

    # --- connections -------------------------------------------------------------------------------------------

    def _known_path(self, port: Port, packet: Packet) -> Path | None:
        """The way of a packet whose connection is known and allowed. Raises Drop where it is denied."""
        if packet.fragment_offset:
            path = self._fragments.get(port, {}).get(_datagram(packet))
            if path is None:
                raise Drop("bad fragment")
            return self._still_allowed(path, packet)
        if packet.protocol == ICMP and packet.frame.data[L4] not in (ICMP_ECHO_REQUEST, ICMP_ECHO_REPLY):
            return self._path_of_error(port, packet)
        path = self.flows.find(key_of(port, packet), self.clock())
        return None if path is None else self._still_allowed(path, packet)

    def _still_allowed(self, path: Path, packet: Packet) -> Path:
        """The same way, judged anew if any rules have changed. Raises Drop."""
        if path.flow.generation != self._generation:
            self._judge(path)
        return self._if_allowed(path, packet)

    def _new_path(self, vif: VifPort, packet: Packet) -> Path:
        """A connection that a domain opens."""
        destination = packet.destination
        if packet.protocol == ICMP and packet.frame.data[L4] == ICMP_ECHO_REPLY:
            raise Drop("no connection")
        if destination & self.netmask == int(self.network.network_address):
            target = self.vifs.get(destination) or self.remotes.get(destination)
            if target is None:
                raise Drop("no host")
            path = self.flows.open(vif, target, packet, self._generation, self.clock())
        else:
            if any(destination & mask == network for network, mask in _MARTIANS):
                raise Drop("martian")
            uplink = vif.uplink or self.uplink or self._uplink_for(vif, packet)
            if packet.protocol == TCP and packet.flags & (TCP_SYN | TCP_ACK) != TCP_SYN:
                self._reset(vif, packet)  # it was one where the domain was before
                raise Drop("no connection")
            path = self.flows.open_outwards(vif, uplink, uplink.address, packet, self._generation, self.clock())
        return self._judged(path, packet)

    @staticmethod
    def _reset(vif: VifPort, packet: Packet) -> None:
        """Tell a domain that a connection of its is no more."""
        reset = tcp_reset(packet)
        if reset is not None:
            vif.send(0, Frame(ethernet(vif.mac, ROUTER_MAC, ETHERTYPE_IPV4) + reset))

    def _uplink_for(self, vif: VifPort, packet: Packet) -> UplinkPort:
        """Open the way to the outside, for a packet that may go there. Raises Drop."""
        peer = Peer(packet.destination, None, vif.names.of)
        if not vif.policy.verdict(Direction.OUT, packet.protocol, packet.destination_port, peer)[0]:
            raise Drop("denied")
        self.uplink = self.open_uplink()
        if self.uplink is None:
            raise Drop("no uplink")
        return self.uplink

    def _new_path_inwards(self, uplink: UplinkPort, packet: Packet) -> Path:
        """A connection to a published port."""
        found = uplink.published.get((packet.protocol, packet.destination_port))
        if found is None or (packet.protocol == TCP and packet.flags & (TCP_SYN | TCP_ACK) != TCP_SYN):
            raise Drop("no connection")
        vif, port = found
        path = self.flows.open_inwards(uplink, vif, vif.address, port, packet, self._generation, self.clock())
        return self._judged(path, packet)

    def _judged(self, path: Path, packet: Packet) -> Path:
        self._judge(path)
        return self._if_allowed(path, packet)

    def _if_allowed(self, path: Path, packet: Packet) -> Path:
        if not path.flow.allowed:
            self._count(path, packet)
            raise Drop("denied")
        return path

    def _judge(self, path: Path) -> None:
        """Ask the rules of both ends about a connection."""
        flow = path.flow
        origin, target = flow.origin, flow.target
        _, protocol, source, _, _, _ = flow.key
        allowed = True
        rules: list[Rule] = []
        if isinstance(origin, VifPort):
            peer = Peer(flow.destination, _domain_of(target), origin.names.of)
            allowed, rule = origin.policy.verdict(Direction.OUT, protocol, flow.destination_port, peer)
            rules += [rule] if rule else []
        if allowed and isinstance(target, VifPort):
            peer = Peer(source, _domain_of(origin), target.names.of)
            allowed, rule = target.policy.verdict(Direction.IN, protocol, flow.destination_port, peer)
            rules += [rule] if rule else []
        flow.allowed, flow.rules, flow.generation = allowed, tuple(rules), self._generation

    def _count(self, path: Path, packet: Packet) -> None:
        for rule in path.flow.rules:
            rule.packets += 1
            rule.bytes += len(packet.frame.data)

    def _path_of_error(self, port: Port, packet: Packet) -> Path:
        """Where an ICMP error goes: to whoever sent the packet that it is about. Raises Drop."""
        data = packet.frame.data
        inner = L4 + 8
        if data[L4] not in (3, 11) or len(data) < inner + IPV4_HEADER + 8 or data[inner] != 0x45:
            raise Drop("ICMP")
        protocol = data[inner + 9]
        source, destination = (int.from_bytes(data[inner + at : inner + at + 4], "big") for at in (12, 16))
        source_port, destination_port = (
            int.from_bytes(data[inner + at : inner + at + 2], "big") for at in (IPV4_HEADER, IPV4_HEADER + 2)
        )
        if protocol not in (TCP, UDP):
            raise Drop("ICMP")
        key = (port.number, protocol, destination, destination_port, source, source_port)
        path = self.flows.find(key, self.clock())
        if path is None:
            raise Drop("ICMP")
        self._still_allowed(path, packet)
        if path.source is not None:
            raise Drop("ICMP")  # of a published port's connection: it would tell the domain's own address
        if path.destination is not None and path.destination_port is not None:
            old = bytes(data[inner:])
            data[inner + 12 : inner + 16] = path.destination.to_bytes(4, "big")
            data[inner + 20 : inner + 22] = path.destination_port.to_bytes(2, "big")
            if old != data[inner:]:
                self._sum_icmp(packet.frame)
        return path

    @staticmethod
    def _sum_icmp(frame: Frame) -> None:
        data = frame.data
        data[L4 + 2 : L4 + 4] = b"\0\0"
        data[L4 + 2 : L4 + 4] = (~ones_sum(memoryview(data)[L4:]) & 0xFFFF).to_bytes(2, "big")

    # --- on to its receiver ----------------------------------------------------------------------------------------

    def _deliver(self, sender: Port, packet: Packet, path: Path) -> None:
        frame, receiver = packet.frame, path.port
        self._count(path, packet)
        self.flows.note(path.flow, packet, self.clock())
        if packet.more_fragments and not packet.fragment_offset:
            self._note_fragmented(sender, packet, path)
        outside = isinstance(sender, UplinkPort) or isinstance(receiver, UplinkPort)
        if outside:
            decrement_ttl(packet)
            if packet.flags & TCP_SYN and packet.protocol == TCP:
                set_mss(packet, min(receiver.mtu, MAX_PASST_FRAME - 14) - 40)
        if path.translates:
            rewrite(packet, path.source, path.source_port, path.destination, path.destination_port)
        data = frame.data
        data[0:6] = receiver.mac
        if isinstance(receiver, UplinkPort):
            data[6:12] = receiver.own_mac
            self._send_outside(sender, receiver, frame)
            return
        data[6:12] = ROUTER_MAC
        if not frame.gso_size and len(data) > receiver.mtu + ETHERNET_HEADER:
            if packet.protocol != TCP:
                raise Drop("oversized")
            frame.gso_size = receiver.mtu + ETHERNET_HEADER - tcp_payload(data)
            blank_checksum(frame)
        receiver.send(sender.number, frame)

    def _send_outside(self, sender: Port, uplink: UplinkPort, frame: Frame) -> None:
        if frame.gso_size and len(frame.data) > uplink.mtu + ETHERNET_HEADER:
            for segment in segments(frame):
                uplink.send(sender.number, segment)
            return
        frame.gso_size = 0
        fill_checksum(frame)
        uplink.send(sender.number, frame)

    def _note_fragmented(self, port: Port, packet: Packet, path: Path) -> None:
        known = self._fragments.setdefault(port, {})
        if len(known) >= MAX_FRAGMENTED:
            del known[next(iter(known))]
        known[_datagram(packet)] = path

    # --- what the router answers itself -----------------------------------------------------------------------------

    def _answer_arp(self, vif: VifPort, data: bytearray) -> None:
        """ARP (RFC 826): whoever of this network is asked for, it is us."""
        if len(data) < ETHERNET_HEADER + _ARP.size:
            raise Drop("truncated")
        hardware, protocol, hlen, plen, operation, mac, address, _, target = _ARP.unpack_from(data, ETHERNET_HEADER)
        if (hardware, protocol, hlen, plen) != (1, ETHERTYPE_IPV4, 6, 4):
            raise Drop("malformed")
        if mac != vif.mac:
            raise Drop("spoofed MAC")
        if address not in (0, vif.address):
            raise Drop("spoofed IP")
        if operation != 1 or target == vif.address or target & self.netmask != int(self.network.network_address):
            return
        if not address and target != self.address and target not in self.vifs and target not in self.remotes:
            return  # is anybody there? (RFC 5227)
        reply = _ARP.pack(1, ETHERTYPE_IPV4, 6, 4, 2, ROUTER_MAC, target, vif.mac, address)
        vif.send(0, Frame(ethernet(vif.mac, ROUTER_MAC, ETHERTYPE_ARP) + reply))

    def _outside_arp(self, uplink: UplinkPort, data: bytearray) -> None:
        if len(data) < ETHERNET_HEADER + _ARP.size:
            raise Drop("truncated")
        hardware, protocol, hlen, plen, operation, mac, address, _, target = _ARP.unpack_from(data, ETHERNET_HEADER)
        if (hardware, protocol, hlen, plen) != (1, ETHERTYPE_IPV4, 6, 4):
            raise Drop("malformed")
        if address == uplink.gateway:
            uplink.mac = mac
        if operation == 1 and target == uplink.address:
            reply = _ARP.pack(1, ETHERTYPE_IPV4, 6, 4, 2, uplink.own_mac, target, mac, address)
            uplink.send(0, Frame(ethernet(mac, uplink.own_mac, ETHERTYPE_ARP) + reply))

    def ask_for_gateway(self, uplink: UplinkPort) -> None:
        """Find out an uplink's gateway's MAC."""
        question = _ARP.pack(1, ETHERTYPE_IPV4, 6, 4, 1, uplink.own_mac, uplink.address, bytes(6), uplink.gateway)
        uplink.send(0, Frame(ethernet(BROADCAST, uplink.own_mac, ETHERTYPE_ARP) + question))

    def _is_dhcp(self, packet: Packet) -> bool:
        return (
            packet.protocol == UDP
            and packet.destination_port == dhcp.SERVER_PORT
            and packet.source_port == dhcp.CLIENT_PORT
            and packet.destination in (0xFFFFFFFF, self.address)
            and not packet.more_fragments
        )

    def _answer_dhcp(self, vif: VifPort, packet: Packet) -> None:
        if packet.source not in (0, vif.address):
            raise Drop("spoofed IP")
        lease = dhcp.Lease(vif.address, self.netmask, self.address, vif.mtu, _host_name(vif.domain))
        reply = dhcp.answer(packet.frame.data[L4 + 8 :], vif.mac, lease)
        if reply is None:
            return
        to = packet.source or 0xFFFFFFFF
        datagram = udp(self.address, dhcp.SERVER_PORT, to, dhcp.CLIENT_PORT, reply)
        mac = vif.mac if packet.source else BROADCAST
        vif.send(0, Frame(ethernet(mac, ROUTER_MAC, ETHERTYPE_IPV4) + datagram))

    def _for_router(self, vif: VifPort, packet: Packet) -> None:
        data = packet.frame.data
        if packet.fragment_offset or packet.more_fragments:
            raise Drop("bad fragment")
        if packet.protocol == ICMP and data[L4] == ICMP_ECHO_REQUEST:
            rewrite(packet, source=self.address, destination=vif.address)
            data[L4] = ICMP_ECHO_REPLY
            self._sum_icmp(packet.frame)
            data[0:12] = vif.mac + ROUTER_MAC
            vif.send(0, packet.frame)
        elif packet.protocol == UDP and packet.destination_port == DNS_PORT and self.resolver is not None:
            self.resolver.ask(vif, (packet.source, packet.source_port), bytes(data[L4 + 8 :]))
        else:
            raise Drop("closed port")

    def answer_dns(self, vif: VifPort, client: tuple[int, int], answer: bytes) -> None:
        """The resolver's answer, in its turn."""
        if self.vifs.get(vif.address) is not vif:
            return
        datagram = udp(self.address, DNS_PORT, *client, answer)
        if len(datagram) <= vif.mtu:
            vif.send(0, Frame(ethernet(vif.mac, ROUTER_MAC, ETHERTYPE_IPV4) + datagram))


def _domain_of(port: Port) -> str | None:
    """Whose interface it is."""
    return port.domain if isinstance(port, VifPort | RemotePort) else None


def _datagram(packet: Packet) -> tuple[int, int, int, int]:
    """What all fragments of a datagram have in common (RFC 791)."""
    return packet.protocol, packet.source, packet.destination, packet.identification


def _host_name(domain: str) -> str:
    """A domain's name as a host's, if it is one."""
    name = domain.lower()
    return name if 0 < len(name) < 64 and name.replace("-", "").isalnum() and name.isascii() else ""
