"""What this host's KVM is like, found out by running code on it, and whether it works at all.

A tiny machine of a few frames executes a few instructions; what comes back decides.  The kernel's name
for its module is not looked at: what counts is behaviour.  All of it takes some 20 ms, once a process.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import os
import threading
import time
from typing import Final, NamedTuple

from xenolith.abi.layout import FLAT_RING3_CS32, FLAT_RING3_CS64, FLAT_RING3_DS32, FLAT_RING3_SS32, FLAT_RING3_SS64
from xenolith.abi.x86 import (
    DS,
    FS_BASE,
    GS_BASE,
    PAGE_SHIFT,
    PTE_P,
    PTE_RW,
    PTE_US,
    RAX,
    RCX,
    RDI,
    RDX,
    RIP,
    RSP,
    VECTOR_DB,
    VECTOR_GP,
    VECTOR_NM,
    VECTOR_PF,
    VECTOR_UD,
)
from xenolith.machine.engines.kvm import area
from xenolith.machine.engines.kvm.engine import KvmEngine
from xenolith.machine.engines.kvm.traits import CAUTIOUS, Counter, HostTraits
from xenolith.machine.engines.protocol import TRAP_NOTHING, TRAP_SYSCALL, CpuState, EngineError
from xenolith.machine.memory import MachineMemory
from xenolith.machine.tsc import is_usable, read_tsc

_FRAMES: Final = 512
_CODE: Final = 0x40_0000
_DATA: Final = 0x60_0000
_OTHER: Final = 0x60_1000
_TABLE: Final = PTE_P | PTE_RW | PTE_US
_TIMER_NS: Final = 300_000
_TIMER_ROUNDS: Final = 3
_TIMER_DEADLINE: Final = 0.2  # s
_MARKED_LEAF: Final = 0x4000_0000
_MARK: Final = 0x6E65_5821


class Trap(NamedTuple):
    vector: int
    error_code: int
    address: int


class ProbeMachine:
    """A machine with one page of code and two of data, and one vCPU."""

    def __init__(self, traits: HostTraits) -> None:
        self.memory = MachineMemory(_FRAMES)
        try:
            self.engine = KvmEngine(self.memory, traits)
        except EngineError:
            self.memory.close()
            raise
        l4, l3, l2, l1_code, l1_data, self.code, self.data, self.other = map(int, self.memory.allocate(8))
        q = self.memory.q
        q[l4 << 9] = l3 << PAGE_SHIFT | _TABLE
        for slot, entry in self.engine.l4_entries.items():
            q[(l4 << 9) + slot] = entry
        q[l3 << 9] = l2 << PAGE_SHIFT | _TABLE
        q[(l2 << 9) + (_CODE >> 21)] = l1_code << PAGE_SHIFT | _TABLE
        q[(l2 << 9) + (_DATA >> 21)] = l1_data << PAGE_SHIFT | _TABLE
        q[l1_code << 9] = self.code << PAGE_SHIFT | _TABLE
        self.data_entry = l1_data << 9
        q[self.data_entry] = self.data << PAGE_SHIFT | _TABLE
        q[self.data_entry + 1] = self.other << PAGE_SHIFT | _TABLE
        (second,) = map(int, self.memory.allocate(1))
        self.second_l4 = second
        self.memory.page(second)[:] = self.memory.page(l4)
        self.engine.set_cpuid({**self.engine.supported_cpuid, (_MARKED_LEAF, 0): (_MARKED_LEAF, 0, _MARK, 0)})
        self.cpu = self.engine.cpu(0)
        self.state = CpuState(l4_mfn=l4)
        self.cpu.load(self.state)

    def execute(self, code: str, **registers: int) -> Trap:
        """Run code (hexadecimal) until it traps."""
        data = bytes.fromhex(code)
        start = self.code << PAGE_SHIFT
        self.memory.b[start : start + len(data)] = data
        regs = self.cpu.regs
        regs[RIP] = _CODE
        regs[RSP] = _OTHER + 0x1000
        names = {"rax": RAX, "rcx": RCX, "rdx": RDX, "rdi": RDI}
        for name, value in registers.items():
            regs[names[name]] = value
        self.cpu.set_rflags(0)
        traps: list[Trap] = []

        def on_trap(vector: int, error_code: int, address: int) -> bool:
            traps.append(Trap(vector, error_code, address))
            return False

        while not traps:
            self.cpu.run(on_trap)
        return traps[0]

    def change_entry(self, index: int, value: int) -> None:
        """Change a page-table entry as the hypervisor does, with a flush."""
        old, self.memory.q[index] = self.memory.q[index], value
        self.engine.entry_changed(index, old, value)
        self.cpu.flush_tlb()

    def is_interrupted(self) -> bool:
        """Whether the local timer stops an endless loop in guest-kernel mode, more than once. Each time is an exit."""
        cpu = self.cpu
        if not self.engine.has_ticks:
            return False
        self.memory.q[self.second_l4 << 9 | area.SLOT] = self.engine.area.kernel_l4_entry
        cpu.switch_mode(self.second_l4, False)
        start = self.code << PAGE_SHIFT
        self.memory.b[start : start + 2] = b"\xeb\xfe"
        cpu.regs[RIP] = _CODE
        interrupted: list[int] = []

        def on_trap(vector: int, _error_code: int, _address: int) -> bool:
            interrupted.append(vector)
            return False

        kick = threading.Timer(_TIMER_DEADLINE, cpu.kick)
        kick.start()
        cpu.set_timer(_TIMER_NS, _TIMER_NS)
        while len(interrupted) < _TIMER_ROUNDS:
            before = len(interrupted)
            cpu.run(on_trap)
            if len(interrupted) == before:  # kicked
                break
        kick.cancel()
        kick.join()
        cpu.set_timer(0, 0)
        return interrupted == [TRAP_NOTHING] * _TIMER_ROUNDS

    def close(self) -> None:
        self.engine.close()
        self.memory.close()


@functools.cache
def host_traits() -> HostTraits:
    """The traits of this host's KVM. Raises EngineError, with the reason, where KVM cannot run guests."""
    machine = ProbeMachine(CAUTIOUS)
    try:
        _check_traps(machine)
        native = _cpuid_is_native(machine)
        xcr0, xcr0_settable = _xcr0(machine, native)
        traits = HostTraits(
            shadows_page_tables=_keeps_stale_entries(machine),
            syscall_cpl=_syscall_cpl(machine),
            traps_task_switched=_traps_task_switched(machine),
            keeps_selectors=_keeps_selectors(machine),
            has_breakpoints=_has_breakpoints(machine),
            runs_compatibility_code=_runs_compatibility_code(machine),
            cpuid_is_native=native,
            xcr0=xcr0,
            xcr0_settable=xcr0_settable,
            null_clears_base=_null_clears_base(machine),
            writes_bases=_writes_bases(machine),
            ticks=False,
            smap=_far_returns(machine),
            counter=_counter(machine),
            exit_cost_ns=_exit_cost_ns(machine),
            smep=not machine.cpu.runs_pages_of_cpl3(),  # the last, after which the vCPU is not used
        )
    finally:
        machine.close()
    if traits.counter is not Counter.NATIVE and not is_usable():
        raise EngineError(
            "the host's kernel has found its time stamp counter unusable as a clock (see `dmesg`), and then KVM gives "
            "guests one that goes its own way: their time would be wrong"
        )
    if not traits.smep and traits.emulates_guest_code:
        raise _fail("it has no SMEP, and its instruction emulator takes a SYSCALL of the guest's to CPL 0")
    traits = dataclasses.replace(traits, ticks=traits.has_fast_path and _ticks(traits))
    _check_cures(traits)
    return traits


def _fail(what: str) -> EngineError:
    return EngineError(f"/dev/kvm opens, but does not run ring-3 code as it must: {what}")


def _check_traps(machine: ProbeMachine) -> None:
    """The traps without which there is no guest."""
    regs = machine.cpu.regs
    trap = machine.execute("0f 0b")
    if trap.vector != VECTOR_UD or regs[RIP] != _CODE:
        raise _fail(f"UD2 gave {trap} at {regs[RIP]:#x}")
    trap = machine.execute("0f 05")
    if trap.vector != TRAP_SYSCALL or regs[RIP] != _CODE + 2:
        raise _fail(f"SYSCALL gave {trap} at {regs[RIP]:#x}")
    trap = machine.execute("48 8b 07", rdi=_DATA + 0x2123)
    if trap != (VECTOR_PF, 4, _DATA + 0x2123):
        raise _fail(f"a read of unmapped memory gave {trap}")
    for what, address in (("IDT", area.IDT), ("entry stubs", area.ENTRY_STUBS), ("alias of memory", area.ALIAS)):
        trap = machine.execute("48 8b 07 0f 0b", rdi=address)
        if trap.vector != VECTOR_PF:
            raise _fail(f"the engine's {what} can be read at CPL 3 ({trap})")
    trap = machine.execute("48 89 07 0f 0b", rdi=area.SYSCALL_PAGE)
    if trap.vector != VECTOR_PF:
        raise _fail(f"the engine's system-call page can be written at CPL 3 ({trap})")
    for what, code in (("CLI", "fa"), ("HLT", "f4"), ("OUT", "e6 0d"), ("IN", "e4 80"), ("RDMSR", "0f 32")):
        trap = machine.execute(code)
        if trap != (VECTOR_GP, 0, 0):
            raise _fail(f"{what} at CPL 3 gave {trap}")
    machine.memory.q[machine.data << 9] = 0x1122_3344_5566_7788
    machine.execute("48 8b 07 0f 0b", rdi=_DATA)
    if regs[RAX] != 0x1122_3344_5566_7788:
        raise _fail(f"memory reads as {regs[RAX]:#x}")


def _read(machine: ProbeMachine, address: int) -> int:
    """What guest code reads there; -1 if it faults."""
    trap = machine.execute("48 8b 07 0f 0b", rdi=address)
    return machine.cpu.regs[RAX] if trap.vector == VECTOR_UD else -1


def _keeps_stale_entries(machine: ProbeMachine) -> bool:
    """Whether ring 0's own store to a page table stays unseen even on another top-level table, by a reload of CR3."""
    q = machine.memory.q
    q[machine.data << 9], q[machine.other << 9] = 1, 2
    _read(machine, _OTHER)
    entry = q[machine.data_entry + 1]
    q[machine.data_entry + 1] = machine.data << PAGE_SHIFT | _TABLE
    machine.cpu.switch_mode(machine.second_l4, False)
    stale = _read(machine, _OTHER) != 1
    machine.cpu.switch_mode(machine.state.l4_mfn, False)
    machine.change_entry(machine.data_entry + 1, entry)
    return stale


def _syscall_cpl(machine: ProbeMachine) -> int:
    machine.execute("0f 05")
    return machine.cpu.cpl_at_exit


def _traps_task_switched(machine: ProbeMachine) -> bool:
    machine.cpu.set_task_switched(True)
    trap = machine.execute("d9 e8 0f 0b")  # fld1
    machine.cpu.set_task_switched(False)
    return trap.vector == VECTOR_NM


def _keeps_selectors(machine: ProbeMachine) -> bool:
    machine.cpu.set_segment(DS, FLAT_RING3_DS32)
    machine.execute("8c d8 0f 0b")  # mov eax, ds
    selector = machine.cpu.regs[RAX] & 0xFFFF
    machine.cpu.set_segment(DS, 0)
    return selector == FLAT_RING3_DS32


def _has_breakpoints(machine: ProbeMachine) -> bool:
    cpu = machine.cpu
    cpu.set_debug(0, _DATA)
    cpu.set_debug(7, 0x0001_0402)  # a write of one byte there
    trap = machine.execute("c6 07 00 0f 0b", rdi=_DATA)
    cpu.set_debug(7, 0x400)
    return trap.vector == VECTOR_DB


def _runs_compatibility_code(machine: ProbeMachine) -> bool:
    """Told by an instruction that processors have and KVM's emulator has not."""
    cpu = machine.cpu
    cpu.set_code_stack(FLAT_RING3_CS32, FLAT_RING3_SS32)
    machine.execute("66 0f 38 00 c1 0f 0b")  # pshufb xmm0, xmm1
    rip = cpu.regs[RIP]
    cpu.set_code_stack(FLAT_RING3_CS64, FLAT_RING3_SS64)
    return rip != _CODE


def _exit_cost_ns(machine: ProbeMachine) -> int:
    """The middle one of a hundred system calls."""
    times = [time.perf_counter_ns()]

    def on_trap(_vector: int, _error_code: int, _address: int) -> bool:
        times.append(time.perf_counter_ns())
        machine.cpu.regs[RIP] = _CODE
        return len(times) <= 100

    machine.execute("0f 05")
    machine.cpu.regs[RIP] = _CODE
    machine.cpu.run(on_trap)
    return sorted(after - before for before, after in itertools.pairwise(times))[50]


def _null_clears_base(machine: ProbeMachine) -> bool:
    regs = machine.cpu.regs
    regs[FS_BASE] = regs[GS_BASE] = _DATA
    machine.execute("31 c0 8e e0 8e e8 0f 0b")  # load FS and GS with 0
    cleared = regs[FS_BASE] == regs[GS_BASE] == 0
    regs[FS_BASE] = regs[GS_BASE] = 0
    return cleared


def _writes_bases(machine: ProbeMachine) -> bool:
    """Whether WRFSBASE and WRGSBASE work, and KVM tells what they wrote."""
    regs = machine.cpu.regs
    code = "f3 48 0f ae d7 48 ff c7 f3 48 0f ae df 0f 0b"  # wrfsbase rdi; inc rdi; wrgsbase rdi
    trap = machine.execute(code, rdi=_DATA)
    written = trap.vector == VECTOR_UD and (regs[FS_BASE], regs[GS_BASE]) == (_DATA, _DATA + 1)
    regs[FS_BASE] = regs[GS_BASE] = 0
    return written


def _far_returns(machine: ProbeMachine) -> bool:
    """Whether RETF at CPL 3 reads the stack with the rights of CPL 3: QEMU's emulated processor does not."""
    target = (_CODE + 9).to_bytes(4, "little").hex()
    trap = machine.execute(f"6a {area.USER_CODE64:02x} 68 {target} 48 cb 0f 0b")  # push cs; push target; retfq; ud2
    return trap.vector == VECTOR_UD and machine.cpu.regs[RIP] == _CODE + 9


def _counts_as_host(machine: ProbeMachine) -> bool:
    """Whether RDTSC of guest code reads the host's own counter."""
    before = read_tsc()
    machine.execute("0f 31 0f 0b")
    after = read_tsc()
    regs = machine.cpu.regs
    return before <= (regs[RDX] << 32 | regs[RAX] & 0xFFFF_FFFF) <= after


def _counter(machine: ProbeMachine) -> Counter:
    """How to make it read that, or something that differs from it by a known number."""
    if _counts_as_host(machine):
        return Counter.NATIVE
    if machine.cpu.try_counter(Counter.OFFSET) and _counts_as_host(machine):
        return Counter.OFFSET
    return Counter.WRITTEN


def _cpuid_is_native(machine: ProbeMachine) -> bool:
    """Whether guest code misses the mark that was put into KVM's table."""
    machine.execute("0f a2 0f 0b", rax=_MARKED_LEAF, rcx=0)
    return machine.cpu.regs[RCX] & 0xFFFF_FFFF != _MARK


def _xcr0(machine: ProbeMachine, native: bool) -> tuple[int, bool]:
    """The XSAVE components that guest code can use, and whether KVM lets us choose among them."""
    settable = False
    if not native:
        eax, _, _, edx = machine.engine.supported_cpuid.get((0xD, 0), (3, 0, 0, 0))
        settable = machine.cpu.try_xcr0(edx << 32 | eax)
    trap = machine.execute("0f 01 d0 0f 0b", rcx=0)  # xgetbv
    regs = machine.cpu.regs
    if regs[RIP] == _CODE and trap.vector == VECTOR_UD:
        return 3, False
    return regs[RDX] << 32 | regs[RAX] & 0xFFFF_FFFF, settable


def _ticks(traits: HostTraits) -> bool:
    """Whether KVM's local timer interrupts guest code, and needs no end of interrupt to do it again.

    A write to the local APIC would cost what the fast path saves.
    """
    try:
        machine = ProbeMachine(dataclasses.replace(traits, ticks=True))
    except EngineError:
        return False
    try:
        return machine.is_interrupted()
    finally:
        machine.close()


def _check_cures(traits: HostTraits) -> None:
    """With these traits, as guests will have them: a changed page table entry is seen, vector state survives."""
    machine = ProbeMachine(traits)
    try:
        if traits.xcr0 & 4:
            _check_wide_state(machine)
        q = machine.memory.q
        q[machine.data << 9], q[machine.other << 9] = 1, 2
        _read(machine, _DATA)
        machine.change_entry(machine.data_entry, machine.other << PAGE_SHIFT | _TABLE)
        if _read(machine, _DATA) != 2:
            raise _fail("a changed page-table entry stays unseen after a flush")
    finally:
        machine.close()


def _check_wide_state(machine: ProbeMachine) -> None:
    """All 256 bits of a vector register survive a store and a load of the vCPU's state."""
    machine.cpu.set_xcr0(machine.engine.xcr0_mask)
    pattern = os.urandom(32)
    start = machine.data << PAGE_SHIFT
    machine.memory.b[start : start + 32] = pattern
    machine.execute("c5 fe 6f 07 0f 0b", rdi=_DATA)  # vmovdqu ymm0, [rdi]
    machine.cpu.store(machine.state)
    machine.execute("c5 f4 57 c9 c5 fc 28 c1 0f 0b")  # clear it
    machine.cpu.load(machine.state)
    machine.execute("c5 fe 7f 47 20 0f 0b", rdi=_DATA)  # vmovdqu [rdi + 32], ymm0
    if machine.memory.b[start + 32 : start + 64] != pattern:
        raise _fail("KVM does not save all of the vector registers that guest code can use")
