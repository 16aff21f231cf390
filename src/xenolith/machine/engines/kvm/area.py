"""The hypervisor area: the little that a guest's address space holds for KVM's sake, in L4 slot 257.

A guest runs at CPL 3, and the virtual processor delivers its traps as any x86-64 processor does: through an
IDT, to CPL 0, on a stack that the TSS names (Intel SDM vol. 3, ch. 6 and 7).  There each trap finds three bytes,
`out vector, al` and `hlt`: the OUT makes KVM return to Python, which reads the frame from the stack.

Every gate has a stack of its own (IST): SYSCALL reaches CPL 0 with the guest's RSP, and a trap that hits there, such as
a #DB that MOV SS has delayed (CVE-2018-8897), must not put its frame where the guest likes.  CPL 0 executes no page
that CPL 3 can reach (SMEP), nor does it touch one (SMAP) but for the gates, which read the fast path's data.

    +0x0000 IDT              33 gates, DPL 0 but for #BP and #OF: `int 14` must not forge a page fault [view]
    +0x1000 trap stubs       `out vector, al; hlt` for each, and where CSTAR points
    +0x2000 GDT              CPL-0 code and data for the stubs, the flat CPL-3 pair
    +0x3000 syscall page     where LSTAR points; where SYSCALL stays at CPL 3 the only page that CPL 3 can reach (it
                             may execute it)
    +0x4000 entry stubs      what runs at CPL 0 before a guest is entered, see EntryStubs
    +0x5000 gates            of the fast path, see fast_path [view]
    +0x10000 + n * 0x8000    TSS with I/O bitmap, trap stacks and entry list of vCPU n, each on its own page; then
                             the fast path's: code [view], data, vcpu_info and shared_info
    +0x40000000              on hosts that shadow page tables: all machine memory (supervisor, never executable)

Everything but the syscall page and the fast path's is for CPL 0 alone.  The alias of machine memory is used by the
entry stubs only, and is left out on hosts whose processor walks the guest's tables itself: there CPL 0 and CPL 3
share the processor's speculation, and nothing needs it.

Where there is a fast path, the area has two views, by which L4 entry maps it: pages marked [view] differ, and the
fast path's data, vcpu_info and shared_info are in the guest kernel's view alone.
"""

from __future__ import annotations

from struct import pack, pack_into
from typing import Final

import numpy as np

from xenolith.abi.x86 import (
    ENTRIES,
    L2_SHIFT,
    PAGE_SHIFT,
    PAGE_SIZE,
    PTE_A,
    PTE_D,
    PTE_NX,
    PTE_P,
    PTE_PSE,
    PTE_RW,
    PTE_US,
    VECTOR_BP,
    VECTOR_DB,
)
from xenolith.machine.memory import MachineMemory

SLOT: Final = 257
AREA: Final = 0xFFFF_8080_0000_0000
IDT: Final = AREA
TRAP_STUBS: Final = AREA + 0x1000
GDT: Final = AREA + 0x2000
SYSCALL_PAGE: Final = AREA + 0x3000
ENTRY_STUBS: Final = AREA + 0x4000
GATES: Final = AREA + 0x5000
PER_CPU: Final = AREA + 0x1_0000
PER_CPU_SIZE: Final = 0x8000
CPU_STACK, CPU_LIST, CPU_CODE, CPU_DATA, CPU_INFO, CPU_SHARED = (
    page * PAGE_SIZE for page in range(1, 7)
)  # after the TSS
ALIAS: Final = AREA + 0x4000_0000
MAX_CPUS: Final = (0x20_0000 - 0x1_0000) // PER_CPU_SIZE

# --- ports: how a stub says what happened ----------------------------------------------------------
TRAP_VECTORS: Final = 32  # ports 0..31 are exception vectors
VECTOR_TICK: Final = 32  # of the local timer
PORT_ENTRY_DONE: Final = 0x40
PORT_SYSCALL32: Final = 0x41
PORT_TICK: Final = 0x42
STUB_SIZE: Final = 4
SYSCALL32_STUB: Final = TRAP_STUBS + (VECTOR_TICK + 1) * STUB_SIZE
PORT_SYSCALL: Final = 0xFB  # the one port that CPL 3 may reach, where SYSCALL arrives at CPL 3; nothing real uses it

# --- selectors and descriptors ---------------------------------------------------------------------
CODE0: Final = 0x10
DATA0: Final = 0x18
USER_CODE32: Final = 0x23
USER_DATA: Final = 0x2B
USER_CODE64: Final = 0x33
TSS_SELECTOR: Final = 0x40
# No USER_CODE32: the gate for ticks relies on IRETQ into 32-bit code, whose addresses are short, faulting.
_DESCRIPTORS: Final = {
    CODE0: 0x00AF_9B00_0000_FFFF,
    DATA0: 0x00CF_9300_0000_FFFF,
    USER_DATA: 0x00CF_F300_0000_FFFF,
    USER_CODE64: 0x00AF_FB00_0000_FFFF,
}
GDT_LIMIT: Final = (USER_CODE64 | 7) & 0xFF
IDT_LIMIT: Final = (VECTOR_TICK + 1) * 16 - 1
_INTERRUPT_GATE: Final = 0x8E
_GATES_FOR_CPL3: Final = (3, 4)
GATE_SPACING: Final = 0x100  # from the user's gate to the kernel's, and to that for ticks, in their page
USER_VIEW, KERNEL_VIEW = 0, 1

# --- TSS -------------------------------------------------------------------------------------------
_TSS_RSP0: Final = 4
_TSS_IST1: Final = 36
_TSS_IO_BITMAP: Final = 102
_TSS_SIZE: Final = 104
_IO_BITMAP_PORTS: Final = 256
TSS_LIMIT: Final = _TSS_SIZE + _IO_BITMAP_PORTS // 8  # one byte of ones after the bitmap

LIST_WORDS: Final = PAGE_SIZE // 8
# The last words of the list are the gates': RIP behind the vCPU's own INT3s, the tables to go to, where ticks go.
GATE_IN_RIP, GATE_OUT_RIP, KERNEL_CR3, USER_CR3, TICK_CR3, TICK_RIP = range(LIST_WORDS - 6, LIST_WORDS)
NO_CR3: Final = 1 << 62  # raises #GP
NO_RIP: Final = 1 << 62  # nor is it behind any instruction: the first address past the lower half is the only such one
FRAME_WORDS: Final = 6  # of a trap, from the top of the stack down: SS RSP RFLAGS CS RIP error code
# Stacks, by the number in the IST: how far below the end of their page they begin.  That of #BP and ticks is the last,
# because the gates address what lies behind it.
_STACKS: Final = {1: 0, 2: 0x400, 3: 0x800}
_IST_GATES, _IST_TRAPS, _IST_DB = _STACKS
_IST_OF: Final = {VECTOR_DB: _IST_DB, VECTOR_BP: _IST_GATES, VECTOR_TICK: _IST_GATES}

_TABLE: Final = PTE_P | PTE_RW | PTE_US | PTE_A
_SUPERVISOR: Final = PTE_P | PTE_A | PTE_D
_KERNEL_DATA: Final = _SUPERVISOR | PTE_US | PTE_RW | PTE_NX
_HLT: Final = b"\xf4"


# mov eax, fs; mov ecx, gs; mov edx, ds; mov ebx, es; and load them all with 0
_TAKE_SELECTORS: Final = bytes.fromhex("8c e0 8c e9 8c da 8c c3 31 f6 8e e6 8e ee 8e de 8e c6")


class EntryStubs:
    """Code that runs at CPL 0 on the way into the guest, driven by a list that RSP points to.

    A piece takes its operand from the list with POP; the list says with RET which piece comes next.

    - `rewrite_entries(n)`: n times `pop rdi; lock or qword [rdi], 0`, then RET.  On a host that shadows page tables a
      store in guest context is what makes KVM drop its shadow of that one entry; a locked OR of nothing stores the
      entry as it is, even while another vCPU's hypercall changes it.
    - `rewrite_tables(n)`: the same with one byte amid an entry, which KVM takes as a sign that the frame is no
      page table any more: it drops its shadow of the whole table.  (Not with the first byte: kernels write that one.)
    - `flush`: `pop rdi; mov cr3, rdi`, for hosts whose processor walks the tables itself.
    - `go`: `pop rdi; iretq` into the guest.  `done`: back to Python instead.
    """

    MOST: Final = 120  # entries a list can hold of either kind
    _ENTRY: Final = bytes.fromhex("5f f0 48 83 0f 00")  # pop rdi; lock or qword [rdi], 0
    _TABLE: Final = bytes.fromhex("5f f0 80 0f 00")  # pop rdi; lock or byte [rdi], 0
    _RET: Final = b"\xc3"

    def __init__(self) -> None:
        entries = self._ENTRY * self.MOST + self._RET
        tables = self._TABLE * self.MOST + self._RET
        flush = bytes.fromhex("5f 0f 22 df c3")  # pop rdi; mov cr3, rdi; ret
        go = bytes.fromhex("5f 48 cf")  # pop rdi; iretq
        done = bytes((0xE6, PORT_ENTRY_DONE)) + _HLT
        self._entries_end = ENTRY_STUBS + len(self._ENTRY) * self.MOST
        self._tables_end = ENTRY_STUBS + len(entries) + len(self._TABLE) * self.MOST
        self.flush = self._tables_end + 1
        self.go = self.flush + len(flush)
        self.done = self.go + len(go)
        self.code = entries + tables + flush + go + done

    def rewrite_entries(self, count: int) -> int:
        return self._entries_end - len(self._ENTRY) * count

    def rewrite_tables(self, count: int) -> int:
        return self._tables_end - len(self._TABLE) * count


class CpuPages:
    """One vCPU's pages of the area: where its trap frames appear, its entry lists go, and its fast path works.

    `mfns`: of the TSS, the stack and the list; with a fast path, also of its code in the user's and in the kernel's
    view, and of its data.
    """

    def __init__(
        self, memory: MachineMemory, number: int, mfns: list[int], info_entries: memoryview, info_table: int
    ) -> None:
        tss_mfn, stack_mfn, list_mfn, *fast_path = mfns
        self.tss_va = PER_CPU + number * PER_CPU_SIZE
        self.list_va = self.tss_va + CPU_LIST
        self.code_va = self.tss_va + CPU_CODE
        self.shared_va = self.tss_va + CPU_SHARED
        self._info_entries = info_entries
        self.info_table = info_table  # MFN of the table it is in
        stack_top = self.tss_va + CPU_STACK + PAGE_SIZE
        ends = {ist: ((stack_mfn + 1) * PAGE_SIZE - below) // 8 for ist, below in _STACKS.items()}
        frames = {ist: memory.q[end - FRAME_WORDS : end] for ist, end in ends.items()}
        # Each: error code, RIP, CS, RFLAGS, RSP, SS.
        self.frames = [frames[_IST_OF.get(vector, _IST_TRAPS)] for vector in range(VECTOR_TICK + 1)]
        self.frame = frames[_IST_TRAPS]
        self.gate_frame = frames[_IST_GATES]
        self.list = memory.q[list_mfn * ENTRIES : (list_mfn + 1) * ENTRIES]
        tss = memory.page(tss_mfn)
        tss[:] = bytes(_TSS_SIZE) + b"\xff" * (PAGE_SIZE - _TSS_SIZE)
        pack_into("<Q", tss, _TSS_RSP0, stack_top)
        for ist, below in _STACKS.items():
            pack_into("<Q", tss, _TSS_IST1 + 8 * (ist - 1), stack_top - below)
        pack_into("<H", tss, _TSS_IO_BITMAP, _TSS_SIZE)
        self._syscall_bits = tss[_TSS_SIZE + PORT_SYSCALL // 8 :]
        if fast_path:
            user_code, kernel_code, data = fast_path
            self.user_code, self.kernel_code = memory.page(user_code), memory.page(kernel_code)
            self.data = memory.q[data * ENTRIES : (data + 1) * ENTRIES]

    def map_info(self, info_mfn: int, shared_mfn: int) -> bool:
        """Map the frames with its vcpu_info and the shared_info for the fast path. True: others were mapped before."""
        before = self._info_entries[0]
        for index, mfn in enumerate((info_mfn, shared_mfn)):
            self._info_entries[index] = mfn << PAGE_SHIFT | _KERNEL_DATA
        return before != 0

    def allow_syscall_port(self) -> None:
        """Let CPL 3 execute the OUT of the syscall page: on hosts where SYSCALL does not change the CPL."""
        self._syscall_bits[0] &= ~(1 << PORT_SYSCALL % 8) & 0xFF


class HypervisorArea:
    """The area of one domain: its frames, the L4 entries that map it, and what is on it.

    `alias`: whether machine memory is mapped for the entry stubs.  `syscall_cpl`: at which SYSCALL arrives.
    `gates`: the page of gates in the user's and in the kernel's view, where there is a fast path.  `bare_l4`: MFN of an
    L4 table that maps the area and nothing else.
    """

    def __init__(
        self, memory: MachineMemory, alias: bool, syscall_cpl: int, gates: tuple[bytes, bytes] | None = None
    ) -> None:
        self._memory = memory
        self.stubs = EntryStubs()
        self.has_views = gates is not None
        shared = 5
        views = 2 if gates else 1
        alias_tables = -(-memory.size >> L2_SHIFT + 9) if alias else 0
        self._frames = memory.allocate(shared + alias_tables + views * 4 + (2 if gates else 0))
        mfns = iter(int(mfn) for mfn in self._frames)
        traps, gdt, syscall, entry, self.bare_l4 = (next(mfns) for _ in range(shared))
        aliases = [next(mfns) for _ in range(alias_tables)]
        self._l1s: list[memoryview] = []  # of the user's view and of the kernel's
        l4_entries = []
        for view in range(views):
            l3, l2, l1, idt = (next(mfns) for _ in range(4))
            memory.q[l3 << 9] = l2 << PAGE_SHIFT | _TABLE
            memory.q[l2 << 9] = l1 << PAGE_SHIFT | _TABLE
            self._l1s.append(memory.q[l1 << 9 : l1 + 1 << 9])
            self._kernel_l1 = l1
            self._map(IDT, idt, _SUPERVISOR | PTE_NX, view)
            if not gates:
                self._write_idt(memory.page(idt), {})
            else:
                page = next(mfns)
                self._map(GATES, page, _SUPERVISOR, view)
                memory.page(page)[:] = gates[view]
                ticks = {VECTOR_TICK: GATES + 2 * GATE_SPACING} if view == USER_VIEW else {}
                self._write_idt(memory.page(idt), {VECTOR_BP: GATES + view * GATE_SPACING, **ticks})
            if alias:
                self._map_alias(l3, aliases)
            l4_entries.append(l3 << PAGE_SHIFT | _TABLE)
        for view in range(views):
            self._map(TRAP_STUBS, traps, _SUPERVISOR, view)
            self._map(GDT, gdt, _SUPERVISOR | PTE_RW | PTE_NX, view)  # the processor sets descriptors' accessed bits
            self._map(SYSCALL_PAGE, syscall, _SUPERVISOR | (PTE_US if syscall_cpl == 3 else 0), view)
            self._map(ENTRY_STUBS, entry, _SUPERVISOR, view)
        for number, port in enumerate((*range(TRAP_VECTORS), PORT_TICK, PORT_SYSCALL32)):
            memory.page(traps)[number * STUB_SIZE :][:3] = bytes((0xE6, port)) + _HLT
        for selector, descriptor in _DESCRIPTORS.items():
            memory.q[(gdt << 9) + (selector >> 3)] = descriptor
        out = bytes((0xE6, PORT_SYSCALL)) + _HLT
        code = out + _TAKE_SELECTORS + out
        memory.page(syscall)[: len(code)] = code
        memory.page(entry)[: len(self.stubs.code)] = self.stubs.code
        memory.q[(self.bare_l4 << 9) + SLOT] = self.l4_entry = l4_entries[USER_VIEW]
        self.kernel_l4_entry = l4_entries[-1]

    TAKE_SELECTORS: Final = SYSCALL_PAGE + 3

    def cpu_pages(self, number: int) -> CpuPages:
        """Set up the pages of vCPU `number`; call once for each."""
        frames = self._memory.allocate(6 if self.has_views else 3)
        self._frames = np.concatenate((self._frames, frames))
        mfns = [int(mfn) for mfn in frames]
        start = PER_CPU + number * PER_CPU_SIZE
        for page, mfn in enumerate(mfns[:3]):
            for view in range(len(self._l1s)):
                self._map(start + page * PAGE_SIZE, mfn, _SUPERVISOR | PTE_RW | PTE_NX, view)
        if self.has_views:
            user_code, kernel_code, data = mfns[3:]
            self._map(start + CPU_CODE, user_code, _SUPERVISOR | PTE_US, USER_VIEW)
            self._map(start + CPU_CODE, kernel_code, _SUPERVISOR | PTE_US, KERNEL_VIEW)
            self._map(start + CPU_DATA, data, _KERNEL_DATA, KERNEL_VIEW)
        index = start + CPU_INFO - AREA >> PAGE_SHIFT
        return CpuPages(self._memory, number, mfns, self._l1s[-1][index : index + 2], self._kernel_l1)

    def has_view(self, l4_mfn: int, view: int) -> bool:
        """Whether this L4 table maps the area in the view of the guest's user (0) or kernel (1)."""
        entry = self.kernel_l4_entry if view else self.l4_entry
        return not (int(self._memory.q[l4_mfn << 9 | SLOT]) ^ entry) & ~(PTE_A | PTE_D)

    def release(self) -> None:
        """Give the frames back. Nothing may map them any more."""
        self._memory.free_many(self._frames)

    def _map(self, va: int, mfn: int, flags: int, view: int) -> None:
        self._l1s[view][va - AREA >> PAGE_SHIFT] = mfn << PAGE_SHIFT | flags

    def _map_alias(self, l3: int, l2s: list[int]) -> None:
        q = self._memory.q
        for gib, l2 in enumerate(l2s):
            q[(l3 << 9) + 1 + gib] = l2 << PAGE_SHIFT | _TABLE
            for slot in range(ENTRIES):
                address = (gib * ENTRIES + slot) << L2_SHIFT
                if address < self._memory.size:
                    q[(l2 << 9) + slot] = address | _SUPERVISOR | PTE_RW | PTE_NX | PTE_PSE

    def _write_idt(self, page: memoryview, gates: dict[int, int]) -> None:
        """All vectors lead to their stubs, but these to gates of the fast path."""
        for vector in range(VECTOR_TICK + 1):
            handler = gates.get(vector, TRAP_STUBS + vector * STUB_SIZE)
            kind = _INTERRUPT_GATE | (3 << 5 if vector in _GATES_FOR_CPL3 else 0)
            ist = _IST_OF.get(vector, _IST_TRAPS)
            entry = pack("<HHBBHII", handler & 0xFFFF, CODE0, ist, kind, handler >> 16 & 0xFFFF, handler >> 32, 0)
            page[vector * 16 : vector * 16 + 16] = entry
