"""A domain's own machine: its memory, the table of its frames, and Xen's frames that every domain finds in it.

MFNs are a domain's own: 0 up to its maximum and what Xen needs besides, in a memory object that nobody else has.  The
engines that execute the domain map this object and nothing else, so whoever gets past direct paging, or to CPL 0 of its
own virtual machine, still reaches only itself.  It is also what makes a domain something that can be kept and moved:
the same pages at the same MFNs, and the guest knows nothing.

What one domain's ring 0 has to do with another's is a short list: event channels (`events`), foreign frames
(`grants`), and dom0's control operations.

The machine-to-physical table (`m2p`, one 64-bit pfn for each frame) is readable by the guest at the address that the
ABI fixes and at `M2P_ALIAS_VA`, which is what it is told: one engine cannot reach the fixed address.
"""

from __future__ import annotations

from typing import Final

from xenolith.abi import layout
from xenolith.abi.x86 import PAGE_SHIFT, PTE_A, PTE_D, PTE_NX, PTE_P, PTE_PSE, PTE_RW, PTE_US
from xenolith.hypervisor.descriptors import FLAT_DESCRIPTORS
from xenolith.hypervisor.frames import INVALID_M2P_ENTRY, FrameTable
from xenolith.machine.memory import Image, MachineMemory, MemoryBudget

M2P_ALIAS_SLOT: Final = 258  # L4 slot of the machine-to-physical table's second mapping
M2P_ALIAS_VA: Final = 0xFFFF_8100_0000_0000
SUPERPAGE_ORDER: Final = 9
XEN_FRAMES: Final = 4096  # MFNs beyond the domain's maximum: Xen's frames, and room for exchanges of extents
ALIASES: Final = 1024  # frames of others that a domain may have mapped at a time (Xen: max_maptrack_frames, smaller)


def memory_for(budget: MemoryBudget, max_pages: int, image: Image | None = None) -> MachineMemory:
    """Memory for a domain that may have so many frames: empty, or a private copy of an image. Raises OutOfMemory."""
    frames = max_pages + XEN_FRAMES
    m2p_frames = -(-frames * 8 >> 21) << 21 - PAGE_SHIFT
    return MachineMemory(frames + m2p_frames, budget, ALIASES, image)


class View:
    """The machine of a domain that may have `max_pages` frames. Raises OutOfMemory.

    Engines map `memory`; `m2p` and `m2p_words` are the machine-to-physical table, in `m2p_extents` (MFNs of its
    superpages); `gdt_mfn` has Xen's own segment descriptors, which every GDT ends with, `zero_mfn` none.

    `memory`: one that a domain has arrived on, as `memory_for` made it. Xen's frames go where its own are not.
    """

    def __init__(self, budget: MemoryBudget, max_pages: int, memory: MachineMemory | None = None) -> None:
        self.max_pages = max_pages
        self.memory = memory or memory_for(budget, max_pages)
        self.m2p_bytes = -(-self.memory.frames * 8 >> 21) << 21
        self.frames = FrameTable(self.memory)
        try:
            self._set_up_m2p()
            self._set_up_gdt()
        except BaseException:
            self.memory.close()
            raise

    def _set_up_m2p(self) -> None:
        """Allocate the machine-to-physical table and Xen's page tables that map it read-only."""
        frames, memory = self.frames, self.memory
        q = memory.q
        used = -(-memory.frames * 8 >> PAGE_SHIFT)
        first = frames.allocate_xen_run(self.m2p_bytes >> PAGE_SHIFT, used)
        self.m2p_extents = list(range(first, first + (self.m2p_bytes >> PAGE_SHIFT), 1 << SUPERPAGE_ORDER))
        self.m2p = q[first << 9 : (first << 9) + memory.frames]
        self.m2p_words = memory.words[first << 9 : (first << 9) + memory.frames]
        self.m2p_words[:] = INVALID_M2P_ENTRY
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
        self.gdt_mfn, self.zero_mfn = self.frames.allocate_xen(2)
        table = self.memory.q[self.gdt_mfn << 9 : (self.gdt_mfn + 1) << 9]
        for selector, descriptor in FLAT_DESCRIPTORS.items():
            table[(selector >> 3) - layout.FIRST_RESERVED_GDT_ENTRY] = descriptor
