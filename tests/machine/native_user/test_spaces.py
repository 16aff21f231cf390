"""What a stub has mapped is what the guest's page tables say, whatever happens to them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from functools import partial
from random import Random

import bare
import numpy as np
import pytest
from bare import ACCESS, CODE, DATA, BareMachine, Trap, run_to_trap
from stubs import Unhandled

from xenolith.abi.x86 import (
    L2_SHIFT,
    L3_SHIFT,
    L4_SHIFT,
    PAGE_SHIFT,
    PFEC_INSN,
    PFEC_PRESENT,
    PFEC_USER,
    PFEC_WRITE,
    PTE_A,
    PTE_ADDRESS,
    PTE_D,
    PTE_NX,
    PTE_P,
    PTE_RW,
    PTE_US,
    RAX,
    RCX,
    RDI,
    RIP,
    RSI,
    VECTOR_PF,
)
from xenolith.machine import native, page_walk
from xenolith.machine.engines.protocol import TRAP_SYSCALL, Cpu
from xenolith.machine.engines.unicorn.user import host, spaces
from xenolith.machine.engines.unicorn.user.cpu import NativeUserCpu
from xenolith.machine.memory import MachineMemory
from xenolith.machine.write_tracking import NotTracked, WriteTracking

READ = "48 8b 07 0f 05"  # mov rax, [rdi]; syscall
WRITE = "48 89 07 0f 05"  # mov [rdi], rax; syscall
CALL = "ff e7"  # jmp rdi
RETURN = bytes.fromhex("0f 05") * 2048  # what lies in every frame that is executed: syscall
READ_AT, WRITE_AT, CALL_AT = CODE, CODE + 16, CODE + 32
BASES = (0x10_0000_0000, 0x10_0020_0000, 0x10_4000_0000, 0x7F00_0000_0000)  # in one L2, in the next, in another L4 slot
PAGES = 70  # of each: more than are looked at together
FRAMES = 40
CHANGES = 1500


class Model:
    """Two address spaces with pages of the same frames, and what must come of an access."""

    def __init__(self, machine: BareMachine, random: Random) -> None:
        self.machine, self.random = machine, random
        self.l4s = [machine.user_l4, machine.new_l4()]
        for l4 in self.l4s[1:]:
            machine.set_entry(CODE, machine.code[1] << PAGE_SHIFT | PTE_P | PTE_US, l4)
        machine.write_code(READ, user=True)
        machine.write_code(WRITE, user=True, offset=16)
        machine.write_code(CALL, user=True, offset=32)
        self.frames = [machine.frame() for _ in range(FRAMES)]
        for mfn in self.frames:
            machine.memory.page(mfn)[:] = RETURN
        self.cpu: Cpu = machine.engine.cpu(0)
        self.cpu.load(machine.state(user=True))
        self.here = 0

    @property
    def l4(self) -> int:
        return self.l4s[self.here]

    def address(self) -> int:
        return self.random.choice(BASES) + (self.random.randrange(PAGES) << PAGE_SHIFT)

    def path(self, va: int) -> list[int]:
        """The word indices of the entries on the way, as far as there are any."""
        found, table = [], self.l4
        for shift in (L4_SHIFT, L3_SHIFT, L2_SHIFT, PAGE_SHIFT):
            index = (table << 9) + (va >> shift & 511)
            found.append(index)
            entry = self.machine.memory.q[index]
            if not entry & PTE_P:
                break
            table = (entry & PTE_ADDRESS) >> PAGE_SHIFT
        return found

    def set_word(self, index: int, value: int) -> None:
        old, self.machine.memory.q[index] = self.machine.memory.q[index], value
        if old & PTE_P and self.machine.engine.entry_changed is not None:
            self.machine.engine.entry_changed(index, old, value)

    def change(self) -> None:
        """One change to the tables of the address space that is loaded, or another one is loaded."""
        q, va = self.machine.memory.q, self.address()
        kind = self.random.randrange(12)
        path = self.path(va)
        if kind < 5:
            rights = PTE_P | PTE_US | self.random.choice((0, PTE_RW)) | self.random.choice((0, PTE_NX))
            used = self.random.choice((0, PTE_A, PTE_A | PTE_D))
            self.machine.set_entry(va, self.random.choice(self.frames) << PAGE_SHIFT | rights | used, self.l4)
        elif kind < 7 and len(path) == 4:
            self.set_word(path[3], 0)
        elif kind == 7 and len(path) == 4:
            self.set_word(path[3], q[path[3]] ^ self.random.choice((PTE_RW, PTE_US, PTE_NX, PTE_A, PTE_D)))
        elif kind == 8 and len(path) > 2 and not self.random.randrange(4):
            index = path[self.random.randrange(1, len(path) - 1)]
            self.set_word(index, q[index] ^ self.random.choice((PTE_RW, PTE_NX, PTE_P)))
        elif kind == 9:
            self.here ^= 1
            self.cpu.switch_mode(self.l4, True)
        elif kind == 10 and len(path) == 4:  # a neighbour's frame: as after a copy on write
            self.set_word(path[3], q[path[3]] & ~PTE_ADDRESS | self.random.choice(self.frames) << PAGE_SHIFT)

    def expected(self, va: int, write: bool, fetch: bool) -> Trap:
        entries = page_walk.path(self.machine.memory, self.l4, va)
        code = PFEC_USER | (PFEC_WRITE if write else 0) | (PFEC_INSN if fetch else 0)
        if entries is None:
            return VECTOR_PF, code, va
        rights = ~0
        for _, entry in entries:
            rights &= entry ^ PTE_NX
        needed = PTE_US | (PTE_RW if write else 0) | (PTE_NX if fetch else 0)
        if rights & needed != needed:
            return VECTOR_PF, code | PFEC_PRESENT, va
        return TRAP_SYSCALL, 0, 0

    def access(self) -> None:
        """One access, and whether everything came as it had to."""
        va = self.address()
        kind = self.random.randrange(3)
        write, fetch = kind == 1, kind == 2
        memory, regs = self.machine.memory, self.cpu.regs
        expected = self.expected(va, write, fetch)
        if not fetch:
            va += 8 * self.random.randrange(100, 500)
            expected = (*expected[:2], va if expected[0] == VECTOR_PF else 0)
        dirty = self.leaves()
        regs[RIP], regs[RDI], value = (READ_AT, WRITE_AT, CALL_AT)[kind], va, self.random.getrandbits(64)
        if fetch:
            value = int.from_bytes(RETURN[:8], "little")
        regs[RAX] = value
        assert run_to_trap(self.cpu) == expected, hex(va)
        if expected[0] == VECTOR_PF:
            return
        assert regs[RCX] == regs[RIP]
        path = self.path(va)
        assert all(memory.q[index] & PTE_A for index in path)
        index = (memory.q[path[3]] & PTE_ADDRESS) + (va & 0xFFF) >> 3
        assert memory.q[index] == (value if write else regs[RAX] if not fetch else memory.q[index])
        if write:
            assert memory.q[path[3]] & PTE_D
            memory.q[index] = int.from_bytes(RETURN[:8], "little")
            dirty |= {path[3]}
        assert self.leaves() == dirty  # no other page is dirty

    def leaves(self) -> set[int]:
        """The L1 entries that are present and dirty, of the address space that is loaded."""
        found = set()
        for base in BASES:
            path = self.path(base)
            if len(path) == 4:
                words = self.machine.memory.q[path[3] : path[3] + PAGES].tolist()
                found |= {path[3] + n for n, entry in enumerate(words) if entry & PTE_D and entry & PTE_P}
        return found


@pytest.mark.parametrize("seed", range(4))
def test_random_changes_of_page_tables_and_accesses_are_as_in_a_model(forced: BareMachine, seed: int) -> None:
    model = Model(forced, Random(seed))
    for _ in range(CHANGES):
        model.change()
        model.access()
    cpu = forced.engine.cpu(0)
    assert isinstance(cpu, NativeUserCpu)
    assert cpu.traps > CHANGES
    assert cpu.spaces.made == 2
    assert bool(cpu.faults_handled) == (cpu.modes is not None)  # then by native code


def test_the_same_where_reports_are_too_many_for_the_list(forced: BareMachine) -> None:
    model = Model(forced, Random(5))
    for _ in range(20):
        for _ in range(600):
            model.change()
        model.access()


def test_more_address_spaces_than_stubs(forced: BareMachine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each finds its own memory, in a stub that was another's."""
    monkeypatch.setattr(spaces, "MOST_STUBS", 3)
    forced.write_code(READ, user=True)
    cpu = forced.start(READ, user=True)
    l4s = []
    for number in range(8):
        l4 = forced.new_l4()
        forced.set_entry(CODE, forced.code[1] << PAGE_SHIFT | PTE_P | PTE_US, l4)
        mfn = forced.map_new(BASES[0], l4)
        forced.memory.q[mfn << 9] = 1000 + number
        l4s.append(l4)
    for _ in range(3):
        for number, l4 in enumerate(l4s):
            cpu.switch_mode(l4, True)
            cpu.regs[RIP], cpu.regs[RDI] = CODE, BASES[0]
            assert run_to_trap(cpu) == (TRAP_SYSCALL, 0, 0)
            assert cpu.regs[RAX] == 1000 + number
    assert isinstance(cpu, NativeUserCpu)
    assert cpu.spaces.made == 3


@pytest.fixture
def tracking(forced: BareMachine) -> Iterator[WriteTracking]:
    try:
        made = WriteTracking(forced.memory)
    except NotTracked as reason:
        pytest.skip(f"this host does not tell what is written: {reason}")
    yield made
    made.close()


def test_what_is_written_in_a_stub_is_followed(forced: BareMachine, tracking: WriteTracking) -> None:
    cpu = forced.start(WRITE, user=True)
    page, other = forced.data[1], forced.map_new(DATA + 0x1000, forced.user_l4)
    tracking.written()
    for number in range(3):
        cpu.regs[RIP], cpu.regs[RDI], cpu.regs[RAX] = CODE, DATA, number
        assert run_to_trap(cpu) == (TRAP_SYSCALL, 0, 0)
        assert forced.memory.q[page << 9] == number
        written = tracking.written()
        assert written[page] and not written[other]
        assert not tracking.written()[page]


def test_a_program_that_goes_on_writing_is_followed(forced: BareMachine, tracking: WriteTracking) -> None:
    """Until it is told to end: by a zero in its other page."""
    cpu = forced.start("48 ff 07 48 83 3e 00 75 f7 0f 05", user=True)  # inc [rdi]; cmp [rsi], 0; jne; syscall
    page, word = forced.data[1], forced.map_new(DATA + 0x1000, forced.user_l4) << 9
    forced.memory.q[word] = 1
    cpu.regs[RDI], cpu.regs[RSI] = DATA, DATA + 0x1000
    ended: list[Trap] = []
    thread = threading.Thread(target=lambda: ended.append(run_to_trap(cpu)))
    thread.start()
    for _ in range(50):
        tracking.written()
        before = forced.memory.q[page << 9]
        while forced.memory.q[page << 9] == before and thread.is_alive():
            pass
        assert tracking.written()[page]
    forced.memory.q[word] = 0
    thread.join()
    assert ended == [(TRAP_SYSCALL, 0, 0)]


def test_an_image_of_such_a_memory_is_copied(forced: BareMachine) -> None:
    """A stub can map no private page, so that each copy has a memory object of its own."""
    cpu = forced.start(WRITE, user=True)
    page = forced.data[1]
    cpu.regs[RDI], cpu.regs[RAX] = DATA, 1
    assert run_to_trap(cpu) == (TRAP_SYSCALL, 0, 0)
    image = forced.memory.image(np.array(sorted(forced.frames), dtype=np.uint64))
    copies = [MachineMemory(forced.memory.frames, image=image) for _ in range(2)]
    image.close()
    cpu.regs[RIP], cpu.regs[RAX] = CODE, 2
    assert run_to_trap(cpu) == (TRAP_SYSCALL, 0, 0)
    copies[0].q[page << 9] += 10
    assert [memory.q[page << 9] for memory in (forced.memory, *copies)] == [2, 11, 1]
    for memory in copies:
        assert not memory.private
        assert bytes(memory.page(forced.code[1])) == bytes(forced.memory.page(forced.code[1]))
        memory.close()


def test_a_page_that_is_mapped_after_a_fault_is_not_dirty_before_it_is_written_to(forced: BareMachine) -> None:
    """The program does something else then: perhaps it was told of the fault."""
    cpu = forced.start(WRITE, user=True)
    forced.write_code(READ, user=True, offset=16)
    va = DATA + 0x1000
    cpu.regs[RDI] = va
    assert run_to_trap(cpu) == (VECTOR_PF, PFEC_USER | PFEC_WRITE, va)
    mfn = forced.map_new(va, forced.user_l4)
    cpu.regs[RIP], cpu.regs[RDI] = CODE + 16, DATA
    assert run_to_trap(cpu) == (TRAP_SYSCALL, 0, 0)
    entries = page_walk.path(forced.memory, forced.user_l4, va)
    assert entries is not None
    assert not entries[-1][1] & PTE_D
    cpu.regs[RIP], cpu.regs[RDI], cpu.regs[RAX] = CODE, va, 7
    assert run_to_trap(cpu) == (TRAP_SYSCALL, 0, 0)
    assert forced.memory.q[mfn << 9] == 7


@pytest.mark.parametrize("in_c", [False, True])
def test_a_frame_of_another_domain_is_used_on_unicorn(monkeypatch: pytest.MonkeyPatch, in_c: bool) -> None:
    """A stub has its own domain's memory object alone; between such accesses the program is back in it."""
    if in_c and native.missing():
        pytest.skip("no native code here")
    monkeypatch.setenv(host.SETTING, host.FORCE)
    monkeypatch.setattr(bare, "MachineMemory", partial(MachineMemory, aliases=4))
    machine, granter = BareMachine("unicorn"), MachineMemory(16)
    mfn = int(granter.allocate(1)[0])
    alias = machine.memory.map_alias(granter, mfn, writable=True)
    machine.set_entry(DATA + 0x1000, alias << PAGE_SHIFT | ACCESS, machine.user_l4)
    # mov rax, [rdi]; syscall; mov [rsi + 8], rax; syscall; mov rax, [rsi]; mov [rdi], rax; syscall
    cpu = machine.start("48 8b 07 0f 05 48 89 46 08 0f 05 48 8b 06 48 89 07 0f 05", user=True)
    assert isinstance(cpu, NativeUserCpu)
    if in_c:
        cpu.attach(Unhandled())
    cpu.regs[RDI], cpu.regs[RSI] = DATA, DATA + 0x1000
    machine.memory.q[machine.data[1] << 9] = 11
    granter.q[mfn << 9] = 22
    for _ in range(3):
        before = cpu.traps
        assert run_to_trap(cpu) == (TRAP_SYSCALL, 0, 0)
        assert cpu.traps > before
    assert granter.q[(mfn << 9) + 1] == 11
    assert machine.memory.q[machine.data[1] << 9] == 22
    machine.memory.unmap_alias(alias)
    machine.close()
    granter.close()


def test_an_l4_table_that_ends_is_noticed_though_its_stub_is_anothers(
    forced: BareMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spaces, "MOST_STUBS", 1)
    cpu = forced.start(READ, user=True)
    assert isinstance(cpu, NativeUserCpu)
    other = forced.new_l4()
    forced.set_entry(CODE, forced.code[1] << PAGE_SHIFT | PTE_P | PTE_US, other)
    forced.map_new(BASES[0], other)
    for l4 in (other, forced.user_l4):
        cpu.switch_mode(l4, True)
        cpu.regs[RIP], cpu.regs[RDI] = CODE, CODE
        assert run_to_trap(cpu) == (TRAP_SYSCALL, 0, 0)
    assert cpu.spaces.made == 1
    assert forced.engine.entry_changed is not None
    forced.engine.entry_changed(other << 9, PTE_P, 0)
    cpu.spaces.take_reports()
    assert cpu.spaces.dead == {other}
