"""Direct paging keeps its invariants whatever a guest asks for.

Random pins, unpins, entry updates and base pointers on a machine of a few frames, with two domains; after each
operation the invariant checker recounts every reference from the tables.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xenolith.abi.errno import EBUSY, EINVAL, ERESTART
from xenolith.abi.x86 import PTE_NX, PTE_P, PTE_PSE, PTE_RW, PTE_US
from xenolith.hypervisor import audit, paging
from xenolith.hypervisor.domain import WORK, Domain
from xenolith.hypervisor.events import EventChannels
from xenolith.hypervisor.frames import (
    MOST_REFERENCES,
    PARTIAL,
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
        domain.grants, domain.events = GrantTable(domain), EventChannels(domain)
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
    assert memory_op.remove_pages(machine.domain, page)
    assert memory_op.remove_pages(machine.domain, page), "as on Xen: a second time takes nothing more"
    assert machine.domain.frames.owner[page] == 1
    assert paging.modify_l1(machine.domain, table << 9, 0) == 0
    assert machine.domain.frames.owner[page] != 1
    assert machine.domain.total_pages == FRAMES_EACH - 1
    assert machine.problems() == []


# --- bounded work ----------------------------------------------------------------------------------


def grow_tree(machine: Machine) -> tuple[list[int], int]:
    """Frames for an L4, L3 and two L2 tables, each of which links two L1 tables; and a frame that those map."""
    l4, l3, *l2s, page = machine.own[:5]
    l1s = machine.own[5:9]
    machine.write_raw(l4, 7, entry(l3))
    for slot, l2 in enumerate(l2s):
        machine.write_raw(l3, 500 * slot, entry(l2))
        for number in range(2):
            machine.write_raw(l2, number + 9, entry(l1s[2 * slot + number]))
            machine.write_raw(l1s[2 * slot + number], number, entry(page))
    return [l4, l3, *l2s, *l1s], page


def steps(machine: Machine, operation: Callable[[], int]) -> int:
    """How often a guest makes an operation until it is done, with work for an entry of each level each time."""
    for count in range(1, 100):
        machine.domain.work_left = 4
        if paging.undo(machine.domain) and operation() != -ERESTART:
            return count
        assert machine.problems() == []
    raise AssertionError("it makes no progress")


def test_a_pin_is_done_in_steps_each_of_which_is_kept(machine: Machine) -> None:
    (l4, *_), page = grow_tree(machine)
    assert steps(machine, lambda: paging.pin(machine.domain, l4, TYPE_L4)) == 4  # an L1 table each
    assert machine.domain.frames.type_info[page] & TYPE_COUNT == 4
    assert machine.problems() == []


def test_an_unpin_drops_a_tree_in_steps_before_anything_else_is_done(machine: Machine) -> None:
    (l4, *tables), page = grow_tree(machine)
    info = machine.domain.frames.type_info
    machine.domain.work_left = WORK
    assert paging.pin(machine.domain, l4, TYPE_L4) == 0
    machine.domain.work_left = 1
    assert paging.unpin(machine.domain, l4) == 0
    assert info[page] & TYPE_COUNT
    assert machine.problems() == []
    assert steps(machine, lambda: 0) > len(tables) // 2
    assert not any(info[mfn] & TYPE_COUNT for mfn in (*tables, page))
    assert machine.problems() == []


def test_what_was_validated_of_a_tree_that_is_refused_is_dropped(machine: Machine) -> None:
    (l4, *tables), page = grow_tree(machine)
    machine.write_raw(tables[-1], 511, entry(machine.foreign[0]))
    result = []
    steps(machine, lambda: result.append(paging.pin(machine.domain, l4, TYPE_L4)) or result[-1])
    assert result[-1] == -EBUSY
    steps(machine, lambda: 0)
    assert not any(machine.domain.frames.type_info[mfn] & TYPE_COUNT for mfn in (l4, *tables, page))
    assert machine.problems() == []


def test_a_table_validated_in_part_cannot_be_written(machine: Machine) -> None:
    """Neither through a mapping nor as a page table that it is not yet."""
    (l4, l3, *_), _ = grow_tree(machine)
    mapper = machine.own[9]
    assert paging.pin(machine.domain, mapper, TYPE_L1) == 0
    machine.domain.work_left = 100
    assert paging.pin(machine.domain, l4, TYPE_L4) == -ERESTART
    assert machine.domain.frames.type_info[l3] & PARTIAL
    assert paging.modify_l1(machine.domain, mapper << 9, entry(l3)) == -EBUSY
    assert paging.modify_entry(machine.domain, l3 << 12, 0, False) == -EINVAL
    assert machine.problems() == []


def test_a_domain_that_dies_with_tables_half_done_gives_back_every_frame(machine: Machine) -> None:
    (l4, *_), _ = grow_tree(machine)
    machine.domain.work_left = 100
    assert paging.pin(machine.domain, l4, TYPE_L4) == -ERESTART
    paging.relinquish(machine.domain)
    assert (machine.domain.frames.owners != 1).all()
    assert machine.problems() == []


# --- counts ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["existence", "type"])
def test_references_beyond_what_a_count_holds_are_refused(machine: Machine, kind: str) -> None:
    table, page, fresh, l2 = machine.own[:4]
    frames, domain = machine.domain.frames, machine.domain
    assert paging.pin(domain, table, TYPE_L1) == 0
    assert paging.modify_l1(domain, table << 9, entry(page)) == 0
    infos = frames.type_info if kind == "type" else frames.count_info
    infos[page] += MOST_REFERENCES - (infos[page] & TYPE_COUNT) - 1
    assert paging.modify_l1(domain, table << 9 | 1, entry(page)) == 0
    before = infos[page]
    assert before & TYPE_COUNT == MOST_REFERENCES
    assert paging.modify_l1(domain, table << 9 | 2, entry(page)) == -EBUSY
    machine.write_raw(fresh, 0, entry(page))
    assert paging.pin(domain, fresh, TYPE_L1) == -EBUSY
    assert paging.get_page_and_type(domain, page, TYPE_WRITABLE) == -EINVAL
    assert infos[page] == before
    infos[table] += MOST_REFERENCES - (infos[table] & TYPE_COUNT)
    machine.write_raw(l2, 0, entry(table))
    assert paging.pin(domain, l2, TYPE_L2) == -EINVAL


def test_a_reference_that_nothing_holds_cannot_be_dropped(machine: Machine) -> None:
    page = machine.own[0]
    with pytest.raises(AssertionError):
        paging.put_page_type(machine.domain, page)
    assert machine.domain.frames.put_page(page)
    with pytest.raises(AssertionError):
        machine.domain.frames.put_page(page)


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
@given(st.lists(operations, max_size=40), st.sampled_from((1, 2, 3, 60, WORK)))
def test_no_sequence_of_operations_breaks_an_invariant(sequence: list[tuple[str, int, Any]], work: int) -> None:
    """However little of it is done at a time, and whether or not the guest goes on with what it began."""
    machine = Machine()
    domain = machine.domain
    frames = machine.own

    def target(number: int) -> int:
        return frames[number] if number < FRAMES_EACH else machine.foreign[0]

    other_before = bytes(machine.memory.b[machine.foreign[0] << 12 : (machine.foreign[-1] + 1) << 12])
    for name, number, detail in sequence:
        domain.work_left = work
        if not paging.undo(domain):  # as ring 0 before each hypercall
            assert machine.problems() == []
            continue
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
            memory_op.remove_pages(domain, mfn)
        assert machine.problems() == []
    assert bytes(machine.memory.b[machine.foreign[0] << 12 : (machine.foreign[-1] + 1) << 12]) == other_before
    paging.relinquish(domain)
    assert (domain.frames.owners != 1).all(), "a dead domain gives back every frame"
    assert machine.problems() == []
