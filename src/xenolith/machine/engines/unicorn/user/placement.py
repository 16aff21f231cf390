"""Which address spaces run in stubs: those whose programs compute, by what both sides measure.

A trap costs Unicorn a microsecond and a stub some thirty, and a stub executes code several times as fast.  Both sides
measure a program's own time from trap to trap: on Unicorn (deliver.c) without translation, in a stub by the time
stamp counter, which its handler reads before and after.  So it is known what a stay costs in relation to the other
side.  That adds up as *regret*, for each address space, and when it reaches the *patience* with this side, the
address space moves.

A stay in a stub that ends so was a mistake, and patience with Unicorn grows by that: a move costs a fault for each
page.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from xenolith.machine.tsc import scale

SPEED: Final = 6  # of code in a stub, in relation to Unicorn
TRAP_NS: Final = 30_000  # what a trap costs more in a stub
EXCEPTION: Final = 3  # a page fault costs as much as so many system calls: somebody has to map the page
MOST_NS: Final = 200_000  # that count between two traps in a stub: for longer somebody else may have run
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
        self._regret: dict[int, int] = {}
        self._patience: dict[int, int] = {}

    def wants_stub(self, l4_mfn: int) -> bool:
        return bool(self._wanted[l4_mfn])

    def want(self, l4_mfn: int) -> None:
        """It needs a stub."""
        self._wanted[l4_mfn] = 1
        self._regret[l4_mfn] = -PATIENCE

    def forget(self, l4_mfn: int) -> None:
        """This L4 table is no more; the next one in its frame is another program's."""
        self._wanted[l4_mfn] = self._force
        self._regret.pop(l4_mfn, None)
        self._patience.pop(l4_mfn, None)

    def ran_on_unicorn(self, l4_mfn: int, ticks: int, traps: int, cpu_ns: int) -> bool:
        """A program has run for so many ticks of the TSC, with so many traps. False: it is too early to say.

        `cpu_ns`: all of the CPU time meanwhile; on a busy host ticks go by while somebody else runs.
        """
        time = min(scale().nanoseconds(ticks), cpu_ns)
        if self._force or time < SEEN_NS:
            return False
        regret = self._regret.get(l4_mfn, 0) + time - time // SPEED - traps * TRAP_NS
        self._regret[l4_mfn] = max(regret, 0)
        if regret >= self._patience.get(l4_mfn, LEAST_PATIENCE):
            self.want(l4_mfn)
        return True

    def ran_in_stub(self, l4_mfn: int, ticks: int, exception: bool) -> None:
        """A program has run in its stub for so many ticks of the TSC, until a system call or an exception."""
        if self._force:
            return
        time = min(scale().nanoseconds(max(ticks - self._overhead[exception], 0)), MOST_NS)
        regret = self._regret.get(l4_mfn, 0) + (EXCEPTION if exception else 1) * TRAP_NS - (SPEED - 1) * time
        self._regret[l4_mfn] = max(regret, -PATIENCE)
        if regret >= PATIENCE:
            self._wanted[l4_mfn] = 0
            self._regret[l4_mfn] = 0
            self._patience[l4_mfn] = min(LESSON * self._patience.get(l4_mfn, LEAST_PATIENCE), MOST_PATIENCE)
