"""What every engine must do: ring-3 code executes exactly, and every trap says the truth."""

from __future__ import annotations

import random
import sys
import threading
from collections.abc import Iterator

import numpy as np
import pytest
from bare import (
    ACCESS,
    BASED,
    CODE,
    CODE32,
    CODE64,
    DATA,
    DATA32,
    GDT,
    NOT_PRESENT,
    RING0,
    STACK_TOP,
    UNMAPPED,
    BareMachine,
    Trap,
    run_to_trap,
    run_traps,
)

from xenolith.abi.x86 import (
    CS,
    DS,
    EFLAGS_DF,
    EFLAGS_STATUS,
    EFLAGS_TF,
    ES,
    FS,
    FS_BASE,
    GS,
    GS_BASE,
    PTE_A,
    PTE_D,
    PTE_NX,
    PTE_P,
    PTE_US,
    R8,
    R15,
    RAX,
    RBX,
    RCX,
    RDI,
    RDX,
    RIP,
    RSI,
    RSP,
    SS,
    VECTOR_BP,
    VECTOR_DB,
    VECTOR_DE,
    VECTOR_GP,
    VECTOR_MF,
    VECTOR_NM,
    VECTOR_PF,
    VECTOR_UD,
)
from xenolith.dom0.power import SWITCH_SECONDS
from xenolith.machine.engines.protocol import TRAP_SYSCALL, CpuState
from xenolith.machine.engines.select import choose

SYSCALL = "0f 05"
LOOP = "eb fe"  # jmp to itself
NON_CANONICAL = 0x8000_0000_0000_0000


# --- registers, flags -------------------------------------------------------------------------------


def test_every_general_register_goes_in_and_comes_out(bare: BareMachine) -> None:
    cpu = bare.start(" ".join(["48 ff c0", "48 ff c3", "49 ff c0", "49 ff c7"]) + SYSCALL)  # inc rax, rbx, r8, r15
    for index in range(R15 + 1):
        if index != RSP:
            cpu.regs[index] = 0x1234_5678_9ABC_0000 + index
    assert run_to_trap(cpu) == (TRAP_SYSCALL, 0, 0)
    for index in range(R15 + 1):
        if index not in (RSP, RCX, 11):  # which SYSCALL itself may change
            incremented = index in (RAX, RBX, R8, R15)
            assert cpu.regs[index] == 0x1234_5678_9ABC_0000 + index + incremented


def test_flags_go_in_and_come_out(bare: BareMachine) -> None:
    cpu = bare.start("9c 58" + SYSCALL)  # pushf; pop rax
    for flags in (0, EFLAGS_STATUS, EFLAGS_STATUS | EFLAGS_DF):
        cpu.regs[RIP] = CODE
        cpu.set_rflags(flags | 0x202)
        run_to_trap(cpu)
        assert cpu.regs[RAX] & (EFLAGS_STATUS | EFLAGS_DF) == flags
        assert cpu.get_rflags() & (EFLAGS_STATUS | EFLAGS_DF) == flags


def test_flags_that_an_instruction_computed_are_seen_in_the_handler(bare: BareMachine) -> None:
    cpu = bare.start("31 c0" + "cc" + "48 ff c8" + "cc")  # xor eax, eax; int3; dec rax; int3
    found: list[int] = []
    run_traps(cpu, 2, lambda trap: found.append(cpu.get_rflags() & EFLAGS_STATUS))
    assert found == [0x44, 0x94]  # ZF PF; SF PF AF


def test_flags_set_in_the_handler_are_the_guests(bare: BareMachine) -> None:
    cpu = bare.start("31 c0 cc 0f 92 c3" + SYSCALL)  # xor eax, eax (clears CF); int3; setc bl
    traps = run_traps(cpu, 2, lambda trap: cpu.set_rflags(0x203))
    assert [vector for vector, _, _ in traps] == [VECTOR_BP, TRAP_SYSCALL]
    assert cpu.regs[RBX] & 0xFF == 1


def test_popf_never_gives_io_privilege_or_turns_interrupts_off(bare: BareMachine) -> None:
    cpu = bare.start("68 00 30 00 00 9d 9c 58" + SYSCALL)  # push 0x3000; popf; pushf; pop rax
    run_to_trap(cpu)
    assert cpu.regs[RAX] & 0x3200 == 0x200


# --- traps ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "vector", "error_code", "rip"),
    [
        pytest.param("0f 05", TRAP_SYSCALL, 0, 2, id="syscall"),
        pytest.param("cc", VECTOR_BP, 0, 1, id="int3"),
        pytest.param("0f 0b", VECTOR_UD, 0, 0, id="ud2"),
        pytest.param("06", VECTOR_UD, 0, 0, id="push es, which is no 64-bit instruction"),
        pytest.param("31 d2 31 c9 f7 f1", VECTOR_DE, 0, 4, id="division by zero"),
        pytest.param("cd 80", VECTOR_GP, 0x402, 0, id="int 0x80"),
        pytest.param("cd 0e", VECTOR_GP, 0x72, 0, id="int 14 is no page fault"),
        pytest.param("cd 06", VECTOR_GP, 0x32, 0, id="int 6 is no undefined opcode"),
        pytest.param("f4", VECTOR_GP, 0, 0, id="hlt"),
        pytest.param("fa", VECTOR_GP, 0, 0, id="cli"),
        pytest.param("fb", VECTOR_GP, 0, 0, id="sti"),
        pytest.param("e4 71", VECTOR_GP, 0, 0, id="in"),
        pytest.param("e6 71", VECTOR_GP, 0, 0, id="out"),
        pytest.param("0f 30", VECTOR_GP, 0, 0, id="wrmsr"),
        pytest.param("0f 32", VECTOR_GP, 0, 0, id="rdmsr"),
        pytest.param("0f 33", VECTOR_GP, 0, 0, id="rdpmc"),
        pytest.param("0f 20 d8", VECTOR_GP, 0, 0, id="mov rax, cr3"),
        pytest.param("0f 22 d8", VECTOR_GP, 0, 0, id="mov cr3, rax"),
        pytest.param("0f 23 f8", VECTOR_GP, 0, 0, id="mov dr7, rax"),
        pytest.param("0f 01 f8", VECTOR_GP, 0, 0, id="swapgs"),
        pytest.param("0f 01 38", VECTOR_GP, 0, 0, id="invlpg"),
        pytest.param("0f 01 d1", VECTOR_GP, 0, 0, id="xsetbv"),
        pytest.param("0f 09", VECTOR_GP, 0, 0, id="wbinvd"),
        pytest.param("0f 00 d8", VECTOR_GP, 0, 0, id="ltr"),
        pytest.param("48 0f 07", VECTOR_GP, 0, 0, id="sysret"),
    ],
)
def test_a_trap_says_what_happened_and_where(
    bare: BareMachine, code: str, vector: int, error_code: int, rip: int
) -> None:
    assert bare.first_trap(code) == ((vector, error_code, 0), rip)


@pytest.mark.parametrize(
    ("code", "error_code", "address"),
    [
        pytest.param("8b 04 25 00 00 50 00", 4, UNMAPPED, id="read"),
        pytest.param("89 04 25 00 00 50 00", 6, UNMAPPED, id="write"),
        pytest.param("89 04 25 00 00 52 00", 7, 0x52_0000, id="write to a read-only page"),
        pytest.param("8b 04 25 ff 0f 60 00", 4, DATA + 0x1000, id="read over the page's end"),
        pytest.param("8b 04 25 00 00 54 00", 5, 0x54_0000, id="read of a supervisor page"),
        pytest.param("68 00 00 50 00 c3", 0x14, UNMAPPED, id="fetch"),
        pytest.param("68 00 00 56 00 c3", 0x15, 0x56_0000, id="fetch from a page without execution right"),
    ],
)
def test_a_page_fault_tells_address_and_kind_of_access(
    bare: BareMachine, code: str, error_code: int, address: int
) -> None:
    bare.map_new(0x52_0000, flags=PTE_P | PTE_US)
    bare.map_new(0x54_0000, flags=PTE_P)
    bare.map_new(0x56_0000, flags=ACCESS | PTE_NX)
    trap, rip = bare.first_trap(code)
    assert trap == (VECTOR_PF, error_code, address)
    assert rip == (address - CODE if error_code & 16 else 0)


def test_one_page_fault_after_another_stays_a_page_fault(bare: BareMachine) -> None:
    cpu = bare.start("8b 04 25 00 00 50 00")
    assert run_traps(cpu, 3, lambda trap: None) == [(VECTOR_PF, 4, UNMAPPED)] * 3


def test_after_a_page_fault_the_instruction_starts_again_when_the_page_is_there(bare: BareMachine) -> None:
    cpu = bare.start("48 89 04 25 00 00 50 00 48 ff c0" + SYSCALL)  # mov [UNMAPPED], rax; inc rax
    mapped = bare.frame()

    def fix(trap: Trap) -> None:
        if trap[0] == VECTOR_PF:
            bare.set_entry(UNMAPPED, mapped << 12 | ACCESS)

    cpu.regs[RAX] = 7
    traps = run_traps(cpu, 2, fix)
    assert [vector for vector, _, _ in traps] == [VECTOR_PF, TRAP_SYSCALL]
    assert bare.memory.q[mapped << 9] == 7
    assert cpu.regs[RAX] == 8


@pytest.mark.parametrize("code", ["48 0f 05", "f3 0f 05", "66 66 0f 05"])
def test_a_system_call_with_prefixes_goes_on_behind_all_of_it(bare: BareMachine, code: str) -> None:
    cpu = bare.start(code + "48 ff c3" + SYSCALL)  # inc rbx
    cpu.regs[RBX] = 0
    found: list[int] = []
    run_traps(cpu, 2, lambda trap: found.append(cpu.regs[RIP] - CODE))
    length = len(bytes.fromhex(code))
    assert found == [length, length + 5]
    assert cpu.regs[RBX] == 1


def test_the_handler_decides_where_the_guest_goes_on(bare: BareMachine) -> None:
    bare.write_code("bb 05 00 00 00" + SYSCALL, offset=0x100)  # mov ebx, 5
    for code in (SYSCALL, "cc", "0f 0b", "f4", "8b 04 25 00 00 50 00", "cd 80", "ec"):
        regs = bare.start(code).regs
        regs[RBX] = 0
        run_traps(bare.engine.cpu(0), 2, lambda trap, regs=regs: regs.__setitem__(RIP, CODE + 0x100))
        assert regs[RBX] == 5, code


def test_leaving_run_at_a_trap_and_coming_back_loses_and_repeats_nothing(bare: BareMachine) -> None:
    cpu = bare.start("48 ff c3 0f 05 48 ff c3 cc eb f5")  # again: inc rbx; syscall; inc rbx; int3; jmp again
    cpu.regs[RBX] = 0
    for number in range(1, 100):
        run_to_trap(cpu)
        assert cpu.regs[RBX] == number


def test_an_x87_exception_is_reported_at_the_next_x87_instruction(bare: BareMachine) -> None:
    # fldcw with division by zero unmasked; fld1; fldz; fdivp; fwait
    bare.memory.h[bare.data[0] << 11] = 0x37B
    trap, rip = bare.first_trap("d9 2c 25 00 00 60 00 d9 e8 d9 ee de f9 9b")
    assert (trap[0], rip) == (VECTOR_MF, 13)


def test_what_the_handler_raises_comes_out_of_run(bare: BareMachine) -> None:
    def fail(vector: int, error_code: int, address: int) -> bool:
        raise LookupError("from the handler")

    cpu = bare.start(SYSCALL)
    with pytest.raises(LookupError, match="from the handler"):
        cpu.run(fail)
    cpu.regs[RIP] = CODE
    assert run_to_trap(cpu)[0] == TRAP_SYSCALL


@pytest.mark.parametrize("rip", [NON_CANONICAL, 0x0000_8000_0000_0000, 0xFFFF_7FFF_FFFF_FFFF])
def test_a_rip_that_is_not_canonical_is_a_general_protection_fault(bare: BareMachine, rip: int) -> None:
    cpu = bare.start(SYSCALL)
    cpu.regs[RIP] = rip
    assert run_to_trap(cpu)[0] == VECTOR_GP


# --- modes and translations -------------------------------------------------------------------------


def test_each_mode_executes_its_own_code_and_sees_its_own_data(bare: BareMachine) -> None:
    code = "48 8b 04 25 00 00 60 00 bb {:02x} 00 00 00 0f 05 eb ef"  # again: mov rax, [DATA]; mov ebx, n; syscall
    bare.write_code(code.format(1))
    bare.write_code(code.format(2), user=True)
    for user in (False, True):
        bare.memory.q[bare.data[user] << 9] = 100 + user
    cpu = bare.engine.cpu(0)
    cpu.load(bare.state())
    found: list[tuple[int, int]] = []
    modes: Iterator[bool] = iter([True, False] * 5)

    def switch(trap: Trap) -> None:
        found.append((cpu.regs[RAX], cpu.regs[RBX]))
        user = next(modes)
        cpu.switch_mode(bare.l4s[user], user)
        cpu.regs[RIP] = CODE

    run_traps(cpu, 10, switch)
    assert found == [(100, 1), (101, 2)] * 5


def test_another_page_table_in_the_same_mode_counts_at_once(bare: BareMachine) -> None:
    cpu = bare.start("48 8b 04 25 00 00 60 00" + SYSCALL + "eb f4")
    bare.write_code("48 8b 04 25 00 00 60 00" + SYSCALL + "eb f4", user=True)
    for user in (False, True):
        bare.memory.q[bare.data[user] << 9] = 100 + user
    found: list[int] = []
    tables = iter([bare.user_l4, bare.kernel_l4] * 3)

    def change(trap: Trap) -> None:
        found.append(cpu.regs[RAX])
        cpu.switch_mode(next(tables), False)

    run_traps(cpu, 6, change)
    assert found == [100, 101] * 3


@pytest.mark.parametrize("user", [False, True])
def test_a_flush_makes_a_changed_entry_count(bare: BareMachine, user: bool) -> None:
    cpu = bare.start("48 8b 04 25 00 00 60 00" + SYSCALL + "eb f4", user)
    frames = [bare.frame() for _ in range(4)]
    for number, mfn in enumerate(frames):
        bare.memory.q[mfn << 9] = number
    found: list[int] = []
    changes = iter(frames)

    def change(trap: Trap) -> None:
        found.append(cpu.regs[RAX])
        mfn = next(changes)
        bare.set_entry(DATA, mfn << 12 | ACCESS, bare.l4s[user])
        # The mode that is not running is flushed too, and comes back with the new entry.
        cpu.switch_mode(bare.l4s[not user], not user)
        if mfn & 1:
            cpu.flush_page(DATA)
        else:
            cpu.flush_tlb()
        cpu.switch_mode(bare.l4s[user], user)

    run_traps(cpu, 4, change)
    assert found[1:] == [0, 1, 2]


@pytest.mark.parametrize("single_pages", [False, True])
def test_flushes_reach_translations_that_compete_for_the_same_place(bare: BareMachine, single_pages: bool) -> None:
    """Pages 1 MiB apart: more than a direct-mapped TLB and its victim entries can hold."""
    pages = [0x1000_0000 + number * 0x10_0000 for number in range(14)]
    old = [bare.map_new(page) for page in pages]
    new = [bare.frame() for _ in pages]
    for number, (first, second) in enumerate(zip(old, new, strict=True)):
        bare.memory.q[first << 9], bare.memory.q[second << 9] = number, 100 + number
    cpu = bare.start("48 8b 1b" + SYSCALL)  # mov rbx, [rbx]

    def contents() -> list[int]:
        found = []
        for page in pages:
            cpu.regs[RIP], cpu.regs[RBX] = CODE, page
            run_to_trap(cpu)
            found.append(cpu.regs[RBX])
        return found

    assert contents() == list(range(14))
    cpu.switch_mode(bare.user_l4, True)
    for page, mfn in zip(pages, new, strict=True):
        bare.set_entry(page, mfn << 12 | ACCESS)
        if single_pages:
            cpu.flush_page(page)
    if not single_pages:
        cpu.flush_tlb()
    cpu.switch_mode(bare.kernel_l4, False)
    assert contents() == list(range(100, 114))


def test_the_guest_cannot_reach_what_its_page_table_does_not_map(bare: BareMachine) -> None:
    secret = bare.frame()
    bare.memory.page(secret)[:8] = b"secret!!"
    for address in (0, secret << 12, 1 << 40, GDT, 0xFFFF_8000_0000_0000, (1 << 47) - 8):
        cpu = bare.start("48 8b 00" + SYSCALL)  # mov rax, [rax]
        cpu.regs[RAX] = address
        assert run_to_trap(cpu)[0] in (VECTOR_PF, VECTOR_GP)


def test_code_that_ring_0_rewrote_is_executed_as_rewritten(bare: BareMachine) -> None:
    cpu = bare.start("b8 01 00 00 00" + SYSCALL)
    for number in range(1, 5):
        bare.write_code(f"b8 {number:02x} 00 00 00")
        cpu.regs[RIP] = CODE
        run_to_trap(cpu)
        assert cpu.regs[RAX] == number


def test_code_that_the_guest_rewrites_itself_is_executed_as_rewritten(bare: BareMachine) -> None:
    # mov byte [CODE + 9], 7; mov eax, 1 (whose operand is at CODE + 9)
    cpu = bare.start("c6 04 25 09 00 40 00 07 b8 01 00 00 00" + SYSCALL)
    run_to_trap(cpu)
    assert cpu.regs[RAX] == 7


def test_a_frame_rewritten_through_another_mapping_and_mapped_executable_again(bare: BareMachine) -> None:
    alias = 0x58_0000  # as a kernel's direct map: writable, not executable
    bare.set_entry(alias, bare.code[0] << 12 | ACCESS | PTE_NX)
    # again: mov byte [alias + 0x101], bl; syscall; jmp again
    cpu = bare.start("88 1c 25 01 01 58 00" + SYSCALL + "eb f5")
    bare.write_code("b8 00 00 00 00" + SYSCALL, offset=0x100)
    found = []
    for number in range(1, 30):
        cpu.regs[RIP], cpu.regs[RBX] = CODE, number
        run_to_trap(cpu)
        bare.set_entry(0x59_0000, 0)
        bare.set_entry(0x59_0000, bare.code[0] << 12 | PTE_P | PTE_US)
        cpu.executable_mapped(bare.code[0])
        cpu.flush_page(0x59_0000)
        cpu.regs[RIP] = 0x59_0100
        run_to_trap(cpu)
        found.append(cpu.regs[RAX])
    assert found == list(range(1, 30))


# --- segments ---------------------------------------------------------------------------------------


def test_segment_bases_follow_the_register_file(bare: BareMachine) -> None:
    cpu = bare.start("64 48 8b 04 25 00 00 00 00 65 48 8b 1c 25 08 00 00 00" + SYSCALL)  # mov rax, fs:[0]; rbx, gs:[8]
    cpu.regs[FS_BASE] = DATA + 16
    cpu.regs[GS_BASE] = DATA + 24
    bare.memory.q[(bare.data[0] << 9) + 2], bare.memory.q[(bare.data[0] << 9) + 4] = 11, 22
    run_to_trap(cpu)
    assert (cpu.regs[RAX], cpu.regs[RBX]) == (11, 22)


def test_a_base_that_the_guest_sets_is_in_the_register_file(bare: BareMachine) -> None:
    cpu = bare.start("f3 48 0f ae d0" + SYSCALL)  # wrfsbase rax
    cpu.regs[RAX] = 0x1234_5678_9000
    run_to_trap(cpu)
    assert cpu.regs[FS_BASE] == 0x1234_5678_9000


@pytest.mark.parametrize("segment", [ES, DS, FS, GS])
def test_set_segment_reads_the_guests_own_table(bare: BareMachine, segment: int) -> None:
    cpu = bare.start(SYSCALL)
    cpu.set_segment(segment, BASED)
    assert cpu.regs[segment] & 0xFFFF == BASED
    if segment in (FS, GS):
        assert cpu.regs[segment + 1] == 0x1234_5678
    for bad in (NOT_PRESENT, RING0, RING0 | 3, 0xFF3, 0x0C):  # the last one from an LDT that is not there
        with pytest.raises(ValueError, match="selector"):
            cpu.set_segment(segment, bad)
        assert cpu.regs[segment] & 0xFFFC == 0


@pytest.mark.parametrize(("code", "segment"), [("8e d8", DS), ("8e c0", ES), ("8e e0", FS), ("8e e8", GS)])
def test_the_guest_loads_segment_registers_itself(bare: BareMachine, code: str, segment: int) -> None:
    cpu = bare.start(code + SYSCALL)
    cpu.regs[RAX] = BASED
    assert run_to_trap(cpu)[0] == TRAP_SYSCALL
    assert cpu.regs[segment] & 0xFFFF == BASED
    cpu = bare.start(code)
    cpu.regs[RAX] = RING0
    assert run_to_trap(cpu)[:2] == (VECTOR_GP, RING0)


def test_an_ldt_is_a_table_of_segments_too(bare: BareMachine) -> None:
    cpu = bare.start(SYSCALL)
    cpu.set_ldt(GDT, 0xFFF)  # any memory can be one
    cpu.set_segment(FS, BASED | 4)
    assert cpu.regs[FS_BASE] == 0x1234_5678
    cpu.set_ldt(0, 0)
    with pytest.raises(ValueError, match="selector"):
        cpu.set_segment(FS, BASED | 4)


def test_a_null_stack_segment_faults(bare: BareMachine) -> None:
    assert bare.first_trap("31 c0 8e d0")[0] == (VECTOR_GP, 0, 0)


def test_32_bit_code_runs_and_its_int_0x80_is_seen(bare: BareMachine) -> None:
    # mov eax, 5; dec eax (a prefix in 64-bit code); push eax; pop ebx; int 0x80
    cpu = bare.start("b8 05 00 00 00 48 50 5b cd 80", user=True)
    cpu.set_code_stack(CODE32, DATA32)
    for segment in (DS, ES):
        cpu.set_segment(segment, DATA32)
    assert run_to_trap(cpu) == (VECTOR_GP, 0x402, 0)
    assert cpu.regs[RIP] == CODE + 8
    assert (cpu.regs[RAX], cpu.regs[RBX]) == (4, 4)
    assert (cpu.regs[RSP], cpu.regs[CS] & 0xFFFF) == (STACK_TOP, CODE32)
    cpu.set_code_stack(0xE033, 0xE02B)
    bare.write_code("48 ff c0" + SYSCALL, user=True)  # inc rax
    cpu.regs[RIP], cpu.regs[RAX] = CODE, 0xFFFF_FFFF
    assert run_to_trap(cpu)[0] == TRAP_SYSCALL
    assert cpu.regs[RAX] == 1 << 32


@pytest.mark.parametrize(
    ("cs", "ss"),
    [(DATA32, DATA32), (CODE64, CODE64), (CODE64, 0), (0, DATA32), (CODE64 & ~3, DATA32), (CODE64, NOT_PRESENT)],
)
def test_code_and_stack_that_no_return_could_load_are_refused_and_nothing_changes(
    bare: BareMachine, cs: int, ss: int
) -> None:
    cpu = bare.start(SYSCALL)
    with pytest.raises(ValueError, match="selector"):
        cpu.set_code_stack(cs, ss)
    assert (cpu.regs[CS] & 0xFFFF, cpu.regs[SS] & 0xFFFF) == (0xE033, 0xE02B)
    assert run_to_trap(cpu)[0] == TRAP_SYSCALL


# --- FPU, debugging ---------------------------------------------------------------------------------


def test_the_fpu_of_each_vcpu_is_its_own(bare: BareMachine) -> None:
    """Two vCPUs on one Cpu, stored and loaded by turns."""
    # again: addsd xmm3, xmm3; fadd st, st; syscall; jmp again
    code = "f2 0f 58 db d8 c0" + SYSCALL + "eb f6"
    bare.write_code("f2 0f 2a d8 d9 e8" + SYSCALL)  # cvtsi2sd xmm3, eax; fld1
    bare.write_code(code, offset=0x100)
    bare.write_code("f2 0f 2c c3 db 1c 25 00 00 60 00" + SYSCALL, offset=0x200)  # cvttsd2si eax, xmm3; fistp [DATA]
    states = [bare.state(), bare.state()]
    cpu = bare.engine.cpu(0)

    def turn(state: CpuState, offset: int) -> None:
        cpu.load(state)
        cpu.regs[RIP] = CODE + offset
        run_to_trap(cpu)
        cpu.store(state)

    for number, state in enumerate(states):
        state.regs[RAX] = 3 + number
        turn(state, 0)
    for _ in range(4):
        for state in states:
            turn(state, 0x100)
    results = []
    for state in states:
        turn(state, 0x200)
        results.append((state.regs[RAX], bare.memory.d[bare.data[0] << 10]))
    assert results == [(3 * 16, 16), (4 * 16, 16)]


def test_a_fresh_state_has_the_fpu_as_after_reset(bare: BareMachine) -> None:
    cpu = bare.start("0f ae 1c 25 00 00 60 00 d9 3c 25 04 00 60 00" + SYSCALL)  # stmxcsr [DATA]; fnstcw [DATA + 4]
    run_to_trap(cpu)
    assert bare.memory.d[bare.data[0] << 10] == 0x1F80
    assert bare.memory.h[(bare.data[0] << 11) + 2] == 0x37F


def test_a_state_moves_to_another_engine_of_the_kind(bare: BareMachine, engine_name: str) -> None:
    cpu = bare.start("f2 0f 2a c8 48 ff c3" + SYSCALL + "f2 0f 2c d1" + SYSCALL)  # xmm1 = eax; inc rbx | edx = xmm1
    cpu.regs[RAX], cpu.regs[RBX], cpu.regs[FS_BASE] = 41, 1, 0x7FFF_0000_1000
    run_to_trap(cpu)
    state = bare.state()
    cpu.store(state)
    other = choose(engine_name).factory(bare.memory)
    try:
        moved = other.cpu(0)
        moved.load(state)
        run_to_trap(moved)
        assert (moved.regs[RBX], moved.regs[RDX], moved.regs[FS_BASE]) == (2, 41, 0x7FFF_0000_1000)
    finally:
        other.close()


def test_the_task_switched_flag_raises_nm(bare: BareMachine) -> None:
    traits = getattr(bare.engine, "traits", None)
    if traits is not None and not traits.traps_task_switched:
        pytest.skip("on this host's KVM, CR0.TS has no effect on ring 3")
    cpu = bare.start("d9 e8" + SYSCALL)  # fld1
    cpu.set_task_switched(True)
    assert run_to_trap(cpu)[0] == VECTOR_NM
    cpu.set_task_switched(False)
    assert run_to_trap(cpu)[0] == TRAP_SYSCALL


def test_single_steps_stop_after_every_instruction(bare: BareMachine) -> None:
    cpu = bare.start("90 48 ff c3 50 90")  # nop; inc rbx; push rax; nop
    cpu.set_rflags(cpu.get_rflags() | EFLAGS_TF)
    found: list[int] = []
    traps = run_traps(cpu, 4, lambda trap: found.append(cpu.regs[RIP] - CODE))
    assert [vector for vector, _, _ in traps] == [VECTOR_DB] * 4
    assert found == [1, 4, 5, 6]


def test_a_breakpoint_stops_before_its_instruction(bare: BareMachine) -> None:
    traits = getattr(bare.engine, "traits", None)
    if traits is not None and not traits.has_breakpoints:
        pytest.skip("on this host's KVM, debug registers have no effect")
    cpu = bare.start("90 48 ff c3" + SYSCALL)
    cpu.regs[RBX] = 0
    cpu.set_debug(2, CODE + 4)
    cpu.set_debug(7, 0x410)
    vector, _, _ = run_to_trap(cpu)
    assert (vector, cpu.regs[RIP], cpu.regs[RBX]) == (VECTOR_DB, CODE + 4, 1)
    cpu.set_debug(7, 0x400)
    assert run_to_trap(cpu)[0] == TRAP_SYSCALL


@pytest.mark.parametrize("code", ["0f ae 17", "0f ae 0f"], ids=["ldmxcsr", "fxrstor"])
def test_reserved_bits_of_mxcsr_are_refused(bare: BareMachine, code: str) -> None:
    cpu = bare.start(code + SYSCALL)
    bare.memory.page(bare.data[0])[:28] = bytes.fromhex("80 1f 04 80") * 7
    cpu.regs[RDI] = DATA
    assert run_to_trap(cpu) == (VECTOR_GP, 0, 0)
    assert cpu.regs[RIP] == CODE


def test_a_breakpoint_on_data_stops_behind_its_instruction(bare: BareMachine) -> None:
    traits = getattr(bare.engine, "traits", None)
    if traits is not None and not traits.has_breakpoints:
        pytest.skip("on this host's KVM, debug registers have no effect")
    # mov [DATA], rbx; mov rax, [DATA + 8]; inc rbx
    cpu = bare.start("48 89 1c 25 00 00 60 00 48 8b 04 25 08 00 60 00 48 ff c3" + SYSCALL)
    cpu.set_debug(0, DATA)
    cpu.set_debug(3, DATA + 8)
    cpu.set_debug(7, 0x482 | 0b1001 << 16 | 0b1011 << 28)  # eight bytes: written, accessed
    found: list[int] = []
    traps = run_traps(cpu, 3, lambda trap: found.append(cpu.regs[RIP] - CODE))
    assert traps == [(VECTOR_DB, 0, 0xFFFF_0FF1), (VECTOR_DB, 0, 0xFFFF_0FF8), (TRAP_SYSCALL, 0, 0)]
    assert found == [8, 16, 21]


# --- kicks and threads ------------------------------------------------------------------------------


def test_a_kick_before_run_makes_it_return_at_once(bare: BareMachine) -> None:
    cpu = bare.start(SYSCALL)
    cpu.kick()
    traps: list[int] = []
    cpu.run(lambda vector, error_code, address: bool(traps.append(vector)))
    assert traps == []
    assert run_to_trap(cpu)[0] == TRAP_SYSCALL


def test_every_kick_stops_an_endless_loop(bare: BareMachine) -> None:
    cpu = bare.start(LOOP)
    for _ in range(200):
        kicker = threading.Thread(target=cpu.kick)
        kicker.start()
        cpu.run(lambda vector, error_code, address: False)
        kicker.join()
    assert cpu.regs[RIP] == CODE


def test_kicks_never_repeat_or_lose_an_instruction(bare: BareMachine) -> None:
    """A counter in memory, one in a register, and the number of traps stay equal however often the guest is stopped."""
    # again: inc qword [DATA]; inc rbx; syscall; jmp again
    cpu = bare.start("48 ff 04 25 00 00 60 00 48 ff c3" + SYSCALL + "eb f1")
    bare.memory.q[bare.data[0] << 9] = cpu.regs[RBX] = 0
    traps = 0
    done = threading.Event()

    def on_trap(vector: int, error_code: int, address: int) -> bool:
        nonlocal traps
        assert vector == TRAP_SYSCALL
        traps += 1
        assert bare.memory.q[bare.data[0] << 9] == cpu.regs[RBX] == traps
        return traps < 4_000

    def kick() -> None:
        while not done.is_set():
            cpu.kick()

    kicker = threading.Thread(target=kick)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(SWITCH_SECONDS)  # as a machine has it; else each trap waits 5 ms for the kicker
    kicker.start()
    try:
        while traps < 4_000:
            cpu.run(on_trap)
    finally:
        done.set()
        kicker.join()
        sys.setswitchinterval(interval)


def test_a_vcpu_may_move_between_threads(bare: BareMachine) -> None:
    cpu = bare.start("48 ff c3" + SYSCALL + "eb f9")
    cpu.regs[RBX] = 0
    for _ in range(20):
        thread = threading.Thread(target=run_to_trap, args=(cpu,))
        thread.start()
        thread.join()
    assert cpu.regs[RBX] == 20


def test_two_engines_run_on_two_threads_at_once(bare: BareMachine, engine_name: str) -> None:
    other = BareMachine(engine_name)
    results: dict[int, int] = {}

    def work(machine: BareMachine, step: int) -> None:
        cpu = machine.start("48 01 cb 48 ff c8 75 f8" + SYSCALL)  # again: add rbx, rcx; dec rax; jnz again
        cpu.regs[RAX], cpu.regs[RBX], cpu.regs[RCX] = 1_000_000, 0, step
        run_to_trap(cpu)
        results[step] = cpu.regs[RBX]

    threads = [threading.Thread(target=work, args=arguments) for arguments in ((bare, 3), (other, 5))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    other.close()
    assert results == {3: 3_000_000, 5: 5_000_000}


# --- hostile code -----------------------------------------------------------------------------------


def test_random_code_neither_escapes_nor_stops_the_engine(bare: BareMachine) -> None:
    """Snippets of random bytes with random registers: each ends by a trap or a kick; no other frame changes."""
    generator = random.Random(20)
    stack = bare.map_new(STACK_TOP - 0x1000)
    others = [mfn for mfn in bare.frames if mfn not in (bare.code[0], bare.data[0], stack)]
    others += [bare.frame() for _ in range(8)]  # mapped nowhere
    for mfn in others[-8:]:
        bare.memory.page(mfn)[:] = generator.randbytes(4096)
    accessed_and_dirty = np.uint64(PTE_A | PTE_D)
    before = [bare.memory.table(mfn) & ~accessed_and_dirty for mfn in others]
    cpu = bare.engine.cpu(0)
    for _ in range(1500):
        bare.write_code(generator.randbytes(24).hex() + LOOP)
        state = bare.state()
        for index in (RAX, RBX, RCX, RDX, RSI, RDI):
            state.regs[index] = generator.choice((0, DATA, DATA + 8, CODE, GDT, generator.getrandbits(64)))
        cpu.load(state)
        timer = threading.Timer(2, cpu.kick)
        timer.start()
        cpu.run(lambda vector, error_code, address: False)
        timer.cancel()
    for mfn, old in zip(others, before, strict=True):
        assert np.array_equal(bare.memory.table(mfn) & ~accessed_and_dirty, old), f"frame {mfn} changed"
