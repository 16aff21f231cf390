"""Relocated again and again while it works, with two vCPUs and a disk, a guest loses nothing."""

from __future__ import annotations

import socket
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from machines import Machine
from relocating import WITH_A_DISK, check, counting, follow, said
from xenolith.dom0.backends.block import VbdSpec
from xenolith.dom0.disks import DiskSource
from xenolith.dom0.migration import live
from xenolith.dom0.migration.restore import Receiver
from xenolith.dom0.services import Dom0, DomainSpec, GuestDomain

pytestmark = pytest.mark.slow


def relocate(here: Dom0, there: Dom0, domain: GuestDomain) -> tuple[GuestDomain, live.Figures]:
    spec: DomainSpec = replace(domain.spec, image=None)
    ours, theirs = socket.socketpair()
    arrived: list[GuestDomain] = []

    def receive() -> None:
        with theirs, theirs.makefile("rb") as source:
            receiver = Receiver(there.control, source)
            arrived.append(there.restore(spec, receiver.receive()))
            theirs.sendall(live.READY)
            receiver.wait_for_word()
            there.start(arrived[0])
            theirs.sendall(live.STARTED)

    thread = threading.Thread(target=receive)
    thread.start()
    with ours, ours.makefile("rb") as answers, ours.makefile("wb") as out:
        figures = live.send(here, domain, out, answers, None, print, lambda: None, ours.close)
    thread.join()
    here.destroy(domain)
    return arrived[0], figures


def test_a_guest_with_a_disk_is_relocated_again_and_again(engine_name: str, tmp_path: Path) -> None:
    (tmp_path / "disk").write_bytes(bytes(1 << 20))
    disk = VbdSpec(number=51712, name="xvda", source=DiskSource(path=tmp_path / "disk"))
    spec = counting(2, script=WITH_A_DISK, disks=[disk])
    machines = Machine(200, engine_name), Machine(200, engine_name)
    with machines[0].dom0 as here, machines[1].dom0 as there:
        free = here.control.machine().free_pages, there.control.machine().free_pages
        domain = here.create(spec)
        here.start(domain)
        follow(domain.console, "d 5")
        hosts = here, there
        for _ in range(6):
            domain, figures = relocate(*hosts, domain)
            print(figures)
            hosts = hosts[1], hosts[0]
            goal = said(domain.console.scrollback.decode(), "d")[-1] + 20
            check(follow(domain.console, f"d {goal}").partition("\n")[2], "ad", first=None)
        for machine in machines:
            machine.check_invariants()
        hosts[0].destroy(domain)
        assert free == (here.control.machine().free_pages, there.control.machine().free_pages)
