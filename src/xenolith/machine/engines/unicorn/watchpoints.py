"""Breakpoints on data (SDM vol. 3, 18.2.4), which this build of Unicorn leaves out.

QEMU's TLB still marks pages with a watchpoint, and accesses to those still ask whether they meet it; but the functions
that are asked are empty.  Ours take their place in the linkage table while any vCPU has such a breakpoint armed.

The trap comes behind the instruction.  So while such a breakpoint is armed, the vCPU is stepped: QEMU's flag for that
is set in hflags alone, where no PUSHF sees it.  What an access met is noted, and the next step becomes the trap.
"""

from __future__ import annotations

import ctypes
import functools
import threading
from ctypes import c_int, c_uint32, c_uint64
from typing import TYPE_CHECKING, Final, NamedTuple

from xenolith.abi.x86 import DR6_BREAKPOINTS, DR6_STEP, PAGE_SIZE, VECTOR_DB
from xenolith.machine.engines.unicorn import linkage
from xenolith.machine.engines.unicorn.library import Library
from xenolith.machine.native import function_address

if TYPE_CHECKING:
    from xenolith.machine.engines.unicorn.deliver import Hook

_READ, _WRITE = 1, 2  # QEMU's BP_MEM_READ and BP_MEM_WRITE
_ACCESSES: Final = {1: _WRITE, 3: _READ | _WRITE}  # by the two bits of DR7
_LENGTHS: Final = (1, 2, 8, 4)  # likewise

_Check = ctypes.CFUNCTYPE(None, c_uint64, c_uint64, c_uint64, c_uint32, c_int, c_uint64)
_Matches = ctypes.CFUNCTYPE(c_int, c_uint64, c_uint64, c_uint64)


class Watchpoint(NamedTuple):
    """An armed breakpoint on data."""

    bit: int  # of DR6
    start: int
    length: int  # bytes
    accesses: int  # _READ, _WRITE

    def meets(self, address: int, length: int) -> bool:
        return self.start < address + length and address < self.start + self.length


def armed(debug: list[int]) -> list[Watchpoint]:
    """Those of these debug registers (DR0 to DR7)."""
    found = []
    for number in range(4):
        kind, length = debug[7] >> 16 + 4 * number & 3, _LENGTHS[debug[7] >> 18 + 4 * number & 3]
        if debug[7] >> 2 * number & 3 and kind in _ACCESSES:
            found.append(Watchpoint(1 << number, debug[number] & -length, length, _ACCESSES[kind]))
    return found


class Watcher:
    """The watchpoints of the vCPU that runs on an instance."""

    def __init__(self, lib: Library, cpu: int, hook: Hook) -> None:
        self._lib, self._cpu, self._hook = lib, cpu, hook
        self._watchpoints: list[Watchpoint] = []

    def set(self, watchpoints: list[Watchpoint]) -> bool:
        """Watch these. Whether others were watched before: the TLB has to be flushed then."""
        if watchpoints == self._watchpoints:
            return False
        self._watchpoints = watchpoints
        self._hook.watches = bool(watchpoints)
        self._hook.watch_hits = 0
        with _lock:
            if watchpoints:
                _watchers[self._cpu] = self
            else:
                _watchers.pop(self._cpu, None)
            for entry, (ours, theirs) in _entries(self._lib):
                entry.value = ours if _watchers else theirs
        return True

    def close(self) -> None:
        self.set([])

    def trap(self, vector: int, dr6: int) -> int | None:
        """What DR6 is at this trap; None: there would be none without us."""
        hits, self._hook.watch_hits = self._hook.watch_hits, 0
        steps = self._hook.steps
        if vector != VECTOR_DB or not dr6 & DR6_STEP:
            return dr6
        dr6 = (dr6 if steps else dr6 & ~DR6_STEP) | hits
        return dr6 if steps or dr6 & DR6_BREAKPOINTS else None

    def accesses(self, page: int) -> int:
        """Which accesses to this page may meet a watchpoint."""
        found = 0
        for watchpoint in self._watchpoints:
            if watchpoint.meets(page, PAGE_SIZE):
                found |= watchpoint.accesses
        return found

    def check(self, address: int, length: int, access: int) -> None:
        """Note what this access meets."""
        for watchpoint in self._watchpoints:
            if watchpoint.accesses & access and watchpoint.meets(address, length):
                self._hook.watch_hits |= watchpoint.bit


_watchers: dict[int, Watcher] = {}  # by the address of the CPUState
_lock: Final = threading.Lock()


def _check(cpu: int, address: int, length: int, _attributes: int, access: int, _return: int) -> None:
    watcher = _watchers.get(cpu)
    if watcher is not None:
        watcher.check(address, length, access)


def _matches(cpu: int, address: int, _length: int) -> int:
    watcher = _watchers.get(cpu)
    return 0 if watcher is None else watcher.accesses(address & -PAGE_SIZE)


_CALLBACKS: Final = {
    "cpu_check_watchpoint_x86_64": _Check(_check),
    "cpu_watchpoint_address_matches_x86_64": _Matches(_matches),
}


@functools.cache
def _entries(lib: Library) -> list[tuple[ctypes.c_uint64, tuple[int, int]]]:
    """The entries of the linkage table, with the addresses of our functions and the library's."""
    return [
        (linkage.entry(lib, symbol), (function_address(callback), lib.address(symbol)))
        for symbol, callback in _CALLBACKS.items()
    ]
