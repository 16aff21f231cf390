"""What is carried out in the guest's stead reaches no more than the guest could, and is what the processor refused."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from xenolith.abi.x86 import (
    CS,
    DS,
    PTE_A,
    PTE_D,
    PTE_NX,
    PTE_P,
    PTE_RW,
    PTE_US,
    RAX,
    RBX,
    RIP,
    RSP,
    SS,
    VECTOR_GP,
    VECTOR_PF,
    VECTOR_SS,
    advanced,
    is_canonical_range,
)
from xenolith.machine import page_walk, segments
from xenolith.machine.engines import segment_loads
from xenolith.machine.engines.protocol import ModeSwitchState, register_file
from xenolith.machine.memory import MachineMemory
from xenolith.machine.operands import GuestFault, GuestView, decode, effective_address, is_stack_fault

L4, L3, L2, L1, CODE, DATA, XENS = range(1, 8)
BASE = 0x40_0000
CODE_VA, DATA_VA, READ_ONLY_VA, XENS_VA, ABSENT_VA = (BASE + page * 0x1000 for page in range(5))
GUEST = PTE_P | PTE_RW | PTE_US
HOLE = 1 << 47
END = 1 << 64


@pytest.fixture
def memory() -> Iterator[MachineMemory]:
    made = MachineMemory(16)
    q = made.q
    for table, below in ((L4, L3), (L3, L2)):
        q[table << 9] = below << 12 | GUEST
    q[(L2 << 9) + (BASE >> 21)] = L1 << 12 | GUEST
    q[(L4 << 9) + 511] = L3 << 12 | GUEST
    q[(L3 << 9) + 511] = L2 << 12 | GUEST
    q[(L2 << 9) + 511] = L1 << 12 | GUEST
    q[(L1 << 9) + 511] = DATA << 12 | GUEST
    for page, entry in enumerate(
        (
            CODE << 12 | PTE_P | PTE_US,
            DATA << 12 | GUEST | PTE_NX,
            DATA << 12 | PTE_P | PTE_US,
            XENS << 12 | PTE_P | PTE_RW,
        )
    ):
        q[(L1 << 9) + page] = entry
    yield made
    made.close()


def fault(action: object, *arguments: object, **options: object) -> tuple[int, int, int]:
    with pytest.raises(GuestFault) as raised:
        action(*arguments, **options)  # type: ignore[operator]
    return raised.value.vector, raised.value.error_code, raised.value.address


def test_operands_are_read_and_written_with_the_rights_of_cpl_3(memory: MachineMemory) -> None:
    view = GuestView(memory, L4)
    view.store(DATA_VA + 0xFFC, b"abcd")
    assert view.load(READ_ONLY_VA + 0xFFC, 4) == b"abcd"
    assert fault(view.store, READ_ONLY_VA, b"x") == (VECTOR_PF, 7, READ_ONLY_VA)
    assert fault(view.load, XENS_VA, 8) == (VECTOR_PF, 5, XENS_VA)
    assert fault(view.load, ABSENT_VA, 1) == (VECTOR_PF, 4, ABSENT_VA)
    assert fault(view.store, ABSENT_VA, b"x") == (VECTOR_PF, 6, ABSENT_VA)
    assert fault(view.fetch, DATA_VA) == (VECTOR_PF, 0x15, DATA_VA)


def test_an_access_that_fails_in_its_second_page_changes_nothing(memory: MachineMemory) -> None:
    view = GuestView(memory, L4)
    assert fault(view.store, DATA_VA + 0xFFE, b"abcd") == (VECTOR_PF, 7, READ_ONLY_VA)
    assert not any(memory.page(DATA))


def test_nothing_goes_around_the_end_of_the_address_space_or_into_the_hole(memory: MachineMemory) -> None:
    view = GuestView(memory, L4)
    assert view.load(END - 8, 8) == bytes(8)
    assert fault(view.load, END - 4, 8) == (VECTOR_GP, 0, 0)
    assert fault(view.load, HOLE - 4, 8) == (VECTOR_GP, 0, 0)
    assert fault(view.load, HOLE, 1, of_stack=True) == (VECTOR_SS, 0, 0)
    assert view.fetch(END - 3) == bytes(3)
    assert page_walk.machine_address(memory, L4, HOLE + BASE) is None
    assert page_walk.read(memory, L4, END - 1, 2) is None
    assert not is_canonical_range(END - 1, 2)
    assert is_canonical_range(END - 2, 2)
    assert advanced(END - 1, 2) == 1
    assert advanced(0, -2) == END - 2


def test_an_access_leaves_the_bits_that_the_processors_leaves(memory: MachineMemory) -> None:
    view = GuestView(memory, L4)
    leaf = L1 << 9 | 1
    view.load(DATA_VA, 1)
    assert memory.q[leaf] & (PTE_A | PTE_D) == PTE_A
    assert all(memory.q[index] & PTE_A for index in (L4 << 9, L3 << 9, (L2 << 9) + (BASE >> 21)))
    view.store(DATA_VA, b"x")
    assert memory.q[leaf] & (PTE_A | PTE_D) == PTE_A | PTE_D


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("48 8b 44 98 10", 0x1000 + 4 * 0x20 + 0x10),  # [rax + rbx * 4 + 0x10]
        ("67 8b 00", 0x1000),
        ("8b 04 25 00 00 00 80", END - 0x8000_0000),
        ("67 8b 04 25 00 00 00 80", 0x8000_0000),
        ("8b 05 10 00 00 00", CODE_VA + 6 + 0x10),
    ],
)
def test_the_address_of_an_operand(code: str, expected: int) -> None:
    regs = register_file()
    regs[RAX], regs[RBX] = 0x1000, 0x20
    assert effective_address(regs, decode(bytes.fromhex(code), CODE_VA, True), True) == expected


@pytest.mark.parametrize(
    ("code", "rsp", "expected"),
    [
        ("50", HOLE, False),
        ("50", HOLE + 8, True),
        ("58", HOLE - 8, False),
        ("8b 04 24", HOLE, True),
        ("8b 00", BASE, False),
    ],
)
def test_which_fault_is_one_of_the_stack(code: str, rsp: int, expected: bool) -> None:
    regs = register_file()
    regs[RSP], regs[RAX] = rsp, HOLE
    assert is_stack_fault(regs, decode(bytes.fromhex(code), CODE_VA, True), True) == expected


class FakeCpu:
    """A Cpu whose descriptor table has what `descriptors` says."""

    def __init__(self, memory: MachineMemory, code: str) -> None:
        self.regs = register_file()
        self.modes: ModeSwitchState | None = None
        self.kernels_far_transfers = 0
        self.runs_64_bit_code = True
        self.view = GuestView(memory, L4)
        self.flags = 0x202
        self.descriptors = {0x10: 0x00AF_FB00_0000_FFFF, 0x18: 0x00CF_F300_0000_FFFF}
        self.get_rflags = lambda: self.flags
        memory.page(CODE)[: len(bytes.fromhex(code))] = bytes.fromhex(code)
        self.regs[RIP], self.regs[RSP] = CODE_VA, DATA_VA + 0x800
        self.regs[CS], self.regs[SS] = 0xE033, 0xE02B

    def set_rflags(self, value: int) -> None:
        self.flags = value

    def _descriptor(self, selector: int) -> bytes | None:
        found = self.descriptors.get(selector & ~7)
        return None if found is None else found.to_bytes(8, "little")

    def load_selector(self, segment: int, selector: int) -> None:
        segments.data_segment(selector, self._descriptor)
        self.regs[segment] = selector

    def set_code_stack(self, cs: int, ss: int) -> None:
        segments.code_segment(cs, self._descriptor)
        segments.stack_segment(ss, self._descriptor)
        self.regs[CS], self.regs[SS] = cs, ss

    def code_segment(self, selector: int) -> int:
        return segments.code_segment(selector, self._descriptor).flags


def test_an_instruction_that_is_not_the_one_that_faulted_goes_back_to_the_processor(memory: MachineMemory) -> None:
    cpu = FakeCpu(memory, "8e d8")  # mov ds, eax
    cpu.regs[RAX] = 0x1B
    assert segment_loads.carry_out(cpu, faulted_on=0x20) == segment_loads.Done()
    assert (cpu.regs[RIP], cpu.regs[DS]) == (CODE_VA, 0)
    segment_loads.carry_out(cpu, faulted_on=0x18)
    assert (cpu.regs[RIP], cpu.regs[DS]) == (CODE_VA + 2, 0x1B)


def test_a_far_pointer_is_read_with_the_guests_rights(memory: MachineMemory) -> None:
    cpu = FakeCpu(memory, "0f b4 03")  # lfs eax, [rbx]
    cpu.regs[RBX] = XENS_VA
    assert fault(segment_loads.carry_out, cpu, 0x18) == (VECTOR_PF, 5, XENS_VA)


def test_iret_at_cpl_3_leaves_the_flags_that_are_not_its_own(memory: MachineMemory) -> None:
    cpu = FakeCpu(memory, "48 cf")
    frame = (CODE_VA + 0x100, 0x13, 0x3F7FD7 & ~0x4000, DATA_VA, 0x1B)
    cpu.view.store(cpu.regs[RSP], b"".join(word.to_bytes(8, "little") for word in frame))
    done = segment_loads.carry_out(cpu)
    assert done is not None
    assert done.far
    assert (cpu.regs[RIP], cpu.regs[CS], cpu.regs[RSP], cpu.regs[SS]) == (CODE_VA + 0x100, 0x13, DATA_VA, 0x1B)
    assert cpu.flags & segment_loads.KEPT_FLAGS == 0x200


def test_a_far_transfer_that_faults_changes_nothing(memory: MachineMemory) -> None:
    cpu = FakeCpu(memory, "48 cb")  # lretq
    cpu.view.store(cpu.regs[RSP], CODE_VA.to_bytes(8, "little") + (0x23).to_bytes(8, "little"))
    before = bytes(cpu.regs)
    assert fault(segment_loads.carry_out, cpu) == (VECTOR_GP, 0x20, 0)
    cpu.view.store(cpu.regs[RSP], HOLE.to_bytes(8, "little") + (0x13).to_bytes(8, "little"))
    assert fault(segment_loads.carry_out, cpu) == (VECTOR_GP, 0, 0)
    assert bytes(cpu.regs) == before
