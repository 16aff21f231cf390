"""Page-table entries that ring 0 has changed and KVM's shadow may still hold as they were.

On a host that shadows page tables each has to be stored once more from guest context before a vCPU that was flushed
runs guest code again (see engine).  Whoever does that does it for all: a virtual machine has one shadow for its vCPUs.

Changes are numbered.  Whoever notes one, Python or native code, holds the domain's lock.  A vCPU that was flushed
rewrites, on its way into the guest, whatever was noted up to then and no vCPU is known to have rewritten; once it is
back it says so in its own word of `rewritten`.  So two vCPUs may rewrite the same, which changes nothing, and none ever
waits for another.  A vCPU reads without the lock, and what it reads is enough:

- it was flushed by its own thread, holding the lock, so it sees all that was noted before;
- an entry makes room for another only once a vCPU is known to have rewritten it, so it is not missed;
- an entry too many to rewrite is harmless: a locked OR of zero.
"""

from __future__ import annotations

import ctypes
from ctypes import c_uint64
from typing import ClassVar, Final

import numpy as np

from xenolith.abi.x86 import PTE_A, PTE_ADDRESS, PTE_D, PTE_NX, PTE_P, PTE_PCD, PTE_PSE, PTE_PWT, PTE_RW, PTE_US
from xenolith.machine.engines.kvm.area import MAX_CPUS
from xenolith.machine.native import Fields

KEPT: Final = 4096  # where more wait to be rewritten, a change stands for its whole table
# An entry whose other bits change still permits all that it permitted, and maps the same.
MAY_NOT_LOSE: Final = PTE_P | PTE_RW | PTE_US | PTE_A | PTE_D | PTE_ADDRESS
MAY_NOT_GAIN: Final = PTE_NX | PTE_PSE | PTE_PWT | PTE_PCD | PTE_ADDRESS


class ChangesFields(ctypes.Structure):
    """What native code shares."""

    noted: int  # changes so far
    room: int  # a change with a lower number has room in `entries`; more may have
    overflowed: int  # `noted` after the last change that had none

    _fields_: ClassVar[Fields] = (
        ("noted", c_uint64),
        ("room", c_uint64),
        ("overflowed", c_uint64),
        ("tables", c_uint64),  # address of a word for each frame: `noted` after its last change that had no room
        ("rewritten", c_uint64 * MAX_CPUS),  # by each vCPU: changes with lower numbers were rewritten, by it or another
        ("entries", c_uint64 * KEPT),  # of change n, at n % KEPT: the word index in machine memory; entry 0: its table
    )


class Changes(ChangesFields):
    """Those of one domain."""

    def __init__(self, frames: int) -> None:
        self._tables = np.zeros(frames, dtype=np.uint64)
        self.tables = self._tables.ctypes.data
        self.room = KEPT

    def note(self, index: int, old: int, new: int) -> None:
        """A present entry changed. Entry 0 stands for its whole table."""
        if index & 511 and not (old & ~new & MAY_NOT_LOSE or new & ~old & MAY_NOT_GAIN):
            return
        number = self.noted
        if number >= self.room:
            self.room = max(self.rewritten) + KEPT
        if number < self.room:
            self.entries[number % KEPT] = index
        else:
            self._tables[index >> 9] = self.overflowed = number + 1
        self.noted = number + 1

    def pending(self) -> tuple[int, list[int], list[int]]:
        """What is to be rewritten: changes with numbers below the first, by these entries and whole tables (MFNs)."""
        noted = self.noted
        first = max(self.rewritten)
        indices = {self.entries[number % KEPT] for number in range(max(first, noted - KEPT), noted)}
        tables = {index >> 9 for index in indices if not index & 511}
        if self.overflowed > first:
            tables.update(np.flatnonzero(self._tables > np.uint64(first)).tolist())
        return noted, [index for index in indices if index >> 9 not in tables], list(tables)
