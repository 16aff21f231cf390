"""What differs between hosts' KVMs, as the engine cares about it."""

from __future__ import annotations

import enum
from dataclasses import dataclass


class Counter(enum.Enum):
    """How the time stamp counter of a virtual processor comes to be the host's, see processor.set_counter."""

    NATIVE = "the host's own"
    OFFSET = "the host's, by its offset"  # KVM_VCPU_TSC_OFFSET
    WRITTEN = "near the host's"  # IA32_TSC


@dataclass(frozen=True, slots=True)
class HostTraits:
    """How this host's KVM behaves; every field is observed by running code (host.py), none assumed."""

    shadows_page_tables: bool  # KVM keeps copies of page tables that do not follow ring 0's own stores
    syscall_cpl: int  # CPL at which SYSCALL arrives in its handler
    traps_task_switched: bool  # CR0.TS makes FPU instructions raise #NM
    keeps_selectors: bool  # guest code can read back the data-segment selectors it loaded
    has_breakpoints: bool  # DR0-3 and DR7 take effect
    runs_compatibility_code: bool  # 32-bit code runs on the processor, not in KVM's instruction emulator
    cpuid_is_native: bool  # guest code sees the processor's CPUID, whatever KVM was told
    xcr0: int  # the XSAVE components that guest code can use
    xcr0_settable: bool
    null_clears_base: bool  # loading a null selector into FS or GS clears its base
    writes_bases: bool  # guest code can write its segment bases (FSGSBASE)
    smep: bool  # CPL 0 cannot execute a page that CPL 3 can
    smap: bool  # CPL 0 can be kept from touching one, and CPL 3 does not suffer from that
    ticks: bool  # KVM's local timer interrupts guest code, again and again without an end of interrupt
    counter: Counter  # what RDTSC reads
    exit_cost_ns: int  # of a trap, from guest code to Python and back

    @property
    def shortcomings(self) -> list[str]:
        """For people: what guest code meets here that no processor would do."""
        lacking = {
            "CR0.TS has no effect": not self.traps_task_switched,
            "breakpoints have no effect": not self.has_breakpoints,
            "selectors cannot be read back": not self.keeps_selectors,
            "32-bit code runs in KVM's emulator": not self.runs_compatibility_code,
        }
        return [what for what, lacks in lacking.items() if lacks]

    @property
    def is_exact(self) -> bool:
        """Whether guest code meets nothing here that a processor would not do."""
        return not self.shortcomings

    @property
    def counts_as_host(self) -> bool:
        """Whether guest code reads the host's own counter, as it does on Unicorn: a vCPU may move between the two."""
        return self.counter is not Counter.WRITTEN

    @property
    def emulates_guest_code(self) -> bool:
        """Whether KVM's instruction emulator executes guest code, so that what it gets wrong matters."""
        return self.syscall_cpl == 3 or not self.runs_compatibility_code

    @property
    def has_fast_path(self) -> bool:
        """Whether the fast path works here: it is for hosts with dear exits (see fast_path)."""
        is_sound = self.smep and not self.has_breakpoints  # what comes upon a gate at CPL 0 would be lost
        return self.shadows_page_tables and self.syscall_cpl == 3 and self.writes_bases and is_sound

    @property
    def kind(self) -> str:
        """For people: what sort of host this is."""
        if self.shadows_page_tables:
            if self.syscall_cpl == 3:
                return "paravirtual, shadow page tables (no VMX or SVM)"
            return "shadow page tables"
        return "hardware virtualisation with nested paging"


CAUTIOUS = HostTraits(
    shadows_page_tables=True,
    syscall_cpl=3,
    traps_task_switched=False,
    keeps_selectors=False,
    has_breakpoints=False,
    runs_compatibility_code=False,
    cpuid_is_native=False,
    xcr0=3,
    xcr0_settable=False,
    null_clears_base=False,
    writes_bases=False,
    smep=False,
    smap=True,
    ticks=False,
    counter=Counter.NATIVE,
    exit_cost_ns=0,
)
"""Traits to find out the real ones with: every cure is on."""
