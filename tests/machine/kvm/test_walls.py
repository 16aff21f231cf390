"""Whatever a guest executes, and wherever its registers point, it stays at CPL 3; and what it meets is no host's error.

A KVM without VMX and SVM executes some guest code in its instruction emulator: all 32-bit code, and 64-bit code while
RSP is not canonical.  The emulator takes SYSCALL to CPL 0, where the processor would have stayed at CPL 3.
"""

from __future__ import annotations

import time
from array import array

import pytest

from xenolith.abi.layout import FLAT_RING3_CS32, FLAT_RING3_SS32
from xenolith.abi.x86 import (
    PAGE_SHIFT,
    R8,
    R11,
    RAX,
    RBX,
    RCX,
    RDI,
    RDX,
    RIP,
    RSI,
    RSP,
    VECTOR_BP,
    VECTOR_DB,
    VECTOR_GP,
    VECTOR_PF,
    VECTOR_UD,
)
from xenolith.machine.engines.kvm import area, fast_path_code, run_page
from xenolith.machine.engines.kvm.host import host_traits
from xenolith.machine.engines.protocol import TRAP_SYSCALL, EngineError

from .bare import CODE, DATA, STACK_TOP, Machine, in_thread, run_to_trap
from .test_fast_path import KERNEL, Guest, guest, loop
from .test_kicks import kicking

__all__ = ("guest",)

STACK = STACK_TOP - 64
NOT_CANONICAL = (0x0000_8000_0000_0000, 0xFFFF_7FFF_FFFF_FFF0, 1 << 63)
POINTERS = (*NOT_CANONICAL, area.PER_CPU + area.CPU_STACK + 0x1000, 0xFFFF_8000_0000_1000, STACK)
READ_CS = "8c c8 0f 0b"  # mov eax, cs; ud2
INSTRUCTIONS = {
    "syscall": "0f 05",
    "sysenter": "0f 34",
    "int3": "cc",
    "int1": "f1",
    "int 3": "cd 03",
    "int 0x80": "cd 80",
    "int 14": "cd 0e",
    "iret": "cf",
    "iretq": "48 cf",
    "retf": "cb",
    "retfq": "48 cb",
    "jmp far": "ff 2f",
    "call far": "ff 1f",
    "mov ss": "8e d6",
    "lss": "0f b2 37",
    "sysret": "0f 07",
    "sysexit": "0f 35",
    "rsm": "0f aa",
    "popf": "9d",
    "vmmcall": "0f 01 d9",
    "vmcall": "0f 01 c1",
    "mov cr3": "0f 22 d8",
    "wrmsr": "0f 30",
    "lgdt": "0f 01 17",
    "ltr": "0f 00 de",
    "out": "e6 fb",
    "in": "e4 fb",
    "hlt": "f4",
    "enter": "c8 10 00 00",
    "pop fs": "0f a1",
}


def prepare(machine: Machine, pointer: int) -> None:
    """A far pointer to our CPL-0 code at RDI, our CPL-0 data segment in RSI, and both in the frame of an IRET."""
    regs = machine.engine.cpu(0).regs
    regs[RDI], regs[RSI], regs[RSP], regs[RCX], regs[RAX] = DATA, area.DATA0, pointer, 0, 0
    machine.set_word(CODE | area.CODE0 << 32)
    stack = machine.memory.q[machine.entry(STACK)] >> PAGE_SHIFT & 0xF_FFFF_FFFF
    frame = (stack << 9) + (STACK & 0xFFF) // 8
    machine.memory.q[frame : frame + 5] = array("Q", (CODE, area.CODE0, 0x3202, DATA, area.DATA0))


@pytest.mark.parametrize("bits", [64, 32])
@pytest.mark.parametrize("name", INSTRUCTIONS)
def test_no_instruction_leads_to_cpl_0(machine: Machine, name: str, bits: int) -> None:
    cpu = machine.cpu()
    code = INSTRUCTIONS[name] + READ_CS
    for pointer in POINTERS if bits == 64 else (STACK, 0xFFFF_FFFF):
        prepare(machine, pointer)
        if bits == 32:
            cpu.set_code_stack(FLAT_RING3_CS32, FLAT_RING3_SS32)
        vector, _, _ = machine.execute(cpu, code)
        if vector in (TRAP_SYSCALL, VECTOR_BP):  # as a kernel would, go on behind it
            vector, _, _ = run_to_trap(cpu)
        if vector == VECTOR_UD and cpu.regs[RIP] != CODE:
            assert cpu.regs[RAX] & 0xFFFF in (area.USER_CODE64, area.USER_CODE32)


@pytest.mark.parametrize("bits", [64, 32])
def test_a_system_call_on_a_bad_stack_is_one(machine: Machine, bits: int) -> None:
    """And for 32-bit code, whatever the program has where CSTAR, cut to 32 bits, would point."""
    cpu = machine.cpu()
    cut = area.SYSCALL32_STUB & 0xFFFF_F000 & 0xFFFF_FFFF
    machine.map_new(cut)
    for pointer in POINTERS if bits == 64 else (0xFFFF_FFFF, area.SYSCALL32_STUB & 0xFFFF_FFFF):
        if bits == 32:
            cpu.set_code_stack(FLAT_RING3_CS32, FLAT_RING3_SS32)
        for _ in range(3):  # KVM emulates from the next entry on
            cpu.regs[RSP] = pointer
            assert machine.execute(cpu, "0f 05 0f 0b") == (TRAP_SYSCALL, 0, 0)
            assert (cpu.regs[RIP], cpu.regs[RSP]) == (CODE + 2, pointer)
            assert run_to_trap(cpu) == (VECTOR_UD, 0, 0)


def test_cpl_0_does_not_execute_what_a_guest_can_write(machine: Machine) -> None:
    """SMEP, without which no KVM may be used that emulates guest code."""
    if not host_traits().emulates_guest_code:
        pytest.skip("guest code runs on the processor here")
    assert not machine.cpu().runs_pages_of_cpl3()


@pytest.mark.parametrize("pointer", NOT_CANONICAL)
def test_hypercalls_on_a_bad_stack_stay_at_cpl_3(guest: Guest, pointer: int) -> None:
    """set_segment_base, which the fast path carries out, with RSP as it was at the last exit."""
    regs = guest.cpu.regs
    # mov rsp, rdi; ud2; mov edi, FS; mov esi, DATA; mov eax, set_segment_base; syscall; mov eax, cs; mov rbx, rsp; ud2
    code = "48 89 fc 0f 0b bf 00 00 00 00 be 00 00 60 00 b8 19 00 00 00 0f 05 8c c8 48 89 e3 0f 0b"
    guest.machine.write_code(code, KERNEL - CODE)
    regs[RDI] = pointer
    assert guest.run("0f 05") == [VECTOR_UD]
    regs[RIP] += 2
    vectors = guest.go()
    if vectors == [TRAP_SYSCALL]:
        vectors = guest.go()
    assert vectors == [VECTOR_UD]
    assert (regs[RAX], regs[RBX], guest.modes.kernel_mode) == (area.USER_CODE64, pointer, True)


@pytest.mark.parametrize("pointer", NOT_CANONICAL)
def test_a_programs_system_calls_on_a_bad_stack_return_to_it(guest: Guest, pointer: int) -> None:
    regs = guest.cpu.regs
    regs[RSP] = pointer
    vectors = guest.run(loop(5))
    for _ in range(20):
        if vectors == [VECTOR_UD] and regs[RIP] == CODE + 20:
            break
        assert vectors == [TRAP_SYSCALL]
        if not guest.modes.kernel_mode:  # it is Python's: carry it out as nothing
            regs[RAX] = 0x77
        vectors = guest.go()
    assert (vectors, regs[RIP], regs[RSP]) == ([VECTOR_UD], CODE + 20, pointer)
    assert not guest.modes.kernel_mode


@pytest.mark.parametrize("end", [1 << 64, 1 << 47])
@pytest.mark.parametrize("off", ["user_l4", "syscall_callback", ""])
def test_int3_in_the_last_byte_of_an_address_space_passes_no_gate(guest: Guest, off: str, end: int) -> None:
    """RIP behind it is 0, or, at the end of the lower half, an address that is not canonical."""
    machine, modes, regs = guest.machine, guest.modes, guest.cpu.regs
    for l4 in (machine.l4, guest.kernel_l4):
        machine.memory.page(machine.map_new(end - 0x1000, l4))[-1] = 0xCC
    machine.write_code("48 89 f8 ff e0", KERNEL - CODE)  # mov rax, rdi; jmp rax
    for kernel in (False, True):
        if kernel:
            regs[RDI] = end - 1
            guest.run("0f 05")
            setattr(modes, off or "timer_look", 0)
        else:
            assert guest.run("0f 0b") == [VECTOR_UD]
        regs[RIP] = end - 1
        assert guest.go() in ([VECTOR_BP], [VECTOR_GP])
        assert regs[RIP] in (end & (1 << 64) - 1, end - 1)
        assert (modes.kernel_mode, guest.cpu.l4_mfn) == (kernel, guest.kernel_l4 if kernel else machine.l4)


@pytest.mark.parametrize("before", ["cc", "cd 03", "cd 04"])
def test_a_loop_behind_a_breakpoint_that_is_not_executed_is_stopped(guest: Guest, before: str) -> None:
    """KVM tells the number of the last exception, here the gate's, but not whether it was delivered."""
    cpu = guest.cpu
    assert guest.run(loop(3)) == [VECTOR_UD]
    guest.machine.write_code(before + "eb fe")
    start = CODE + len(bytes.fromhex(before))
    for _ in range(3):
        cpu.regs[RIP] = start
        thread = in_thread(lambda: cpu.run(lambda *_: False))
        time.sleep(0.005)
        cpu.kick()
        thread.join(20)
        assert not thread.is_alive(), "the kick was never believed"
        assert cpu.regs[RIP] == start


def test_a_breakpoint_is_none_the_less_seen_at_every_kick(guest: Guest) -> None:
    """All the program does is to execute INT3, with the gate's number in between, while it is being kicked."""
    cpu, regs = guest.cpu, guest.cpu.regs
    guest.machine.write_code("0f 05 cc 49 ff c0 eb f8")  # again: syscall; int3; inc r8; jmp again
    regs[RIP], regs[R8], regs[RAX] = CODE, 0, 0x77
    seen = 0

    def on_trap(vector: int, _error_code: int, _address: int) -> bool:
        nonlocal seen
        if vector == VECTOR_BP:
            assert regs[RIP] == CODE + 3
            seen += 1
        return seen < 2000

    thread, done = kicking(cpu, 0.0002)
    while seen < 2000:
        cpu.run(on_trap)
    done.set()
    thread.join()
    assert regs[R8] == seen - 1


@pytest.mark.parametrize("flag", [1 << 8, 1 << 14, 1 << 18], ids=["TF", "NT", "AC"])
def test_a_program_at_the_gate_itself_brings_no_flags_into_the_kernel(guest: Guest, flag: int) -> None:
    """SYSCALL clears these; with AC a kernel's own unaligned accesses would fault."""
    assert guest.run(loop(2)) == [VECTOR_UD]
    guest.machine.write_code("9c 58 0f 0b", KERNEL - CODE)  # pushf; pop rax; ud2
    regs, gate = guest.cpu.regs, guest.code_va + fast_path_code.USER.labels["gate"]
    regs[RDI], regs[RCX], regs[R11], stack = gate, CODE + 0x40, 0x202, regs[RSP]
    guest.cpu.set_rflags(flag)
    vectors = guest.run("ff e7")
    if guest.modes.kernel_mode:  # KVM's emulator has dropped the flag
        assert vectors == [VECTOR_UD]
        assert not regs[RAX] & flag
    else:
        assert (vectors, regs[RIP], regs[RSP]) == ([TRAP_SYSCALL], CODE + 0x40, stack)


def test_a_kernels_single_steps_do_not_end_at_a_hypercall(guest: Guest) -> None:
    """set_segment_base(FS, DATA) with TF set: #DB comes up once it is done."""
    guest.machine.write_code("bf 00 00 00 00 be 00 00 60 00 b8 19 00 00 00 0f 05 90 90 0f 0b", KERNEL - CODE)
    regs = guest.cpu.regs
    assert guest.run(loop(1)) == [VECTOR_UD]
    assert guest.modes.kernel_mode
    regs[RIP] = KERNEL
    guest.cpu.set_rflags(1 << 8)
    stops = []
    for _ in range(8):
        (vector,) = guest.go()
        if vector == VECTOR_UD:
            break
        stops.append((vector, regs[RIP] - KERNEL))
        if vector == TRAP_SYSCALL:
            regs[RAX] = 0
    assert stops[:3] == [(VECTOR_DB, 5), (VECTOR_DB, 10), (VECTOR_DB, 15)]
    assert stops[3][1] in (17, 18)
    assert stops[-1] == (VECTOR_DB, 19)


@pytest.mark.parametrize("code", ["f3 6c", "f3 6e", "6d", "66 ef", "ec", "e5 fb"])
def test_the_port_that_cpl_3_may_reach_is_none_for_the_guest(machine: Machine, code: str) -> None:
    """Nothing of a string instruction on it is left for later."""
    cpu = machine.cpu()
    for _ in range(3):
        cpu.regs[RDI], cpu.regs[RSI], cpu.regs[RCX] = DATA + 0x1000, DATA, 64
        cpu.regs[RDX], cpu.regs[RAX] = area.PORT_SYSCALL, 0x1234_5678
        machine.set_word(0x5555_5555_5555_5555, page=1)
        assert machine.execute(cpu, code) == (VECTOR_GP, 0, 0)
        assert (cpu.regs[RIP], cpu.regs[RAX], cpu.regs[RDI]) == (CODE, 0x1234_5678, DATA + 0x1000)
        rsi, rcx = cpu.regs[RSI], cpu.regs[RCX]
        assert machine.execute(cpu, "90 90 0f 0b") == (VECTOR_UD, 0, 0)
        assert (cpu.regs[RDI], cpu.regs[RSI], cpu.regs[RCX]) == (DATA + 0x1000, rsi, rcx)


@pytest.mark.parametrize(("vector", "error_code"), [(VECTOR_BP, 0), (VECTOR_GP, 0x402), (VECTOR_PF, 6)])
def test_a_debug_exception_that_mov_ss_has_delayed_hides_no_trap(
    machine: Machine, vector: int, error_code: int
) -> None:
    """CVE-2018-8897: it comes up at the first instruction of the trap's stub, at CPL 0. Here it is made by hand."""
    cpu = machine.cpu()
    machine.execute(cpu, "cd 80")
    rip = CODE + 1 if vector == VECTOR_BP else CODE
    frame = (error_code, rip, area.USER_CODE64, 0x246, STACK, area.USER_DATA)
    cpu._pages.frames[vector][:] = memoryview(array("Q", frame)).cast("B").cast("Q")
    cpu._page.q[run_page.CR2] = DATA
    cpu.regs[RIP] = area.TRAP_STUBS + vector * area.STUB_SIZE
    seen: list[tuple[int, ...]] = []
    cpu._exits.at_cpl0(lambda *trap: bool(seen.append(trap)), VECTOR_DB, 0)
    assert seen == [(vector, error_code, DATA if vector == VECTOR_PF else 0)]
    assert (cpu.regs[RIP], cpu.regs[RSP]) == (rip, STACK)


def test_a_debug_exception_behind_a_system_call_is_the_system_call(machine: Machine) -> None:
    cpu = machine.cpu()
    machine.execute(cpu, "0f 05")
    cpu.regs[RIP], cpu.regs[RCX], cpu.regs[R11], cpu.regs[RSP] = cpu._shared.syscall_page, CODE + 2, 0x246, STACK
    seen: list[tuple[int, ...]] = []
    cpu._exits.at_cpl0(lambda *trap: bool(seen.append(trap)), VECTOR_DB, 0)
    assert (seen, cpu.regs[RIP], cpu.regs[RSP]) == ([(TRAP_SYSCALL, 0, 0)], CODE + 2, STACK)


def test_an_exception_elsewhere_at_cpl_0_is_an_error_of_this_domain(machine: Machine) -> None:
    cpu = machine.cpu()
    cpu.regs[RIP] = area.ENTRY_STUBS
    with pytest.raises(EngineError, match="engine's own code"):
        cpu._exits.at_cpl0(lambda *_: True, VECTOR_GP, 0)
