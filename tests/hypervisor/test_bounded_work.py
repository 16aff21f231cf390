"""No loop whose length a guest chooses keeps its domain's lock or its vCPU: each trap does a little, and is made again.

Steps are counted, not time: `Domain.work_left` says what a trap has done.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from struct import pack, unpack

import pytest

from xenolith.abi import hypercalls as abi
from xenolith.abi.errno import EBUSY, EINVAL
from xenolith.abi.layout import MMUEXT_OP, MULTICALL_ENTRY
from xenolith.abi.x86 import PAGE_SIZE, PTE_P, PTE_RW, PTE_US, R8, R10, RAX, RDI, RDX, RIP, RSI
from xenolith.hypervisor import audit, paging
from xenolith.hypervisor.domain import WORK, Domain, DomainLock, Vcpu
from xenolith.hypervisor.frames import TYPE_COUNT, UNDOING
from xenolith.hypervisor.hypercalls import memory_op
from xenolith.hypervisor.lifecycle import destroy
from xenolith.hypervisor.traps import trap_handler
from xenolith.machine.engines.protocol import TRAP_SYSCALL

from .bare import DATA, BareMachine, read, write

LEFT_OVER = 1200  # what one step that has begun may do beyond a trap's work: an extent of 512 frames, exchanged
MEMORY = 2600  # pages
TABLE = PTE_P | PTE_RW | PTE_US
ARGUMENTS = (RDI, RSI, RDX, R10, R8)


class Guest:
    """A domain with room, whose hypercalls go through its trap handler; Python handles them all."""

    def __init__(self, machine: BareMachine) -> None:
        self.machine = machine
        self.domain: Domain = machine.domain(max_pages=MEMORY)
        self.vcpu: Vcpu = self.domain.vcpus[0]
        engine = self.domain.engine
        assert engine is not None
        self.cpu = engine.cpu(0)
        self.cpu.regs[:] = self.vcpu.state.regs
        self.vcpu.cpu, self.vcpu.regs, self.vcpu.thread = self.cpu, self.cpu.regs, threading.get_ident()
        self.vcpu.may_run = True
        self._on_trap = trap_handler(self.vcpu, self.cpu)
        self.traps = 0
        self.most = 0  # work of one trap

    def trap(self, number: int, *arguments: int) -> bool:
        """One trap; whether the guest is to make it again."""
        regs = self.cpu.regs
        regs[RAX], regs[RIP] = number, 0x1002
        for register, value in zip(ARGUMENTS, arguments, strict=False):
            regs[register] = value
        assert self._on_trap(TRAP_SYSCALL, 0, 0)
        self.traps += 1
        self.most = max(self.most, self.domain.work_limit - self.domain.work_left)
        return regs[RIP] == 0x1000

    def hypercall(self, number: int, *arguments: int) -> int:
        """A hypercall, made again until it is done: its result."""
        regs = self.cpu.regs
        self.traps = 0
        while self.trap(number, *arguments):
            number, arguments = regs[RAX], tuple(regs[register] for register in ARGUMENTS)
            assert self.traps < 10_000, "no progress"
            assert audit_is_clean(self) if self.traps < 3 else True
        result: int = regs[RAX]
        return result - (result >> 63 << 64)

    def frames(self, count: int) -> list[int]:
        return [int(mfn) for mfn in self.machine.control.populate(self.domain.domid, count)]


def audit_is_clean(guest: Guest) -> bool:
    assert audit.check(guest.machine.hypervisor) == []
    return True


@pytest.fixture
def guest() -> Iterator[Guest]:
    machine = BareMachine()
    guest = Guest(machine)
    yield guest
    assert guest.most <= WORK + LEFT_OVER
    machine.close()


def grow_tree(guest: Guest, l1_tables: int) -> int:
    """An L4, an L3, L2s and L1s that all map one page 512 times: the L4's MFN."""
    l4, l3, page, *l2s = guest.frames(3 + (l1_tables + 511) // 512)
    memory = guest.domain.memory
    for number, l1 in enumerate(guest.frames(l1_tables)):
        memory.table(l1)[:] = page << 12 | TABLE
        memory.q[l2s[number // 512] << 9 | number % 512] = l1 << 12 | TABLE
    for slot, l2 in enumerate(l2s):
        memory.q[l3 << 9 | slot] = l2 << 12 | TABLE
    memory.q[l4 << 9] = l3 << 12 | TABLE
    return l4


def operations(*commands: tuple[int, int]) -> bytes:
    return b"".join(MMUEXT_OP.pack(command, 0, mfn, 0) for command, mfn in commands)


# --- page tables -----------------------------------------------------------------------------------


def test_a_large_tree_is_pinned_and_unpinned_over_and_over_in_small_steps(guest: Guest) -> None:
    l4 = grow_tree(guest, 1000)
    both = operations((abi.MMUEXT_PIN_L4_TABLE, l4), (abi.MMUEXT_UNPIN_TABLE, l4))
    write(guest.vcpu, DATA, both * 4)
    assert guest.hypercall(abi.HYPERVISOR_mmuext_op, DATA, 8, DATA + PAGE_SIZE, abi.DOMID_SELF) == 0
    assert unpack("<I", read(guest.vcpu, DATA + PAGE_SIZE, 4)) == (8,)
    assert guest.traps > 8 * 1000 * paging.L1_WORK // (WORK + LEFT_OVER)
    guest.hypercall(abi.HYPERVISOR_vm_assist, 0, 0)  # empties the list before it does anything
    assert not any(info & UNDOING for info in guest.domain.frames.type_info)
    assert audit_is_clean(guest)


def test_a_tree_with_an_error_at_its_end_is_dropped_in_small_steps_too(guest: Guest) -> None:
    l4 = grow_tree(guest, 600)
    memory = guest.domain.memory
    l3 = memory.q[l4 << 9] >> 12
    memory.q[l3 << 9 | 511] = guest.domain.shared_info >> 12 << 12 | TABLE  # no page table
    write(guest.vcpu, DATA, operations((abi.MMUEXT_PIN_L4_TABLE, l4)))
    assert guest.hypercall(abi.HYPERVISOR_mmuext_op, DATA, 1, 0, abi.DOMID_SELF) in (-EINVAL, -EBUSY)
    guest.hypercall(abi.HYPERVISOR_vm_assist, 0, 0)
    assert guest.traps > 600 * paging.L1_WORK // (WORK + LEFT_OVER) // 2
    assert not guest.domain.frames.type_info[l4] & TYPE_COUNT
    assert audit_is_clean(guest)


def test_an_entry_that_links_a_large_tree_takes_as_many_traps_as_it_needs(guest: Guest) -> None:
    big, l4 = grow_tree(guest, 600), grow_tree(guest, 1)
    write(guest.vcpu, DATA, operations((abi.MMUEXT_PIN_L4_TABLE, l4)))
    assert guest.hypercall(abi.HYPERVISOR_mmuext_op, DATA, 1, 0, abi.DOMID_SELF) == 0
    for value in (guest.domain.memory.q[big << 9], 0):
        write(guest.vcpu, DATA, pack("<QQ", (l4 << 9 | 300) << 3, value))
        assert guest.hypercall(abi.HYPERVISOR_mmu_update, DATA, 1, 0, abi.DOMID_SELF) == 0
        if value:
            assert guest.traps > 600 * paging.L1_WORK // (WORK + LEFT_OVER)
            assert guest.domain.memory.q[l4 << 9 | 300] & ~PTE_US == value & ~PTE_US
    assert audit_is_clean(guest)


def test_a_multicall_of_pins_is_left_between_its_calls_and_within_them(guest: Guest) -> None:
    l4 = grow_tree(guest, 300)
    write(guest.vcpu, DATA, operations((abi.MMUEXT_PIN_L4_TABLE, l4), (abi.MMUEXT_UNPIN_TABLE, l4)))
    call = MULTICALL_ENTRY.pack(abi.HYPERVISOR_mmuext_op, 99, DATA, 2, 0, abi.DOMID_SELF, 0, 0)
    write(guest.vcpu, DATA + PAGE_SIZE, call * 8)
    assert guest.hypercall(abi.HYPERVISOR_multicall, DATA + PAGE_SIZE, 8) == 0
    assert guest.traps > 16 * 300 * paging.L1_WORK // (WORK + LEFT_OVER)
    results = [unpack("<q", read(guest.vcpu, DATA + PAGE_SIZE + 64 * n + 8, 8))[0] for n in range(8)]
    assert results == [0] * 8


def test_a_dead_domain_with_tables_half_done_is_undone(guest: Guest) -> None:
    l4 = grow_tree(guest, 300)
    write(guest.vcpu, DATA, operations((abi.MMUEXT_PIN_L4_TABLE, l4)))
    assert guest.trap(abi.HYPERVISOR_mmuext_op, DATA, 1, 0, abi.DOMID_SELF)
    free = guest.machine.hypervisor.memory.free_frames
    guest.vcpu.cpu = None
    destroy(guest.domain)
    assert guest.machine.hypervisor.memory.free_frames > free + 300
    assert audit_is_clean(guest)


# --- memory ----------------------------------------------------------------------------------------


def reservation(extents_va: int, count: int, order: int) -> bytes:
    return pack("<QQIIHHI", extents_va, count, order, 0, abi.DOMID_SELF, 0, 0)


@pytest.mark.parametrize(("order", "count"), [(0, 1500), (9, 4)])
def test_a_reservation_grows_and_shrinks_in_small_steps(guest: Guest, order: int, count: int) -> None:
    before = guest.domain.total_pages
    write(guest.vcpu, DATA, reservation(DATA + PAGE_SIZE, count, order))
    for number in range(count):
        write(guest.vcpu, DATA + PAGE_SIZE + 8 * number, pack("<Q", 5000 + (number << order)))
    assert guest.hypercall(abi.HYPERVISOR_memory_op, abi.XENMEM_populate_physmap, DATA) == count
    assert guest.traps > 1 or order
    assert guest.domain.total_pages == before + (count << order)
    assert guest.hypercall(abi.HYPERVISOR_memory_op, abi.XENMEM_decrease_reservation, DATA) == count
    assert guest.traps > 1
    assert guest.domain.total_pages == before
    assert audit_is_clean(guest)


def test_an_extent_to_be_given_back_is_no_larger_than_one_that_is_asked_for(guest: Guest) -> None:
    write(guest.vcpu, DATA, reservation(DATA + PAGE_SIZE, 1, memory_op.MAX_ORDER + 1))
    write(guest.vcpu, DATA + PAGE_SIZE, pack("<Q", 1))
    assert guest.hypercall(abi.HYPERVISOR_memory_op, abi.XENMEM_decrease_reservation, DATA) == 0


def test_an_exchange_that_feeds_itself_is_left_and_made_again(guest: Guest) -> None:
    """The list of what comes out lies one entry behind the list of what goes in."""
    (first,) = guest.frames(1)
    lists, count = DATA + PAGE_SIZE, 1 << 20
    write(guest.vcpu, lists, pack("<Q", first))
    exchange = pack("<QQIIH6xQQIIH6xQ", lists, count, 0, 0, abi.DOMID_SELF, lists + 8, count, 0, 0, abi.DOMID_SELF, 0)
    write(guest.vcpu, DATA, exchange)
    for number in range(500):
        write(guest.vcpu, lists + 8 + 8 * number, pack("<Q", 77))
    assert guest.trap(abi.HYPERVISOR_memory_op, abi.XENMEM_exchange, DATA)
    done = []
    for _ in range(3):
        (exchanged,) = unpack("<Q", read(guest.vcpu, DATA + len(exchange) - 8, 8))
        done.append(exchanged)
        assert guest.trap(abi.HYPERVISOR_memory_op, abi.XENMEM_exchange, DATA)
    assert 0 < done[0] < done[1] < done[2] < WORK
    assert audit_is_clean(guest)


# --- others ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [abi.GNTTABOP_cache_flush, abi.GNTTABOP_unmap_grant_ref])
def test_a_batch_of_grant_operations_is_left_when_its_work_is_done(guest: Guest, command: int) -> None:
    write(guest.vcpu, DATA, bytes(7 * PAGE_SIZE))
    assert guest.trap(abi.HYPERVISOR_grant_table_op, command, DATA, 1000)
    assert 0 < guest.cpu.regs[RDX] < 1000
    assert DATA < guest.cpu.regs[RSI] < DATA + 7 * PAGE_SIZE


def test_all_ports_are_closed_in_small_steps(guest: Guest) -> None:
    ports = guest.domain.events
    guest.domain.work_limit = 200
    while ports.alloc_unbound(0) > 0:
        pass
    write(guest.vcpu, DATA, pack("<H", abi.DOMID_SELF))
    assert guest.hypercall(abi.HYPERVISOR_event_channel_op, abi.EVTCHNOP_reset, DATA) == 0
    assert guest.traps > 5
    assert ports.alloc_unbound(0) == 1


# --- the lock --------------------------------------------------------------------------------------


def test_who_waits_for_a_domains_lock_has_it_before_the_next_trap(guest: Guest) -> None:
    lock: DomainLock = guest.domain.lock
    order: list[str] = []

    def control() -> None:
        with lock:
            order.append("control")

    lock.acquire()  # by a trap that is handled
    thread = threading.Thread(target=control)
    thread.start()
    while not guest.domain.lock_wanted:
        pass
    lock.release()
    guest.trap(abi.HYPERVISOR_vm_assist, 0, 0)
    assert order == ["control"]
    assert not guest.domain.lock_wanted
    thread.join()
