"""Random code in user mode, and a kernel that is entered when nothing of it is where it should be.

Nothing that a domain executes reaches the host or another domain: no exception, no change in a bystander's memory, a
consistent frame table.  XENOLITH_STRAYS=N tries so many seeds; CI has two.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest

from .catalogue import CRASH, Guest, checks

if TYPE_CHECKING:
    from machines import Machine

pytestmark = pytest.mark.usefixtures("handlers")
SEEDS = range(1, 1 + int(os.environ.get("XENOLITH_STRAYS", "2")))
RUNS = 1500


@pytest.mark.parametrize("seed", SEEDS)
def test_code_that_goes_astray_ends_in_traps_and_touches_nobody(
    machine: Callable[[int], Machine], seed: int, caplog: pytest.LogCaptureFixture
) -> None:
    from xenolith.dom0.image import load_image
    from xenolith.dom0.services import DomainSpec

    def spec(guest: Guest) -> DomainSpec:
        return DomainSpec(
            name=guest.name, image=load_image(guest.path), kernel=guest.file, cmdline=guest.cmdline, memory_kib=32 << 10
        )

    made = machine(128)
    bystander = made.dom0.create(spec(checks("hello")))
    memory = made.dom0.hypervisor.domains[bystander.domid].memory.b
    before = bytes(memory)
    stray = Guest(f"strays-{seed}", "strays.elf", f"seed={seed} runs={RUNS} last", shutdown_reason=CRASH)
    ending = made.run(spec(stray))
    complaints = stray.complaints(ending.console, CRASH)  # how the last entry ended is the code's own affair
    assert not complaints
    assert ending.shutdown_reason is not None
    assert bytes(memory) == before, "a bystander's memory is as it was"
    assert not [record for record in caplog.records if record.exc_info], "no exception in the host"
