"""What a configuration says about devices, as dom0 needs it; what is asked of the disks of a domain that exists."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from xenolith.dom0.backends.block import BlockBackend, VbdSpec
from xenolith.dom0.disks import SECTOR, DiskError, DiskFormat, DiskSource
from xenolith.dom0.services import Dom0, GuestDomain
from xenolith.dom0.shares import ShareSpec
from xenolith.dom0.xenbus import Device
from xenolith.hypervisor.control import DomainCreateError
from xenolith.toolstack.client import DiskInfo, InvalidRequest, NotSupported, ToolstackError
from xenolith.toolstack.config import disk as config
from xenolith.toolstack.config.devices import P9Share
from xenolith.toolstack.config.disk import Disk, DiskSpecification, virtual_device
from xenolith.toolstack.config.domain import DomainConfig

_FORMATS: Final = {
    config.DiskFormat.RAW: DiskFormat.RAW,
    config.DiskFormat.QCOW: DiskFormat.QCOW,
    config.DiskFormat.QCOW2: DiskFormat.QCOW2,
    config.DiskFormat.QED: DiskFormat.QED,
    config.DiskFormat.VHD: DiskFormat.VPC,
    config.DiskFormat.VMDK: DiskFormat.VMDK,
    config.DiskFormat.VHDX: DiskFormat.VHDX,
    config.DiskFormat.OVERLAY: DiskFormat.OVERLAY,
    config.DiskFormat.EXTENTS: DiskFormat.EXTENTS,
}


def format_of(source: DiskSource) -> config.DiskFormat:
    """What a DISKSPEC calls it."""
    return next(theirs for theirs, ours in _FORMATS.items() if ours is source.format)


def virtual_block_device(disk: Disk) -> VbdSpec:
    """The device that a DISKSPEC describes. Raises NotSupported and InvalidRequest.

    `backendtype` names programs of a Linux dom0, of which there are none here, and changes nothing.
    """
    name = disk.vdev or ""
    if disk.backend_domain not in (None, "", "0", "Domain-0"):
        raise NotSupported(f"{name}: a disk of the domain {disk.backend_domain} (backend=); they are dom0's here.")
    if disk.script:
        raise NotSupported(f"{name}: the block script {disk.script}; there is no Linux dom0 that could run it.")
    if disk.specification is DiskSpecification.VIRTIO:
        raise NotSupported(f"{name}: virtio; disks are Xen's own kind.")
    if disk.format is config.DiskFormat.EMPTY or not disk.target:
        return VbdSpec(number=_number(name), name=name, source=None, cdrom=True)
    source = DiskSource(
        path=Path(disk.target),
        format=_FORMATS[disk.format or config.DiskFormat.RAW],
        writable=disk.writable,
        discard=disk.discard is not False,
    )
    return VbdSpec(number=_number(name), name=name, source=source, cdrom=disk.is_cdrom)


def shared_folder(share: P9Share, number: int) -> ShareSpec:
    """The folder that a line of p9= describes. Raises NotSupported and InvalidRequest."""
    if share.backend_domain not in (None, "", "0", "Domain-0"):
        raise NotSupported(f"{share.tag}: a folder of the domain {share.backend_domain} (backend=); it is dom0's here.")
    if share.security_model != "none":
        raise NotSupported(f"{share.tag}: security_model={share.security_model}; there is none, as with xl.")
    if not share.tag or not share.tag.isprintable():
        raise InvalidRequest(f"{share.tag!r} is no tag of a shared folder.")
    return ShareSpec(number=number, tag=share.tag, path=Path(share.path), writable=share.writable)


def _number(vdev: str) -> int:
    number = virtual_device(vdev)
    if number is None:
        raise InvalidRequest(f"{vdev!r} is no virtual device: it is xvda, hda, sda, d0 or alike, or a number.")
    return number


def _device(domain: GuestDomain, vdev: str) -> Device[BlockBackend]:
    """Raises InvalidRequest."""
    device = domain.disks.get(_number(vdev))
    if device is None:
        raise InvalidRequest(f"Device {vdev} not connected.")
    return device


def disk_infos(dom0: Dom0, domain: GuestDomain) -> list[DiskInfo]:
    """All disks of a domain."""
    return [_info(dom0, device) for _, device in sorted(domain.disks.items())]


def _info(dom0: Dom0, device: Device[BlockBackend]) -> DiskInfo:
    def node(name: str) -> int:
        value = dom0.xenstore.get(f"{device.frontend}/{name}") or ""
        return int(value) if value.isascii() and value.isdigit() and len(value) < 11 else -1

    backend = device.backend
    source, statistics = backend.source, backend.statistics
    return DiskInfo(
        number=device.number,
        vdev=backend.spec.name,
        state=node("state"),
        event_channel=node("event-channel"),
        ring_ref=node("ring-ref"),
        backend_path=device.directory,
        target=str(source.path) if source else "",
        format=source.format if source else "empty",
        writable=backend.disk.writable,
        removable=backend.spec.cdrom,
        size_bytes=backend.disk.sectors * SECTOR,
        **vars(statistics),
    )


def attach_disk(dom0: Dom0, domain: GuestDomain, known: DomainConfig, disk: Disk) -> None:
    """Also into the configuration, so that the domain has it in its next life. Raises ToolstackError."""
    try:
        dom0.plug_disk(domain, virtual_block_device(disk))
    except DomainCreateError as error:
        raise ToolstackError(str(error)) from error
    known.disks.append(disk)


def detach_disk(dom0: Dom0, domain: GuestDomain, known: DomainConfig, vdev: str, force: bool) -> None:
    """Raises ToolstackError."""
    number = _device(domain, vdev).number
    if not dom0.unplug_disk(domain, number, force=force):
        raise ToolstackError(f"The guest does not let go of {vdev}: it is in use, or has no driver that listens.")
    known.disks[:] = [disk for disk in known.disks if virtual_device(disk.vdev or "") != number]


def change_medium(dom0: Dom0, domain: GuestDomain, known: DomainConfig, vdev: str, target: str) -> None:
    """Raises ToolstackError."""
    device = _device(domain, vdev)
    if not device.backend.spec.cdrom:
        raise InvalidRequest(f"{vdev} is no drive whose medium can be changed.")
    source = DiskSource(path=Path(target), writable=False) if target else None
    try:
        dom0.change_medium(domain, device.number, source)
    except DiskError as error:
        raise ToolstackError(str(error)) from error
    for disk in known.disks:
        if virtual_device(disk.vdev or "") == device.number:
            disk.target = target or None
            disk.format = config.DiskFormat.RAW if target else config.DiskFormat.EMPTY


def measure_disk(dom0: Dom0, domain: GuestDomain, vdev: str) -> None:
    """Raises ToolstackError."""
    try:
        dom0.measure_disk(domain, _device(domain, vdev).number)
    except DiskError as error:
        raise ToolstackError(str(error)) from error


def snapshot_disk(dom0: Dom0, domain: GuestDomain, vdev: str, path: Path) -> None:
    """Raises ToolstackError."""
    if not path.is_absolute():
        raise InvalidRequest(f"The path of a snapshot must be absolute: {path}.")
    try:
        dom0.snapshot_disk(domain, _device(domain, vdev).number, path)
    except (DiskError, OSError) as error:
        raise ToolstackError(str(error)) from error
