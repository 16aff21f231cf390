"""Machine memory: one shared memory object, addressed by machine frame number (MFN).

The whole machine is a single memfd mapped once.  Engines map the same object without copying, and
everything else reads and writes it through flat memoryviews (design decision 1).  Host pages come into
being when first touched, so a large machine costs only what its domains use; freed frames are given
back to the host, which also clears them.
"""

from __future__ import annotations

import bisect
import ctypes
import mmap
import os
import threading
from typing import Final

import numpy as np
import numpy.typing as npt

from xenolith.abi.x86 import PAGE_SHIFT, PAGE_SIZE

LOCAL_APIC_MFN: Final = 0xFEE00
"""Where processors have their local APIC: emulated accesses to this frame are not accesses to memory, under KVM."""

FALLOC_FL_KEEP_SIZE = 1
FALLOC_FL_PUNCH_HOLE = 2

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)

Frames = npt.NDArray[np.uint64]  # an array of MFNs


class OutOfMemory(Exception):
    """The machine has not enough free frames (or no contiguous extent of the size asked for)."""


class MachineMemory:
    """`frames` frames of zeroed memory, and the allocator of its free frames.

    Views of all of it, indexed by machine address divided by the item's size:
    `b` bytes, `h` 16-bit, `d` 32-bit, `q` 64-bit words; `words` is `q` as a numpy array (uint64).
    MFN 0 is never handed out, so that 0 can mean "none", nor is LOCAL_APIC_MFN.  Allocation and freeing may be done by
    any thread.
    """

    def __init__(self, frames: int) -> None:
        self.frames = frames
        self.size = frames << PAGE_SHIFT
        self.fd = os.memfd_create("xenolith-machine-memory", os.MFD_CLOEXEC)
        os.ftruncate(self.fd, self.size)
        self._map = mmap.mmap(self.fd, self.size, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        self.b = memoryview(self._map)
        self.h = self.b.cast("H")
        self.d = self.b.cast("I")
        self.q = self.b.cast("Q")
        self.words: npt.NDArray[np.uint64] = np.frombuffer(self._map, dtype=np.uint64)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        self._starts = [1]  # free extents, ascending and never adjacent
        self._lengths = [frames - 1]
        self.free_frames = frames - 1
        if frames > LOCAL_APIC_MFN:
            self._take(0, LOCAL_APIC_MFN, 1)
        self._lock = threading.Lock()  # the innermost lock of all: nothing else is taken under it

    def page(self, mfn: int) -> memoryview:
        """The bytes of one frame, as a writable view."""
        start = mfn << PAGE_SHIFT
        return self.b[start : start + PAGE_SIZE]

    def table(self, mfn: int) -> npt.NDArray[np.uint64]:
        """One frame as 512 words of 64 bits (a page table), as a writable view."""
        return self.words[mfn << 9 : (mfn + 1) << 9]

    def allocate_extent(self, order: int, limit: int | None = None) -> int:
        """Take 2**order contiguous frames, aligned to their size; the first MFN.

        With `limit` all of them lie below that MFN.  Raises OutOfMemory.
        """
        count = 1 << order
        with self._lock:
            for index, (start, length) in enumerate(zip(self._starts, self._lengths, strict=True)):
                first = (start + count - 1) & -count
                if first + count <= start + length:
                    if limit is not None and first + count > limit:
                        break
                    self._take(index, first, count)
                    return first
        raise OutOfMemory(f"no {count} contiguous free frames ({self.free_frames} frames are free)")

    def allocate(self, count: int) -> Frames:
        """Take `count` frames from anywhere, lowest first; their MFNs, ascending. Raises OutOfMemory."""
        parts: list[Frames] = []
        with self._lock:
            if count > self.free_frames:
                raise OutOfMemory(f"{count} frames wanted, {self.free_frames} are free")
            while count:
                start, length = self._starts[0], min(self._lengths[0], count)
                self._take(0, start, length)
                parts.append(np.arange(start, start + length, dtype=np.uint64))
                count -= length
        return np.concatenate(parts) if parts else np.empty(0, dtype=np.uint64)

    def free(self, first: int, count: int = 1) -> None:
        """Give back `count` frames from `first` on; their contents are cleared and the host's pages released."""
        result = _libc.fallocate(
            self.fd, FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE, first << PAGE_SHIFT, count << PAGE_SHIFT
        )
        if result:
            raise OSError(ctypes.get_errno(), "cannot release machine memory to the host")
        with self._lock:
            self._give_back(first, count)

    def _give_back(self, first: int, count: int) -> None:
        index = bisect.bisect(self._starts, first)
        self.free_frames += count
        if index < len(self._starts) and first + count == self._starts[index]:  # joins the next extent
            count += self._lengths[index]
            del self._starts[index], self._lengths[index]
        if index and self._starts[index - 1] + self._lengths[index - 1] == first:  # joins the one before
            self._lengths[index - 1] += count
        else:
            self._starts.insert(index, first)
            self._lengths.insert(index, count)

    def free_many(self, mfns: Frames) -> None:
        """Give back frames in any order, run by run."""
        if not len(mfns):
            return
        ordered = np.sort(mfns)
        breaks = np.flatnonzero(np.diff(ordered) != 1) + 1
        for run in np.split(ordered, breaks):
            self.free(int(run[0]), len(run))

    def close(self) -> None:
        """Release the memory object itself (views held elsewhere keep the mapping alive until dropped)."""
        os.close(self.fd)

    def _take(self, index: int, first: int, count: int) -> None:
        start, length = self._starts[index], self._lengths[index]
        del self._starts[index], self._lengths[index]
        after = start + length - (first + count)
        if after:
            self._starts.insert(index, first + count)
            self._lengths.insert(index, after)
        if first > start:
            self._starts.insert(index, start)
            self._lengths.insert(index, first - start)
        self.free_frames -= count
