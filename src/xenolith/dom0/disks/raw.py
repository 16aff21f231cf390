"""A disk in a file, or in a block device of the host, sector by sector."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import stat
from collections.abc import Callable, Iterable
from pathlib import Path
from struct import Struct
from typing import Final, NamedTuple

from xenolith.dom0.disks import SECTOR, Buffers, DiskError, rest

FALLOC_FL_KEEP_SIZE: Final = 1
FALLOC_FL_PUNCH_HOLE: Final = 2
BLKDISCARD: Final = 0x1277
BLKPBSZGET: Final = 0x127B
_RANGE: Final = Struct("=QQ")
_FLOCK: Final = Struct("@hhqqi4x")  # struct flock: type, whence, start, length, process

_libc: Final = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


class Range(NamedTuple):
    """A part of a file, in bytes; a length of 0 means all that follows."""

    start: int
    length: int


WHOLE: Final = Range(0, 0)


class RawDisk:
    """A file or block device as a disk.

    The host's page cache is used, so a write that was not flushed survives the end of this process but not that of the
    host.  What a disk uses of a file is locked (fcntl(2), open file description locks, which QEMU's tools respect): one
    disk at a time may write to it, or any number read.
    """

    def __init__(
        self, path: Path, writable: bool = True, discard: bool = True, parts: Iterable[Range] = (WHOLE,)
    ) -> None:
        """`parts`: what will be used of it, if that is not all. Raises DiskError."""
        self.path = path
        self.writable: Final = writable
        self._flush_error: OSError | None = None
        flags = (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC | os.O_NONBLOCK  # a pipe would block
        try:
            if writable and stat.S_ISBLK(os.stat(path).st_mode):
                flags |= os.O_EXCL  # not one that the host has mounted
            self.descriptor = os.open(path, flags)
        except OSError as error:
            raise DiskError(f"cannot open the disk {path}: {error.strerror}") from error
        except ValueError as error:  # what an overlay or a table of extents calls a path may be none
            raise DiskError(f"cannot open the disk {str(path)!r}: {error}") from error
        try:
            self._examine(discard)
            for part in parts:
                self.lock(part)
        except BaseException:
            os.close(self.descriptor)
            raise

    def _examine(self, discard: bool) -> None:
        status = os.fstat(self.descriptor)
        self._is_device = stat.S_ISBLK(status.st_mode)
        if not self._is_device and not stat.S_ISREG(status.st_mode):
            raise DiskError(f"{self.path} can be no disk: it is neither a file nor a block device")
        self.measure()
        if not self.sectors:
            raise DiskError(f"{self.path} has no sector: it is shorter than {SECTOR} bytes")
        self.physical_sector_size = SECTOR
        if self._is_device:
            answer = fcntl.ioctl(self.descriptor, BLKPBSZGET, bytes(4))
            self.physical_sector_size = int.from_bytes(answer, "little")
        unit = self.physical_sector_size if self._is_device else status.st_blksize
        self.discard_granularity = unit if discard and self.writable else 0

    def lock(self, part: Range) -> None:
        """Use this part of the file too. Raises DiskError where somebody else does."""
        kind = fcntl.F_WRLCK if self.writable else fcntl.F_RDLCK
        try:
            fcntl.fcntl(self.descriptor, fcntl.F_OFD_SETLK, _FLOCK.pack(kind, os.SEEK_SET, part.start, part.length, 0))
        except BlockingIOError as error:
            others = "another disk uses it" if self.writable else "another disk writes to it"
            raise DiskError(f"{self.path} is in use: {others}") from error

    def freeze(self) -> None:
        """Write no more to the file, and let others read it."""
        fcntl.fcntl(self.descriptor, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_RDLCK, os.SEEK_SET, 0, 0, 0))

    def unlock(self, part: Range) -> None:
        """Use this part no more."""
        lock = _FLOCK.pack(fcntl.F_UNLCK, os.SEEK_SET, part.start, part.length, 0)
        fcntl.fcntl(self.descriptor, fcntl.F_OFD_SETLK, lock)

    def measure(self) -> None:
        self.sectors = os.lseek(self.descriptor, 0, os.SEEK_END) // SECTOR

    def read(self, position: int, buffers: Buffers) -> None:
        self._move(os.preadv, position, buffers)

    def write(self, position: int, buffers: Buffers) -> None:
        self._move(os.pwritev, position, buffers)

    def _move(self, transfer: Callable[[int, Buffers, int], int], position: int, buffers: Buffers) -> None:
        wanted = sum(map(len, buffers))
        while (count := transfer(self.descriptor, buffers, position)) != wanted:
            if not count:
                raise self.cut_off(position)
            buffers = rest(buffers, count)
            position += count
            wanted -= count

    def cut_off(self, position: int) -> OSError:
        """The file has become too short for what was to be read or written there."""
        return OSError(errno.EIO, f"{self.path} has been cut off before byte {position + 1}")

    def flush(self) -> None:
        """Raises OSError also where the file has been removed: what was written to it will be found by nobody.

        Once a flush has failed all do: the host forgets which pages it could not write (fsync(2)), so that it would
        call the next one a success.
        """
        if self._flush_error is not None:
            raise self._flush_error
        try:
            os.fdatasync(self.descriptor)
        except OSError as error:
            self._flush_error = error
            raise
        if not os.fstat(self.descriptor).st_nlink:
            raise FileNotFoundError(errno.ENOENT, f"{self.path} has been removed")

    def discard(self, position: int, length: int) -> None:
        if self._is_device:
            fcntl.ioctl(self.descriptor, BLKDISCARD, _RANGE.pack(position, length))
        elif _libc.fallocate(self.descriptor, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, position, length):
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))

    def close(self) -> None:
        os.close(self.descriptor)
