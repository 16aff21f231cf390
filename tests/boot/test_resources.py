"""A stock Debian guest whose vCPUs and memory change while it runs."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

import xenolith
from xenolith.debian.initramfs import Node, pack

from .conftest import DEADLINE_SECONDS
from .test_programs import build

pytestmark = pytest.mark.slow

CPUS = "/sys/devices/system/cpu"
BALLOON = "/sys/devices/system/xen_memory/xen_memory0"


@pytest.fixture
def machine(engine_name: str) -> Iterator[xenolith.Machine]:
    with xenolith.power_on(memory_mib=300, engine=engine_name, scheduler="credit2") as machine:
        yield machine


def said(domain: xenolith.Domain, script: str) -> str:
    """What a script prints at the guest's shell."""
    done = domain.run(script, timeout=DEADLINE_SECONDS)
    assert done.returncode == 0, done
    return done.output.decode()


def until(condition: str) -> str:
    return f"until [ {condition} ]; do sleep 0.1; done"


def test_linux_takes_vcpus_down_and_up(machine: xenolith.Machine) -> None:
    domain = machine.create(xenolith.debian("deb", "6.1-cloud", memory_mib=160, vcpus=3))
    domain.unpause()
    assert said(domain, "nproc").strip() == "3"
    domain.set_vcpus(1)
    assert said(domain, f"{until(f'$(cat {CPUS}/present) = 0')}; nproc").strip() == "1"
    assert [vcpu.online for vcpu in machine.client.vcpus(domain.domid)] == [True, False, False]
    domain.set_vcpus(2)  # what udev does when a processor has appeared, the test does
    said(domain, f"{until(f'$(cat {CPUS}/present) = 0-1')}; echo 1 > {CPUS}/cpu1/online")
    assert said(domain, "nproc").strip() == "2"
    assert [vcpu.online for vcpu in machine.client.vcpus(domain.domid)] == [True, True, False]


def with_storm(config: xenolith.DomainConfig, directory: Path) -> xenolith.DomainConfig:
    """The same with storm.c's program as /bin/storm. Skips where the host cannot compile it."""
    program = directory / "storm"
    build((Path(__file__).parent / "storm.c").read_text(), program, "-pthread")
    assert config.ramdisk is not None
    whole = directory / "initramfs"
    node = Node("bin/storm", stat.S_IFREG | 0o755, program.read_bytes())
    whole.write_bytes(Path(config.ramdisk).read_bytes() + pack([node]))
    return replace(config, ramdisk=str(whole))


def test_nothing_is_lost_while_vcpus_come_and_go_under_load(machine: xenolith.Machine, tmp_path: Path) -> None:
    domain = machine.create(with_storm(xenolith.debian("deb", "6.1-cloud", memory_mib=192, vcpus=4), tmp_path))
    domain.unpause()
    said(domain, "storm > /storm.out 2>&1 &")
    for count in (1, 4, 2):
        domain.set_vcpus(count)
        up = "".join(f"echo 1 > {CPUS}/cpu{number}/online; " for number in range(1, count) if count == 4)
        present = "0" if count == 1 else f"0-{count - 1}"
        assert said(domain, f"{until(f'$(cat {CPUS}/present) = {present}')}; {up} nproc").split()[-1] == str(count)
    result = said(domain, f"touch /stop; {until('-s /storm.out')}; cat /storm.out").split()
    rounds = dict(zip(result[::2], map(int, result[1::2]), strict=True))
    assert rounds.pop("wrong") == 0
    assert rounds.keys() == {"sums", "futex", "pipe", "fork"} and all(rounds.values()), rounds


def test_what_a_guest_counts_as_stolen_its_vcpu_waited_for_a_pcpu(engine_name: str) -> None:
    with xenolith.power_on(memory_mib=300, engine=engine_name, pcpus=1) as machine:
        domains = [machine.create(xenolith.debian(name, "6.1-cloud", memory_mib=128)) for name in ("one", "other")]
        for domain in domains:
            domain.unpause()
        said(domains[1], "(while :; do :; done) &")

        def stolen() -> tuple[float, float]:
            """Seconds, by the guest and by the hypervisor."""
            (ticks,) = said(domains[0], "awk 'NR == 1 { print $9 }' /proc/stat").split()
            (vcpu,) = machine.client.vcpus(domains[0].domid)
            return int(ticks) / 100, (vcpu.runnable_ns + vcpu.offline_ns) / 1e9

        before = stolen()
        said(domains[0], until(f"$(awk 'NR == 1 {{ print $9 }}' /proc/stat) -ge {int(before[0] * 100) + 200}"))
        after = stolen()
        assert after[0] - before[0] == pytest.approx(after[1] - before[1], abs=0.3)  # it counts at its ticks


def held_bytes() -> int:
    """Host memory in all domains' memory."""
    links = {
        descriptor: os.readlink(descriptor) for descriptor in Path("/proc/self/fd").iterdir() if descriptor.exists()
    }
    held = {os.stat(descriptor).st_ino: os.stat(descriptor) for descriptor, name in links.items() if "/memfd:" in name}
    return sum(each.st_blocks * 512 for each in held.values())


def test_the_balloon_gives_memory_back_to_the_machine_and_takes_it_again(machine: xenolith.Machine) -> None:
    domain = machine.create(xenolith.debian("deb", "6.1-cloud", memory_mib=256))
    domain.unpause()
    said(domain, "head -c 20000000 /dev/urandom > /data; sha256sum /data > /sum")
    said(domain, "while [ ! -e /stop ]; do sha256sum -c -s /sum || echo bad; done > /load 2>&1 &")
    said(domain, "head -c 90000000 /dev/zero > /much; rm /much")
    full = held_bytes()
    total = int(said(domain, "awk '/MemTotal/ {print $2}' /proc/meminfo"))
    free = machine.host.free_memory_kib
    for mib in (160, 256):
        domain.set_memory_target(mib << 10)
        said(domain, until(f"$(cat {BALLOON}/info/current_kb) = {mib << 10}"))
        info = domain.info
        assert (info.memory_kib, info.max_memory_kib) == (mib << 10, mib << 10)
        given = 256 - mib << 10
        assert int(said(domain, "awk '/MemTotal/ {print $2}' /proc/meminfo")) == total - given
        assert abs(machine.host.free_memory_kib - free - given) <= 1024  # page tables of Xen's own come and go
        if given:
            assert held_bytes() <= full - (given << 10) // 4, "what was filled the host has again"
    assert said(domain, "touch /stop; wait; cat /load; dmesg | grep -c 'Out of memory'; true").split() == ["0"]
