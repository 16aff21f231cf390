"""Checkpoints: what a running domain is, again and again, each time only what has changed (Remus, NSDI 2008).

A checkpoint is a saved domain (`stream`) that begins with what series it is of.  It has the pages that were written to
since the one before, its *base*; the first of a series has all.  The domain stands still only while these pages are
copied: to the host's page cache, not to its disk.  At the same moment each of its disks, which must be overlays, gets a
new layer, so that what it held then is kept by the file below.

Old checkpoints are given up by joining: a checkpoint gets what its bases have that it has not, and needs them no more
(`series.join`); a disk's layer takes the place of the one below it (`overlay.join_layers`).
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from xenolith.dom0.disks import DiskError
from xenolith.dom0.disks.overlay import OverlayDisk
from xenolith.dom0.migration import stream
from xenolith.dom0.migration.changes import Changes
from xenolith.dom0.migration.live import last_pages
from xenolith.dom0.migration.save import held
from xenolith.dom0.migration.stream import Writer
from xenolith.dom0.xenbus import DeviceGone
from xenolith.hypervisor.control import NotTracked
from xenolith.hypervisor.domain_record.kinds import Plain, RecordError

if TYPE_CHECKING:
    from xenolith.dom0.migration.series import Series
    from xenolith.dom0.services import Dom0, GuestDomain
    from xenolith.hypervisor.control import StillDomain


class Checkpointer:
    """Takes checkpoints of a domain. Close it: it costs the domain a little to be followed."""

    def __init__(self, dom0: Dom0, domain: GuestDomain) -> None:
        self._dom0 = dom0
        self._domain = domain
        self._changes: Changes | None = None
        self.why_not_followed = ""
        """Why each checkpoint has all of the memory, and the domain stands still for it: the kernel cannot tell."""

    @property
    def goes_on(self) -> bool:
        """The next checkpoint can have the last one as its base."""
        return self._changes is not None and self._changes.follows

    def take(self, out: BinaryIO, series: Series, description: Plain) -> tuple[int, int]:
        """Write a checkpoint; for how long the domain stood still (ns), and of how many pages that was.

        Without a base it has all. The files of `series.disks` are made.  Raises RecordError, DiskError and OSError;
        then, or where the checkpoint is lost later, `forget` and begin anew.
        """
        dom0, domain = self._dom0, self._domain
        writer = Writer(out)
        writer.json(stream.SERIES, series.plain())
        info = dom0.control.info(domain.domid)
        sizes = {"max_pages": info.ceiling_pages, "vcpus": info.max_vcpus, "engine": info.engine}
        writer.json(stream.DESCRIPTION, {**sizes, "toolstack": description})
        if not series.base:
            self._begin(writer)
        disks = {number: (overlay(self._domain, number), Path(path)) for number, path in series.disks}
        settle(domain)
        clock = dom0.hypervisor.clock
        began = clock.now()
        try:
            with held(dom0, domain) as services:
                with dom0.control.standing_still(domain.domid) as still:
                    pages = self._rest(writer, still)
                for disk, path in disks.values():
                    disk.snapshot(path)
        finally:
            dom0.control.unpause(domain.domid)
        stood = clock.now() - began
        writer.frames(still.frames)
        writer.json(stream.STATE, {"domain": still.record, "services": services.plain()})
        writer.end()
        return stood, pages

    def _begin(self, writer: Writer) -> None:
        """Follow it, and write all while it runs; at the standstill what was written to meanwhile remains."""
        self.forget()
        try:
            self._changes = Changes(self._dom0.control, self._domain.domid)
            self._changes.say(writer, self._changes.look())
            self.why_not_followed = ""
        except NotTracked as reason:
            self.forget()
            self.why_not_followed = str(reason)

    def _rest(self, writer: Writer, still: StillDomain) -> int:
        try:
            return last_pages(writer, still, self._changes)
        except NotTracked as reason:  # its memory was mapped anew, to make clones
            self.forget()
            raise RecordError(f"its changes were not followed any more: {reason}") from reason

    def forget(self) -> None:
        """The next checkpoint has to have all."""
        if self._changes is not None:
            self._changes.close()
            self._changes = None

    close = forget


def overlay(domain: GuestDomain, number: int) -> OverlayDisk:
    """A disk of a domain's. Raises DiskError where it is none with layers."""
    backend = domain.disks[number].backend
    if not isinstance(backend.disk, OverlayDisk):
        raise DiskError(f"{backend.spec.name} is no overlay")
    return backend.disk


def settle(domain: GuestDomain) -> None:
    """Bring to its disks what was written, while it runs: less is left to be when it stands still."""
    for device in domain.disks.values():
        with suppress(DeviceGone):
            device.ask(device.backend.settle)


def written_disks(domain: GuestDomain) -> list[int]:
    """The disks whose contents belong to a checkpoint. Raises DiskError where one has no layers."""
    found = []
    for number, device in sorted(domain.disks.items()):
        disk = device.backend.disk
        if disk.writable and not isinstance(disk, OverlayDisk):
            raise DiskError(
                f"{device.backend.spec.name} can be written to and is no overlay: what it holds could not be kept"
            )
        if disk.writable:
            found.append(number)
    return found
