"""Network front-ends in a tiny guest: one that keeps to the protocol beside some that do not."""

from __future__ import annotations

from collections.abc import Callable
from ipaddress import IPv4Address
from typing import TYPE_CHECKING

import pytest

from .catalogue import PREBUILT, checks
from .test_blkfront import held

if TYPE_CHECKING:
    from machines import Ending, Machine

pytestmark = pytest.mark.usefixtures("handlers")
VIFS = 6


def run(machine: Machine, cmdline: str = "") -> Ending:
    """Run the guest to its end and destroy it."""
    from xenolith.dom0.backends.net import VifSpec
    from xenolith.dom0.image import load_image
    from xenolith.dom0.services import DomainSpec

    path = PREBUILT / "netfront.elf"
    vifs = tuple(
        VifSpec(number=n, mac=b"\0\x16\x3e\0\7" + bytes([n + 1]), ip=str(IPv4Address("10.213.7.1") + n))
        for n in range(VIFS)
    )
    domain = machine.dom0.create(
        DomainSpec(
            name="netfront", image=load_image(path), kernel=str(path), cmdline=cmdline, memory_kib=32 << 10, nets=vifs
        )
    )
    machine.dom0.start(domain)
    ending = machine.finish(domain)
    assert not checks("netfront").complaints(ending.console, ending.shutdown_reason)
    machine.check_invariants()
    machine.dom0.destroy(domain)
    return ending


def test_hostile_front_ends_lose_their_devices_and_the_good_one_works_on(machine: Callable[[int], Machine]) -> None:
    host = machine(64)
    run(host)
    before = held(host)
    ending = run(host)
    assert held(host) == before
    assert ending.log.count("broke the protocol") == 8, "four rings of each run"
    assert "its back-end failed" not in ending.log


@pytest.mark.parametrize("seed", [1, 2])
def test_random_slots_from_a_guest_are_answered_or_close_the_device(
    machine: Callable[[int], Machine], seed: int
) -> None:
    ending = run(machine(64), f"fuzz=3000 seed={seed}")
    assert "its back-end failed" not in ending.log
