"""Relocated again and again while it works, with two vCPUs and a disk, a guest loses nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from machines import Machine
from relocating import WITH_A_DISK, check, counting, follow, relocate, said
from xenolith.dom0.backends.block import VbdSpec
from xenolith.dom0.disks import DiskSource

pytestmark = pytest.mark.slow


def relocate_again_and_again(engine_name: str, tmp_path: Path, vcpus: int, times: int = 6) -> None:
    (tmp_path / "disk").write_bytes(bytes(1 << 20))
    disk = VbdSpec(number=51712, name="xvda", source=DiskSource(path=tmp_path / "disk"))
    spec = counting(vcpus, script=WITH_A_DISK, disks=[disk])
    machines = Machine(200, engine_name), Machine(200, engine_name)
    with machines[0].dom0 as here, machines[1].dom0 as there:
        free = here.control.machine().free_pages, there.control.machine().free_pages
        domain = here.create(spec)
        here.start(domain)
        follow(domain.console, "d 5")
        hosts = here, there
        for _ in range(times):
            domain, figures = relocate(*hosts, domain)
            print(figures)
            hosts = hosts[1], hosts[0]
            goal = said(domain.console.scrollback.decode(), "d")[-1] + 20
            check(follow(domain.console, f"d {goal}").partition("\n")[2], "ad", first=None)
        for machine in machines:
            machine.check_invariants()
        hosts[0].destroy(domain)
        assert free == (here.control.machine().free_pages, there.control.machine().free_pages)


def test_a_guest_with_a_disk_is_relocated_again_and_again(engine_name: str, tmp_path: Path) -> None:
    relocate_again_and_again(engine_name, tmp_path, 2)
