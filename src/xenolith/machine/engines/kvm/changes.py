"""Page-table entries that ring 0 has changed and KVM's shadow may still hold as they were.

On a host that shadows page tables each has to be stored once more from guest context before the next use of the tables
after a flush (see engine).  Python and native code note changes here, holding the domain's lock, and the vCPU's own
thread takes them.  Both work on the same arrays, which is why a domain whose vCPUs have several threads does without
native code.
"""

from __future__ import annotations

import ctypes
from ctypes import c_uint32, c_uint64
from typing import ClassVar, Final

import numpy as np

from xenolith.abi.x86 import PTE_A, PTE_ADDRESS, PTE_D, PTE_NX, PTE_P, PTE_PCD, PTE_PSE, PTE_PWT, PTE_RW, PTE_US
from xenolith.machine.native import Fields

MOST_ENTRIES: Final = 4096  # beyond these, an entry's whole table is noted
# An entry whose other bits change still permits all that it permitted, and maps the same.
MAY_NOT_LOSE: Final = PTE_P | PTE_RW | PTE_US | PTE_A | PTE_D | PTE_ADDRESS
MAY_NOT_GAIN: Final = PTE_NX | PTE_PSE | PTE_PWT | PTE_PCD | PTE_ADDRESS


class ChangesFields(ctypes.Structure):
    """What native code shares."""

    entry_count: int
    table_count: int

    _fields_: ClassVar[Fields] = (
        ("tables", c_uint64),  # address of an array of u32: MFNs of tables of which KVM may hold anything
        ("noted", c_uint64),  # address of a byte for each frame: whether it is among them
        ("entry_count", c_uint32),
        ("table_count", c_uint32),
        ("entries", c_uint64 * MOST_ENTRIES),  # word indices into machine memory
    )


class Changes(ChangesFields):
    """Those of one domain."""

    def __init__(self, frames: int) -> None:
        self._tables = np.zeros(frames, dtype=np.uint32)
        self._noted = np.zeros(frames, dtype=np.uint8)
        self.tables, self.noted = self._tables.ctypes.data, self._noted.ctypes.data

    def __bool__(self) -> bool:
        return bool(self.entry_count or self.table_count)

    def note(self, index: int, old: int, new: int) -> None:
        """A present entry changed. Entry 0 stands for its whole table."""
        if not index & 511:
            self.note_table(index >> 9)
        elif old & ~new & MAY_NOT_LOSE or new & ~old & MAY_NOT_GAIN:
            if self.entry_count == MOST_ENTRIES:
                self.note_table(index >> 9)
                return
            self.entries[self.entry_count] = index
            self.entry_count += 1

    def note_table(self, mfn: int) -> None:
        """Anything of a table changed."""
        if not self._noted[mfn]:
            self._noted[mfn] = 1
            self._tables[self.table_count] = mfn
            self.table_count += 1

    def take_entries(self, most: int) -> list[int]:
        """Up to `most` of the entries, which are noted no longer."""
        count = min(self.entry_count, most)
        self.entry_count -= count
        start = self.entry_count
        return list(self.entries[start : start + count])

    def take_tables(self, most: int) -> list[int]:
        """Up to `most` of the tables, likewise."""
        count = min(self.table_count, most)
        self.table_count -= count
        taken: list[int] = self._tables[self.table_count : self.table_count + count].tolist()
        self._noted[taken] = 0
        return taken
