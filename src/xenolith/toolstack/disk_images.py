"""Making images of disks."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Final

from xenolith.dom0.disks import SECTOR, DiskError, DiskFormat, DiskSource
from xenolith.dom0.disks.open import open_disk
from xenolith.dom0.disks.overlay import create_overlay
from xenolith.toolstack.client import InvalidRequest, ToolstackError

_UNITS: Final = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def create_disk(path: Path, size: str | None = None, backing: str | None = None, backing_format: str = "raw") -> None:
    """Make an empty raw disk of a size, or an overlay of another disk, of its size unless one is given.

    Raises ToolstackError, also where the file exists.
    """
    size_bytes = None if size is None else size_in_bytes(size)
    try:
        if backing is not None:
            _create_overlay(path, Path(backing), backing_format, size_bytes)
        elif size_bytes is None:
            raise InvalidRequest("An empty disk needs a size (-s), an overlay a backing (-b).")
        else:
            descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o666)
            os.truncate(descriptor, size_bytes)
            os.close(descriptor)
    except (OSError, DiskError) as error:
        raise ToolstackError(f"cannot create {path}: {error}") from error


def _create_overlay(path: Path, backing: Path, name: str, size_bytes: int | None) -> None:
    if name not in list(DiskFormat):
        raise InvalidRequest(f"{name!r} is no format; there are {', '.join(DiskFormat)}.")
    source = DiskSource(path=backing.absolute(), format=DiskFormat(name), writable=False)
    disk = open_disk(source)
    sectors = disk.sectors if size_bytes is None else size_bytes // SECTOR
    disk.close()
    create_overlay(path, source, sectors)


def size_in_bytes(text: str) -> int:
    """Of "512M" or "20G". Raises InvalidRequest."""
    match = re.fullmatch(r"([0-9]{1,12})([KMGT]?)i?B?", text, re.ASCII)
    size = int(match[1]) * _UNITS[match[2]] if match else 0
    if size < SECTOR or size % SECTOR:
        raise InvalidRequest(f"{text!r} is no size of a disk: it is such as 512M or 20G, and a multiple of 512 bytes.")
    return size
