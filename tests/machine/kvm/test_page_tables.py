"""What ring 0 changes in page tables through its own mapping is what guest code meets next."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest

from xenolith.abi.x86 import (
    PAGE_SHIFT,
    PTE_NX,
    PTE_P,
    PTE_RW,
    PTE_US,
    RAX,
    RCX,
    RDI,
    RIP,
    RSP,
    VECTOR_GP,
    VECTOR_PF,
    VECTOR_UD,
)
from xenolith.machine.engines.kvm.cpu import KvmCpu
from xenolith.machine.engines.kvm.engine import KvmEngine
from xenolith.machine.engines.kvm.host import host_traits
from xenolith.machine.engines.protocol import TRAP_SYSCALL

from .bare import CODE, DATA, DATA_PAGES, STACK_TOP, TABLE, Machine, in_thread, run_to_trap

READ = "48 8b 07 0f 0b"  # mov rax, [rdi]; ud2
WRITE = "48 89 07 0f 0b"


def read(machine: Machine, cpu: KvmCpu, va: int) -> int | None:
    """What the guest reads at `va`; None for a page fault."""
    cpu.regs[RDI] = va
    vector, _, address = machine.execute(cpu, READ)
    if vector == VECTOR_PF:
        assert address == va
        return None
    assert vector == VECTOR_UD
    return cpu.regs[RAX]


def test_a_page_that_is_unmapped_is_gone(machine: Machine) -> None:
    machine.set_word(5)
    cpu = machine.cpu()
    assert read(machine, cpu, DATA) == 5
    machine.change_entry(machine.entry(DATA), 0)
    cpu.flush_page(DATA)
    assert read(machine, cpu, DATA) is None


def test_a_page_that_is_replaced_is_the_new_one(machine: Machine) -> None:
    machine.set_word(5)
    machine.set_word(6, page=1)
    cpu = machine.cpu()
    assert read(machine, cpu, DATA) == 5
    machine.change_entry(machine.entry(DATA), machine.data[1] << PAGE_SHIFT | TABLE)
    cpu.flush_page(DATA)
    assert read(machine, cpu, DATA) == 6


def test_a_page_that_becomes_read_only_refuses_stores(machine: Machine) -> None:
    cpu = machine.cpu()
    cpu.regs[RDI] = DATA
    assert machine.execute(cpu, WRITE)[0] == VECTOR_UD
    machine.change_entry(machine.entry(DATA), machine.data[0] << PAGE_SHIFT | PTE_P | PTE_US)
    cpu.flush_tlb()
    assert machine.execute(cpu, WRITE) == (VECTOR_PF, 7, DATA)
    assert read(machine, cpu, DATA) is not None


def test_a_page_that_loses_the_right_to_execute_does_not_execute(machine: Machine) -> None:
    cpu = machine.cpu()
    assert machine.execute(cpu, "0f 0b")[0] == VECTOR_UD
    machine.change_entry(machine.entry(CODE), machine.code << PAGE_SHIFT | TABLE | PTE_NX)
    cpu.flush_tlb()
    assert machine.execute(cpu) == (VECTOR_PF, 0x15, CODE)


def test_new_mappings_and_new_rights_need_no_report(machine: Machine) -> None:
    cpu = machine.cpu()
    va = DATA + DATA_PAGES * 0x1000
    assert read(machine, cpu, va) is None
    index = machine.entry(va)
    machine.set_word(9)
    machine.memory.q[index] = machine.data[0] << PAGE_SHIFT | PTE_P | PTE_US
    assert read(machine, cpu, va) == 9
    machine.memory.q[index] |= PTE_RW
    assert machine.execute(cpu, WRITE)[0] == VECTOR_UD


def test_hundreds_of_changes_at_once_all_arrive(machine: Machine) -> None:
    cpu = machine.cpu()
    for page in range(DATA_PAGES):
        machine.set_word(page, page=page)
        assert read(machine, cpu, DATA + page * 0x1000) == page
    for page in range(DATA_PAGES):
        index = machine.entry(DATA + page * 0x1000)
        machine.change_entry(index, machine.data[DATA_PAGES - 1 - page] << PAGE_SHIFT | TABLE if page % 3 else 0)
    cpu.flush_tlb()
    for page in range(DATA_PAGES):
        expected = DATA_PAGES - 1 - page if page % 3 else None
        assert read(machine, cpu, DATA + page * 0x1000) == expected


def test_a_frame_that_was_a_page_table_and_becomes_one_again_starts_afresh(machine: Machine) -> None:
    """Between the two uses ring 0 alone writes it, which the host's KVM does not see."""
    cpu = machine.cpu()
    base = DATA + 0x4000_0000
    for page in range(8):
        machine.memory.q[machine.entry(base + page * 0x1000)] = machine.data[page] << PAGE_SHIFT | TABLE
        machine.set_word(100 + page, page=page)
        assert read(machine, cpu, base + page * 0x1000) == 100 + page
    table = machine.entry(base) >> 9
    upper = machine.entry(base, None)
    l2_index = next(
        index
        for index in range(machine.memory.frames << 9)
        if machine.memory.q[index] & ~0xFFF & (1 << 52) - 1 == table << PAGE_SHIFT and machine.memory.q[index] & PTE_P
    )
    entry = machine.memory.q[l2_index]
    machine.change_entry(l2_index, 0)
    machine.engine.entry_changed(table << 9, 1, 0)  # it is no page table any more
    cpu.flush_tlb()
    assert read(machine, cpu, base) is None
    for page in range(8):
        machine.memory.q[upper + page] = machine.data[page + 8] << PAGE_SHIFT | TABLE if page % 2 else 0
        machine.set_word(200 + page, page=page + 8)
    machine.memory.q[l2_index] = entry
    for page in range(8):
        assert read(machine, cpu, base + page * 0x1000) == (200 + page if page % 2 else None)


def test_a_change_between_two_traps_is_seen_by_the_very_next_instruction(machine: Machine) -> None:
    cpu = machine.cpu()
    machine.set_word(1)
    machine.set_word(2, page=1)
    index = machine.entry(DATA)
    machine.write_code("0f 05 48 8b 07 48 89 c6 0f 05 48 8b 07 0f 0b")
    cpu.regs[RDI] = DATA
    seen = []
    frames = iter((machine.data[0], machine.data[1]))

    def on_trap(vector: int, _error_code: int, _address: int) -> bool:
        if vector == TRAP_SYSCALL:
            machine.change_entry(index, next(frames) << PAGE_SHIFT | TABLE)
            cpu.flush_page(DATA)
            return True
        seen.append((vector, cpu.regs[RAX]))
        return False

    cpu.run(on_trap)
    assert seen == [(VECTOR_UD, 2)]


def test_the_guests_own_address_spaces_are_kept_apart(machine: Machine) -> None:
    other = machine.new_l4()
    machine.memory.q[machine.entry(CODE, other)] = machine.code << PAGE_SHIFT | TABLE
    machine.memory.q[machine.entry(DATA, other)] = machine.data[1] << PAGE_SHIFT | TABLE
    machine.set_word(1)
    machine.set_word(2, page=1)
    cpu = machine.cpu()
    for _ in range(3):
        cpu.switch_mode(other, True)
        assert read(machine, cpu, DATA) == 2
        cpu.switch_mode(machine.l4, False)
        assert read(machine, cpu, DATA) == 1


def test_other_vcpus_see_a_change_when_they_come_back(machine: Machine) -> None:
    """One vCPU reads a page over and over, on its own thread, while page tables change on another vCPU's account."""
    reader, changer = machine.cpu(0), machine.cpu(1)
    machine.write_code("48 8b 07 eb fb", 0x100)  # again: mov rax, [rdi]; jmp again
    va = DATA + 0x10_0000
    reader.regs[RDI] = va
    reader.regs[RIP] = CODE + 0x100
    index = machine.entry(va)
    entry = machine.memory.q[index]
    left = threading.Semaphore(0)
    go_on = threading.Semaphore(0)
    faults: list[tuple[int, ...]] = []

    def on_trap(*trap: int) -> bool:
        faults.append(trap)
        return False

    def runner() -> None:
        for _ in range(200):
            reader.run(on_trap)
            left.release()
            go_on.acquire()

    thread = in_thread(runner)
    for number in range(100):
        reader.kick()
        assert left.acquire(timeout=20)
        assert len(faults) == number
        machine.change_entry(index, 0)
        reader.flush_page(va)
        if number % 2:
            changer.flush_page(va)
            assert read(machine, changer, DATA) is not None  # whoever enters first does it for both
        go_on.release()
        assert left.acquire(timeout=20), "the vCPU still reads a page that is not mapped"
        assert faults[-1] == (VECTOR_PF, 4, va)
        machine.memory.q[index] = entry
        go_on.release()
    thread.join(20)


def test_a_locked_counter_of_two_vcpus_is_exact(machine: Machine) -> None:
    machine.write_code("f0 48 ff 07 48 ff c9 75 f7 0f 0b")  # lock inc [rdi]; dec rcx; jnz; ud2
    cpus = [machine.cpu(number) for number in range(2)]
    for number, cpu in enumerate(cpus):
        cpu.regs[RDI] = DATA
        cpu.regs[RCX] = 300_000
        cpu.regs[RIP] = CODE
        cpu.regs[RSP] = STACK_TOP - number * 0x100
    threads = [in_thread(lambda cpu=cpu: run_to_trap(cpu)) for cpu in cpus]  # type: ignore[misc]
    for thread in threads:
        thread.join(60)
    assert machine.word() == 600_000


@pytest.mark.parametrize("count", [1, 119, 120, 121, 250])
def test_a_change_of_any_number_of_entries_leaves_the_registers_alone(machine: Machine, count: int) -> None:
    cpu = machine.cpu()
    values = {register: 0x0101_0101_0101_0101 * register for register in range(16) if register != RSP}
    for register, value in values.items():
        cpu.regs[register] = value
    for page in range(count):
        machine.engine.entry_changed(machine.entry(DATA + page * 0x1000), 1, 0)
    cpu.set_rflags(0x8C1)
    cpu.flush_tlb()
    machine.execute(cpu, "9c 0f 0b")
    for register, value in values.items():
        assert cpu.regs[register] == value, register
    assert cpu.regs[RSP] == STACK_TOP - 8
    assert cpu.get_rflags() & 0x8D5 == 0x8C1


def test_a_flush_is_not_forgotten_over_a_jump_to_nowhere(machine: Machine) -> None:
    """The trap that changed an entry leaves an RIP which is not canonical: the #GP comes before the flush."""
    machine.set_word(1, page=1)
    machine.set_word(2, page=2)
    cpu = machine.cpu()
    machine.write_code("48 8b 07 0f 05 48 8b 07 0f 0b")  # mov rax, [rdi]; syscall; mov rax, [rdi]; ud2
    cpu.regs[RDI] = DATA + 0x1000
    traps: list[int] = []

    def on_trap(vector: int, _error_code: int, _address: int) -> bool:
        traps.append(vector)
        if vector == TRAP_SYSCALL:
            machine.change_entry(machine.entry(DATA + 0x1000), machine.data[2] << PAGE_SHIFT | TABLE)
            cpu.flush_tlb()
            cpu.regs[RIP] = 1 << 47
        elif vector == VECTOR_GP:
            cpu.regs[RIP] = CODE + 5
        return vector != VECTOR_UD

    cpu.run(on_trap)
    assert traps == [TRAP_SYSCALL, VECTOR_GP, VECTOR_UD]
    assert cpu.regs[RAX] == 2


def test_a_host_that_does_not_shadow_tables_has_nothing_to_rewrite() -> None:
    """There machine memory is not mapped for the entry stubs."""

    class Nested(Machine):
        def make_engine(self) -> KvmEngine:
            return KvmEngine(self.memory, replace(host_traits(), shadows_page_tables=False))

    machine = Nested()
    try:
        cpu = machine.cpu()
        assert machine.execute(cpu, "0f 0b")[0] == VECTOR_UD
        machine.change_entry(machine.entry(DATA), machine.data[2] << PAGE_SHIFT | TABLE)
        cpu.flush_tlb()
        assert machine.execute(cpu, "0f 0b")[0] == VECTOR_UD
    finally:
        machine.close()
