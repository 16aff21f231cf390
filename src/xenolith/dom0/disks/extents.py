"""An extent-mapped disk: a list of extents of one or more files or devices (paper 3.4.2).

The translation table says, in the order of the disk's sectors, where each run of them is.  Many disks are so cut out of
one device, a disk grows by an extent elsewhere, or moves piece by piece.  dom0 may change the table between two
requests while a domain uses the disk (`remap`).

A table is a text file with a line for each extent; what follows a `#` is a comment:

    SECTORS PATH FIRST_SECTOR

in sectors of 512 bytes, relative paths being so to the table's directory.
"""

from __future__ import annotations

import bisect
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Final

from xenolith.dom0.disks import SECTOR, Buffers, DiskError, cut, rest
from xenolith.dom0.disks.raw import Range, RawDisk

_NUMBER: Final = re.compile(r"[0-9]{1,18}", re.ASCII)


@dataclass(frozen=True)
class Extent:
    """`sectors` sectors of a file or device, from number `first` on."""

    sectors: int
    path: Path
    first: int

    @property
    def range(self) -> Range:
        return Range(self.first * SECTOR, self.sectors * SECTOR)


def read_table(path: Path) -> list[Extent]:
    """The extents of a table file. Raises DiskError."""
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DiskError(f"cannot read the table of extents {path}: {error}") from error
    extents = []
    for number, line in enumerate(lines, start=1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        sectors, _, rest_of_line = text.partition(" ")
        name, _, first = rest_of_line.strip().rpartition(" ")
        if not (_NUMBER.fullmatch(sectors) and _NUMBER.fullmatch(first) and name.strip() and int(sectors)):
            raise DiskError(f"{path}:{number}: {text!r} is no extent; it is SECTORS PATH FIRST_SECTOR")
        extents.append(Extent(int(sectors), path.parent / name.strip(), int(first)))
    return extents


class _Table:
    """A translation table, with what it refers to."""

    def __init__(self, extents: Sequence[Extent], files: dict[Path, RawDisk]) -> None:
        self.extents: Final = tuple(extents)
        self.files: Final = files
        self.ends: Final = list(accumulate(extent.sectors * SECTOR for extent in extents))


class ExtentDisk:
    """A disk that is a list of extents."""

    def __init__(self, extents: Sequence[Extent], writable: bool = True, discard: bool = True) -> None:
        """Raises DiskError."""
        self.writable: Final = writable
        self._discard: Final = discard
        self._table = _Table((), {})
        self.remap(extents)

    def remap(self, extents: Sequence[Extent]) -> None:
        """Change the translation table; no other method may run meanwhile. What the sectors hold is not moved.

        Raises DiskError, and then nothing has changed.
        """
        before = self._table
        files: dict[Path, RawDisk] = {}
        locked: list[Extent] = []
        try:
            _check_overlaps(extents)
            for extent in extents:
                if extent.path not in files:
                    known = before.files.get(extent.path)
                    files[extent.path] = known or RawDisk(extent.path, self.writable, self._discard, parts=())
                file = files[extent.path]
                file.measure()
                if extent.first + extent.sectors > file.sectors:
                    raise DiskError(
                        f"{extent.path} has {file.sectors} sectors, and none at {extent.first + extent.sectors - 1}"
                    )
                file.lock(extent.range)
                locked.append(extent)
            if not extents:
                raise DiskError("a table of extents that has none makes no disk")
        except DiskError:
            self._let_go(locked, files, keep=before)
            raise
        self._table = _Table(extents, files)
        self._let_go(before.extents, before.files, keep=self._table)

    def _let_go(self, extents: Sequence[Extent], files: dict[Path, RawDisk], keep: _Table) -> None:
        for extent in extents:
            files[extent.path].unlock(extent.range)
        for extent in keep.extents:  # what overlaps was unlocked too
            if extent.path in files:
                keep.files[extent.path].lock(extent.range)
        for path, file in files.items():
            if path not in keep.files:
                if self.writable:
                    file.flush()  # the guest's next flush will not reach it
                file.close()

    @property
    def sectors(self) -> int:
        return self._table.ends[-1] // SECTOR

    @property
    def discard_granularity(self) -> int:
        return max(file.discard_granularity for file in self._table.files.values())

    @property
    def physical_sector_size(self) -> int:
        return max(file.physical_sector_size for file in self._table.files.values())

    def measure(self) -> None:
        """Its table says how large it is."""

    def _parts(self, position: int, length: int) -> Iterator[tuple[RawDisk, int, int]]:
        """Where a range lies: file, position there, length."""
        table = self._table
        index = bisect.bisect_right(table.ends, position)
        while length:
            extent, end = table.extents[index], table.ends[index]
            count = min(length, end - position)
            start = end - extent.sectors * SECTOR
            yield table.files[extent.path], extent.first * SECTOR + position - start, count
            position += count
            length -= count
            index += 1

    def read(self, position: int, buffers: Buffers) -> None:
        for file, place, count in self._parts(position, sum(map(len, buffers))):
            file.read(place, cut(buffers, count))
            buffers = rest(buffers, count)

    def write(self, position: int, buffers: Buffers) -> None:
        for file, place, count in self._parts(position, sum(map(len, buffers))):
            file.write(place, cut(buffers, count))
            buffers = rest(buffers, count)

    def flush(self) -> None:
        for file in self._table.files.values():
            file.flush()

    def discard(self, position: int, length: int) -> None:
        for file, place, count in self._parts(position, length):
            if file.discard_granularity:
                file.discard(place, count)

    def close(self) -> None:
        for file in self._table.files.values():
            file.close()


def _check_overlaps(extents: Sequence[Extent]) -> None:
    ordered = sorted(extents, key=lambda extent: (extent.path, extent.first))
    for one, other in pairwise(ordered):
        if one.path == other.path and one.first + one.sectors > other.first:
            raise DiskError(f"two extents share sector {other.first} of {one.path}")
