"""Opening a disk of whatever format."""

from __future__ import annotations

from dataclasses import replace

from xenolith.dom0.disks import Disk, DiskFormat, DiskSource
from xenolith.dom0.disks.empty import EmptyDrive
from xenolith.dom0.disks.extents import ExtentDisk, read_table
from xenolith.dom0.disks.nbd import QemuDisk
from xenolith.dom0.disks.overlay import OverlayDisk
from xenolith.dom0.disks.raw import RawDisk


def open_disk(source: DiskSource | None) -> Disk:
    """The disk; without a source a drive with no medium. Raises DiskError."""
    if source is None:
        return EmptyDrive()
    if source.throw_away:
        return OverlayDisk.over(open_disk(replace(source, writable=False, throw_away=False)), source.discard)
    match source.format:
        case DiskFormat.RAW:
            return RawDisk(source.path, source.writable, source.discard)
        case DiskFormat.EXTENTS:
            return ExtentDisk(read_table(source.path), source.writable, source.discard)
        case DiskFormat.OVERLAY:
            return OverlayDisk.open(source.path, source.writable, source.discard, open_disk)
        case DiskFormat.QCOW | DiskFormat.QCOW2 | DiskFormat.QED | DiskFormat.VMDK | DiskFormat.VHDX | DiskFormat.VPC:
            return QemuDisk(source.path, source.format, source.writable, source.discard)
