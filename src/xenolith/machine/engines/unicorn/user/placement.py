"""Which address spaces run in stubs: those whose programs compute, by what both sides measure.

A trap costs Unicorn a microsecond and a stub some fifteen, and a stub executes code several times as fast.  Both sides
measure a program's own time from trap to trap: on Unicorn (deliver.c) without translation, in a stub by the time
stamp counter, which its handler reads before and after.  What it takes to map pages in a stub, and to unmap them when
the guest's tables change, as a fork changes all of them, is measured and charged.  So it is known what a stay costs in
relation to the other side.  That adds up as *regret*, for each address space, and when it reaches the *patience* with
this side, the address space moves.

A stay in a stub that ends so was a mistake, and patience with Unicorn grows by that: a move costs a fault for each
page.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from xenolith.machine.tsc import scale

SPEED: Final = 6  # of code in a stub, in relation to Unicorn
TRAP_NS: Final = 20_000  # what a trap costs more in a stub
MOST_NS: Final = 200_000  # that count between two traps in a stub: for longer somebody else may have run
MOST_CHARGED_NS: Final = 1_000_000  # at a time
SEEN_NS: Final = 100_000  # of a program's time on Unicorn, for which it is worth to look
LEAST_PATIENCE: Final = 32_000_000  # with Unicorn, ns of regret
MOST_PATIENCE: Final = 1_000_000_000
PATIENCE: Final = 4_000_000  # with a stub; and as much may have been won before, or is lent at the beginning
LESSON: Final = 4  # times as patient with Unicorn, after a stay in a stub that was a mistake


class Placement:
    """Of one domain's address spaces, by the MFN of their L4 table."""

    def __init__(self, frames: int, force: bool, overhead: tuple[int, int]) -> None:
        """`force`: all of them run in stubs. `overhead`: see host.overhead."""
        self._force = force
        self._overhead = overhead
        self._wanted = np.full(frames, force, dtype=np.uint8)
        self.wanted_address: int = self._wanted.ctypes.data
        self._regret = np.zeros(frames, dtype=np.int64)
        self._patience = np.full(frames, LEAST_PATIENCE, dtype=np.int64)
        self.regret_address: int = 0 if force else self._regret.ctypes.data
        self.patience_address: int = self._patience.ctypes.data

    def wants_stub(self, l4_mfn: int) -> bool:
        return bool(self._wanted[l4_mfn])

    def want(self, l4_mfn: int) -> None:
        """It needs a stub."""
        self._wanted[l4_mfn] = 1
        self._regret[l4_mfn] = -PATIENCE

    def forget(self, l4_mfn: int) -> None:
        """This L4 table is no more; the next one in its frame is another program's."""
        self._wanted[l4_mfn] = self._force
        self._regret[l4_mfn], self._patience[l4_mfn] = 0, LEAST_PATIENCE

    def ran_on_unicorn(self, l4_mfn: int, ticks: int, traps: int, cpu_ns: int, all_ticks: int) -> bool:
        """A program has run for so many ticks of the TSC, with so many traps. False: it is too early to say.

        `cpu_ns`: all of the vCPU's CPU time meanwhile, in which it would have run for `all_ticks`: on a busy host ticks
        go by while somebody else runs.
        """
        time = scale().nanoseconds(ticks)
        all_time = scale().nanoseconds(all_ticks)
        if cpu_ns < all_time:
            time = time * cpu_ns // all_time
        if self._force or time < SEEN_NS:
            return False
        regret = int(self._regret[l4_mfn]) + time - time // SPEED - traps * TRAP_NS
        self._regret[l4_mfn] = max(regret, 0)
        if regret >= self._patience[l4_mfn]:
            self.want(l4_mfn)
        return True

    def ran_in_stub(self, l4_mfn: int, ticks: int, exception: bool) -> None:
        """A program has run in its stub for so many ticks of the TSC, until a system call or an exception."""
        if self._force:
            return
        time = min(scale().nanoseconds(max(ticks - self._overhead[exception], 0)), MOST_NS)
        self._add(l4_mfn, TRAP_NS - (SPEED - 1) * time)

    def charge(self, l4_mfn: int, ticks: int) -> None:
        """It took so many ticks of the TSC to map or unmap pages of it."""
        if not self._force:
            self._add(l4_mfn, min(scale().nanoseconds(ticks), MOST_CHARGED_NS))

    def _add(self, l4_mfn: int, ns: int) -> None:
        regret = int(self._regret[l4_mfn]) + ns
        self._regret[l4_mfn] = max(regret, -PATIENCE)
        if regret >= PATIENCE:
            self._wanted[l4_mfn] = 0
            self._regret[l4_mfn] = 0
            self._patience[l4_mfn] = min(LESSON * int(self._patience[l4_mfn]), MOST_PATIENCE)
