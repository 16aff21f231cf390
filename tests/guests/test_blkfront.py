"""Block-device front-ends in tiny guests, one that keeps to the protocol and one that does not."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from dom0.frontends import Follower

from .catalogue import PREBUILT, checks

if TYPE_CHECKING:
    from machines import Ending, Machine
    from xenolith.dom0.services import GuestDomain

pytestmark = pytest.mark.usefixtures("handlers")
SECTORS = 4096
PATTERN = b"".join(bytes((sector * 7 + at) & 0xFF for at in range(512)) for sector in range(SECTORS))


def disks(directory: Path, count: int) -> list[Path]:
    paths = [directory / f"disk{number}.img" for number in range(count)]
    for path in paths:
        path.write_bytes(PATTERN)
    return paths


def make(machine: Machine, guest: str, paths: Sequence[Path], cmdline: str = "") -> GuestDomain:
    from xenolith.dom0.backends.block import VbdSpec
    from xenolith.dom0.disks import DiskSource
    from xenolith.dom0.image import load_image
    from xenolith.dom0.services import DomainSpec

    path = PREBUILT / f"{guest}.elf"
    vbds = tuple(
        VbdSpec(number=51712 + 16 * index, name=f"xvd{'abcdefgh'[index]}", source=DiskSource(path=image))
        for index, image in enumerate(paths)
    )
    return machine.dom0.create(
        DomainSpec(
            name=guest, image=load_image(path), kernel=str(path), cmdline=cmdline, memory_kib=32 << 10, disks=vbds
        )
    )


def run(machine: Machine, guest: str, paths: Sequence[Path], cmdline: str = "") -> Ending:
    """Run a guest to its end and destroy it; of its devices nothing may stay."""
    domain = make(machine, guest, paths, cmdline)
    machine.dom0.start(domain)
    ending = machine.finish(domain)
    assert not checks(guest).complaints(ending.console, ending.shutdown_reason)
    machine.check_invariants()
    machine.dom0.destroy(domain)
    return ending


def held(machine: Machine) -> tuple[int, int, int, int]:
    """Threads, descriptors, frames, watches."""
    dom0 = machine.dom0
    gc.collect()
    return (
        threading.active_count(),
        len(os.listdir("/proc/self/fd")),
        dom0.hypervisor.memory.free_frames,
        dom0.xenstore.statistics()["watches"],
    )


def test_a_front_end_that_keeps_to_the_protocol(machine: Callable[[int], Machine], tmp_path: Path) -> None:
    (image,) = disks(tmp_path, 1)
    host = machine(64)
    run(host, "blkfront", [image])
    data = image.read_bytes()
    assert data[16 * 512 : 24 * 512] == b"\xa5" * 4096
    assert data[24 * 512 : 32 * 512] == bytes(4096)
    assert data[: 16 * 512] + data[32 * 512 :] == PATTERN[: 16 * 512] + PATTERN[32 * 512 :]


def test_a_hostile_front_end_loses_its_devices_and_nothing_else(
    machine: Callable[[int], Machine], tmp_path: Path
) -> None:
    host = machine(128)
    images = disks(tmp_path, 8)
    bystanders = disks(tmp_path / "..", 1)
    run(host, "blkfront-abuse", images)
    before = held(host)
    for image in images:
        image.write_bytes(PATTERN)
    other = make(host, "blkfront", bystanders)
    ending = run(host, "blkfront-abuse", images)
    host.dom0.start(other)
    assert not checks("blkfront").complaints(host.finish(other).console, 0)
    host.dom0.destroy(other)
    assert held(host) == before
    assert ending.log.count("broke the protocol") == 10, "five rings of each run"
    assert "its back-end failed" not in ending.log
    for image in images:
        data = image.read_bytes()
        assert data[:4096] + data[8192:] == PATTERN[:4096] + PATTERN[8192:], "one write was allowed"


@pytest.mark.parametrize("seed", [1, 2])
def test_random_requests_from_a_guest_are_all_answered(
    machine: Callable[[int], Machine], tmp_path: Path, seed: int
) -> None:
    host = machine(64)
    ending = run(host, "blkfront-abuse", disks(tmp_path, 1), f"fuzz=3000 seed={seed}")
    assert "failed" not in ending.log


def test_python_serves_disks_where_the_hypervisors_c_was_not_compiled(
    machine: Callable[[int], Machine], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The back-end's C, if it was, has nothing then to pin frames with."""
    from xenolith.hypervisor import ring0

    monkeypatch.setattr(ring0, "pin_addresses", lambda: (0, 0))
    run(machine(64), "blkfront-abuse", disks(tmp_path, 1), "fuzz=300 seed=3")


def test_a_domain_destroyed_while_its_disks_work_gives_all_back(
    machine: Callable[[int], Machine], tmp_path: Path
) -> None:
    host = machine(64)
    images = disks(tmp_path, 1)
    before = None
    for _ in range(6):
        domain = make(host, "blkfront-abuse", images, "fuzz=100000000 seed=9")
        connected = Follower(host.dom0.xenstore, f"{domain.disks[51712].directory}/state")
        host.dom0.start(domain)
        connected.wait("4")
        connected.close()
        host.dom0.destroy(domain)
        before = before or held(host)
        assert held(host) == before
