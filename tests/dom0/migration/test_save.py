"""Saved and restored, a stock Debian guest goes on as if nothing had been."""

from __future__ import annotations

import io
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from machines import Machine
from relocating import check, counting, follow
from xenolith.dom0.migration.restore import Receiver
from xenolith.dom0.migration.save import save
from xenolith.dom0.migration.stream import Writer
from xenolith.dom0.services import Dom0, DomainSpec, GuestDomain

if TYPE_CHECKING:
    pass

pytestmark = pytest.mark.slow


def saved(dom0: Dom0, domain: GuestDomain, compress: bool = False) -> io.BytesIO:
    out = io.BytesIO()
    save(dom0, domain, Writer(out, compress), None, lambda done, total: None)
    out.seek(0)
    return out


def restored(dom0: Dom0, spec: DomainSpec, stream: io.BytesIO) -> GuestDomain:
    return dom0.restore(replace(spec, image=None, ramdisk=b""), Receiver(dom0.control, stream).receive())


@pytest.mark.parametrize("vcpus", [1, 2])
def test_a_guest_goes_on_where_it_was_saved(engine_name: str, vcpus: int) -> None:
    names = "ab"[:vcpus]
    spec = counting(vcpus)
    machine = Machine(300, engine_name)
    with machine.dom0 as dom0:
        free = dom0.control.machine().free_pages
        domain = dom0.create(spec)
        dom0.start(domain)
        follow(domain.console, "a 40")
        stream = saved(dom0, domain, compress=vcpus == 2)
        dom0.destroy(domain)
        assert dom0.control.machine().free_pages == free
        for _ in range(2):  # from one file, twice
            stream.seek(0)
            again = restored(dom0, spec, stream)
            machine.check_invariants()
            dom0.control.unpause(again.domid)
            dom0.control.unpause(again.domid)
            printed = follow(again.console, "a 200")
            check(printed, names)
            machine.check_invariants()
            dom0.destroy(again)
