"""The frame table: who owns each machine frame, what it is used as, and how often (paper 3.3.3; Xen: struct page_info).

Every frame has an owner, a *type* and two counts.  The existence count says how many references keep the frame
from being freed (its allocation, each mapping, each use as a page table, ...).  The type count says how many uses
need the frame to stay of its type: each writable mapping of a writable frame, each link to or pin of a page
table, each use as a descriptor table.  A frame changes type only while its type count is zero, so it is never
writable and a page table at once.  This is the security boundary between domains.

Flat arrays indexed by MFN, each as a numpy array for whole tables and as a memoryview for single frames.

A frame that stops being writable may still be writable through a stale TLB entry.  `stamp` holds the owner's
`flush_epoch` of that moment; taking the frame for another type flushes the TLB first if no flush came since
(Xen: tlbflush_timestamp).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

from xenolith.abi.hypercalls import DOMID_INVALID, DOMID_IO, DOMID_XEN

if TYPE_CHECKING:
    import numpy.typing as npt

    from xenolith.machine.memory import MachineMemory

# type_info: the type count in the low 32 bits, then flags, then the type.
TYPE_COUNT: Final = (1 << 32) - 1
VALIDATED: Final = 1 << 32  # every entry or descriptor of the frame was checked
PINNED: Final = 1 << 33  # the guest holds one type and one existence reference by a pin operation
# Validating or undoing a table may take more than one trap, see paging: entries below the progress noted hold their
# references, and the state itself holds one type and one existence reference.
PARTIAL: Final = 1 << 34  # validated in part (Xen: PGT_partial)
UNDOING: Final = 1 << 35  # in Domain.undo_list: its entries are to give up what they hold
PROGRESS_SHIFT: Final = 48
PROGRESS_MASK: Final = 0x3FF << PROGRESS_SHIFT
TYPE_SHIFT: Final = 40
TYPE_MASK: Final = 7 << TYPE_SHIFT
TYPE_NONE: Final = 0
TYPE_L1: Final = 1 << TYPE_SHIFT
TYPE_L2: Final = 2 << TYPE_SHIFT
TYPE_L3: Final = 3 << TYPE_SHIFT
TYPE_L4: Final = 4 << TYPE_SHIFT
TYPE_SEGDESC: Final = 5 << TYPE_SHIFT
TYPE_WRITABLE: Final = 6 << TYPE_SHIFT
TYPE_SHARED: Final = 7 << TYPE_SHIFT  # Xen's own frames, shared with a guest
TYPE_NAMES: Final = ("none", "L1", "L2", "L3", "L4", "segment descriptors", "writable", "shared")

# count_info: the existence count in the low 32 bits.
EXISTENCE_COUNT: Final = (1 << 32) - 1
# Of either kind; beyond that they are refused. A whole table takes 512 at once.
MOST_REFERENCES: Final = EXISTENCE_COUNT - 1024
ALLOCATED: Final = 1 << 32  # one of the references is the allocation itself


INVALID_M2P_ENTRY: Final = (1 << 64) - 1
FOREIGN: Final = DOMID_IO  # owner of an alias, where a frame of another domain appears (see machine.memory)


class FrameTable:
    """Owner, type and counts of every frame of a domain's memory, and of its aliases."""

    def __init__(self, memory: MachineMemory) -> None:
        self.memory = memory
        self.frames = memory.span
        self.owners: npt.NDArray[np.uint16] = np.full(memory.span, DOMID_INVALID, dtype=np.uint16)
        self.type_infos: npt.NDArray[np.uint64] = np.zeros(memory.span, dtype=np.uint64)
        self.count_infos: npt.NDArray[np.uint64] = np.zeros(memory.span, dtype=np.uint64)
        self.stamps: npt.NDArray[np.uint32] = np.zeros(memory.span, dtype=np.uint32)
        self.owner = self.owners.data
        self.type_info = self.type_infos.data
        self.count_info = self.count_infos.data
        self.stamp = self.stamps.data

    def allocate_xen(self, count: int = 1) -> list[int]:
        """Frames for the hypervisor itself, cleared; their MFNs. Raises OutOfMemory."""
        mfns = self.memory.allocate(count)
        self.owners[mfns] = DOMID_XEN
        self.count_infos[mfns] = ALLOCATED | 1
        return [int(mfn) for mfn in mfns]

    def allocate_xen_run(self, count: int, used: int) -> int:
        """`count` contiguous frames for the hypervisor itself, which will use `used` of them; the first MFN.

        Raises OutOfMemory.
        """
        first = self.memory.allocate_run(count, used)
        self.owners[first : first + count] = DOMID_XEN
        self.count_infos[first : first + count] = ALLOCATED | 1
        return first

    def share_with_guest(self, mfn: int, domid: int) -> None:
        """Let a domain map this Xen frame writable, as its shared_info (Xen: share_xen_page_with_guest)."""
        self.owner[mfn] = domid
        self.type_info[mfn] = TYPE_WRITABLE | VALIDATED | 1
        taken = self.get_page(mfn, domid)
        assert taken, self.describe(mfn)

    def end_sharing(self, mfn: int) -> None:
        """Undo `share_with_guest` of a domain that is dead; others may still have the frame mapped by grant."""
        assert self.type_info[mfn] & TYPE_COUNT, self.describe(mfn)
        self.type_info[mfn] -= 1
        self.put_page(mfn)

    def abandon(self) -> None:
        """The table does not add up: nothing that it says of its domain's frames counts any more."""
        self.type_infos[:] = 0
        self.count_infos[:] = self.owners == FOREIGN  # these are given back one by one

    def mapped_by_guest(self, mfn: int) -> bool:
        """Whether anything but the sharing refers to a frame that is shared."""
        return self.count_info[mfn] != ALLOCATED | 2

    def referenced(self, domid: int) -> list[int]:
        """MFNs of the frames of a dead domain that others still refer to."""
        held = (self.owners == domid) & ((self.count_infos & np.uint64(EXISTENCE_COUNT)) != 0)
        mfns: list[int] = np.flatnonzero(held).tolist()
        return mfns

    def assign(self, mfns: npt.NDArray[np.uint64], domid: int) -> None:
        """Make freshly allocated frames the domain's, each with its allocation's reference; MFNs in ascending order."""
        run: slice | npt.NDArray[np.uint64] = mfns
        if len(mfns) and int(mfns[-1]) - int(mfns[0]) == len(mfns) - 1:
            run = slice(int(mfns[0]), int(mfns[-1]) + 1)  # a hundred times as fast
        self.owners[run] = domid
        self.count_infos[run] = ALLOCATED | 1

    def release(self, mfns: npt.NDArray[np.uint64]) -> None:
        """The last references are gone: these frames return to the free pool, cleared."""
        self.owners[mfns] = DOMID_INVALID
        self.type_infos[mfns] = 0
        self.count_infos[mfns] = 0
        self.stamps[mfns] = 0
        self.memory.free_many(mfns)

    def map_foreign(self, other: MachineMemory, mfn: int, writable: bool) -> int:
        """Let a frame of another domain's memory appear; its alias MFN, with one reference. Raises OutOfMemory.

        Nothing but the grant operation that asked for it may map it: it is nobody's as far as paging knows.
        """
        alias = self.memory.map_alias(other, mfn, writable)
        self.owner[alias] = FOREIGN
        self.type_info[alias] = TYPE_WRITABLE | VALIDATED if writable else TYPE_NONE
        self.count_info[alias] = 1
        return alias

    def unmap_foreign(self, alias: int) -> None:
        """Drop that reference, the last one."""
        assert self.owner[alias] == FOREIGN and self.count_info[alias] == 1, self.describe(alias)
        self.owner[alias] = DOMID_INVALID
        self.type_info[alias] = self.count_info[alias] = 0
        self.memory.unmap_alias(alias)

    def valid(self, mfn: int) -> bool:
        """Whether this machine has such a frame (Xen: mfn_valid)."""
        return 0 < mfn < self.frames

    # --- references: nothing else counts them, but paging's pairs for types and for whole tables --------

    def get_page(self, mfn: int, domid: int) -> bool:
        """Take an existence reference if the frame is this domain's, and has not too many."""
        if not 0 < mfn < self.frames or self.owner[mfn] != domid:
            return False
        count = self.count_info[mfn]
        if not count or count & EXISTENCE_COUNT >= MOST_REFERENCES:
            return False
        self.count_info[mfn] = count + 1
        return True

    def drop_allocation(self, mfn: int) -> bool:
        """Drop the allocation's reference, if that has not been done. True: as put_page."""
        if not self.count_info[mfn] & ALLOCATED:
            return False
        self.count_info[mfn] &= ~ALLOCATED
        return self.put_page(mfn)

    def put_page(self, mfn: int) -> bool:
        """Drop an existence reference. True: it was the last, and the frame is to be freed."""
        count = self.count_info[mfn]
        assert count & EXISTENCE_COUNT, self.describe(mfn)
        self.count_info[mfn] = count - 1
        return not (count - 1) & EXISTENCE_COUNT

    def describe(self, mfn: int) -> str:
        """A frame for the log."""
        info = self.type_info[mfn]
        return (
            f"mfn {mfn:#x} owner d{self.owner[mfn]} count {self.count_info[mfn] & EXISTENCE_COUNT} "
            f"type {TYPE_NAMES[(info & TYPE_MASK) >> TYPE_SHIFT]} type count {info & TYPE_COUNT}"
            + " validated" * bool(info & VALIDATED)
            + " pinned" * bool(info & PINNED)
            + " partial" * bool(info & PARTIAL)
            + " being undone" * bool(info & UNDOING)
        )
