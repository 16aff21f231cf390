"""The scheduler: who runs, for how long, and that one domain's end is nobody else's."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from struct import pack
from typing import ClassVar

import pytest

from xenolith.abi.hypercalls import (
    EVTCHNOP_send,
    HYPERVISOR_event_channel_op,
    HYPERVISOR_sched_op,
    HYPERVISOR_vcpu_op,
    RUNSTATE_blocked,
    RUNSTATE_runnable,
    RUNSTATE_running,
    SCHEDOP_block,
    SCHEDOP_poll,
    SCHEDOP_shutdown,
    SCHEDOP_watchdog,
    SCHEDOP_yield,
    SHUTDOWN_crash,
    SHUTDOWN_watchdog,
    VCPUOP_down,
)
from xenolith.abi.x86 import PAGE_SIZE
from xenolith.hypervisor.domain import Domain
from xenolith.hypervisor.sched.bvt import BorrowedVirtualTime
from xenolith.hypervisor.sched.credit2 import Credit2
from xenolith.hypervisor.sched.fair import QUANTUM, Fair
from xenolith.hypervisor.sched.policy import MakePolicy, Unit
from xenolith.hypervisor.sched.sfs import SurplusFair
from xenolith.hypervisor.statistics import cpu_time

from .bare import DATA, DEADLINE, BareMachine, Program, pending, write

MS = 1_000_000

MakeMachine = Callable[..., BareMachine]


@pytest.fixture
def make() -> Iterator[MakeMachine]:
    made: list[BareMachine] = []

    def make(
        pcpus: int = 1, cpus_shared: bool = True, policy: MakePolicy = Fair, host_cpus: Sequence[int] = ()
    ) -> BareMachine:
        made.append(BareMachine(pcpus, cpus_shared, policy, host_cpus))
        return made[-1]

    yield make
    for machine in made:
        machine.close()


def shutdown(domain: Domain, reason: int = 0) -> Program:
    write(domain.vcpus[0], DATA + PAGE_SIZE, pack("<I", reason))
    while True:
        yield (HYPERVISOR_sched_op, SCHEDOP_shutdown, DATA + PAGE_SIZE)


def computes(machine: BareMachine, domain: Domain, until: int) -> Program:
    """Compute, in steps of 1 ms, until system time is `until`."""
    while machine.clock.now() < until:
        yield machine.compute(MS)
    yield from shutdown(domain)


def running(domain: Domain) -> int:
    return cpu_time(domain)


def both_start_together(machine: BareMachine, *domains: Domain) -> None:
    """Pause, so that neither has a head start."""
    for domain in domains:
        machine.hypervisor.scheduler.pause(domain)


@pytest.mark.parametrize(("weights", "shares"), [((256, 256), (1, 1)), ((512, 256), (2, 1)), ((256, 768), (1, 3))])
def test_two_computing_domains_share_a_pcpu_by_weight(
    make: MakeMachine, weights: tuple[int, int], shares: tuple[int, int]
) -> None:
    machine = make()
    ended = machine.ended()
    domains = [machine.domain(), machine.domain()]
    end = 1200 * MS
    measured: list[int] = []
    both_start_together(machine, *domains)
    for domain, weight in zip(domains, weights, strict=True):
        machine.run(domain, computes(machine, domain, end))
        machine.hypervisor.scheduler.pools.adjust(domain, {"weight": weight})
    for domain in domains:
        machine.control.unpause(domain.domid)
    assert ended.wait(DEADLINE)
    measured = [running(domain) for domain in domains]
    expected = [end * share // sum(shares) for share in shares]
    for got, wanted in zip(measured, expected, strict=True):
        assert abs(got - wanted) <= 4 * QUANTUM, (measured, expected)


@pytest.mark.parametrize("policy", [Credit2, BorrowedVirtualTime, SurplusFair])
def test_weights_of_one_two_and_four_are_kept_within_two_percent(make: MakeMachine, policy: MakePolicy) -> None:
    machine = make(policy=policy)
    ended = machine.ended()
    domains = [machine.domain() for _ in range(3)]
    end = 10_000 * MS
    both_start_together(machine, *domains)
    for domain, weight in zip(domains, (128, 256, 512), strict=True):
        machine.run(domain, computes(machine, domain, end))
        machine.control.set_scheduling(domain.domid, {"weight": weight})
    for domain in domains:
        machine.control.unpause(domain.domid)
    assert ended.wait(DEADLINE)
    for domain, share in zip(domains, (1, 2, 4), strict=True):
        assert abs(running(domain) - end * share // 7) <= end // 50, [running(each) for each in domains]


@pytest.mark.parametrize("cap", [10, 25, 50, 90])
def test_a_cap_of_credit2_is_kept_within_two_percent_on_an_idle_machine(make: MakeMachine, cap: int) -> None:
    machine = make(policy=Credit2)
    ended = machine.ended()
    domain = machine.domain()
    end = 2000 * MS
    machine.control.set_scheduling(domain.domid, {"cap": cap})
    machine.run(domain, computes(machine, domain, end))
    assert ended.wait(DEADLINE)
    assert abs(running(domain) - end * cap // 100) <= end // 50


def test_a_cap_that_is_set_while_the_domain_runs_counts_from_then_on_and_not_before(make: MakeMachine) -> None:
    machine = make(policy=Credit2)
    ended = machine.ended()
    domain = machine.domain()

    def program() -> Program:
        for cap, until in ((0, 1000), (25, 3000), (0, 3500)):
            machine.control.set_scheduling(domain.domid, {"cap": cap})
            while machine.clock.now() < until * MS:
                yield machine.compute(MS)
        yield from shutdown(domain)

    machine.run(domain, program())
    assert ended.wait(DEADLINE)
    assert abs(running(domain) - (1000 + 500 + 500) * MS) <= 40 * MS


def test_parameters_out_of_range_or_of_other_algorithms_are_refused(make: MakeMachine) -> None:
    machine = make(policy=Credit2)
    domain = machine.domain(vcpus=2)
    control = machine.control
    for wrong in ({"weight": 0}, {"weight": 65536}, {"cap": -1}, {"cap": 201}, {"warp": 1}, {"weight": 2, "cap": 999}):
        with pytest.raises(ValueError, match=r"out of range|has no parameter"):
            control.set_scheduling(domain.domid, wrong)
    assert control.scheduling(domain.domid) == {"weight": 256, "cap": 0}
    control.set_scheduling(domain.domid, {"cap": 200})
    control.set_scheduling(domain.domid, {"weight": 65535})
    assert control.scheduling(domain.domid) == {"weight": 65535, "cap": 200}


def test_a_domain_alone_is_not_interrupted(make: MakeMachine) -> None:
    machine = make()
    ended = machine.ended()
    domain = machine.domain()
    machine.run(domain, computes(machine, domain, 500 * MS))
    assert ended.wait(DEADLINE)
    vcpu = domain.vcpus[0]
    assert vcpu.runstate_times[RUNSTATE_running] == 500 * MS
    assert vcpu.runstate_times[RUNSTATE_runnable] == 0


class Capped(Fair):
    """In every PERIOD a vCPU may have `cap` per cent of it."""

    name: ClassVar[str] = "capped"
    PERIOD: ClassVar[int] = 20 * MS
    parameters: ClassVar[Mapping[str, int]] = {**Fair.parameters, "cap": 100}

    def __init__(self, pcpus: int) -> None:
        super().__init__(pcpus)
        self.used: dict[Unit, tuple[int, int]] = {}  # period, ns used in it

    def left(self, unit: Unit, now: int) -> int:
        period, used = self.used.get(unit, (0, 0))
        if period != now // self.PERIOD:
            used = 0
        return self.PERIOD * unit.parameters["cap"] // 100 - used - unit.ran(now)

    def charge(self, unit: Unit, ran: int, now: int) -> None:
        super().charge(unit, ran, now)
        period, used = self.used.get(unit, (0, 0))
        self.used[unit] = now // self.PERIOD, ran + (used if period == now // self.PERIOD else 0)

    def not_before(self, unit: Unit, now: int) -> int:
        return now if self.left(unit, now) > 0 else (now // self.PERIOD + 1) * self.PERIOD

    def quantum(self, unit: Unit, contended: bool, now: int) -> int:
        return self.left(unit, now)

    def expired(self, unit: Unit, others: Sequence[Unit], now: int) -> bool:
        return self.left(unit, now) <= 0


def test_a_policy_can_keep_a_vcpu_from_running_though_nobody_else_wants_to(make: MakeMachine) -> None:
    machine = make(policy=Capped)
    assert machine.control.machine().scheduler == "capped"
    ended = machine.ended()
    domain = machine.domain()
    machine.hypervisor.scheduler.pools.adjust(domain, {"cap": 25})
    machine.run(domain, computes(machine, domain, 400 * MS))
    assert ended.wait(DEADLINE)
    times = domain.vcpus[0].runstate_times
    assert abs(times[RUNSTATE_running] - 100 * MS) <= 10 * MS
    assert times[RUNSTATE_runnable] >= 290 * MS


def test_who_asks_for_a_pcpu_again_gets_no_credit_before_its_turn(make: MakeMachine) -> None:
    class Watched(Credit2):
        def pick(self, units: Sequence[Unit], now: int) -> Unit:
            assert all(unit in units[0].runner.domain.cpupool.waiting for unit in units)
            return super().pick(units, now)

    machine = make(policy=Watched)
    domains = [machine.domain() for _ in range(3)]
    all_compute(machine, 200 * MS, *domains)
    assert not any(domain.crash_report for domain in domains)


def test_a_policy_hears_who_was_sent_an_event(make: MakeMachine) -> None:
    def sleeps() -> Program:
        while True:
            yield (HYPERVISOR_sched_op, SCHEDOP_block, 0)

    machine = make()
    domain = machine.domain()
    port = machine.dom0.bind_interdomain(domain.domid, domain.events.alloc_unbound(0))
    machine.run(domain, sleeps())
    machine.dom0.send(port)
    assert domain.vcpus[0].unit.notified == 1


# --- affinity and cpupools -----------------------------------------------------------------------------


def all_compute(machine: BareMachine, until: int, *domains: Domain) -> None:
    """All vCPUs of these compute from the same moment until then; returns when that has come."""
    ended = machine.ended()
    both_start_together(machine, *domains)
    for domain in domains:
        machine.run(domain, *(computes(machine, domain, until) for _ in domain.vcpus))
    for domain in domains:
        machine.control.unpause(domain.domid)
    assert ended.wait(DEADLINE)


def test_pinned_vcpus_share_their_pcpu(make: MakeMachine) -> None:
    machine = make(pcpus=2)
    domains = [machine.domain() for _ in range(2)]
    for domain in domains:
        machine.control.set_affinity(domain.domid, 0, frozenset({1}), None)
    all_compute(machine, 1200 * MS, *domains)
    assert [running(domain) // MS for domain in domains] == pytest.approx([600, 600], abs=4 * QUANTUM // MS)
    assert [domain.vcpus[0].unit.pcpu for domain in domains] == [1, 1]


@pytest.mark.parametrize("cpus_shared", [True, False])
def test_a_vcpu_that_is_pinned_while_it_runs_goes_there(make: MakeMachine, cpus_shared: bool) -> None:
    machine = make(2, cpus_shared)
    ended = machine.ended()
    domain = machine.domain()
    seen: list[int] = []

    def wanders() -> Program:
        for pcpu in (1, 0, 1):
            machine.control.set_affinity(domain.domid, None, frozenset({pcpu}), None)
            yield (HYPERVISOR_sched_op, SCHEDOP_yield, 0)
            seen.append(domain.vcpus[0].unit.pcpu)
        yield from shutdown(domain)

    machine.run(domain, wanders())
    assert ended.wait(DEADLINE)
    assert seen == [1, 0, 1]
    with pytest.raises(ValueError, match="has none of these"):
        machine.control.set_affinity(domain.domid, 0, frozenset({7}), None)
    with pytest.raises(ValueError, match="no vCPU 1"):
        machine.control.set_affinity(domain.domid, 1, frozenset({0}), None)


def test_pools_have_pcpus_and_algorithms_of_their_own(make: MakeMachine) -> None:
    machine = make(pcpus=2)
    control = machine.control
    control.remove_from_cpupool("Pool-0", {1})
    assert control.machine().unassigned_pcpus == {1}
    control.create_cpupool("apart", "credit2", {1})
    domains = [machine.domain() for _ in range(2)]
    for domain, weight in zip(domains, (512, 256), strict=True):
        control.move_to_cpupool(domain.domid, "apart")
        control.set_scheduling(domain.domid, {"weight": weight})
    all_compute(machine, 1200 * MS, *domains)
    assert [running(domain) // MS for domain in domains] == pytest.approx([800, 400], abs=40)
    assert [domain.vcpus[0].unit.pcpu for domain in domains] == [1, 1]
    assert [(pool.name, pool.scheduler, pool.pcpus, pool.domains) for pool in control.cpupools()] == [
        ("Pool-0", "fair", (0,), 1),  # dom0
        ("apart", "credit2", (1,), 2),
    ]


def test_a_domain_that_runs_moves_between_pools_and_pcpus_leave_from_under_it(make: MakeMachine) -> None:
    machine = make(pcpus=3, cpus_shared=False)
    control = machine.control
    ended = machine.ended()
    control.remove_from_cpupool("Pool-0", {2})
    control.create_cpupool("apart", "bvt", {2})
    domain = machine.domain(vcpus=2)
    stop = 0

    def goes_on() -> Program:
        while not stop:
            yield machine.compute(MS // 10)
        yield from shutdown(domain)

    machine.run(domain, goes_on(), goes_on())
    for _ in range(20):
        control.move_to_cpupool(domain.domid, "apart")
        control.remove_from_cpupool("Pool-0", {1})
        control.add_to_cpupool("apart", {1})
        control.set_affinity(domain.domid, 1, frozenset({1}), None)
        control.remove_from_cpupool("apart", {1})
        assert all(vcpu.unit.pcpu == 2 or vcpu.unit.running_since is None for vcpu in domain.vcpus)
        control.add_to_cpupool("Pool-0", {1})
        control.move_to_cpupool(domain.domid, "Pool-0")
    stop = 1
    assert ended.wait(DEADLINE)


def test_what_cannot_be_done_to_pools_is_refused(make: MakeMachine) -> None:
    machine = make(pcpus=2)
    control = machine.control
    domain = machine.domain()
    control.remove_from_cpupool("Pool-0", {1})
    control.create_cpupool("apart", "sfs", ())
    refused: list[tuple[Callable[[], None], str]] = [
        (lambda: control.create_cpupool("apart", "sfs", {1}), "already"),
        (lambda: control.create_cpupool("", "sfs", {1}), "needs a name"),
        (lambda: control.create_cpupool("other", "best", {1}), "no scheduler best"),
        (lambda: control.create_cpupool("other", "sfs", {0}), "pCPU 0 is in a cpupool"),
        (lambda: control.add_to_cpupool("nowhere", {1}), "no cpupool nowhere"),
        (lambda: control.add_to_cpupool("apart", {9}), "or there is none"),
        (lambda: control.remove_from_cpupool("Pool-0", {0}), "needs a pCPU"),
        (lambda: control.remove_from_cpupool("Pool-0", {1}), "not all"),
        (lambda: control.move_to_cpupool(domain.domid, "apart"), "has no pCPU"),
        (lambda: control.destroy_cpupool("Pool-0"), "has domains"),
        (lambda: control.rename_cpupool("apart", "Pool-0"), "cannot be the name"),
        (lambda: control.set_schedparam("apart", {"ratelimit": 1}), "no parameter ratelimit"),
    ]
    for act, why in refused:
        with pytest.raises(ValueError, match=why):
            act()
    control.rename_cpupool("apart", "away")
    control.add_to_cpupool("away", {1})
    control.move_to_cpupool(domain.domid, "away")
    with pytest.raises(ValueError, match="has domains"):
        control.destroy_cpupool("away")
    control.move_to_cpupool(domain.domid, "Pool-0")
    control.destroy_cpupool("away")
    assert control.machine().unassigned_pcpus == {1}


def test_pcpus_that_are_pinned_run_their_vcpus_on_that_cpu_of_the_host(make: MakeMachine) -> None:
    host_cpus = sorted(os.sched_getaffinity(0))
    machine = make(pcpus=2, host_cpus=(host_cpus[-1], host_cpus[0]))
    domain = machine.domain()
    seen: list[set[int]] = []

    def looks() -> Program:
        for pcpu in (0, 1):
            machine.control.set_affinity(domain.domid, 0, frozenset({pcpu}), None)
            yield (HYPERVISOR_sched_op, SCHEDOP_yield, 0)
            seen.append(os.sched_getaffinity(0))
        yield from shutdown(domain)

    ended = machine.ended()
    machine.run(domain, looks())
    assert ended.wait(DEADLINE)
    assert seen == [{host_cpus[-1]}, {host_cpus[0]}]


def test_vcpus_that_share_a_cpu_take_turns(make: MakeMachine) -> None:
    machine = make()
    ended = machine.ended()
    domain = machine.domain(vcpus=2)
    end = 400 * MS
    machine.run(domain, computes(machine, domain, end), computes(machine, domain, end))
    assert ended.wait(DEADLINE)
    times = [vcpu.runstate_times[RUNSTATE_running] for vcpu in domain.vcpus]
    assert sum(times) == end
    assert abs(times[0] - times[1]) <= 2 * QUANTUM


@pytest.mark.parametrize("cpus_shared", [True, False], ids=["on one Cpu", "on a Cpu each"])
def test_an_interprocessor_event_wakes_a_blocked_vcpu(make: MakeMachine, cpus_shared: bool) -> None:
    machine = make(pcpus=2, cpus_shared=cpus_shared)
    ended = machine.ended()
    domain = machine.domain(vcpus=2)
    port = domain.events.bind_ipi(1)
    order: list[str] = []

    def first() -> Program:
        while not domain.vcpus[1].blocked:
            yield (HYPERVISOR_sched_op, SCHEDOP_yield, 0)
        write(domain.vcpus[0], DATA, pack("<I", port))
        yield (HYPERVISOR_event_channel_op, EVTCHNOP_send, DATA)
        order.append("sent")
        while True:
            yield (HYPERVISOR_sched_op, SCHEDOP_block, 0)

    def second() -> Program:
        yield (HYPERVISOR_sched_op, SCHEDOP_block, 0)
        assert pending(domain, port)
        order.append("woken")
        yield from shutdown(domain)

    machine.run(domain, first(), second())
    assert ended.wait(DEADLINE)
    assert domain.shutdown_reason == 0
    assert "woken" in order


def test_a_sleeper_that_wakes_does_not_wait_for_the_end_of_a_quantum(make: MakeMachine) -> None:
    machine = make()
    ended = machine.ended()
    busy, sleeper = machine.domain(), machine.domain()
    port = sleeper.events.bind_virq(0, 0)
    late: list[int] = []

    def sleeps() -> Program:
        for _ in range(10):
            deadline = machine.clock.now() + 33 * MS
            sleeper.memory.b[sleeper.shared_info + 2048] = 0
            sleeper.memory.q[sleeper.vcpus[0].info + 8 >> 3] = 0
            sleeper.memory.b[sleeper.vcpus[0].info] = 0
            yield (15, deadline)  # set_timer_op
            yield (HYPERVISOR_sched_op, SCHEDOP_block, 0)
            assert pending(sleeper, port)
            late.append(machine.clock.now() - deadline)
        yield from shutdown(sleeper)

    def computes_for_ever() -> Program:
        while True:
            yield machine.compute(MS)

    # In this order: a domain that starts just when a sleeper wakes has had no more of the CPU, and gets its quantum.
    machine.run(busy, computes_for_ever())
    machine.run(sleeper, sleeps())
    assert ended.wait(DEADLINE)
    assert sleeper.shutdown_reason == 0
    assert len(late) == 10
    assert max(late) < QUANTUM // 2, late


def test_a_block_ends_at_its_timer_on_an_otherwise_idle_machine(make: MakeMachine) -> None:
    machine = make()
    ended = machine.ended()
    domain = machine.domain()
    domain.events.bind_virq(0, 0)

    def program() -> Program:
        yield (15, 3_600_000 * MS)
        yield (HYPERVISOR_sched_op, SCHEDOP_block, 0)
        yield from shutdown(domain)

    machine.run(domain, program())
    assert ended.wait(DEADLINE)
    assert machine.clock.now() == 3_600_000 * MS
    assert domain.vcpus[0].runstate_times[RUNSTATE_blocked] == 3_600_000 * MS


def test_a_poll_ends_at_its_time_or_at_its_port_whatever_is_masked(make: MakeMachine) -> None:
    machine = make()
    ended = machine.ended()
    domain = machine.domain()
    vcpu = domain.vcpus[0]
    unbound = domain.events.alloc_unbound(0)
    sender = machine.dom0.bind_interdomain(domain.domid, unbound)
    times: list[int] = []

    def program() -> Program:
        domain.memory.b[domain.shared_info + 2560] = 0xFF
        write(vcpu, DATA, pack("<QIIQ", DATA + 64, 1, 0, 10 * MS) + bytes(40) + pack("<I", unbound))
        yield (HYPERVISOR_sched_op, SCHEDOP_poll, DATA)
        times.append(machine.clock.now())
        machine.dom0.send(sender)
        write(vcpu, DATA, pack("<QIIQ", DATA + 64, 1, 0, 0))
        yield (HYPERVISOR_sched_op, SCHEDOP_poll, DATA)
        times.append(machine.clock.now())
        yield from shutdown(domain)

    machine.run(domain, program())
    assert ended.wait(DEADLINE)
    assert times == [10 * MS, 10 * MS]


def test_nothing_executes_once_pause_has_returned(make: MakeMachine) -> None:
    machine = make(pcpus=2, cpus_shared=False)
    domain = machine.domain(vcpus=2)
    steps = [0, 0]

    def program(number: int) -> Program:
        def step() -> None:
            steps[number] += 1

        while True:
            yield step

    machine.run(domain, program(0), program(1))
    for _ in range(20):
        machine.control.pause(domain.domid)
        seen = steps.copy()
        machine.compute(20 * MS)()
        assert steps == seen
        machine.control.unpause(domain.domid)


def test_a_failure_inside_the_hypervisor_ends_only_the_domain_it_served(make: MakeMachine) -> None:
    machine = make(pcpus=1)
    ended = machine.ended()
    victim, survivor = machine.domain(), machine.domain()

    def fails() -> Program:
        raise RuntimeError("a bug of ours")
        yield

    machine.run(victim, fails())
    assert ended.wait(DEADLINE)
    assert victim.shutdown_reason == SHUTDOWN_crash
    assert "a bug of ours" in victim.crash_report
    ended.clear()
    machine.run(survivor, shutdown(survivor, 1))
    assert ended.wait(DEADLINE)
    assert survivor.shutdown_reason == 1


def test_dom0_hears_of_a_shutdown_once_when_the_last_vcpu_has_stopped(make: MakeMachine) -> None:
    machine = make(pcpus=2, cpus_shared=False)
    domain = machine.domain(vcpus=2)
    heard: list[bool] = []
    done = machine.ended()
    port = machine.hypervisor.domains[0].vcpus[0].virq_port[3]

    def handler(_: int) -> None:
        heard.append(any(vcpu.context and vcpu.context.running for vcpu in domain.vcpus))
        done.set()

    machine.dom0.set_handler(port, handler)

    def spins() -> Program:
        while True:
            yield lambda: None

    machine.run(domain, shutdown(domain), spins())
    assert done.wait(DEADLINE)
    assert heard == [False]


def test_the_last_vcpu_to_go_down_powers_the_domain_off(make: MakeMachine) -> None:
    machine = make()
    ended = machine.ended()
    domain = machine.domain(vcpus=2)

    def goes_down(number: int) -> Program:
        while True:
            yield (HYPERVISOR_vcpu_op, VCPUOP_down, number, 0)

    machine.run(domain, goes_down(0), goes_down(1))
    assert ended.wait(DEADLINE)
    assert domain.shutdown_reason == 0


def test_a_watchdog_that_is_not_fed_ends_the_domain(make: MakeMachine) -> None:
    machine = make()
    ended = machine.ended()
    domain = machine.domain()

    def program() -> Program:
        write(domain.vcpus[0], DATA, pack("<II", 0, 2))
        yield (HYPERVISOR_sched_op, SCHEDOP_watchdog, DATA)
        while True:
            yield machine.compute(MS)

    machine.run(domain, program())
    assert ended.wait(DEADLINE)
    assert domain.shutdown_reason == SHUTDOWN_watchdog
    assert machine.clock.now() >= 2000 * MS
