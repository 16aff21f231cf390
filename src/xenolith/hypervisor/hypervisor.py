"""The hypervisor object: the machine's resources and the domains on it."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import Final

from xenolith.abi import layout
from xenolith.abi.hypercalls import DOMID_FIRST_RESERVED
from xenolith.abi.x86 import PAGE_SHIFT, PTE_A, PTE_D, PTE_NX, PTE_P, PTE_PSE, PTE_RW, PTE_US
from xenolith.hypervisor.descriptors import FLAT_DESCRIPTORS
from xenolith.hypervisor.domain import Domain
from xenolith.hypervisor.frames import FrameTable
from xenolith.hypervisor.hypercalls import version
from xenolith.hypervisor.paging import INVALID_M2P_ENTRY
from xenolith.hypervisor.sched.core import Scheduler
from xenolith.hypervisor.time import TimerQueue
from xenolith.machine.clock import Clock
from xenolith.machine.engines.protocol import Engine
from xenolith.machine.memory import MachineMemory
from xenolith.machine.tsc import frequency, host_clock

LOG_LINES: Final = 2048
M2P_ALIAS_SLOT: Final = 258  # L4 slot of the machine-to-physical table's second mapping, see Hypervisor.m2p_va
M2P_ALIAS_VA: Final = 0xFFFF_8100_0000_0000
SUPERPAGE_ORDER: Final = 9


class Hypervisor:
    """One machine under Xenolith's control.

    `memory` all machine memory, `engine_factory` makes the engine of a new domain, `pcpus` how many vCPUs run at once.

    The machine-to-physical table (`m2p`, one 64-bit pfn an MFN) is readable by every guest at the address that the
    ABI fixes and at `m2p_va`, which is what they are told: one engine cannot reach the fixed address.
    """

    def __init__(
        self,
        memory: MachineMemory,
        engine_factory: Callable[[MachineMemory], Engine],
        clock: Clock | None = None,
        pcpus: int = 2,
    ) -> None:
        self.memory = memory
        self.clock: Clock = clock or host_clock()
        self.engine_factory = engine_factory
        self.lock = threading.RLock()  # protects `domains`; taken before any domain's lock
        self.domains: dict[int, Domain] = {}
        self._last_domid = 0
        self._log: deque[str] = deque(maxlen=LOG_LINES)
        self.tsc_hz = frequency()
        self.frames = FrameTable(memory)
        self._set_up_m2p()
        self._set_up_gdt()
        self.timers = TimerQueue(self.clock)
        self.scheduler = Scheduler(self, pcpus)
        self.log(f"Xenolith {version.MAJOR}.{version.MINOR}{version.EXTRAVERSION.decode()}")
        self.log(f"machine memory: {memory.frames >> 8} MiB, {memory.free_frames >> 8} MiB free for domains")
        self.log(f"{pcpus} pCPUs, scheduler {self.scheduler.name}, TSC {self.tsc_hz // 1_000_000} MHz")

    def _set_up_m2p(self) -> None:
        """Allocate the machine-to-physical table and Xen's page tables that map it read-only."""
        frames, q = self.frames, self.memory.q
        self.m2p_bytes = -(-self.memory.frames * 8 >> 21) << 21
        order = (self.m2p_bytes - 1 >> PAGE_SHIFT).bit_length()
        first = frames.allocate_xen_extent(order)
        self.m2p_extents = list(range(first, first + (self.m2p_bytes >> PAGE_SHIFT), 1 << SUPERPAGE_ORDER))
        self.m2p = q[first << 9 : (first << 9) + self.memory.frames]
        self.m2p_words = self.memory.words[first << 9 : (first << 9) + self.memory.frames]
        self.m2p_words[:] = INVALID_M2P_ENTRY
        self.m2p_va = M2P_ALIAS_VA
        l3, *l2s = frames.allocate_xen(1 + (len(self.m2p_extents) + 511) // 512)
        table = PTE_P | PTE_RW | PTE_US | PTE_A
        for number, l2 in enumerate(l2s):
            q[l3 << 9 | number] = l2 << PAGE_SHIFT | table
        for number, mfn in enumerate(self.m2p_extents):
            q[(l2s[number >> 9] << 9) + (number & 511)] = (
                mfn << PAGE_SHIFT | PTE_P | PTE_US | PTE_A | PTE_D | PTE_PSE | PTE_NX
            )
        entry = l3 << PAGE_SHIFT | table
        self.m2p_l4_entries = {layout.XEN_FIRST_SLOT: entry, M2P_ALIAS_SLOT: entry}

    def _set_up_gdt(self) -> None:
        """The page of Xen's own segment descriptors, which every GDT ends with, and the empty one where it has none."""
        self.gdt_mfn, self.zero_mfn = self.frames.allocate_xen(2)
        table = self.memory.q[self.gdt_mfn << 9 : (self.gdt_mfn + 1) << 9]
        for selector, descriptor in FLAT_DESCRIPTORS.items():
            table[(selector >> 3) - layout.FIRST_RESERVED_GDT_ENTRY] = descriptor

    def next_domid(self) -> int:
        """A domain id that was not in use lately. The caller holds `lock`."""
        for step in range(1, DOMID_FIRST_RESERVED):
            domid = 1 + (self._last_domid + step - 1) % (DOMID_FIRST_RESERVED - 1)
            if domid not in self.domains:
                self._last_domid = domid
                return domid
        return DOMID_FIRST_RESERVED

    def log(self, text: str) -> None:
        """Add a line to the hypervisor's log (`xl dmesg`)."""
        self._log.append(text)

    @property
    def log_text(self) -> str:
        return "".join(line + "\n" for line in self._log)

    def clear_log(self) -> None:
        """Forget the log."""
        self._log.clear()

    def close(self) -> None:
        """Switch the machine off. No domain but dom0 is left."""
        self.timers.stop()
        self.memory.close()

    def domain(self, domid: int) -> Domain | None:
        """The domain with this id, dying ones included."""
        return self.domains.get(domid)
