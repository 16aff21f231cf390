"""Networks in the stock Debian kernel: its own xen-netfront on our back-end and router."""

from __future__ import annotations

import contextlib
import hashlib
import socket
import time
from collections.abc import Callable, Sequence
from ipaddress import IPv4Address
from typing import TYPE_CHECKING

import pytest

from dom0.netfront import why_no_passt
from xenolith.debian.initramfs import Command, build_initramfs, kernel_arguments
from xenolith.debian.modules import kernel_modules
from xenolith.debian.packages import obtain
from xenolith.dom0.backends.net import VifSpec
from xenolith.dom0.console import Overflow
from xenolith.dom0.image import load_image

if TYPE_CHECKING:
    from machines import Machine
    from xenolith.dom0.services import GuestDomain

pytestmark = pytest.mark.slow
DEADLINE_SECONDS = 200


@pytest.fixture(params=["unicorn", "kvm", "adaptive"])
def engine_name(request: pytest.FixtureRequest) -> str:
    from machines import missing

    engine = str(request.param)
    if reason := missing(engine):
        pytest.skip(f"no {engine} engine here: {reason}")
    return engine


def mac(number: int) -> bytes:
    return b"\0\x16\x3e\0\0" + bytes([number])


class Guest:
    """A running Debian kernel with a network; its script says `DONE` in the end."""

    def __init__(self, machine: Machine, domain: GuestDomain) -> None:
        self.machine = machine
        self.domain = domain
        self.text = ""
        self._reader = domain.console.open_reader(Overflow.WAIT)

    @property
    def address(self) -> str:
        return str(IPv4Address(self.domain.nets[0].backend.vif.address))

    def wait_for(self, word: str) -> None:
        """Read the console until the guest says this word."""
        while word not in self.text:
            data = self._reader.read(DEADLINE_SECONDS)
            assert data, f"the guest never said {word!r}:\n{self.text}"
            self.text += data.decode("utf-8", "replace")

    def finish(self) -> str:
        """What it printed, up to its clean end."""
        self.wait_for("DONE")
        self.wait_for("exit 0")
        assert self.domain.wait(DEADLINE_SECONDS) is not None
        assert "timeout closing device" not in self.text, "power-off has waited for a back-end"
        return self.text


class Network:
    """Guests of one machine."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self._debian = obtain("6.1")
        self._modules = kernel_modules(self._debian, ["xen-netfront"])

    def boot(self, script: str, nets: Sequence[VifSpec], name: str = "guest") -> Guest:
        """Boot a kernel and run a script in it."""
        from xenolith.dom0.services import DomainSpec

        ramdisk = build_initramfs(
            self._debian.busybox,
            command=Command(["sh", "-c", f"{script}\necho DONE"], "network"),
            modules=self._modules,
        )
        domain = self.machine.dom0.create(
            DomainSpec(
                name=name,
                image=load_image(self._debian.elf),
                kernel=str(self._debian.elf),
                ramdisk=ramdisk,
                cmdline=kernel_arguments(1, verbose=True) + " loglevel=4",
                memory_kib=128 << 10,
                nets=tuple(nets),
            )
        )
        self.machine.dom0.start(domain)
        return Guest(self.machine, domain)


@pytest.fixture
def network(machine: Callable[[int], Machine]) -> Network:
    return Network(machine(288))


def vif(number: int, handle: int = 0, rules: str = "") -> VifSpec:
    return VifSpec(number=handle, mac=mac(number), rules=rules)


def test_two_domains_reach_each_other(network: Network) -> None:
    """DHCP, ping, and 8 MiB by TCP with every offload, both ways."""
    size = 8 << 20
    digest = hashlib.md5(b"\0" * size).hexdigest()
    server = network.boot(
        "echo LISTENING; nc -l -p 5000 -e md5sum; echo AGAIN; nc -l -p 5001 -e head -c 8388608 /dev/zero; sleep 1",
        [vif(2)],
        "server",
    )
    server.wait_for("LISTENING")
    client = network.boot(
        f"ping -c 3 {server.address} && ping -c 1 -s 1472 {server.address}; cat /etc/resolv.conf; sleep 1;"
        f"head -c {size} /dev/zero | nc {server.address} 5000; sleep 1; nc {server.address} 5001 | md5sum",
        [vif(1)],
        "client",
    )
    text = client.finish()
    assert "3 packets transmitted, 3 packets received" in text
    assert "1 packets transmitted, 1 packets received" in text
    assert "nameserver 10.213.0.1" in text
    assert text.count(digest) == 2, text
    server.finish()
    sent = client.domain.nets[0].backend.vif.statistics
    assert sent.tx_bytes > size
    assert sent.tx_packets < sent.tx_bytes // 1514, "packets came larger than the MTU"
    for guest in (client, server):
        assert guest.domain.nets[0].failure is None
        assert not set(guest.domain.nets[0].backend.vif.drops) - {"not IPv4", "multicast"}


def test_a_changed_rule_is_in_force_with_the_next_packet(network: Network) -> None:
    from xenolith.dom0.network.rules import Policy, parse_rules

    one = network.boot("echo READY; sleep 600", [vif(1)], "one")
    one.wait_for("READY")
    two = network.boot(
        f"ping -c 1 -W 1 {one.address}; echo BEFORE; while ping -c 1 -W 1 {one.address} >/dev/null; do :; done;"
        "echo CLOSED; ping -c 1 -W 1 10.213.0.1",
        [vif(2)],
        "two",
    )
    two.wait_for("BEFORE")
    router = network.machine.dom0.network.router
    port = one.domain.nets[0].backend.vif
    with router.turns:
        router.change_policy(port, Policy(parse_rules("deny in icmp from domain:two")))
    text = two.finish()
    assert "1 packets transmitted, 1 packets received" in text.partition("BEFORE")[0]
    assert "1 packets transmitted, 1 packets received" in text.partition("CLOSED")[2]
    assert port.policy.rules[0].packets >= 1


def test_an_interface_comes_and_goes_while_the_domain_runs(network: Network) -> None:
    guest = network.boot(
        "echo READY; until [ -e /sys/class/net/eth1 ]; do sleep 0.1; done;"
        "udhcpc -q -n -t 5 -T 1 -s /etc/udhcpc.script -i eth1; ip address show eth1; echo HAS;"
        "while [ -e /sys/class/net/eth1 ]; do sleep 0.1; done; ping -c 1 10.213.0.1",
        [vif(1)],
    )
    guest.wait_for("READY")
    dom0 = network.machine.dom0
    dom0.plug_net(guest.domain, vif(7, handle=1))
    address = str(IPv4Address(guest.domain.nets[1].backend.vif.address))
    guest.wait_for("HAS")
    assert address in guest.text
    assert dom0.unplug_net(guest.domain, 1)
    assert "1 packets transmitted, 1 packets received" in guest.finish()
    assert list(guest.domain.nets) == [0]


# --- the outside

needs_passt = pytest.mark.skipif(bool(why_no_passt()), reason=why_no_passt())


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def own_address() -> str:
    """This host's, to which no packet leaves it. A datagram socket is connected without sending anything."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("198.51.100.1", 9))
        except OSError:
            pytest.skip("this host has no address but the loopback device's")
        return str(probe.getsockname()[0])


def echoed(port: int, data: bytes) -> bytes:
    """What the server behind a port sends back. Raises ConnectionError."""
    with socket.create_connection(("127.0.0.1", port), DEADLINE_SECONDS) as connection:
        connection.settimeout(DEADLINE_SECONDS)
        connection.sendall(data)
        got = b""
        while len(got) < len(data):
            part = connection.recv(1 << 16)
            if not part:
                raise ConnectionError(f"{len(got)} bytes")
            got += part
        return got


@needs_passt
def test_a_published_port_leads_to_the_guest(network: Network) -> None:
    from xenolith.dom0.network.port import Publication

    port = free_port()
    spec = VifSpec(number=0, mac=mac(1), rules="deny out", publications=(Publication(6, "127.0.0.1", port, 7),))
    guest = network.boot("while :; do echo LISTENING; nc -l -p 7 -e cat; done", [spec])
    guest.wait_for("LISTENING")
    data = b"".join(at.to_bytes(4, "big") for at in range(4096))
    got = None
    until = time.monotonic() + DEADLINE_SECONDS
    while got is None and time.monotonic() < until:  # the guest's server listens a moment after it said so
        with contextlib.suppress(ConnectionError):
            got = echoed(port, data)
    assert got == data
    network.machine.dom0.destroy(guest.domain)
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.1", port), 5).close()


@needs_passt
def test_the_outside_is_reached_as_far_as_the_rules_allow(network: Network) -> None:
    """To a server on this host's own address; the host's loopback device is out of reach whatever the rules say."""
    address = own_address()
    with socket.create_server((address, 0)) as allowed, socket.create_server((address, 0)) as denied:
        port, other = allowed.getsockname()[1], denied.getsockname()[1]
        guest = network.boot(
            f"sleep 2 | nc {address} {port}; nc -w 3 {address} {other} </dev/null || echo DENIED;"
            f"nc -w 3 192.0.0.1 {other} </dev/null || echo ALONE",
            [vif(1, rules=f"allow out tcp/{port} to {address}; allow out to 192.0.0.1")],
        )
        allowed.settimeout(DEADLINE_SECONDS)
        connection, _ = allowed.accept()
        with connection:
            connection.sendall(b"WELCOME\n")
        text = guest.finish()
        denied.setblocking(False)
        with pytest.raises(BlockingIOError):
            denied.accept()
    assert "WELCOME" in text and "DENIED" in text and "ALONE" in text
    drops = guest.domain.nets[0].backend.vif.drops
    assert drops["denied"] and drops["martian"]
