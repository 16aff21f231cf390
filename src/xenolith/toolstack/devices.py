"""What a configuration says about devices, as dom0 needs it."""

from __future__ import annotations

from pathlib import Path

from xenolith.dom0.backends.block import VbdSpec
from xenolith.dom0.disks import DiskSource
from xenolith.toolstack.client import InvalidRequest, NotSupported
from xenolith.toolstack.config.disk import Disk, DiskFormat, DiskSpecification, virtual_device


def virtual_block_device(disk: Disk) -> VbdSpec:
    """The device that a DISKSPEC describes. Raises NotSupported and InvalidRequest.

    `backendtype` names programs of a Linux dom0, of which there are none here, and changes nothing.
    """
    name = disk.vdev or ""
    number = virtual_device(name)
    if number is None:
        raise InvalidRequest(f"{name!r} is no virtual device: it is xvda, hda, sda, d0 or alike, or a number.")
    if disk.backend_domain not in (None, "", "0", "Domain-0"):
        raise NotSupported(f"{name}: a disk of the domain {disk.backend_domain} (backend=); they are dom0's here.")
    if disk.script:
        raise NotSupported(f"{name}: the block script {disk.script}; there is no Linux dom0 that could run it.")
    if disk.specification is DiskSpecification.VIRTIO:
        raise NotSupported(f"{name}: virtio; disks are Xen's own kind.")
    if disk.format is DiskFormat.EMPTY or not disk.target:
        return VbdSpec(number=number, name=name, source=None, cdrom=True)
    if disk.format not in (None, DiskFormat.RAW):
        raise NotSupported(f"{name}: disks in the format {disk.format}.")
    source = DiskSource(path=Path(disk.target), writable=disk.writable, discard=disk.discard is not False)
    return VbdSpec(number=number, name=name, source=source, cdrom=disk.is_cdrom)
