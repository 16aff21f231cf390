"""What of a domain travels: every field is in a class, a record gives the same domain, and a wrong one gives none."""

from __future__ import annotations

import copy
import json
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from xenolith.abi import layout
from xenolith.abi.hypercalls import VIRQ_TIMER, HYPERVISOR_sched_op, SCHEDOP_block
from xenolith.abi.x86 import PAGE_SIZE
from xenolith.hypervisor import audit
from xenolith.hypervisor.control import Arrival, RecordError
from xenolith.hypervisor.domain import Domain
from xenolith.hypervisor.domain_record.fields import fates, fields_of
from xenolith.hypervisor.domain_record.frames import FrameRecord, frame_record
from xenolith.hypervisor.hypercalls.memory_op import allocate_extent
from xenolith.hypervisor.lifecycle import USUAL, Limits

from .bare import DATA, DEADLINE, BareMachine, Program


@pytest.fixture
def machine() -> Iterator[BareMachine]:
    machine = BareMachine()
    yield machine
    machine.close()


def blocking(began: threading.Event) -> Program:
    yield began.set
    while True:
        yield (HYPERVISOR_sched_op, SCHEDOP_block, 0)


def domain_that_ran(machine: BareMachine) -> Domain:
    """Two vCPUs, one of which has run; ports of every kind; a timer that is set; a table of grants."""
    domain = machine.domain(2)
    domain.vcpus[1].regs[:] = domain.vcpus[0].regs
    events = domain.events
    assert events.alloc_unbound(0) == 1
    assert events.bind_virq(VIRQ_TIMER, 1) == 2
    assert events.bind_ipi(1) == 3
    assert events.bind_interdomain(domain, events.alloc_unbound(domain.domid)) == 5
    assert machine.dom0.bind_interdomain(domain.domid, events.alloc_unbound(0)) > 0
    assert domain.grants.grow(2)
    began = threading.Event()
    machine.run(domain, blocking(began), blocking(began))
    assert began.wait(DEADLINE)
    machine.control.pause(domain.domid)
    return domain


def taken(machine: BareMachine, domain: Domain) -> tuple[Any, FrameRecord, bytes]:
    with machine.control.standing_still(domain.domid) as still:
        memory = bytes(still.memory[: domain.memory.frames * PAGE_SIZE])
        return json.loads(json.dumps(still.record)), still.frames, memory


def put_back(
    machine: BareMachine, domain: Domain, plain: Any, frames: FrameRecord, memory: bytes, limits: Limits = USUAL
) -> Domain:
    there = machine.control.memory_for_arrival(domain.max_pages)
    for mfn in frames.mfns.tolist():
        there.page(mfn)[:] = memory[mfn * PAGE_SIZE : (mfn + 1) * PAGE_SIZE]
    arrival = Arrival(there, plain, frames)
    domid = machine.control.restore_domain(bytes(16), len(domain.vcpus), domain.max_pages, arrival, limits)
    return machine.hypervisor.domains[domid]


def test_every_field_of_a_live_domain_is_in_a_class(machine: BareMachine) -> None:
    domain = domain_that_ran(machine)
    vcpu = domain.vcpus[1]
    for thing in (domain, vcpu, vcpu.state, vcpu.timers, domain.events, domain.grants, domain.view):
        known = set(fates(type(thing)))
        assert fields_of(thing) - known == set(), f"domain_record does not say what becomes of these of {type(thing)}"
        assert known - fields_of(thing) == set(), f"{type(thing)} has no such fields any more"


def test_a_domain_put_back_is_the_same_domain(machine: BareMachine) -> None:
    domain = domain_that_ran(machine)
    plain, frames, memory = taken(machine, domain)
    machine.clock.advance(3_000_000)
    other = put_back(machine, domain, plain, frames, memory)
    assert other.domid != domain.domid
    assert audit.check(machine.hypervisor) == []
    assert other.clock.now() == domain.clock.now()  # the short time between was made up for
    with machine.control.standing_still(other.domid) as still:
        again = json.loads(json.dumps(still.record))
        assert again["now"] == plain["now"] + 3_000_000
        for name in ("now", "wall"):
            again.pop(name), plain.pop(name)
        assert again == plain
        for mine, theirs in zip(vars(still.frames).values(), vars(frames).values(), strict=True):
            assert np.array_equal(mine, theirs)


def test_the_words_and_queues_of_the_fifo_abi_travel(machine: BareMachine) -> None:
    domain = domain_that_ran(machine)
    first = allocate_extent(domain, 1)
    assert first is not None
    mfns = [first, first + 1]
    with domain.lock:
        assert domain.events.init_control(1, mfns[0], 64) == 0
        assert domain.events.expand_array(mfns[1]) == 0
        assert domain.events.set_priority(3, 2) == 0
        domain.events.set_pending(3)
    plain, frames, memory = taken(machine, domain)
    other = put_back(machine, domain, plain, frames, memory)
    assert audit.check(machine.hypervisor) == []
    assert taken(machine, other)[0]["fifo"] == plain["fifo"]
    assert other.events.pending(3)
    third = other.events.bind_ipi(1)
    with other.lock:
        assert other.events.set_priority(third, 2) == 0
        other.events.set_pending(third)
    words = other.memory.d[mfns[1] << 10 : (mfns[1] + 1) << 10]
    assert words[3] & 0x1FFFF == third  # it follows in the queue that came along


def test_a_grant_table_of_version_2_travels_with_what_dom0_may_use(machine: BareMachine) -> None:
    domain = domain_that_ran(machine)
    with domain.lock:
        domain.grants.permit_access(1, 0, 77)
        assert domain.grants.set_version(2) == 0
        domain.grants.permit_access(200, 3, 78)
    plain, frames, memory = taken(machine, domain)
    other = put_back(machine, domain, plain, frames, memory)
    assert audit.check(machine.hypervisor) == []
    assert (other.grants.version, other.grants.status_frames) == (2, domain.grants.status_frames)
    words = other.memory.q
    assert words[other.grants.entry_address(1) >> 3] & 3 == 1
    assert words[other.grants.entry_address(1) + 8 >> 3] == 77
    assert words[other.grants.entry_address(200) >> 3] == 0


def test_its_time_goes_on_from_where_it_stood(machine: BareMachine) -> None:
    domain = machine.domain(2)  # one that has not begun: an idle machine's virtual clock jumps from timer to timer
    domain.vcpus[1].regs[:] = domain.vcpus[0].regs
    domain.vcpus[1].timers.set_singleshot(domain.clock.now() + 50_000_000)
    machine.control.set_time_offset(domain.domid, 3600)
    plain, frames, memory = taken(machine, domain)
    stood_at = domain.clock.now()
    domain.vcpus[1].timers.stop()
    machine.clock.advance(3600_000_000_000)
    other = put_back(machine, domain, plain, frames, memory)
    assert other.clock.now() == stood_at
    seconds = layout.U32.unpack_from(other.memory.b, other.shared_info + layout.SHARED_WC_SEC)[0]
    assert seconds == (machine.clock.wall() - stood_at) // 1_000_000_000 + 3600
    assert other.vcpus[1].timers.singleshot.deadline == machine.clock.now() + 50_000_000


def test_what_was_posted_is_delivered_before_it_leaves(machine: BareMachine) -> None:
    from xenolith.hypervisor.events import post

    domain = machine.domain()
    port = domain.events.alloc_unbound(0)
    machine.dom0.bind_interdomain(domain.domid, port)
    post(domain, port)
    plain, frames, memory = taken(machine, domain)
    other = put_back(machine, domain, plain, frames, memory)
    assert other.events.pending(port)


def test_a_port_beyond_the_bitmaps_is_refused_without_the_fifo_abi(machine: BareMachine) -> None:
    domain = domain_that_ran(machine)
    plain, frames, memory = taken(machine, domain)
    plain["ports"].append({"port": 4096, "vcpu": 0, "ipi": True})
    with pytest.raises(RecordError, match="beyond its bitmaps"):
        put_back(machine, domain, plain, frames, memory, Limits(event_channel_port=8191))


Change = Callable[[Any], None]


def _vcpu(name: str, value: Any) -> Change:
    return lambda plain: plain["vcpus"][0].__setitem__(name, value)


def _cpu(name: str, value: Any) -> Change:
    return lambda plain: plain["vcpus"][0]["cpu"].__setitem__(name, value)


def _fifo(**values: Any) -> Change:
    queues = {"controls": [None, [1, 0]], "tails": [[0] * 16] * 2, "pages": [], "queues": ""}
    return lambda plain: plain.__setitem__("fifo", queues | values)


WRONG: dict[str, Change] = {
    "a version of grant tables that there is not": lambda plain: plain.__setitem__("grant_version", 0),
    "a grant table without its marks": lambda plain: plain.__setitem__("grant_version", 2),
    "a control block where none can be": _fifo(),
    "no control block": _fifo(controls=[None, None]),
    "event words where none can be": _fifo(pages=[1 << 40]),
    "a queue that there is not": _fifo(queues="0000000010000000"),
    "a tail that there is not": _fifo(tails=[[1 << 17] * 16] * 2),
    "no vcpus": lambda plain: plain.pop("vcpus"),
    "three vcpus": lambda plain: plain["vcpus"].append({}),
    "no time": lambda plain: plain.pop("now"),
    "a time before time": lambda plain: plain.__setitem__("now", -1),
    "shared_info elsewhere": lambda plain: plain.__setitem__("shared_info", 4000),
    "a grant table that is another's": lambda plain: plain.__setitem__("grant_frames", [4001]),
    "shared_info twice": lambda plain: plain.__setitem__("grant_frames", [plain["shared_info"]]),
    "a port twice": lambda plain: plain["ports"].append(plain["ports"][0]),
    "a port that leads nowhere": lambda plain: plain["ports"].append({"port": 9, "vcpu": 0, "local": 1}),
    "a port of no vcpu": lambda plain: plain["ports"].append({"port": 9, "vcpu": 2, "ipi": True}),
    "VIRQ twice": lambda plain: plain["ports"].append({"port": 9, "vcpu": 1, "virq": 0}),
    "unknown features": lambda plain: plain["features"].__setitem__("1.0.ecx", (1 << 32) - 1),
    "a table that is none": _vcpu("kernel_l4", 1),
    "guest-user mode without a table": _vcpu("kernel_mode", False),
    "vcpu_info in Xen's memory": _vcpu("info_mfn", 4090),
    "a GDT that is none": lambda plain: plain["vcpus"][0].update(gdt_frames=[4090], gdt_entries=3),
    "Xen's address": _vcpu("time_area_va", layout.HYPERVISOR_VIRT_START),
    "a callback nowhere": _vcpu("event_callback", 1 << 60),
    "a number for a list": _vcpu("trap_address", 0),
    "a list for a number": _vcpu("time_version", [0]),
    "true for a number": _vcpu("time_version", True),
    "CPL 0": _cpu("selectors", [0, 0xE030, 0xE028, 0, 0, 0]),
    "no code segment": _cpu("selectors", [0, 0x1B, 0xE02B, 0, 0, 0]),
    "RIP nowhere": lambda plain: plain["vcpus"][0]["cpu"]["regs"].__setitem__(-1, 1 << 60),
    "XCR0 of AMX": _cpu("xcr0", 0x60007),
    "half an XSAVE image": _cpu("xsave", "00" * 100),
    "odd digits": _cpu("xsave", "0" * 1153),
    "a compacted XSAVE image": _cpu("xsave", "00" * 527 + "80" + "00" * 48),
    "a breakpoint in Xen": lambda plain: plain["vcpus"][0].update(debug=[layout.HYPERVISOR_VIRT_START] + [0] * 7),
    "a timer without rest": lambda plain: plain["vcpus"][0]["timers"].__setitem__("period", 1),
}


@pytest.mark.parametrize("change", WRONG.values(), ids=WRONG)
def test_a_wrong_record_is_refused_with_a_sentence(machine: BareMachine, change: Change) -> None:
    domain = domain_that_ran(machine)
    plain, frames, memory = taken(machine, domain)
    free = machine.hypervisor.memory.free_frames
    wrong = copy.deepcopy(plain)
    change(wrong)
    with pytest.raises(RecordError) as refused:
        put_back(machine, domain, wrong, frames, memory)
    assert " " in str(refused.value)
    assert machine.hypervisor.memory.free_frames == free
    assert put_back(machine, domain, plain, frames, memory)  # the right one is not refused


def test_frames_that_cannot_be_are_refused(machine: BareMachine) -> None:
    domain = domain_that_ran(machine)
    plain, frames, memory = taken(machine, domain)
    fields = vars(frames)
    machine_frames = domain.memory.frames
    for wrong in (
        {"mfns": frames.mfns[::-1]},
        {"mfns": np.append(frames.mfns[:-1], np.uint64(machine_frames))},
        {"mfns": np.insert(frames.mfns[1:], 0, np.uint64(0))},
        {"pfns": frames.pfns[:-1]},
        {"pinned": np.array([4000], dtype=np.uint64), "levels": np.array([1], dtype=np.uint64)},
        {"levels": frames.levels + np.uint64(1)},
        {"levels": frames.levels - np.uint64(1)},
        {"given_up": np.array([4000], dtype=np.uint64)},
        {"mfns": np.arange(1, 80, dtype=np.uint64), "pfns": np.arange(79, dtype=np.uint64)},
    ):
        with pytest.raises(RecordError):
            bad = FrameRecord(**{**fields, **wrong})
            there = machine.control.memory_for_arrival(domain.max_pages)
            for mfn in frames.mfns.tolist():
                there.page(mfn)[:] = memory[mfn * PAGE_SIZE : (mfn + 1) * PAGE_SIZE]
            machine.control.restore_domain(bytes(16), 2, domain.max_pages, Arrival(there, plain, bad))


def test_page_tables_are_validated_anew(machine: BareMachine) -> None:
    """Memory that maps a page table writable, Xen's memory, or what is not there, makes no domain."""
    domain = domain_that_ran(machine)
    plain, frames, memory = taken(machine, domain)
    l1 = next(mfn for mfn in frames.mfns.tolist() if domain.frames.type_info[mfn] >> 40 & 7 == 1)
    place = l1 * PAGE_SIZE + (DATA >> 12 & 511) * 8
    good = int.from_bytes(memory[place : place + 8], "little")
    for entry in (l1 << 12 | 7, 4000 << 12 | 5, 1 << 40 | 5, good | 1 << 7):
        bad = bytearray(memory)
        bad[place : place + 8] = entry.to_bytes(8, "little")
        with pytest.raises(RecordError):
            put_back(machine, domain, plain, frames, bytes(bad))
    assert put_back(machine, domain, plain, frames, memory)


def test_grants_are_for_dom0_alone_where_it_arrives(machine: BareMachine) -> None:
    domain = domain_that_ran(machine)
    mfn = int(frame_record(domain).mfns[5])
    domain.grants.permit_access(8, 0, mfn)
    domain.grants.permit_access(9, 7, mfn)
    with machine.dom0.map_grant(domain.domid, 8):
        plain, frames, memory = taken(machine, domain)
    other = put_back(machine, domain, plain, frames, memory)
    address = other.grants.entry_address(8)
    assert other.memory.q[address >> 3] == mfn << 32 | 1  # permitted, and not in use
    assert other.memory.q[address + 8 >> 3] == 0
    machine.dom0.map_grant(other.domid, 8)
