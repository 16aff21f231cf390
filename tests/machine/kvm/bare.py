"""A bare machine on the KVM engine: page tables of its own, ring-3 code, a trap handler, no hypervisor."""

from __future__ import annotations

import threading
from collections.abc import Callable
from struct import pack

from xenolith.abi.x86 import L2_SHIFT, L3_SHIFT, L4_SHIFT, PAGE_SHIFT, PTE_P, PTE_RW, PTE_US, RIP, RSP
from xenolith.machine.engines.kvm.cpu import KvmCpu
from xenolith.machine.engines.kvm.engine import KvmEngine
from xenolith.machine.engines.kvm.host import host_traits
from xenolith.machine.engines.protocol import CpuState
from xenolith.machine.memory import MachineMemory

CODE = 0x40_0000
DATA = 0x60_0000
STACK_TOP = 0x80_1000
GDT = 0xFFFF_8200_0000_0000
TABLE = PTE_P | PTE_RW | PTE_US
DATA_PAGES = 300


class Machine:
    """Pages at CODE, DATA (DATA_PAGES of them), below STACK_TOP and at GDT; any number of vCPUs on one page table."""

    def __init__(self, frames: int = 4096) -> None:
        self.memory = MachineMemory(frames)
        self.engine = self.make_engine()
        self.l4 = self.new_l4()
        self.code = self.map_new(CODE)
        self.data = [self.map_new(DATA + number * 0x1000) for number in range(DATA_PAGES)]
        self.map_new(STACK_TOP - 0x1000)
        self.gdt = self.map_new(GDT)
        self.states: list[CpuState] = []

    def make_engine(self) -> KvmEngine:
        return KvmEngine(self.memory, host_traits())

    def frame(self) -> int:
        return int(self.memory.allocate(1)[0])

    def new_l4(self) -> int:
        l4 = self.frame()
        for slot, entry in self.engine.l4_entries.items():
            self.memory.q[(l4 << 9) + slot] = entry
        return l4

    def entry(self, va: int, l4: int | None = None) -> int:
        """The word index of the L1 entry for `va`; tables above it are made where missing."""
        table = self.l4 if l4 is None else l4
        for shift in (L4_SHIFT, L3_SHIFT, L2_SHIFT):
            index = (table << 9) + (va >> shift & 511)
            if not self.memory.q[index] & PTE_P:
                self.memory.q[index] = self.frame() << PAGE_SHIFT | TABLE
            table = self.memory.q[index] >> PAGE_SHIFT & 0xF_FFFF_FFFF
        return (table << 9) + (va >> PAGE_SHIFT & 511)

    def map_new(self, va: int, l4: int | None = None) -> int:
        mfn = self.frame()
        self.memory.q[self.entry(va, l4)] = mfn << PAGE_SHIFT | TABLE
        return mfn

    def change_entry(self, index: int, value: int) -> None:
        """What the hypervisor does to an entry that was present."""
        old, self.memory.q[index] = self.memory.q[index], value
        self.engine.entry_changed(index, old, value)

    def write_code(self, code: str | bytes, offset: int = 0) -> int:
        data = bytes.fromhex(code) if isinstance(code, str) else code
        start = (self.code << PAGE_SHIFT) + offset
        self.memory.b[start : start + len(data)] = data
        return CODE + offset

    def word(self, number: int = 0, page: int = 0) -> int:
        return self.memory.q[(self.data[page] << 9) + number]

    def set_word(self, value: int, number: int = 0, page: int = 0) -> None:
        self.memory.q[(self.data[page] << 9) + number] = value

    def set_descriptor(self, selector: int, low: int, high: int) -> None:
        start = (self.gdt << PAGE_SHIFT) + (selector & ~7)
        self.memory.b[start : start + 8] = pack("<II", low, high)

    def cpu(self, number: int = 0) -> KvmCpu:
        cpu = self.engine.cpu(number)
        state = CpuState(l4_mfn=self.l4, gdt_va=GDT, gdt_limit=0xFFF, xcr0=self.engine.xcr0_mask)
        self.states.append(state)
        cpu.load(state)
        cpu.regs[RSP] = STACK_TOP
        cpu.regs[RIP] = CODE
        return cpu

    def execute(self, cpu: KvmCpu, code: str | None = None) -> tuple[int, int, int]:
        """Run from CODE until the first trap: its vector, error code and address."""
        if code is not None:
            self.write_code(code)
        cpu.regs[RIP] = CODE
        return run_to_trap(cpu)

    def close(self) -> None:
        self.engine.close()
        self.memory.close()


def run_to_trap(cpu: KvmCpu) -> tuple[int, int, int]:
    traps: list[tuple[int, int, int]] = []

    def on_trap(*trap: int) -> bool:
        traps.append(trap)  # type: ignore[arg-type]
        return False

    while not traps:
        cpu.run(on_trap)
    return traps[0]


def in_thread(function: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=function, daemon=True)
    thread.start()
    return thread
