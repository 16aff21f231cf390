"""Virtual disks: what is behind a virtual block device.

A `Disk` is a row of sectors that can be read, written, flushed and discarded.  `raw` keeps them in a file or a block
device of the host, `extents` in parts of several, `overlay` only what was changed of another disk; `nbd` reaches those
that a program serves, as qemu-nbd does for the formats of others.  Nothing here knows of guests; a disk's methods move
bytes between its storage and buffers, which for a back-end are the guest's own frames.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Final, Protocol

SECTOR: Final = 512

Buffers = Sequence[memoryview]


class DiskError(Exception):
    """A disk cannot be opened; the text says why, to a person."""


class Disk(Protocol):
    """A row of `sectors` sectors of 512 bytes. Positions and lengths are in bytes, and within it.

    Methods may be called by several threads at a time.  They raise OSError where the storage fails.
    """

    @property
    def sectors(self) -> int: ...

    @property
    def writable(self) -> bool: ...

    @property
    def discard_granularity(self) -> int:
        """Bytes; 0: nothing can be discarded."""

    @property
    def physical_sector_size(self) -> int:
        """Bytes that the storage writes at once."""

    def measure(self) -> None:
        """Look again how large the storage is: `sectors` follows."""

    def read(self, position: int, buffers: Buffers) -> None:
        """Fill the buffers, one after the other."""

    def write(self, position: int, buffers: Buffers) -> None:
        """Write the buffers, one after the other. Once a later `flush` has returned they survive a loss of power."""

    def flush(self) -> None:
        """Bring all that was written to stable storage."""

    def discard(self, position: int, length: int) -> None:
        """The contents of a range are of no use any more."""

    def close(self) -> None: ...


class DiskFormat(StrEnum):
    RAW = "raw"
    EXTENTS = "extents"
    OVERLAY = "overlay"
    QCOW = "qcow"
    QCOW2 = "qcow2"
    QED = "qed"
    VMDK = "vmdk"
    VHDX = "vhdx"
    VPC = "vpc"  # what Xen calls vhd


@dataclass(frozen=True, kw_only=True)
class DiskSource:
    """Where a disk is kept.

    The format is what the owner says and never guessed from the contents: a guest writes those, and could have its
    disk taken for one that refers to any file of the host's.
    """

    path: Path
    format: DiskFormat = DiskFormat.RAW
    writable: bool = True
    discard: bool = True
    throw_away: bool = False  # writes go to an overlay that is gone when the disk is closed


def rest(buffers: Buffers, count: int) -> list[memoryview]:
    """What is left of the buffers after their first `count` bytes."""
    left: list[memoryview] = []
    for buffer in buffers:
        if count < len(buffer):
            left.append(buffer[count:] if count else buffer)
            count = 0
        else:
            count -= len(buffer)
    return left


def cut(buffers: Buffers, count: int) -> list[memoryview]:
    """The first `count` bytes of the buffers."""
    taken: list[memoryview] = []
    for buffer in buffers:
        if not count:
            break
        taken.append(buffer[:count] if count < len(buffer) else buffer)
        count -= len(taken[-1])
    return taken
