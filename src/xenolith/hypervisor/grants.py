"""Grant tables: how a domain lets another reach some of its frames (paper 3.4; public/grant_table.h, version 1).

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
from collections.abc import Iterator
from ctypes import c_bool, c_uint8, c_uint16, c_uint32, c_uint64
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Final

import numpy as np

from xenolith.abi.grant_table import (
    GRANT_ENTRIES_PER_FRAME,
    GRANT_ENTRY_SIZE,
    GNTST_bad_gntref,
    GNTST_bad_page,
    GNTST_general_error,
    GNTST_no_device_space,
    GNTST_okay,
    GTF_permit_access,
    GTF_reading,
    GTF_readonly,
    GTF_type_mask,
    GTF_writing,
)
from xenolith.abi.x86 import PAGE_SHIFT
from xenolith.hypervisor import paging
from xenolith.hypervisor.frames import TYPE_WRITABLE
from xenolith.machine.atomic import compare_exchange_32
from xenolith.machine.memory import OutOfMemory
from xenolith.machine.native import Fields

if TYPE_CHECKING:
    from xenolith.hypervisor.domain import Domain

DEFAULT_MAX_FRAMES: Final = 64  # of the table, as xl.cfg's max_grant_frames
DEFAULT_MAX_MAPPINGS: Final = 1 << 16  # of others' frames at a time (Xen: max_maptrack_frames)
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
class Mapping:
    """A grant that a domain has mapped (Xen: struct grant_mapping)."""

    granter: Domain
    ref: int
    mfn: int  # the granter's
    writable: bool
    l1_index: int = 0  # of the page-table entry, in 64-bit words of the mapper's memory; 0: dom0 in Python has none
    alias: int = 0  # the mapper's MFN, at which the frame appears; 0: likewise


class GrantTable:
    """A domain's grant table, and its map-track: what it has mapped of others'."""

    def __init__(
        self, domain: Domain, max_frames: int = DEFAULT_MAX_FRAMES, max_mappings: int = DEFAULT_MAX_MAPPINGS
    ) -> None:
        self.domain = domain
        self.max_frames = max_frames
        self.max_mappings = max_mappings
        self._frames = (c_uint64 * max_frames)()
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
        return self._frames[: self.domain.grant_entries // GRANT_ENTRIES_PER_FRAME]

    @frames.setter
    def frames(self, mfns: list[int]) -> None:
        for index, mfn in enumerate(mfns):
            self._frames[index] = mfn
        self.domain.grant_entries = len(mfns) * GRANT_ENTRIES_PER_FRAME

    def grow(self, frames: int) -> bool:
        """Make the table at least this many frames long; False where that cannot be."""
        table = self.domain.frames
        try:
            new = table.allocate_xen(max(frames - len(self.frames), 0))
        except OutOfMemory:
            return False
        for mfn in new:
            table.share_with_guest(mfn, self.domain.domid)
        self.frames += new
        return True

    def permit_access(self, ref: int, domid: int, mfn: int) -> None:
        """Fill in an entry for a domain that does not run yet: its builder grants the rings it shares with dom0.

        Raises OutOfMemory if the machine has no frame for the table.
        """
        if ref >= self.entries and not self.grow(ref // GRANT_ENTRIES_PER_FRAME + 1):
            raise OutOfMemory("no frame is free for a grant table")
        address = self.entry_address(ref)
        self.domain.memory.d[address >> 2] = GTF_permit_access | domid << 16
        self.domain.memory.d[address + 4 >> 2] = mfn

    @property
    def entries(self) -> int:
        return self.domain.grant_entries

    def entry_address(self, ref: int) -> int:
        """Machine address of an entry."""
        return (self._frames[ref >> 9] << PAGE_SHIFT) + ref % GRANT_ENTRIES_PER_FRAME * GRANT_ENTRY_SIZE

    # --- pins, by the granter's lock -------------------------------------------------------------------

    def pin(self, ref: int, domid: int, writable: bool) -> int:
        """Let `domid` use the frame of an entry: its MFN, or a GNTST_* error."""
        if not 0 <= ref < self.entries:
            return GNTST_bad_gntref
        active = self._active[ref]
        used = active.pins
        if used and active.domid != domid:
            return GNTST_general_error
        if not used or (writable and not active.writers):
            result = self._mark(ref, domid, GTF_reading | GTF_writing * writable)
            if result:
                return result
        mfn = self.domain.memory.d[self.entry_address(ref) + 4 >> 2] if not used else active.mfn
        status = self._take_frame(mfn, writable)
        if status:
            if not used:
                self._unmark(ref, GTF_reading | GTF_writing)
            elif not active.writers:
                self._unmark(ref, GTF_writing)
            return status
        active.domid, active.mfn = domid, mfn
        if writable:
            active.writers += 1
        else:
            active.readers += 1
        return mfn

    def _take_frame(self, mfn: int, writable: bool) -> int:
        if not self.domain.frames.get_page(mfn, self.domain.domid):
            return GNTST_bad_page
        if writable and paging.get_page_type(self.domain, mfn, TYPE_WRITABLE):
            paging.put_page(self.domain, mfn)
            return GNTST_general_error
        return GNTST_okay

    def _mark(self, ref: int, domid: int, marks: int) -> int:
        """Note in the entry that it is used, if it permits that (Xen: _set_status_v1)."""
        memory = self.domain.memory
        address = self.entry_address(ref)
        for _ in range(ATTEMPTS):
            seen = memory.d[address >> 2]
            flags = seen & 0xFFFF
            if flags & GTF_type_mask != GTF_permit_access or seen >> 16 != domid:
                return GNTST_general_error
            if marks & GTF_writing and flags & GTF_readonly:
                return GNTST_general_error
            if compare_exchange_32(memory.address + address, seen, seen | marks) == seen:
                return GNTST_okay
        return GNTST_general_error

    def unpin(self, ref: int, writable: bool) -> None:
        """Undo one `pin`. No TLB may know the frame by it any more."""
        active = self._active[ref]
        assert active.writers if writable else active.readers, f"{self.domain!r}: grant {ref} is not pinned so"
        if writable:
            active.writers -= 1
            if active.domid:  # it may have written by a mapping of its own: let whoever follows writes by ours know
                compare_exchange_32(self.domain.memory.address + (active.mfn << PAGE_SHIFT), 0, 0)
            paging.put_page_and_type(self.domain, active.mfn)
        else:
            active.readers -= 1
            paging.put_page(self.domain, active.mfn)
        marks = 0 if active.writers else GTF_writing
        if not active.writers and not active.readers:
            marks |= GTF_reading
        if marks:
            self._unmark(ref, marks)

    def _unmark(self, ref: int, marks: int) -> None:
        memory = self.domain.memory
        address = self.entry_address(ref)
        for _ in range(ATTEMPTS):
            seen = memory.d[address >> 2]
            if compare_exchange_32(memory.address + address, seen, seen & ~marks & 0xFFFFFFFF) == seen:
                return

    def in_use(self, ref: int) -> bool:
        return bool(self._active[ref].pins)

    def _used(self) -> list[Active]:
        used = np.flatnonzero(self._pins[: self.entries].any(axis=1))
        return [self._active[ref] for ref in used.tolist()]

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
        return any(active.domid for active in self._used())

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
                mapping.granter.grants.unpin(mapping.ref, mapping.writable)

    def references(self) -> Iterator[tuple[int, int | None]]:
        """References to frames by pins and mappings: (MFN, the type it needs or None), for the invariant checker."""
        for mapping in self._mappings.values():
            if mapping.alias:
                yield mapping.alias, None
        for active in self._used():
            yield from [(active.mfn, None)] * active.readers
            yield from [(active.mfn, TYPE_WRITABLE)] * active.writers
