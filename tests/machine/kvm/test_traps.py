"""What ring 0 is told when ring-3 code on KVM stops by itself."""

from __future__ import annotations

import pytest

from xenolith.abi.x86 import (
    EFLAGS_IF,
    EFLAGS_TF,
    FS,
    FS_BASE,
    GS_BASE,
    R11,
    RAX,
    RBX,
    RCX,
    RDI,
    RDX,
    RIP,
    RSP,
    VECTOR_BP,
    VECTOR_DB,
    VECTOR_DE,
    VECTOR_GP,
    VECTOR_PF,
    VECTOR_UD,
)
from xenolith.machine.engines.kvm import area
from xenolith.machine.engines.protocol import TRAP_SYSCALL

from .bare import CODE, DATA, GDT, STACK_TOP, Machine, run_to_trap


def test_every_general_register_goes_in_and_comes_out(machine: Machine) -> None:
    cpu = machine.cpu()
    values = {register: 0x1011_1111_1111_1111 * register | 4 for register in range(16)}
    for register, value in values.items():
        cpu.regs[register] = value
    # inc of every register but rsp, then ud2
    code = "48 ff c0 48 ff c1 48 ff c2 48 ff c3 48 ff c5 48 ff c6 48 ff c7"
    code += "49 ff c0 49 ff c1 49 ff c2 49 ff c3 49 ff c4 49 ff c5 49 ff c6 49 ff c7 0f 0b"
    assert machine.execute(cpu, code) == (VECTOR_UD, 0, 0)
    for register, value in values.items():
        assert cpu.regs[register] == (value if register == RSP else value + 1), register
    assert cpu.regs[RIP] == CODE + 45


def test_a_page_fault_tells_address_and_kind_of_access(machine: Machine) -> None:
    cpu = machine.cpu()
    cpu.regs[RDI] = 0x7FFF_1234_5678
    assert machine.execute(cpu, "48 8b 07") == (VECTOR_PF, 4, 0x7FFF_1234_5678)
    assert machine.execute(cpu, "48 89 07") == (VECTOR_PF, 6, 0x7FFF_1234_5678)
    assert machine.execute(cpu, "ff e7") == (VECTOR_PF, 0x14, 0x7FFF_1234_5678)


def test_a_syscall_arrives_after_the_instruction_with_its_flags(machine: Machine) -> None:
    cpu = machine.cpu()
    cpu.set_rflags(0x8D5 | EFLAGS_IF)
    cpu.regs[RSP] = STACK_TOP - 64
    assert machine.execute(cpu, "0f 05") == (TRAP_SYSCALL, 0, 0)
    assert cpu.regs[RIP] == CODE + 2
    assert cpu.regs[RCX] == CODE + 2
    assert cpu.regs[R11] == cpu.get_rflags() == 0x8D5 | EFLAGS_IF | 2
    assert cpu.regs[RSP] == STACK_TOP - 64


def test_the_handler_decides_where_the_guest_goes_on(machine: Machine) -> None:
    cpu = machine.cpu()
    machine.write_code("0f 05 0f 0b")
    seen: list[int] = []

    def on_trap(vector: int, _error_code: int, _address: int) -> bool:
        seen.append(vector)
        cpu.regs[RAX] += 1
        if len(seen) < 5:
            cpu.regs[RIP] = CODE  # once more
        return len(seen) < 6

    cpu.run(on_trap)
    assert seen == [TRAP_SYSCALL] * 5 + [VECTOR_UD]
    assert cpu.regs[RAX] == 6


@pytest.mark.parametrize(
    ("code", "trap", "rip"),
    [
        ("cc", (VECTOR_BP, 0, 0), 1),
        ("cd 03", (VECTOR_BP, 0, 0), 2),
        ("31 c9 f7 f1", (VECTOR_DE, 0, 0), 2),
        ("fa", (VECTOR_GP, 0, 0), 0),
        ("f4", (VECTOR_GP, 0, 0), 0),
        ("0f 20 d8", (VECTOR_GP, 0, 0), 0),
        ("0f 01 f8", (VECTOR_GP, 0, 0), 0),
        ("e6 80", (VECTOR_GP, 0, 0), 0),
        ("ec", (VECTOR_GP, 0, 0), 0),
    ],
    ids=["int3", "int 3", "div", "cli", "hlt", "mov cr3", "swapgs", "out", "in"],
)
def test_exceptions_and_privileged_instructions(
    machine: Machine, code: str, trap: tuple[int, int, int], rip: int
) -> None:
    cpu = machine.cpu()
    assert machine.execute(cpu, code) == trap
    assert cpu.regs[RIP] == CODE + rip


@pytest.mark.parametrize("number", [0, 1, 6, 13, 14, 32, 0x80, 0x82, 0xFB, 0xFF])
def test_int_n_is_a_general_protection_fault_and_forges_no_trap(machine: Machine, number: int) -> None:
    cpu = machine.cpu()
    vector, error_code, _ = machine.execute(cpu, f"cd {number:02x}")
    assert vector == VECTOR_GP
    if error_code == number << 4 | 2 and cpu.regs[RIP] == CODE + 2:
        pytest.skip("an emulated processor, QEMU's, which gives an error code and an RIP of its own")
    assert (error_code, cpu.regs[RIP]) == (number << 3 | 2, CODE)


def test_an_undefined_opcode_stays_one(machine: Machine) -> None:
    cpu = machine.cpu()
    assert machine.execute(cpu, "0f 0b 78 65 6e 0f a2") == (VECTOR_UD, 0, 0)  # Xen's forced emulation prefix
    assert cpu.regs[RIP] == CODE


def test_single_steps(machine: Machine) -> None:
    cpu = machine.cpu()
    machine.write_code("48 ff c0 48 ff c0 0f 0b")
    cpu.regs[RAX] = 0
    cpu.set_rflags(EFLAGS_TF)
    assert run_to_trap(cpu)[0] == VECTOR_DB
    assert (cpu.regs[RIP], cpu.regs[RAX]) == (CODE + 3, 1)
    assert cpu.get_rflags() & EFLAGS_TF
    assert run_to_trap(cpu)[0] == VECTOR_DB
    cpu.set_rflags(0)
    assert run_to_trap(cpu)[0] == VECTOR_UD
    assert cpu.regs[RAX] == 2


def test_the_guest_always_runs_with_interrupts_on_and_without_io_privilege(machine: Machine) -> None:
    cpu = machine.cpu()
    cpu.set_rflags(0x3000)
    machine.execute(cpu, "9c 58 0f 0b")  # pushf; pop rax; ud2
    assert cpu.regs[RAX] & 0x3000 == 0
    assert cpu.regs[RAX] & EFLAGS_IF


@pytest.mark.parametrize("rip", [0x8000_0000_0000, 0x1234_5678_9ABC_DEF0, 0xFFFF_7FFF_FFFF_FFFF])
def test_a_non_canonical_rip_is_a_general_protection_fault(machine: Machine, rip: int) -> None:
    cpu = machine.cpu()
    cpu.regs[RIP] = rip
    assert run_to_trap(cpu) == (VECTOR_GP, 0, 0)
    assert cpu.regs[RIP] == rip
    cpu.regs[RCX] = rip
    assert machine.execute(cpu, "ff e1")[0] == VECTOR_GP  # jmp rcx


def test_l4_slot_256_is_either_readable_or_faults_with_its_address(machine: Machine) -> None:
    address = 0xFFFF_8000_0000_0000
    machine.map_new(address)
    cpu = machine.cpu()
    cpu.regs[RDI] = address
    vector, _, fault = machine.execute(cpu, "48 8b 07 0f 0b")
    assert vector == VECTOR_UD or (vector, fault) == (VECTOR_PF, address)


# --- the engine's own pages, which a hostile guest can try ---------------------------------------------


def test_jumping_to_the_system_call_page_is_no_more_than_a_system_call(machine: Machine) -> None:
    cpu = machine.cpu()
    machine.write_code("0f 0b")
    cpu.regs[RCX] = 0x1234_5678_9ABC_DEF0  # where a real SYSCALL would have come from
    cpu.regs[R11] = 0x3_FFFF
    cpu.regs[RIP] = area.SYSCALL_PAGE
    vector, _, _ = run_to_trap(cpu)
    if vector == TRAP_SYSCALL:
        assert cpu.regs[RIP] == 0x1234_5678_9ABC_DEF0
        assert cpu.get_rflags() & 0x3000 == 0  # no I/O privilege
        assert run_to_trap(cpu) == (VECTOR_GP, 0, 0)
    else:
        assert vector in (VECTOR_GP, VECTOR_PF)
    assert machine.execute(cpu) == (VECTOR_UD, 0, 0)


@pytest.mark.parametrize(
    ("code", "length"),
    [("e6 fb", 0), ("e7 fb", 0), ("ee", 0), ("ef", 0), ("e4 fb", 0), ("e5 fb", 0), ("ec", 0), ("ed", 0)],
)
def test_the_port_of_the_system_call_page_is_no_port_for_the_guest(machine: Machine, code: str, length: int) -> None:
    cpu = machine.cpu()
    cpu.regs[RDX] = area.PORT_SYSCALL
    cpu.regs[RAX] = 0x1122_3344_5566_7788
    assert machine.execute(cpu, code + " 0f 0b") == (VECTOR_GP, 0, 0)
    assert cpu.regs[RIP] == CODE + length
    assert cpu.regs[RAX] == 0x1122_3344_5566_7788
    assert machine.execute(cpu, "48 ff c0 0f 0b") == (VECTOR_UD, 0, 0)
    assert cpu.regs[RAX] == 0x1122_3344_5566_7789


@pytest.mark.parametrize("port", [0, 3, 13, 14, 0x40, 0x41, 0xF8, 0xFA, 0xFC, 0x100, 0xFFFF])
def test_no_other_port_can_be_reached(machine: Machine, port: int) -> None:
    cpu = machine.cpu()
    cpu.regs[RDX] = port
    assert machine.execute(cpu, "ee") == (VECTOR_GP, 0, 0)
    assert cpu.regs[RIP] == CODE


@pytest.mark.parametrize(
    "address",
    [area.IDT, area.TRAP_STUBS, area.GDT, area.ENTRY_STUBS, area.PER_CPU, area.PER_CPU + 0x1000, area.ALIAS],
)
def test_the_hypervisor_area_is_out_of_reach(machine: Machine, address: int) -> None:
    cpu = machine.cpu()
    cpu.regs[RDI] = address
    for code in ("48 8b 07", "48 89 07", "ff e7"):
        vector, _, fault = machine.execute(cpu, code)
        assert (vector, fault) == (VECTOR_PF, address)
    cpu.regs[RDI] = area.SYSCALL_PAGE
    assert machine.execute(cpu, "48 89 07")[0] == VECTOR_PF


# --- segments ----------------------------------------------------------------------------------------


def test_segment_bases_follow_the_register_file(machine: Machine) -> None:
    cpu = machine.cpu()
    machine.set_word(0x11, 0)
    machine.set_word(0x22, 1)
    cpu.regs[FS_BASE] = DATA
    cpu.regs[GS_BASE] = DATA + 8
    machine.execute(cpu, "64 48 8b 04 25 00 00 00 00 65 48 8b 1c 25 00 00 00 00 0f 0b")
    assert (cpu.regs[RAX], cpu.regs[RBX]) == (0x11, 0x22)
    cpu.regs[FS_BASE], cpu.regs[GS_BASE] = cpu.regs[GS_BASE], cpu.regs[FS_BASE]
    machine.execute(cpu)
    assert (cpu.regs[RAX], cpu.regs[RBX]) == (0x22, 0x11)


def test_loading_fs_takes_the_base_from_the_guests_own_table(machine: Machine) -> None:
    machine.set_descriptor(0x68, 0x0010_0FFF, 0x0040_F360)  # data, DPL 3, base 0x600010
    machine.set_word(0x77, 2)
    cpu = machine.cpu()
    cpu.regs[RAX] = 0x6B
    assert machine.execute(cpu, "8e e0 64 48 8b 1c 25 00 00 00 00 0f 0b")[0] == VECTOR_UD  # mov fs, eax
    assert cpu.regs[FS] == 0x6B
    assert cpu.regs[FS_BASE] == 0x60_0010
    assert cpu.regs[RBX] == 0x77


@pytest.mark.parametrize(
    "code",
    ["6a 6b 0f a1 0f 0b", "66 c7 07 6b 00 8e 27 0f 0b", "c7 07 44 33 22 11 c7 47 04 6b 00 00 00 0f b4 07 0f 0b"],
    ids=["pop fs", "mov fs, [rdi]", "lfs eax, [rdi]"],
)
def test_every_way_to_load_a_segment_register(machine: Machine, code: str) -> None:
    machine.set_descriptor(0x68, 0x0010_0FFF, 0x0040_F360)
    cpu = machine.cpu()
    cpu.regs[RDI] = DATA
    rsp = cpu.regs[RSP]
    assert machine.execute(cpu, code)[0] == VECTOR_UD
    assert (cpu.regs[FS], cpu.regs[FS_BASE]) == (0x6B, 0x60_0010)
    assert cpu.regs[RSP] == rsp
    if code.startswith("c7"):
        assert cpu.regs[RAX] == 0x1122_3344


def test_a_bad_selector_faults_as_the_processor_does(machine: Machine) -> None:
    machine.set_descriptor(0x68, 0x0000_FFFF, 0x00CF_9300)  # DPL 0
    cpu = machine.cpu()
    for selector in (0x6B, 0xFFB, 0x13, 0x6F):
        cpu.regs[RAX] = selector
        assert machine.execute(cpu, "8e e0 0f 0b") == (VECTOR_GP, selector & ~3, 0)
        assert cpu.regs[RIP] == CODE
        with pytest.raises(ValueError):
            cpu.set_segment(FS, selector)
        assert cpu.regs[FS] == 0


def test_32_bit_code_runs_and_its_int_0x80_is_seen(machine: Machine) -> None:
    machine.set_descriptor(0x20, 0x0000_FFFF, 0x00CF_FB00)
    machine.set_descriptor(0x28, 0x0000_FFFF, 0x00CF_F300)
    cpu = machine.cpu()
    cpu.set_code_stack(0x23, 0x2B)
    cpu.regs[RAX] = 7
    # inc eax (64-bit code would see a prefix); push eax; pop ebx; int 0x80
    assert machine.execute(cpu, "40 50 5b cd 80") == (VECTOR_GP, 0x402, 0)
    assert (cpu.regs[RAX], cpu.regs[RBX], cpu.regs[RIP]) == (8, 8, CODE + 3)
    assert machine.execute(cpu, "cc")[0] == VECTOR_BP
    assert cpu.regs[RIP] == CODE + 1
    cpu.set_code_stack(0xE033, 0xE02B)
    assert machine.execute(cpu, "48 ff c0 0f 0b")[0] == VECTOR_UD
    assert cpu.regs[RAX] == 9


def test_a_selector_whose_table_is_not_mapped_there_is_a_page_fault(machine: Machine) -> None:
    cpu = machine.cpu()
    cpu.set_ldt(GDT + 0x1000, 0x1FFF)
    cpu.regs[RAX] = 0x6F
    assert machine.execute(cpu, "8e e0 0f 0b") == (VECTOR_PF, 0, GDT + 0x1068)
    assert cpu.regs[RIP] == CODE
