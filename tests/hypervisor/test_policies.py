"""Scheduling policies without a machine: driven by a simulator of pCPUs, as an algorithm is designed."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from xenolith.hypervisor.sched.fair import QUANTUM, WAKE_CREDIT, Fair
from xenolith.hypervisor.sched.policy import NO_LIMIT, Policy, Unit

MS = 1_000_000


class Simulator:
    """pCPUs on which units compute for ever, except while they sleep. Time goes on in steps of 1 ms."""

    def __init__(self, policy: Policy, pcpus: int) -> None:
        self.policy = policy
        self.pcpus = pcpus
        self.now = 0
        self.running: dict[Unit, int] = {}  # end of the quantum, 0: none
        self.waiting: list[Unit] = []
        self.time: dict[Unit, int] = {}

    def unit(self, **parameters: int) -> Unit:
        unit = Unit(len(self.time) + 1, 0, {**self.policy.parameters, **parameters})
        self.policy.add(unit, self.now)
        self.time[unit] = 0
        self.wake(unit)
        return unit

    def wake(self, unit: Unit) -> None:
        self.policy.wake(unit, self.now)
        self._queue(unit)

    def sleep(self, unit: Unit) -> None:
        if unit in self.running:
            self._stop(unit)
        else:
            self.waiting.remove(unit)
        self.policy.sleep(unit, self.now)

    def _queue(self, unit: Unit) -> None:
        self.policy.queue(unit, [*self.running, *self.waiting], self.now)
        self.waiting.append(unit)
        if len(self.running) == self.pcpus:
            victim = self.policy.victim(unit, list(self.running), self.now)
            if victim is not None:
                self._preempt(victim)

    def _stop(self, unit: Unit) -> None:
        ran = unit.ran(self.now)
        self.time[unit] += ran
        del self.running[unit]
        unit.running_since = self.now
        self.policy.charge(unit, ran, self.now)
        unit.running_since = None

    def _preempt(self, unit: Unit) -> None:
        self._stop(unit)
        self._fill()
        self._queue(unit)

    def _fill(self) -> None:
        while self.waiting and len(self.running) < self.pcpus:
            unit = self.policy.pick(self.waiting, self.now)
            self.waiting.remove(unit)
            unit.running_since = self.now
            self.running[unit] = 0

    def run(self, nanoseconds: int) -> None:
        for _ in range(nanoseconds // MS):
            self._fill()
            self.now += MS
            for unit in list(self.running):
                quantum = self.policy.quantum(unit, bool(self.waiting), self.now)
                if quantum == NO_LIMIT or unit.ran(self.now) < quantum or unit not in self.running:
                    continue
                if self.policy.expired(unit, self.waiting, self.now):
                    self._preempt(unit)

    def had(self, *units: Unit) -> list[int]:
        return [self.time[unit] + unit.ran(self.now) for unit in units]


@pytest.mark.parametrize("make", [Fair], ids=["fair"])
@pytest.mark.parametrize("weights", [(256, 256), (256, 512), (100, 200, 300, 400)])
def test_pcpus_are_shared_by_weight(make: Callable[[int], Policy], weights: tuple[int, ...]) -> None:
    machine = Simulator(make(1), 1)
    units = [machine.unit(weight=weight) for weight in weights]
    machine.run(4000 * MS)
    for had, weight in zip(machine.had(*units), weights, strict=True):
        assert abs(had - 4000 * MS * weight // sum(weights)) <= 3 * QUANTUM


def test_several_pcpus_never_stand_still_and_nobody_starves() -> None:
    machine = Simulator(Fair(2), 2)
    units = [machine.unit() for _ in range(3)]
    machine.run(3000 * MS)
    times = machine.had(*units)
    assert sum(times) == 6000 * MS
    assert max(times) - min(times) <= 3 * QUANTUM


def test_who_slept_goes_first_but_brings_no_more_than_its_credit_along() -> None:
    machine = Simulator(Fair(1), 1)
    sleeper, computes = machine.unit(), machine.unit()
    machine.sleep(sleeper)
    machine.run(1000 * MS)
    machine.wake(sleeper)
    assert list(machine.running) == [sleeper], "at once"
    before = machine.had(sleeper, computes)
    machine.run(1000 * MS)
    gained, other = (after - old for after, old in zip(machine.had(sleeper, computes), before, strict=True))
    assert gained - other <= WAKE_CREDIT + 2 * QUANTUM
