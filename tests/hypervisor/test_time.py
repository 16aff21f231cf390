"""Timers fire once, at their time and in order; guests find the right factors and wall-clock time."""

from __future__ import annotations

from collections.abc import Iterator
from struct import pack

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xenolith.abi import layout
from xenolith.abi.extensions import (
    VIRQ_XENOLITH_VIRTUAL_TIMER,
    VCPUOP_XENOLITH_get_virtual_time,
    VCPUOP_XENOLITH_set_virtual_timer,
    VCPUOP_XENOLITH_stop_virtual_timer,
)
from xenolith.abi.hypercalls import HYPERVISOR_sched_op, HYPERVISOR_vcpu_op, SCHEDOP_block, SCHEDOP_shutdown
from xenolith.hypervisor.time import COMPACT_ABOVE, Timer, TimerQueue, set_wall_clock, time_record
from xenolith.machine.clock import VirtualClock
from xenolith.machine.tsc import TscClock, read_tsc

from .bare import DATA, BareMachine, Program, pending, read, write

MS = 1_000_000


@pytest.fixture
def machine() -> Iterator[BareMachine]:
    machine = BareMachine()
    yield machine
    machine.close()


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 4), st.one_of(st.none(), st.integers(1, 100)), st.integers(0, 20)), max_size=60)
)
def test_timers_fire_as_in_a_model_that_looks_at_all_of_them(steps: list[tuple[int, int | None, int]]) -> None:
    """Each step sets (or cancels: None) one of five timers and lets some time go by."""
    clock = VirtualClock()
    queue = TimerQueue(clock)
    fired: list[tuple[int, int]] = []
    timers = [Timer(lambda number=number: fired.append((clock.now(), number))) for number in range(5)]  # type: ignore[misc]
    deadlines: dict[int, int] = {}
    expected: list[tuple[int, int]] = []
    for number, delay, passed in steps:
        if delay is None:
            queue.cancel(timers[number])
            deadlines.pop(number, None)
        else:
            deadlines[number] = clock.now() + delay
            queue.set(timers[number], clock.now() + delay)
        clock.advance(passed)
        due = [each for each, deadline in deadlines.items() if deadline <= clock.now()]
        expected += [(clock.now(), each) for each in sorted(due)]
        for each in due:
            del deadlines[each]
        before = len(fired)
        queue.run_due()
        fired[before:] = sorted(fired[before:])
    assert fired == expected


def test_an_idle_machine_jumps_from_timer_to_timer() -> None:
    clock = VirtualClock()
    queue = TimerQueue(clock)
    fired: list[int] = []
    for deadline in (30 * MS, 10 * MS, 20 * MS):
        queue.set(Timer(lambda: fired.append(clock.now())), deadline)
    while queue.jump():
        pass
    assert fired == [10 * MS, 20 * MS, 30 * MS]


def test_a_guest_cannot_fill_the_hosts_memory_by_setting_its_timer() -> None:
    queue = TimerQueue(VirtualClock())
    timer = Timer(lambda: None)
    for deadline in range(100_000, 0, -1):
        queue.set(timer, deadline)
    assert len(queue._heap) <= 2 * COMPACT_ABOVE


def test_a_timer_in_the_year_2554_does_not_stop_the_others() -> None:
    clock = VirtualClock()
    queue = TimerQueue(clock)
    fired = []
    queue.set(Timer(lambda: None), (1 << 64) - 1)
    queue.set(Timer(lambda: fired.append(1)), 5)
    clock.advance(10)
    queue.run_due()
    assert fired == [1]


def test_a_guests_time_is_the_hypervisors() -> None:
    clock = TscClock()
    timestamp, system_time, mul, shift, flags = time_record(clock)
    assert flags == layout.XEN_PVCLOCK_TSC_STABLE_BIT
    before = clock.now()
    ticks = read_tsc() - timestamp
    guest = ((ticks << shift if shift >= 0 else ticks >> -shift) * mul >> 32) + system_time
    assert before <= guest <= clock.now()


def test_wall_clock_time_is_that_of_the_hypervisors_boot(machine: BareMachine) -> None:
    machine.clock.advance(3_700_000_001)
    domain = machine.domain()
    set_wall_clock(domain)
    d, base = domain.memory.d, domain.shared_info
    assert d[base + layout.SHARED_WC_VERSION >> 2] % 2 == 0
    assert d[base + layout.SHARED_WC_SEC >> 2] == 1_000_000_000
    assert d[base + layout.SHARED_WC_NSEC >> 2] == 0


def test_virtual_time_stands_still_while_the_vcpu_is_blocked_and_its_alarm_counts_it(machine: BareMachine) -> None:
    domain = machine.domain()
    vcpu = domain.vcpus[0]
    real = domain.events.bind_virq(0, 0)
    alarm = domain.events.bind_virq(VIRQ_XENOLITH_VIRTUAL_TIMER, 0)
    seen: dict[str, int] = {}
    ended = machine.ended()

    def virtual_time() -> int:
        return int.from_bytes(read(vcpu, DATA, 8), "little")

    def program() -> Program:
        yield machine.compute(5 * MS)
        yield (HYPERVISOR_vcpu_op, VCPUOP_XENOLITH_get_virtual_time, 0, DATA)
        seen["after 5 ms"] = virtual_time()
        write(vcpu, DATA, pack("<Q", 20 * MS))
        yield (HYPERVISOR_vcpu_op, VCPUOP_XENOLITH_set_virtual_timer, 0, DATA)
        write(vcpu, DATA, pack("<QII", machine.clock.now() + 100 * MS, 0, 0))
        yield (HYPERVISOR_vcpu_op, 8, 0, DATA)
        yield (HYPERVISOR_sched_op, SCHEDOP_block, 0)
        seen["real time after the sleep"] = machine.clock.now()
        seen["the real alarm"] = pending(domain, real)
        yield (HYPERVISOR_vcpu_op, VCPUOP_XENOLITH_get_virtual_time, 0, DATA)
        seen["after the sleep"] = virtual_time()
        seen["too early"] = pending(domain, alarm)
        yield machine.compute(14 * MS)
        yield (HYPERVISOR_vcpu_op, VCPUOP_XENOLITH_get_virtual_time, 0, DATA)
        seen["still too early"] = pending(domain, alarm)
        yield machine.compute(2 * MS)
        yield (HYPERVISOR_vcpu_op, VCPUOP_XENOLITH_stop_virtual_timer, 0, 0)
        seen["in time"] = pending(domain, alarm)
        write(vcpu, DATA, pack("<I", 0))
        while True:
            yield (HYPERVISOR_sched_op, SCHEDOP_shutdown, DATA)

    machine.run(domain, program())
    assert ended.wait(60)
    assert seen == {
        "after 5 ms": 5 * MS,
        "real time after the sleep": 105 * MS,
        "the real alarm": True,
        "after the sleep": 5 * MS,
        "too early": False,
        "still too early": False,
        "in time": True,
    }
