"""Checkpoints in a directory: old ones are given up, any brings back memory and disk, whatever was killed when."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from toolstack.conftest import GUESTS
from xenolith.dom0.disks import DiskFormat, DiskSource
from xenolith.dom0.disks.open import open_disk
from xenolith.dom0.disks.overlay import create_overlay
from xenolith.toolstack import config
from xenolith.toolstack.client import ToolstackError
from xenolith.toolstack.config.disk import Disk
from xenolith.toolstack.config.domain import DomainConfig
from xenolith.toolstack.embedded import EmbeddedToolstack

if TYPE_CHECKING:
    from machines import Machine

BLOCKS = 256


def recording(directory: Path, format: config.disk.DiskFormat = config.disk.DiskFormat.OVERLAY) -> DomainConfig:
    """A guest that writes record after record to a disk of 1 MiB, and says so."""
    path = directory / "disk"
    if format is config.disk.DiskFormat.OVERLAY:
        create_overlay(path, None, BLOCKS * 8)
    else:
        path.write_bytes(bytes(BLOCKS * 4096))
    disk = Disk(vdev="xvda", target=str(path), format=format)
    kernel = str(GUESTS / "blkfront-records.elf")
    return DomainConfig("rec", kernel=kernel, target_memory_kib=8 << 10, disks=[disk])


def numbers(toolstack: EmbeddedToolstack, domid: int) -> list[int]:
    printed = toolstack.dom0.domains[domid].console.scrollback.decode()
    return [int(number) for number in re.findall(r"^flushed (\d+)$", printed, re.MULTILINE)]


def wait_for(toolstack: EmbeddedToolstack, domid: int, more: int) -> int:
    """Wait for so many more records; the last one then."""
    console = toolstack.open_console(domid)
    first = (numbers(toolstack, domid) or [0])[-1]
    try:
        while (last := (numbers(toolstack, domid) or [0])[-1]) < first + more:
            assert console.read(60), "nothing comes any more"
    finally:
        console.close()
    return last


def check_disk(path: Path, last: int, more: int = 1) -> None:
    """The disk has record `last`, perhaps a few more, and in each place the one that was written there last."""
    disk = open_disk(DiskSource(path=path, format=DiskFormat.OVERLAY, writable=False))
    data = bytearray(BLOCKS * 4096)
    disk.read(0, [memoryview(data)])
    disk.close()
    found = [set(struct.unpack_from("<512Q", data, block * 4096)) for block in range(BLOCKS)]
    written = max(max(record) for record in found)
    assert last <= written <= last + more
    for block, record in enumerate(found):
        latest = range(max(written - BLOCKS, 0) + 1, written + 1)
        assert record == {max((n for n in latest if n * 17 % BLOCKS == block), default=0)}


def test_any_checkpoint_brings_back_memory_and_disk(machine: Callable[[int], Machine], tmp_path: Path) -> None:
    toolstack = EmbeddedToolstack(machine(32).dom0)
    domid = toolstack.create(recording(tmp_path))
    toolstack.unpause(domid)
    kept = tmp_path / "kept"
    lasts = {}
    for number in range(1, 6):
        wait_for(toolstack, domid, 40)
        made = toolstack.checkpoint(domid, kept, 10)
        assert (made.number, made.base) == (number, f"{number - 1}.checkpoint" if number > 1 else "")
    with pytest.raises(ToolstackError, match="rollback"):
        toolstack.restore(kept / "5.checkpoint")
    for number in (5, 2):
        domid = toolstack.rollback(kept / f"{number}.checkpoint")
        lasts[number] = numbers(toolstack, domid)[-1]
        check_disk(tmp_path / f"disk.{number}.checkpoint", lasts[number])
        toolstack.unpause(domid)
        assert wait_for(toolstack, domid, 300) > lasts[number]
        assert toolstack.checkpoint(domid, kept, 10).number == number + 1, "and later ones are gone"
    assert lasts[2] < lasts[5]
    toolstack.pause(domid)
    said = numbers(toolstack, domid)
    toolstack.destroy(domid)
    assert said == list(range(said[0], said[-1] + 1))
    check_disk(tmp_path / "disk", said[-1], more=BLOCKS)  # what it said after that was not heard
    names = [path.name for path in tmp_path.glob("disk*")]
    assert sorted(names) == ["disk", *(f"disk.{number}.checkpoint" for number in (1, 2, 3))]


def test_old_checkpoints_are_given_up_and_the_oldest_needs_none(
    machine: Callable[[int], Machine], tmp_path: Path
) -> None:
    toolstack = EmbeddedToolstack(machine(32).dom0)
    domid = toolstack.create(recording(tmp_path))
    toolstack.unpause(domid)
    kept = tmp_path / "kept"
    for _ in range(21):
        wait_for(toolstack, domid, 15)
        toolstack.checkpoint(domid, kept, 2)
    found = toolstack.checkpoints(kept)
    assert [each.number for each in found] == [17, 18, 19, 20, 21]
    assert [each.base for each in found] == ["", *(f"{number}.checkpoint" for number in (17, 18, 19, 20))]
    assert len(list(tmp_path.glob("disk.*"))) == 5, "layers of the disk were joined"
    domid = toolstack.rollback(found[0].path)
    last = numbers(toolstack, domid)[-1]
    toolstack.unpause(domid)
    wait_for(toolstack, domid, 300)
    toolstack.pause(domid)
    said = numbers(toolstack, domid)
    toolstack.destroy(domid)
    assert last in said and said == list(range(said[0], said[-1] + 1))
    check_disk(tmp_path / "disk", said[-1], more=BLOCKS)  # what it said after that was not heard


def test_a_disk_that_has_no_layers_is_refused(machine: Callable[[int], Machine], tmp_path: Path) -> None:
    toolstack = EmbeddedToolstack(machine(32).dom0)
    domid = toolstack.create(recording(tmp_path, config.disk.DiskFormat.RAW))
    toolstack.unpause(domid)
    with pytest.raises(ToolstackError, match="xvda can be written to and is no overlay"):
        toolstack.checkpoint(domid, tmp_path / "kept", 1)
    wait_for(toolstack, domid, 5)
    assert not toolstack.checkpoints(tmp_path / "kept")
