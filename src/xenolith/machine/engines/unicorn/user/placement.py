"""Which address spaces run in stubs: those whose programs compute, by what both sides measure.

A trap costs Unicorn a microsecond and a stub some twenty, and a stub executes code several times as fast.  On Unicorn
what is known is CPU time and the number of traps in it: where traps at a stub's price would have cost much less than
that, twice in the same address space, it goes to a stub.  In a stub the handler reads the time stamp counter before
and after the program's own instructions, so its pure time is known: where that is so short from trap to trap that
Unicorn would have been quicker, it goes back, and has to show twice as much patience the next time.
"""

from __future__ import annotations

import time
from typing import Final

import numpy as np

from xenolith.machine.engines.native_state import UNLIMITED
from xenolith.machine.engines.protocol import ModeSwitchState
from xenolith.machine.tsc import scale

STUB_TRAP_NS: Final = 20_000  # what a trap costs more in a stub
SHARE: Final = 0.7  # of CPU time, that traps may cost there
LOOK_NS: Final = 500_000  # CPU time after which there is something to see
NATIVE_TRAPS: Final = 256  # that native code may handle until Python looks
WINDOW: Final = 64  # traps in a stub, likewise
LEAST_NS: Final = 3_500  # of pure time, on average from trap to trap, to stay in a stub
PATIENCE: Final = 2  # looks in a row
MOST_PATIENCE: Final = 64


class Placement:
    """Of one domain's address spaces, by the MFN of their L4 table."""

    def __init__(self, frames: int, force: bool, overhead: tuple[int, int]) -> None:
        """`force`: all of them run in stubs. `overhead`: see host.overhead."""
        self._overhead = overhead
        self._force = force
        self._wanted = np.full(frames, force, dtype=np.uint8)
        self.wanted_address: int = self._wanted.ctypes.data
        self._modes: ModeSwitchState | None = None
        self._suspicion: dict[int, int] = {}  # looks in a row that spoke for a stub
        self._patience: dict[int, int] = {}
        self._pure: dict[int, tuple[int, int]] = {}  # traps of this window, and ticks between them
        self._traps = 0
        self._start(0)

    def attach(self, modes: ModeSwitchState | None) -> None:
        """This vCPU is the one loaded."""
        self._modes = modes
        self._grant()

    def wants_stub(self, l4_mfn: int) -> bool:
        return bool(self._wanted[l4_mfn])

    def want(self, l4_mfn: int) -> None:
        """It needs a stub."""
        self._wanted[l4_mfn] = 1
        self._suspicion.pop(l4_mfn, None)

    def forget(self, l4_mfn: int) -> None:
        """This L4 table is no more; the next one in its frame is another program's."""
        self._wanted[l4_mfn] = self._force
        for known in (self._suspicion, self._patience, self._pure):
            known.pop(l4_mfn, None)

    # --- on Unicorn -----------------------------------------------------------------------------------------

    def trapped(self) -> None:
        """Python has handled a trap."""
        self._traps += 1

    def is_time(self) -> bool:
        """Whether to look."""
        return (self._modes is not None and not self._modes.native_budget) or self._traps >= NATIVE_TRAPS

    def look(self, l4_mfn: int, user: bool, translation_ns: int) -> None:
        """The vCPU is in this address space, on Unicorn, which has needed so long for translation so far."""
        if self._force:
            return
        elapsed = time.thread_time_ns() - self._began - (translation_ns - self._translation)
        if not user or elapsed < LOOK_NS:
            if self.is_time():
                self._start(translation_ns)
            return
        native = NATIVE_TRAPS - self._modes.native_budget if self._modes is not None else 0
        if (self._traps + native) * STUB_TRAP_NS < SHARE * elapsed:
            seen = self._suspicion[l4_mfn] = self._suspicion.get(l4_mfn, 0) + 1
            if seen >= self._patience.get(l4_mfn, PATIENCE):
                self.want(l4_mfn)
        else:
            self._suspicion.pop(l4_mfn, None)
        self._start(translation_ns)

    def _start(self, translation_ns: int) -> None:
        self._began, self._translation = time.thread_time_ns(), translation_ns
        self._traps = 0
        self._grant()

    def _grant(self) -> None:
        if self._modes is not None:
            self._modes.native_budget = UNLIMITED if self._force else NATIVE_TRAPS

    # --- in a stub ------------------------------------------------------------------------------------------

    def ran(self, l4_mfn: int, ticks: int, exception: bool) -> None:
        """A program has run in its stub for so many ticks of the TSC, until a system call or an exception."""
        if self._force:
            return
        traps, total = self._pure.get(l4_mfn, (0, 0))
        traps, total = traps + 1, total + max(ticks - self._overhead[exception], 0)
        if traps >= WINDOW:
            if scale().nanoseconds(total) < LEAST_NS * traps:
                self._wanted[l4_mfn] = 0
                patience = self._patience.get(l4_mfn, PATIENCE)
                self._patience[l4_mfn] = min(2 * patience, MOST_PATIENCE)
            traps = total = 0
        self._pure[l4_mfn] = traps, total

    def left_stub(self, translation_ns: int) -> None:
        """What is measured on Unicorn begins anew."""
        if not self._force:
            self._start(translation_ns)
