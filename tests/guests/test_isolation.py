"""A guest that makes 100,000 random hypercalls harms nobody but, at most, itself."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import pytest

from .catalogue import CATALOGUE, LONG_RUNS, Guest

if TYPE_CHECKING:
    from machines import Machine

pytestmark = pytest.mark.usefixtures("handlers")
BYSTANDER = next(guest for guest in CATALOGUE if guest.name == "hello")


def digest_of_frames(machine: Machine, domid: int) -> tuple[str, list[int]]:
    """A digest of every frame that a domain owns, and which they are."""
    domain = machine.dom0.hypervisor.domains[domid]
    owned = np.flatnonzero(domain.frames.owners == domid).tolist()
    return hashlib.sha256(b"".join(bytes(domain.memory.page(mfn)) for mfn in owned)).hexdigest(), owned


@pytest.mark.slow
@pytest.mark.parametrize("guest", LONG_RUNS, ids=lambda guest: guest.name)
def test_random_hypercalls_change_no_frame_of_another_domain(
    guest: Guest, machine: Callable[[int], Machine]
) -> None:
    from xenolith.dom0.image import load_image
    from xenolith.dom0.services import DomainSpec

    both = machine(guest.memory_mib + BYSTANDER.memory_mib)

    def spec(what: Guest, name: str) -> DomainSpec:
        return DomainSpec(
            name=name,
            image=load_image(what.path),
            kernel=str(what.path),
            cmdline=what.cmdline,
            memory_kib=what.memory_mib << 10,
            vcpus=what.vcpus,
        )

    bystander = both.dom0.create(spec(BYSTANDER, "bystander"))  # built, with its rings mapped, and not started
    before = digest_of_frames(both, bystander.domid)
    ending = both.run(spec(guest, "fuzz"))
    assert not guest.complaints(ending.console, ending.shutdown_reason)
    assert digest_of_frames(both, bystander.domid) == before
    both.dom0.start(bystander)
    ending = both.finish(bystander)
    assert not BYSTANDER.complaints(ending.console, ending.shutdown_reason)
