"""The Unicorn engine's own promises: a verified layout, readable machine code, cheap swaps, an honest CPUID."""

from __future__ import annotations

import re
from collections.abc import Iterator
from struct import pack

import iced_x86
import pytest
from bare import ACCESS, CODE, CODE32, CODE64, DATA, DATA32, STACK_TOP, BareMachine, cpu_of, run_to_trap

from xenolith.abi.layout import FLAT_RING3_CS64, FLAT_RING3_SS64
from xenolith.abi.x86 import (
    CS,
    FS_BASE,
    GS_BASE,
    PTE_NX,
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
    VECTOR_DB,
    VECTOR_GP,
    VECTOR_PF,
    VECTOR_UD,
)
from xenolith.machine import page_walk
from xenolith.machine.engines.protocol import TRAP_CPUID, TRAP_SYSCALL, TRAP_SYSENTER, EngineError
from xenolith.machine.engines.unicorn import deliver, features, layout, library, stubs, verify
from xenolith.machine.engines.unicorn.user import code as user_code
from xenolith.machine.engines.unicorn.user import spaces as user_spaces
from xenolith.machine.listing import assemble, encodings

SYSCALL = "0f 05"


@pytest.fixture
def unicorn() -> Iterator[BareMachine]:
    made = BareMachine("unicorn")
    yield made
    made.close()


# --- start-up verification --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["CR", "DR", "XMM", "FPUC", "MXCSR", "EFER"])
def test_a_unicorn_laid_out_otherwise_is_refused_with_the_probe_and_the_cure(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(layout, name, getattr(layout, name) + 8)
    with pytest.raises(
        EngineError, match=r"private layout is not the one.*the probe of .*pip install unicorn==2\.1\.4"
    ):
        verify.verify.__wrapped__(library.load())


def test_a_state_that_lies_elsewhere_is_refused_before_it_is_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "CPU_STATE", layout.CPU_STATE - 16)
    with pytest.raises(EngineError, match="the probe of the state's address"):
        verify.verify.__wrapped__(library.load())


def test_another_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library.importlib.metadata, "version", lambda package: "2.0.0")
    with pytest.raises(EngineError, match=r"unicorn 2\.0\.0 is installed.*pip install unicorn==2\.1\.4"):
        library.load.__wrapped__()


# --- the machine code -------------------------------------------------------------------------------


LISTINGS = {
    name: value
    for module in (stubs, user_code, user_spaces)
    for name, value in vars(module).items()
    if name.isupper() and isinstance(value, str) and "  " in value
}


@pytest.mark.parametrize("name", LISTINGS)
def test_a_listing_says_what_its_machine_code_does(name: str) -> None:
    """Each line disassembles to its own text."""
    listing = LISTINGS[name]
    addresses = {found: 0x7F00_0000_0000 + 0x1000 * i for i, found in enumerate(re.findall(r"{(\w+):8}", listing))}
    for number in ("trap", "unaligned"):
        if "{" + number in listing:
            addresses[number] = 0x37
    code, labels = assemble(listing, stubs.NUMBERS | addresses)
    values = {**{key: number & 0xFFFF_FFFF for key, number in stubs.NUMBERS.items()}, **addresses}
    formatter = iced_x86.Formatter(iced_x86.FormatterSyntax.NASM)
    formatter.hex_prefix, formatter.hex_suffix = "0x", ""
    formatter.space_after_operand_separator = True
    formatter.uppercase_hex = False
    formatter.leading_zeros = False
    formatter.branch_leading_zeros = False
    formatter.small_hex_numbers_in_decimal = False
    formatter.show_branch_size = False
    formatter.memory_size_options = iced_x86.MemorySizeOptions.ALWAYS
    formatter.signed_memory_displacements = False
    formatter.signed_immediate_operands = False
    texts = [text for _, text in encodings(listing) if text]
    for text, instruction in zip(texts, iced_x86.Decoder(64, code, ip=0), strict=True):
        expected = re.sub(r"\b\w+\b", lambda word: hex(values[word[0]]) if word[0] in values else word[0], text)
        expected = re.sub(r"^(j\w+|call) (\d+)$", lambda jump: f"{jump[1]} {hex(labels[jump[2]])}", expected)
        found = formatter.format(instruction)
        assert _normalised(found) == _normalised(expected), text


def _normalised(text: str) -> str:
    """Without operand sizes, and with negative displacements and numbers written in one way."""
    text = re.sub(r"\b(qword|dword|word|oword) ", "", text)
    text = re.sub(r"0xffffffff([0-9a-f]{8})\b", r"0x\1", text).replace("+0x0]", "]")
    return re.sub(r"\+0x(ffff[0-9a-f]{4})\b", lambda number: hex(int(number[1], 16) - (1 << 32)), text)


# --- traps of its own -------------------------------------------------------------------------------


@pytest.mark.parametrize(("code", "length"), [("0f a2", 2), ("f3 0f a2", 3), ("66 66 0f a2", 4)])
def test_cpuid_traps_and_the_handler_may_go_anywhere(unicorn: BareMachine, code: str, length: int) -> None:
    trap, rip = unicorn.first_trap(code)
    assert (trap, rip) == ((TRAP_CPUID, 0, 0), length)
    cpu = cpu_of(unicorn)
    cpu.regs[RAX] = 5
    unicorn.write_code("48 ff c0" + SYSCALL, offset=length)
    assert run_to_trap(cpu) == (TRAP_SYSCALL, 0, 0)
    assert cpu.regs[RAX] == 6


VEX_ENCODED = {
    "vpaddd xmm1, xmm2, xmm3": "c5 e9 fe cb",
    "vmovd xmm0, eax": "c5 f9 6e c0",
    "vzeroupper": "c5 f8 77",
    "vpaddd ymm1, ymm2, ymm3": "c5 ed fe cb",
    "vpalignr xmm1, xmm2, xmm3, 4": "c4 e3 69 0f cb 04",
    "vpshufb xmm1, xmm2, xmm3": "c4 e2 69 00 cb",
    "vldmxcsr [rip]": "c5 f8 ae 15 00 00 00 00",
    "kmovw k1, eax": "c5 f8 92 c8",
    "gs: vmovd xmm0, [rax]": "65 c5 f9 6e 00",
    "addr32 vmovd xmm0, [eax]": "67 c5 f9 6e 00",
    "rex.w vmovd xmm0, eax": "48 c5 f9 6e c0",
}


@pytest.mark.parametrize("code", VEX_ENCODED.values(), ids=VEX_ENCODED.keys())
def test_vex_encoded_vector_instructions_are_undefined(unicorn: BareMachine, code: str) -> None:
    """Wherever they stand in a block, and again when it is executed again."""
    for before in ("", "90 31 c0"):
        assert unicorn.first_trap(before + code) == ((VECTOR_UD, 0, 0), len(bytes.fromhex(before)))
    assert run_to_trap(cpu_of(unicorn)) == (VECTOR_UD, 0, 0)


def test_les_and_lds_are_what_they_were_in_32_bit_code(unicorn: BareMachine) -> None:
    for code in ("c4 01", "c5 01"):  # les eax, [ecx]; lds eax, [ecx]
        cpu = unicorn.start(code)
        cpu.regs[RCX] = 0x7000_0000
        cpu.regs[CS + 2] = layout.FLAT_CODE32 << 32 | 0xFFFF_FFFF
        cpu._d[layout.HFLAGS // 4] &= ~layout.HF_CS64
        assert run_to_trap(cpu)[0] == VECTOR_PF


def test_sysenter_and_int1_trap(unicorn: BareMachine) -> None:
    assert unicorn.first_trap("0f 34") == ((TRAP_SYSENTER, 0, 0), 2)
    trap, rip = unicorn.first_trap("f1")
    assert (trap[0], rip) == (VECTOR_DB, 1)


def test_a_debug_trap_says_why(unicorn: BareMachine) -> None:
    cpu = unicorn.start("90 90")
    cpu.set_rflags(0x302)
    vector, _, dr6 = run_to_trap(cpu)
    assert vector == VECTOR_DB
    assert dr6 & 0x400F == 0x4000  # BS
    cpu.set_rflags(0x202)
    cpu.set_debug(6, 0)
    cpu.set_debug(3, CODE + 1)
    cpu.set_debug(7, 1 << 6)
    cpu.regs[RIP] = CODE
    assert run_to_trap(cpu)[2] & 0x400F == 8  # B3


def test_a_far_return_stays_in_the_ring(unicorn: BareMachine) -> None:
    # push CODE64; push the address behind; retfq
    trap, rip = unicorn.first_trap("6a 1b 68 0a 00 40 00 48 cb 90" + SYSCALL)
    assert (trap[0], rip) == (TRAP_SYSCALL, 12)


def test_the_guests_own_iret_works_within_its_ring(unicorn: BareMachine) -> None:
    # push SS, RSP, flags, CODE64, the address behind; iretq
    cpu = unicorn.start("6a 0b 68 00 08 80 00 68 02 02 00 00 6a 1b 68 15 00 40 00 48 cf" + SYSCALL)
    assert run_to_trap(cpu)[0] == TRAP_SYSCALL
    assert (cpu.regs[RSP], cpu.regs[CS] & 0xFFFF, cpu.regs[SS] & 0xFFFF) == (0x80_0800, CODE64, DATA32)


@pytest.mark.parametrize(
    "frame",
    [
        *((CODE + 2, FLAT_RING3_CS64, flags, STACK_TOP, FLAT_RING3_SS64) for flags in (0, 0x202, 0x8D7, 0x3202)),
        *((CODE + 2, FLAT_RING3_CS64, flags, 0x1234, FLAT_RING3_SS64) for flags in (0x302, 0x4202, 0x1_0202, 1 << 63)),
        (CODE + 2, FLAT_RING3_CS64, 0x4_0202, STACK_TOP, FLAT_RING3_SS64),
        (CODE + 2, CODE64, 0x202, STACK_TOP, FLAT_RING3_SS64),
        (CODE + 2, FLAT_RING3_CS64, 0x202, STACK_TOP, DATA32),
        (CODE + 2, 0xABCD_0000 | FLAT_RING3_CS64, 0x202, STACK_TOP, 1 << 63 | FLAT_RING3_SS64),
        (CODE + 2, 8, 0x202, STACK_TOP, FLAT_RING3_SS64),
        (1 << 47, FLAT_RING3_CS64, 0x202, STACK_TOP, FLAT_RING3_SS64),
    ],
    ids=str,
)
@pytest.mark.parametrize("rsp", [STACK_TOP - 40, STACK_TOP - 44, STACK_TOP - 0x1000 + 1, STACK_TOP - 8, 1 << 47])
@pytest.mark.parametrize("flags", [0x202, 0x4202, 0xAD7], ids=hex)
def test_an_iret_in_c_leaves_what_one_in_python_does(
    unicorn: BareMachine, frame: tuple[int, ...], rsp: int, flags: int
) -> None:
    cpu = cpu_of(unicorn)
    if deliver.library() is None:
        pytest.skip("no native code here")
    seen = []
    for in_c in (True, False):
        state = unicorn.state()
        unicorn.write_code("48 cf" + SYSCALL)
        stack = page_walk.machine_address(unicorn.memory, unicorn.kernel_l4, STACK_TOP - 0x1000)
        assert stack is not None
        unicorn.memory.b[stack : stack + 0x1000] = bytes(0x1000)
        start = stack + (rsp - STACK_TOP + 0x1000) % 0x1000
        data = pack("<5Q", *frame)[: stack + 0x1000 - start]
        unicorn.memory.b[start : start + len(data)] = data
        state.regs[RSP], state.regs[RFLAGS] = rsp, flags
        cpu.load(state)
        cpu._hook.memory_size = unicorn.memory.size if in_c else 0  # none: it finds nothing to carry out
        cpu.kernels_far_transfers = 0
        trap = run_to_trap(cpu)
        seen.append((trap, cpu.get_rflags(), cpu.kernels_far_transfers, cpu.regs.tolist()))
    assert seen[0] == seen[1]


@pytest.mark.parametrize("in_c", [True, False])
@pytest.mark.parametrize(
    ("count", "between", "serializes"),
    [(deliver.SERIALIZES + 1, "90 90", True), (deliver.SERIALIZES, "90 90", False), (1000, SYSCALL, False)],
)
def test_a_kernel_that_serializes_by_iret_is_known(
    unicorn: BareMachine, in_c: bool, count: int, between: str, serializes: bool
) -> None:
    cpu, frame = cpu_of(unicorn), STACK_TOP - 40
    unicorn.write_code(f"48 cf {between} ff cb 75 f8 0f 0b")  # again: iretq to what follows; dec ebx; jne again; ud2
    stack = page_walk.machine_address(unicorn.memory, unicorn.kernel_l4, frame)
    assert stack is not None
    unicorn.memory.b[stack : stack + 40] = pack("<5Q", CODE + 2, FLAT_RING3_CS64, 0x202, frame, FLAT_RING3_SS64)
    state = unicorn.state()
    state.regs[RSP], state.regs[RBX] = frame, count
    cpu.load(state)
    if not in_c:
        cpu._hook.memory_size = 0
    cpu.run(lambda vector, *_: vector != VECTOR_UD)
    assert cpu.regs[RBX] == 0
    if in_c and deliver.library() is not None:
        assert cpu.kernels_far_transfers >= count - 1  # the first has Python set accessed bits
    assert cpu.serializes == serializes


def test_a_guest_kernel_is_entered_in_64_bit_code_even_if_the_program_jumped_to_32_bit_code(
    unicorn: BareMachine,
) -> None:
    # push CODE32; push the address behind; retfq; int3 (32-bit code)
    cpu = unicorn.start("6a 13 68 09 00 40 00 48 cb cc", user=True)
    unicorn.write_code("48 ff c0" + SYSCALL)  # inc rax; as 32-bit code, dec eax; inc eax
    run_to_trap(cpu)
    assert cpu.regs[CS] & 0xFFFF == CODE32
    cpu.switch_mode(unicorn.kernel_l4, False)
    cpu.regs[CS], cpu.regs[SS] = 0xE033, 0xE02B
    cpu.regs[RIP], cpu.regs[RAX] = CODE, 0xFFFF_FFFF
    run_to_trap(cpu)
    assert cpu.regs[RAX] == 1 << 32


def test_descriptors_read_in_one_mode_do_not_serve_the_other(unicorn: BareMachine) -> None:
    """The processor's own reads have a TLB apart; the modes must not see each other's through it."""
    tables = []
    for user, base in ((False, 0x11), (True, 0x22)):
        table = unicorn.map_new(0xFFFF_8300_0000_0000, unicorn.l4s[user])
        unicorn.memory.q[(table << 9) + 1] = 0x00CF_F300_0000_FFFF | base << 16
        tables.append(table)
        unicorn.write_code("8e e0" + SYSCALL, user)  # mov fs, eax
    cpu = unicorn.start("8e e0" + SYSCALL)
    state = unicorn.state()
    state.gdt_va = 0xFFFF_8300_0000_0000
    cpu.load(state)
    found = []
    for user in (False, True, False, True):
        cpu.switch_mode(unicorn.l4s[user], user)
        cpu.regs[RIP], cpu.regs[RAX] = CODE, 0x0B
        run_to_trap(cpu)
        found.append(cpu.regs[FS_BASE])
    assert found == [0x11, 0x22, 0x11, 0x22]


# --- swapping vCPUs ---------------------------------------------------------------------------------


def test_swapped_vcpus_each_find_all_of_their_state(unicorn: BareMachine) -> None:
    code = "48 ff c3 f2 0f 58 c9 f8" + SYSCALL + "eb f4"  # again: inc rbx; addsd xmm1, xmm1; clc; syscall; jmp again
    unicorn.write_code(code)
    unicorn.write_code(code, user=True)
    states = [unicorn.state(user=number == 2) for number in range(3)]
    cpu = cpu_of(unicorn)
    for number, state in enumerate(states):
        state.regs[RBX] = 1000 * number
        state.regs[FS_BASE], state.regs[GS_BASE] = 0x1000 + number, 0x2000 + number
        state.debug[0] = 0x5000 + number
        state.task_switched = number == 1
        state.regs[RFLAGS] = 0x202 | (number == 1) << 10
    cpu.load(states[0])
    current = 0
    for turn in range(1, 10):
        for number, state in enumerate(states):
            if number != current:
                cpu.swap(states[current], state)
                current = number
            if number == 1:
                cpu.set_task_switched(False)
            assert run_to_trap(cpu)[0] == TRAP_SYSCALL
            if number == 1:
                cpu.set_task_switched(True)
            assert cpu.regs[RBX] == 1000 * number + turn
            assert (cpu.regs[FS_BASE], cpu.regs[GS_BASE]) == (0x1000 + number, 0x2000 + number)
    for number, state in enumerate(states):
        cpu.store(state)
        assert state.regs[RBX] == 1000 * number + 9
        assert (state.user, state.task_switched, state.debug[0]) == (number == 2, number == 1, 0x5000 + number)
        assert state.regs[RFLAGS] & 0x400 == (number == 1) << 10


def test_a_breakpoint_on_data_is_that_of_the_vcpu_that_armed_it(unicorn: BareMachine) -> None:
    code = "ff 05 fa ff 1f 00 48 ff c3" + SYSCALL + "eb f3"  # again: inc dword [DATA]; inc rbx; syscall; jmp again
    unicorn.write_code(code)
    states = [unicorn.state() for _ in range(3)]
    states[1].debug[2], states[1].debug[7] = DATA, 0x410 | 0b1101 << 24  # written: four bytes
    cpu = cpu_of(unicorn)
    cpu.load(states[0])
    current = 0
    for number in (0, 1, 2, 1, 0, 1, 1):
        if number != current:
            cpu.swap(states[current], states[number])
            current = number
        cpu.regs[RIP] = CODE
        if number == 1:
            assert run_to_trap(cpu) == (VECTOR_DB, 0, 0xFFFF_0FF4)
            assert cpu.regs[RIP] == CODE + 6
        assert run_to_trap(cpu)[0] == TRAP_SYSCALL
    assert unicorn.memory.d[unicorn.data[0] << 10] == 7
    cpu.set_debug(7, 0x400)
    assert run_to_trap(cpu)[0] == TRAP_SYSCALL


def test_a_state_that_was_swapped_off_can_be_stored_complete_and_moved(unicorn: BareMachine) -> None:
    cpu = cpu_of(unicorn)
    unicorn.start("f2 0f 2a c8" + SYSCALL + "f2 0f 2c d1" + SYSCALL)  # xmm1 = eax; syscall; edx = xmm1
    first, second = unicorn.state(), unicorn.state()
    cpu.load(first)
    cpu.regs[RAX] = 77
    run_to_trap(cpu)
    cpu.swap(first, second)
    cpu.regs[RAX] = 5
    run_to_trap(cpu)
    cpu.store(first)  # not the one that is loaded
    other = BareMachine("unicorn")
    other.write_code("f2 0f 2c d1" + SYSCALL)
    first.regs[RIP], first.l4_mfn = CODE, other.kernel_l4
    moved = other.engine.cpu(0)
    moved.load(first)
    run_to_trap(moved)
    assert moved.regs[RDX] == 77
    other.close()


def test_what_ring_0_changes_in_a_state_that_is_off_counts_when_it_is_back(unicorn: BareMachine) -> None:
    cpu = cpu_of(unicorn)
    unicorn.start(SYSCALL)
    first, second = unicorn.state(), unicorn.state()
    cpu.load(first)
    cpu.swap(first, second)
    first.regs[RAX], first.regs[RIP], first.regs[GS_BASE], first.user = 9, CODE + 0x40, DATA, True
    first.l4_mfn = unicorn.user_l4
    unicorn.write_code("65 48 8b 1c 25 00 00 00 00" + SYSCALL, user=True, offset=0x40)  # mov rbx, gs:[0]
    unicorn.memory.q[unicorn.data[1] << 9] = 123
    cpu.swap(second, first)
    run_to_trap(cpu)
    assert (cpu.regs[RAX], cpu.regs[RBX]) == (9, 123)


def test_flags_of_a_vcpu_taken_off_in_the_middle_of_a_trap_are_its_own(unicorn: BareMachine) -> None:
    """Condition codes are computed lazily: a swap inside the handler must not mix two vCPUs' up."""
    unicorn.write_code("31 c0 cc 0f 94 c3" + SYSCALL)  # xor eax, eax (sets ZF); int3; setz bl
    unicorn.write_code("0c 01 cc 0f 94 c3" + SYSCALL, offset=0x80)  # or al, 1 (clears ZF); int3; setz bl
    first, second = unicorn.state(), unicorn.state()
    second.regs[RIP] = CODE + 0x80
    cpu = cpu_of(unicorn)
    cpu.load(first)
    results: list[int] = []

    def on_trap(vector: int, error_code: int, address: int) -> bool:
        on, off = (first, second) if len(results) % 2 == 0 else (second, first)
        results.append(cpu.regs[RBX] & 0xFF if vector == TRAP_SYSCALL else 0xEE)
        if len(results) < 4:
            cpu.swap(on, off)
        return len(results) < 4

    first.regs[RBX] = second.regs[RBX] = 0xEE
    cpu.run(on_trap)
    assert results == [0xEE, 0xEE, 1, 0]


# --- CPUID ------------------------------------------------------------------------------------------

# feature: (leaf, register, bit), an instruction of it
INSTRUCTIONS = {
    "PCLMULQDQ": ((1, features.ECX, 1), "66 0f 3a 44 d1 01"),
    "SSSE3": ((1, features.ECX, 9), "66 0f 38 00 d1"),
    "CX16": ((1, features.ECX, 13), "48 0f c7 0f"),
    "SSE4.1": ((1, features.ECX, 19), "66 0f 38 40 d1"),
    "SSE4.2": ((1, features.ECX, 20), "66 0f 3a 63 d1 01"),
    "MOVBE": ((1, features.ECX, 22), "48 0f 38 f0 07"),
    "POPCNT": ((1, features.ECX, 23), "f3 48 0f b8 d8"),
    "AES": ((1, features.ECX, 25), "66 0f 38 dc d1"),
    "XSAVE": ((1, features.ECX, 26), "48 0f ae 27"),
    "RDRAND": ((1, features.ECX, 30), "48 0f c7 f0"),
    "FMA": ((1, features.ECX, 12), "c4 e2 f1 98 d1"),
    "AVX": ((1, features.ECX, 28), "c5 f4 58 d1"),
    "F16C": ((1, features.ECX, 29), "c4 e2 7d 13 d1"),
    "SEP": ((1, features.EDX, 11), "0f 34"),
    "FSGSBASE": ((7, features.EBX, 0), "f3 48 0f ae c0"),
    "BMI1": ((7, features.EBX, 3), "c4 e2 e0 f2 c8"),
    "AVX2": ((7, features.EBX, 5), "c5 f5 fe d1"),
    "BMI2": ((7, features.EBX, 8), "c4 e2 f9 f7 cb"),
    "RDSEED": ((7, features.EBX, 18), "48 0f c7 f8"),
    "ADX": ((7, features.EBX, 19), "66 48 0f 38 f6 d8"),
    "CLFLUSHOPT": ((7, features.EBX, 23), "66 0f ae 3f"),
    "CLWB": ((7, features.EBX, 24), "66 0f ae 37"),
    "SHA": ((7, features.EBX, 29), "0f 38 c9 d1"),
    "RDPID": ((7, features.ECX, 22), "f3 48 0f c7 f8"),
    "SERIALIZE": ((7, features.EDX, 14), "0f 01 e8"),
    "LAHF": ((0x8000_0001, features.ECX, 0), "9f"),
    "LZCNT": ((0x8000_0001, features.ECX, 5), "f3 48 0f bd d8"),
    "PREFETCHW": ((0x8000_0001, features.ECX, 8), "0f 0d 0f"),
    "RDTSCP": ((0x8000_0001, features.EDX, 27), "0f 01 f9"),
    "3DNow!": ((0x8000_0001, features.EDX, 31), "0f 0f c8 9e"),
    "XSAVEOPT": ((0xD, features.EAX, 0), "48 0f ae 37"),
    "XSAVEC": ((0xD, features.EAX, 1), "48 0f c7 27"),
}


@pytest.mark.parametrize("feature", INSTRUCTIONS)
def test_cpuid_tells_of_an_instruction_exactly_if_it_executes(unicorn: BareMachine, feature: str) -> None:
    (leaf, register, bit), code = INSTRUCTIONS[feature]
    told = unicorn.engine.host_cpuid(leaf, leaf == 0xD)[register] >> bit & 1
    cpu = unicorn.start(code + SYSCALL)
    cpu.regs[RDI] = cpu.regs[RSI] = DATA
    cpu.regs[RAX] = cpu.regs[RDX] = 3
    assert (run_to_trap(cpu)[0] != VECTOR_UD) == told


def test_adx_adds_with_its_own_carry(unicorn: BareMachine) -> None:
    cpu = unicorn.start("f9 66 48 0f 38 f6 d8 48 0f 42 c8" + SYSCALL)  # stc; adcx rbx, rax; cmovc rcx, rax
    cpu.regs[RAX], cpu.regs[RBX], cpu.regs[RCX] = (1 << 64) - 2, 5, 0
    run_to_trap(cpu)
    assert (cpu.regs[RBX], cpu.regs[RCX]) == (4, (1 << 64) - 2)


def test_slow_string_operations_are_not_called_fast(unicorn: BareMachine) -> None:
    assert unicorn.engine.host_cpuid(7, 0)[features.EBX] >> 9 & 1 == 0  # ERMS
    assert unicorn.engine.host_cpuid(7, 0)[features.EDX] >> 4 & 1 == 0  # FSRM


# --- stale code -------------------------------------------------------------------------------------


def test_unchanged_code_keeps_its_translation_and_changed_code_loses_it(unicorn: BareMachine) -> None:
    """`executable_mapped` looks at the frame's contents; `code_written` makes the next look distrust them."""
    alias = 0x58_0000
    unicorn.set_entry(alias, unicorn.code[0] << 12 | ACCESS | PTE_NX)
    cpu = unicorn.start("b8 01 00 00 00" + SYSCALL)  # mov eax, 1
    contents = unicorn.memory.page(unicorn.code[0])

    def result() -> int:
        cpu.regs[RIP] = CODE
        run_to_trap(cpu)
        return cpu.regs[RAX]

    cpu.executable_mapped(unicorn.code[0])
    assert result() == 1
    contents[1] = 2
    cpu.code_written(unicorn.code[0])
    assert result() == 2
    contents[1] = 1  # what it was at the last look
    cpu.executable_mapped(unicorn.code[0])
    assert result() == 1


def test_ports_fault_whatever_their_width_and_the_guest_may_be_sent_on(unicorn: BareMachine) -> None:
    for code in ("ec", "66 ed", "ed", "ee", "66 ef", "ef", "6c", "6e", "f3 6c"):
        cpu = unicorn.start(code)
        cpu.regs[RDX], cpu.regs[RSI], cpu.regs[RDI], cpu.regs[RCX] = 0x3F8, DATA, DATA, 1
        assert run_to_trap(cpu) == (VECTOR_GP, 0, 0), code
        assert cpu.regs[RIP] == CODE


@pytest.mark.parametrize("user", [False, True])
def test_a_store_through_a_mapping_without_execution_right_is_noticed_at_once(unicorn: BareMachine, user: bool) -> None:
    """A debugger's breakpoint, set and taken back through the kernel's direct map: no page table changes."""
    alias = 0x58_0000
    unicorn.set_entry(alias, unicorn.code[user] << 12 | ACCESS | PTE_NX, unicorn.l4s[0])
    cpu = unicorn.start("88 1c 25 01 01 58 00 88 1c 25 81 01 58 00" + SYSCALL)  # mov [alias + 0x101], bl; + 0x181
    for offset in (0x100, 0x180):
        unicorn.write_code("b8 00 00 00 00" + SYSCALL, user, offset)  # mov eax, 0 (the byte that is stored)
    cpu.load(unicorn.state())
    for number in range(1, 40):
        cpu.switch_mode(unicorn.l4s[0], False)
        cpu.regs[RIP], cpu.regs[RBX] = CODE, number
        run_to_trap(cpu)
        cpu.switch_mode(unicorn.l4s[user], user)
        for offset in (0x100, 0x180):
            cpu.regs[RIP] = CODE + offset
            run_to_trap(cpu)
            assert cpu.regs[RAX] == number


def test_a_page_of_old_code_overwritten_through_an_alias_leaves_no_old_block(unicorn: BareMachine) -> None:
    """Many blocks in one page; rep stosq over all of it through a mapping without execution right; then new code."""
    alias = 0x58_0000
    page = unicorn.map_new(0x57_0000)
    unicorn.set_entry(alias, page << 12 | ACCESS | PTE_NX)
    block = bytes.fromhex("b8 00 00 00 00 0f 05 90")  # mov eax, n; syscall
    cpu = unicorn.start("f3 48 ab" + SYSCALL)  # rep stosq
    for number in range(1, 12):
        pattern = bytearray(block)
        pattern[1] = number
        cpu.regs[RIP], cpu.regs[RDI], cpu.regs[RCX] = CODE, alias, 512
        cpu.regs[RAX] = int.from_bytes(pattern, "little")
        run_to_trap(cpu)
        for offset in range(0, 4096, 136):
            cpu.regs[RIP], cpu.regs[RAX] = 0x57_0000 + offset, 0
            run_to_trap(cpu)
            assert cpu.regs[RAX] == number


def test_data_on_a_page_with_code_is_stored_and_the_code_stays_right(unicorn: BareMachine) -> None:
    # again: inc dword [rip + 0x100]; dec ecx; jnz again; syscall
    cpu = unicorn.start("ff 05 fa 00 00 00 ff c9 75 f6" + SYSCALL)
    cpu.regs[RCX] = 5000
    run_to_trap(cpu)
    assert unicorn.memory.d[(unicorn.code[0] << 10) + 0x40] == 5000
