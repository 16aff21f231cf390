"""The `xl` commands about virtual block devices: block-attach, block-list, block-detach, cd-insert, cd-eject.

Three of our own: block-resize, block-snapshot and disk-create.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from xenolith.cli.xl_command import Failure, Option, Options, Session, command, complain, resolve, shown
from xenolith.toolstack.client import ToolstackError
from xenolith.toolstack.config.disk import Disk, DiskSpecError, parse_disk
from xenolith.toolstack.config.grammar import ConfigFile


def _parse(words: Sequence[str]) -> Disk:
    """A DISKSPEC out of one word or several, of which each is a part. Relative paths are meant from here."""
    file = ConfigFile("command line")
    try:
        disk = parse_disk(file, ",".join(words))
    except DiskSpecError:
        raise Failure("\n".join(file.diagnostics)) from None
    if disk.script is None and disk.target:
        disk.target = str(Path.cwd() / disk.target)
    return disk


@command("<Domain> <disk-spec-component(s)>", "Give a domain another virtual block device", operands=2)
def block_attach(session: Session, options: Options, operands: Sequence[str]) -> int:
    disk = _parse(operands[1:])
    try:
        session.client.attach_disk(resolve(session, operands[0]), disk)
    except ToolstackError as error:
        raise Failure(f"{error}\nlibxl_device_disk_add failed.") from error
    return 0


@command("<Domain(s)>", "List virtual block devices for a domain", operands=1, modifies=False)
def block_list(session: Session, options: Options, operands: Sequence[str]) -> int:
    click.echo(f"{'Vdev':<5} {'BE':<3} {'handle':<6} {'state':<5} {'evt-ch':<6} {'ring-ref':<8} {'BE-path':<30}")
    status = 0
    for word in operands:
        try:
            domid = resolve(session, word)
            disks = session.client.disks(domid)
        except (Failure, ToolstackError):
            status = complain(f"{shown(word)} is an invalid domain identifier")
            continue
        for disk in disks:
            click.echo(
                f"{disk.number:<5} {disk.backend_domid:<3} {domid:<6} {disk.state:<5} "
                f"{disk.event_channel:<6} {disk.ring_ref:<8} {disk.backend_path:<30}"
            )
    return status


@command(
    "[options] <Domain> <DevId>",
    "Take a virtual block device from a domain",
    Option("f", "Also where the guest does not let go of it", long="force"),
    operands=2,
)
def block_detach(session: Session, options: Options, operands: Sequence[str]) -> int:
    domid = resolve(session, operands[0])
    try:
        session.client.detach_disk(domid, operands[1], "f" in options)
    except ToolstackError as error:
        raise Failure(f"{error}\nlibxl_device_disk_remove failed.") from error
    return 0


@command("<Domain> <VirtualDevice> <type:path>", "Insert a medium into a guest's drive", operands=3)
def cd_insert(session: Session, options: Options, operands: Sequence[str]) -> int:
    disk = _parse([f"vdev={operands[1]}", "access=r", "devtype=cdrom", f"target={operands[2].removeprefix('file:')}"])
    session.client.change_medium(resolve(session, operands[0]), operands[1], disk.target or "")
    return 0


@command("<Domain> <VirtualDevice>", "Eject a medium from a guest's drive", operands=2)
def cd_eject(session: Session, options: Options, operands: Sequence[str]) -> int:
    session.client.change_medium(resolve(session, operands[0]), operands[1], "")
    return 0


@command("<Domain> <DevId>", "Tell a domain that the storage of a disk has grown", operands=2)
def block_resize(session: Session, options: Options, operands: Sequence[str]) -> int:
    session.client.measure_disk(resolve(session, operands[0]), operands[1])
    return 0


@command(
    "<Domain> <DevId> <File>",
    "Keep in a file what a disk of the format overlay holds now, and let it go on in a new overlay of that",
    operands=3,
)
def block_snapshot(session: Session, options: Options, operands: Sequence[str]) -> int:
    session.client.snapshot_disk(resolve(session, operands[0]), operands[1], Path.cwd() / operands[2])
    return 0


@command(
    "[options] <File>",
    "Make a disk: an empty one, or an overlay of another",
    Option("s", "How large it is, such as 512M or 20G", long="size", value="SIZE"),
    Option("b", "The disk that it is a copy-on-write overlay of", long="backing", value="FILE"),
    Option("F", "The format of that disk, raw if not given", long="backing-format", value="FORMAT"),
    operands=1,
    modifies=False,
)
def disk_create(session: Session, options: Options, operands: Sequence[str]) -> int:
    from xenolith.toolstack.disk_images import create_disk

    try:
        create_disk(Path(operands[0]), options.get("s"), options.get("b"), options.get("F", "raw"))
    except ToolstackError as error:
        raise Failure(str(error)) from error
    return 0
