"""Scheduling algorithms on simulated machines: what each of their papers promises, and what all of them must hold."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xenolith.hypervisor.sched.algorithms import ALGORITHMS
from xenolith.hypervisor.sched.bvt import BorrowedVirtualTime
from xenolith.hypervisor.sched.credit2 import Credit2
from xenolith.hypervisor.sched.fair import WAKE_CREDIT, Fair
from xenolith.hypervisor.sched.policy import MakePolicy, Policy, Unit
from xenolith.hypervisor.sched.sfs import SurplusFair, readjusted
from xenolith.hypervisor.sched.simulator import (
    MS,
    SECOND,
    UNTIL_NOTIFIED,
    Load,
    Phase,
    Simulator,
    Task,
    hog,
    periodic,
    random_bursts,
)

EVERY = pytest.mark.parametrize("make", ALGORITHMS.values(), ids=ALGORITHMS.keys())
QUANTUM = 10 * MS  # the longest of any algorithm
weights = st.lists(st.sampled_from((64, 128, 256, 384, 512)), min_size=2, max_size=6)


def hogs(make: MakePolicy, pcpus: int, parameters: list[dict[str, int]], until: int = 10 * SECOND) -> list[int]:
    """ns of CPU time that domains which compute all the time get."""
    machine = Simulator(make(pcpus), pcpus)
    tasks = [machine.add(domid, hog(), **each) for domid, each in enumerate(parameters, 1)]
    machine.run(until)
    return [task.cpu_time for task in tasks]


@EVERY
@given(weights=weights)
@settings(max_examples=25)
def test_one_pcpu_is_shared_by_weight(make: MakePolicy, weights: list[int]) -> None:
    had = hogs(make, 1, [{"weight": weight} for weight in weights])
    assert sum(had) == 10 * SECOND, "and never stands still"
    for time, weight in zip(had, weights, strict=True):
        assert abs(time - 10 * SECOND * weight // sum(weights)) <= 100 * MS + 4 * QUANTUM


@EVERY
def test_weights_of_one_two_and_four_are_kept_within_two_percent(make: MakePolicy) -> None:
    had = hogs(make, 1, [{"weight": weight} for weight in (128, 256, 512)])
    for time, due in zip(had, (1, 2, 4), strict=True):
        assert time == pytest.approx(10 * SECOND * due / 7, rel=0.02)


@EVERY
@given(pcpus=st.integers(1, 8), domains=st.integers(1, 20))
@settings(max_examples=25)
def test_no_pcpu_stands_still_while_somebody_wants_it_and_equals_get_the_same(
    make: MakePolicy, pcpus: int, domains: int
) -> None:
    had = hogs(make, pcpus, [{}] * domains, 5 * SECOND)
    assert sum(had) == 5 * SECOND * min(pcpus, domains)
    assert max(had) - min(had) <= 100 * MS + 4 * QUANTUM


@EVERY
@given(seed=st.integers(0, 1 << 30), pcpus=st.integers(1, 4))
@settings(max_examples=5)
def test_nobody_starves_whatever_the_others_do(make: MakePolicy, seed: int, pcpus: int) -> None:
    machine = Simulator(make(pcpus), pcpus)
    loads: list[Load] = [random_bursts(seed + number, (1 + number) * MS, 4 * MS) for number in range(8)]
    busy = [machine.add(domid, load) for domid, load in enumerate(loads, 10)]
    victim = machine.add(1, hog())
    machine.run(4 * SECOND)
    assert victim.cpu_time >= 4 * SECOND * pcpus // 9 // 2
    assert all(task.turns > 20 for task in busy)
    assert sum(task.cpu_time for task in (*busy, victim)) <= 4 * SECOND * pcpus


@EVERY
def test_who_sleeps_saves_nothing_up(make: MakePolicy) -> None:
    machine = Simulator(make(1), 1)
    computes = machine.add(1, hog())
    slept = machine.add(2, hog(), at=20 * SECOND)
    machine.run(22 * SECOND)
    assert computes.cpu_time - 20 * SECOND == pytest.approx(slept.cpu_time, abs=100 * MS + 2 * QUANTUM)


@pytest.mark.slow
@EVERY
def test_a_thousand_vcpus_on_a_hundred_pcpus_get_the_same(make: MakePolicy) -> None:
    had = hogs(make, 100, [{}] * 1000, SECOND // 5)
    assert sum(had) == 100 * SECOND // 5
    assert max(had) - min(had) <= 4 * QUANTUM


@EVERY
def test_the_same_loads_give_the_same_history(make: MakePolicy) -> None:
    def history() -> list[tuple[int, int]]:
        machine = Simulator(make(2), 2)
        tasks = [machine.add(domid, random_bursts(domid, 2 * MS, 3 * MS)) for domid in range(1, 9)]
        machine.run(SECOND)
        return [(task.cpu_time, task.turns) for task in tasks]

    assert history() == history()


# --- affinity ----------------------------------------------------------------------------------------


class Checked(Simulator):
    """Nobody runs where it may not."""

    def _grant(self, task: Task) -> None:
        super()._grant(task)
        for unit in self.pool.running:
            assert unit.hard is None or unit.pcpu in unit.hard


def most_at_once(affinities: list[set[int]]) -> int:
    """How many can run at once: a greatest matching, by trying them all."""
    if not affinities:
        return 0
    first, *rest = affinities
    without = most_at_once(rest)
    return max([without, *(1 + most_at_once([each - {pcpu} for each in rest]) for pcpu in first)])


affinities = st.lists(st.sets(st.integers(0, 3), min_size=1), min_size=1, max_size=6)


@EVERY
@given(affinities=affinities)
@settings(max_examples=15)
def test_affinities_are_kept_and_as_many_run_as_can(make: MakePolicy, affinities: list[set[int]]) -> None:
    machine = Checked(make(4), 4)
    tasks = [machine.add(domid, hog(), hard=hard) for domid, hard in enumerate(affinities, 1)]
    machine.run(2 * SECOND)
    assert sum(task.cpu_time for task in tasks) == 2 * SECOND * most_at_once(affinities)
    assert all(task.cpu_time >= 2 * SECOND // (2 * len(tasks)) for task in tasks), "and nobody starves"


@EVERY
def test_who_is_pinned_shares_its_pcpu_and_leaves_the_others_alone(make: MakePolicy) -> None:
    machine = Checked(make(2), 2)
    pinned = [machine.add(domid, hog(), hard={0}) for domid in (1, 2, 3)]
    free = machine.add(4, hog())
    machine.run(6 * SECOND)
    assert free.cpu_time == 6 * SECOND
    assert [task.cpu_time / SECOND for task in pinned] == pytest.approx([2, 2, 2], abs=0.1)


@EVERY
def test_one_that_had_a_pcpu_to_itself_for_long_is_not_kept_from_it_for_that(make: MakePolicy) -> None:
    machine = Checked(make(2), 2)
    for domid in (1, 2, 3):
        machine.add(domid, hog(), hard={0})
    alone = machine.add(4, hog(), hard={1})
    machine.add(5, hog(), hard={1}, at=20 * SECOND)
    machine.run(22 * SECOND)
    assert alone.cpu_time >= 20 * SECOND + SECOND // 2


@EVERY
def test_who_prefers_a_pcpu_gets_it_when_nobody_needs_it(make: MakePolicy) -> None:
    machine = Checked(make(2), 2)
    machine.add(1, iter([Phase(SECOND, 0)]), hard={1})
    prefers = machine.add(2, hog(), soft={1})
    machine.run(SECOND // 2)
    assert prefers.unit.pcpu == 0, "preferring is not waiting"
    machine.run(2 * SECOND)
    assert (prefers.unit.pcpu, prefers.cpu_time, machine.moves) == (1, 2 * SECOND, 1)


def test_a_rate_limit_keeps_those_that_run_from_being_preempted_sooner() -> None:
    def turns(ratelimit: int) -> int:
        policy = Credit2(1)
        policy.schedparam["ratelimit"] = ratelimit
        machine = Simulator(policy, 1)
        machine.add(1, hog())
        machine.add(2, periodic(MS // 50, MS))
        machine.run(SECOND)
        return machine.decisions

    assert turns(0) > 900
    assert turns(5000) <= 2 * SECOND // (5 * MS) + 2


# --- credit2 ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("cap", [10, 25, 50, 80])
@pytest.mark.parametrize("others", [0, 2])
def test_a_cap_is_kept_within_two_percent_also_where_the_machine_is_idle(cap: int, others: int) -> None:
    had = hogs(Credit2, 4, [{"cap": cap}] + [{}] * others)
    assert had[0] == pytest.approx(10 * SECOND * cap / 100, rel=0.02)


def test_a_cap_is_for_all_of_a_domains_vcpus_together() -> None:
    machine = Simulator(Credit2(4), 4)
    vcpus = [machine.add(1, hog(), vcpu_id=number, cap=120) for number in range(3)]
    machine.run(10 * SECOND)
    assert sum(vcpu.cpu_time for vcpu in vcpus) == pytest.approx(12 * SECOND, rel=0.02)


def test_a_sleeper_wakes_before_those_that_compute() -> None:
    machine = Simulator(Credit2(1), 1)
    for domid in range(1, 4):
        machine.add(domid, hog())
    sleeper = machine.add(9, periodic(MS // 10, 20 * MS))
    machine.run(5 * SECOND)
    assert sorted(sleeper.waits)[len(sleeper.waits) * 99 // 100] <= 2 * MS


# --- bvt -------------------------------------------------------------------------------------------


def latencies(**parameters: int) -> list[int]:
    """ns that a domain which answers once in 20 ms waits for the pCPU beside three that compute."""
    machine = Simulator(BorrowedVirtualTime(1), 1)
    for domid in range(1, 4):
        machine.add(domid, hog())
    answers = machine.add(9, periodic(2 * MS, 6 * MS), **parameters)
    machine.run(10 * SECOND)
    return sorted(answers.waits)


def test_a_warped_domain_answers_at_once_beside_three_that_compute() -> None:
    warped = latencies(warp=50_000)
    assert warped[len(warped) * 99 // 100] <= 2 * MS
    assert warped[-1] < latencies()[-1]


def test_borrowed_time_is_paid_back() -> None:
    plain, warped = (hogs(BorrowedVirtualTime, 1, [{"warp": warp}, {}, {}]) for warp in (0, 50_000))
    assert warped == pytest.approx(plain, abs=50 * MS + 4 * QUANTUM)


def test_a_warp_limit_ends_the_warp_of_one_that_computes() -> None:
    policy = BorrowedVirtualTime(1)
    policy = BorrowedVirtualTime(1)
    policy.schedparam["allowance"] = 20_000
    machine = Simulator(policy, 1)
    greedy = machine.add(1, hog(), warp=10_000_000, warp_limit=5_000, unwarp=1_000_000)
    other = machine.add(2, hog())
    machine.run(2 * SECOND)
    assert abs(greedy.cpu_time - other.cpu_time) <= 2 * 5 * MS + 4 * QUANTUM


def test_equals_are_not_exchanged_before_the_allowance_is_used() -> None:
    policy = BorrowedVirtualTime(1)
    policy.schedparam["allowance"] = 20_000
    machine = Simulator(policy, 1)
    tasks = [machine.add(domid, hog()) for domid in (1, 2)]
    machine.run(2 * SECOND)
    assert sum(task.turns for task in tasks) <= 2 * SECOND // (20 * MS) + 2


# --- sfs -------------------------------------------------------------------------------------------


def units(*weights: int) -> dict[Unit, int]:
    return {Unit(number, 0): weight for number, weight in enumerate(weights)}


def test_weights_that_cannot_be_honoured_are_lowered_to_those_that_can() -> None:
    asked = units(1, 10, 1)
    assert [float(weight) for weight in readjusted(asked, 2).values()] == [1, 2, 1]
    assert len(set(readjusted(units(5, 7), 2).values())) == 1, "a processor for each"


@given(weights=st.lists(st.integers(1, 1000), min_size=1, max_size=30), pcpus=st.integers(1, 16))
def test_readjusted_weights_are_feasible_and_leave_feasible_ones_alone(weights: list[int], pcpus: int) -> None:
    asked = units(*weights)
    result = readjusted(asked, pcpus)
    total = sum(result.values())
    if len(weights) >= pcpus:
        assert all(weight * pcpus <= total for weight in result.values())
    if len(weights) > pcpus:
        assert all(result[unit] in (weight, max(result.values())) for unit, weight in asked.items())


def test_a_weight_above_a_processor_gets_just_one_and_the_others_share_the_rest() -> None:
    had = hogs(SurplusFair, 2, [{"weight": 256}, {"weight": 2560}, {"weight": 256}])
    assert had[1] == pytest.approx(10 * SECOND, rel=0.02)
    assert had[0] == pytest.approx(5 * SECOND, rel=0.02)
    assert had[2] == pytest.approx(5 * SECOND, rel=0.02)


@given(weights=weights)
@settings(max_examples=15)
def test_several_pcpus_are_shared_by_readjusted_weights(weights: list[int]) -> None:
    had = hogs(SurplusFair, 2, [{"weight": weight} for weight in weights])
    asked = units(*weights)
    fair = readjusted(asked, 2)
    total = sum(fair.values())
    for time, unit in zip(had, asked, strict=True):
        assert time == pytest.approx(float(20 * SECOND * fair[unit] / total), abs=6 * QUANTUM + 0.02 * 10 * SECOND)


# --- communication ---------------------------------------------------------------------------------


def answered(policy: Policy, background: Callable[[int], Load]) -> tuple[int, int]:
    """A two-tier service (a web server asks a database) beside six domains with other work, for 10 s.

    How many requests were answered, and the median response time in ns.
    """
    machine = Simulator(policy, 1)
    times: list[int] = []
    asked = 0

    def tier(compute: int, then: Callable[[], None]) -> Load:
        while True:
            yield Phase(compute, UNTIL_NOTIFIED, then)

    def finish() -> None:
        nonlocal asked
        times.append(machine.now - asked)
        asked = machine.now
        machine.notify(web)  # the next request has come meanwhile

    for domid in range(1, 7):
        machine.add(domid, background(domid))
    web = machine.add(10, tier(MS // 2, lambda: machine.notify(database)), weight=1024)
    database = machine.add(11, tier(MS, finish), weight=1024)
    machine.run(10 * SECOND)
    return len(times), sorted(times)[len(times) // 2]


@pytest.mark.parametrize("background", [lambda _: hog(), lambda seed: random_bursts(seed, 2 * MS, 6 * MS)])
def test_domains_that_talk_are_answered_sooner_than_under_credit2(background: Callable[[int], Load]) -> None:
    done, median = answered(ALGORITHMS["communication"](1), background)
    done_by_credit2, median_by_credit2 = answered(Credit2(1), background)
    assert median <= 0.8 * median_by_credit2
    assert done >= 0.99 * done_by_credit2


# --- fair ------------------------------------------------------------------------------------------


def test_who_slept_goes_first_but_brings_no_more_than_its_credit_along() -> None:
    machine = Simulator(Fair(1), 1)
    computes = machine.add(1, hog())
    sleeper = machine.add(2, hog(), at=SECOND)
    machine.run(2 * SECOND)
    assert sleeper.waits == [0], "at once"
    assert sleeper.cpu_time - (computes.cpu_time - SECOND) <= WAKE_CREDIT + 2 * QUANTUM


def test_vcpus_of_one_domain_that_have_no_credit_left_take_turns() -> None:
    """With one context for all of them (Unicorn) nobody picks, and so nobody fills up their credit."""
    policy = Credit2(1)
    units = [Unit(1, number, {"weight": 256, "cap": 0}) for number in range(3)]
    for unit in units:
        policy.add(unit, 0)
        policy.wake(unit, 0)
        policy.charge(unit, 10**12, 0)
    chosen = [policy.first(units, 0) for _ in range(9)]
    assert [chosen.count(unit) for unit in units] == [3, 3, 3]
