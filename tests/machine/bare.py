"""A bare machine on any engine: page tables of its own, ring-3 code, a trap handler, no hypervisor."""

from __future__ import annotations

from collections.abc import Callable
from struct import pack

from xenolith.abi.x86 import (
    CS,
    L2_SHIFT,
    L3_SHIFT,
    L4_SHIFT,
    PAGE_SHIFT,
    PTE_ADDRESS,
    PTE_P,
    PTE_RW,
    PTE_US,
    RFLAGS,
    RIP,
    RSP,
    SS,
)
from xenolith.machine.engines.protocol import Cpu, CpuState, Engine
from xenolith.machine.engines.select import choose
from xenolith.machine.engines.unicorn.cpu import UnicornCpu
from xenolith.machine.memory import MachineMemory

CODE = 0x40_0000
DATA = 0x60_0000
STACK_TOP = 0x80_1000
UNMAPPED = 0x50_0000
GDT = 0xFFFF_8200_0000_0000
ACCESS = PTE_P | PTE_RW | PTE_US

DATA32 = 0x0B  # selectors of descriptors in the GDT, all DPL 3
CODE32 = 0x13
CODE64 = 0x1B
BASED = 0x23
NOT_PRESENT = 0x2B
RING0 = 0x68
DESCRIPTORS = {
    DATA32: (0x0000FFFF, 0x00CFF300),
    CODE32: (0x0000FFFF, 0x00CFFB00),
    CODE64: (0x0000FFFF, 0x00AFFB00),
    BASED: (0x5678FFFF, 0x12CFF334),  # base 0x12345678
    NOT_PRESENT: (0x0000FFFF, 0x00CF7300),
    RING0: (0x0000FFFF, 0x00CF9300),
}

Trap = tuple[int, int, int]  # vector, error code, address


class BareMachine:
    """Two address spaces, of guest kernel and guest user, each with a page at CODE, DATA and below STACK_TOP."""

    def __init__(self, engine: str) -> None:
        self.memory = MachineMemory(2048)
        self.engine: Engine = choose(engine).factory(self.memory)
        self.frames: list[int] = []  # all that `frame` handed out
        self.gdt = self.frame()
        self.l4s = [self.new_l4(), self.new_l4()]
        self.code = [self.map_new(CODE, l4) for l4 in self.l4s]
        self.data = [self.map_new(DATA, l4) for l4 in self.l4s]
        for l4 in self.l4s:
            self.map_new(STACK_TOP - 0x1000, l4)
            self.set_entry(GDT, self.gdt << PAGE_SHIFT | PTE_P | PTE_RW, l4)
        for selector, (low, high) in DESCRIPTORS.items():
            start = (self.gdt << PAGE_SHIFT) + (selector & ~7)
            self.memory.b[start : start + 8] = pack("<II", low, high)

    @property
    def kernel_l4(self) -> int:
        return self.l4s[0]

    @property
    def user_l4(self) -> int:
        return self.l4s[1]

    def frame(self) -> int:
        self.frames.append(int(self.memory.allocate(1)[0]))
        return self.frames[-1]

    def new_l4(self) -> int:
        l4 = self.frame()
        for slot, entry in self.engine.l4_entries.items():
            self.memory.table(l4)[slot] = entry
        return l4

    def set_entry(self, va: int, entry: int, l4: int | None = None) -> None:
        """Set the L1 entry for `va`; tables above it are made where missing. Flushes nothing."""
        q = self.memory.q
        table = self.l4s[0] if l4 is None else l4
        for shift in (L4_SHIFT, L3_SHIFT, L2_SHIFT):
            index = (table << 9) + (va >> shift & 511)
            if not q[index] & PTE_P:
                q[index] = self.frame() << PAGE_SHIFT | ACCESS
            table = (q[index] & PTE_ADDRESS) >> PAGE_SHIFT
        index = (table << 9) + (va >> PAGE_SHIFT & 511)
        old, q[index] = q[index], entry
        if self.engine.entry_changed is not None:
            self.engine.entry_changed(index, old, entry)

    def map_new(self, va: int, l4: int | None = None, flags: int = ACCESS) -> int:
        mfn = self.frame()
        self.set_entry(va, mfn << PAGE_SHIFT | flags, l4)
        return mfn

    def write_code(self, code: str, user: bool = False, offset: int = 0) -> None:
        """Put these instructions (hexadecimal) at CODE + offset."""
        data = bytes.fromhex(code)
        self.memory.page(self.code[user])[offset : offset + len(data)] = data
        self.engine.cpu(0).code_written(self.code[user])

    def state(self, user: bool = False, **registers: int) -> CpuState:
        """A vCPU about to execute at CODE."""
        state = CpuState(l4_mfn=self.l4s[user], user=user, gdt_va=GDT, gdt_limit=0xFFF)
        for index, value in ((RIP, CODE), (RSP, STACK_TOP), (CS, 0xE033), (SS, 0xE02B), (RFLAGS, 0x202)):
            state.regs[index] = value
        return state

    def start(self, code: str, user: bool = False) -> Cpu:
        """A Cpu about to execute this code."""
        self.write_code(code, user)
        cpu = self.engine.cpu(0)
        cpu.load(self.state(user))
        return cpu

    def first_trap(self, code: str) -> tuple[Trap, int]:
        """Execute this code until its first trap; the trap, and how far RIP is from the start."""
        cpu = self.start(code)
        return run_to_trap(cpu), cpu.regs[RIP] - CODE

    def close(self) -> None:
        self.engine.close()
        self.memory.close()


def run_to_trap(cpu: Cpu) -> Trap:
    """Run until a trap, whatever kicks come."""
    traps: list[Trap] = []

    def on_trap(vector: int, error_code: int, address: int) -> bool:
        traps.append((vector, error_code, address))
        return False

    while not traps:
        cpu.run(on_trap)
    return traps[0]


def run_traps(cpu: Cpu, count: int, then: Callable[[Trap], None]) -> list[Trap]:
    """Run until so many traps have come, doing `then` at each."""
    traps: list[Trap] = []

    def on_trap(vector: int, error_code: int, address: int) -> bool:
        traps.append((vector, error_code, address))
        then(traps[-1])
        return len(traps) < count

    while len(traps) < count:
        cpu.run(on_trap)
    return traps


def cpu_of(machine: BareMachine) -> UnicornCpu:
    cpu = machine.engine.cpu(0)
    assert isinstance(cpu, UnicornCpu)
    return cpu
