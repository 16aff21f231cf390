"""Grant tables: how a domain lets another reach some of its frames (paper 3.4; public/grant_table.h).

A grant is an entry in a table that the granting domain shares with Xen: flags, the domain it is for, the frame.  To use
a frame the other domain *pins* the entry through Xen, which checks it and notes in the entry that the frame is
being read or written; the granter cannot withdraw it before the last pin is gone.  Xen remembers what it checked
(`Active`), since the granter may overwrite the entry at any time.  A pinned entry's frame keeps an existence reference
and, for writing, a type reference of the frame table's, so it can be neither freed nor made a page table until the
mapper has given it up and the mapper's TLB has forgotten it.

This module has the tables, the pins and the map-track; `grant_table_op` has the hypercall, `python_domain` the same for
back-ends in Python.  A granter's entries and pins are protected by the granter's lock.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Iterator
from ctypes import c_bool, c_uint8, c_uint16, c_uint32, c_uint64
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Final

import numpy as np

from xenolith.abi.errno import EBUSY, EINVAL, ENOMEM, ERANGE
from xenolith.abi.grant_table import (
    GNTTAB_NR_RESERVED_ENTRIES,
    GRANT_ENTRIES_PER_FRAME,
    GRANT_ENTRY_SIZES,
    GRANT_STATUS_PER_FRAME,
    GNTST_bad_gntref,
    GNTST_bad_page,
    GNTST_eagain,
    GNTST_general_error,
    GNTST_no_device_space,
    GNTST_okay,
    GTF_permit_access,
    GTF_reading,
    GTF_readonly,
    GTF_sub_page,
    GTF_transitive,
    GTF_type_mask,
    GTF_writing,
)
from xenolith.abi.x86 import PAGE_SHIFT, PAGE_SIZE
from xenolith.hypervisor import paging, tlb
from xenolith.hypervisor.frames import TYPE_WRITABLE
from xenolith.machine.atomic import compare_exchange_16, compare_exchange_32
from xenolith.machine.memory import OutOfMemory
from xenolith.machine.native import Fields

if TYPE_CHECKING:
    from xenolith.hypervisor.domain import Domain

DEFAULT_MAX_FRAMES: Final = 64  # of the table, as xl.cfg's max_grant_frames
MOST_FRAMES: Final = 1 << 12  # that a table can be given: 2**21 entries
DEFAULT_MAX_MAPPINGS: Final = 1 << 16  # of others' frames at a time (Xen: max_maptrack_frames)
_MARKS: Final = GTF_reading | GTF_writing
ATTEMPTS: Final = 5  # at changing an entry that its owner is changing all the time


class Active(ctypes.Structure):
    """An entry in use: what it said when it was pinned, and how often it is pinned."""

    domid: int
    mfn: int
    readers: int
    writers: int

    _fields_: ClassVar[Fields] = (
        ("mfn", c_uint32),
        ("domid", c_uint32),
        ("readers", c_uint32),
        ("writers", c_uint32),
    )

    @property
    def pins(self) -> int:
        return self.readers + self.writers


# Of each of a batch's pins.
NOT_PINNED: Final = 0
IS_PINNED: Final = 1
HAS_CODE: Final = 2  # not any more: the frame was written to, and an engine has translated code from it

# What native code answers that was to copy.
COPIED: Final = 0
NOT_ALL_PINNED: Final = 1
TO_UNPIN: Final = 2  # copied

MAX_PINS: Final = 1024


class Pins(ctypes.Structure):
    """Grants of one domain's that dom0 pins for a moment: `count` of them, those from `begin` on newly."""

    begin: int
    count: int

    _fields_: ClassVar[Fields] = (
        ("begin", c_uint32),
        ("count", c_uint32),
        ("refs", c_uint32 * MAX_PINS),
        ("writable", c_bool * MAX_PINS),
        ("states", c_uint8 * MAX_PINS),
        ("mfns", c_uint32 * MAX_PINS),
        ("addresses", c_uint64 * MAX_PINS),  # of the frames in this process
        ("offsets", c_uint16 * MAX_PINS),  # to copy: which part of each
        ("sizes", c_uint16 * MAX_PINS),
    )


@dataclass(slots=True)
class Reach:
    """What a copy may touch: bytes of a frame of a domain's."""

    domain: Domain
    mfn: int
    start: int
    end: int


@dataclass(slots=True)
class Mapping:
    """A grant that a domain has mapped (Xen: struct grant_mapping)."""

    granter: Domain
    ref: int
    mfn: int  # the granter's
    writable: bool
    l1_index: int = 0  # of the page-table entry, in 64-bit words of the mapper's memory; 0: there is none
    alias: int = 0  # the mapper's MFN, at which the frame appears; 0: dom0 in Python has none
    device: bool = False  # it is mapped for a device, too: a pin of its own

    @property
    def pins(self) -> int:
        return (self.l1_index != 0) + self.device if self.alias else 1


def status_frames(frames: int) -> int:
    """How many frames the marks of a table of version 2 take."""
    return -(-(frames * PAGE_SIZE // GRANT_ENTRY_SIZES[2]) // GRANT_STATUS_PER_FRAME)


def _permits(header: int, domid: int, marks: int, mask: int, kind: int) -> bool:
    flags = header & 0xFFFF
    return flags & mask == kind and header >> 16 == domid and not (marks & GTF_writing and flags & GTF_readonly)


class GrantTable:
    """A domain's grant table, and its map-track: what it has mapped of others'."""

    def __init__(
        self, domain: Domain, max_frames: int = DEFAULT_MAX_FRAMES, max_mappings: int = DEFAULT_MAX_MAPPINGS
    ) -> None:
        self.domain = domain
        self.max_frames = max_frames
        self.max_mappings = max_mappings
        self.version = 1
        self.status_frames: list[int] = []  # of version 2: a 16-bit word for each entry
        # Of entries in use that do not grant all of a frame of the domain's own: which bytes, or which other grant.
        self._parts: dict[int, tuple[int, int]] = {}
        self._through: dict[int, tuple[Domain, int]] = {}
        self._frames, self._length = (c_uint64 * max_frames)(), 0
        entries = max_frames * GRANT_ENTRIES_PER_FRAME
        memory = np.zeros(entries * ctypes.sizeof(Active), dtype=np.uint8)  # takes no room until it is used
        self._active = (Active * entries).from_buffer(memory.data)  # by reference
        self._pins = memory.view(np.uint32).reshape(entries, -1)[:, 2:]  # readers and writers of each
        domain.grant_frames, domain.active_grants = ctypes.addressof(self._frames), ctypes.addressof(self._active)
        self._mappings: dict[int, Mapping] = {}  # by handle
        self._free_handles: list[int] = []
        self._handles_lock = threading.Lock()  # back-ends map grants of several domains at once; innermost

    # --- the table -----------------------------------------------------------------------------------

    @property
    def frames(self) -> list[int]:
        """MFNs of the table."""
        return self._frames[: self._length]

    @frames.setter
    def frames(self, mfns: list[int]) -> None:
        for index, mfn in enumerate(mfns):
            self._frames[index] = mfn
        self._length = len(mfns)
        self._tell_native_code()

    def _tell_native_code(self) -> None:
        """Which knows version 1."""
        self.domain.grant_entries = self.entries if self.version == 1 else 0

    def grow(self, frames: int) -> bool:
        """Make the table at least this many frames long; False where that cannot be."""
        frames = max(frames, len(self.frames))
        if self.version == 2:
            more = self._shared(status_frames(frames) - len(self.status_frames))
            if more is None:
                return False
            self.status_frames += more
        more = self._shared(frames - len(self.frames))
        self.frames += more or []
        return more is not None

    def _shared(self, count: int) -> list[int] | None:
        """So many more frames of Xen's that the domain may map."""
        table = self.domain.frames
        try:
            new = table.allocate_xen(max(count, 0))
        except OutOfMemory:
            return None
        for mfn in new:
            table.share_with_guest(mfn, self.domain.domid)
        return new

    def set_version(self, version: int) -> int:
        """GNTTABOP_set_version: 0, or a negative errno. All entries but the toolstack's are gone then."""
        if version not in GRANT_ENTRY_SIZES:
            return -EINVAL
        if version == self.version:
            return 0
        if any(ref >= GNTTAB_NR_RESERVED_ENTRIES for ref in self._used_refs()):
            return -EBUSY
        reserved = range(min(GNTTAB_NR_RESERVED_ENTRIES, self.entries))
        kept = [(*self._header(ref), self._frame(ref), self._marks(ref)) for ref in reserved]
        status = self._leave_version_2([flags for flags, *_ in kept]) if self.version == 2 else 0
        if status:
            return status
        before, self.version = self.version, version
        if not self.grow(len(self.frames)):
            self.version = before
            return -ENOMEM
        self._tell_native_code()
        for mfn in self.frames:
            self.domain.memory.page(mfn)[:] = bytes(PAGE_SIZE)
        for ref, (flags, domid, mfn, marks) in zip(reserved, kept, strict=True):
            self._store(ref, flags & ~_MARKS | (marks if version == 1 else 0), domid, mfn)
            if version == 2:
                self.domain.memory.h[self._status_address(ref) >> 1] = marks
        return 0

    def _leave_version_2(self, reserved: list[int]) -> int:
        """Version 1 can say what these entries' flags do, and the guest has no status frame mapped: they go."""
        if any(
            flags & GTF_type_mask == GTF_transitive or (flags & GTF_type_mask and flags & GTF_sub_page)
            for flags in reserved
        ):
            return -ERANGE
        frames = self.domain.frames
        if any(frames.mapped_by_guest(mfn) for mfn in self.status_frames):
            return -EBUSY
        tlb.flush_domain(self.domain)
        for mfn in self.status_frames:
            frames.end_sharing(mfn)
        frames.release(np.array(sorted(self.status_frames), dtype=np.uint64))
        self.status_frames = []
        return 0

    def permit_access(self, ref: int, domid: int, mfn: int) -> None:
        """Fill in an entry for a domain that does not run yet: its builder grants the rings it shares with dom0.

        Raises OutOfMemory if the machine has no frame for the table.
        """
        if ref >= self.entries and not self.grow(ref // GRANT_ENTRIES_PER_FRAME + 1):
            raise OutOfMemory("no frame is free for a grant table")
        self._store(ref, GTF_permit_access, domid, mfn)

    @property
    def entries(self) -> int:
        return self._length * (PAGE_SIZE // GRANT_ENTRY_SIZES[self.version])

    def entry_address(self, ref: int) -> int:
        """Machine address of an entry."""
        frame, offset = divmod(ref * GRANT_ENTRY_SIZES[self.version], PAGE_SIZE)
        return (self._frames[frame] << PAGE_SHIFT) + offset

    def _status_address(self, ref: int) -> int:
        """Of the word with an entry's marks."""
        if self.version == 1:
            return self.entry_address(ref)
        return (self.status_frames[ref // GRANT_STATUS_PER_FRAME] << PAGE_SHIFT) + ref % GRANT_STATUS_PER_FRAME * 2

    def _header(self, ref: int) -> tuple[int, int]:
        """Flags and domid of an entry."""
        word = self.domain.memory.d[self.entry_address(ref) >> 2]
        return word & 0xFFFF, word >> 16

    def _marks(self, ref: int) -> int:
        return self.domain.memory.h[self._status_address(ref) >> 1] & _MARKS

    def _frame(self, ref: int) -> int:
        address, memory = self.entry_address(ref), self.domain.memory
        return memory.d[address + 4 >> 2] if self.version == 1 else memory.q[address + 8 >> 3]

    def _store(self, ref: int, flags: int, domid: int, mfn: int) -> None:
        address, memory = self.entry_address(ref), self.domain.memory
        if self.version == 1:
            memory.d[address + 4 >> 2] = mfn & 0xFFFFFFFF
        else:
            memory.q[address + 8 >> 3] = mfn
        memory.d[address >> 2] = flags | domid << 16

    def _part(self, ref: int) -> tuple[int, int] | None:
        """Which bytes of its frame an entry grants. None: all."""
        if self.version == 1 or not self._header(ref)[0] & GTF_sub_page:
            return None
        word = self.domain.memory.d[self.entry_address(ref) + 4 >> 2]
        return word & 0xFFFF, (word & 0xFFFF) + (word >> 16)

    # --- pins, by the granter's lock -------------------------------------------------------------------

    def pin(self, ref: int, domid: int, writable: bool) -> int:
        """Let `domid` use the whole frame of an entry: its MFN, or a GNTST_* error."""
        return self._pin(ref, domid, writable, GTF_type_mask | GTF_sub_page)

    def acquire(self, ref: int, domid: int, writable: bool, hold: Callable[[Domain], None] | None) -> Reach | int:
        """Let `domid` copy what an entry grants, a part of a frame or another domain's grant too: or a GNTST_* error.

        `hold` takes a further domain's lock, or raises.  None: grants of grants go no further.
        """
        if not 0 <= ref < self.entries:
            return GNTST_bad_gntref
        if self.version == 2 and self._header(ref)[0] & GTF_type_mask == GTF_transitive:
            return self._acquire_through(ref, domid, writable, hold) if hold else GNTST_general_error
        mfn = self._pin(ref, domid, writable, GTF_type_mask)
        return mfn if mfn < 0 else Reach(self.domain, mfn, *self._parts.get(ref, (0, PAGE_SIZE)))

    def _acquire_through(self, ref: int, domid: int, writable: bool, hold: Callable[[Domain], None]) -> Reach | int:
        words = self.domain.memory.d
        address = self.entry_address(ref) >> 2
        other = self.domain.hypervisor.domain(words[address + 1] & 0xFFFF)
        through = words[address + 2]
        active = self._active[ref]
        if other is None or other is self.domain or other.dying:
            return GNTST_general_error
        if active.pins and (active.domid != domid or self._through.get(ref) != (other, through)):
            return GNTST_general_error
        hold(other)
        marks = self._marks_to_be(active, writable)
        status = self._mark(ref, domid, marks, GTF_type_mask, GTF_transitive) if marks else GNTST_okay
        if status:
            return status
        reach = other.grants.acquire(through, self.domain.domid, writable, None)
        if isinstance(reach, int):
            self._unmark(ref, marks)
            return reach
        self._through[ref] = other, through
        self._count(active, domid, 0, writable)
        return reach

    @staticmethod
    def _marks_to_be(active: Active, writable: bool) -> int:
        """What an entry does not show yet, but is to before one more uses it."""
        if not active.pins:
            return GTF_reading | GTF_writing * writable
        return GTF_writing * (writable and not active.writers)

    @staticmethod
    def _count(active: Active, domid: int, mfn: int, writable: bool) -> None:
        active.domid, active.mfn = domid, mfn
        if writable:
            active.writers += 1
        else:
            active.readers += 1

    def _pin(self, ref: int, domid: int, writable: bool, mask: int) -> int:
        if not 0 <= ref < self.entries:
            return GNTST_bad_gntref
        active = self._active[ref]
        used = active.pins
        if used and (active.domid != domid or ref in self._through):
            return GNTST_general_error
        marks = self._marks_to_be(active, writable)
        status = self._mark(ref, domid, marks, mask, GTF_permit_access) if marks else GNTST_okay
        if status:
            return status
        mfn, part = (active.mfn, None) if used else (self._frame(ref), self._part(ref))
        status = self._take_frame(mfn, writable)
        if status:
            self._unmark(ref, marks)
            return status
        if part is not None:
            self._parts[ref] = part
        self._count(active, domid, mfn, writable)
        return mfn

    def _take_frame(self, mfn: int, writable: bool) -> int:
        if not self.domain.frames.get_page(mfn, self.domain.domid):
            return GNTST_bad_page
        if writable and paging.get_page_type(self.domain, mfn, TYPE_WRITABLE):
            paging.put_page(self.domain, mfn)
            return GNTST_general_error
        return GNTST_okay

    def _mark(self, ref: int, domid: int, marks: int, mask: int, kind: int) -> int:
        """Note that an entry is used, if it permits that (Xen: _set_status_v1, _set_status_v2)."""
        memory = self.domain.memory
        address = self.entry_address(ref)
        for _ in range(ATTEMPTS):
            seen = memory.d[address >> 2]
            if not _permits(seen, domid, marks, mask, kind):
                return GNTST_general_error
            if self.version == 1:
                if compare_exchange_32(memory.address + address, seen, seen | marks) == seen:
                    return GNTST_okay
                continue
            before = self._marks(ref)
            self._change_status(ref, marks, 0)
            if _permits(
                memory.d[address >> 2], domid, marks, mask, kind
            ):  # the granter looks after it changed the entry
                return GNTST_okay
            self._change_status(ref, 0, marks & ~before)
            return GNTST_general_error
        return GNTST_general_error

    def _change_status(self, ref: int, marks: int, gone: int) -> None:
        memory = self.domain.memory
        address = self._status_address(ref)
        for _ in range(ATTEMPTS):
            seen = memory.h[address >> 1]
            if compare_exchange_16(memory.address + address, seen, seen & ~gone | marks) == seen:
                return

    def unpin(self, ref: int, writable: bool) -> None:
        """Undo one `pin` or `acquire`. No TLB may know the frame by it any more."""
        if self.domain.memory.fd < 0:
            return  # the domain died with an inconsistent frame table: it counts nothing any more
        active = self._active[ref]
        assert active.writers if writable else active.readers, f"{self.domain!r}: grant {ref} is not pinned so"
        if writable:
            active.writers -= 1
        else:
            active.readers -= 1
        through = self._through.get(ref)
        if through is not None:
            through[0].grants.unpin(through[1], writable)
        elif writable:
            if active.domid:  # it may have written by a mapping of its own: let whoever follows writes by ours know
                compare_exchange_32(self.domain.memory.address + (active.mfn << PAGE_SHIFT), 0, 0)
            paging.put_page_and_type(self.domain, active.mfn)
        else:
            paging.put_page(self.domain, active.mfn)
        marks = 0 if active.writers else GTF_writing
        if not active.writers and not active.readers:
            marks |= GTF_reading
            self._through.pop(ref, None)
            self._parts.pop(ref, None)
        if marks:
            self._unmark(ref, marks)

    def _unmark(self, ref: int, marks: int) -> None:
        self._change_status(ref, 0, marks)

    def in_use(self, ref: int) -> bool:
        return bool(self._active[ref].pins)

    def _used_refs(self) -> list[int]:
        refs: list[int] = np.flatnonzero(self._pins[: self.entries].any(axis=1)).tolist()
        return refs

    def _used(self) -> list[Active]:
        """Entries in use whose frames are the domain's own."""
        return [self._active[ref] for ref in self._used_refs() if ref not in self._through]

    def swap(self, first: int, second: int) -> int:
        """GNTTABOP_swap_grant_ref: exchange two entries that are not in use; a GNTST_*."""
        if first >= self.entries or second >= self.entries:
            return GNTST_bad_gntref
        if self.in_use(first) or self.in_use(second):
            return GNTST_eagain
        size, b = GRANT_ENTRY_SIZES[self.version], self.domain.memory.b
        one, other = self.entry_address(first), self.entry_address(second)
        kept = bytes(b[one : one + size])
        b[one : one + size] = b[other : other + size]
        b[other : other + size] = kept
        return GNTST_okay

    # --- map-track ---------------------------------------------------------------------------------------

    def add_mapping(self, mapping: Mapping) -> int:
        """Remember a mapping; its handle, or GNTST_no_device_space."""
        with self._handles_lock:
            if len(self._mappings) >= self.max_mappings:
                return GNTST_no_device_space
            handle = self._free_handles.pop() if self._free_handles else len(self._mappings)
            self._mappings[handle] = mapping
        return handle

    @property
    def used_by_others(self) -> bool:
        """Whether another domain than dom0, which reaches its frames where they are, uses an entry."""
        return any(self._active[ref].domid for ref in self._used_refs())

    @property
    def maps_others(self) -> bool:
        """Whether the domain has any grant mapped."""
        return bool(self._mappings)

    def mapping(self, handle: int) -> Mapping | None:
        return self._mappings.get(handle)

    def forget_mapping(self, handle: int) -> None:
        with self._handles_lock:
            del self._mappings[handle]
            self._free_handles.append(handle)

    def granted_frames(self) -> frozenset[int]:
        """Aliases of others' frames that the domain's page tables may map."""
        return frozenset(mapping.alias for mapping in self._mappings.values() if mapping.alias)

    def release_all(self) -> None:
        """The domain is dead and has no page tables left: give up everything it has mapped."""
        for handle, mapping in list(self._mappings.items()):
            self.forget_mapping(handle)
            if mapping.alias:
                self.domain.frames.unmap_foreign(mapping.alias)
            with mapping.granter.lock:
                for _ in range(mapping.pins):
                    mapping.granter.grants.unpin(mapping.ref, mapping.writable)

    def references(self) -> Iterator[tuple[int, int | None]]:
        """References to frames by pins and mappings: (MFN, the type it needs or None), for the invariant checker."""
        for mapping in self._mappings.values():
            if mapping.alias:
                yield mapping.alias, None
        for active in self._used():
            yield from [(active.mfn, None)] * active.readers
            yield from [(active.mfn, TYPE_WRITABLE)] * active.writers
