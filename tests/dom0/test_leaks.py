"""However many domains come and go, nothing of them stays."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from xenolith.dom0.image import load_image
from xenolith.dom0.services import DomainSpec

if TYPE_CHECKING:
    from machines import Machine
    from xenolith.dom0.services import Dom0

HELLO = Path(__file__).parents[2] / "guests" / "prebuilt" / "hello.elf"
WARM_UP = 5  # cycles after which caches and pools have what they will keep


@dataclass(frozen=True)
class Held:
    """What a process with a machine holds."""

    threads: int
    descriptors: int
    mappings: int
    free_frames: int
    xenstore_nodes: int
    xenstore_watches: int
    domains: int


def held(dom0: Dom0) -> Held:
    gc.collect()
    store = dom0.xenstore.statistics()
    return Held(
        threads=threading.active_count(),
        descriptors=len(os.listdir("/proc/self/fd")),
        mappings=Path("/proc/self/maps").read_text().count("\n"),
        free_frames=dom0.hypervisor.memory.free_frames,
        xenstore_nodes=store["nodes"],
        xenstore_watches=store["watches"],
        domains=len(dom0.hypervisor.domains),
    )


def resident_kib() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4


@pytest.mark.parametrize("cycles", [50, pytest.param(1000, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])])
def test_domains_that_come_and_go_leave_nothing_behind(machine: Callable[[int], Machine], cycles: int) -> None:
    dom0 = machine(64).dom0
    image = load_image(HELLO)

    def cycle() -> None:
        domain = dom0.create(DomainSpec(name="hello", image=image, kernel="hello.elf", memory_kib=16 << 10))
        dom0.start(domain)
        assert domain.wait(60) is not None
        dom0.destroy(domain)

    for _ in range(WARM_UP):
        cycle()
    before, resident_before = held(dom0), resident_kib()
    for _ in range(cycles):
        cycle()
    after, resident_after = held(dom0), resident_kib()
    print(f"{cycles} cycles\nbefore {before} {resident_before} KiB\nafter  {after} {resident_after} KiB")
    # The allocator of the C library may keep arenas and split mappings, a few of them and not some for each domain.
    assert abs(after.mappings - before.mappings) < 20
    assert after.__class__(**{**vars(after), "mappings": 0}) == before.__class__(**{**vars(before), "mappings": 0})
    assert resident_after - resident_before < 8192 + cycles * 4
