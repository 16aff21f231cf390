"""Two routers that are one network."""

from __future__ import annotations

import contextlib
import io
import random
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from machines import Machine
from xenolith.dom0.network.frame import TCP_ACK, UDP, Frame, ethernet, read_ipv4, udp
from xenolith.dom0.network.port import VifPort
from xenolith.dom0.network.router import ROUTER_MAC, AddressError, Router
from xenolith.dom0.network.rules import Policy, parse_rules
from xenolith.dom0.network.trunk import Trunk
from xenolith.toolstack.client import ToolstackError
from xenolith.toolstack.embedded import EmbeddedToolstack

from .netfront import number, tcp_segment

DEADLINE_SECONDS = 60


class Woken:
    """Counts; waits for what another thread brings about."""

    def __init__(self) -> None:
        self._changed = threading.Condition()

    def __call__(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def wait_for(self, condition: Callable[[], object]) -> None:
        with self._changed:
            assert self._changed.wait_for(condition, DEADLINE_SECONDS)


def until(condition: Callable[[], object]) -> None:
    end = time.monotonic() + DEADLINE_SECONDS
    while not condition():
        assert time.monotonic() < end
        threading.Event().wait(0.001)


def attach(router: Router, last: int, name: str, rules: str = "") -> tuple[VifPort, Woken]:
    woken = Woken()
    mac = b"\0\x16\x3e\0\0" + bytes([last])
    with router.turns:
        vif = VifPort(
            router.number(),
            name,
            woken,
            domain=name,
            mac=mac,
            address=router.address_for(mac, f"10.213.0.{last}"),
            policy=Policy(parse_rules(rules)),
            clock=time.monotonic,
        )
        router.attach(vif)
    return vif, woken


def detach(router: Router, vif: VifPort) -> None:
    with router.turns:
        router.detach(vif)


def send(router: Router, vif: VifPort, packet: bytes) -> None:
    with router.turns:
        router.receive(vif, Frame(ethernet(ROUTER_MAC, vif.mac, 0x0800) + packet))


def received(vif: VifPort, woken: Woken) -> bytearray:
    woken.wait_for(lambda: vif.queue)
    frame = vif.queue.take()
    assert frame is not None
    return frame.data


@pytest.fixture
def routers() -> Iterator[tuple[Router, Router]]:
    found = Router(), Router()
    ends = socket.socketpair()
    with contextlib.ExitStack() as files:
        trunks, threads = [], []
        for router, end in zip(found, ends, strict=True):
            files.enter_context(end)
            source, out = files.enter_context(end.makefile("rb")), files.enter_context(end.makefile("wb"))

            def hang_up(end: socket.socket = end) -> None:
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)

            trunks.append(Trunk(router, source, out, hang_up, print))
            threads.append(threading.Thread(target=trunks[-1].run))
            threads[-1].start()
        yield found
        trunks[0].close()
        for thread in threads:
            thread.join()
        assert not found[0].remotes
        assert not found[1].remotes


def test_domains_reach_each_other_as_the_rules_of_both_allow(routers: tuple[Router, Router]) -> None:
    here, there = routers
    web, _ = attach(here, 10, "web")
    _, woken = attach(there, 20, "data", "allow in udp/5 from domain:web")
    data = there.vifs[number("10.213.0.20")]
    until(lambda: data.address in here.remotes and web.address in there.remotes)
    send(here, web, udp(web.address, 1, data.address, 6, b"denied"))
    send(here, web, udp(web.address, 1, data.address, 5, b"allowed"))
    assert received(data, woken)[-7:] == b"allowed"
    assert there.remotes[web.address].drops == {"denied": 1}
    with pytest.raises(AddressError, match="another interface has the address"), here.turns:
        here.address_for(b"\0\x16\x3e\0\0\1", "10.213.0.20")
    detach(there, data)
    until(lambda: data.address not in here.remotes)
    send(here, web, udp(web.address, 1, data.address, 5, b"nobody"))
    assert web.drops == {"no host": 1}


def test_connections_follow_an_interface_that_goes_to_the_other_side_and_back(routers: tuple[Router, Router]) -> None:
    here, there = routers
    peer, heard = attach(here, 10, "peer")
    old, woken = attach(here, 11, "mover")
    until(lambda: len(there.remotes) == 2)
    segment = tcp_segment((peer.address, 9), (old.address, 8), TCP_ACK, b"one")
    send(here, peer, segment)
    assert received(old, woken)[-3:] == b"one"
    send(here, peer, segment)  # waits when the domain goes
    new, woken = attach(there, 11, "mover")
    assert received(new, woken)[-3:] == b"one"
    until(lambda: old.address in here.remotes)
    send(here, peer, tcp_segment((peer.address, 9), (old.address, 8), TCP_ACK, b"two"))
    assert received(new, woken)[-3:] == b"two"
    send(there, new, tcp_segment((old.address, 8), (peer.address, 9), TCP_ACK, b"three"))
    assert received(peer, heard)[-5:] == b"three"
    detach(there, new)  # it did not come about: what is here goes on
    until(lambda: old.address not in here.remotes)
    assert here.vifs[old.address] is old
    until(lambda: old.address in there.remotes)
    send(here, peer, tcp_segment((peer.address, 9), (old.address, 8), TCP_ACK, b"four"))
    frame = old.queue.take()
    assert frame is not None
    assert read_ipv4(frame).frame.data[-4:] == b"four"


@pytest.mark.parametrize("seed", range(200))
def test_whatever_comes_over_a_trunk_ends_it_at_most(seed: int) -> None:
    chance = random.Random(seed)
    router = Router()
    ours, _ = attach(router, 10, "ours")
    stream = b""
    for _ in range(20):
        kind, body = chance.randrange(5), chance.randbytes(chance.choice((0, 4, 12, 14, 40, 80)))
        if chance.random() < 0.5:
            name = chance.choice((b"", b"name", b"\xff\xfe"))
            body = struct.pack("!IH", number(f"10.213.0.{chance.randrange(12)}"), 1500) + chance.randbytes(6) + name
        elif chance.random() < 0.5:
            address = number(f"10.213.0.{chance.randrange(12)}")
            body = bytes(ethernet(ROUTER_MAC, bytes(6), 0x0800)) + udp(address, 1, ours.address, UDP, b"?")
        length = len(body) if chance.random() < 0.95 else chance.randrange(1 << 32)
        stream += struct.pack("!BBHI", kind, chance.randrange(3), chance.randrange(1 << 16), length) + body
    said: list[str] = []
    Trunk(router, io.BytesIO(stream), io.BytesIO(), lambda: None, said.append).run()
    assert said[-1].startswith("network: the trunk to another daemon has ended: ")
    assert router.vifs == {ours.address: ours}
    assert not router.remotes
    assert not len(router.flows)


def test_daemons_join_their_networks(tmp_path: Path) -> None:
    here, there = (EmbeddedToolstack(Machine(64, "unicorn").dom0) for _ in range(2))
    address = f"unix:{tmp_path / 'there'}"
    with pytest.raises(ToolstackError, match="cannot connect"):
        here.join_network(address)
    there.listen(address)
    here.join_network(address)
    assert here.joined_networks() == [address]
    with pytest.raises(ToolstackError, match="joined already"):
        here.join_network(address)
    vif, _ = attach(there.dom0.network.router, 20, "data")
    until(lambda: vif.address in here.dom0.network.router.remotes)
    here.join_network("")
    assert not here.joined_networks()
    assert not here.dom0.network.router.remotes
    here.join_network(address)
    there.close()
    until(lambda: not here.joined_networks())
    here.close()
