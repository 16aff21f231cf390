"""Opening a disk of whatever kind."""

from __future__ import annotations

from xenolith.dom0.disks import Disk, DiskSource
from xenolith.dom0.disks.empty import EmptyDrive
from xenolith.dom0.disks.raw import RawDisk


def open_disk(source: DiskSource | None) -> Disk:
    """The disk; without a source a drive with no medium. Raises DiskError."""
    if source is None:
        return EmptyDrive()
    return RawDisk(source.path, source.writable, source.discard)
