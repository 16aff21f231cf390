"""Grants: a domain's frames reach others exactly as it permits, for as long as they hold them."""

from __future__ import annotations

import ctypes
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xenolith.abi import grant_table as abi
from xenolith.abi.grant_table import (
    GNTMAP_device_map,
    GNTMAP_host_map,
    GNTMAP_readonly,
    GNTST_bad_copy_arg,
    GNTST_bad_domain,
    GNTST_bad_gntref,
    GNTST_bad_handle,
    GNTST_bad_page,
    GNTST_general_error,
    GNTST_okay,
    GTF_permit_access,
    GTF_reading,
    GTF_readonly,
    GTF_sub_page,
    GTF_transitive,
    GTF_writing,
)
from xenolith.abi.hypercalls import GNTTABOP_copy, GNTTABOP_map_grant_ref, GNTTABOP_unmap_grant_ref
from xenolith.abi.x86 import PAGE_SIZE
from xenolith.hypervisor import audit, events, paging
from xenolith.hypervisor.control import DomainCreateError, RecordError
from xenolith.hypervisor.domain import Domain, Vcpu
from xenolith.hypervisor.frames import TYPE_L1
from xenolith.hypervisor.guest_memory import WRITE, translate
from xenolith.hypervisor.hypercalls import memory_op
from xenolith.hypervisor.hypercalls.grant_table_op import do_grant_table_op
from xenolith.hypervisor.hypercalls.mmu import l1_entry_index
from xenolith.hypervisor.python_domain import HypercallError, MappedGrant
from xenolith.machine.memory import MOST_ALIASES, OWN_ALIASES, OutOfMemory
from xenolith.machine.write_tracking import NotTracked

from .bare import DATA, BareMachine, read, write

REF = 8


@pytest.fixture
def machine() -> Iterator[BareMachine]:
    machine = BareMachine()
    yield machine
    assert not audit.check(machine.hypervisor)
    machine.close()


def frame(domain: Domain, page: int) -> int:
    """MFN of one of the domain's pages."""
    return translate(domain.vcpus[0], DATA + page * PAGE_SIZE, WRITE) >> 12


def grant(domain: Domain, ref: int, domid: int, mfn: int, flags: int = GTF_permit_access) -> None:
    """What a guest stores in its table."""
    domain.grants.grow(1)
    address, words = domain.grants.entry_address(ref), domain.memory.d
    words[address + (4 if domain.grants.version == 1 else 8) >> 2] = mfn
    words[address >> 2] = flags | domid << 16


@contextmanager
def refused(status: int) -> Iterator[None]:
    """What a hypercall of dom0's is refused with."""
    with pytest.raises(HypercallError) as error:
        yield
    assert error.value.status == status


def flags(domain: Domain, ref: int) -> int:
    return domain.memory.h[domain.grants.entry_address(ref) >> 1]


def test_a_backend_reads_and_writes_the_page_it_was_granted(machine: BareMachine) -> None:
    domain = machine.domain()
    grant(domain, REF, 0, frame(domain, 3))
    write(domain.vcpus[0], DATA + 3 * PAGE_SIZE, b"request")
    mapped = machine.dom0.map_grant(domain.domid, REF)
    assert bytes(mapped.view[:7]) == b"request"
    assert ctypes.string_at(mapped.address, PAGE_SIZE) == mapped.view
    assert flags(domain, REF) == GTF_permit_access | GTF_reading | GTF_writing
    assert not audit.check(machine.hypervisor)
    mapped.view[:8] = b"response"
    machine.dom0.unmap_grant(mapped)
    assert read(domain.vcpus[0], DATA + 3 * PAGE_SIZE, 8) == b"response"
    assert flags(domain, REF) == GTF_permit_access
    other = machine.dom0.map_grant(domain.domid, REF)
    with refused(GNTST_bad_handle):
        machine.dom0.unmap_grant(mapped)
    machine.dom0.unmap_grant(other)


def test_a_page_mapped_read_only_cannot_be_written(machine: BareMachine) -> None:
    domain = machine.domain()
    grant(domain, REF, 0, frame(domain, 3), GTF_permit_access | GTF_readonly)
    with refused(GNTST_general_error):
        machine.dom0.map_grant(domain.domid, REF)
    with machine.dom0.map_grant(domain.domid, REF, writable=False) as mapped:
        assert flags(domain, REF) == GTF_permit_access | GTF_readonly | GTF_reading
        with pytest.raises(TypeError):
            mapped.view[0] = 1
    assert flags(domain, REF) == GTF_permit_access | GTF_readonly


def test_the_entry_is_marked_until_the_last_mapping_is_gone(machine: BareMachine) -> None:
    domain = machine.domain()
    grant(domain, REF, 0, frame(domain, 3))
    dom0 = machine.dom0
    first, second = dom0.map_grant(domain.domid, REF), dom0.map_grant(domain.domid, REF, writable=False)
    dom0.unmap_grant(first)
    assert flags(domain, REF) == GTF_permit_access | GTF_reading
    dom0.unmap_grant(second)
    assert flags(domain, REF) == GTF_permit_access


def test_what_an_entry_says_later_does_not_change_what_is_mapped(machine: BareMachine) -> None:
    domain = machine.domain()
    grant(domain, REF, 0, frame(domain, 3))
    with machine.dom0.map_grant(domain.domid, REF, writable=False):
        grant(domain, REF, 0, frame(domain, 4))
        write(domain.vcpus[0], DATA + 3 * PAGE_SIZE, b"three")
        with machine.dom0.map_grant(domain.domid, REF, writable=False) as second:
            assert bytes(second.view[:5]) == b"three"


def test_grants_that_are_refused(machine: BareMachine) -> None:
    domain = machine.domain()
    grant(domain, REF, 5, frame(domain, 3))
    grant(domain, REF + 1, 0, domain.view.gdt_mfn)
    grant(domain, REF + 2, 0, 0xFFFFFFFF)
    grant(domain, REF + 3, 0, domain.vcpus[0].kernel_l4)
    for domid, ref, writable, why in (
        (99, REF, False, GNTST_bad_domain),
        (domain.domid, REF, False, GNTST_general_error),  # for another domain
        (domain.domid, REF + 1, False, GNTST_bad_page),  # not the granter's
        (domain.domid, REF + 2, True, GNTST_bad_page),
        (domain.domid, REF + 3, True, GNTST_general_error),  # a page table
        (domain.domid, 512, False, GNTST_bad_gntref),
        (domain.domid, -1, False, GNTST_bad_gntref),
    ):
        with refused(why):
            machine.dom0.map_grant(domid, ref, writable)
    assert [flags(domain, REF + number) for number in range(4)] == [GTF_permit_access] * 4


def test_a_granted_page_cannot_become_a_page_table_while_a_backend_may_write_it(machine: BareMachine) -> None:
    domain = machine.domain()
    vcpu = domain.vcpus[0]
    mfn = frame(domain, 3)
    grant(domain, REF, 0, mfn)
    mapped = machine.dom0.map_grant(domain.domid, REF)
    index = l1_entry_index(vcpu, DATA + 3 * PAGE_SIZE)
    with domain.lock:
        assert paging.modify_l1(domain, index, 0) == 0
        assert paging.pin(domain, mfn, TYPE_L1) < 0
    machine.dom0.unmap_grant(mapped)
    with domain.lock:
        assert paging.pin(domain, mfn, TYPE_L1) == 0
        assert paging.unpin(domain, mfn) == 0


def test_copies_stay_inside_the_page(machine: BareMachine) -> None:
    domain = machine.domain()
    grant(domain, REF, 0, frame(domain, 3))
    dom0, domid = machine.dom0, domain.domid
    dom0.write_grant(domid, REF, 4000, b"x" * 96)
    assert dom0.read_grant(domid, REF, 3999, 97) == b"\0" + b"x" * 96
    with refused(GNTST_bad_copy_arg):
        dom0.write_grant(domid, REF, 4000, b"x" * 97)
    for offset, size in ((4096, 1), (-1, 1), (0, -1)):
        with refused(GNTST_bad_copy_arg):
            dom0.read_grant(domid, REF, offset, size)
    assert flags(domain, REF) == GTF_permit_access


def test_a_backend_keeps_its_mapping_when_the_domain_is_destroyed(machine: BareMachine) -> None:
    domain = machine.domain()
    mfn = frame(domain, 3)
    grant(domain, REF, 0, mfn)
    write(domain.vcpus[0], DATA + 3 * PAGE_SIZE, b"last words")
    mapped = machine.dom0.map_grant(domain.domid, REF)
    free = machine.hypervisor.memory.free_frames
    machine.control.destroy(domain.domid)
    assert bytes(mapped.view[:10]) == b"last words"
    held = machine.hypervisor.memory.free_frames
    assert held > free
    with refused(GNTST_bad_domain):
        machine.dom0.map_grant(domain.domid, REF, writable=False)
    machine.dom0.unmap_grant(mapped)
    assert machine.hypervisor.memory.free_frames == held + 1


# --- from guest to guest ---------------------------------------------------------------------------


def map_grant(vcpu: Vcpu, va: int, ref: int, domid: int, flags: int = GNTMAP_host_map) -> tuple[int, int]:
    write(vcpu, DATA, abi.MAP_GRANT_REF.pack(va, flags, ref, domid, 99, 0, 0))
    assert do_grant_table_op(vcpu, GNTTABOP_map_grant_ref, DATA, 1) == 0
    *_, status, handle, _ = abi.MAP_GRANT_REF.unpack(read(vcpu, DATA, abi.MAP_GRANT_REF.size))
    return status, handle


def unmap_grant(vcpu: Vcpu, va: int, handle: int) -> int:
    write(vcpu, DATA, abi.UNMAP_GRANT_REF.pack(va, 0, handle, 99))
    assert do_grant_table_op(vcpu, GNTTABOP_unmap_grant_ref, DATA, 1) == 0
    status: int = abi.UNMAP_GRANT_REF.unpack(read(vcpu, DATA, abi.UNMAP_GRANT_REF.size))[3]
    return status


def test_a_guest_maps_a_page_of_another_guest(machine: BareMachine) -> None:
    granter, mapper = machine.domain(), machine.domain()
    vcpu = mapper.vcpus[0]
    grant(granter, REF, mapper.domid, frame(granter, 3))
    write(granter.vcpus[0], DATA + 3 * PAGE_SIZE, b"shared")
    va = DATA + 100 * PAGE_SIZE
    status, handle = map_grant(vcpu, va, REF, granter.domid)
    assert status == GNTST_okay
    assert read(vcpu, va, 6) == b"shared"
    assert not audit.check(machine.hypervisor)
    write(vcpu, va, b"SHARED")
    assert read(granter.vcpus[0], DATA + 3 * PAGE_SIZE, 6) == b"SHARED"
    assert unmap_grant(vcpu, va + PAGE_SIZE, handle) == GNTST_general_error
    assert unmap_grant(vcpu, va, handle) == GNTST_okay
    assert translate(vcpu, va, WRITE) < 0
    assert flags(granter, REF) == GTF_permit_access
    assert unmap_grant(vcpu, va, handle) == GNTST_bad_handle


def test_a_read_only_mapping_cannot_be_written(machine: BareMachine) -> None:
    granter, mapper = machine.domain(), machine.domain()
    grant(granter, REF, mapper.domid, frame(granter, 3), GTF_permit_access | GTF_readonly)
    va = DATA + 100 * PAGE_SIZE
    assert map_grant(mapper.vcpus[0], va, REF, granter.domid)[0] == GNTST_general_error
    status, handle = map_grant(mapper.vcpus[0], va, REF, granter.domid, GNTMAP_host_map | GNTMAP_readonly)
    assert status == GNTST_okay
    assert translate(mapper.vcpus[0], va, WRITE) < 0
    assert unmap_grant(mapper.vcpus[0], va, handle) == GNTST_okay


def test_a_mapper_cannot_hide_that_it_still_maps_a_page(machine: BareMachine) -> None:
    granter, mapper = machine.domain(), machine.domain()
    vcpu = mapper.vcpus[0]
    mfn = frame(granter, 3)
    grant(granter, REF, mapper.domid, mfn)
    va = DATA + 100 * PAGE_SIZE
    _, handle = map_grant(vcpu, va, REF, granter.domid)
    assert unmap_grant(vcpu, 0, handle) == GNTST_okay, "which does nothing"
    assert flags(granter, REF) == GTF_permit_access | GTF_reading | GTF_writing
    # Clearing the entry leaves its translation in the TLB: the frame must not become a page table by that.
    with mapper.lock:
        assert paging.modify_l1(mapper, l1_entry_index(vcpu, va), 0) == 0
    assert unmap_grant(vcpu, va, handle) == GNTST_general_error
    with granter.lock:
        assert paging.modify_l1(granter, l1_entry_index(granter.vcpus[0], DATA + 3 * PAGE_SIZE), 0) == 0
        assert paging.pin(granter, mfn, TYPE_L1) < 0
    machine.control.destroy(mapper.domid)
    assert flags(granter, REF) == GTF_permit_access
    with granter.lock:
        assert paging.pin(granter, mfn, TYPE_L1) == 0


def test_a_mapper_that_dies_gives_the_pages_back(machine: BareMachine) -> None:
    granter, mapper = machine.domain(), machine.domain()
    grant(granter, REF, mapper.domid, frame(granter, 3))
    assert map_grant(mapper.vcpus[0], DATA + 100 * PAGE_SIZE, REF, granter.domid)[0] == GNTST_okay
    machine.control.destroy(mapper.domid)
    assert flags(granter, REF) == GTF_permit_access


def test_a_busy_granter_makes_the_mapper_ask_again_instead_of_waiting(machine: BareMachine) -> None:
    granter, mapper = machine.domain(), machine.domain()
    vcpu = mapper.vcpus[0]
    grant(granter, REF, mapper.domid, frame(granter, 3))
    taken, done = threading.Event(), threading.Event()

    def hold() -> None:
        with granter.lock:
            taken.set()
            done.wait()

    holder = threading.Thread(target=hold)
    holder.start()
    taken.wait()
    write(vcpu, DATA, abi.MAP_GRANT_REF.pack(DATA + 100 * PAGE_SIZE, GNTMAP_host_map, REF, granter.domid, 99, 0, 0))
    vcpu.restarted = False
    do_grant_table_op(vcpu, GNTTABOP_map_grant_ref, DATA, 1)
    assert vcpu.restarted
    done.set()
    holder.join()
    status, handle = map_grant(vcpu, DATA + 100 * PAGE_SIZE, REF, granter.domid)
    assert status == GNTST_okay
    assert unmap_grant(vcpu, DATA + 100 * PAGE_SIZE, handle) == GNTST_okay


def test_a_guest_copies_between_its_own_page_and_a_grant(machine: BareMachine) -> None:
    granter, copier = machine.domain(), machine.domain()
    vcpu = copier.vcpus[0]
    grant(granter, REF, copier.domid, frame(granter, 3), GTF_permit_access | GTF_readonly)
    write(granter.vcpus[0], DATA + 3 * PAGE_SIZE + 10, b"packet")
    write(vcpu, DATA, abi.COPY.pack(REF, granter.domid, 10, frame(copier, 2), copier.domid, 5, 6, 1, 99))
    assert do_grant_table_op(vcpu, GNTTABOP_copy, DATA, 1) == 0
    assert abi.COPY.unpack(read(vcpu, DATA, abi.COPY.size))[-1] == GNTST_okay
    assert read(vcpu, DATA + 2 * PAGE_SIZE + 5, 6) == b"packet"
    assert flags(granter, REF) == GTF_permit_access | GTF_readonly


def pass_on(domain: Domain, ref: int, domid: int, granter: int, theirs: int) -> None:
    """An entry of version 2 that lets `domid` copy what reference `theirs` of another domain grants this one."""
    address, words = domain.grants.entry_address(ref), domain.memory.d
    words[address + 4 >> 2], words[address + 8 >> 2] = granter, theirs
    words[address >> 2] = GTF_transitive | domid << 16


def test_a_grant_is_passed_on_for_copies(machine: BareMachine) -> None:
    granter, middle, copier = (machine.domain() for _ in range(3))
    vcpu = copier.vcpus[0]
    middle.grants.grow(1)
    assert middle.grants.set_version(2) == 0
    grant(granter, REF, middle.domid, frame(granter, 3))
    pass_on(middle, REF + 1, copier.domid, granter.domid, REF)

    def copied(source: int, source_domid: int, dest: int, dest_domid: int, flags: int) -> int:
        write(vcpu, DATA, abi.COPY.pack(source, source_domid, 10, dest, dest_domid, 10, 6, flags, 99))
        assert do_grant_table_op(vcpu, GNTTABOP_copy, DATA, 1) == 0
        return int(abi.COPY.unpack(read(vcpu, DATA, abi.COPY.size))[-1])

    here = DATA + 2 * PAGE_SIZE + 10
    write(granter.vcpus[0], DATA + 3 * PAGE_SIZE + 10, b"packet")
    assert copied(REF + 1, middle.domid, frame(copier, 2), copier.domid, 1) == GNTST_okay
    assert read(vcpu, here, 6) == b"packet"
    write(vcpu, here, b"answer")
    assert copied(frame(copier, 2), copier.domid, REF + 1, middle.domid, 2) == GNTST_okay
    assert read(granter.vcpus[0], DATA + 3 * PAGE_SIZE + 10, 6) == b"answer"
    assert flags(granter, REF) == GTF_permit_access, "nobody uses it any more"
    assert not middle.grants.in_use(REF + 1)
    pass_on(middle, REF + 2, copier.domid, middle.domid, REF + 1)
    assert copied(REF + 2, middle.domid, frame(copier, 2), copier.domid, 1) == GNTST_general_error
    grant(granter, REF, middle.domid, frame(granter, 3), GTF_permit_access | GTF_readonly)
    assert copied(frame(copier, 2), copier.domid, REF + 1, middle.domid, 2) == GNTST_general_error
    grant(granter, REF, 0, frame(granter, 3))
    assert copied(REF + 1, middle.domid, frame(copier, 2), copier.domid, 1) == GNTST_general_error
    machine.control.destroy(granter.domid)
    assert copied(REF + 1, middle.domid, frame(copier, 2), copier.domid, 1) == GNTST_general_error


STEPS = st.lists(
    st.tuples(
        st.sampled_from(("grant", "pass on", "version", "map", "unmap", "dom0 map", "dom0 unmap", "copy")),
        st.integers(0, 1),  # who
        st.integers(0, 3),  # reference or handle
        st.integers(0, 5),  # page
        st.booleans(),
    ),
    max_size=40,
)


@settings(max_examples=60, deadline=None)
@given(STEPS)
def test_no_sequence_of_grants_and_mappings_breaks_the_frame_table(
    steps: list[tuple[str, int, int, int, bool]],
) -> None:
    machine = BareMachine()
    domains = [machine.domain(), machine.domain()]
    held: list[MappedGrant] = []
    mapped: list[list[tuple[int, int]]] = [[], []]
    for number, (what, who, ref, page, readonly) in enumerate(steps):
        domain, other = domains[who], domains[1 - who]
        vcpu = domain.vcpus[0]
        va = DATA + (100 + number) * PAGE_SIZE
        if what == "grant":
            to = 0 if page < 2 else other.domid
            part = page == 3 and domain.grants.version == 2
            kind = GTF_permit_access | GTF_readonly * readonly | GTF_sub_page * part
            grant(domain, ref, to, frame(domain, page), kind)
        elif what == "pass on" and domain.grants.version == 2:
            pass_on(domain, ref, other.domid, (0, other.domid, domain.domid)[page % 3], page)
        elif what == "version":
            domain.grants.set_version(1 + readonly)
        elif what == "map":
            other.grants.grow(1)
            kind = GNTMAP_host_map | GNTMAP_readonly * readonly | GNTMAP_device_map * (page < 3)
            status, handle = map_grant(vcpu, va, ref, other.domid, kind)
            if status == GNTST_okay:
                mapped[who].append((va, handle))
        elif what == "unmap" and mapped[who]:
            assert unmap_grant(vcpu, *mapped[who].pop(ref % len(mapped[who]))) == GNTST_okay
        elif what == "dom0 map":
            with suppress(HypercallError):
                held.append(machine.dom0.map_grant(domain.domid, ref, not readonly))
        elif what == "dom0 unmap" and held:
            machine.dom0.unmap_grant(held.pop(ref % len(held)))
        elif what == "copy":
            write(vcpu, DATA, abi.COPY.pack(ref, other.domid, 0, frame(domain, 5), domain.domid, 0, 64, 1, 99))
            do_grant_table_op(vcpu, GNTTABOP_copy, DATA, 1)
        assert not audit.check(machine.hypervisor), (what, who, ref, page)
    for domain in domains:
        machine.control.destroy(domain.domid)
    for each in held:
        machine.dom0.unmap_grant(each)
    assert not audit.check(machine.hypervisor)


# --- each domain's memory is its own ---------------------------------------------------------------


def mapped_page(mapper: Domain, va: int) -> memoryview:
    """What the mapper's page table shows at an address, in its own memory."""
    return mapper.memory.page(mapper.memory.q[l1_entry_index(mapper.vcpus[0], va)] >> 12 & 0xFFFFFFFFF)


def test_a_foreign_frame_appears_at_an_alias_and_is_gone_with_its_mapping(machine: BareMachine) -> None:
    granter, mapper = machine.domain(), machine.domain()
    grant(granter, REF, mapper.domid, frame(granter, 3))
    va = DATA + 2 * PAGE_SIZE
    status, handle = map_grant(mapper.vcpus[0], va, REF, granter.domid)
    assert status == GNTST_okay
    page = mapped_page(mapper, va)
    write(granter.vcpus[0], DATA + 3 * PAGE_SIZE, b"theirs")
    assert bytes(page[:6]) == b"theirs"
    page[:4] = b"mine"
    assert read(granter.vcpus[0], DATA + 3 * PAGE_SIZE, 6) == b"miners"
    assert not audit.check(machine.hypervisor)
    assert unmap_grant(mapper.vcpus[0], va, handle) == GNTST_okay
    assert bytes(page[:6]) == bytes(6), "whoever still holds the address finds nothing"
    page[:4] = b"late"
    assert read(granter.vcpus[0], DATA + 3 * PAGE_SIZE, 4) == b"mine"


def test_a_store_to_a_frame_granted_read_only_reaches_a_copy_whatever_let_it_pass(machine: BareMachine) -> None:
    granter, mapper = machine.domain(), machine.domain()
    grant(granter, REF, mapper.domid, frame(granter, 3), GTF_permit_access | GTF_readonly)
    write(granter.vcpus[0], DATA + 3 * PAGE_SIZE, b"theirs")
    va = DATA + 2 * PAGE_SIZE
    status, handle = map_grant(mapper.vcpus[0], va, REF, granter.domid, GNTMAP_host_map | GNTMAP_readonly)
    assert status == GNTST_okay
    page = mapped_page(mapper, va)
    assert bytes(page[:6]) == b"theirs"
    page[:6] = b"broken"  # no check of ours is in the way here
    assert read(granter.vcpus[0], DATA + 3 * PAGE_SIZE, 6) == b"theirs"
    assert unmap_grant(mapper.vcpus[0], va, handle) == GNTST_okay


@pytest.mark.parametrize("xens", [False, True], ids=["a page", "a frame of its grant table"])
def test_a_granted_frame_outlives_its_granter_and_nobody_else_gets_it(machine: BareMachine, xens: bool) -> None:
    granter, mapper = machine.domain(), machine.domain()
    grant(granter, REF, mapper.domid, frame(granter, 3))
    if xens:
        grant(granter, REF, mapper.domid, granter.grants.frames[0])
    va = DATA + 2 * PAGE_SIZE
    status, handle = map_grant(mapper.vcpus[0], va, REF, granter.domid)
    assert status == GNTST_okay
    page = mapped_page(mapper, va)
    page[:6] = b"theirs"
    free = machine.hypervisor.memory.free_frames
    machine.control.destroy(granter.domid)
    held = machine.hypervisor.memory.free_frames
    assert held > free
    victim = machine.domain()
    for number in range(1, 8):
        write(victim.vcpus[0], DATA + number * PAGE_SIZE, b"secret")
    assert bytes(page[:6]) == b"theirs"
    page[:6] = b"attack"
    assert all(read(victim.vcpus[0], DATA + number * PAGE_SIZE, 6) == b"secret" for number in range(1, 8))
    machine.control.destroy(victim.domid)
    assert unmap_grant(mapper.vcpus[0], va, handle) == GNTST_okay
    assert machine.hypervisor.memory.free_frames == held + 1


def test_a_mapper_that_dies_gives_up_what_it_had_mapped(machine: BareMachine) -> None:
    granter, mapper = machine.domain(), machine.domain()
    mfn = frame(granter, 3)
    grant(granter, REF, mapper.domid, mfn)
    status, _ = map_grant(mapper.vcpus[0], DATA + 2 * PAGE_SIZE, REF, granter.domid)
    assert status == GNTST_okay
    with granter.lock:
        assert memory_op.remove_pages(granter, mfn), "the granter gives it back, but for the mapper's reference"
        paging.modify_l1(granter, l1_entry_index(granter.vcpus[0], DATA + 3 * PAGE_SIZE), 0)
    assert granter.frames.owner[mfn] == granter.domid
    epoch = granter.flush_epoch
    machine.control.destroy(mapper.domid)
    assert granter.frames.owner[mfn] != granter.domid
    assert granter.flush_epoch > epoch, "the granter's TLBs have forgotten it"
    assert flags(granter, REF) == GTF_permit_access
    assert machine.hypervisor.memory.free_aliases == MOST_ALIASES - OWN_ALIASES * len(machine.hypervisor.domains)


def test_a_domain_whose_frame_table_is_wrong_ends_alone(machine: BareMachine) -> None:
    """What must not be: a count is lost. It goes, what it had mapped is given up, who maps its frames may go on."""
    budget = machine.hypervisor.memory
    other = machine.domain()
    before = budget.free_frames, budget.free_aliases
    wrong = machine.domain()
    for granter, mapper in ((wrong, other), (other, wrong)):
        grant(granter, REF, mapper.domid, frame(granter, 3))
    before = before[0] - 1, before[1]  # the other's grant table
    va = DATA + 100 * PAGE_SIZE
    status, handle = map_grant(other.vcpus[0], va, REF, wrong.domid)
    assert (status, map_grant(wrong.vcpus[0], va, REF, other.domid)[0]) == (GNTST_okay, GNTST_okay)
    wrong.frames.count_info[frame(wrong, 4)] = 0
    machine.control.destroy(wrong.domid)
    assert "inconsistent" in machine.hypervisor.log_text
    assert flags(other, REF) == GTF_permit_access, "nobody uses it any more"
    assert unmap_grant(other.vcpus[0], va, handle) == GNTST_okay
    assert (budget.free_frames, budget.free_aliases) == before


def test_a_domain_that_maps_all_it_can_leaves_others_their_own(machine: BareMachine) -> None:
    granter, greedy, modest = machine.domain(), machine.domain(), machine.domain()
    memory, mfn = granter.memory, frame(granter, 3)
    budget = machine.hypervisor.memory
    spare, budget.free_aliases = budget.free_aliases - 10, 10
    taken = []
    with suppress(OutOfMemory):
        while True:
            taken.append(greedy.memory.map_alias(memory, mfn, False))
    assert len(taken) == OWN_ALIASES + 10
    theirs = [modest.memory.map_alias(memory, mfn, False) for _ in range(OWN_ALIASES)]
    for domain, aliases in ((greedy, taken), (modest, theirs)):
        for alias in aliases:
            domain.memory.unmap_alias(alias)
    assert budget.free_aliases == 10
    budget.free_aliases += spare


def test_domains_are_made_until_the_budget_is_used_and_all_of_it_comes_back(machine: BareMachine) -> None:
    budget = machine.hypervisor.memory
    free, domains = budget.free_frames, []
    with pytest.raises(DomainCreateError, match="free"):
        while True:
            domains.append(machine.domain().domid)
            machine.control.populate(domains[-1], 40)
    assert len(domains) > 10
    for domid in [*domains, domains[-1] + 1]:
        if machine.hypervisor.domain(domid) is not None:
            machine.control.destroy(domid)
    assert budget.free_frames == free


def test_a_frame_given_back_while_its_owner_dies_is_counted_once(machine: BareMachine) -> None:
    free = machine.hypervisor.memory.free_frames
    granter = machine.domain()
    grant(granter, REF, 0, frame(granter, 1))
    mapped = machine.dom0.map_grant(granter.domid, REF)
    keep_only = granter.memory.keep_only

    def unmap_if_nobody_has_the_lock() -> None:
        if granter.lock.acquire(blocking=False):
            machine.dom0.unmap_grant(mapped)
            granter.lock.release()

    def while_it_dies(mfns: list[int]) -> None:
        other = threading.Thread(target=unmap_if_nobody_has_the_lock)
        other.start()
        other.join()
        keep_only(mfns)

    granter.memory.keep_only = while_it_dies  # type: ignore[method-assign]
    machine.control.destroy(granter.domid)
    if mapped.address:
        machine.dom0.unmap_grant(mapped)
    assert machine.hypervisor.memory.free_frames == free
    assert granter.memory.fd == -1, "its memory object is closed"


def test_what_a_mapper_wrote_is_known_to_who_follows_the_granters_memory(machine: BareMachine) -> None:
    granter, mapper = machine.domain(), machine.domain()
    vcpu, va = mapper.vcpus[0], DATA + 100 * PAGE_SIZE
    mfn = frame(granter, 3)
    grant(granter, REF, mapper.domid, mfn)
    try:
        tracking = machine.control.track_writes(granter.domid)
    except NotTracked as reason:
        pytest.skip(str(reason))
    _, handle = map_grant(vcpu, va, REF, granter.domid)
    tracking.written()
    write(vcpu, va, b"written")
    machine.control.pause(granter.domid)
    with pytest.raises(RecordError, match="mapped"), machine.control.standing_still(granter.domid):
        pass
    assert unmap_grant(vcpu, va, handle) == GNTST_okay
    assert tracking.written()[mfn]
    tracking.close()


@pytest.mark.parametrize("how", ["native", "python"])
def test_a_batch_of_copies_moves_what_is_granted_and_nothing_where_one_is_not(
    machine: BareMachine, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if how == "python":
        monkeypatch.setenv("XENOLITH_NATIVE", "off")
    domain = machine.domain()
    for number in range(4):
        grant(domain, REF + number, 0, frame(domain, 3 + number), GTF_permit_access | GTF_readonly * (number == 3))
    before = [domain.frames.describe(frame(domain, 3 + number)) for number in range(4)]
    copies = machine.dom0.grant_batch(domain.domid)
    data = bytearray(range(250)) * 20
    assert copies.copy([(REF, 0, PAGE_SIZE), (REF + 1, 96, 904)], data, to_guest=True)
    assert read(domain.vcpus[0], DATA + 3 * PAGE_SIZE, PAGE_SIZE) == data[:PAGE_SIZE]
    assert read(domain.vcpus[0], DATA + 4 * PAGE_SIZE + 96, 904) == data[PAGE_SIZE:]
    back = bytearray(5000)
    assert copies.copy([(REF, 0, PAGE_SIZE), (REF + 1, 96, 904)], back, to_guest=False)
    assert back == data
    assert copies.copy([(REF + 3, 0, 10)], bytearray(10), to_guest=False)
    for parts in ([(REF + 3, 0, 5000 - PAGE_SIZE)], [(REF + 2, 0, 10), (REF + 4, 0, 10)], [(1 << 20, 0, 10)]):
        assert not copies.copy(parts, data, to_guest=True)
    assert read(domain.vcpus[0], DATA + 5 * PAGE_SIZE, 10) == bytes(10)
    with refused(GNTST_bad_copy_arg):
        copies.copy([(REF, PAGE_SIZE - 1, 2)], data, to_guest=True)
    assert [domain.frames.describe(frame(domain, 3 + number)) for number in range(4)] == before
    assert not any(flags(domain, REF + number) & (GTF_reading | GTF_writing) for number in range(5))


@pytest.mark.parametrize("how", ["native", "python"])
def test_who_runs_translated_code_is_told_of_copies_to_it(
    machine: BareMachine, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if how == "python":
        monkeypatch.setenv("XENOLITH_NATIVE", "off")
    domain = machine.domain()
    looked_at: list[int] = []
    domain.executable_mapped = looked_at.append
    code = (ctypes.c_uint8 * domain.frames.frames)()
    domain.code_frames = ctypes.addressof(code)
    mfns = [frame(domain, 3), frame(domain, 4)]
    code[mfns[1]] = 1
    for number, mfn in enumerate(mfns):
        grant(domain, REF + number, 0, mfn)
    copies = machine.dom0.grant_batch(domain.domid)
    assert copies.copy([(REF, 0, 8), (REF + 1, 0, 8)], bytearray(16), to_guest=True)
    events.drain(domain)
    assert sorted(looked_at) == (mfns[1:] if how == "native" else mfns)


def test_pins_of_native_code_are_those_of_python(machine: BareMachine) -> None:
    """Random entries, pinned and unpinned by either; the frame table and the entries are the same each time."""
    chance = random.Random(5)
    domains = [machine.domain(), machine.domain()]
    batches = [[machine.dom0.grant_batch(domain.domid) for _ in range(3)] for domain in domains]
    domains[1].lock.take_word = None
    for batch in batches[1]:
        batch.native_pin = batch.native_unpin = 0
    for _ in range(300):
        ref, page = REF + chance.randrange(6), chance.randrange(8)
        kind = chance.choice((GTF_permit_access, GTF_permit_access, GTF_permit_access | GTF_readonly, 0, 2))
        mfn_is_foreign = chance.random() < 0.1
        if all(not domain.grants.in_use(ref) for domain in domains):
            for domain in domains:
                grant(domain, ref, 0, 5 if mfn_is_foreign else frame(domain, page), kind)
        which = chance.randrange(3)
        pairs = [(REF + chance.randrange(7), chance.random() < 0.5) for _ in range(chance.randrange(1, 6))]
        states = []
        for batch in (batches[0][which], batches[1][which]):
            if batch.pins.count:
                if not batch.native_unpin or function(batch.native_unpin)(batch.granter, ctypes.addressof(batch.pins)):
                    batch.unpin()
                batch.pins.begin = batch.pins.count = 0
                continue
            batch.pins.count = len(pairs)
            for index, (ref, writable) in enumerate(pairs):
                batch.pins.refs[index], batch.pins.writable[index] = ref, writable
            if not batch.native_pin or function(batch.native_pin)(batch.granter, ctypes.addressof(batch.pins)):
                batch.pin()
            states.append(batch.pins.states[: len(pairs)])
        assert not states or states[0] == states[1]
        ours, theirs = (
            [
                (flags(domain, REF + n), domain.frames.describe(frame(domain, n)).partition(" count")[2])
                for n in range(8)
            ]
            for domain in domains
        )
        assert ours == theirs
    for batch in (*batches[0], *batches[1]):
        batch.unpin()


def function(address: int) -> Callable[[int, int], int]:
    return ctypes.PYFUNCTYPE(ctypes.c_uint32, ctypes.c_uint64, ctypes.c_uint64)(address)
