"""Machines for tests: every guest test runs once for each engine that works here.

A guest runs to its end on the real clock under a generous deadline, which is there to end a hung test and not to time
anything. Whatever a test did with its machine, the frame table's invariants must hold afterwards.

The hypervisor is imported by the fixtures, so that tests which need none of it start at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from machines import Ending, Machine

settings.register_profile("untimed", deadline=None)  # on a loaded machine a slow example is no failure
settings.load_profile("untimed")


@pytest.fixture(params=["unicorn", "kvm", "adaptive"])
def engine_name(request: pytest.FixtureRequest) -> str:
    """The name of an engine; tests of one that cannot run here are skipped, with the reason."""
    from machines import missing

    engine = str(request.param)
    if reason := missing(engine):
        pytest.skip(f"no {engine} engine here: {reason}")
    return engine


@pytest.fixture
def machine(engine_name: str) -> Iterator[Callable[[int], Machine]]:
    """Call it with a size in MiB to get a machine with this engine; checked and switched off after the test."""
    from machines import Machine

    made: list[Machine] = []

    def make(mib: int) -> Machine:
        made.append(Machine(mib, engine_name))
        return made[-1]

    yield make
    try:
        for machine in made:
            machine.check_invariants()
    finally:
        for machine in made:
            machine.dom0.close()


@pytest.fixture
def boot_guest(machine: Callable[[int], Machine]) -> Callable[..., Ending]:
    """Run one of our tiny guests (an ELF file) alone on a machine, to its end."""
    from xenolith.dom0.image import load_image
    from xenolith.dom0.services import DomainSpec

    def boot(path: Path, cmdline: str = "", vcpus: int = 1, memory_mib: int = 32) -> Ending:
        spec = DomainSpec(
            name=path.stem,
            image=load_image(path),
            kernel=str(path),
            cmdline=cmdline,
            memory_kib=memory_mib << 10,
            vcpus=vcpus,
        )
        return machine(memory_mib).run(spec)

    return boot
