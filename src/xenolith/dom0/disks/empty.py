"""A drive without a medium."""

from __future__ import annotations

import errno
from typing import Final, NoReturn

from xenolith.dom0.disks import SECTOR, Buffers


class EmptyDrive:
    """No sectors, so that nothing can be asked of it."""

    sectors: Final = 0
    writable: Final = False
    discard_granularity: Final = 0
    physical_sector_size: Final = SECTOR

    def measure(self) -> None:
        pass

    def read(self, position: int, buffers: Buffers) -> NoReturn:
        raise OSError(errno.ENOMEDIUM, "the drive is empty")

    def write(self, position: int, buffers: Buffers) -> NoReturn:
        raise OSError(errno.ENOMEDIUM, "the drive is empty")

    def flush(self) -> None:
        pass

    def discard(self, position: int, length: int) -> NoReturn:
        raise OSError(errno.ENOMEDIUM, "the drive is empty")

    def close(self) -> None:
        pass
