"""Memory of a domain: one memory object (memfd), addressed by machine frame number (MFN).

Every domain's memory is an object of its own, whose MFNs mean nothing elsewhere (design decision 1).  It is mapped
once; engines map the same bytes without copying and nothing besides, and everything else reads and writes it through
flat memoryviews.  Host pages come into being when first touched; freed frames are given back to the host, which also
clears them.

Above the domain's own frames lie *alias* frames: places where single frames of other domains' memory objects appear
while they are mapped by grant.  An alias that is to be read only is a private mapping: what is written there all the
same, by whoever got past every other check, reaches a copy.

A memory object can become an *image*: sealed, so that nobody can change it any more, and mapped privately by the domain
that it was of and by all that are to begin as copies of it.  What none of them has written since, all share.

`MemoryBudget` is what the host lends to all domains together.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import threading
import weakref
from collections.abc import Iterator
from contextlib import suppress
from heapq import heappop, heappush
from typing import Final, Protocol

import numpy as np
import numpy.typing as npt

from xenolith.abi.x86 import PAGE_SHIFT, PAGE_SIZE

LOCAL_APIC_MFN: Final = 0xFEE00
"""Where processors have their local APIC: emulated accesses to this frame are not accesses to memory, under KVM."""

MOST_ALIASES: Final = 16384
OWN_ALIASES: Final = 64
"""Of all domains together: each is a mapping of this process, which may have 65,530 (sysctl vm.max_map_count)."""

FALLOC_FL_KEEP_SIZE = 1
FALLOC_FL_PUNCH_HOLE = 2
MAP_FIXED: Final = 0x10  # what Python's mmap module does not name
MAP_NORESERVE: Final = 0x4000
_PROTECTION: Final = mmap.PROT_READ | mmap.PROT_WRITE
_MAP_FAILED: Final = ctypes.c_void_p(-1).value

COPY_RESERVE: Final = 512  # frames that a copy of an image is charged for ahead while it does not run
FEWEST_REMAPPED: Final = 64  # private frames that are cleared by a new mapping, of which there may not be too many
_PAGEMAP_PRESENT: Final = 1 << 63
_PAGEMAP_SWAPPED: Final = 1 << 62
_PAGEMAP_FILE: Final = 1 << 61  # of a file's (or memory object's) page cache
_SEALS: Final = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64)
_libc.mmap.restype = ctypes.c_void_p

Frames = npt.NDArray[np.uint64]  # an array of MFNs


class OutOfMemory(Exception):
    """There are not enough free frames (or there is no contiguous extent of the size asked for)."""


class MemoryBudget:
    """`frames` frames that the domains of this machine may use together, and MOST_ALIASES aliases. Any thread.

    OWN_ALIASES are a domain's own, as long as there are any for a new one: nobody's appetite leaves others without.
    """

    def __init__(self, frames: int) -> None:
        self.frames = frames
        self.free_frames = frames
        self.free_aliases = MOST_ALIASES  # for those who ask first
        self._lock = threading.Lock()  # the innermost lock of all

    def take(self, count: int) -> None:
        """Lend `count` frames. Raises OutOfMemory."""
        with self._lock:
            if count > self.free_frames:
                raise OutOfMemory(f"{count} frames wanted, {self.free_frames} are free")
            self.free_frames -= count

    def give_back(self, count: int) -> None:
        """End a loan of `count` frames."""
        with self._lock:
            self.free_frames += count

    def reserve_aliases(self) -> int:
        """Lend a new domain its own: how many."""
        with self._lock:
            own = min(OWN_ALIASES, self.free_aliases)
            self.free_aliases -= own
        return own

    def take_alias(self) -> None:
        """Lend one more alias. Raises OutOfMemory."""
        with self._lock:
            if not self.free_aliases:
                raise OutOfMemory(f"{MOST_ALIASES} frames are mapped by grant already, or kept for other domains")
            self.free_aliases -= 1

    def give_back_aliases(self, count: int = 1) -> None:
        with self._lock:
            self.free_aliases += count


def _memory_object(frames: int) -> int:
    descriptor = os.memfd_create("xenolith-domain-memory", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(descriptor, frames << PAGE_SHIFT)
    return descriptor


def _contents(fd: int) -> Iterator[tuple[int, int]]:
    """Where a memory object may hold anything but zeros: start and end of each part, bytes."""
    end = 0
    while True:
        try:
            start = os.lseek(fd, end, os.SEEK_DATA)
        except OSError:  # ENXIO: nothing from here on
            return
        end = os.lseek(fd, start, os.SEEK_HOLE)
        yield start, end


class Image:
    """A sealed memory object: what a domain's frames held at one moment. Close it when no more copies are wanted.

    What it holds is charged once, as long as there is anybody who maps it.
    """

    def __init__(self, fd: int, frames: int, charge: int, budget: MemoryBudget | None, is_shared: bool = True) -> None:
        """`charge` frames of the budget are its from now on."""
        self.fd = fd
        self.frames = frames
        self.is_shared = is_shared
        """Memories that begin with it map it; if not, they get a copy: private pages are no other process's to map."""
        self._charge = charge
        self._budget = budget
        self._users = 1
        self._lock = threading.Lock()

    def retain(self) -> Image:
        """One user more, who is to close it, too."""
        with self._lock:
            self._users += 1
        return self

    def close(self) -> None:
        """One user less; the last one takes it away."""
        with self._lock:
            self._users -= 1
            if self._users:
                return
        os.close(self.fd)
        if self._budget is not None:
            self._budget.give_back(self._charge)


class BuddyAllocator:
    """Which frames of a range are free: blocks of 2**n frames, aligned to their size, as large as can be.

    Every operation takes time by the logarithm of the number of frames, and lowest places go first.  LOCAL_APIC_MFN is
    never free.  Not for several threads at once.
    """

    def __init__(self, first: int, end: int) -> None:
        self._orders = max(end, 1).bit_length() + 1
        self._free: list[set[int]] = [set() for _ in range(self._orders)]  # the blocks of each order
        self._heaps: list[list[int]] = [[] for _ in range(self._orders)]  # the same, and some that are taken
        self.free_frames = 0
        for start, stop in ((first, min(end, LOCAL_APIC_MFN)), (max(first, LOCAL_APIC_MFN + 1), end)):
            self.give_back(start, max(stop - start, 0))

    def _lowest(self, order: int) -> int:
        """The lowest free block of this very order, -1: none."""
        heap, free = self._heaps[order], self._free[order]
        while heap and heap[0] not in free:
            heappop(heap)
        return heap[0] if heap else -1

    def _best(self, least: int) -> tuple[int, int]:
        """Start and order of the lowest free block of at least this order. Raises OutOfMemory."""
        found = [(start, order) for order in range(least, self._orders) if (start := self._lowest(order)) >= 0]
        if not found:
            raise OutOfMemory(f"no {1 << least} contiguous free frames ({self.free_frames} frames are free)")
        return min(found)

    def take_extent(self, order: int, limit: int | None = None) -> int:
        """Take the lowest 2**order frames, all of them below `limit`; the first. Raises OutOfMemory."""
        start, block = self._best(order)
        count = 1 << order
        if limit is not None and start + count > limit:
            raise OutOfMemory(f"no {count} contiguous free frames below frame {limit:#x}")
        self._take_block(start, block)
        self.give_back(start + count, (1 << block) - count)
        return start

    def take_up_to(self, count: int) -> tuple[int, int]:
        """Take the lowest free frames, at most `count` of them, one after the other; the first, and how many."""
        start, block = self._best(0)
        self._take_block(start, block)
        taken = min(count, 1 << block)
        self.give_back(start + taken, (1 << block) - taken)
        return start, taken

    def _take_block(self, start: int, order: int) -> None:
        self._free[order].remove(start)
        self.free_frames -= 1 << order

    def give_back(self, first: int, count: int) -> None:
        """`count` frames from `first` on are free."""
        self.free_frames += count
        end = first + count
        while first < end:
            aligned = (first & -first).bit_length() - 1 if first else self._orders - 1
            order = min(aligned, (end - first).bit_length() - 1)
            self._join(first, order)
            first += 1 << order

    def _join(self, start: int, order: int) -> None:
        while order < self._orders - 1 and start ^ 1 << order in self._free[order]:
            self._free[order].remove(start ^ 1 << order)
            start &= ~(1 << order)
            order += 1
        self._free[order].add(start)
        heappush(self._heaps[order], start)


class OtherWriters(Protocol):
    """Who else stores to a memory, through mappings of other processes."""

    def written(self) -> npt.NDArray[np.bool_]:
        """Of each frame, whether they may have written to it since the last call, which any thread may make."""
        raise NotImplementedError


class MachineMemory:
    """`frames` frames of zeroed memory, the allocator of the free ones, and room for `aliases` frames of others.

    Views of all of it, indexed by machine address divided by the item's size:
    `b` bytes, `h` 16-bit, `d` 32-bit, `q` 64-bit words; `words` is `q` as a numpy array (uint64).
    `span` counts the frames and the aliases, which come after them; `size` is that in bytes.
    MFN 0 is never handed out, so that 0 can mean "none", nor is LOCAL_APIC_MFN.  Allocation and freeing may be done by
    any thread.  What is allocated is charged to `budget`, if there is one.
    """

    def __init__(
        self, frames: int, budget: MemoryBudget | None = None, aliases: int = 0, image: Image | None = None
    ) -> None:
        """With an image the memory begins as a private copy of it, or a copy in a memory object of its own."""
        self.frames = frames
        self.span = frames + aliases
        self.size = self.span << PAGE_SHIFT
        self.private = image is not None and image.is_shared
        """Its frames are not (all) in the memory object, which is an image."""
        self.other_writers: OtherWriters | None = None
        self._image = image.retain() if image is not None and self.private else None
        self.fd = _memory_object(frames) if self._image is None else os.dup(self._image.fd)
        self._close_fd = weakref.finalize(self, os.close, self.fd)
        self._close_fd.atexit = False
        # One mapping of Python's, which lives as long as any view of it: at first all of it is private and empty.
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
        self._map = mmap.mmap(-1, self.size, flags, _PROTECTION)
        self.b = memoryview(self._map)
        self.h = self.b.cast("H")
        self.d = self.b.cast("I")
        self.q = self.b.cast("Q")
        self.words: npt.NDArray[np.uint64] = np.frombuffer(self._map, dtype=np.uint64)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        self._map_at(0, frames, mmap.MAP_PRIVATE if self.private else mmap.MAP_SHARED, self.fd, 0)
        if image is not None and not self.private:
            for start, end in _contents(image.fd):
                while start < end:
                    start += os.preadv(image.fd, [self.b[start:end]], start)
        self._budget = budget
        self._used = 0  # frames that were allocated
        self._lent = 0  # by the budget: those, or what a private memory is charged for
        self._own_aliases = budget.reserve_aliases() if budget is not None and aliases else 0
        self._mapped_aliases = 0
        self._lock = threading.Lock()  # nothing but the budget's own is taken under it
        self._allocator = BuddyAllocator(1, frames)
        self._aliases = BuddyAllocator(frames, self.span)
        self._dead = False

    @property
    def free_frames(self) -> int:
        return self._allocator.free_frames

    def page(self, mfn: int) -> memoryview:
        """The bytes of one frame, as a writable view."""
        start = mfn << PAGE_SHIFT
        return self.b[start : start + PAGE_SIZE]

    def table(self, mfn: int) -> npt.NDArray[np.uint64]:
        """One frame as 512 words of 64 bits (a page table), as a writable view."""
        return self.words[mfn << 9 : (mfn + 1) << 9]

    # --- its own frames --------------------------------------------------------------------------------

    def allocate_extent(self, order: int, limit: int | None = None) -> int:
        """Take 2**order contiguous frames, aligned to their size; the first MFN.

        With `limit` all of them lie below that MFN.  Raises OutOfMemory.
        """
        return self._take(order, limit, 1 << order, 1 << order)

    def allocate_run(self, count: int, used: int) -> int:
        """Take `count` contiguous frames, aligned to the next power of 2; the first MFN. Raises OutOfMemory.

        Only `used` of them, which will be touched, are charged.
        """
        return self._take((count - 1).bit_length(), None, count, used)

    def _take(self, order: int, limit: int | None, count: int, charge: int) -> int:
        with self._lock:
            first = self._allocator.take_extent(order, limit)
            try:
                self._charge(charge)
            except OutOfMemory:
                self._allocator.give_back(first, 1 << order)
                raise
            self._allocator.give_back(first + count, (1 << order) - count)
        return first

    def allocate(self, count: int) -> Frames:
        """Take `count` frames from anywhere, lowest first; their MFNs, ascending. Raises OutOfMemory."""
        parts: list[Frames] = []
        with self._lock:
            if count > self._allocator.free_frames:
                raise OutOfMemory(f"{count} frames wanted, {self._allocator.free_frames} are free")
            self._charge(count)
            while count:
                start, taken = self._allocator.take_up_to(count)
                parts.append(np.arange(start, start + taken, dtype=np.uint64))
                count -= taken
        return np.concatenate(parts) if parts else np.empty(0, dtype=np.uint64)

    def free(self, first: int, count: int = 1) -> None:
        """Give back `count` frames from `first` on; their contents are cleared and the host's pages released."""
        self._punch(first, count)
        with self._lock:
            self._allocator.give_back(first, count)
            self._charge(-count)
        if self._dead and not self._used:
            self.close()

    def free_many(self, mfns: Frames) -> None:
        """Give back frames in any order, run by run."""
        if not len(mfns):
            return
        ordered = np.sort(mfns)
        breaks = np.flatnonzero(np.diff(ordered) != 1) + 1
        for run in np.split(ordered, breaks):
            self.free(int(run[0]), len(run))

    def keep_only(self, mfns: list[int]) -> None:
        """Its domain is dead: release all frames but these, which others still map. `free` gives back each of them."""
        first = 0
        for mfn in (*sorted(mfns), self.frames):
            if mfn > first:
                self._punch(first, mfn - first)
            first = mfn + 1
        with self._lock:
            self._charge(len(mfns) - self._used)
        self._dead = True
        if not mfns:
            self.close()

    def adopt(self, mfns: Frames) -> None:
        """These frames, in ascending order, are a domain's that has arrived here; all others are free and cleared.

        Before anything was allocated. Raises OutOfMemory.
        """
        if self.private:
            self.reserve(COPY_RESERVE)
        with self._lock:
            self._charge(len(mfns))
            self._allocator = BuddyAllocator(self.frames, self.frames)
            for first, end in self._gaps(mfns):
                self._punch(first, end - first)
                for start, stop in ((max(first, 1), min(end, LOCAL_APIC_MFN)), (max(first, LOCAL_APIC_MFN + 1), end)):
                    self._allocator.give_back(start, max(stop - start, 0))

    def _gaps(self, mfns: Frames) -> list[tuple[int, int]]:
        """What lies between frames in ascending order: (first, end) of each run."""
        bounds = np.concatenate(([-1], mfns.astype(np.int64), [self.frames]))
        gaps = np.flatnonzero(np.diff(bounds) > 1)
        return [(int(bounds[gap]) + 1, int(bounds[gap + 1])) for gap in gaps]

    def _charge(self, count: int) -> None:
        if not self.private:
            self._lend(count)
        self._used += count

    def _lend(self, count: int) -> None:
        """Borrow so many frames more of the budget. Raises OutOfMemory."""
        if self._budget is not None:
            if count > 0:
                self._budget.take(count)
            else:
                self._budget.give_back(-count)
        self._lent += count

    def reserve(self, frames: int) -> None:
        """Charge a private memory for what it has of its own by now and `frames` more, but for no more than it has.

        Nobody asks us when a copy writes to a page for the first time, so what it may write soon is charged ahead.
        Raises OutOfMemory where the budget has no more; it is charged for what it was, then.
        """
        wanted = min(self.private_frames() + frames, self.frames)
        with self._lock:
            self._lend(wanted - self._lent)

    def _punch(self, first: int, count: int) -> None:
        if self.private:
            self._clear(first, count)
            return
        flags = FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE
        if _libc.fallocate(self.fd, flags, first << PAGE_SHIFT, count << PAGE_SHIFT):
            raise OSError(ctypes.get_errno(), "cannot release a domain's memory to the host")

    def _clear(self, first: int, count: int) -> None:
        """Clear private frames. There is no giving one back to the host without the image's showing through."""
        if count >= FEWEST_REMAPPED:
            with suppress(OSError):  # the host has no more mappings for us
                self._map_at(first, count, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)
                return
        ctypes.memset(self.address + (first << PAGE_SHIFT), 0, count << PAGE_SHIFT)

    def populated(self) -> npt.NDArray[np.bool_]:
        """Of each frame, whether it may hold anything but zeros."""
        found = np.zeros(self.frames, dtype=bool)
        for start, end in _contents(self.fd):
            found[start >> PAGE_SHIFT : -(-end >> PAGE_SHIFT)] = True
        if self.private:
            found |= (self._pagemap() & np.uint64(_PAGEMAP_PRESENT | _PAGEMAP_SWAPPED)) != 0
        return found

    def private_frames(self) -> int:
        """How many frames of a private memory are its own by now, and not the image's."""
        entries = self._pagemap()
        there = (entries & np.uint64(_PAGEMAP_PRESENT | _PAGEMAP_SWAPPED)) != 0
        return int(np.count_nonzero(there & ((entries & np.uint64(_PAGEMAP_FILE)) == 0)))

    def _pagemap(self) -> npt.NDArray[np.uint64]:
        """What the host's kernel says of each frame (proc(5), /proc/pid/pagemap)."""
        descriptor = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
        try:
            data = os.pread(descriptor, self.frames * 8, (self.address >> PAGE_SHIFT) * 8)
        finally:
            os.close(descriptor)
        return np.frombuffer(data, dtype=np.uint64)

    # --- images ----------------------------------------------------------------------------------------

    def image(self, mfns: Frames) -> Image:
        """An image of these frames as they are now. Nothing may write to the memory meanwhile.

        The first time the memory object itself becomes the image, and this memory a private copy of it; after that an
        image is a copy, and if other processes map this memory, so is each memory that is made of it.  Raises OSError
        where the frames cannot be sealed: somebody else maps one writable, and OutOfMemory.
        """
        if self.private or self.other_writers is not None:
            return self._copied_image(mfns)
        holds = min(int(np.count_nonzero(self.populated())), self._lent)
        self._map_at(0, self.frames, mmap.MAP_PRIVATE, self.fd, 0)
        try:
            fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, _SEALS)
        except OSError:
            self._map_at(0, self.frames, mmap.MAP_SHARED, self.fd, 0)
            raise
        self.private = True
        with self._lock:
            self._lent -= holds  # they are the image's
        self._image = Image(os.dup(self.fd), self.frames, holds, self._budget)
        return self._image.retain()

    def _copied_image(self, mfns: Frames) -> Image:
        wanted = mfns[self.populated()[mfns]]
        if self._budget is not None:
            self._budget.take(len(wanted))
        fd = _memory_object(self.frames)
        try:
            breaks = np.flatnonzero(np.diff(wanted) != 1) + 1
            for run in np.split(wanted, breaks) if len(wanted) else ():
                start, end = int(run[0]) << PAGE_SHIFT, int(run[-1]) + 1 << PAGE_SHIFT
                while start < end:
                    start += os.pwrite(fd, self.b[start:end], start)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
        except BaseException:
            os.close(fd)
            if self._budget is not None:
                self._budget.give_back(len(wanted))
            raise
        return Image(fd, self.frames, len(wanted), self._budget, is_shared=self.other_writers is None)

    # --- frames of others ------------------------------------------------------------------------------

    def map_alias(self, other: MachineMemory, mfn: int, writable: bool) -> int:
        """Let frame `mfn` of another memory object appear here; at which alias MFN. Raises OutOfMemory."""
        if other.private:
            raise OutOfMemory("a frame of a clone, or of what clones were made of, is in no memory object")
        with self._lock:
            alias = self._aliases.take_extent(0)
            try:
                self._lend_alias()
                try:
                    self._map_at(alias, 1, mmap.MAP_SHARED if writable else mmap.MAP_PRIVATE, other.fd, mfn)
                except OSError as error:
                    self._end_alias()
                    raise OutOfMemory(f"the host cannot map a frame: {error.strerror}") from error
            except OutOfMemory:
                self._aliases.give_back(alias, 1)
                raise
        return alias

    def _lend_alias(self) -> None:
        if self._budget is not None and self._mapped_aliases >= self._own_aliases:
            self._budget.take_alias()
        self._mapped_aliases += 1

    def _end_alias(self) -> None:
        self._mapped_aliases -= 1
        if self._budget is not None and self._mapped_aliases >= self._own_aliases:
            self._budget.give_back_aliases()

    def unmap_alias(self, alias: int) -> None:
        """Undo one `map_alias`: whatever still refers to the alias finds an empty private page."""
        self._map_at(alias, 1, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)
        with self._lock:
            self._aliases.give_back(alias, 1)
            self._end_alias()

    def _map_at(self, mfn: int, count: int, flags: int, fd: int, offset_mfn: int) -> None:
        place, offset = self.address + (mfn << PAGE_SHIFT), offset_mfn << PAGE_SHIFT
        if _libc.mmap(place, count << PAGE_SHIFT, _PROTECTION, flags | MAP_FIXED, fd, offset) == _MAP_FAILED:
            error = ctypes.get_errno()
            raise OSError(error, f"cannot map {count} frames of a domain's memory: {os.strerror(error)}")

    def close(self) -> None:
        """Release the memory object. Views of it that are held elsewhere show zeros."""
        if self.fd >= 0:
            self._map_at(0, self.frames, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)
            self._close_fd()
            self.fd = -1
            if self._image is not None:
                self._image.close()
            with self._lock:
                self._lend(-self._lent)
                self._used = 0
                if self._budget is not None:
                    self._budget.give_back_aliases(self._own_aliases)
                    self._own_aliases = 0
