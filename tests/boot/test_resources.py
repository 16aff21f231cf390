"""A stock Debian guest whose vCPUs and memory change while it runs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import xenolith

from .conftest import DEADLINE_SECONDS

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


def test_the_balloon_gives_memory_back_to_the_machine_and_takes_it_again(machine: xenolith.Machine) -> None:
    domain = machine.create(xenolith.debian("deb", "6.1-cloud", memory_mib=256))
    domain.unpause()
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
