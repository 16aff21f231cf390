"""CPU time of the firewall-router by packet, from a sender to a receiver's queue: `python -m bench.network`."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

from xenolith.dom0.network.frame import TCP_ACK, Frame, ethernet, ipv4, pseudo_header_sum, udp
from xenolith.dom0.network.port import VifPort
from xenolith.dom0.network.router import ROUTER_MAC, Router
from xenolith.dom0.network.rules import Policy, parse_rules

PACKETS = 20_000


def interface(router: Router, number: int, rules: str = "") -> VifPort:
    mac = b"\0\x16\x3e\0\0" + bytes([number])
    vif = VifPort(
        router.number(),
        f"vif {number}",
        lambda: None,
        domain=f"domain {number}",
        mac=mac,
        address=router.address_for(mac),
        policy=Policy(parse_rules(rules)),
        clock=router.clock,
    )
    router.attach(vif)
    return vif


def great_packet(one: VifPort, two: VifPort, size: int) -> bytes:
    """A TCP packet that stands for many, its checksum left out."""
    header = (40000).to_bytes(2, "big") + (80).to_bytes(2, "big") + bytes(8) + bytes([0x50, TCP_ACK]) + bytes(6)
    packet = bytearray(ethernet(ROUTER_MAC, one.mac, 0x0800) + ipv4(6, one.address, two.address, header + bytes(size)))
    packet[50:52] = pseudo_header_sum(packet, 6, len(packet) - 34).to_bytes(2, "big")
    return bytes(packet)


def microseconds(send: Callable[[], None]) -> float:
    """CPU time of one of many."""
    before = time.process_time()
    for _ in range(PACKETS):
        send()
    return (time.process_time() - before) / PACKETS * 1e6


def one_packet(router: Router, one: VifPort, two: VifPort, packet: bytes, gso_size: int) -> None:
    with router.turns:
        router.receive(one, Frame(bytearray(packet), bool(gso_size), gso_size))
    assert two.queue.take() is not None


def main() -> None:
    rules = "deny out tcp/25; deny out udp/53 to outside; deny out to 192.0.2.0/24; allow out"
    for title, text in (("no rules", ""), ("four rules", rules)):
        router = Router()
        one, two = interface(router, 1, text), interface(router, 2)
        head = bytes(ethernet(ROUTER_MAC, one.mac, 0x0800))
        for name, packet, gso_size in (
            ("64 bytes", head + udp(one.address, 1000, two.address, 9, bytes(64)), 0),
            ("1,472 bytes", head + udp(one.address, 1000, two.address, 9, bytes(1472)), 0),
            ("64,000 bytes", great_packet(one, two, 64_000), 1448),
        ):
            cost = microseconds(partial(one_packet, router, one, two, packet, gso_size))
            print(f"{title:12} {name:14} {cost:6.1f} us a packet")
        print(f"connections known: {len(router.flows)}; dropped: {dict(one.drops)}")


if __name__ == "__main__":
    main()
