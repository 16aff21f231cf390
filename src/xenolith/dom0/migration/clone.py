"""Cloning: domains that begin as copies of one that stands still, and share its memory until they write.

A `FrozenDomain` is what a save file is, kept in this process: the record, the list of frames, and the contents of the
memory, sealed.  The domain that it was taken of goes on upon a private view of the same memory, like its clones.  A
clone that was not let run costs nothing but its tables and a few pages.

Disks that the domain writes to are overlays.  At the moment of the freeze each gets a new layer, as at a checkpoint:
what it held is kept by the file below, of which any number of overlays can be made, one for each clone.

Each clone is told who it is, in its xenstore directory: `clone/number` (from 1 on), `clone/parent` (a name) and
`clone/seed` (random, in hexadecimal digits).  What in the guest has to differ (host name, machine-id, keys, the state
of its random numbers) is the same in all clones until somebody in the guest makes use of that.
"""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from xenolith.dom0.domain_tree import home
from xenolith.dom0.migration.checkpoint import overlay, settle
from xenolith.dom0.migration.save import held
from xenolith.hypervisor.control import DomainCreateError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from xenolith.dom0.migration.services import ServicesRecord
    from xenolith.dom0.services import Dom0, GuestDomain
    from xenolith.dom0.xenstore import HostRequests
    from xenolith.hypervisor.control import Frozen

SEED_BYTES = 32


@dataclass(frozen=True)
class FrozenDomain:
    """What a domain was at one moment. Close it when no more clones are wanted."""

    name: str
    frozen: Frozen
    services: ServicesRecord

    def close(self) -> None:
        self.frozen.close()


def freeze(dom0: Dom0, domain: GuestDomain, disks: Mapping[int, Path]) -> FrozenDomain:
    """Take a domain as it is; it goes on. `disks`: of those that it writes to, the file that keeps what each holds.

    Raises RecordError where that cannot be, DiskError and OSError; then some of these files may have been made.
    """
    settle(domain)
    overlays = [(overlay(domain, number), path) for number, path in disks.items()]
    try:
        with held(dom0, domain) as services:
            frozen = FrozenDomain(domain.spec.name, dom0.control.freeze(domain.domid), services)
            try:
                for disk, path in overlays:
                    disk.snapshot(path)
            except BaseException:
                frozen.close()
                raise
        with suppress(DomainCreateError):  # then its charge follows from when it is let run the next time
            dom0.copies.attend(domain.domid)
        return frozen
    finally:
        dom0.control.unpause(domain.domid)


def introduce(store: HostRequests, domid: int, number: int, parent: str) -> None:
    """Tell a clone who it is."""
    readable = ["n0", f"r{domid}"]
    for name, value in {"number": str(number), "parent": parent, "seed": os.urandom(SEED_BYTES).hex()}.items():
        store.write(f"{home(domid)}/clone/{name}", value, readable)
