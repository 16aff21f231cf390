"""The address spaces that run in stubs: what each has mapped, and how that follows the guest's page tables.

A stub's mappings are a TLB that nobody has to flush.  They come from the guest's own tables, walked as the processor
does, accessed and dirty bits included: at a fault, a page and its neighbours that were used before.  And ring 0
reports each entry that was present and changes (Engine.entry_changed): if a stub has mapped something through its
table, for which there is a byte a frame, the report goes on a list, and before a stub runs again what it has mapped by
that entry is unmapped. An entry of an upper table, or an entry 0, which may stand for its whole table, empties
everything below.
"""

from __future__ import annotations

import ctypes
from enum import Enum, auto
from itertools import pairwise
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from xenolith.abi.x86 import PAGE_SHIFT, PTE_A, PTE_ADDRESS, PTE_D, PTE_NX, PTE_P, PTE_RW, PTE_US
from xenolith.machine import page_walk
from xenolith.machine.engines.unicorn.code_page import CodePage
from xenolith.machine.engines.unicorn.stubs import encode
from xenolith.machine.engines.unicorn.user import code
from xenolith.machine.engines.unicorn.user.shared import MOST_STUBS, PER_WINDOW, WINDOWS, SpaceFields
from xenolith.machine.engines.unicorn.user.stub import FLUSH, Command, Stub, StubDied, map_pages, unmap
from xenolith.machine.memory import MachineMemory

MOST_REGIONS: Final = 50_000  # mappings of a stub: the host's limit is 65,530 (vm.max_map_count)
AROUND: Final = 64  # entries of an L1 table that are looked at together
MOST_REPORTS: Final = 4095
READ, WRITE, EXECUTE = 1, 2, 4
_LEVELS: Final = 4

# entry_changed(index, old, new, context): if a stub uses the table, put the index on the list; count it if that is
# full.
ENTRY_CHANGED: Final = """
    48 89 f8                        mov rax, rdi
    48 c1 e8 09                     shr rax, 0x9
    49 b8 {marks:8}                 mov r8, marks
    41 80 3c 00 00                  cmp byte [r8+rax], 0x0
    74 {.2:1}                       je 2
    49 b8 {reports:8}               mov r8, reports
    49 8b 00                        mov rax, qword [r8]
    48 3d ff 0f 00 00               cmp rax, 0xfff
    73 {.1:1}                       jae 1
    49 89 7c c0 08                  mov qword [r8+rax*8+0x8], rdi
1:
    49 ff 00                        inc qword [r8]
2:
    c3                              ret
"""


LOWER_HALF, UPPER_HALF = 0, 0xFFFF_8000_0000_0000


class Outcome(Enum):
    """Of a page fault in a stub."""

    MAPPED = auto()
    FAULT = auto()  # it is the guest's
    CANNOT = auto()  # the guest may access it, but not from a stub


Window = ctypes.Array[ctypes.c_uint64]
"""What is mapped of the pages of an L1 table: each mfn << 3 | rights, or 0."""


class Space:
    """A guest's address space in a stub."""

    def __init__(self, l4_mfn: int, start: int, stub: Stub) -> None:
        self.l4_mfn = l4_mfn
        self.start = start
        """What the guest has here lies in the stub at 0: LOWER_HALF or UPPER_HALF."""
        self.stub = stub
        self.windows: dict[int, Window] = {}  # by the number of the first page
        self.l1_tables: dict[int, set[int]] = {}  # by MFN: the page numbers that its entry 0 maps
        self.tables: set[int] = set()  # all of which an entry was used
        self.stale: set[int] = set()  # page numbers to unmap
        self.is_stale = False  # all of it
        self.used = 0
        self.fields = SpaceFields(l4_mfn=l4_mfn, stub=ctypes.addressof(stub.fields))

    @property
    def regions(self) -> int:
        """How many mappings the stub has, at most."""
        return self.fields.regions

    def window(self, base: int) -> Window:
        """The one whose first page that is, to be found by native code."""
        found = self.windows.get(base)
        if found is None:
            found = self.windows[base] = (ctypes.c_uint64 * PER_WINDOW)()
        slot = base // PER_WINDOW % WINDOWS
        self.fields.bases[slot], self.fields.windows[slot] = base, ctypes.addressof(found)
        return found

    def forget(self, index: int) -> None:
        """This entry, a word of machine memory, has changed."""
        table, slot = index >> 9, index % PER_WINDOW
        self.fields.ready = False
        bases = self.l1_tables.get(table)
        if bases is None:
            self.is_stale = True
            return
        for base in bases:
            window = self.windows[base]
            for place in range(PER_WINDOW) if not slot else (slot,):
                if window[place]:
                    window[place] = 0
                    self.stale.add(base + place)

    def bring_up_to_date(self, more: list[Command]) -> bool:
        """Unmap what is stale, and carry out these. False: the host refuses. Raises StubDied."""
        commands = list(more)
        if self.stale:
            commands = [
                unmap(start << PAGE_SHIFT, count << PAGE_SHIFT) for start, count in _runs(self.stale)
            ] + commands
            self.stale.clear()
        self.fields.regions += len(commands)
        return not commands or not self.stub.carry_out(commands)

    def clear(self) -> None:
        """Unmap everything. Raises StubDied."""
        ctypes.memset(self.fields.windows, 0, ctypes.sizeof(self.fields.windows))
        self.windows.clear()
        self.stale.clear()
        self.l1_tables.clear()
        self.is_stale, self.fields.regions, self.fields.ready = False, 0, False
        self.stub.carry_out(FLUSH)


class Spaces:
    """Those of a domain. For the thread that runs its vCPU, but for `entry_changed`."""

    def __init__(self, memory: MachineMemory, listed: ctypes.Array[ctypes.c_uint64]) -> None:
        """`listed` gets the addresses of the SpaceFields of the lower halves that there are."""
        self._memory = memory
        self._listed = listed
        self._by_l4: dict[tuple[int, int], Space] = {}
        self._users: dict[int, set[Space]] = {}  # by table
        self._marks = np.zeros(memory.span, dtype=np.uint8)
        self._reports = (ctypes.c_uint64 * (1 + MOST_REPORTS))()
        self.reports_address = ctypes.addressof(self._reports)
        self._writable = np.zeros(memory.frames, dtype=np.uint8)  # frames that a stub may have written to
        self.writable_address: int = self._writable.ctypes.data
        self._written = np.zeros(memory.frames, dtype=np.uint8)  # likewise, since `written`
        self.written_address: int = self._written.ctypes.data
        self._watched: set[int] = set()  # L4 tables whose end is to be known
        self.dead: set[int] = set()
        """Those that are no more, or whose entry 0 has changed; for whoever takes them out."""
        self._clock = 0
        self._page = CodePage()
        listing = encode(ENTRY_CHANGED, marks=self._marks.ctypes.data, reports=ctypes.addressof(self._reports))
        word = ctypes.c_uint64
        self.entry_changed: Any = self._page.function(listing, None, word, word, word)
        self._page.seal()
        self.flushes = self.faults = self.made = 0

    # --- spaces and their stubs -----------------------------------------------------------------------------

    def find(self, l4_mfn: int, start: int = LOWER_HALF) -> Space:
        """That of this L4 table. Raises EngineError where there can be no stub for it."""
        space = self._by_l4.get((l4_mfn, start))
        if space is None:
            space = self._by_l4[l4_mfn, start] = Space(l4_mfn, start, self._stub())
            self._list()
        self._clock += 1
        space.used = self._clock
        return space

    def _stub(self) -> Stub:
        """A new one, or that of the space that was not used for longest."""
        if len(self._by_l4) < MOST_STUBS:
            self.made += 1
            return Stub(self._memory.fd)
        space = min(self._by_l4.values(), key=lambda space: space.used)
        self._leave_tables(space)
        del self._by_l4[space.l4_mfn, space.start]
        self._list()
        try:
            space.clear()
            space.stub.forget_registers()
        except StubDied:
            return self._stub()
        return space.stub

    def drop(self, space: Space) -> None:
        """It is not to be used any more."""
        place = space.l4_mfn, space.start
        if self._by_l4.get(place) is space:
            del self._by_l4[place]
            self._list()
        self._leave_tables(space)
        space.stub.close()

    def close(self) -> None:
        """End all stubs."""
        for space in list(self._by_l4.values()):
            self.drop(space)

    def _list(self) -> None:
        found = [ctypes.addressof(space.fields) for (_, start), space in self._by_l4.items() if start == LOWER_HALF]
        for place in range(len(self._listed)):
            self._listed[place] = found[place] if place < len(found) else 0

    def __len__(self) -> int:
        return len(self._by_l4)

    def _leave_tables(self, space: Space) -> None:
        for table in space.tables:
            users = self._users[table]
            users.discard(space)
            if not users:
                del self._users[table]
                self._marks[table] = table in self._watched
        space.tables.clear()

    def _use_table(self, space: Space, table: int) -> None:
        if table not in space.tables:
            space.tables.add(table)
            self._users.setdefault(table, set()).add(space)
            self._marks[table] = 1

    # --- what has changed -----------------------------------------------------------------------------------

    def take_reports(self) -> None:
        """Learn which entries have changed."""
        count = self._reports[0]
        if not count:
            return
        if count >= MOST_REPORTS:
            self.renew()
            self.dead |= self._watched
        else:
            for index in self._reports[1 : 1 + count]:
                for space in self._users.get(index >> 9, ()):
                    space.forget(index)
                if not index % PER_WINDOW and index >> 9 in self._watched:
                    self.dead.add(index >> 9)
        self._reports[0] = 0
        for table in self.dead & self._watched:
            self._watched.remove(table)
            self._marks[table] = table in self._users

    def written(self) -> npt.NDArray[np.bool_]:
        """Frames that stubs may have written to since the last call: those that were mapped writable.

        From any thread, while no stub runs; `renew` has to be called before the next one does.
        """
        found: npt.NDArray[np.bool_] = self._written.astype(bool)
        self._written[:] = 0
        return found

    def renew(self) -> None:
        """All is to be mapped anew, as it is used."""
        for space in self._by_l4.values():
            space.is_stale, space.fields.ready = True, False

    def watch(self, l4_mfn: int) -> None:
        """Tell in `dead` when this L4 table is no more."""
        self._watched.add(l4_mfn)
        self._marks[l4_mfn] = 1

    def prepare(self, space: Space) -> bool:
        """It is about to run: it maps nothing that the tables do not say. Whether that took work. Raises StubDied."""
        had_reports = self._reports[0] != 0
        self.take_reports()
        worked = had_reports or space.is_stale or bool(space.stale)
        if space.is_stale or space.regions > MOST_REGIONS:
            self.flushes += 1
            self._leave_tables(space)
            space.clear()
        elif space.stale and not space.bring_up_to_date([]):
            self._leave_tables(space)
            space.clear()
        space.fields.ready = True
        return worked

    def may_have_written(self, marked: npt.NDArray[np.uint8]) -> bool:
        """Whether a stub may have written to one of the marked frames since the last call."""
        if not (self._writable & marked[: len(self._writable)]).any():
            return False
        self._writable[:] = 0
        for space in self._by_l4.values():
            for window in space.windows.values():
                values = np.ctypeslib.as_array(window)
                self._writable[values[values & WRITE != 0] >> 3] = 1
        return True

    # --- faults ---------------------------------------------------------------------------------------------

    def fault(self, space: Space, va: int, write: bool, fetch: bool) -> Outcome:
        """Map the page at `va` in the stub, and others around, if the guest's tables permit this access.

        Raises StubDied.
        """
        self.faults += 1
        self.prepare(space)
        path = page_walk.path(self._memory, space.l4_mfn, va + space.start)
        if path is None:
            return Outcome.FAULT
        rights = ~0
        for _, entry in path:
            rights &= entry ^ PTE_NX
        needed = PTE_P | PTE_US | (PTE_RW if write else 0) | (PTE_NX if fetch else 0)
        if rights & needed != needed:
            return Outcome.FAULT
        if len(path) < _LEVELS or not 0 <= va < code.USER_END or va >> 39 == code.AREA_SLOT:
            return Outcome.CANNOT
        needed = PTE_P | PTE_US | (PTE_RW if write else 0)
        bits = PTE_A | PTE_D if write else PTE_A
        if page_walk.accessed(self._memory, space.l4_mfn, va + space.start, needed, bits) is None:
            return Outcome.FAULT  # it has changed meanwhile
        return self._map_around(space, va >> PAGE_SHIFT, path, write)

    def _map_around(self, space: Space, wanted: int, path: list[tuple[int, int]], write: bool) -> Outcome:
        upper = ~0
        for index, entry in path[:-1]:
            upper &= entry ^ PTE_NX
            self._use_table(space, index >> 9)
        place = path[-1][0]
        self._use_table(space, place >> 9)
        space.l1_tables.setdefault(place >> 9, set()).add(wanted & -PER_WINDOW)
        window = space.window(wanted & -PER_WINDOW)
        first = place & -AROUND
        page = wanted - (place - first)
        found = False
        new: list[tuple[int, int]] = []  # page numbers, and what they are to map
        for entry in self._memory.q[first : first + AROUND].tolist():
            if entry & (PTE_P | PTE_US | PTE_A) == PTE_P | PTE_US | PTE_A:
                mfn = (entry & PTE_ADDRESS) >> PAGE_SHIFT
                allowed = READ
                if entry & PTE_RW and upper & PTE_RW and entry & PTE_D:
                    allowed |= WRITE
                if not entry & PTE_NX and upper & PTE_NX:
                    allowed |= EXECUTE
                value = mfn << 3 | allowed
                if window[page % PER_WINDOW] != value and mfn < self._memory.frames:
                    new.append((page, value))
                    found |= page == wanted
            page += 1
        if not found:
            return Outcome.CANNOT  # an alias, or a page that is mapped and faults all the same
        commands = _mapping(new)
        if not space.bring_up_to_date(commands):
            self._leave_tables(space)
            space.clear()
            return Outcome.CANNOT
        for page, value in new:
            window[page % PER_WINDOW] = value
            if value & WRITE:
                self._writable[value >> 3] = self._written[value >> 3] = 1
        space.stale.difference_update(page for page, _ in new)
        return Outcome.MAPPED


def _mapping(pages: list[tuple[int, int]]) -> list[Command]:
    """Commands that map these, in ascending order: one for each run of neighbours that are neighbours in memory."""
    commands: list[Command] = []
    start, first, count = pages[0][0], pages[0][1], 1
    for (before, value_before), (page, value) in pairwise(pages):
        if page == before + 1 and value == value_before + 8:
            count += 1
            continue
        commands.append(map_pages(start << PAGE_SHIFT, count, first & 7, first >> 3))
        start, first, count = page, value, 1
    commands.append(map_pages(start << PAGE_SHIFT, count, first & 7, first >> 3))
    return commands


def _runs(pages: set[int]) -> list[tuple[int, int]]:
    """Start and length of each run of consecutive numbers."""
    runs: list[tuple[int, int]] = []
    for page in sorted(pages):
        if runs and page == sum(runs[-1]):
            runs[-1] = runs[-1][0], runs[-1][1] + 1
        else:
            runs.append((page, 1))
    return runs
