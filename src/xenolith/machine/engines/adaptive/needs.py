"""What a vCPU's state asks of an engine: states that this host's KVM gets wrong, so that only Unicorn will do."""

from __future__ import annotations

from xenolith.abi.x86 import CS, FS, GS
from xenolith.machine import page_walk, segments
from xenolith.machine.engines.kvm.cpu import KvmCpu
from xenolith.machine.engines.kvm.traits import HostTraits
from xenolith.machine.engines.protocol import ModeSwitchState
from xenolith.machine.engines.unicorn import layout
from xenolith.machine.engines.unicorn.cpu import UnicornCpu
from xenolith.machine.memory import MachineMemory


class Needs:
    """Of one vCPU; the adaptive engine keeps it informed of what no register says."""

    def __init__(self, memory: MachineMemory, traits: HostTraits, kvm: KvmCpu, unicorn: UnicornCpu) -> None:
        self._memory, self._traits, self._kvm, self._unicorn = memory, traits, kvm, unicorn
        self._regs = unicorn.regs
        self.modes: ModeSwitchState | None = None
        self.task_switched = False
        self.dr7 = 0
        self.gdt = self.ldt = (0, 0)  # linear address and limit
        self.reads_fixed_m2p = False
        self.uses_wide_vectors = False  # it has executed instructions that Unicorn has not

    def only_unicorn_can(self, l4_mfn: int) -> bool:
        """Whether this host's KVM would get the guest's state wrong."""
        traits, regs = self._traits, self._regs
        if self.reads_fixed_m2p or self._knows_xens_selectors:
            return True
        if self.task_switched and not traits.traps_task_switched:
            return True
        if self.dr7 & 0xFF and not traits.has_breakpoints:
            return True
        if not traits.runs_compatibility_code and not regs[CS + 2] >> 32 & layout.DESC_L:
            return True
        return bool((regs[FS] | regs[GS]) & 0xFFFC) and not traits.keeps_selectors and self._has_local_segment(l4_mfn)

    @property
    def _knows_xens_selectors(self) -> bool:
        """Whether it is a kernel that loads CS by itself: one that may look at it, too.

        Not one that does so to serialize, has programs or uses what only KVM executes, as Linux does: that reads CS at
        most to load it again (sync_core), and would never leave Unicorn.
        """
        if not self._kvm.kernels_far_transfers and not self._unicorn.kernels_far_transfers:
            return False
        has_programs = self.modes is not None and self.modes.user_l4
        return not (self._unicorn.serializes or self.uses_wide_vectors or has_programs)

    def selectors_would_be_lost(self) -> bool:
        """Whether FS or GS holds a selector, if only for a moment, that guest code could not read back on KVM."""
        return bool((self._regs[FS] | self._regs[GS]) & 0xFFFC) and not self._traits.keeps_selectors

    def _has_local_segment(self, l4_mfn: int) -> bool:
        """Whether FS or GS holds the selector of a segment that does not start at 0: one that somebody will look at."""

        def descriptor(selector: int) -> bytes | None:
            va, limit = self.ldt if selector & segments.SELECTOR_TI else self.gdt
            offset = selector & ~7
            return page_walk.read(self._memory, l4_mfn, va + offset, 8) if offset + 7 <= limit else None

        for register in (FS, GS):
            try:
                if segments.data_segment(self._regs[register] & 0xFFFF, descriptor).base:
                    return True
            except ValueError:
                continue
        return False
