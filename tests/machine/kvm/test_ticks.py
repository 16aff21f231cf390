"""Ticks that the local timer brings: the event is delivered without an exit, and nothing that comes between is lost."""

from __future__ import annotations

import ctypes
import random
from collections.abc import Callable, Iterator
from contextlib import suppress

import pytest
from iced_x86 import Decoder

from xenolith.abi.hypercalls import VIRQ_TIMER
from xenolith.abi.layout import (
    FLAT_RING3_CS32,
    FLAT_RING3_CS64,
    FLAT_RING3_SS32,
    FLAT_RING3_SS64,
    SHARED_EVTCHN_MASK,
    SHARED_EVTCHN_PENDING,
)
from xenolith.abi.x86 import (
    CS,
    EFLAGS_IF,
    GS_BASE,
    PAGE_SHIFT,
    R8,
    R11,
    RAX,
    RBX,
    RCX,
    RDI,
    RDX,
    RFLAGS,
    RIP,
    RSI,
    RSP,
    SS,
    VECTOR_PF,
    VECTOR_UD,
)
from xenolith.machine import page_walk
from xenolith.machine.engines.kvm import api, area, fast_path_code, native_run, run_page
from xenolith.machine.engines.kvm.alarm import host_tick_ns
from xenolith.machine.engines.kvm.api import ioctl
from xenolith.machine.engines.kvm.fast_path import FastPath
from xenolith.machine.engines.kvm.host import host_traits
from xenolith.machine.engines.kvm.segment_registers import CODE0, DATA0
from xenolith.machine.engines.native_state import GO_ON, NOT_HANDLED
from xenolith.machine.engines.protocol import TRAP_NOTHING, TRAP_SYSCALL, EngineError
from xenolith.machine.memory import LOCAL_APIC_MFN, MachineMemory

from .bare import CODE, DATA, STACK_TOP, TABLE, Machine
from .test_fast_path import (
    FLAT,
    INFO_PAGE,
    KERNEL,
    KERNEL_GS,
    KERNEL_SP,
    KERNEL_STACK_PAGE,
    SET_TIMER,
    SHARED_PAGE,
    SYSCALL_ENTRY,
    USER_GS,
    Guest,
    offsets,
    set_timer,
    stop_at,
)
from .test_kicks import kicking
from .test_run import NOW, NativeModes

PORT = 70  # the second word's
CALLBACK = KERNEL + 0x200
LENGTH = 20_000_000  # ns: longer than the program's start takes, even on a busy machine
LOOK = 10**9
INFO, SHARED = DATA + INFO_PAGE * 0x1000, DATA + SHARED_PAGE * 0x1000
COUNTER = DATA + 8
DEADLINE = DATA + 0x2000  # where SET_TIMER takes it from
ENOUGH = 8


def dword(value: int) -> str:
    return value.to_bytes(4, "little").hex()


SAVE, RESTORE = "57 56 52 50", "58 5a 5e 5f"  # push rdi, rsi, rdx, rax; pop them
IRET = "50 b8 17 00 00 00 0f 05"  # push rax; mov eax, iret; syscall
PROGRAM_ENTRY = "51 41 53" + SAVE + SET_TIMER + RESTORE + "41 5b 59" + SYSCALL_ENTRY[24:]


def callback(length: int, end: str = "") -> str:
    """Of the kernel's: count, take the event, set the timer `length` ns later, `end`, and return with all registers."""
    return (
        f"48 ff 04 25 {dword(COUNTER)}"
        f"c6 04 25 {dword(INFO)} 00"  # evtchn_upcall_pending
        f"48 c7 04 25 {dword(INFO + 8)} {dword(0)}"  # evtchn_pending_sel
        f"48 c7 04 25 {dword(SHARED + SHARED_EVTCHN_PENDING + 8)} {dword(0)}"
        f"48 81 04 25 {dword(DEADLINE)} {dword(length)}"
        + SAVE
        + SET_TIMER
        + RESTORE
        + end
        + "59 41 5b"  # pop rcx, r11
        + "6a 00 51 41 53"  # push 0 (no system call), rcx, r11
        + IRET
    )


# mov eax, 0x77; syscall; again: inc rbx; inc r8; cmp [COUNTER], ENOUGH; jb again; ud2
PROGRAM = f"b8 77 00 00 00 0f 05 48 ff c3 49 ff c0 48 83 3c 25 {dword(COUNTER)} {ENOUGH:02x} 72 ef 0f 0b"


class TickingGuest(Guest):
    """Its kernel sets the timer at its program's system call, and anew at each event."""

    def __init__(self, machine: Machine) -> None:
        super().__init__(machine)
        self.modes.event_callback, self.modes.timer_port = CALLBACK, PORT
        machine.write_code(PROGRAM_ENTRY, KERNEL - CODE)
        machine.write_code(callback(LENGTH), CALLBACK - CODE)
        set_timer(self, LOOK)

    def take_event(self) -> None:
        memory, modes = self.machine.memory, self.modes
        memory.b[modes.info] = memory.q[modes.info + 8 >> 3] = 0
        memory.q[modes.shared_info + SHARED_EVTCHN_PENDING + 8 >> 3] = 0

    def start_anew(self) -> None:
        """In guest-user mode, without events and ticks."""
        modes = self.modes
        self.take_event()
        self.machine.memory.b[modes.info + 1] = 0
        modes.kernel_mode, modes.kernel_sp, modes.other_gs_base, modes.ticks = False, KERNEL_SP, KERNEL_GS, 0
        modes.timers.clear()
        self.machine.set_word(0, 1)
        set_timer(self, LOOK)
        self.cpu.switch_mode(self.machine.l4, True)
        self.cpu.regs[RSP], self.cpu.regs[GS_BASE] = STACK_TOP, USER_GS

    @property
    def delivered(self) -> int:
        return self.machine.word(1)

    @property
    def pending(self) -> tuple[int, int, int, int]:
        """The event at all levels: upcall, mask, selector, and the word of the port's."""
        memory, info = self.machine.memory, self.modes.info
        word = memory.q[self.modes.shared_info + SHARED_EVTCHN_PENDING + 8 >> 3]
        return memory.b[info], memory.b[info + 1], memory.q[info + 8 >> 3], word

    def tick(self, code: str) -> list[int]:
        """Run the program, with ticks, until it traps."""
        self.machine.write_code(code)
        self.cpu.regs[RIP] = CODE
        self.start_ticks(LENGTH, LENGTH)
        return self.go()

    def start_ticks(self, first: int, length: int) -> None:
        """As the loop in C does, when everything is ready for the guest."""
        cpu, modes, shared = self.cpu, self.modes, self.cpu._shared
        cpu._enter_thread()
        modes.timer_look = shared.look = LOOK  # instead of an alarm
        self.fast_path.enter()
        word, bit = divmod(modes.timer_port, 64)
        for name, value in (
            ("ticks_left", fast_path_code.TICKS),
            ("tick_now", LOOK - 100_000 + first - length),
            ("tick_length", length),
            ("tick_entry", modes.event_callback),
            ("tick_word", cpu._pages.shared_va + SHARED_EVTCHN_PENDING + word * 8),
            ("tick_bit", 1 << bit),
            ("tick_selector", 1 << word),
        ):
            self.data[fast_path_code.FIELDS[name] // 8] = value
        shared.tick_length, shared.ticking = length, True
        cpu._pages.list[area.TICK_CR3] = modes.kernel_l4 << PAGE_SHIFT
        cpu.set_timer(first, length)

    @property
    def fast_path(self) -> FastPath:
        assert self.cpu._fast_path is not None
        return self.cpu._fast_path


@pytest.fixture
def guest(machine: Machine) -> Iterator[TickingGuest]:
    if not host_traits().ticks:
        pytest.skip("KVM's local timer brings no ticks on this host: " + host_traits().kind)
    yield TickingGuest(machine)


def ticks_alone(guest: TickingGuest, run: Callable[[], list[int]]) -> None:
    """Run the program to its UD2 with nothing but ticks: again if the kernel was too slow once, and one found it.

    On a busy machine that is nearly always so, where the host's tick, of some milliseconds, is the length.
    """
    for _ in range(100):
        guest.start_anew()
        if run() == [VECTOR_UD]:
            return
    pytest.fail("no program got its ticks without a trap")


def test_ticks_take_no_trap(guest: TickingGuest) -> None:
    regs = guest.cpu.regs
    regs[RBX] = regs[R8] = 0
    regs[RDI], regs[RSI], regs[RDX] = 0x1111, 0x2222, 0x3333
    ticks_alone(guest, lambda: guest.tick(PROGRAM))
    assert guest.delivered == guest.modes.ticks == ENOUGH
    assert regs[RBX] == regs[R8] > 0
    assert (regs[RDI], regs[RSI], regs[RDX], regs[RSP], regs[RAX]) == (0x1111, 0x2222, 0x3333, STACK_TOP, 0x77)
    assert (regs[GS_BASE], guest.modes.other_gs_base, guest.modes.kernel_mode) == (USER_GS, KERNEL_GS, False)
    assert guest.cpu.l4_mfn == guest.machine.l4
    assert guest.pending == (0, 0, 0, 0)
    assert guest.modes.timers == [LOOK + ENOUGH * LENGTH]  # the next one, which the hypervisor is told of


def test_the_kernel_finds_what_xen_would_have_left(guest: TickingGuest) -> None:
    guest.machine.write_code("0f 0b", CALLBACK - CODE)
    regs = guest.cpu.regs
    rsp = regs[RSP]
    guest.cpu.set_rflags(0x8D5)
    regs[R8] = 0x5555
    # syscall; mov ecx, 0x123; mov r11d, 0x456; std; jmp .
    assert guest.tick("0f 05 b9 23 01 00 00 41 bb 56 04 00 00 fd eb fe") == [VECTOR_UD]
    assert (regs[RIP], regs[RSP], regs[CS], regs[SS]) == (CALLBACK, KERNEL_SP - 56, *FLAT)
    frame = list(guest.machine.memory.q[(guest.machine.data[KERNEL_STACK_PAGE] + 1 << 9) - 7 :][:7])
    flags = 0x8D5 | EFLAGS_IF | 1 << 10 | 2
    assert frame == [0x123, 0x456, CODE + 14, FLAT[0], flags, rsp, FLAT[1]]
    assert (regs[RCX], regs[R11], regs[R8]) == (0x123, 0x456, 0x5555)
    assert (regs[GS_BASE], guest.modes.other_gs_base, guest.modes.kernel_mode) == (KERNEL_GS, USER_GS, True)
    assert guest.cpu.l4_mfn == guest.kernel_l4
    assert guest.pending == (1, 1, 1 << PORT // 64, 1 << PORT % 64)


REASONS = ["early", "no timer", "masked port", "pending port", "masked", "pending", "selectors", "trap flag", "count"]


@pytest.mark.parametrize("why", REASONS)
def test_a_tick_that_needs_more_goes_to_python(guest: TickingGuest, why: str) -> None:
    memory, modes, regs = guest.machine.memory, guest.modes, guest.cpu.regs
    end = ""
    if why == "early":
        set_timer(guest, LOOK + 10**9)
    elif why == "no timer":
        guest.machine.write_code(SYSCALL_ENTRY, KERNEL - CODE)
    elif why in ("masked port", "pending port"):
        levels = SHARED_EVTCHN_MASK if why == "masked port" else SHARED_EVTCHN_PENDING
        memory.q[modes.shared_info + levels + 8 >> 3] = 1 << PORT % 64
    elif why == "masked":
        end = f"c6 04 25 {dword(INFO + 1)} 01"  # by the program, which sees the same pages
    elif why == "pending":
        end = f"c6 04 25 {dword(INFO)} 01"
    elif why == "selectors":
        modes.flat_selectors = set()
        guest.machine.memory.b[modes.info] = 0
    elif why == "trap flag":
        end = "9c 81 0c 24 00 00 04 00 9d"  # AC
    program = "0f 05" + end + "b9 23 01 00 00 eb fe"
    guest.machine.write_code(program)
    regs[RIP] = CODE
    guest.start_ticks(LENGTH, LENGTH)
    if why == "count":
        guest.data[fast_path_code.FIELDS["ticks_left"] // 8] = 0
    before = regs[RSP]
    seen = guest.go()
    if why == "selectors":  # nor does the return from the system call take the fast path
        assert seen == [TRAP_SYSCALL]
        return
    assert seen == [TRAP_NOTHING]
    assert (regs[RIP], regs[RCX], regs[RSP]) == (CODE + len(bytes.fromhex(program)) - 2, 0x123, before)
    assert (regs[GS_BASE], modes.other_gs_base, modes.kernel_mode) == (USER_GS, KERNEL_GS, False)
    assert guest.delivered == modes.ticks - (fast_path_code.TICKS if why == "count" else 0) == 0
    assert modes.timers == ([] if why == "no timer" else [LOOK + 10**9] if why == "early" else [LOOK])


def test_a_tick_in_guest_kernel_mode_goes_to_python(guest: TickingGuest) -> None:
    guest.machine.write_code(SET_TIMER + "eb fe", KERNEL - CODE)
    assert guest.tick("0f 05") == [TRAP_NOTHING]
    assert (guest.cpu.regs[RIP], guest.modes.kernel_mode, guest.modes.timers) == (KERNEL + 19, True, [LOOK])


USER_CODE = [int(each.ip) for each in Decoder(64, fast_path_code.USER.code, ip=0)]


@pytest.mark.parametrize("at", [at for at in USER_CODE if at <= fast_path_code.USER.labels["gate"]])
@pytest.mark.parametrize("kicked", [False, True], ids=["tick", "kick on the way"])
def test_a_tick_between_the_system_call_and_the_gate_is_the_system_call(
    guest: TickingGuest, at: int, kicked: bool
) -> None:
    """The program must not be left within the engine's code: it may go on where that is not."""
    assert guest.run("0f 0b") == [VECTOR_UD]
    guest.cpu._pages.user_code[at : at + 2] = b"\xeb\xfe"
    if kicked:
        stop_at(guest, fast_path_code.AT["tick_saved"])
    guest.data[fast_path_code.FIELDS["timer"] // 8] = LOOK
    regs = guest.cpu.regs
    regs[RAX] = 0x1234
    before = regs[RSP]
    assert guest.tick("90 90 0f 05") == [TRAP_SYSCALL]
    assert (regs[RAX], regs[RIP], regs[RSP], regs[GS_BASE]) == (0x1234, CODE + 4, before, USER_GS)
    assert (guest.modes.kernel_mode, guest.mask) == (False, 0)


@pytest.mark.parametrize("at", [at for at in offsets("tick", "tick_end") if at < fast_path_code.AT["tick_slow"]])
def test_a_fault_anywhere_on_the_way_leaves_the_event_to_python(guest: TickingGuest, at: int) -> None:
    """The program goes on where it was; the event is pending already, or the timer is known to be due."""
    regs, modes = guest.cpu.regs, guest.modes
    assert guest.run("0f 0b") == [VECTOR_UD]
    stop_at(guest, at)
    before = regs[RSP]
    # syscall; mov ecx, 0x123; mov r11d, 0x456; std; jmp .
    assert guest.tick("0f 05 b9 23 01 00 00 41 bb 56 04 00 00 fd eb fe") == [TRAP_NOTHING]
    assert (regs[RIP], regs[RCX], regs[R11], regs[RSP]) == (CODE + 14, 0x123, 0x456, before)
    assert regs[RFLAGS] & 1 << 10
    assert (regs[GS_BASE], modes.other_gs_base, modes.kernel_mode) == (USER_GS, KERNEL_GS, False)
    assert guest.cpu.l4_mfn == guest.machine.l4
    upcall, mask, selector, word = guest.pending
    assert mask == 0
    assert modes.timers == [LOOK] or (upcall, selector, word) == (1, 1 << PORT // 64, 1 << PORT % 64)
    assert not word or (upcall and selector)  # or setting it again would do nothing


GATE = [int(each.ip) for each in Decoder(64, fast_path_code.GATE_TICK_CODE.code, ip=0)]


@pytest.mark.parametrize("at", [at for at in GATE if at < fast_path_code.GATE_TICK_CODE.labels["other"]])
def test_a_stop_anywhere_in_the_gate_is_one_before_it(guest: TickingGuest, at: int) -> None:
    assert guest.run("0f 0b") == [VECTOR_UD]
    regs, labels = guest.cpu.regs, fast_path_code.GATE_TICK_CODE.labels
    fast = guest.fast_path
    rax, interrupted, stub = 0x7777, CODE + 0x123, guest.code_va + fast_path_code.AT["tick"]
    exchanged, stored = at >= labels["exchanged"], at > labels["exchanged"]
    guest.cpu._pages.gate_frame[:] = (
        memoryview((ctypes.c_uint64 * 6)(rax, stub if exchanged else interrupted, 0x33, 0x246, STACK_TOP - 64, 0x2B))
        .cast("B")
        .cast("Q")
    )
    on_stack = labels["pushed"] <= at <= labels["stored"]
    regs[RAX] = rax if not on_stack else interrupted if at == labels["exchanged"] else 0x9999
    guest.data[fast_path_code.FIELDS["tick_rip"] // 8] = interrupted if stored else 0
    assert fast.finish_gate(fast_path_code.GATE_TICK_AT + at)
    assert guest.cpu._page.q[run_page.CR3] >> PAGE_SHIFT == guest.machine.l4
    assert (regs[RAX], regs[RIP], regs[RSP], regs[RFLAGS]) == (rax, interrupted, STACK_TOP - 64, 0x246)
    assert fast.timer_told


def test_kicks_at_any_moment_lose_and_repeat_nothing(guest: TickingGuest) -> None:
    regs, modes = guest.cpu.regs, guest.modes
    # again: inc rbx; inc r8; cmp [stop], 0; je again; ud2
    code = f"48 ff c3 49 ff c0 48 83 3c 25 {dword(DATA + 16)} 00 74 ef 0f 0b"
    guest.machine.write_code("0f 05" + code)
    regs[RIP] = CODE
    regs[RBX] = regs[R8] = 0
    regs[RCX] = 0x1234
    thread, done = kicking(guest.cpu, 0.0001)
    traps: list[int] = []
    stops = 0
    rng = random.Random(1)

    def on_trap(vector: int, _error_code: int, _address: int) -> bool:
        if vector == TRAP_SYSCALL:
            regs[RIP] -= 2  # let it make the call again, without an event in the way
        elif vector != TRAP_NOTHING:
            traps.append(vector)
        return False

    try:
        while not traps:
            if stops == 2000:
                guest.machine.set_word(1, 2)  # the program ends
            upcall, mask, _, word = guest.pending
            if word and not modes.kernel_mode:  # or the hypervisor would not deliver it
                assert upcall and not mask
            guest.take_event()
            modes.timers.clear()
            set_timer(guest, LOOK)
            fast = guest.fast_path
            guest.start_ticks(rng.randrange(10_000, 200_000), 200_000)
            guest.data[fast_path_code.FIELDS["timer"] // 8] = 1  # the guest set it before; it is due at once
            enter, fast.enter = fast.enter, lambda: None  # type: ignore[method-assign]
            guest.cpu.run(on_trap)
            fast.enter = enter  # type: ignore[method-assign]
            stops += 1
            kernel = modes.kernel_mode
            assert (regs[GS_BASE], modes.other_gs_base) == ((KERNEL_GS, USER_GS) if kernel else (USER_GS, KERNEL_GS))
            assert guest.cpu.l4_mfn == (guest.kernel_l4 if kernel else guest.machine.l4)
            assert (CODE <= regs[RIP] < KERNEL) != kernel
    finally:
        done.set()
        thread.join()
    assert traps == [VECTOR_UD]
    assert regs[RBX] == regs[R8]
    assert modes.ticks > 20


def test_a_program_cannot_raise_the_interrupt_itself(guest: TickingGuest) -> None:
    assert guest.run(f"cd {area.VECTOR_TICK:02x}") == [13]
    assert not guest.modes.kernel_mode


@pytest.mark.parametrize("pointer", [area.PER_CPU + area.CPU_DATA + 0x1000, area.IDT + 0x800], ids=["data", "IDT"])
def test_a_tick_at_cpl_0_writes_nothing_to_the_guests_stack(guest: TickingGuest, pointer: int) -> None:
    """As in the stub for SYSCALL by 32-bit code, which starts on the guest's RSP: that may point anywhere."""
    assert guest.run("0f 0b") == [VECTOR_UD]
    cpu, memory = guest.cpu, guest.machine.memory
    regs = cpu.regs
    offset = area.SYSCALL32_STUB - area.TRAP_STUBS
    stub = memory.page(int(guest.machine.engine.area._frames[0]))[offset : offset + 2]
    assert bytes(stub) == bytes((0xE6, area.PORT_SYSCALL32))
    stub[:] = b"\xeb\xfe"
    tables = {"user": guest.machine.l4, "kernel": guest.kernel_l4}
    mapped = [page_walk.read(memory, l4, pointer - 64, 64) for l4 in tables.values()]
    guest.start_ticks(LENGTH, LENGTH)
    cpu._segments.cs, cpu._segments.ss = CODE0, DATA0
    regs[RIP], regs[RSP] = area.SYSCALL32_STUB, pointer
    regs[RCX], regs[R11] = CODE + 0x40, EFLAGS_IF | 2
    seen: list[tuple[int, int, int]] = []

    def on_trap(vector: int, _error_code: int, _address: int) -> bool:
        seen.append((vector, regs[RIP], regs[RSP]))
        return False

    cpu.run(on_trap)
    assert seen == [(TRAP_SYSCALL, CODE + 0x40, pointer)]
    assert [page_walk.read(memory, l4, pointer - 64, 64) for l4 in tables.values()] == mapped


def test_a_tick_of_32_bit_code_does_not_reach_the_kernels_table(guest: TickingGuest) -> None:
    """IRETQ would go to the address of `tick`, cut to 32 bits, where a program could have code of its own."""
    assert guest.run("0f 0b") == [VECTOR_UD]
    regs, cs, ss = guest.cpu.regs, FLAT_RING3_CS32, FLAT_RING3_SS32
    guest.modes.flat_selectors.add((cs, ss))
    guest.cpu.set_code_stack(cs, ss)
    regs[RAX] = 0
    assert guest.tick("40 eb fd") == [TRAP_NOTHING]  # again: inc eax; jmp again
    assert (regs[RIP] in (CODE, CODE + 1), guest.modes.kernel_mode) == (True, False)
    assert guest.cpu.l4_mfn == guest.machine.l4
    assert regs[RAX] > 0


def test_the_local_apic_is_not_in_memory() -> None:
    """A store by 32-bit code, which KVM emulates, to where a PC has it, on a machine that has memory there."""
    if not host_traits().ticks:
        pytest.skip("no local APIC on this host: " + host_traits().kind)
    memory = MachineMemory(LOCAL_APIC_MFN + 16)
    try:
        assert LOCAL_APIC_MFN not in memory.allocate(memory.free_frames)
    finally:
        memory.close()
    machine = Machine(LOCAL_APIC_MFN + 4096)
    try:
        cpu = machine.cpu()
        machine.memory.q[machine.entry(DATA + 0x40_0000)] = LOCAL_APIC_MFN << PAGE_SHIFT | TABLE
        cpu.set_code_stack(FLAT_RING3_CS32, FLAT_RING3_SS32)
        cpu.regs[RDI], cpu.regs[RAX] = DATA + 0x40_0000, 0x44500  # INIT to itself
        before = bytearray(api.LAPIC_SIZE)
        ioctl(cpu._fd, api.KVM_GET_LAPIC, before)
        with suppress(EngineError):  # KVM may stop at an access of which it knows nothing
            machine.execute(cpu, "89 87 00 03 00 00 0f 0b")  # mov [edi + 0x300], eax; ud2
        after = bytearray(api.LAPIC_SIZE)
        ioctl(cpu._fd, api.KVM_GET_LAPIC, after)
        assert after == before
        sregs = bytearray(api.SREGS_SIZE)
        ioctl(cpu._fd, api.KVM_GET_SREGS, sregs)
        assert int.from_bytes(sregs[api.SREGS_CR0 :][:8], "little") >> 31 & 1  # not in real mode
    finally:
        machine.close()


def test_no_interrupt_is_left_when_ticks_end(guest: TickingGuest) -> None:
    """One that came while the vCPU was stopped, or was about to be delivered, would find no fast path."""
    ticks_alone(guest, lambda: guest.tick(PROGRAM))
    guest.modes.user_l4 = 0
    for _ in range(10):
        thread, done = kicking(guest.cpu, LENGTH * 2 / 1e9)
        guest.machine.write_code("eb fe")
        guest.cpu.regs[RIP] = CODE
        guest.cpu.run(lambda *trap: pytest.fail(f"trap {trap}"))
        done.set()
        thread.join()


def test_a_program_that_computes_gets_its_ticks_from_the_loop_in_c(guest: TickingGuest) -> None:
    library, length = native_run.library(), host_tick_ns()
    if library is None or not length:
        pytest.skip("no native code here, or the host's tick is not known")
    cpu = guest.cpu

    def first(vector: int, _error_code: int, _address: int) -> int:
        """The C code handles a first trap, and sets the alarm on the way back into the guest."""
        if vector != VECTOR_PF:
            return NOT_HANDLED
        cpu.regs[RIP] += 2
        cpu._shared.quiet, cpu._shared.look = 100, 0  # it has computed for long ...
        cpu._shared.syscalls = modes.untrapped_syscalls  # ... without a system call
        modes.timer_look = LOOK
        return GO_ON

    modes, python = NativeModes(first), guest.modes
    for name in ("kernel_l4", "user_l4", "info", "shared_info", "event_callback", "syscall_callback", "kernel_sp"):
        setattr(modes, name, getattr(python, name))
    modes.other_gs_base, modes.syscall_masks_events = KERNEL_GS, True
    modes.flat_pairs[0] = FLAT_RING3_CS64 << 16 | FLAT_RING3_SS64
    modes.virq_port[VIRQ_TIMER] = PORT
    modes.timer_interval = length
    now = NOW(lambda: LOOK - 100_000)
    modes.now = ctypes.cast(now, ctypes.c_void_p).value or 0

    guest.machine.write_code(callback(length), CALLBACK - CODE)
    seen: list[int] = []

    def run() -> list[int]:
        modes.kernel_mode, modes.kernel_sp, modes.other_gs_base = False, KERNEL_SP, KERNEL_GS
        modes.timer_look = modes.untrapped_ticks = 0
        cpu.attach(modes)
        guest.machine.write_code("8b 00" + PROGRAM)  # mov eax, [rax]
        cpu.regs[RAX], cpu.regs[RIP] = 0x7000_0000, CODE
        seen.clear()
        cpu.run(lambda vector, *_: seen.append(vector) is not None)  # type: ignore[func-returns-value]
        return seen

    ticks_alone(guest, run)
    assert guest.delivered == modes.untrapped_ticks == ENOUGH
