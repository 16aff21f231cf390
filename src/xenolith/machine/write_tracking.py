"""Which frames of a memory were written to since one last asked: userfaultfd(2) write protection, and PAGEMAP_SCAN.

The host's kernel write-protects the mapping, and lifts that by itself at the first write to a page (Linux 6.7,
UFFD_FEATURE_WP_ASYNC): a microsecond or two, for whoever writes: guest code on either engine, native code, Python,
read(2).  One ioctl tells what was written and protects it again, so that nothing is missed between two questions.
Processes that have mappings of their own (`MachineMemory.other_writers`) are asked.

A page that was given back to the host is not reported: whoever keeps copies compares `MachineMemory.populated`.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
from struct import Struct
from typing import Final

import numpy as np
import numpy.typing as npt

from xenolith.abi.x86 import PAGE_SHIFT
from xenolith.machine.memory import MachineMemory

_SYS_USERFAULTFD: Final = 323
_UFFD_USER_MODE_ONLY: Final = 1  # what a process without privileges may have
_UFFDIO_API: Final = 0xC018_AA3F
_UFFDIO_REGISTER: Final = 0xC020_AA00
_UFFD_API: Final = 0xAA
_WP, _WP_SHMEM, _WP_UNPOPULATED, _WP_ASYNC = 1 << 0, 1 << 12, 1 << 13, 1 << 15
_REGISTER_MODE_WP: Final = 2
_API = Struct("<3Q")  # api, features, ioctls
_REGISTER = Struct("<4Q")  # start, length, mode, ioctls

_PAGEMAP_SCAN: Final = 0xC060_6610
_SCAN_WP_MATCHING, _SCAN_CHECK_WPASYNC = 1, 2
_PAGE_IS_WRITTEN: Final = 2
_SCAN = Struct("<12Q")  # size flags start end walk_end vec vec_len max_pages inverted mask anyof return
_REGIONS: Final = 4096
_REGION_WORDS: Final = 3  # start, end, categories

_libc = ctypes.CDLL(None, use_errno=True)


class NotTracked(Exception):
    """This host's kernel cannot tell; the text says why."""


class WriteTracking:
    """Follows what is written to a domain's own frames. Close it: writing costs a little more until then."""

    def __init__(self, memory: MachineMemory) -> None:
        """Raises NotTracked."""
        self._memory = memory
        self._start = memory.address
        self._end = memory.address + (memory.frames << PAGE_SHIFT)
        self._regions = np.zeros((_REGIONS, _REGION_WORDS), dtype=np.uint64)
        self._pending: npt.NDArray[np.bool_] = np.zeros(memory.frames, dtype=bool)
        self._pagemap = -1
        self._fault = _libc.syscall(_SYS_USERFAULTFD, os.O_CLOEXEC | os.O_NONBLOCK | _UFFD_USER_MODE_ONLY)
        if self._fault < 0:
            raise NotTracked(f"userfaultfd: {os.strerror(ctypes.get_errno())}")
        try:
            self._pagemap = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
            features = _WP | _WP_SHMEM | _WP_UNPOPULATED | _WP_ASYNC
            fcntl.ioctl(self._fault, _UFFDIO_API, _API.pack(_UFFD_API, features, 0))
            size = self._end - self._start
            fcntl.ioctl(self._fault, _UFFDIO_REGISTER, _REGISTER.pack(self._start, size, _REGISTER_MODE_WP, 0))
            self.written()
        except (OSError, NotTracked) as error:
            self.close()
            why = error.strerror if isinstance(error, OSError) else error
            raise NotTracked(f"write protection by userfaultfd: {why}") from error

    def written(self) -> npt.NDArray[np.bool_]:
        """Of each frame, whether it was written to since the last call, which any thread may do at any time.

        Raises NotTracked.
        """
        found, self._pending = self._pending, np.zeros(self._memory.frames, dtype=bool)
        if self._memory.other_writers is not None:
            found = found | self._memory.other_writers.written()
        start, first = self._start, self._start >> PAGE_SHIFT
        while start < self._end:
            request = bytearray(
                _SCAN.pack(
                    _SCAN.size,
                    _SCAN_WP_MATCHING | _SCAN_CHECK_WPASYNC,
                    start,
                    self._end,
                    0,
                    self._regions.ctypes.data,
                    _REGIONS,
                    0,
                    0,
                    _PAGE_IS_WRITTEN,
                    0,
                    _PAGE_IS_WRITTEN,
                )
            )
            try:
                count = fcntl.ioctl(self._pagemap, _PAGEMAP_SCAN, request)
            except OSError as error:  # a part of it was mapped anew
                raise NotTracked(f"PAGEMAP_SCAN: {error.strerror}") from error
            for begin, end, _ in (self._regions[:count] >> np.uint64(PAGE_SHIFT)).tolist():
                found[begin - first : end - first] = True
            start = _SCAN.unpack(request)[4]
        return found

    def close(self) -> None:
        """Stop following."""
        for descriptor in (self._fault, self._pagemap):
            if descriptor >= 0:
                os.close(descriptor)
        self._fault = self._pagemap = -1

    def put_back(self, written: npt.NDArray[np.bool_]) -> None:
        """What `written` said was of no use: it says so once more."""
        self._pending = self._pending | written
