"""A deterministic simulator of scheduling: the very algorithms, on a virtual clock, with synthetic loads.

It makes the calls that `core` makes, in the same order, without threads: thousands of vCPUs on hundreds of pCPUs in a
few seconds.  A load is an iterator of phases: how long the vCPU computes before it blocks, for how long it is then
blocked, and what happens in between, such as an event for another.  It ends with the iterator.

    simulator = Simulator(Credit2(2), pcpus=2)
    hogs = [simulator.add(domid, hog(), weight=256 * domid) for domid in (1, 2, 4)]
    simulator.run(10 * SECOND)
    print([task.cpu_time for task in hogs])
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from heapq import heappop, heappush
from random import Random
from typing import Final, NamedTuple

from xenolith.hypervisor.sched.cpupool import Cpupool
from xenolith.hypervisor.sched.policy import NO_LIMIT, Policy, Unit

MS: Final = 1_000_000
SECOND: Final = 1_000_000_000
FOR_EVER: Final = 1 << 62
UNTIL_NOTIFIED: Final = -1  # as time to sleep


class Phase(NamedTuple):
    """ns to compute, then ns to be blocked."""

    compute: int
    sleep: int
    then: Callable[[], None] | None = None  # done at the end of computing


NOTHING: Final = Phase(0, 0)
Load = Iterator[Phase]


def hog() -> Load:
    """It computes all the time."""
    while True:
        yield Phase(FOR_EVER, 0)


def periodic(compute: int, sleep: int) -> Load:
    """It computes, and sleeps, again and again."""
    while True:
        yield Phase(compute, sleep)


def random_bursts(seed: int, compute: int, sleep: int) -> Load:
    """The same with exponentially distributed times of these means: an interactive or a server load."""
    random = Random(seed)
    while True:
        yield Phase(1 + int(random.expovariate(1 / compute)), 1 + int(random.expovariate(1 / sleep)))


@dataclass(eq=False)
class Task:
    """A simulated vCPU and what it did."""

    unit: Unit
    load: Load
    cpu_time: int = 0  # ns
    waits: list[int] = field(default_factory=list)  # ns from each waking to the pCPU
    turns: int = 0  # how often it was dispatched
    phase: Phase = NOTHING
    remaining: int = 0  # ns to compute until it blocks
    notified: int = 0  # events that came while it was not waiting for one
    blocked: bool = False  # until it is notified
    started: int = 0
    woken: int | None = None
    epoch: int = 0  # timers set for an older one are void
    quantum_epoch: int = 0
    quantum_set: bool = False


class Simulator:
    """One machine."""

    def __init__(self, policy: Policy, pcpus: int) -> None:
        self.policy = policy
        self.pool = Cpupool("simulated", policy, range(pcpus))
        self.now = 0
        self.decisions = 0  # how often the policy was asked who goes first
        self.moves = 0  # how often one that ran was moved to another pCPU
        self._events: list[tuple[int, int, Callable[[], None]]] = []
        self._numbers = itertools.count()

    def add(
        self,
        domid: int,
        load: Load,
        vcpu_id: int = 0,
        at: int = 0,
        hard: Iterable[int] | None = None,
        soft: Iterable[int] | None = None,
        **parameters: int,
    ) -> Task:
        """One more vCPU, which wakes at `at`. `hard` and `soft`: its affinities."""
        task = Task(Unit(domid, vcpu_id, {**self.policy.parameters, **parameters}), load)
        task.unit.runner = task
        task.unit.hard = None if hard is None else frozenset(hard)
        task.unit.soft = None if soft is None else frozenset(soft)
        self.policy.add(task.unit, self.now)
        self._at(at, lambda: self._wake(task))
        return task

    def notify(self, task: Task) -> None:
        """It is sent an event."""
        task.unit.notified += 1
        if task.blocked:
            task.blocked = False
            self._at(self.now, lambda: self._wake(task))
        else:
            task.notified += 1

    def run(self, until: int) -> None:
        """Go on to this moment, ns from the beginning."""
        while self._events and self._events[0][0] <= until:
            self.now, _, happen = heappop(self._events)
            happen()
        self.now = until
        for task in self._running:
            task.cpu_time += self.now - task.started
            task.remaining -= self.now - task.started
            self.policy.charge(task.unit, self.now - task.started, self.now)
            task.started = task.unit.running_since = self.now

    @property
    def _running(self) -> list[Task]:
        return [unit.runner for unit in self.pool.running]

    @property
    def idle_pcpus(self) -> int:
        return len(self.pool.free)

    def _at(self, moment: int, happen: Callable[[], None]) -> None:
        heappush(self._events, (moment, next(self._numbers), happen))

    # --- as core does it -------------------------------------------------------------------------------

    def _wake(self, task: Task) -> None:
        phase = next(task.load, None)
        if phase is None:
            self.policy.remove(task.unit, self.now)
            return
        task.phase, task.remaining = phase, phase.compute
        task.woken = self.now
        self.policy.wake(task.unit, self.now)
        self._acquire(task)

    def _acquire(self, task: Task) -> None:
        moment = self.policy.not_before(task.unit, self.now)
        if moment > self.now:
            self._at(moment, lambda: self._acquire(task))
            return
        self.policy.queue(task.unit, [*self.pool.running, *self.pool.waiting], self.now)
        if self._place(task):
            self._grant(task)
            return
        self.pool.waiting.append(task.unit)
        rivals = [unit for pcpu in self.pool.reach(task.unit) if (unit := self.pool.holders[pcpu]) is not None]
        for unit in rivals:
            self._set_quantum(unit.runner, contended=True)
        victim = self.policy.victim(task.unit, rivals, self.now)
        if victim is not None:
            self._preempt(victim.runner)

    def _place(self, task: Task) -> bool:
        moved = self.pool.place(task.unit)
        self.moves += len(moved or ())
        return moved is not None

    def _grant(self, task: Task) -> None:
        task.turns += 1
        task.started = task.unit.running_since = self.now
        if task.woken is not None:
            task.waits.append(self.now - task.woken)
            task.woken = None
        task.epoch += 1
        epoch = task.epoch
        if task.remaining < FOR_EVER >> 1:
            self._at(self.now + task.remaining, lambda: self._block(task, epoch))
        self._set_quantum(task, contended=bool(self.pool.waiting))

    def _set_quantum(self, task: Task, contended: bool) -> None:
        quantum = self.policy.quantum(task.unit, contended, self.now)
        task.quantum_set = quantum != NO_LIMIT
        if task.quantum_set:
            task.quantum_epoch += 1
            epoch = task.quantum_epoch
            moment = max(self.now, self.now - task.unit.ran(self.now) + quantum)
            self._at(moment, lambda: self._quantum_over(task, epoch))

    def _quantum_over(self, task: Task, epoch: int) -> None:
        if epoch != task.quantum_epoch:
            return
        rivals = self.pool.could_use(task.unit.pcpu, self.pool.waiting)
        if self.policy.expired(task.unit, rivals, self.now):
            self._preempt(task)
            return
        quantum = self.policy.quantum(task.unit, bool(rivals), self.now)
        task.quantum_set = quantum != NO_LIMIT
        if task.quantum_set:
            task.quantum_epoch += 1
            following = task.quantum_epoch
            self._at(self.now + quantum, lambda: self._quantum_over(task, following))

    def _preempt(self, task: Task) -> None:
        self._leave(task)
        self._release()
        self._acquire(task)

    def _block(self, task: Task, epoch: int) -> None:
        if epoch != task.epoch:
            return
        self._leave(task)
        self.policy.sleep(task.unit, self.now)
        if task.phase.sleep != UNTIL_NOTIFIED:
            self._at(self.now + task.phase.sleep, lambda: self._wake(task))
        elif task.notified:
            task.notified -= 1
            self._at(self.now, lambda: self._wake(task))
        else:
            task.blocked = True
        if task.phase.then is not None:
            task.phase.then()
        self._release()

    def _leave(self, task: Task) -> None:
        ran = self.now - task.started
        task.cpu_time += ran
        task.remaining -= ran
        task.epoch += 1
        task.quantum_epoch += 1
        task.quantum_set = False
        task.unit.running_since = self.now
        self.policy.charge(task.unit, ran, self.now)
        task.unit.running_since = None
        self.pool.release(task.unit)

    def _release(self) -> None:
        for pcpu in self.pool.free:
            while self.pool.holders[pcpu] is None and (units := self.pool.could_use(pcpu, self.pool.waiting)):
                self.decisions += 1
                unit = self.policy.pick(units, self.now)
                self.pool.waiting.remove(unit)
                self._place(unit.runner)
                self._grant(unit.runner)
            if self.pool.holders[pcpu] is None and self.pool.attract(pcpu) is not None:
                self.moves += 1
