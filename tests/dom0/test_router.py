"""The virtual firewall-router, frame by frame."""

from __future__ import annotations

import random
import struct
from collections import Counter

import pytest

from xenolith.dom0.network.dhcp import CLIENT_PORT, SERVER_PORT
from xenolith.dom0.network.fair import FRAME_BYTES, LIMIT_BYTES, QUANTUM, FairQueue, Turns
from xenolith.dom0.network.frame import (
    BROADCAST,
    ICMP,
    TCP_ACK,
    TCP_SYN,
    UDP,
    Frame,
    Packet,
    ethernet,
    fill_checksum,
    ipv4,
    ones_sum,
    read_ipv4,
    rewrite,
    segments,
    udp,
)
from xenolith.dom0.network.port import MAX_PLUGGED, Plug, Publication, UplinkPort, VifPort
from xenolith.dom0.network.router import DEFAULT_NETWORK, ROUTER_MAC, AddressError, Router
from xenolith.dom0.network.rules import Policy, parse_rules

from .netfront import checksum, checksums_are_right, number, tcp_segment

OUTSIDE = number("198.51.100.1")
PUBLIC = number("192.0.0.2")
GATEWAY_MAC = b"\x02gate!"[:6]


class World:
    """A router with interfaces, an uplink, and a clock that the test turns."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.router = Router(clock=lambda: self.now)

    def vif(self, name: str, rules: str = "", mtu: int = 1500) -> VifPort:
        mac = b"\0\x16\x3e\0\0" + bytes([len(self.router.vifs) + 1])
        vif = VifPort(
            self.router.number(),
            name,
            lambda: None,
            domain=name,
            mac=mac,
            address=self.router.address_for(mac),
            policy=Policy(parse_rules(rules)),
            clock=lambda: self.now,
            mtu=mtu,
        )
        self.router.attach(vif)
        return vif

    def uplink(self, mtu: int = 1500) -> UplinkPort:
        uplink = UplinkPort(
            self.router.number(), "up", lambda: None, mac=b"\x02uplnk", address=PUBLIC, gateway=PUBLIC - 1, mtu=mtu
        )
        uplink.mac = GATEWAY_MAC
        self.router.uplink = uplink
        return uplink

    def send(self, vif: VifPort, packet: bytes, gso_size: int = 0) -> None:
        data = ethernet(ROUTER_MAC, vif.mac, 0x0800) + packet
        self.router.receive(vif, Frame(data, bool(gso_size), gso_size))

    def arrive(self, uplink: UplinkPort, packet: bytes) -> None:
        self.router.receive(uplink, Frame(ethernet(uplink.own_mac, uplink.mac, 0x0800) + packet))


@pytest.fixture
def world() -> World:
    return World()


def taken(port: VifPort | UplinkPort) -> Frame:
    frame = port.queue.take()
    assert frame is not None, "nothing came"
    assert checksums_are_right(frame.data) or frame.csum_blank
    return frame


def ends(frame: Frame) -> tuple[int, int, int, int]:
    """Source and destination, with ports."""
    source, destination = struct.unpack_from("!II", frame.data, 26)
    return source, *struct.unpack_from("!H", frame.data, 34), destination, *struct.unpack_from("!H", frame.data, 36)


def echo(source: int, destination: int, kind: int = 8, identifier: int = 77) -> bytes:
    body = bytearray(struct.pack("!BBHHH", kind, 0, 0, identifier, 1) + b"data")
    body[2:4] = checksum(body).to_bytes(2, "big")
    return ipv4(ICMP, source, destination, bytes(body))


# --- addresses


def test_an_address_follows_from_the_mac() -> None:
    first, second = Router(), Router()
    assert first.address_for(b"\0\x16\x3e\1\2\3") == second.address_for(b"\0\x16\x3e\1\2\3")


@pytest.mark.parametrize("wanted", ["10.213.0.0", "10.213.0.1", "10.213.255.255", "10.214.0.5", "x", "::1"])
def test_an_address_that_no_interface_can_have(wanted: str) -> None:
    with pytest.raises(AddressError):
        Router().address_for(b"\0\x16\x3e\1\2\3", wanted)


def test_an_address_that_another_has(world: World) -> None:
    vif = world.vif("one")
    taken_address = str(DEFAULT_NETWORK.network_address + vif.address - int(DEFAULT_NETWORK.network_address))
    with pytest.raises(AddressError):
        world.router.address_for(b"\0\x16\x3e\1\2\3", taken_address)


# --- spoofing, and frames that are wrong


def test_spoofed_addresses_are_dropped_and_counted(world: World) -> None:
    one, two = world.vif("one"), world.vif("two")
    world.router.receive(one, Frame(ethernet(ROUTER_MAC, two.mac, 0x0800) + udp(one.address, 1, two.address, 2, b"")))
    world.send(one, udp(two.address, 1, two.address, 2, b""))
    world.send(one, udp(OUTSIDE, 1, two.address, 2, b""))
    arp = struct.pack("!HHBBH6sI6sI", 1, 0x0800, 6, 4, 1, one.mac, two.address, bytes(6), two.address)
    world.router.receive(one, Frame(ethernet(BROADCAST, one.mac, 0x0806) + arp))
    assert one.drops == Counter({"spoofed MAC": 1, "spoofed IP": 3})
    assert one.statistics.tx_dropped == 4
    assert not two.queue


def wrong(data: bytes, at: int, value: int) -> bytes:
    """A header with a byte changed and its checksum right."""
    changed = bytearray(data)
    changed[at] = value
    changed[10:12] = b"\0\0"
    changed[10:12] = checksum(changed[:20]).to_bytes(2, "big")
    return bytes(changed)


def test_frames_that_are_wrong_go_nowhere(world: World) -> None:
    one, two = world.vif("one"), world.vif("two")
    good = udp(one.address, 1, two.address, 2, b"12345678")
    cases = {
        "truncated": [good[:19], good[:30], wrong(good, 3, 255), good[:27], wrong(good, 3, 19)],
        "malformed": [wrong(good, 0, 0x65), wrong(good, 0, 0x44), good[:24] + b"\xff\xff" + good[26:]],
        "IP options": [wrong(good, 0, 0x46)],
        "bad checksum": [good[:10] + b"\x12\x34" + good[12:]],
        "protocol": [wrong(good, 9, 132), wrong(good, 9, 2)],
        "oversized": [udp(one.address, 1, two.address, 2, bytes(1473))],
    }
    for reason, packets in cases.items():
        for packet in packets:
            before = one.drops[reason]
            world.send(one, packet)
            assert one.drops[reason] == before + 1, (reason, packet.hex(), one.drops)
    world.router.receive(one, Frame(bytearray(13)))
    for ethertype in (0x86DD, 0x8100, 0x88A8, 40):
        world.router.receive(one, Frame(ethernet(ROUTER_MAC, one.mac, ethertype) + good))
    assert one.drops["not IPv4"] == 4
    assert not two.queue


def test_padding_is_no_part_of_a_packet(world: World) -> None:
    one, two = world.vif("one"), world.vif("two")
    world.send(one, udp(one.address, 1, two.address, 2, b"x") + bytes(17))
    assert len(taken(two).data) == 14 + 20 + 8 + 1


def test_nothing_goes_to_all(world: World) -> None:
    one, two = world.vif("one"), world.vif("two")
    world.router.receive(one, Frame(ethernet(BROADCAST, one.mac, 0x0800) + udp(one.address, 1, two.address, 2, b"")))
    multicast = b"\x01\x00\x5e\0\0\xfb"
    world.router.receive(one, Frame(ethernet(multicast, one.mac, 0x0800) + udp(one.address, 1, two.address, 2, b"")))
    world.router.receive(one, Frame(ethernet(two.mac, one.mac, 0x0800) + udp(one.address, 1, two.address, 2, b"")))
    for address in ("10.213.255.255", "224.0.0.251", "255.255.255.255", "127.0.0.1", "169.254.169.254", "0.0.0.1"):
        world.send(one, udp(one.address, 1, number(address), 2, b""))
    assert not two.queue
    assert one.statistics.tx_dropped == 9


@pytest.mark.parametrize("seed", range(3))
def test_random_bytes_never_raise_and_never_spoof(seed: int) -> None:
    world = World()
    chance = random.Random(seed)
    one, two = world.vif("one"), world.vif("two")
    uplink = world.uplink()
    good = [
        udp(one.address, 68, 0xFFFFFFFF, 67, chance.randbytes(300)),
        udp(one.address, 1, world.router.address, 53, chance.randbytes(40)),
        udp(one.address, 1, two.address, 2, b"12345678"),
        tcp_segment((one.address, 1), (OUTSIDE, 80), TCP_SYN, options=b"\x02\x04\x05\xb4"),
        echo(one.address, two.address),
    ]
    for _ in range(20_000):
        packet = bytearray(chance.choice(good))
        for _ in range(chance.randrange(4)):
            packet[chance.randrange(len(packet))] = chance.randrange(256)
        if chance.random() < 0.8:
            packet[10:12] = b"\0\0"
            packet[10:12] = checksum(packet[:20]).to_bytes(2, "big")
        data = ethernet(ROUTER_MAC, one.mac, chance.choice([0x0800, 0x0800, 0x0806])) + packet
        world.router.receive(
            one,
            Frame(
                data[: chance.choice([len(data), chance.randrange(len(data) + 1)])],
                chance.random() < 0.1,
                chance.choice([0, 0, 0, 100, 1448]),
            ),
        )
        while (frame := two.queue.take()) is not None:
            assert struct.unpack_from("!I", frame.data, 26)[0] == one.address
        while (frame := uplink.queue.take()) is not None:
            assert struct.unpack_from("!I", frame.data, 26)[0] == PUBLIC
        while one.queue.take() is not None:
            pass
    assert len(world.router.flows) <= 2 * 4096


# --- the router's own answers


def test_arp_is_answered_by_the_router_for_everyone(world: World) -> None:
    one, two = world.vif("one"), world.vif("two")
    for target in (world.router.address, two.address, number("10.213.77.77")):
        arp = struct.pack("!HHBBH6sI6sI", 1, 0x0800, 6, 4, 1, one.mac, one.address, bytes(6), target)
        world.router.receive(one, Frame(ethernet(BROADCAST, one.mac, 0x0806) + arp))
        frame = one.queue.take()
        assert frame is not None
        *_, operation, mac, address, _, _ = struct.unpack_from("!HHBBH6sI6sI", frame.data, 14)
        assert (operation, mac, address) == (2, ROUTER_MAC, target)
    probe = struct.pack("!HHBBH6sI6sI", 1, 0x0800, 6, 4, 1, one.mac, 0, bytes(6), one.address)
    world.router.receive(one, Frame(ethernet(BROADCAST, one.mac, 0x0806) + probe))
    assert not one.queue, "nobody has its address but itself"
    assert not two.queue


def test_the_router_answers_ping(world: World) -> None:
    one = world.vif("one")
    world.send(one, echo(one.address, world.router.address))
    frame = taken(one)
    assert frame.data[34] == 0
    assert frame.data[-4:] == b"data"


def dhcp(vif: VifPort, kind: int, options: bytes = b"", mac: bytes | None = None, ciaddr: int = 0) -> bytes:
    head = struct.pack(
        "!BBBBIHHIIII16s64s128sI", 1, 1, 6, 0, 0x1234, 0, 0, ciaddr, 0, 0, 0, mac or vif.mac, b"", b"", 0x63825363
    )
    return udp(0, CLIENT_PORT, 0xFFFFFFFF, SERVER_PORT, head + bytes([53, 1, kind]) + options + b"\xff")


def options_of(frame: Frame) -> dict[int, bytes]:
    data, at, found = frame.data, 14 + 28 + 240, {}
    while data[at] != 255:
        found[data[at]] = bytes(data[at + 2 : at + 2 + data[at + 1]])
        at += 2 + data[at + 1]
    return found


def test_dhcp_tells_an_interface_its_address_and_mtu(world: World) -> None:
    one = world.vif("web-1", mtu=1400)
    world.router.receive(one, Frame(ethernet(BROADCAST, one.mac, 0x0800) + dhcp(one, 1)))
    offer = taken(one)
    told = options_of(offer)
    assert told[53] == b"\x02"
    assert struct.unpack_from("!I", offer.data, 14 + 28 + 16)[0] == one.address
    assert told[3] == told[6] == told[54] == world.router.address.to_bytes(4, "big")
    assert told[26] == (1400).to_bytes(2, "big")
    assert told[12] == b"web-1"
    wanted = b"\x32\x04" + one.address.to_bytes(4, "big")
    world.router.receive(one, Frame(ethernet(BROADCAST, one.mac, 0x0800) + dhcp(one, 3, wanted)))
    assert options_of(taken(one))[53] == b"\x05"
    other = b"\x32\x04" + (one.address + 1).to_bytes(4, "big")
    world.router.receive(one, Frame(ethernet(BROADCAST, one.mac, 0x0800) + dhcp(one, 3, other)))
    assert options_of(taken(one))[53] == b"\x06", "the address of somebody else"


def test_dhcp_that_makes_no_sense(world: World) -> None:
    one, two = world.vif("one"), world.vif("two")
    for packet in (
        dhcp(one, 1, mac=two.mac),
        udp(0, CLIENT_PORT, 0xFFFFFFFF, SERVER_PORT, b"short"),
        dhcp(one, 1, options=b"\x32\xff\x01"),
    ):
        world.router.receive(one, Frame(ethernet(BROADCAST, one.mac, 0x0800) + packet))
    world.router.receive(one, Frame(ethernet(BROADCAST, one.mac, 0x0800) + dhcp(one, 3, b"\x36\x04\1\2\3\4")))
    world.router.receive(one, Frame(ethernet(BROADCAST, one.mac, 0x0800) + dhcp(one, 9)))
    assert one.statistics.tx_dropped == 3
    assert not one.queue and not two.queue


# --- rules and connections


def test_replies_belong_to_their_connection(world: World) -> None:
    one, two = world.vif("one"), world.vif("two", "deny out")
    world.send(one, udp(one.address, 1000, two.address, 53, b"?"))
    taken(two)
    world.send(two, udp(two.address, 53, one.address, 1000, b"!"))
    taken(one)
    world.send(two, udp(two.address, 53, one.address, 1001, b"!"))
    assert two.drops["denied"] == 1
    world.now += 3600
    world.send(two, udp(two.address, 53, one.address, 1000, b"late"))
    assert two.drops["denied"] == 2


def test_a_change_of_rules_holds_from_the_next_packet_on(world: World) -> None:
    one, two = world.vif("one"), world.vif("two", "allow in udp/9; deny in")
    rule, closed = two.policy.rules
    packet = udp(one.address, 1000, two.address, 9, b"x")
    for _ in range(3):
        world.send(one, packet)
        taken(two)
    assert (rule.packets, rule.bytes) == (3, 3 * (len(packet) + 14))
    world.send(one, udp(one.address, 1000, two.address, 10, b"x"))
    assert closed.packets == 1
    world.router.change_policy(two, Policy(parse_rules("deny in")))
    world.send(one, packet)
    assert not two.queue
    world.send(two, udp(two.address, 9, one.address, 1000, b"x"))
    assert not one.queue, "nor do replies come"
    world.router.change_policy(two, Policy())
    world.send(one, packet)
    taken(two)


def test_fragments_follow_their_first(world: World) -> None:
    one, two = world.vif("one"), world.vif("two", "deny in udp/666")
    whole = udp(one.address, 1000, two.address, 9, random.Random(1).randbytes(2000))

    def fragment(packet: bytes, first: int, last: int, identification: int = 5) -> bytes:
        more = 0x2000 if last < len(packet) else 0
        head = bytearray(packet[:20])
        struct.pack_into("!HHH", head, 2, 20 + last - first, identification, more | (first - 20) >> 3)
        head[10:12] = b"\0\0"
        head[10:12] = checksum(head).to_bytes(2, "big")
        return bytes(head) + packet[first:last]

    parts = fragment(whole, 20, 1300), fragment(whole, 1300, len(whole))
    world.send(one, parts[1])
    assert one.drops["bad fragment"] == 1, "it might be anything's"
    for part in parts:
        world.send(one, part)
    got = [two.queue.take() for _ in parts]
    assert b"".join(bytes(frame.data[34:]) for frame in got if frame) == whole[20:]
    denied = udp(one.address, 1000, two.address, 666, bytes(2000))
    for part in (fragment(denied, 20, 1300, 6), fragment(denied, 1300, len(denied), 6)):
        world.send(one, part)
    assert not two.queue
    world.send(one, parts[0])
    for identification in range(1000):
        world.send(two, fragment(udp(two.address, 7, one.address, 7, bytes(2000)), 20, 1300, identification))
    world.send(one, parts[1])
    assert two.queue.take() and two.queue.take(), "another's flood of them takes nothing away"
    world.router.change_policy(two, Policy(parse_rules("deny in udp/9")))
    world.send(one, parts[1])
    assert not two.queue, "of a connection that is denied now"


# --- the outside


def test_the_outside_sees_one_address(world: World) -> None:
    one, two = world.vif("one"), world.vif("two")
    uplink = world.uplink()
    for vif in (one, two):
        world.send(vif, tcp_segment((vif.address, 40000), (OUTSIDE, 80), TCP_SYN, options=b"\x02\x04\x05\xb4"))
    frames = [taken(uplink), taken(uplink)]
    assert [ends(frame)[0] for frame in frames] == [PUBLIC, PUBLIC]
    assert len({ends(frame)[1] for frame in frames}) == 2, "both by a port of their own"
    for vif, frame in zip((one, two), frames, strict=True):
        assert frame.data[:6] == GATEWAY_MAC
        assert frame.data[22] == 63
        port = ends(frame)[1]
        world.arrive(uplink, tcp_segment((OUTSIDE, 80), (PUBLIC, port), TCP_SYN | TCP_ACK))
        assert ends(taken(vif)) == (OUTSIDE, 80, vif.address, 40000)
    world.arrive(uplink, tcp_segment((OUTSIDE, 81), (PUBLIC, ends(frames[0])[1]), TCP_ACK))
    world.arrive(uplink, udp(OUTSIDE, 80, PUBLIC, ends(frames[0])[1], b""))
    world.arrive(uplink, udp(one.address, 80, PUBLIC, 1, b""))
    assert uplink.drops == Counter({"no connection": 2, "martian": 1})


def test_ping_to_the_outside_and_back(world: World) -> None:
    one, two = world.vif("one"), world.vif("two")
    uplink = world.uplink()
    for vif in (one, two):
        world.send(vif, echo(vif.address, OUTSIDE, identifier=2077))
    identifiers = [struct.unpack_from("!H", taken(uplink).data, 38)[0] for _ in range(2)]
    assert len(set(identifiers)) == 2
    world.arrive(uplink, echo(OUTSIDE, PUBLIC, 0, identifiers[1]))
    assert struct.unpack_from("!H", taken(two).data, 38)[0] == 2077
    assert not one.queue


def test_an_error_finds_whoever_it_is_for(world: World) -> None:
    one = world.vif("one")
    uplink = world.uplink()
    world.send(one, udp(one.address, 1000, OUTSIDE, 9, b"to a closed port"))
    sent = taken(uplink)
    body = bytearray(struct.pack("!BBHI", 3, 3, 0, 0) + sent.data[14 : 14 + 28])
    body[2:4] = checksum(body).to_bytes(2, "big")
    world.arrive(uplink, ipv4(ICMP, OUTSIDE, PUBLIC, bytes(body)))
    got = taken(one)
    assert struct.unpack_from("!I", got.data, 14 + 28 + 12)[0] == one.address
    assert struct.unpack_from("!H", got.data, 14 + 28 + 20)[0] == 1000
    body[28:30] = b"\0\1"
    body[2:4] = b"\0\0"
    body[2:4] = checksum(body).to_bytes(2, "big")
    world.arrive(uplink, ipv4(ICMP, OUTSIDE, PUBLIC, bytes(body)))
    assert uplink.drops["ICMP"] == 1


def test_a_published_port(world: World) -> None:
    one = world.vif("one", "deny out")
    uplink = world.uplink()
    world.router.attach_uplink(uplink, [(one, Publication(6, "127.0.0.1", 8080, 80))])
    world.arrive(uplink, tcp_segment((OUTSIDE, 5000), (PUBLIC, 8080), TCP_SYN))
    assert ends(taken(one)) == (OUTSIDE, 5000, one.address, 80)
    world.send(one, tcp_segment((one.address, 80), (OUTSIDE, 5000), TCP_SYN | TCP_ACK))
    assert ends(taken(uplink)) == (PUBLIC, 8080, OUTSIDE, 5000)
    world.send(one, tcp_segment((one.address, 80), (OUTSIDE, 5001), TCP_SYN))
    assert one.drops["denied"] == 1
    world.router.change_policy(one, Policy(parse_rules("deny in tcp/80 from outside")))
    world.arrive(uplink, tcp_segment((OUTSIDE, 5002), (PUBLIC, 8080), TCP_SYN))
    assert not one.queue


def test_a_great_packet_from_the_outside_is_cut_in_name_only(world: World) -> None:
    one = world.vif("one")
    uplink = world.uplink(mtu=65520)
    world.send(one, tcp_segment((one.address, 40000), (OUTSIDE, 80), TCP_SYN, options=b"\x02\x04\x05\xb4"))
    syn = taken(uplink)
    assert struct.unpack_from("!H", syn.data, 14 + 20 + 22)[0] == 65480, "the outside may send great ones"
    world.arrive(
        uplink, tcp_segment((OUTSIDE, 80), (PUBLIC, ends(syn)[1]), TCP_SYN | TCP_ACK, options=b"\x02\x04\xff\xc8")
    )
    assert struct.unpack_from("!H", taken(one).data, 14 + 20 + 22)[0] == 1460, "and the domain must not"
    payload = random.Random(4).randbytes(50_000)
    world.arrive(uplink, tcp_segment((OUTSIDE, 80), (PUBLIC, ends(syn)[1]), TCP_ACK, payload))
    frame = taken(one)
    assert (frame.gso_size, frame.csum_blank) == (1460, True)
    pieces = list(segments(frame))
    assert b"".join(bytes(piece.data[54:]) for piece in pieces) == payload
    assert all(checksums_are_right(piece.data) and len(piece.data) <= 1514 for piece in pieces)


def test_without_a_way_out_domains_reach_each_other(world: World) -> None:
    one, two = world.vif("one"), world.vif("two")
    world.send(one, udp(one.address, 1, OUTSIDE, 2, b""))
    assert one.drops["no uplink"] == 1
    world.send(one, udp(one.address, 1, two.address, 2, b""))
    taken(two)


def test_a_domain_that_may_not_go_out_opens_no_way(world: World) -> None:
    opened: list[None] = []
    world.router.open_uplink = lambda: opened.append(None)  # type: ignore[func-returns-value]
    one = world.vif("one", "deny out to outside")
    world.send(one, udp(one.address, 1, OUTSIDE, 2, b""))
    assert (one.drops["denied"], opened) == (1, [])


def test_what_is_gone_gets_nothing(world: World) -> None:
    one, two = world.vif("one"), world.vif("two")
    world.send(one, udp(one.address, 1, two.address, 2, b""))
    world.router.detach(two)
    world.send(one, udp(one.address, 1, two.address, 2, b""))
    assert one.drops["no host"] == 1
    assert not len(world.router.flows)


def test_one_domain_opens_only_so_many_connections(world: World) -> None:
    one, two = world.vif("one"), world.vif("two")
    world.send(two, udp(two.address, 7, one.address, 7, b""))
    for port in range(1, 10_001):
        world.send(one, udp(one.address, port, two.address, 9, b""))
        two.queue.take()
    assert len(world.router.flows) == 2 * 4096 + 2
    generation = two.statistics.tx_dropped
    world.router.change_policy(one, Policy(parse_rules("deny out")))
    world.send(one, udp(one.address, 7, two.address, 7, b""))
    assert one.drops["denied"] == 0, "the other's connection is still known"
    assert generation == 0


# --- fairness


def test_senders_share_a_receiver_by_what_their_packets_cost() -> None:
    queue = FairQueue()
    flood = 0
    while queue.put(1, Frame(bytearray(60_000))):
        flood += 1
    assert flood == LIMIT_BYTES // 60_000
    for _ in range(200):
        assert queue.put(2, Frame(bytearray(1000))), "another's flood is not its own"
    served: Counter[int] = Counter()
    for _ in range(100):
        frame = queue.take()
        assert frame is not None
        served[len(frame.data)] += len(frame.data) + FRAME_BYTES
        if served[60_000] >= 11 * 60_000:
            break
    assert abs(served[60_000] - served[1000]) <= 2 * QUANTUM


def test_turns_come_in_order() -> None:
    import threading

    turns = Turns()
    order: list[int] = []
    ready = threading.Semaphore(0)

    def want(me: int) -> None:
        with turns:
            order.append(me)

    threads = []
    with turns:
        for me in range(8):
            thread = threading.Thread(target=want, args=(me,))
            thread.start()
            threads.append(thread)
            while len(turns._waiting) <= me:
                ready.acquire(timeout=0.001)
    for thread in threads:
        thread.join()
    assert order == list(range(8))


# --- checksums


@pytest.mark.parametrize("size", [0, 1, 2, 3, 20, 1501, 3000, 3001, 3002, 3003, 65000])
def test_the_sum_is_rfc_1071s(size: int) -> None:
    for data in (random.Random(size).randbytes(size), bytes(size), b"\xff" * size):
        assert ~ones_sum(data) & 0xFFFF == checksum(data) or ones_sum(data) == 0 == ~checksum(data) & 0xFFFF


def test_translation_keeps_every_checksum_right() -> None:
    chance = random.Random(5)
    for _ in range(500):
        source, destination = chance.randrange(1, 1 << 32), chance.randrange(1, 1 << 32)
        payload = chance.randbytes(chance.randrange(64))
        packets = (
            udp(source, 5, destination, 6, payload),
            tcp_segment((source, 5), (destination, 6), TCP_ACK, payload),
        )
        for packet in packets:
            frame = Frame(ethernet(ROUTER_MAC, ROUTER_MAC, 0x0800) + packet)
            read: Packet = read_ipv4(frame)
            rewrite(read, source=chance.randrange(1 << 32), source_port=chance.randrange(65536))
            rewrite(read, destination=chance.randrange(1 << 32), destination_port=chance.randrange(65536))
            assert checksums_are_right(frame.data)


def test_a_udp_checksum_of_nothing_is_written_as_ones() -> None:
    frame = Frame(ethernet(ROUTER_MAC, ROUTER_MAC, 0x0800) + udp(0, 0, 0, 0, b"\xff\xe6"), csum_blank=True)
    fill_checksum(frame)
    assert frame.data[40:42] != b"\0\0"
    assert frame.data[23] == UDP


@pytest.mark.parametrize("outside", [False, True])
def test_nobody_is_made_to_cut_packets_into_crumbs(world: World, outside: bool) -> None:
    one, two, uplink = world.vif("one"), world.vif("two"), world.uplink()
    peer, port = (OUTSIDE, uplink) if outside else (two.address, two)
    world.send(one, tcp_segment((one.address, 40000), (peer, 80), TCP_SYN))
    taken(port)
    crumbs = tcp_segment((one.address, 40000), (peer, 80), TCP_ACK, bytes(1000))
    world.send(one, crumbs, gso_size=47)
    assert (one.drops["malformed"], bool(port.queue)) == (1, False)
    world.send(one, crumbs, gso_size=48)
    assert port.queue


def test_what_a_protected_domain_sends_waits_for_its_epoch(world: World) -> None:
    def came() -> int:
        return int(struct.unpack_from("!H", taken(b).data, 38)[0])  # the identifier

    a, b = world.vif("a"), world.vif("b")
    plug = Plug(world.router, a)
    world.send(a, echo(a.address, b.address, identifier=1))
    plug.mark()
    world.send(a, echo(a.address, b.address, identifier=2))
    assert not b.queue
    plug.release()
    assert came() == 1 and not b.queue
    plug.release()
    assert not b.queue, "the next epoch has not ended"
    world.send(a, echo(a.address, b.address, identifier=3))
    plug.close()
    assert [came(), came()] == [2, 3]
    world.send(a, echo(a.address, b.address, identifier=4))
    assert came() == 4
    plug = Plug(world.router, a)
    for _ in range(MAX_PLUGGED // 1000):
        world.send(a, echo(a.address, b.address) + bytes(1000))
    assert a.drops["not acknowledged"] > 0
