"""The fast path: what takes no trap, what becomes of interruptions and faults in it, what a guest can do with it."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
from iced_x86 import Decoder, Formatter, FormatterSyntax

from xenolith.abi.hypercalls import HYPERVISOR_iret
from xenolith.abi.layout import FLAT_RING3_CS64, FLAT_RING3_SS64
from xenolith.abi.x86 import (
    CS,
    FS_BASE,
    GS_BASE,
    PAGE_SHIFT,
    R8,
    R11,
    RAX,
    RBX,
    RCX,
    RDI,
    RIP,
    RSI,
    RSP,
    SS,
    VECTOR_GP,
    VECTOR_PF,
    VECTOR_UD,
)
from xenolith.machine.engines.kvm import area, fast_path_code
from xenolith.machine.engines.kvm.cpu import KvmCpu
from xenolith.machine.engines.kvm.host import host_traits
from xenolith.machine.engines.protocol import TRAP_NOTHING, TRAP_SYSCALL, EngineError
from xenolith.machine.listing import encodings

from .bare import CODE, DATA, STACK_TOP, Machine
from .test_kicks import kicking

KERNEL = CODE + 0x800  # the guest kernel's code
USER_GS, KERNEL_GS = DATA + 0x100, DATA + 0x200
FLAT = (FLAT_RING3_CS64, FLAT_RING3_SS64)
R12 = 12
INFO_PAGE, KERNEL_STACK_PAGE, SHARED_PAGE = 10, 11, 12
KERNEL_SP = DATA + (KERNEL_STACK_PAGE + 1) * 0x1000

# inc qword [counter]; pop rcx; pop r11; push VGCF_in_syscall; push rcx; push r11; push rax; mov eax, iret; syscall
SYSCALL_ENTRY = "48 ff 04 25 00 00 60 00 59 41 5b 68 00 01 00 00 51 41 53 50 b8 17 00 00 00 0f 05"


@dataclass
class Modes:
    kernel_l4: int
    user_l4: int
    info: int
    shared_info: int
    vcpu_id: int = 0
    event_callback: int = 0
    timer_port: int = 0
    ticks: int = 0  # delivered without a trap
    timer_look: int = 0
    timers: list[int] = field(default_factory=list)
    kernel_mode: bool = False
    kernel_sp: int = KERNEL_SP
    kernel_ss: int = 0
    other_gs_base: int = KERNEL_GS
    syscall_callback: int = KERNEL
    syscall_masks_events: bool = True
    nmi_masked: bool = False
    architectural_iopl: bool = False
    compatibility: bool = False
    flat_selectors: set[tuple[int, int]] = field(default_factory=lambda: {FLAT})

    syscalls: int = 0
    native_handler: int = 0
    native_budget: int = 0
    address: int = 0

    def count_syscalls(self, count: int) -> None:
        self.syscalls += count

    def count_ticks(self, count: int, length: int) -> None:
        self.ticks += count

    def set_timer_late(self, deadline: int) -> None:
        self.timers.append(deadline)

    def until(self, moment: int) -> int:
        return 10**9


class Guest:
    """A kernel that answers every system call of its program by returning; both see the same pages."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        memory, engine = machine.memory, machine.engine
        self.kernel_l4 = machine.frame()
        memory.page(self.kernel_l4)[:] = memory.page(machine.l4)
        memory.q[self.kernel_l4 << 9 | area.SLOT] = engine.area.kernel_l4_entry
        self.cpu: KvmCpu = machine.cpu()
        info, shared_info = (machine.data[page] << PAGE_SHIFT for page in (INFO_PAGE, SHARED_PAGE))
        self.modes = Modes(self.kernel_l4, machine.l4, info, shared_info)
        self.cpu.attach(self.modes)
        self.cpu.regs[CS], self.cpu.regs[SS] = FLAT
        self.cpu.regs[GS_BASE] = USER_GS
        machine.write_code(SYSCALL_ENTRY, KERNEL - CODE)

    @property
    def code_va(self) -> int:
        return area.PER_CPU + area.CPU_CODE

    @property
    def data(self) -> memoryview:
        return self.cpu._pages.data

    @property
    def mask(self) -> int:
        return self.machine.memory.b[self.modes.info + 1]

    def run(self, code: str, **registers: int) -> list[int]:
        """Run the program until it traps: the vectors of all traps on the way; system calls return 0 at once."""
        self.machine.write_code(code)
        self.cpu.regs[RIP] = CODE
        return self.go()

    def go(self) -> list[int]:
        vectors: list[int] = []

        def on_trap(vector: int, _error_code: int, _address: int) -> bool:
            vectors.append(vector)
            return False

        while not vectors:
            self.cpu.run(on_trap)
        return vectors


@pytest.fixture
def guest(machine: Machine) -> Iterator[Guest]:
    if not host_traits().has_fast_path:
        pytest.skip("no fast path on this host: " + host_traits().kind)
    yield Guest(machine)


LOOP = "41 bc {count} 48 c7 c0 77 00 00 00 0f 05 41 ff cc 75 f2 0f 0b"  # r12 times: mov rax, 0x77; syscall; then ud2


def loop(count: int) -> str:
    return LOOP.format(count=count.to_bytes(4, "little").hex())


@pytest.mark.parametrize("name", ["USER_CODE", "KERNEL_CODE", "GATE_IN", "GATE_OUT", "GATE_TICK"])
def test_the_listings_say_what_they_encode(name: str) -> None:
    codes = {
        "USER_CODE": fast_path_code.USER,
        "KERNEL_CODE": fast_path_code.kernel_code(0),
        "GATE_IN": fast_path_code.GATE_IN_CODE,
        "GATE_OUT": fast_path_code.GATE_OUT_CODE,
        "GATE_TICK": fast_path_code.GATE_TICK_CODE,
    }
    listing = [text for _, text in encodings(getattr(fast_path_code, name)) if text]
    formatter = Formatter(FormatterSyntax.NASM)
    instructions = list(Decoder(64, codes[name].code, ip=0))
    assert sum(instruction.len for instruction in instructions) == len(codes[name].code)
    mnemonics = [formatter.format_mnemonic(instruction) for instruction in instructions]
    texts = [text.replace("lock ", "lock_").split()[0].replace("_", " ") for text in listing]
    assert [each for each in mnemonics if each != "nop"] == [each for each in texts if each != "nop"]


def test_a_system_call_and_its_return_take_no_trap(guest: Guest) -> None:
    regs = guest.cpu.regs
    regs[RBX], regs[R8], rsp = 0x1111_2222_3333_4444, 0x5555_6666_7777_8888, regs[RSP]
    assert guest.run(loop(1000)) == [VECTOR_UD]
    assert guest.machine.word() == guest.modes.syscalls == 1000
    assert (regs[RBX], regs[R8], regs[RSP], regs[RAX]) == (0x1111_2222_3333_4444, 0x5555_6666_7777_8888, rsp, 0x77)
    assert (regs[RCX], regs[GS_BASE], guest.modes.other_gs_base) == (CODE + 15, USER_GS, KERNEL_GS)
    assert not guest.modes.kernel_mode
    assert guest.cpu.l4_mfn == guest.machine.l4
    assert guest.mask == 0


def test_the_kernel_finds_what_xen_would_have_left(guest: Guest) -> None:
    guest.machine.write_code("0f 0b", KERNEL - CODE)
    guest.cpu.set_rflags(0x8D5)
    regs = guest.cpu.regs
    rsp = regs[RSP]
    assert guest.run("0f 05") == [VECTOR_UD]
    flags = 0xAD7
    assert (regs[RIP], regs[RSP], regs[CS], regs[SS]) == (KERNEL, KERNEL_SP - 56, *FLAT)
    frame = list(guest.machine.memory.q[(guest.machine.data[KERNEL_STACK_PAGE] + 1 << 9) - 7 :][:7])
    assert frame == [CODE + 2, flags, CODE + 2, FLAT[0], flags, rsp, FLAT[1]]
    assert (regs[RCX], regs[R11], regs[GS_BASE], guest.modes.other_gs_base) == (CODE + 2, flags, KERNEL_GS, USER_GS)
    assert guest.modes.kernel_mode
    assert guest.cpu.l4_mfn == guest.kernel_l4
    assert guest.mask == 1


@pytest.mark.parametrize("flag", [1 << 8, 1 << 18], ids=["TF", "AC"])
def test_a_system_call_with_unusual_flags_goes_to_python(guest: Guest, flag: int) -> None:
    guest.cpu.set_rflags(flag)
    assert guest.run("0f 05") in ([TRAP_SYSCALL], [1])
    assert not guest.modes.kernel_mode


@pytest.mark.parametrize(
    ("condition", "why"),
    [("pending", "an event"), ("nmi", "an NMI"), ("selectors", "other selectors"), ("flags", "no interrupts")],
)
def test_an_iret_that_needs_more_goes_to_python(guest: Guest, condition: str, why: str) -> None:
    entry = SYSCALL_ENTRY
    if condition == "pending":
        guest.machine.memory.b[guest.modes.info] = 1
    elif condition == "nmi":
        guest.modes.nmi_masked = True
    elif condition == "selectors":
        entry = "66 c7 44 24 18 23 00" + entry  # mov word [rsp + 24], 0x23
    else:
        entry = "48 81 64 24 20 ff fd ff ff" + entry  # and qword [rsp + 32], ~IF
    guest.machine.write_code(entry, KERNEL - CODE)
    assert guest.run("0f 05") == [TRAP_SYSCALL]
    assert guest.cpu.regs[RAX] == HYPERVISOR_iret
    assert guest.modes.kernel_mode
    assert guest.cpu.regs[RSP] == KERNEL_SP - 56 + 16 - 32


def test_hypercalls_about_the_vcpu_take_no_trap(guest: Guest) -> None:
    # stack_switch(0x2b, rsi), set_segment_base(FS, DATA), set_segment_base(GS_USER, DATA + 8), ud2
    guest.machine.write_code(
        "bf 2b 00 00 00 be 00 10 60 00 b8 03 00 00 00 0f 05 48 89 c3"
        "bf 00 00 00 00 be 00 00 60 00 b8 19 00 00 00 0f 05 48 09 c3"
        "bf 01 00 00 00 be 08 00 60 00 b8 19 00 00 00 0f 05 48 09 c3 0f 0b",
        KERNEL - CODE,
    )
    assert guest.run("0f 05") == [VECTOR_UD]
    assert (guest.modes.kernel_ss, guest.modes.kernel_sp) == (0x2B, DATA + 0x1000)
    assert (guest.cpu.regs[FS_BASE], guest.modes.other_gs_base) == (DATA, DATA + 8)
    assert guest.cpu.regs[RBX] == 0


@pytest.mark.parametrize("which", [0, 1])
def test_a_segment_base_that_is_no_address_goes_to_python(guest: Guest, which: int) -> None:
    guest.machine.write_code("b8 19 00 00 00 0f 05", KERNEL - CODE)
    guest.cpu.regs[RDI], guest.cpu.regs[RSI] = which, 1 << 63
    assert guest.run("0f 05") == [TRAP_SYSCALL]
    assert (guest.cpu.regs[RAX], guest.cpu.regs[RSI], guest.modes.kernel_mode) == (25, 1 << 63, True)
    assert guest.cpu.regs[RIP] == KERNEL + 7


SET_TIMER = (
    "bf 08 00 00 00 31 f6 ba 00 20 60 00 b8 18 00 00 00 0f 05"  # vcpu_op(set_singleshot_timer, 0, DATA + 0x2000)
)


def set_timer(guest: Guest, deadline: int, flags: int = 0) -> None:
    guest.machine.set_word(deadline, 0, 2)
    guest.machine.set_word(flags, 1, 2)


def test_a_timer_that_the_hypervisor_looks_for_anyway_takes_no_trap(guest: Guest) -> None:
    guest.machine.write_code(SET_TIMER + "0f 0b", KERNEL - CODE)
    guest.modes.timer_look = 1000 + fast_path_code.TIMER_SLOP
    set_timer(guest, 1000)
    guest.cpu.regs[RBX] = 0x77
    assert guest.run("0f 05") == [VECTOR_UD]
    assert guest.modes.timers == [1000]
    assert (guest.cpu.regs[RAX], guest.cpu.regs[RCX]) == (0, KERNEL + 19)


@pytest.mark.parametrize("why", ["earlier", "nobody looks", "flags", "another vCPU", "another command", "no memory"])
def test_any_other_timer_goes_to_python(guest: Guest, why: str) -> None:
    code = SET_TIMER
    guest.modes.timer_look = 0 if why == "nobody looks" else 1000 + fast_path_code.TIMER_SLOP
    set_timer(guest, 999 if why == "earlier" else 2000, flags=why == "flags")
    if why == "another vCPU":
        guest.modes.vcpu_id = 1
    elif why == "another command":
        code = code.replace("bf 08", "bf 09")
    elif why == "no memory":
        code = code.replace("ba 00 20 60", "ba 00 20 99")
    guest.machine.write_code(code + "0f 0b", KERNEL - CODE)
    assert guest.run("0f 05") == [TRAP_SYSCALL]
    regs = guest.cpu.regs
    assert (regs[RAX], regs[RCX], regs[RIP]) == (24, KERNEL + 19, KERNEL + 19)
    assert guest.modes.timers == []


def test_an_alarm_before_the_guest_has_set_its_timer_makes_that_go_to_python(guest: Guest) -> None:
    """On a busy machine: nobody would look for the timer any more."""
    guest.machine.write_code(SET_TIMER + "0f 0b", KERNEL - CODE)
    guest.modes.timer_look = 1000 + fast_path_code.TIMER_SLOP
    set_timer(guest, 1000)
    times = iter((1, -1))
    guest.modes.until = lambda _moment: next(times)  # type: ignore[method-assign]
    # mov ecx, 50000000; again: dec ecx; jnz again; syscall
    assert guest.run("b9 80 f0 fa 02 ff c9 75 fc 0f 05") == [TRAP_SYSCALL]
    assert (guest.cpu.regs[RAX], guest.modes.timer_look, guest.modes.timers) == (24, 0, [])


def offsets(first: str, last: str) -> list[int]:
    code = fast_path_code.kernel_code(0)
    starts = [int(each.ip) for each in Decoder(64, code.code, ip=0)]
    return [at for at in starts if code.labels[first] <= at < code.labels[last]]


def stop_at(guest: Guest, at: int) -> None:
    """Let the fast path fault at this instruction."""
    guest.cpu._pages.kernel_code[at : at + 2] = b"\x0f\x0b"


@pytest.mark.parametrize("at", offsets("landing", "landing_slow"))
def test_a_fault_anywhere_in_the_entry_becomes_the_system_call(guest: Guest, at: int) -> None:
    regs = guest.cpu.regs
    assert guest.run("0f 0b") == [VECTOR_UD]  # turns it on
    stop_at(guest, at)
    before = (regs[RSP], regs[RBX], regs[GS_BASE], guest.modes.other_gs_base)
    regs[RAX] = 0x1234
    assert guest.run("0f 05") == [TRAP_SYSCALL]
    assert not guest.modes.kernel_mode
    assert guest.cpu.l4_mfn == guest.machine.l4
    assert (regs[RAX], regs[RIP]) == (0x1234, CODE + 2)
    assert (regs[RSP], regs[RBX], regs[GS_BASE], guest.modes.other_gs_base) == before
    assert guest.mask == 0


@pytest.mark.parametrize("at", offsets("stack_switch", "back"))
def test_a_fault_anywhere_in_stack_switch_becomes_the_hypercall(guest: Guest, at: int) -> None:
    guest.machine.write_code("b8 03 00 00 00 0f 05 0f 0b", KERNEL - CODE)
    assert guest.run("0f 0b") == [VECTOR_UD]
    stop_at(guest, at)
    assert guest.run("0f 05") == [TRAP_SYSCALL]
    regs = guest.cpu.regs
    assert guest.modes.kernel_mode
    assert (regs[RAX], regs[RSP], regs[RIP]) == (3, KERNEL_SP - 56, KERNEL + 7)


@pytest.mark.parametrize(("which", "first", "last"), [(0, "fs_base", "vcpu_op"), (1, "gs_check", "fs_base")])
def test_a_fault_anywhere_in_set_segment_base_becomes_the_hypercall(
    guest: Guest, which: int, first: str, last: str
) -> None:
    guest.machine.write_code("b8 19 00 00 00 0f 05 0f 0b", KERNEL - CODE)
    for at in offsets(first, last):
        assert guest.run("0f 0b") == [VECTOR_UD]
        before = bytes(guest.cpu._pages.kernel_code[at : at + 2])
        stop_at(guest, at)
        guest.cpu.regs[RDI], guest.cpu.regs[RSI] = which, DATA
        assert guest.run("0f 05") == [TRAP_SYSCALL]
        regs = guest.cpu.regs
        assert (regs[RAX], regs[RSP], regs[RIP]) == (25, KERNEL_SP - 56, KERNEL + 7)
        guest.cpu._pages.kernel_code[at : at + 2] = before
        guest.modes.kernel_mode = False
        guest.modes.other_gs_base, regs[GS_BASE], regs[RSP] = KERNEL_GS, USER_GS, STACK_TOP
        guest.machine.memory.b[guest.modes.info + 1] = 0
        guest.cpu.switch_mode(guest.machine.l4, True)


@pytest.mark.parametrize("at", offsets("vcpu_op", "timer_slow"))
def test_a_fault_anywhere_in_a_timer_becomes_the_hypercall(guest: Guest, at: int) -> None:
    guest.machine.write_code(SET_TIMER + "0f 0b", KERNEL - CODE)
    guest.modes.timer_look = 1000 + fast_path_code.TIMER_SLOP
    set_timer(guest, 1000)
    assert guest.run("0f 0b") == [VECTOR_UD]
    stop_at(guest, at)
    assert guest.run("0f 05") == [TRAP_SYSCALL]
    regs = guest.cpu.regs
    assert (regs[RAX], regs[RSP], regs[RIP]) == (24, KERNEL_SP - 56, KERNEL + 19)


@pytest.mark.parametrize("at", [at for at in offsets("iret", "iret_slow") if at < fast_path_code.AT["gate"]])
def test_a_fault_anywhere_in_an_iret_becomes_the_hypercall(guest: Guest, at: int) -> None:
    assert guest.run("0f 0b") == [VECTOR_UD]
    stop_at(guest, at)
    in_syscall = fast_path_code.AT["from_syscall"]
    if fast_path_code.AT["iret_stored"] < at < in_syscall and at >= in_syscall - 12:
        guest.machine.write_code(SYSCALL_ENTRY.replace("68 00 01", "68 00 00"), KERNEL - CODE)
    assert guest.run("0f 05") == [TRAP_SYSCALL]
    regs = guest.cpu.regs
    assert guest.modes.kernel_mode
    assert (regs[RAX], regs[RSP]) == (HYPERVISOR_iret, KERNEL_SP - 72)
    assert (regs[GS_BASE], guest.modes.other_gs_base) == (KERNEL_GS, USER_GS)
    assert regs[RIP] == KERNEL + 27


def test_an_entry_onto_a_stack_that_is_not_there_becomes_the_system_call(guest: Guest) -> None:
    guest.modes.kernel_sp = 0x1234_5000
    assert guest.run("0f 05") == [TRAP_SYSCALL]
    assert not guest.modes.kernel_mode


HYPERCALLS = (
    "48 ff 04 25 00 00 60 00 51 41 53"  # inc qword [counter]; push rcx; push r11
    "57 56 52 50 be 00 c0 60 00 b8 03 00 00 00 0f 05"  # push rdi, rsi, rdx, rax; stack_switch(_, KERNEL_SP)
    "bf 01 00 00 00 be 00 01 60 00 b8 19 00 00 00 0f 05"  # set_segment_base(GS_USER, USER_GS)
    + SET_TIMER
    + "58 5a 5e 5f 41 5b 59"  # pop rax, rdx, rsi, rdi, r11, rcx
    + SYSCALL_ENTRY[24:]  # behind the counter
)


@pytest.mark.parametrize("entry", [SYSCALL_ENTRY, HYPERCALLS], ids=["system calls", "hypercalls"])
def test_kicks_at_any_moment_lose_and_repeat_nothing(guest: Guest, entry: str) -> None:
    rounds = 20_000
    guest.machine.write_code(entry, KERNEL - CODE)
    guest.modes.timer_look = 1000 + fast_path_code.TIMER_SLOP
    set_timer(guest, 1234)
    regs = guest.cpu.regs
    regs[RBX] = regs[R8] = 0
    # again: inc rbx; syscall; inc r8; dec r12; jnz again; ud2
    guest.machine.write_code("48 ff c3 0f 05 49 ff c0 49 ff cc 75 f3 0f 0b")
    regs[RIP], regs[R12] = CODE, rounds
    thread, done = kicking(guest.cpu, 0.0001)
    traps: list[int] = []
    returns = 0

    def on_trap(vector: int, _error_code: int, _address: int) -> bool:
        if vector != TRAP_NOTHING:
            traps.append(vector)
        return False

    try:
        while not traps:
            guest.cpu.run(on_trap)
            returns += 1
            kernel = guest.modes.kernel_mode
            assert (regs[GS_BASE], guest.modes.other_gs_base) == (
                (KERNEL_GS, USER_GS) if kernel else (USER_GS, KERNEL_GS)
            )
            assert guest.cpu.l4_mfn == (guest.kernel_l4 if kernel else guest.machine.l4)
            assert (CODE <= regs[RIP] < KERNEL) != kernel
    finally:
        done.set()
        thread.join()
    assert traps == [VECTOR_UD]
    assert (regs[RBX], regs[R8], guest.machine.word()) == (rounds, rounds, rounds)
    assert returns > 100


# --- hostile guests ----------------------------------------------------------------------------------------


def test_a_program_cannot_reach_the_data(guest: Guest) -> None:
    for page in (area.CPU_DATA, area.CPU_INFO, area.CPU_LIST, area.CPU_STACK):
        for code in ("48 8b 07", "48 89 07"):
            guest.cpu.regs[RDI] = area.PER_CPU + page
            assert guest.run(code) == [VECTOR_PF]
            assert guest.cpu.regs[RIP] == CODE
    guest.cpu.regs[RDI] = guest.code_va
    assert guest.run("48 89 07") == [VECTOR_PF]


def test_a_program_that_jumps_into_the_gate_makes_a_system_call(guest: Guest) -> None:
    guest.machine.write_code("0f 0b", KERNEL - CODE)
    guest.run("0f 0b")
    regs = guest.cpu.regs
    regs[RDI], regs[R11], regs[RCX] = guest.code_va + fast_path_code.USER.labels["gate"], (1 << 64) - 1, 0x1234
    assert guest.run("ff e7") == [VECTOR_UD]
    assert (regs[RIP], guest.modes.kernel_mode, regs[GS_BASE]) == (KERNEL, True, KERNEL_GS)
    saved = guest.machine.memory.q[(guest.machine.data[KERNEL_STACK_PAGE] + 1 << 9) - 3]
    assert saved == 0x20_0ED7  # no I/O privilege, no trap flag, interrupts on


def test_another_vcpus_gate_is_an_int3(guest: Guest) -> None:
    other = guest.machine.engine.cpu(1)
    assert other is not guest.cpu
    gate = guest.code_va + area.PER_CPU_SIZE + fast_path_code.USER.labels["gate"]
    guest.cpu.regs[RDI] = gate
    assert guest.run("ff e7") == [3]
    assert (guest.cpu.regs[RIP], guest.modes.kernel_mode) == (gate + 1, False)


def test_gates_are_closed_while_the_fast_path_is_off(guest: Guest) -> None:
    guest.run("0f 0b")
    for change in ("syscall_callback", "user_l4", "syscall_masks_events"):
        before = getattr(guest.modes, change)
        setattr(guest.modes, change, 0)
        guest.cpu.regs[RDI] = guest.code_va + fast_path_code.USER.labels["gate"]
        assert guest.run("ff e7") == [TRAP_SYSCALL]
        assert guest.run("0f 05") == [TRAP_SYSCALL]
        assert not guest.modes.kernel_mode
        setattr(guest.modes, change, before)
    assert guest.run(loop(3)) == [VECTOR_UD]


def test_a_table_for_both_modes_turns_it_off(guest: Guest) -> None:
    guest.modes.user_l4 = guest.modes.kernel_l4 = guest.machine.l4
    assert guest.run("0f 05") == [TRAP_SYSCALL]


def test_an_int3_of_the_guests_own_is_one(guest: Guest) -> None:
    guest.run("0f 0b")
    assert guest.run("cc") == [3]
    assert (guest.cpu.regs[RIP], guest.modes.kernel_mode) == (CODE + 1, False)


@pytest.mark.parametrize("seed", range(8))
def test_a_kernel_that_writes_nonsense_to_the_data_harms_itself_alone(guest: Guest, seed: int) -> None:
    """Its own code writes random values over the data, jumps about in the fast path, and makes system calls."""
    rng = random.Random(seed)
    interesting = (0, 1, 1 << 63, (1 << 64) - 1, 0xFFFF_8000_0000_0000, 0x8000_0000_0000, DATA, CODE, area.AREA)
    tables = {guest.kernel_l4, guest.machine.l4}
    # mov [rdi], rsi; jmp rbx
    guest.machine.write_code("48 89 37 ff e3", KERNEL - CODE)
    guest.machine.write_code("0f 05 0f 0b")
    regs = guest.cpu.regs
    deadline = time.monotonic() + 60
    for _ in range(300):
        assert time.monotonic() < deadline
        regs[RIP] = CODE
        guest.modes.kernel_mode = False
        guest.modes.kernel_sp, guest.modes.other_gs_base = KERNEL_SP, KERNEL_GS
        guest.cpu.switch_mode(guest.machine.l4, True)
        regs[RDI] = guest.code_va + 0x1000 + rng.choice(list(fast_path_code.FIELDS.values()))
        regs[RSI] = rng.choice((*interesting, rng.getrandbits(64)))
        regs[RBX] = guest.code_va + rng.randrange(fast_path_code.AT["iret_end"])
        regs[RSP], regs[RCX] = rng.choice((STACK_TOP, 0, 1 << 63)), rng.choice(interesting)
        for register in (RAX, R8, R11):
            regs[register] = rng.choice((*interesting, 3, 23, 25))
        regs[GS_BASE] = USER_GS
        thread, done = kicking(guest.cpu, 0.005)
        stopped: list[int] = []

        def on_trap(vector: int, _error_code: int, _address: int, stopped: list[int] = stopped) -> bool:
            stopped.append(vector)
            return False

        guest.cpu.run(on_trap)
        done.set()
        thread.join()
        assert guest.cpu.l4_mfn in tables
        assert guest.modes.kernel_mode == (guest.cpu.l4_mfn == guest.kernel_l4)
    regs[RIP], regs[RSP], regs[GS_BASE] = CODE, STACK_TOP, USER_GS
    guest.modes.kernel_mode = False
    guest.cpu.switch_mode(guest.machine.l4, True)
    guest.machine.write_code(SYSCALL_ENTRY, KERNEL - CODE)
    regs[RBX] = 0
    assert guest.run("48 ff c3 0f 0b") == [VECTOR_UD]
    assert regs[RBX] == 1


def test_it_can_be_turned_off(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XENOLITH_FAST_PATH", "off")
    other = Machine()
    try:
        assert not other.engine.area.has_views
        assert other.execute(other.cpu(), "0f 05")[0] == TRAP_SYSCALL
    except EngineError:
        pytest.fail("the engine without a fast path does not work")
    finally:
        other.close()


def test_a_non_canonical_way_back_is_a_fault_in_the_guest(guest: Guest) -> None:
    """A guest kernel that puts an impossible RIP where the gate takes it from, and jumps to the gate."""
    guest.run("0f 0b")
    rip = area.PER_CPU + area.CPU_DATA + fast_path_code.FIELDS["rip"]
    gate = guest.code_va + fast_path_code.AT["gate"]
    guest.machine.write_code("48 89 37 ff e3", KERNEL - CODE)
    guest.cpu.regs[RDI], guest.cpu.regs[RSI], guest.cpu.regs[RBX] = rip, 1 << 63, gate
    assert guest.run("0f 05") == [VECTOR_GP]
