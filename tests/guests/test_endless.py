"""Whatever a guest has ring 0 do without end: its domain can be looked at, paused and destroyed, and others go on.

Before, one such hypercall kept its domain's lock, and with that whoever waited for it, until the machine was reset.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest

from .catalogue import CATALOGUE, PREBUILT

if TYPE_CHECKING:
    from machines import Machine

HELLO = next(guest for guest in CATALOGUE if guest.name == "hello")


@pytest.mark.usefixtures("handlers")
@pytest.mark.parametrize("engine_name", ["unicorn", "kvm", "adaptive"], indirect=True)
@pytest.mark.parametrize("mode", ["pins", "exchange", "multicall", "grants"])
def test_a_domain_in_an_endless_hypercall_is_in_nobodys_way(machine: Callable[[int], Machine], mode: str) -> None:
    from xenolith.dom0.console import Overflow
    from xenolith.dom0.image import load_image
    from xenolith.dom0.services import DomainSpec

    def spec(name: str, cmdline: str) -> DomainSpec:
        image = load_image(PREBUILT / f"{name}.elf")
        return DomainSpec(name=name, image=image, kernel=name, cmdline=cmdline, memory_kib=16 << 10)

    host = machine(64)
    control = host.dom0.control
    guest = host.dom0.create(spec("endless", mode))
    console = guest.console.open_reader(Overflow.DROP_OLDEST)
    host.dom0.start(guest)
    text = b""
    while b"endless: begin" not in text:
        data = console.read(timeout=60)
        assert data, text
        text += data
    assert b"not ok" not in text
    for _ in range(5):
        assert [vcpu.online for vcpu in control.vcpus(guest.domid)] == [True]
        control.pause(guest.domid)
        host.check_invariants()
        control.unpause(guest.domid)
    ending = host.run(spec("hello", HELLO.cmdline))
    assert not HELLO.complaints(ending.console, ending.shutdown_reason)
    assert not guest.console.closed
    host.dom0.destroy(guest)
    assert guest.domid not in [info.domid for info in control.list()]
    host.check_invariants()
