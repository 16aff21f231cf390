"""Unicorn's software MMU with its frequent paths in C: nothing outlives a flush, whatever is kept across it.

The same tests hold without a compiler; the last one runs some of them there.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
from bare import ACCESS, CODE, BareMachine, cpu_of, run_to_trap

from xenolith.abi.x86 import (
    PTE_A,
    PTE_D,
    PTE_NX,
    PTE_P,
    PTE_RW,
    PTE_US,
    R15,
    RAX,
    RBX,
    RCX,
    RIP,
    RSI,
    VECTOR_PF,
)
from xenolith.machine import native
from xenolith.machine.engines.protocol import TRAP_SYSCALL
from xenolith.machine.engines.unicorn import instance

TARGET = 0x5A_0000
PAGES = 0x10_0000_0000  # where pages are mapped by the hundred
SYSCALL = "0f 05"
JUMP = "ff e0"  # jmp rax


@pytest.fixture
def machine() -> Iterator[BareMachine]:
    made = BareMachine("unicorn")
    yield made
    made.close()


def answer(number: int) -> str:
    """Code of a block: mov ebx, number; syscall."""
    return "bb" + number.to_bytes(4, "little").hex() + SYSCALL


def frame_with(machine: BareMachine, code: str, offset: int = 0) -> int:
    mfn = machine.frame()
    data = bytes.fromhex(code)
    machine.memory.page(mfn)[offset : offset + len(data)] = data
    machine.engine.cpu(0).code_written(mfn)
    return mfn


def jump(machine: BareMachine, va: int, user: bool = False) -> int:
    """What the code at `va` answers, when jumped to from another page."""
    cpu = machine.engine.cpu(0)
    cpu.switch_mode(machine.l4s[user], user)
    cpu.regs[RIP], cpu.regs[RAX], cpu.regs[RBX] = CODE, va, 0
    assert run_to_trap(cpu)[0] == TRAP_SYSCALL
    return cpu.regs[RBX]


@pytest.mark.parametrize("user", [False, True])
@pytest.mark.parametrize("whole", [False, True])
def test_another_frame_at_the_same_address_is_executed_after_a_flush(
    machine: BareMachine, user: bool, whole: bool
) -> None:
    frames = [frame_with(machine, answer(number)) for number in (1, 2)]
    cpu = machine.start(JUMP, user)
    for turn in range(40):
        machine.set_entry(TARGET, frames[turn & 1] << 12 | ACCESS, machine.l4s[user])
        if whole:
            cpu.flush_tlb()
        else:
            cpu.flush_page(TARGET)
        assert [jump(machine, TARGET, user) for _ in range(3)] == [1 + (turn & 1)] * 3


@pytest.mark.parametrize("user", [False, True])
def test_the_same_address_is_other_code_in_another_page_table(machine: BareMachine, user: bool) -> None:
    cpu = machine.start(JUMP, user)
    others = [machine.new_l4(), machine.new_l4()]
    for number, l4 in enumerate(others):
        machine.set_entry(CODE, machine.code[user] << 12 | ACCESS, l4)
        machine.set_entry(TARGET, frame_with(machine, answer(number)) << 12 | ACCESS, l4)
    for turn in range(40):
        machine.l4s[user] = others[turn & 1]
        assert jump(machine, TARGET, user) == turn & 1
    cpu.flush_tlb()


def test_each_mode_executes_its_own_code_at_the_same_address(machine: BareMachine) -> None:
    machine.write_code(JUMP, True)
    machine.start(JUMP)
    for user in (False, True):
        machine.set_entry(TARGET, frame_with(machine, answer(5 + user)) << 12 | ACCESS, machine.l4s[user])
    for turn in range(40):
        assert jump(machine, TARGET, bool(turn & 1)) == 5 + (turn & 1)


@pytest.mark.parametrize("whole", [False, True])
def test_a_block_across_two_pages_is_made_of_both_as_they_are_mapped_now(machine: BareMachine, whole: bool) -> None:
    first = bytes.fromhex(answer(0))[:2].hex()  # and the rest of its number lies in the second page
    machine.set_entry(TARGET, frame_with(machine, first, 0xFFE) << 12 | ACCESS)
    seconds = [frame_with(machine, bytes.fromhex(answer(number << 8))[2:].hex()) for number in (0, 1)]
    cpu = machine.start(JUMP)
    for turn in range(40):
        machine.set_entry(TARGET + 0x1000, seconds[turn & 1] << 12 | ACCESS)
        if whole:
            cpu.flush_tlb()
        else:
            cpu.flush_page(TARGET + 0x1000)
        assert [jump(machine, TARGET + 0xFFE) >> 8 for _ in range(3)] == [turn & 1] * 3


def test_code_that_may_no_longer_be_executed_faults(machine: BareMachine) -> None:
    mfn = frame_with(machine, answer(1))
    machine.set_entry(TARGET, mfn << 12 | ACCESS)
    cpu = machine.start(JUMP)
    assert jump(machine, TARGET) == 1
    for entry, error_code in ((mfn << 12 | ACCESS | PTE_NX, 0x15), (0, 0x14), (mfn << 12 | PTE_P | PTE_RW, 0x15)):
        machine.set_entry(TARGET, entry)
        cpu.flush_page(TARGET)
        cpu.regs[RIP], cpu.regs[RAX] = CODE, TARGET
        assert run_to_trap(cpu) == (VECTOR_PF, error_code, TARGET)


def test_code_that_the_guest_overwrites_through_another_mapping_is_new_at_once(machine: BareMachine) -> None:
    """Also if that mapping was used before the frame held code, and if the code is the first ever executed there."""
    mfn = machine.frame()
    alias = 0x5B_0000
    machine.set_entry(TARGET, mfn << 12 | ACCESS)
    machine.set_entry(alias, mfn << 12 | ACCESS | PTE_NX)
    machine.write_code("48 89 1e 0f 05", offset=0x100)  # mov [rsi], rbx; syscall
    cpu = machine.start(JUMP)
    for number in range(40):
        cpu.regs[RIP], cpu.regs[RSI] = CODE + 0x100, alias
        cpu.regs[RBX] = int.from_bytes(bytes.fromhex(answer(number)) + bytes(1), "little")
        run_to_trap(cpu)
        assert jump(machine, TARGET) == number


def test_the_first_block_of_an_instance_is_noticed_when_it_is_overwritten(machine: BareMachine) -> None:
    # mov ebx, 1; mov byte [rip - 11], 7 (its number); jmp to the start if ebx is 1; syscall
    code = "bb 01 00 00 00 c6 05 f5 ff ff ff 07 83 fb 01 74 ef 0f 05"
    cpu = machine.start(code)
    run_to_trap(cpu)
    assert cpu.regs[RBX] == 7


# --- the TLB ----------------------------------------------------------------------------------------

# again: mov rdx, [rsi]; add r15, rdx; add rsi, rax; dec ecx; jnz again; syscall
SUM = "48 8b 16 49 01 d7 48 01 c6 ff c9 75 f3" + SYSCALL


def total(machine: BareMachine, pages: int, stride: int) -> int:
    cpu = machine.engine.cpu(0)
    cpu.regs[RIP], cpu.regs[RSI], cpu.regs[RAX], cpu.regs[RCX], cpu.regs[R15] = CODE, PAGES, stride, pages, 0
    run_to_trap(cpu)
    return cpu.regs[R15]


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize(
    ("pages", "stride"), [(3, 0x1000), (200, 0x1000), (1500, 0x1000), (12, 0x10_0000), (12, 0x100_0000)]
)
def test_every_page_is_read_as_it_is_mapped_after_a_flush(
    machine: BareMachine, pages: int, stride: int, whole: bool
) -> None:
    """Few pages, many pages, pages that displace each other from the TLB."""
    one, two = machine.frame(), machine.frame()
    machine.memory.q[one << 9], machine.memory.q[two << 9] = 1, 1000
    cpu = machine.start(SUM)
    for turn in range(6):
        for page in range(pages):
            machine.set_entry(PAGES + page * stride, (two if turn & 1 else one) << 12 | ACCESS)
            if not whole:
                cpu.flush_page(PAGES + page * stride)
        if whole:
            cpu.flush_tlb()
        expected = pages * (1000 if turn & 1 else 1)
        assert [total(machine, pages, stride) for _ in range(2)] == [expected] * 2


def test_a_mode_switch_keeps_and_a_flush_empties_both_modes_tlbs(machine: BareMachine) -> None:
    one, two = machine.frame(), machine.frame()
    machine.memory.q[one << 9], machine.memory.q[two << 9] = 1, 1000
    machine.write_code(SUM, True)
    cpu = machine.start(SUM)
    for turn in range(20):
        for user in (False, True):
            for page in range(30):
                entry = (two if (turn + user) & 1 else one) << 12 | ACCESS
                machine.set_entry(PAGES + page * 0x1000, entry, machine.l4s[user])
        cpu.flush_tlb()
        for user in (False, True, False, True):
            cpu.switch_mode(machine.l4s[user], user)
            assert total(machine, 30, 0x1000) == 30 * (1000 if (turn + user) & 1 else 1)


def test_reading_and_storing_set_the_accessed_and_dirty_bits(machine: BareMachine) -> None:
    mfn = machine.map_new(PAGES)
    index = _entry_index(machine, PAGES)
    machine.write_code("48 89 1e 0f 05", offset=0x100)  # mov [rsi], rbx; syscall
    cpu = machine.start("48 8b 1e 0f 05")  # mov rbx, [rsi]; syscall
    found = []
    for start in (CODE, CODE + 0x100):
        cpu.regs[RIP], cpu.regs[RSI] = start, PAGES
        run_to_trap(cpu)
        found.append(machine.memory.q[index])
    assert found == [mfn << 12 | ACCESS | PTE_A, mfn << 12 | ACCESS | PTE_A | PTE_D]


@pytest.mark.parametrize(
    ("entry", "code", "error_code"),
    [
        (0, "48 8b 1e", 4),
        (PTE_P | PTE_RW, "48 8b 1e", 5),  # not the guest's
        (PTE_P | PTE_US, "48 89 1e", 7),  # read-only
        (0, "48 89 1e", 6),
        (PTE_P | PTE_US | PTE_RW | 1 << 48, "48 8b 1e", 0xD),  # not in the machine: a reserved bit
    ],
)
def test_what_may_not_be_accessed_faults_as_the_processor_has_it(
    machine: BareMachine, entry: int, code: str, error_code: int
) -> None:
    machine.set_entry(PAGES, machine.frame() << 12 | entry)
    cpu = machine.start(code + SYSCALL)
    cpu.regs[RSI] = PAGES
    assert run_to_trap(cpu) == (VECTOR_PF, error_code, PAGES)


def _entry_index(machine: BareMachine, va: int) -> int:
    table = machine.kernel_l4
    for shift in (39, 30, 21):
        table = (machine.memory.q[(table << 9) + (va >> shift & 511)] & ~0xFFF) >> 12
    return (table << 9) + (va >> 12 & 511)


@pytest.mark.parametrize(("size", "first"), [(1 << 20, 1 << 20), (4 << 20, 1 << 19)])
def test_blocks_stay_right_when_the_buffer_of_translated_code_overflows(
    monkeypatch: pytest.MonkeyPatch, size: int, first: int
) -> None:
    monkeypatch.setattr(instance, "CODE_BUFFER_BYTES", size)
    monkeypatch.setattr(instance, "FIRST_CODE_BYTES", first)
    machine = BareMachine("unicorn")
    frames = [machine.frame() for _ in range(40)]
    for page, mfn in enumerate(frames):
        machine.set_entry(PAGES + page * 0x1000, mfn << 12 | ACCESS)
        for offset in range(0, 0x1000, 16):
            data = bytes.fromhex(answer(page << 12 | offset))
            machine.memory.page(mfn)[offset : offset + len(data)] = data
    machine.start(JUMP)
    for _ in range(2):
        for page in range(len(frames)):
            for offset in range(0, 0x1000, 16):
                assert jump(machine, PAGES + page * 0x1000 + offset) == page << 12 | offset
    machine.close()


def test_another_user_of_unicorn_in_the_process_is_served_by_the_library_itself(machine: BareMachine) -> None:
    unicorn = pytest.importorskip("unicorn")
    assert jump_of_another(unicorn) == 0x1234


def jump_of_another(unicorn: object) -> int:
    from unicorn import UC_ARCH_X86, UC_MODE_64, Uc
    from unicorn.x86_const import UC_X86_REG_RAX, UC_X86_REG_RBX

    uc = Uc(UC_ARCH_X86, UC_MODE_64)
    uc.mem_map(0x1000, 0x2000)
    uc.mem_write(0x1000, bytes.fromhex(JUMP))
    uc.mem_write(0x2000, bytes.fromhex("bb 34 12 00 00 90"))
    uc.reg_write(UC_X86_REG_RAX, 0x2000)
    uc.emu_start(0x1000, 0x2005)
    return int(uc.reg_read(UC_X86_REG_RBX))


@pytest.mark.skipif(native.missing() is not None, reason="there is no compiler in the first place")
def test_all_of_this_holds_without_a_compiler() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", __file__]
    result = subprocess.run(
        [*command, "-k", "flush or overwrit or modes or fault"],
        env={**os.environ, "XENOLITH_NATIVE": "off"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout


def test_with_a_compiler_it_is_c(machine: BareMachine) -> None:
    assert (cpu_of(machine)._instance.softmmu is None) == (native.missing() is not None)
