"""A vCPU's state can be taken out complete and put on another virtual processor."""

from __future__ import annotations

import os

import pytest

from xenolith.abi.x86 import CS, DS, FS, FS_BASE, GS_BASE, PAGE_SHIFT, R15, RAX, RDI, RFLAGS, RIP, VECTOR_NM, VECTOR_UD
from xenolith.machine.cpuid import native_cpuid
from xenolith.machine.engines.kvm.traits import Counter
from xenolith.machine.engines.protocol import CpuState, EngineError
from xenolith.machine.tsc import read_tsc

from .bare import CODE, DATA, GDT, Machine

LOAD_WIDE = "c5 fe 6f 07 c5 fe 6f 6f 20 0f 0b"  # vmovdqu ymm0, [rdi]; vmovdqu ymm5, [rdi + 32]; ud2
SAVE_WIDE = "c5 fe 7f 47 40 c5 fe 7f 6f 60 0f 0b"


def test_all_of_the_register_file_moves(machine: Machine) -> None:
    first, second = machine.cpu(0), machine.cpu(1)
    machine.set_descriptor(0x68, 0x0000_0FFF, 0x0040_F300)
    for register in range(16):
        first.regs[register] = register + 1000
    first.set_segment(FS, 0x6B)
    first.regs[FS_BASE] = DATA
    first.regs[GS_BASE] = DATA + 8
    first.set_rflags(0x400)
    state = CpuState(gdt_va=GDT, gdt_limit=0xFFF)
    first.store(state)
    second.load(state)
    assert second.regs[: R15 + 1] == first.regs[: R15 + 1]
    assert (second.regs[FS], second.regs[FS_BASE], second.regs[GS_BASE]) == (0x6B, DATA, DATA + 8)
    assert second.get_rflags() & 0x400
    assert state.l4_mfn == machine.l4


def test_vector_registers_move_whole(machine: Machine) -> None:
    if not machine.engine.xcr0_mask & 4:
        pytest.skip("this processor has no AVX")
    first, second = machine.cpu(0), machine.cpu(1)
    data = os.urandom(64)
    start = machine.data[0] << PAGE_SHIFT
    machine.memory.b[start : start + 64] = data
    first.regs[RDI] = second.regs[RDI] = DATA
    machine.execute(first, LOAD_WIDE)
    first.store(machine.states[0])
    second.load(machine.states[0])
    machine.execute(second, SAVE_WIDE)
    assert machine.memory.b[start + 64 : start + 128] == data


def test_each_vcpu_has_vector_registers_of_its_own(machine: Machine) -> None:
    cpus = [machine.cpu(number) for number in range(3)]
    for number, cpu in enumerate(cpus):
        machine.set_word(number + 7)
        cpu.regs[RDI] = DATA
        machine.execute(cpu, "f3 0f 7e 07 0f 0b")  # movq xmm0, [rdi]
    for number, cpu in enumerate(cpus):
        machine.execute(cpu, "66 48 0f 7e c0 0f 0b")  # movq rax, xmm0
        assert cpu.regs[RAX] == number + 7


def test_a_fresh_state_has_the_fpu_as_after_reset(machine: Machine) -> None:
    cpu = machine.cpu()
    cpu.regs[RDI] = DATA
    machine.execute(cpu, "d9 3f 0f ae 5f 08 0f 0b")  # fnstcw [rdi]; stmxcsr [rdi + 8]
    assert machine.word(0) & 0xFFFF == 0x37F
    assert machine.word(1) & 0xFFFF_FFFF == 0x1F80


def test_what_guest_code_can_use_of_xsave_is_what_the_engine_says(machine: Machine) -> None:
    cpu = machine.cpu()
    state = machine.states[0]
    state.xcr0 = machine.engine.xcr0_mask
    cpu.load(state)
    cpu.regs[1] = 0
    cpu.regs[RIP] = CODE
    vector, _, _ = machine.execute(cpu, "0f 01 d0 0f 0b")  # xgetbv
    if vector == VECTOR_UD and cpu.regs[RIP] == CODE:
        assert machine.engine.xcr0_mask == 3
    else:
        assert cpu.regs[2] << 32 | cpu.regs[RAX] == machine.engine.xcr0_mask


def test_extended_state_that_the_host_lacks_is_refused(machine: Machine) -> None:
    cpu = machine.cpu()
    state = CpuState()
    state.xsave[512:520] = (1 << 40).to_bytes(8, "little")
    with pytest.raises(EngineError, match="XSAVE components 0x10000000000"):
        cpu.load(state)


def test_cpuid_is_reported_as_guest_code_sees_it(machine: Machine) -> None:
    cpu = machine.cpu()
    for leaf in (0, 1, 7, 0x8000_0000):
        cpu.regs[RAX], cpu.regs[1] = leaf, 0
        machine.execute(cpu, "0f a2 0f 0b")
        seen = [cpu.regs[register] & 0xFFFF_FFFF for register in (RAX, 3, 1, 2)]
        told = list(machine.engine.host_cpuid(leaf, 0))
        if leaf == 1:  # which processor this is, and OSXSAVE, vary
            seen[1], told[1] = seen[1] & 0xFFFF, told[1] & 0xFFFF
            seen[2], told[2] = seen[2] & ~(1 << 27), told[2] & ~(1 << 27)
        assert seen == told, hex(leaf)
    assert native_cpuid(0, 0)[0] > 0


def test_the_task_switched_flag_raises_nm_where_the_host_honours_it(machine: Machine) -> None:
    if not machine.engine.traits.traps_task_switched:
        pytest.skip("on this host CR0.TS has no effect on ring 3")
    cpu = machine.cpu()
    cpu.set_task_switched(True)
    assert machine.execute(cpu, "d9 e8 0f 0b")[0] == VECTOR_NM
    cpu.set_task_switched(False)
    assert machine.execute(cpu)[0] == VECTOR_UD


def test_a_selector_whose_descriptor_is_gone_is_null_after_loading(machine: Machine) -> None:
    cpu = machine.cpu()
    state = machine.states[0]
    state.regs[DS] = 0x6B
    state.regs[CS] = 0x73
    cpu.load(state)
    assert cpu.regs[DS] == 0
    assert cpu.regs[CS] == 0xE033


def test_a_state_that_no_processor_has_is_made_one(machine: Machine) -> None:
    """Reserved bits of MXCSR, an XSAVE header in another format, DR6 and DR7, bases, flags: KVM would refuse them."""
    cpu = machine.cpu()
    state = machine.states[0]
    state.xsave = cpu.extended_image()
    state.xsave[24:28] = b"\xff\xff\xff\xff"
    state.xsave[512:576] = bytes((3,)).ljust(8, b"\0") + b"\xff" * 56
    state.debug = [(1 << 64) - 1] * 8
    state.debug[:3] = 0x8000_0000_0000_0000, 0xFFFF_8080_0000_1000, DATA
    state.regs[FS_BASE], state.regs[GS_BASE] = 1 << 47, 1 << 63
    state.regs[RFLAGS] = (1 << 64) - 1
    cpu.load(state)
    cpu.set_rflags(0)
    cpu.regs[RDI] = DATA
    assert machine.execute(cpu, "0f ae 1f 0f 0b")[0] == VECTOR_UD  # stmxcsr [rdi]
    assert not machine.word() & 0xFFFF_FFFF & ~int.from_bytes(state.xsave[28:32], "little")  # MXCSR_MASK
    assert (cpu.regs[FS_BASE], cpu.regs[GS_BASE]) == (0, 0)
    cpu.store(state)
    cpu.load(state)


@pytest.mark.parametrize("xcr0", [0, 2, 5, 1 << 5 | 7, 1 << 3 | 3, 1 << 62 | 3])
def test_an_xcr0_that_no_processor_has_is_refused(machine: Machine, xcr0: int) -> None:
    with pytest.raises(EngineError, match="XCR0"):
        machine.cpu().set_xcr0(xcr0)


@pytest.mark.parametrize("how", Counter)
def test_guest_code_counts_as_the_host_does(machine: Machine, how: Counter) -> None:
    """Exactly, where the host can have that; else what differs is known."""
    counter = machine.engine.traits.counter
    if how is not counter and (counter is Counter.NATIVE or how is Counter.NATIVE):
        pytest.skip(f"on this host guest code reads {counter.value}")
    cpu = machine.cpu()
    assert cpu.try_counter(how)
    assert how is Counter.WRITTEN or cpu.tsc_offset == 0
    before = read_tsc()
    machine.execute(cpu, "0f 31 0f 0b")
    after = read_tsc()
    seen = (cpu.regs[2] << 32 | cpu.regs[RAX] & 0xFFFF_FFFF) - cpu.tsc_offset
    assert before <= seen <= after + 10_000_000
