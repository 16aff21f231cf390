"""The outside by a TAP device, in a network namespace that the test makes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

INSIDE = """
import socket, subprocess, threading
from ipaddress import IPv4Interface, IPv4Address
from dom0.netfront import checksums_are_right, number
from dom0.test_router import World, ends
from xenolith.dom0.network.frame import udp
from xenolith.dom0.network.tap import Tap

for command in ("tuntap add xen0 mode tap", "address add 198.51.100.1/24 dev xen0", "link set xen0 up"):
    subprocess.run(["ip", *command.split()], check=True)
world = World()
came = threading.Event()
vif = world.vif("one")
vif.wake = came.set
tap = Tap(world.router, "xen0", IPv4Interface("198.51.100.2/24"), int(IPv4Address("198.51.100.1")))
world.router.uplink = tap.port
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as host:
    host.bind(("198.51.100.1", 7))
    host.settimeout(60)
    with world.router.turns:
        world.send(vif, udp(vif.address, 1000, number("198.51.100.1"), 7, b"to the host"))
    data, sender = host.recvfrom(100)
    assert (data, sender[0]) == (b"to the host", "198.51.100.2"), (data, sender)
    host.sendto(b"and back", sender)
    assert came.wait(60)
frame = vif.queue.take()
assert ends(frame) == (number("198.51.100.1"), 7, vif.address, 1000)
assert frame.data.endswith(b"and back")
assert checksums_are_right(frame.data)
tap.close()
assert world.router.uplink is None
print("DONE")
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="making a TAP device needs root")
@pytest.mark.skipif(not os.path.exists("/dev/net/tun"), reason="there is no /dev/net/tun")
@pytest.mark.skipif(not (shutil.which("ip") and shutil.which("unshare")), reason="needs iproute2 and util-linux")
def test_a_packet_to_the_host_and_its_answer() -> None:
    if subprocess.run(["unshare", "-n", "ip", "tuntap", "add", "xen0", "mode", "tap"], capture_output=True).returncode:
        pytest.skip("a TAP device cannot be made here")
    done = subprocess.run(
        ["unshare", "-n", sys.executable, "-c", INSIDE],
        cwd=Path(__file__).parents[1],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout == "DONE\n", done.stderr
