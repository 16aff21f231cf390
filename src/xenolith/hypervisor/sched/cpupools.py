"""The cpupools, and in them who holds which pCPU (Xen: common/sched/core.c, cpupool.c).

A pCPU here is a token: as many vCPUs execute guest code at once as there are tokens.  Where pCPUs are pinned to CPUs of
the host, a context's thread runs on that of the pCPU which it holds.

Each pCPU belongs to a `Cpupool` or to none, each domain to one.  Who goes first, and for how long, the pool's `policy`
decides.  `Cpupools.lock` protects the pools and their policies, and is never held while waiting for anything else.
Lock order: a domain's lock, then this one.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Final

from xenolith.abi.hypercalls import RUNSTATE_runnable
from xenolith.hypervisor.domain import runnable
from xenolith.hypervisor.sched.context import Context, contexts_of
from xenolith.hypervisor.sched.cpupool import Cpupool
from xenolith.hypervisor.sched.policy import NO_LIMIT, MakePolicy, Unit
from xenolith.hypervisor.time import TimerQueue
from xenolith.machine.clock import Clock

if TYPE_CHECKING:
    from xenolith.hypervisor.domain import Domain, Vcpu

POOL_0: Final = "Pool-0"


class Cpupools:
    """`pcpus` tokens for the contexts that want to run, as `policy` says, all in one cpupool at first.

    `host_cpus`: those that the pCPUs are pinned to, one each; none: they are not.
    """

    def __init__(
        self, clock: Clock, timers: TimerQueue, pcpus: int, policy: MakePolicy, host_cpus: Sequence[int] = ()
    ) -> None:
        self.lock = threading.Condition(threading.Lock())  # told when a context has given up its pCPU
        self.unassigned: set[int] = set()  # pCPUs of no pool
        self._pools = {POOL_0: Cpupool(POOL_0, policy(pcpus), range(pcpus))}
        self._pcpus = pcpus
        self._host_cpus = host_cpus
        self._clock = clock
        self._timers = timers

    def __iter__(self) -> Iterator[Cpupool]:
        return iter(list(self._pools.values()))

    @property
    def first(self) -> Cpupool:
        """In which domains begin."""
        return next(iter(self._pools.values()))

    def wait_until_stopped(self, domain: Domain) -> None:
        """Until none of its vCPUs holds a pCPU. The caller holds `lock`, which others may take meanwhile."""
        contexts = contexts_of(domain)
        while any(context.running is not None for context in contexts):
            self.lock.wait()

    # --- pCPUs -----------------------------------------------------------------------------------------

    def acquire(self, context: Context, vcpu: Vcpu) -> None:
        """Wait for a pCPU."""
        now = self._clock.now()
        with self.lock:
            pool, unit = context.domain.cpupool, vcpu.unit
            pool.policy.queue(unit, [*pool.running, *pool.waiting], now)
            moved = pool.place(unit)
            if moved is not None:
                self._grant(context, vcpu, now, moved)
                return
            context.wanted = vcpu
            pool.waiting.append(unit)
            self._make_room(pool, unit, now)
        context.granted.acquire()

    def _grant(self, context: Context, vcpu: Vcpu, now: int, moved: Iterable[Unit]) -> None:
        """The vCPU holds a pCPU, to which end some were moved to another."""
        context.running, context.wanted = vcpu, None
        context.preempt = False
        vcpu.unit.running_since = now
        for unit in (*moved, vcpu.unit):
            self._pin(unit)

    def _pin(self, unit: Unit) -> None:
        """Have the thread of who runs on a pCPU run where that is pinned to."""
        context: Context = unit.runner
        if self._host_cpus and context.pinned != unit.pcpu and context.thread.native_id is not None:
            with suppress(OSError):  # the host has taken that CPU away: anywhere, then
                os.sched_setaffinity(context.thread.native_id, {self._host_cpus[unit.pcpu]})
            context.pinned = unit.pcpu

    def _make_room(self, pool: Cpupool, unit: Unit, now: int) -> None:
        """It waits: whoever runs in its way leaves when its quantum is over, or now if the policy says so."""
        running = []
        for pcpu in pool.reach(unit):
            holder = pool.holders[pcpu]
            context: Context | None = holder.runner if holder is not None else None
            if holder is None or context is None or context.running is None:
                continue
            self.set_quantum(context, context.running, contended=True)
            if not context.preempt:
                running.append(holder)
        victim = pool.policy.victim(unit, running, now)
        if victim is not None:
            victim.runner.leave_pcpu()

    def set_quantum(self, context: Context, vcpu: Vcpu, contended: bool) -> None:
        """Ask the policy once more when the vCPU that runs has used its quantum. The caller holds `lock`."""
        now = self._clock.now()
        quantum = context.domain.cpupool.policy.quantum(vcpu.unit, contended, now)
        if quantum != NO_LIMIT:
            self._timers.set(context.quantum_timer, now - vcpu.unit.ran(now) + quantum)

    def charge(self, context: Context, now: int) -> None:
        """Charge whoever runs on the context for the time since it was charged last. The caller holds `lock`."""
        if context.running is not None:
            unit = context.running.unit
            ran, unit.running_since = unit.ran(now), now
            context.domain.cpupool.policy.charge(unit, ran, now)

    def rivals(self, context: Context, vcpu: Vcpu) -> list[Unit]:
        """Those that could run in the place of a vCPU that runs on the context. The caller holds `lock`."""
        rivals = [other.unit for other in context.vcpus if other is not vcpu and runnable(other)]
        pool = context.domain.cpupool
        return rivals + pool.could_use(vcpu.unit.pcpu, pool.waiting)

    def release(self, context: Context) -> None:
        """Give the pCPU to whom the policy picks of those that wait and may use it."""
        with self.lock:
            pool = context.domain.cpupool
            if context.running is not None:
                context.running.unit.running_since = None
                pool.release(context.running.unit)
            context.running = None
            self._dispatch(pool)
            self.lock.notify_all()

    def _dispatch(self, pool: Cpupool) -> None:
        """Let nobody wait who could have a free pCPU. The caller holds `lock`."""
        for pcpu in pool.free:
            while pool.holders[pcpu] is None and (waiting := pool.could_use(pcpu, pool.waiting)):
                now = self._clock.now()
                unit = pool.policy.pick(waiting, now)
                pool.waiting.remove(unit)
                moved = pool.place(unit)
                following: Context = unit.runner
                vcpu = following.wanted
                assert vcpu is not None and moved is not None
                self._grant(following, vcpu, now, moved)
                following.granted.release()
                if pool.waiting:
                    self.set_quantum(following, vcpu, contended=True)
            if pool.holders[pcpu] is None and (attracted := pool.attract(pcpu)) is not None:
                self._pin(attracted)

    def quantum_over(self, context: Context) -> bool:
        """Whoever runs on the context makes room, or gets another quantum. False where nobody does."""
        now = self._clock.now()
        with self.lock:
            running = context.running
            if running is None:
                return False
            policy, others = context.domain.cpupool.policy, self.rivals(context, running)
            if not policy.expired(running.unit, others, now):
                quantum = policy.quantum(running.unit, bool(others), now)
                if quantum != NO_LIMIT:
                    self._timers.set(context.quantum_timer, now + quantum)
                return True
        context.leave_pcpu()
        return True

    # --- what dom0 may change (Xen: domctl, XEN_SYSCTL_cpupool_op) ---------------------------------------------

    def adjust(self, domain: Domain, parameters: Mapping[str, int]) -> None:
        """Set some of the policy's parameters for all of a domain's vCPUs (Xen: XEN_DOMCTL_SCHEDOP_putinfo)."""
        with self.lock:
            now = self._clock.now()
            running = [context for context in contexts_of(domain) if context.running is not None]
            for context in running:
                self.charge(context, now)  # what it ran so far is paid for as it was then
            for vcpu in domain.vcpus:
                vcpu.unit.parameters.update(parameters)
            for context in running:
                if context.running is not None:
                    self.set_quantum(context, context.running, contended=bool(domain.cpupool.waiting))

    def set_affinity(self, vcpus: Iterable[Vcpu], hard: frozenset[int] | None, soft: frozenset[int] | None) -> None:
        """Where vCPUs of a domain may run and where they would rather; None: leave that as it is.

        Raises ValueError where its pool has none of the hard ones.
        """
        with self.lock:
            for vcpu in vcpus:
                pool, unit = vcpu.domain.cpupool, vcpu.unit
                if hard is not None and hard.isdisjoint(pool.holders):
                    raise ValueError(f"the domain's cpupool {pool.name} has none of these pCPUs")
                unit.hard = _restriction(hard, self._pcpus) if hard is not None else unit.hard
                unit.soft = _restriction(soft, self._pcpus) if soft is not None else unit.soft
                self._reconsider(pool)

    def _reconsider(self, pool: Cpupool) -> None:
        """Affinities or pCPUs have changed. The caller holds `lock`."""
        for unit in pool.running:
            if unit.pcpu not in pool.usable(unit):
                unit.runner.leave_pcpu()
        self._dispatch(pool)
        for unit in pool.waiting:
            self._make_room(pool, unit, self._clock.now())

    def create(self, name: str, policy: MakePolicy, pcpus: Collection[int]) -> None:
        """Make a cpupool of pCPUs that are in none. Raises ValueError."""
        with self.lock:
            if name in self._pools or not name:
                raise ValueError(f'there is a cpupool "{name}" already' if name else "a cpupool needs a name")
            self._check_unassigned(pcpus)
            self.unassigned.difference_update(pcpus)
            self._pools[name] = Cpupool(name, policy(len(pcpus)), sorted(pcpus))

    def destroy(self, name: str) -> None:
        """Its pCPUs are in no pool then. Raises ValueError where it has domains."""
        with self.lock:
            pool = self._pool(name)
            if pool.members or pool is self.first:
                raise ValueError(f"the cpupool {name} " + ("has domains" if pool.members else "is the first one"))
            del self._pools[name]
            self.unassigned.update(pool.holders)

    def rename(self, name: str, new_name: str) -> None:
        """Raises ValueError."""
        with self.lock:
            self._pool(name)
            if new_name in self._pools or not new_name:
                raise ValueError(f'"{new_name}" cannot be the name of another cpupool')
            self._pools = {new_name if each == name else each: pool for each, pool in self._pools.items()}
            self._pools[new_name].name = new_name

    def add_pcpus(self, name: str, pcpus: Collection[int]) -> None:
        """Give a pool pCPUs that are in none. Raises ValueError."""
        with self.lock:
            pool = self._pool(name)
            self._check_unassigned(pcpus)
            self.unassigned.difference_update(pcpus)
            pool.holders = {pcpu: pool.holders.get(pcpu) for pcpu in sorted({*pool.holders, *pcpus})}
            pool.policy.pcpus = len(pool.holders)
            self._reconsider(pool)

    def remove_pcpus(self, name: str, pcpus: Collection[int]) -> None:
        """Take pCPUs from a pool, with nobody on them when this returns. Raises ValueError. Not for guests' threads."""
        with self.lock:
            pool = self._pool(name)
            gone = set(pcpus)
            if not gone <= pool.holders.keys():
                raise ValueError(f"the cpupool {name} has not all of these pCPUs")
            if gone == pool.holders.keys() and pool.members:
                raise ValueError(f"the cpupool {name} has domains and needs a pCPU")
            leaving = [unit for pcpu in gone if (unit := pool.holders.pop(pcpu)) is not None]
            pool.policy.pcpus = max(len(pool.holders), 1)
            for unit in leaving:
                unit.runner.leave_pcpu()
            self._reconsider(pool)
            while any(unit.pcpu in gone and unit.running_since is not None for unit in leaving):
                self.lock.wait()
            self.unassigned |= gone

    def move_domain(self, domain: Domain, name: str) -> None:
        """Into another pool, where its vCPUs may run anywhere. It is paused. Raises ValueError."""
        with self.lock:
            self.wait_until_stopped(domain)
            before, pool, now = domain.cpupool, self._pool(name), self._clock.now()
            if not pool.holders:
                raise ValueError(f"the cpupool {name} has no pCPU")
            domain.cpupool = pool
            waiting = {vcpu.unit for vcpu in domain.vcpus if vcpu.unit in before.waiting}
            for vcpu in domain.vcpus:
                unit, known = vcpu.unit, vcpu.unit.parameters
                before.members.discard(unit)
                pool.members.add(unit)
                if vcpu.context is not None:
                    before.policy.remove(unit, now)
                unit.parameters = {key: known.get(key, value) for key, value in pool.policy.parameters.items()}
                unit.hard = unit.soft = None
                if vcpu.context is not None:
                    pool.policy.add(unit, now)
                    if vcpu.runstate == RUNSTATE_runnable:
                        pool.policy.wake(unit, now)
                if unit in waiting:
                    before.waiting.remove(unit)
                    pool.policy.queue(unit, [*pool.running, *pool.waiting], now)
                    pool.waiting.append(unit)
            self._reconsider(pool)

    def set_schedparam(self, name: str, parameters: Mapping[str, int]) -> None:
        """Change parameters of a pool's algorithm (Xen: XEN_SYSCTL_SCHEDOP_putinfo)."""
        with self.lock:
            self._pool(name).policy.schedparam.update(parameters)

    def named(self, name: str) -> Cpupool:
        """Raises ValueError where there is none of this name."""
        with self.lock:
            return self._pool(name)

    def _pool(self, name: str) -> Cpupool:
        if name not in self._pools:
            raise ValueError(f"there is no cpupool {name}")
        return self._pools[name]

    def _check_unassigned(self, pcpus: Collection[int]) -> None:
        for pcpu in pcpus:
            if pcpu not in self.unassigned:
                raise ValueError(f"pCPU {pcpu} is in a cpupool already, or there is none")


def _restriction(pcpus: frozenset[int], count: int) -> frozenset[int] | None:
    """None where all pCPUs are meant."""
    return None if pcpus >= frozenset(range(count)) else pcpus
