"""Direct paging keeps its invariants whatever a guest asks for.

Random pins, unpins, entry updates and base pointers on a machine of a few frames, with two domains; after each
operation the invariant checker recounts every reference from the tables.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xenolith.abi.errno import EBUSY, EINVAL
from xenolith.abi.x86 import PTE_NX, PTE_P, PTE_PSE, PTE_RW, PTE_US
from xenolith.hypervisor import audit, paging
from xenolith.hypervisor.domain import Domain
from xenolith.hypervisor.frames import (
    TYPE_COUNT,
    TYPE_L1,
    TYPE_L2,
    TYPE_L3,
    TYPE_L4,
    TYPE_MASK,
    TYPE_WRITABLE,
)
from xenolith.hypervisor.grants import GrantTable, Mapping
from xenolith.hypervisor.hypercalls import memory_op
from xenolith.hypervisor.time import TimerQueue
from xenolith.hypervisor.view import View
from xenolith.machine.clock import VirtualClock
from xenolith.machine.memory import MemoryBudget

FRAMES_EACH = 12
LEVELS = (TYPE_L1, TYPE_L2, TYPE_L3, TYPE_L4)


class Machine:
    """Two domains on a machine without engines: d1 owns `own`, and has frames of d2's mapped at `foreign`."""

    def __init__(self) -> None:
        clock = VirtualClock()
        self.hypervisor: Any = SimpleNamespace(
            memory=MemoryBudget(4096), domains={}, clock=clock, timers=TimerQueue(clock)
        )
        self.hypervisor.domain = self.hypervisor.domains.get
        self.domain = self._domain(1)
        self.other = self._domain(2)
        self.memory = self.domain.memory
        self.own = self._populate(self.domain)
        self.foreign: list[int] = []
        for mfn in self._populate(self.other):
            alias = self.domain.frames.map_foreign(self.other.memory, mfn, True)
            self.domain.grants.add_mapping(Mapping(self.other, 0, mfn, True, 0, alias))
            self.foreign.append(alias)

    def _domain(self, domid: int) -> Domain:
        domain = Domain(self.hypervisor, domid, None, 1, View(self.hypervisor.memory, FRAMES_EACH))
        domain.grants = GrantTable(domain)
        self.hypervisor.domains[domid] = domain
        return domain

    def _populate(self, domain: Domain) -> list[int]:
        mfns = domain.memory.allocate(FRAMES_EACH)
        domain.frames.assign(mfns, domain.domid)
        domain.total_pages = domain.max_pages = FRAMES_EACH
        return [int(mfn) for mfn in mfns]

    def problems(self) -> list[str]:
        return audit.check(self.hypervisor)

    def write_raw(self, mfn: int, slot: int, entry: int) -> bool:
        """A guest's own store to a frame that it can have mapped writable."""
        info = self.domain.frames.type_info[mfn]
        if self.domain.frames.owner[mfn] != 1 or (info & TYPE_COUNT and info & TYPE_MASK != TYPE_WRITABLE):
            return False
        self.memory.q[mfn << 9 | slot] = entry
        return True


@pytest.fixture
def machine() -> Machine:
    return Machine()


def entry(mfn: int, flags: int = PTE_P | PTE_RW | PTE_US) -> int:
    return mfn << 12 | flags


def test_pinning_an_l1_table_takes_a_reference_on_every_frame_it_maps(machine: Machine) -> None:
    table, page = machine.own[:2]
    machine.write_raw(table, 3, entry(page))
    assert paging.pin(machine.domain, table, TYPE_L1) == 0
    assert machine.domain.frames.type_info[page] & TYPE_MASK == TYPE_WRITABLE
    assert machine.problems() == []
    assert paging.unpin(machine.domain, table) == 0
    assert machine.domain.frames.type_info[page] & TYPE_COUNT == 0
    assert machine.problems() == []


def test_a_table_that_maps_itself_writable_is_refused(machine: Machine) -> None:
    table = machine.own[0]
    machine.write_raw(table, 0, entry(table))
    assert paging.pin(machine.domain, table, TYPE_L1) == -EBUSY
    assert machine.problems() == []


def test_a_table_that_maps_a_foreign_frame_is_refused(machine: Machine) -> None:
    table = machine.own[0]
    machine.write_raw(table, 0, entry(machine.foreign[0], PTE_P | PTE_US))
    assert paging.pin(machine.domain, table, TYPE_L1) == -EBUSY
    assert machine.problems() == []


def test_a_page_table_in_use_cannot_become_writable(machine: Machine) -> None:
    table, mapper = machine.own[:2]
    assert paging.pin(machine.domain, table, TYPE_L1) == 0
    assert paging.pin(machine.domain, mapper, TYPE_L1) == 0
    assert paging.modify_l1(machine.domain, mapper << 9, entry(table)) == -EBUSY
    assert paging.modify_l1(machine.domain, mapper << 9, entry(table, PTE_P | PTE_US)) == 0
    assert machine.problems() == []


def test_a_failed_validation_leaves_no_reference_behind(machine: Machine) -> None:
    l2, good, bad = machine.own[:3]
    machine.write_raw(bad, 0, entry(machine.foreign[0]))
    machine.write_raw(l2, 0, entry(good))
    machine.write_raw(l2, 1, entry(bad))
    before = bytes(machine.domain.frames.count_infos)
    assert paging.pin(machine.domain, l2, TYPE_L2) == -EBUSY
    assert bytes(machine.domain.frames.count_infos) == before
    assert machine.problems() == []


def test_superpages_are_refused(machine: Machine) -> None:
    l2, page = machine.own[:2]
    machine.write_raw(l2, 0, entry(page, PTE_P | PTE_RW | PTE_US | PTE_PSE))
    assert paging.pin(machine.domain, l2, TYPE_L2) == -EINVAL


def test_a_linear_map_of_an_l4_itself_is_allowed_read_only_and_refused_writable(machine: Machine) -> None:
    l4 = machine.own[0]
    assert paging.pin(machine.domain, l4, TYPE_L4) == 0
    assert paging.modify_upper(machine.domain, l4 << 9 | 300, entry(l4), TYPE_L4) == -EINVAL
    assert paging.modify_upper(machine.domain, l4 << 9 | 300, entry(l4, PTE_P | PTE_US), TYPE_L4) == 0
    assert machine.problems() == []
    assert paging.unpin(machine.domain, l4) == 0
    assert machine.problems() == []


def test_xens_own_l4_slots_cannot_be_written(machine: Machine) -> None:
    l4, l3 = machine.own[:2]
    assert paging.pin(machine.domain, l4, TYPE_L4) == 0
    for slot in (256, 260, 271):
        assert paging.modify_upper(machine.domain, l4 << 9 | slot, entry(l3), TYPE_L4) == -EINVAL
    assert paging.modify_upper(machine.domain, l4 << 9 | 272, entry(l3), TYPE_L4) == 0
    assert machine.problems() == []


def test_a_frame_given_back_while_mapped_stays_until_it_is_unmapped(machine: Machine) -> None:
    table, page = machine.own[:2]
    assert paging.pin(machine.domain, table, TYPE_L1) == 0
    assert paging.modify_l1(machine.domain, table << 9, entry(page)) == 0
    assert memory_op.remove_page(machine.domain, page)
    assert memory_op.remove_page(machine.domain, page), "as on Xen: a second time takes nothing more"
    assert machine.domain.frames.owner[page] == 1
    assert paging.modify_l1(machine.domain, table << 9, 0) == 0
    assert machine.domain.frames.owner[page] != 1
    assert machine.domain.total_pages == FRAMES_EACH - 1
    assert machine.problems() == []


operations = st.one_of(
    st.tuples(st.just("pin"), st.integers(0, FRAMES_EACH - 1), st.integers(0, 3)),
    st.tuples(st.just("unpin"), st.integers(0, FRAMES_EACH - 1), st.just(0)),
    st.tuples(
        st.just("entry"),
        st.integers(0, FRAMES_EACH - 1),
        st.tuples(
            st.sampled_from((0, 1, 2, 255, 256, 260, 300, 511)),
            st.integers(0, FRAMES_EACH),
            st.sampled_from(
                (0, PTE_P, PTE_P | PTE_US, PTE_P | PTE_RW, PTE_P | PTE_RW | PTE_US | PTE_NX, PTE_P | PTE_PSE)
            ),
        ),
    ),
    st.tuples(
        st.just("raw"),
        st.integers(0, FRAMES_EACH - 1),
        st.tuples(
            st.sampled_from((0, 1, 2, 256, 300)),
            st.integers(0, FRAMES_EACH),
            st.sampled_from((0, PTE_P, PTE_P | PTE_RW)),
        ),
    ),
    st.tuples(st.just("base"), st.integers(-1, FRAMES_EACH - 1), st.just(0)),
    st.tuples(st.just("release"), st.integers(0, FRAMES_EACH - 1), st.just(0)),
)


@settings(max_examples=300, deadline=None)
@given(st.lists(operations, max_size=40))
def test_no_sequence_of_operations_breaks_an_invariant(sequence: list[tuple[str, int, Any]]) -> None:
    machine = Machine()
    domain = machine.domain
    frames = machine.own

    def target(number: int) -> int:
        return frames[number] if number < FRAMES_EACH else machine.foreign[0]

    other_before = bytes(machine.memory.b[machine.foreign[0] << 12 : (machine.foreign[-1] + 1) << 12])
    for name, number, detail in sequence:
        mfn = frames[number]
        if name == "pin":
            paging.pin(domain, mfn, LEVELS[detail])
        elif name == "unpin":
            paging.unpin(domain, mfn)
        elif name == "entry":
            slot, page, flags = detail
            if domain.frames.get_page(mfn, 1):
                paging.modify_entry(domain, mfn << 12 | slot << 3, entry(target(page), flags), False)
                paging.put_page(domain, mfn)
        elif name == "raw":
            slot, page, flags = detail
            machine.write_raw(mfn, slot, entry(target(page), flags))
        elif name == "base":
            new = mfn if number >= 0 else 0
            vcpu = domain.vcpus[0]
            if not new or (new != vcpu.kernel_l4 and not paging.get_page_and_type(domain, new, TYPE_L4)):
                paging.drop_base(domain, vcpu.kernel_l4)
                vcpu.kernel_l4 = new
        else:
            memory_op.remove_page(domain, mfn)
        assert machine.problems() == []
    assert bytes(machine.memory.b[machine.foreign[0] << 12 : (machine.foreign[-1] + 1) << 12]) == other_before
    paging.relinquish(domain)
    assert (domain.frames.owners != 1).all(), "a dead domain gives back every frame"
    assert machine.problems() == []
