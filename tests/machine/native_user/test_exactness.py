"""A program in a stub sees what the processor does: exceptions, flags, vector registers, modes."""

from __future__ import annotations

import os

import pytest
from bare import ACCESS, CODE, CODE32, DATA, DATA32, UNMAPPED, BareMachine, Trap, run_to_trap, run_traps

from xenolith.abi.x86 import (
    CS,
    DS,
    EFLAGS_AC,
    EFLAGS_ID,
    EFLAGS_NT,
    EFLAGS_TF,
    FS_BASE,
    GS_BASE,
    PAGE_SHIFT,
    PTE_P,
    R15,
    RAX,
    RCX,
    RDI,
    RDX,
    RIP,
    RSI,
    VECTOR_AC,
    VECTOR_BP,
    VECTOR_DB,
    VECTOR_DE,
    VECTOR_GP,
    VECTOR_MF,
    VECTOR_PF,
    VECTOR_SS,
    VECTOR_UD,
    VECTOR_XM,
)
from xenolith.machine.engines.protocol import TRAP_SYSCALL
from xenolith.machine.engines.unicorn.user import code, host
from xenolith.machine.engines.unicorn.user.cpu import NativeUserCpu

SYSCALL = "0f 05"
HOLE = 0x8000_0000_0000

TRAPS: dict[str, tuple[str, Trap, int]] = {  # code, trap, where RIP is then
    "syscall": (SYSCALL, (TRAP_SYSCALL, 0, 0), 2),
    "syscall with RAX -1": ("48 c7 c0 ff ff ff ff" + SYSCALL, (TRAP_SYSCALL, 0, 0), 9),
    "syscall 335": ("b8 4f 01 00 00" + SYSCALL, (TRAP_SYSCALL, 0, 0), 7),
    "div by 0": ("31 c9 f7 f1", (VECTOR_DE, 0, 0), 2),
    "ud2": ("0f 0b", (VECTOR_UD, 0, 0), 0),
    "int3": ("cc", (VECTOR_BP, 0, 0), 1),
    "int 0x80": ("cd 80", (VECTOR_GP, 0x402, 0), 0),
    "int 0x20": ("cd 20", (VECTOR_GP, 0x102, 0), 0),
    "hlt": ("f4", (VECTOR_GP, 0, 0), 0),
    "cli": ("fa", (VECTOR_GP, 0, 0), 0),
    "in": ("ec", (VECTOR_GP, 0, 0), 0),
    "mov from cr3": ("0f 20 d8", (VECTOR_GP, 0, 0), 0),
    "rdmsr": ("0f 32", (VECTOR_GP, 0, 0), 0),
    "rdpmc": ("0f 33", (VECTOR_GP, 0, 0), 0),
    "load from nowhere": ("48 8b 04 25 00 00 50 00", (VECTOR_PF, 4, UNMAPPED), 0),
    "store to nowhere": ("48 89 04 25 00 00 50 00", (VECTOR_PF, 6, UNMAPPED), 0),
    "call to nowhere": ("b8 00 00 50 00 ff d0", (VECTOR_PF, 0x14, UNMAPPED), UNMAPPED - CODE),
    "load from Xen's part": ("48 b8 00 00 00 00 00 82 ff ff 48 8b 00", (VECTOR_PF, 5, 0xFFFF_8200_0000_0000), 10),
    "load from the kernel's part": ("48 c7 c0 00 00 00 81 48 8b 00", (VECTOR_PF, 4, 0xFFFF_FFFF_8100_0000), 7),
    "load from the hole": ("48 b8 00 00 00 00 00 80 00 00 48 8b 00", (VECTOR_GP, 0, 0), 10),
    "push to the hole": ("48 bc 08 00 00 00 00 80 00 00 50", (VECTOR_SS, 0, 0), 10),
    "unaligned movaps": ("0f 28 04 25 01 00 60 00", (VECTOR_GP, 0, 0), 0),
    "x87 division by 0": ("9b db e3 6a 00 d9 2c 24 d9 e8 d9 ee de f9 9b", (VECTOR_MF, 0, 0), 14),
    "SSE division by 0": ("6a 00 0f ae 14 24 0f 57 c0 66 0f 76 c9 0f 5b c9 0f 5e c8", (VECTOR_XM, 0, 0), 16),
    "vsyscall": ("48 c7 c0 00 00 60 ff ff d0", (VECTOR_PF, 0x14, 0xFFFF_FFFF_FF60_0000), 0xFFFF_FFFF_FF60_0000 - CODE),
    "a selector beyond the GDT": ("b8 fb ff 00 00 8e d8", (VECTOR_GP, 0xFFF8, 0), 5),
    "a descriptor of ring 0": ("b8 68 00 00 00 8e d8", (VECTOR_GP, 0x68, 0), 5),
}
UNICORN_NEVER = ("unaligned movaps", "SSE division by 0")


@pytest.mark.parametrize("name", TRAPS)
def test_a_trap_is_what_the_processor_makes_of_it(forced: BareMachine, name: str) -> None:
    listing, trap, at = TRAPS[name]
    cpu = forced.start(listing, user=True)
    assert run_to_trap(cpu) == trap
    assert cpu.regs[RIP] - CODE == at
    assert isinstance(cpu, NativeUserCpu)
    assert cpu.traps


@pytest.mark.parametrize("name", [name for name in TRAPS if name not in UNICORN_NEVER])
def test_and_what_unicorn_makes_of_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(host.SETTING, host.OFF)
    machine = BareMachine("unicorn")
    listing, trap, at = TRAPS[name]
    cpu = machine.start(listing, user=True)
    assert run_to_trap(cpu) == trap
    assert cpu.regs[RIP] - CODE == at
    machine.close()


def test_every_register_goes_there_and_back(forced: BareMachine) -> None:
    cpu = forced.start(SYSCALL * 2, user=True)
    values = {register: 0x0123_4567_89AB_0000 + register for register in range(R15 + 1)}
    for register, value in values.items():
        cpu.regs[register] = value
    cpu.regs[FS_BASE], cpu.regs[GS_BASE] = 0x7777_0000_1000, 0xFFFF_8888_0000_2000
    cpu.set_rflags(0x202 | 0x8D5 | EFLAGS_NT | EFLAGS_ID | EFLAGS_AC)
    for turn in (2, 4):
        assert run_to_trap(cpu) == (TRAP_SYSCALL, 0, 0)
        assert cpu.regs[RIP] == CODE + turn
        for register, value in values.items():
            if register not in (RCX, 11):
                assert cpu.regs[register] == value
        assert (cpu.regs[FS_BASE], cpu.regs[GS_BASE]) == (0x7777_0000_1000, 0xFFFF_8888_0000_2000)
        assert cpu.get_rflags() == 0x202 | 0x8D5 | EFLAGS_NT | EFLAGS_ID | EFLAGS_AC


def test_alignment_is_checked_where_the_program_asks_for_that(forced: BareMachine) -> None:
    cpu = forced.start("48 8b 04 25 01 00 60 00" + SYSCALL, user=True)
    cpu.set_rflags(0x202 | EFLAGS_AC)
    assert run_to_trap(cpu) == (VECTOR_AC, 0, 0)
    cpu.set_rflags(0x202)
    assert run_to_trap(cpu) == (TRAP_SYSCALL, 0, 0)


def test_a_program_that_is_stepped_is_on_unicorn(forced: BareMachine) -> None:
    cpu = forced.start("90 90 90", user=True)
    cpu.set_rflags(0x202 | EFLAGS_TF)
    assert run_to_trap(cpu)[0] == VECTOR_DB
    assert cpu.regs[RIP] == CODE + 1
    assert isinstance(cpu, NativeUserCpu)
    assert not cpu.traps


def test_a_program_that_sets_the_trap_flag_is_stepped(forced: BareMachine) -> None:
    cpu = forced.start("68 02 03 00 00 9d 90 90 90", user=True)  # push 0x302; popf
    steps: list[int] = []
    run_traps(cpu, 2, lambda trap: steps.append(cpu.regs[RIP] - CODE))
    assert steps == [7, 8]


def test_code_of_32_bits_is_on_unicorn_and_comes_back(forced: BareMachine) -> None:
    state = forced.state(user=True)
    forced.write_code("40 48" + SYSCALL, user=True)  # inc eax; dec eax, as 32-bit code
    state.regs[CS] = CODE32
    state.regs[29] = DATA32
    cpu = forced.engine.cpu(0)
    cpu.load(state)
    cpu.regs[RAX] = 5
    assert run_to_trap(cpu)[0] in (TRAP_SYSCALL, VECTOR_UD)
    assert cpu.regs[RAX] == 5
    assert isinstance(cpu, NativeUserCpu)
    assert not cpu.traps


def test_a_far_jump_uses_the_guests_descriptors(forced: BareMachine) -> None:
    """RETF to 32-bit code, through a selector that the host's GDT has not."""
    cpu = forced.start("6a 13 68 09 00 40 00 48 cb cc", user=True)
    run_to_trap(cpu)
    assert cpu.regs[CS] & 0xFFFF == CODE32


def test_a_data_segment_of_the_guests_is_loaded_on_unicorn(forced: BareMachine) -> None:
    cpu = forced.start("b8 0b 00 00 00 8e d8" + SYSCALL, user=True)  # mov ds, DATA32
    assert run_to_trap(cpu) == (TRAP_SYSCALL, 0, 0)
    assert cpu.regs[DS] == DATA32


VECTORS = "c5 fe 6f 07 c5 fd 7f c1" + SYSCALL + "c5 fe 7f 0e" + SYSCALL  # ymm0 = [rdi]; ymm1 = ymm0; [rsi] = ymm1


@pytest.fixture
def _avx() -> None:
    if not host.components() & 4:
        pytest.skip("this host's processor has no AVX")


@pytest.mark.usefixtures("_avx")
def test_vector_registers_stay_whole_while_others_run(forced: BareMachine) -> None:
    """Over an XSAVE and an XRSTOR of the kernel's, by code on Unicorn that uses SSE, and another program's stub."""
    cpu = forced.start(VECTORS, user=True)
    cpu.set_xcr0(7)
    frame = forced.data[1] << PAGE_SHIFT
    forced.memory.b[frame : frame + 32] = bytes(range(100, 132))
    other = forced.new_l4()
    forced.set_entry(CODE + 0x1000, forced.map_new(CODE, other) << PAGE_SHIFT | PTE_P, other)
    cpu.regs[RDI], cpu.regs[RSI] = DATA, DATA + 64
    assert run_to_trap(cpu) == (TRAP_SYSCALL, 0, 0)
    after = cpu.regs[RIP]

    forced.write_code("48 0f ae 27 0f 57 c9 48 0f ae 2f" + SYSCALL)  # xsave64 [rdi]; xorps xmm1, xmm1; xrstor64 [rdi]
    cpu.switch_mode(forced.kernel_l4, False)
    cpu.regs[RIP], cpu.regs[RAX], cpu.regs[RDX], cpu.regs[RDI] = CODE, 7, 0, DATA
    assert run_to_trap(cpu) == (TRAP_SYSCALL, 0, 0)
    saved = forced.memory.page(forced.data[0])
    assert bytes(saved[576 + 16 : 576 + 32]) == bytes(range(116, 132))

    cpu.switch_mode(forced.user_l4, True)
    cpu.regs[RIP], cpu.regs[RSI] = after, DATA + 64
    assert run_to_trap(cpu) == (TRAP_SYSCALL, 0, 0)
    assert bytes(forced.memory.b[frame + 64 : frame + 96]) == bytes(range(100, 132))


@pytest.mark.usefixtures("_avx")
def test_a_kernel_restores_the_wide_parts_of_another_program(forced: BareMachine) -> None:
    cpu = forced.start(VECTORS, user=True)
    cpu.set_xcr0(7)
    frame = forced.data[1] << PAGE_SHIFT
    forced.memory.b[frame : frame + 32] = bytes(range(100, 132))
    cpu.regs[RDI], cpu.regs[RSI] = DATA, DATA + 64
    assert run_to_trap(cpu) == (TRAP_SYSCALL, 0, 0)
    after = cpu.regs[RIP]
    area = forced.memory.page(forced.data[0])
    area[:832] = bytes(832)
    area[24:28] = (0x1F80).to_bytes(4, "little")
    area[512] = 7  # all components
    area[160 + 16 : 160 + 32] = bytes(range(16))  # xmm1
    area[576 + 16 : 576 + 32] = bytes(range(16, 32))  # and the rest of ymm1
    forced.write_code("48 0f ae 2f" + SYSCALL)
    cpu.switch_mode(forced.kernel_l4, False)
    cpu.regs[RIP], cpu.regs[RAX], cpu.regs[RDX], cpu.regs[RDI] = CODE, 7, 0, DATA
    assert run_to_trap(cpu) == (TRAP_SYSCALL, 0, 0)
    cpu.switch_mode(forced.user_l4, True)
    cpu.regs[RIP], cpu.regs[RSI] = after, DATA + 64
    assert run_to_trap(cpu) == (TRAP_SYSCALL, 0, 0)
    assert bytes(forced.memory.b[frame + 64 : frame + 96]) == bytes(range(32))


@pytest.mark.parametrize(
    ("listing", "rdi", "trap"),
    [
        ("48 0f ae 27", DATA + 8, (VECTOR_GP, 0, 0)),
        ("48 0f ae 27", UNMAPPED, (VECTOR_PF, 6, UNMAPPED)),
        ("48 0f ae 2f", UNMAPPED, (VECTOR_PF, 4, UNMAPPED)),
        ("48 0f ae 27", HOLE, (VECTOR_GP, 0, 0)),
        ("48 0f ae 27", DATA + 0xFC0, (VECTOR_PF, 6, DATA + 0x1000)),
        ("48 0f c7 27", DATA + 4, (VECTOR_GP, 0, 0)),
    ],
)
def test_a_kernels_xsave_faults_as_the_processors(forced: BareMachine, listing: str, rdi: int, trap: Trap) -> None:
    cpu = forced.start(listing)
    cpu.set_xcr0(7)
    cpu.regs[RAX], cpu.regs[RDX], cpu.regs[RDI] = 7, 0, rdi
    assert run_to_trap(cpu) == trap
    assert cpu.regs[RIP] == CODE


def test_a_kernels_xrstor_of_nonsense_is_a_fault(forced: BareMachine) -> None:
    cpu = forced.start("48 0f ae 2f")
    cpu.set_xcr0(7)
    forced.memory.page(forced.data[0])[512:528] = b"\xff" * 16
    cpu.regs[RAX], cpu.regs[RDX], cpu.regs[RDI] = 7, 0, DATA
    assert run_to_trap(cpu) == (VECTOR_GP, 0, 0)


def test_a_program_that_has_something_where_the_stubs_pages_are_is_on_unicorn(forced: BareMachine) -> None:
    mfn = forced.map_new(code.MAILBOX, forced.user_l4)
    forced.memory.q[mfn << 9] = 77
    cpu = forced.start("48 8b 07" + SYSCALL, user=True)
    cpu.regs[RDI] = code.MAILBOX
    assert run_to_trap(cpu) == (TRAP_SYSCALL, 0, 0)
    assert cpu.regs[RAX] == 77
    assert isinstance(cpu, NativeUserCpu)
    assert not cpu.traps


def test_self_modifying_code_is_seen_on_both_sides(forced: BareMachine) -> None:
    """A program in a stub changes code that Unicorn has translated, and the other way round."""
    cpu = forced.start(
        "c6 05 04 00 00 00 07 0f 05 90 b0 01 0f 05", user=True
    )  # mov byte [the 1], 7; syscall; mov al, 1
    assert isinstance(cpu, NativeUserCpu)
    cpu.placement.forget(forced.user_l4)
    cpu.regs[RIP] = CODE + 10
    cpu.set_rflags(0x202 | EFLAGS_TF)  # on Unicorn
    assert run_to_trap(cpu)[0] == VECTOR_DB
    assert cpu.regs[RAX] & 0xFF == 1
    cpu.set_rflags(0x202)
    cpu.regs[RIP] = CODE
    assert run_to_trap(cpu) == (TRAP_SYSCALL, 0, 0)  # in the stub
    cpu.regs[RIP] = CODE + 10
    cpu.set_rflags(0x202 | EFLAGS_TF)
    assert run_to_trap(cpu)[0] == VECTOR_DB
    assert cpu.regs[RAX] & 0xFF == 7


def test_another_program_on_unicorn_sees_code_that_a_stub_has_changed(forced: BareMachine) -> None:
    """Without leaving Unicorn between the kernel, which it comes back to, and the other program."""
    shared = forced.map_new(CODE + 0x2000, forced.user_l4)
    other = forced.new_l4()
    forced.set_entry(CODE + 0x2000, shared << PAGE_SHIFT | ACCESS, other)
    forced.memory.page(shared)[:4] = bytes.fromhex("b0 01 0f 05")  # mov al, 1; syscall
    cpu = forced.start("c6 07 07" + SYSCALL, user=True)  # mov byte [rdi], 7; syscall
    assert isinstance(cpu, NativeUserCpu)
    cpu.placement.forget(other)
    cpu.placement._wanted[other] = 0
    forced.write_code("90" + SYSCALL)

    def turns(trap: Trap) -> None:
        """User, in the stub: kernel; kernel: the other program, on Unicorn; that: the end."""
        if turn == "program":
            cpu.switch_mode(forced.kernel_l4, False)
            cpu.regs[RIP] = CODE
        else:
            cpu.switch_mode(other, True)
            cpu.regs[RIP] = CODE + 0x2000

    cpu.switch_mode(other, True)
    cpu.regs[RIP] = CODE + 0x2000
    assert run_to_trap(cpu) == (TRAP_SYSCALL, 0, 0)  # translated
    assert cpu.regs[RAX] & 0xFF == 1
    assert not cpu.traps
    cpu.switch_mode(forced.user_l4, True)
    cpu.regs[RIP], cpu.regs[RDI] = CODE, CODE + 0x2001
    turn = "program"
    seen: list[int] = []

    def on_trap(trap: Trap) -> None:
        nonlocal turn
        seen.append(cpu.regs[RAX] & 0xFF)
        if len(seen) < 3:
            turns(trap)
            turn = "kernel"

    run_traps(cpu, 3, on_trap)
    assert seen[2] == 7
    assert cpu.traps


def test_a_program_whose_stub_dies_gets_a_fault_and_the_next_one_lives(forced: BareMachine) -> None:
    cpu = forced.start("eb fe", user=True)
    assert isinstance(cpu, NativeUserCpu)
    cpu.regs[RIP] = CODE
    forced.write_code("0f 0b eb fe", user=True)
    assert run_to_trap(cpu) == (VECTOR_UD, 0, 0)
    os.kill(cpu.spaces.find(forced.user_l4).stub.pid, 9)
    cpu.regs[RIP] = CODE + 2
    assert run_to_trap(cpu) == (VECTOR_GP, 0, 0)
    cpu.regs[RIP] = CODE
    assert run_to_trap(cpu) == (VECTOR_UD, 0, 0)
    assert cpu.spaces.made == 2


def test_a_second_vcpu_makes_it_plain_unicorn(forced: BareMachine) -> None:
    assert forced.engine.xcr0_mask == host.components()
    cpu = forced.engine.cpu(1)
    assert forced.engine.xcr0_mask == 3
    assert forced.engine.host_cpuid(1, 0)[2] & 1 << 28 == 0
    forced.write_code(SYSCALL, user=True)
    cpu.load(forced.state(user=True))
    assert run_to_trap(cpu) == (TRAP_SYSCALL, 0, 0)
    assert isinstance(cpu, NativeUserCpu)
    assert not cpu.traps


KERNEL = 0xFFFF_FFFF_8100_0000
DIRECT = 0xFFFF_8880_0000_0000


@pytest.mark.usefixtures("_avx")
@pytest.mark.parametrize("register", [RDI, RAX, 13])
def test_a_kernel_may_use_avx_too(forced: BareMachine, register: int) -> None:
    """An instruction at a time, in a stub that has its half of the address space."""
    modrm = {RDI: "07", RAX: "00", 13: "45 00"}[register]
    prefix = "c4 c1 7e" if register == 13 else "c5 fe"
    # vmovdqu ymm0, [register]; vmovdqu ymm1, [rip + 0x100]; vpaddb ymm2, ymm0, ymm1: as AVX2; vmovdqu [register], ymm2
    listing = f"{prefix} 6f {modrm} c5 fe 6f 0d 00 01 00 00 c5 fd fc d1 {prefix} 7f {modrm.replace('07', '17')}"
    listing = listing.replace("7f 00", "7f 10").replace("7f 45", "7f 55") + SYSCALL
    text, data = forced.map_new(KERNEL, forced.kernel_l4), forced.map_new(DIRECT + 0x5000, forced.kernel_l4)
    code_bytes = bytes.fromhex(listing)
    forced.memory.page(text)[: len(code_bytes)] = code_bytes
    second = len(bytes.fromhex(f"{prefix} 6f {modrm} c5 fe 6f 0d 00 01 00 00"))
    forced.memory.page(text)[second + 0x100 : second + 0x120] = b"\x03" * 32
    forced.memory.page(data)[0x40:0x60] = bytes(range(32))
    cpu = forced.engine.cpu(0)
    cpu.load(forced.state())
    cpu.set_xcr0(7)
    cpu.regs[RIP], cpu.regs[register] = KERNEL, DIRECT + 0x5040
    assert run_to_trap(cpu) == (TRAP_SYSCALL, 0, 0)
    assert cpu.regs[RIP] == KERNEL + len(code_bytes)
    assert cpu.regs[register] == DIRECT + 0x5040
    assert bytes(forced.memory.page(data)[0x40:0x60]) == bytes(n + 3 for n in range(32))
    assert cpu.get_rflags() & EFLAGS_TF == 0


@pytest.mark.usefixtures("_avx")
def test_a_kernels_avx_faults_at_its_own_addresses(forced: BareMachine) -> None:
    text = forced.map_new(KERNEL, forced.kernel_l4)
    forced.memory.page(text)[:4] = bytes.fromhex("c5 fe 7f 07")
    cpu = forced.engine.cpu(0)
    cpu.load(forced.state())
    cpu.set_xcr0(7)
    cpu.regs[RIP], cpu.regs[RDI] = KERNEL, DIRECT
    assert run_to_trap(cpu) == (VECTOR_PF, 6, DIRECT)
    assert (cpu.regs[RIP], cpu.regs[RDI]) == (KERNEL, DIRECT)
