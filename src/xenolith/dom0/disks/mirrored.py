"""A disk of which somebody else keeps a copy: it remembers which of its blocks were written to."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Final

import numpy as np

from xenolith.dom0.disks import SECTOR, Buffers, Disk

BLOCK: Final = 4096
_AT_ONCE: Final = 256  # blocks


class MirroredDisk:
    """Another disk, and the blocks of 4 KiB of it that were written to or discarded since `changed` told last."""

    def __init__(self, disk: Disk) -> None:
        self.disk: Final = disk
        self._lock: Final = threading.Lock()
        self._written = np.zeros(self._blocks, dtype=bool)

    @property
    def _blocks(self) -> int:
        return -(-self.disk.sectors * SECTOR // BLOCK)

    @property
    def sectors(self) -> int:
        return self.disk.sectors

    @property
    def writable(self) -> bool:
        return self.disk.writable

    @property
    def discard_granularity(self) -> int:
        return self.disk.discard_granularity

    @property
    def physical_sector_size(self) -> int:
        return self.disk.physical_sector_size

    def measure(self) -> None:
        """It keeps its size as long as it is mirrored."""

    def read(self, position: int, buffers: Buffers) -> None:
        self.disk.read(position, buffers)

    def write(self, position: int, buffers: Buffers) -> None:
        self.disk.write(position, buffers)
        self._note(position, sum(map(len, buffers)))

    def flush(self) -> None:
        self.disk.flush()

    def discard(self, position: int, length: int) -> None:
        self.disk.discard(position, length)
        self._note(position, length)

    def close(self) -> None:
        self.disk.close()

    def _note(self, position: int, length: int) -> None:
        with self._lock:
            self._written[position // BLOCK : -(-(position + length) // BLOCK)] = True

    def changed(self) -> Iterator[tuple[int, bytes]]:
        """What the blocks hold now that were written to; the number of the first one of each run, and the run."""
        with self._lock:
            written, self._written = self._written, np.zeros(len(self._written), dtype=bool)
        numbers = np.flatnonzero(written)
        for run in np.split(numbers, np.flatnonzero(np.diff(numbers) != 1) + 1) if len(numbers) else ():
            for at in range(0, len(run), _AT_ONCE):
                yield int(run[at]), self._contents(int(run[at]), min(len(run) - at, _AT_ONCE))

    def filled(self) -> Iterator[tuple[int, bytes]]:
        """The parts of it that are not all zeros, as `changed` tells them."""
        for first in range(0, len(self._written), _AT_ONCE):
            data = self._contents(first, min(len(self._written) - first, _AT_ONCE))
            if data != bytes(len(data)):
                yield first, data

    def _contents(self, first: int, count: int) -> bytes:
        """Whole blocks, with zeros after the end."""
        data = bytearray(count * BLOCK)
        inside = min(count * BLOCK, self.disk.sectors * SECTOR - first * BLOCK)
        self.disk.read(first * BLOCK, [memoryview(data)[:inside]])
        return bytes(data)
