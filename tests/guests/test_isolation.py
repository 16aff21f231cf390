"""A guest harms nobody but, at most, itself: by 100,000 random hypercalls, or where paging is not validated at all."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np
import pytest

from xenolith.abi.x86 import PTE_ADDRESS, PTE_P, PTE_US
from xenolith.hypervisor import view

from . import catalogue
from .catalogue import CATALOGUE, LONG_RUNS, Guest

if TYPE_CHECKING:
    from machines import Machine
    from xenolith.dom0.services import DomainSpec
    from xenolith.hypervisor.domain import Domain

BYSTANDER = next(guest for guest in CATALOGUE if guest.name == "hello")


def digest_of_frames(machine: Machine, domid: int) -> tuple[str, list[int]]:
    """A digest of every frame that a domain owns, and which they are."""
    domain = machine.dom0.hypervisor.domains[domid]
    owned = np.flatnonzero(domain.frames.owners == domid).tolist()
    return hashlib.sha256(b"".join(bytes(domain.memory.page(mfn)) for mfn in owned)).hexdigest(), owned


@pytest.mark.slow
@pytest.mark.usefixtures("handlers")
@pytest.mark.parametrize("guest", LONG_RUNS, ids=lambda guest: guest.name)
def test_random_hypercalls_change_no_frame_of_another_domain(guest: Guest, machine: Callable[[int], Machine]) -> None:
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


REACH = catalogue.PREBUILT / "reach.elf"
SECRET = (0x5EC2E75EC2E75EC2).to_bytes(8, "little")
FRAMES = 2048 + view.XEN_FRAMES + 512 + view.ALIASES  # of a domain of 8 MiB: its own, Xen's, the M2P, aliases
HOW = {"reads": "", "writes": "write", **{f"far-{number}": f"far={number}" for number in range(8)}}


def reach(how: str) -> DomainSpec:
    from xenolith.dom0.image import load_image
    from xenolith.dom0.services import DomainSpec

    cmdline = f"frames={FRAMES} {how}"
    return DomainSpec(name="reach", image=load_image(REACH), kernel="reach", cmdline=cmdline, memory_kib=8 << 10)


def unchecked(checked: Callable[..., int]) -> Callable[..., int]:
    """In place of paging.modify_l1: an entry that it refuses is stored all the same, and holds nothing."""

    def modify_l1(domain: Domain, index: int, new: int, owner: int | None = None) -> int:
        q, frames = domain.memory.q, domain.frames
        old = (q[index] & PTE_ADDRESS) >> 12
        if q[index] & PTE_P and (old >= frames.frames or frames.owner[old] != domain.domid):
            q[index] = 0
            domain.entry_changed and domain.entry_changed(index, PTE_P, 0)
        if checked(domain, index, new, owner):
            checked(domain, index, 0)
            q[index] = new | PTE_US
        return 0

    return modify_l1


@pytest.fixture
def bystander(machine: Callable[[int], Machine], monkeypatch: pytest.MonkeyPatch) -> Iterator[Bystander]:
    """A machine with a domain that does not run, each frame of which has the secret in its first words."""
    monkeypatch.setenv("XENOLITH_NATIVE", "off")
    yield Bystander(machine(64))


class Bystander:
    def __init__(self, machine: Machine) -> None:
        from xenolith.dom0.image import load_image
        from xenolith.dom0.services import DomainSpec

        self.machine = machine
        path = BYSTANDER.path
        self.domain = machine.dom0.create(
            DomainSpec(name="bystander", image=load_image(path), kernel="hello", memory_kib=8 << 10)
        )
        domain = machine.dom0.hypervisor.domains[self.domain.domid]
        for mfn in np.flatnonzero(domain.frames.type_infos == 0).tolist():
            if domain.frames.owner[mfn] == domain.domid:
                domain.memory.page(mfn)[:] = SECRET * 512
        self.before = digest_of_frames(machine, self.domain.domid)

    def check(self) -> None:
        assert digest_of_frames(self.machine, self.domain.domid) == self.before


def test_with_validation_a_guest_maps_no_frame_but_its_own(bystander: Bystander) -> None:
    ending = bystander.machine.run(reach("write far=0"))
    mapped = int(re.findall(r"mapped (\d+) ", ending.console)[0])
    assert mapped <= 2048 + 2, "no more than it has, its shared_info and its grant table"
    assert "done PASSED=" in ending.console and "FAILED=0" in ending.console
    bystander.check()


@pytest.mark.parametrize("how", HOW.values(), ids=HOW.keys())
def test_without_validation_a_guest_still_meets_nothing_but_itself(
    bystander: Bystander, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from xenolith.hypervisor import paging

    dom0 = bystander.machine.dom0
    monkeypatch.setattr(paging, "modify_l1", unchecked(paging.modify_l1))
    domain = dom0.create(reach(how))
    dom0.start(domain)
    bystander.machine.finish(domain)
    monkeypatch.undo()
    console = domain.console.scrollback.decode()
    dom0.destroy(domain)
    assert "not ok" not in console
    assert re.search(rf"mapped {FRAMES} read {FRAMES}$", console, re.MULTILINE), "it has seen all that there is"
    bystander.check()
    ending = bystander.machine.run(reach(""))
    assert "FAILED=0" in ending.console, "and the machine goes on"
