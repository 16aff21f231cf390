"""Networks: what a packet costs the firewall-router, and TCP between two Debian domains, and to the outside by passt.

    python -m bench.network [--router] [--engine unicorn|kvm|adaptive ...] [--qemu] [--seconds S]

`--router` prints the router's CPU time by packet, from a sender to a receiver's queue.  Else each row is one way of
using a connection for some seconds: Mbit/s sent or received by one domain, or round trips of one byte; with the CPU
time that the back-ends' threads used for each MiB, or round trip.  With --qemu the same kernel and program on QEMU TCG
(q35, virtio-net), with its user network and with passt, to and from this host.
"""

from __future__ import annotations

import argparse
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from ipaddress import IPv4Address
from pathlib import Path

from bench.disks import qemu_modules
from xenolith.debian.initramfs import Command, HostFile, build_initramfs, kernel_arguments
from xenolith.debian.modules import kernel_modules
from xenolith.debian.packages import obtain
from xenolith.dom0.backends.net import VifSpec
from xenolith.dom0.console import Overflow
from xenolith.dom0.image import load_image
from xenolith.dom0.network.frame import TCP_ACK, Frame, ethernet, ipv4, pseudo_header_sum, udp
from xenolith.dom0.network.port import VifPort
from xenolith.dom0.network.router import ROUTER_MAC, Router
from xenolith.dom0.network.rules import Policy, parse_rules
from xenolith.dom0.power import power_on
from xenolith.dom0.services import DomainSpec, GuestDomain

SOURCE = Path(__file__).parent / "workloads" / "tcp.c"
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


def router_costs() -> None:
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


ROWS = (("TCP out", "send"), ("TCP in", "receive"), ("round trip", "echo"))
# Then a third domain sends the server datagrams as fast as it can, for as long as it exists.
BESIDE_A_FLOOD = "TCP out beside a flood"
FLOOD_PORT = 6000
MEMORY_MIB = 128


def print_row(system: str, name: str, words: str, backend_us: float | None) -> None:
    amount, seconds, least, median = map(float, words.split()[1:])
    if name == "round trip":
        cost = "" if backend_us is None else f"  back-ends {backend_us / max(amount, 1):6.1f} us of CPU each"
        what = f"{amount / seconds:8.0f} /s      min {least:7.1f} us  median {median:7.1f} us"
    else:
        cost = "" if backend_us is None else f"  back-ends {backend_us / max(amount, 1) * 2**20:6.0f} us of CPU a MiB"
        what = f"{amount * 8 / seconds / 1e6:8.0f} Mbit/s"
    print(f"{system:24} {name:22} {what}{cost}", flush=True)


def script(address: str, port: int, seconds: float) -> str:
    return "\n".join(f"/tcp {way} {address} {port} {seconds}" for _, way in ROWS)


def follow(domain: GuestDomain, mark: str) -> Iterator[str]:
    """The rest of each line of a domain's console in which this word stands."""
    text = ""
    with domain.console.open_reader(Overflow.WAIT) as reader:
        while data := reader.read():
            text += data.decode("utf-8", "replace")
            while "\n" in text:
                line, _, text = text.partition("\n")
                if mark in line:
                    yield line[line.index(mark) :]


def measure_domains(engine: str, program: Path, seconds: float) -> None:
    guest = obtain()

    def spec(name: str, number: int, command: str) -> DomainSpec:
        return DomainSpec(
            name=name,
            image=load_image(guest.elf),
            kernel=str(guest.elf),
            ramdisk=build_initramfs(
                guest.busybox,
                command=Command(["sh", "-c", command], "bench"),
                files=[HostFile.parse(f"{program}:/tcp")],
                modules=kernel_modules(guest, ["xen-netfront"]),
            ),
            cmdline=kernel_arguments(1),
            memory_kib=MEMORY_MIB << 10,
            nets=(VifSpec(number=0, mac=b"\0\x16\x3e\0\0" + bytes([number])),),
        )

    with power_on([3 * MEMORY_MIB + 32], engine) as dom0:
        server = dom0.create(spec("server", 2, "/tcp serve 5000"))
        dom0.start(server)
        next(follow(server, "serving"))
        address = str(IPv4Address(server.nets[0].backend.vif.address))
        beside = f"nc -l -p {FLOOD_PORT} -e true; sleep 1; /tcp send {address} 5000 {seconds}"
        client = dom0.create(spec("client", 1, f"{script(address, 5000, seconds)}\n{beside}"))
        own = str(IPv4Address(client.nets[0].backend.vif.address))
        flood = f"until nc {own} {FLOOD_PORT} </dev/null; do sleep 0.2; done; /tcp flood {address} 9 1000"
        flooder = dom0.create(spec("flooder", 3, flood))
        devices = (client.nets[0], server.nets[0])
        dom0.start(client)
        before = sum(device.cpu_time_ns() for device in devices)
        names = [*(name for name, _ in ROWS), BESIDE_A_FLOOD]
        for name, result in zip(names, follow(client, "RESULT"), strict=False):
            now = sum(device.cpu_time_ns() for device in devices)
            print_row(f"{engine}, two domains", name, result, (now - before) / 1000)
            before = now
            if name == ROWS[-1][0]:
                dom0.start(flooder)
        port = flooder.nets[0].backend.vif.statistics
        print(f"{engine}: the flooder sent {port.tx_packets} packets, {port.tx_dropped} of them dropped")


def measure_qemu(program: Path, directory: Path, seconds: float, uplink: str) -> None:
    guest = obtain()
    modules = ("virtio_ring", "virtio", "virtio_pci_modern_dev", "virtio_pci_legacy_dev", "virtio_pci", "failover")
    nodes = qemu_modules(guest, (*modules, "net_failover", "virtio_net"))
    load = "".join(f"insmod /{node.path}\n" for node in nodes)
    address = "10.0.2.2" if uplink == "user" else "192.0.2.1"
    mine = "10.0.2.15" if uplink == "user" else "192.0.2.15"
    setup = f"ip link set eth0 up; ip addr add {mine}/24 dev eth0; ip route add default via {address}; sleep 1\n"
    archive = directory / "initrd"
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    archive.write_bytes(
        build_initramfs(
            guest.busybox,
            command=Command(["sh", "-c", load + setup + script(address, port, seconds)], "bench"),
            files=[HostFile.parse(f"{program}:/tcp")],
            modules=nodes,
        )
    )
    with ExitStack() as undo:
        ours, theirs = (undo.enter_context(end) for end in socket.socketpair())
        if uplink == "passt":
            words = ["passt", "--foreground", "--quiet", "--fd", str(theirs.fileno()), "--ipv4-only"]
            words += ["--address", mine, "--netmask", "24", "--gateway", address]
            passt = subprocess.Popen(words, stderr=subprocess.DEVNULL, pass_fds=[theirs.fileno()])
            undo.callback(passt.wait)
            undo.callback(passt.terminate)
        netdev = "user,id=n" if uplink == "user" else f"stream,id=n,addr.type=fd,addr.str={ours.fileno()}"
        serving = undo.enter_context(subprocess.Popen([program, "serve", str(port)], stdout=subprocess.DEVNULL))
        undo.callback(serving.terminate)
        command = [
            *("qemu-system-x86_64", "-M", "q35", "-accel", "tcg,thread=multi", "-cpu", "max", "-m", str(MEMORY_MIB)),
            *("-nodefaults", "-display", "none", "-serial", "stdio", "-no-reboot"),
            *(
                "-kernel",
                str(guest.kernel),
                "-initrd",
                str(archive),
                "-append",
                "console=ttyS0 panic=-1 quiet no_timer_check",
            ),
            *("-netdev", netdev, "-device", "virtio-net-pci,netdev=n"),
        ]
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=180 + 10 * seconds, check=False, pass_fds=[ours.fileno()]
        )
    results = [line for line in done.stdout.splitlines() if line.startswith("RESULT")]
    if len(results) != len(ROWS):
        raise SystemExit(f"QEMU, {uplink}: not all rows were measured: {done.stdout[-500:]!r} {done.stderr[-300:]!r}")
    for (name, _), result in zip(ROWS, results, strict=True):
        print_row(f"qemu q35, {uplink}", name, result, None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--router", action="store_true")
    parser.add_argument("--engine", action="append", choices=["unicorn", "kvm", "adaptive"])
    parser.add_argument("--qemu", action="store_true")
    parser.add_argument("--seconds", type=float, default=5.0)
    options = parser.parse_args()
    if options.router:
        router_costs()
        return
    with tempfile.TemporaryDirectory(prefix="bench-") as directory:
        program = Path(directory, "tcp")
        subprocess.run(["gcc", "-O2", "-static", "-Wall", "-o", program, SOURCE], check=True)
        for engine in options.engine or ["unicorn", "kvm", "adaptive"]:
            measure_domains(engine, program, options.seconds)
        for uplink in ("user", "passt") if options.qemu else ():
            measure_qemu(program, Path(directory), options.seconds, uplink)


if __name__ == "__main__":
    main()
