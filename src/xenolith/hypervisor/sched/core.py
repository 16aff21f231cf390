"""The scheduler: which vCPU runs on which physical CPU, and when (paper 3.3.1; Xen: common/sched).

A pCPU here is a token: as many vCPUs execute guest code at once as there are tokens.  Each execution context of an
engine (`Cpu`) has a thread, its `Context`.  It picks one of its vCPUs that can run, waits for a pCPU, loads the vCPU
and executes it until it blocks, its time is up and another vCPU wants the pCPU, or it is told to stop.  Where pCPUs are
pinned to CPUs of the host, the thread runs on that of the pCPU which it holds.

Each pCPU belongs to a `Cpupool` or to none, each domain to one.  Who goes first, and for how long, the pool's `policy`
decides.

Waking and kicking come from any thread, in the middle of anything, so they take no lock: a context sleeps on a binary
semaphore, and whoever wakes it releases that.  `Scheduler._lock` protects the pools and their policies, and is never
held while waiting.  Lock order: a domain's lock, then the scheduler's.
"""

from __future__ import annotations

import os
import threading
import traceback
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from threading import get_ident
from time import sleep
from typing import TYPE_CHECKING, Final

from xenolith.abi.hypercalls import (
    VIRQ_DOM_EXC,
    RUNSTATE_blocked,
    RUNSTATE_offline,
    RUNSTATE_runnable,
    RUNSTATE_running,
)
from xenolith.abi.x86 import DS, ES, FS, GS
from xenolith.hypervisor import bounce, events, traps
from xenolith.hypervisor.domain import runnable
from xenolith.hypervisor.runstate import set_runstate, write_runstate_area
from xenolith.hypervisor.sched.cpupool import Cpupool
from xenolith.hypervisor.sched.policy import NO_LIMIT, MakePolicy, Unit
from xenolith.hypervisor.shutdown import domain_crash
from xenolith.hypervisor.time import Timer, TimerQueue, update_time
from xenolith.machine.clock import Clock
from xenolith.machine.engines.protocol import EngineError
from xenolith.machine.tsc import TscClock

if TYPE_CHECKING:
    from xenolith.hypervisor.domain import Domain, Vcpu
    from xenolith.machine.engines.protocol import Cpu, TrapHandler

POOL_0: Final = "Pool-0"
STORE_PATIENCE: Final = 1.0  # s between looks whether a thread that should store its vCPU's state still lives


class Context:
    """The thread of one `Cpu` and the vCPUs that run on it."""

    def __init__(self, scheduler: Scheduler, domain: Domain, cpu: Cpu) -> None:
        self.domain = domain
        self.cpu = cpu
        self.vcpus: list[Vcpu] = []
        self.running: Vcpu | None = None  # holds a pCPU
        self.pinned = -1  # the pCPU to whose host CPU its thread is pinned
        self.wanted: Vcpu | None = None  # waits for one
        self.loaded: Vcpu | None = None
        self.preempt = False  # leave the pCPU at the next chance
        self.stopping = False
        self.to_store: threading.Event | None = None  # somebody waits for the loaded vCPU's state
        self.quantum_timer = Timer(lambda: scheduler.quantum_over(self))
        self._handlers: dict[Vcpu, TrapHandler] = {}
        # Binary semaphores, taken until somebody releases them.
        self._wakeup = threading.Lock()
        self._wakeup.acquire()
        self.granted = threading.Lock()
        self.granted.acquire()
        self.thread = threading.Thread(target=scheduler.run_context, args=(self,), name=f"d{domain.domid}", daemon=True)

    def wake(self) -> None:
        """End the thread's sleep, or keep its next one from beginning. Takes no lock."""
        with suppress(RuntimeError):  # it is awake already
            self._wakeup.release()

    def sleep(self) -> None:
        """Wait for `wake`."""
        self._wakeup.acquire()

    def handler(self, vcpu: Vcpu) -> TrapHandler:
        handler = self._handlers.get(vcpu)
        if handler is None:
            handler = self._handlers[vcpu] = traps.trap_handler(vcpu, self.cpu)
        return handler


class Scheduler:
    """Gives `pcpus` tokens to the contexts that want to run, as `policy` says, all in one cpupool at first.

    `host_cpus`: those that the pCPUs are pinned to, one each; none: they are not.
    """

    def __init__(
        self, clock: Clock, timers: TimerQueue, pcpus: int, policy: MakePolicy, host_cpus: Sequence[int] = ()
    ) -> None:
        self.pcpus = pcpus
        self.pools = {POOL_0: Cpupool(POOL_0, policy(pcpus), range(pcpus))}
        self.unassigned: set[int] = set()  # pCPUs of no pool
        self._host_cpus = host_cpus
        self._clock = clock
        self._timers = timers
        self._refresh_time = not isinstance(self._clock, TscClock)
        self._lock = threading.Condition(threading.Lock())
        self._busy = 0  # contexts that are not idle
        self._woken = False  # a context was woken since the machine fell idle

    @property
    def first_pool(self) -> Cpupool:
        """In which domains begin."""
        return next(iter(self.pools.values()))

    # --- life of a domain ------------------------------------------------------------------------------

    def init_domain(self, domain: Domain) -> None:
        """The domain is there: its vCPUs are units of the first pool (Xen: sched_init_domain)."""
        with self._lock:
            pool = domain.cpupool = self.first_pool
            for vcpu in domain.vcpus:
                vcpu.unit = Unit(domain.domid, vcpu.vcpu_id, dict(pool.policy.parameters))
                pool.members.add(vcpu.unit)

    def _begin(self, domain: Domain) -> None:
        """Give the domain its threads; its online vCPUs may run from now on. The caller holds the domain's lock."""
        engine = domain.engine
        assert engine is not None
        contexts: dict[int, Context] = {}
        for vcpu in domain.vcpus:
            cpu = engine.cpu(vcpu.vcpu_id)
            context = contexts.get(id(cpu)) or contexts.setdefault(id(cpu), Context(self, domain, cpu))
            context.vcpus.append(vcpu)
            vcpu.context = vcpu.unit.runner = context
            vcpu.runstate_since = self._clock.now()
        domain.contexts = len(contexts)
        with self._lock:
            self._busy += len(contexts)
            for vcpu in domain.vcpus:
                domain.cpupool.policy.add(vcpu.unit, self._clock.now())
        for context in contexts.values():
            context.thread.start()

    def stop(self, domain: Domain) -> None:
        """End the domain's threads. `dying` is set; neither its lock nor a thread of its own may be the caller's."""
        contexts = _contexts(domain)
        for context in contexts:
            context.stopping = True
            self._leave_guest(context)
        for context in contexts:
            context.thread.join()
        with self._lock:
            for vcpu in domain.vcpus:
                domain.cpupool.members.discard(vcpu.unit)
                if vcpu.context is not None:
                    domain.cpupool.policy.remove(vcpu.unit, self._clock.now())
        for vcpu in domain.vcpus:
            vcpu.context = None
            vcpu.timers.stop()
        for timer in domain.watchdogs:
            if timer is not None:
                self._timers.cancel(timer)

    def pause(self, domain: Domain) -> None:
        """Stop the domain's vCPUs; none executes when this returns. Counts. Not for the domain's own threads."""
        with domain.lock:
            domain.paused_by_control += 1
            self.tell_to_leave(domain)
        self._wait_until_stopped(domain)

    def store_states(self, domain: Domain) -> None:
        """Bring `Vcpu.state` of a domain that is paused or has shut down up to date, for whoever wants to look at it.

        A Cpu can be asked for it by its own thread only.
        """
        waiting = []
        for context in _contexts(domain):
            stored = context.to_store = threading.Event()
            context.wake()
            waiting.append((context, stored))
        for context, stored in waiting:
            while not stored.wait(STORE_PATIENCE) and context.thread.is_alive():
                pass

    def unpause(self, domain: Domain) -> None:
        """Undo one pause. The first time that leaves none, the domain begins: an unstarted one has no threads."""
        with domain.lock:
            domain.paused_by_control = max(domain.paused_by_control - 1, 0)
            contexts = _contexts(domain)
            if not contexts and not domain.paused_by_control and not domain.dying:
                self._begin(domain)
        for context in contexts:
            context.wake()

    def tell_to_leave(self, domain: Domain) -> None:
        """Make all vCPUs leave the guest soon. The caller holds the domain's lock."""
        for vcpu in domain.vcpus:
            vcpu.may_run = False
        for context in _contexts(domain):
            self._leave_guest(context)

    def _leave_guest(self, context: Context) -> None:
        context.wake()
        running = context.running
        if running is not None and context.thread.ident != get_ident():
            running.kicked = True
            context.cpu.kick()

    def _wait_until_stopped(self, domain: Domain) -> None:
        contexts = _contexts(domain)
        with self._lock:
            while any(context.running is not None for context in contexts):
                self._lock.wait()

    # --- one vCPU --------------------------------------------------------------------------------------

    def kick(self, vcpu: Vcpu) -> None:
        """Make the vCPU look soon at what was posted or set for it. From any thread; takes no lock."""
        context = vcpu.context or vcpu.domain.vcpus[0].context
        if context is None:
            return  # not started yet: it looks when it is
        vcpu.unit.notified += 1
        running = context.running
        if running is None:
            self._woken = True
            context.wake()
        elif context.thread.ident != get_ident():
            running.kicked = True
            context.cpu.kick()
        elif running is not vcpu:
            self._other_vcpu_woke(context, vcpu)

    def wake(self, vcpu: Vcpu) -> None:
        """The vCPU may have become runnable. The caller holds the domain's lock."""
        if vcpu.context is not None and vcpu.runstate >= RUNSTATE_blocked and runnable(vcpu):
            self._become_runnable(vcpu)
        self.kick(vcpu)

    def _become_runnable(self, vcpu: Vcpu) -> None:
        now = self._clock.now()
        set_runstate(vcpu, RUNSTATE_runnable, now)
        with self._lock:
            vcpu.domain.cpupool.policy.wake(vcpu.unit, now)

    def unblock(self, vcpu: Vcpu) -> None:
        """End SCHEDOP_block or SCHEDOP_poll. The caller holds the domain's lock."""
        if vcpu.poll_port:
            vcpu.poll_port = 0
            vcpu.domain.events.pollers.remove(vcpu)
            self._timers.cancel(vcpu.timers.poll)
        if vcpu.blocked:
            vcpu.blocked = False
            self.wake(vcpu)

    def block(self, vcpu: Vcpu) -> None:
        """Stop the calling vCPU until `unblock`."""
        vcpu.blocked = True
        vcpu.may_run = False

    def yield_(self, vcpu: Vcpu) -> None:
        """Let the others go first, if any wants to run: the calling vCPU goes behind them."""
        context = vcpu.context
        if context is None:
            return
        with self._lock:
            others = self._rivals(context, vcpu)
            if others:
                vcpu.domain.cpupool.policy.yield_(vcpu.unit, others, self._clock.now())
        if others:
            vcpu.may_run = False
            context.preempt = True
        else:
            sleep(0)  # it may be waiting for dom0, whose Python waits for this thread's

    def _other_vcpu_woke(self, context: Context, vcpu: Vcpu) -> None:
        """On the context's own thread, by the vCPU that runs: another one of the same Cpu has something to do."""
        running = context.running
        if running is None or not runnable(vcpu):
            return
        with self._lock:
            policy = context.domain.cpupool.policy
            preempts = policy.victim(vcpu.unit, [running.unit], self._clock.now()) is not None
            if not preempts and not context.quantum_timer.deadline:
                self._set_quantum(context, running, contended=True)
        if preempts:
            context.preempt = True
            running.may_run = False

    def _rivals(self, context: Context, vcpu: Vcpu) -> list[Unit]:
        """Those that could run in the place of a vCPU that runs on the context. The caller holds `_lock`."""
        rivals = [other.unit for other in context.vcpus if other is not vcpu and runnable(other)]
        pool = context.domain.cpupool
        return rivals + pool.could_use(vcpu.unit.pcpu, pool.waiting)

    # --- a context's thread ------------------------------------------------------------------------------

    def run_context(self, context: Context) -> None:
        """The life of a context's thread. A failure in it ends its domain and no other."""
        for vcpu in context.vcpus:
            vcpu.thread = get_ident()
        while not context.stopping:
            try:
                self._step(context)
            except EngineError as error:  # the host refuses what the guest is in
                domain_crash(context.domain, f"{context.domain!r}: its engine cannot go on: {error}")
            except Exception:
                domain_crash(context.domain, f"{context.domain!r}: Xenolith failed:\n{traceback.format_exc()}")
        self._fall_idle()

    def _step(self, context: Context) -> None:
        domain = context.domain
        with domain.lock:
            if domain.posted:
                events.drain(domain)
            candidates = [vcpu for vcpu in context.vcpus if runnable(vcpu)]
            for vcpu in candidates:
                if vcpu.runstate >= RUNSTATE_blocked:  # a pause has ended
                    self._become_runnable(vcpu)
        first = self._pick(context, candidates)
        if first is None:
            self._sleep(context)
            return
        self._acquire(context, first)
        try:
            self._execute(context, first)
        finally:
            first.in_guest = False
            self._release(context)

    def _pick(self, context: Context, candidates: list[Vcpu]) -> Vcpu | None:
        """The vCPU that goes first; None where none may run now."""
        if not candidates:
            return None
        with self._lock:
            now = self._clock.now()
            pool = context.domain.cpupool
            moments = [pool.policy.not_before(vcpu.unit, now) for vcpu in candidates]
            units = [vcpu.unit for vcpu, moment in zip(candidates, moments, strict=True) if moment <= now]
            if units:
                at_once = [unit for unit in units if any(pool.could_use(pcpu, [unit]) for pcpu in pool.free)]
                unit = pool.policy.first(at_once or units, now)
                return next(vcpu for vcpu in candidates if vcpu.unit is unit)
        self._timers.set(context.quantum_timer, min(moments))
        return None

    def _sleep(self, context: Context) -> None:
        stored = context.to_store
        if stored is not None:
            context.to_store = None
            if context.loaded is not None:
                context.cpu.store(context.loaded.state)
            stored.set()
        self._fall_idle()
        context.sleep()
        with self._lock:
            self._busy += 1

    def _fall_idle(self) -> None:
        """A context has nothing to run. When none has, a virtual clock goes on to the next timer that wakes one."""
        with self._lock:
            self._busy -= 1
            if self._busy:
                return
        self._woken = False
        while not self._woken and self._timers.jump():
            pass

    def _execute(self, context: Context, vcpu: Vcpu) -> None:
        domain, cpu, clock = context.domain, context.cpu, self._clock
        start = clock.now()
        with domain.lock:
            if not runnable(vcpu):
                self._account(context, vcpu)
                return
            if context.loaded is not vcpu:
                self._switch(context, vcpu)
            set_runstate(vcpu, RUNSTATE_running, start)
            if vcpu.runstate_area_va:
                write_runstate_area(vcpu)
            vcpu.timers.entered()
        with self._lock:
            vcpu.unit.running_since = start  # not when it was granted the pCPU, but had yet to be woken
            contended = bool(domain.cpupool.waiting)
            contended = contended or any(runnable(other) for other in context.vcpus if other is not vcpu)
            if contended or not context.quantum_timer.deadline:
                self._set_quantum(context, vcpu, contended)
        handler = context.handler(vcpu)
        try:
            while not context.preempt and not context.stopping:
                with domain.lock:
                    if not runnable(vcpu):
                        break
                    vcpu.kicked = False
                    vcpu.may_run = True
                    if vcpu.time_outdated or self._refresh_time:
                        update_time(vcpu)
                    if not traps.prepare_entry(vcpu, cpu):
                        continue
                cpu.run(handler)
                vcpu.in_guest = False
        finally:
            vcpu.in_guest = False
            self._timers.cancel(context.quantum_timer)
            with domain.lock:
                self._account(context, vcpu)

    def _switch(self, context: Context, vcpu: Vcpu) -> None:
        """Exchange the vCPU that is loaded on the context's Cpu."""
        cpu, before = context.cpu, context.loaded
        context.loaded = None
        if before is None:
            cpu.load(vcpu.state)
        else:
            before.regs = before.state.regs
            before.cpu = None
            before.calls = 0
            cpu.swap(before.state, vcpu.state)
        vcpu.cpu = cpu
        vcpu.regs = regs = cpu.regs
        vcpu.calls = cpu.calls
        vcpu.flush_requested = True  # what was flushed for it while it was not loaded, the Cpu may still have
        cpu.attach(vcpu)
        context.loaded = vcpu
        # A selector that cannot be loaded has become null; the guest is told what it was.
        ds, es, fs, gs = (vcpu.state.regs[index] & 0xFFFF for index in (DS, ES, FS, GS))
        if (regs[DS] & 0xFFFF, regs[ES] & 0xFFFF, regs[FS] & 0xFFFF, regs[GS] & 0xFFFF) != (ds, es, fs, gs):
            bounce.bounce_failsafe(vcpu, cpu, (ds, es, fs, gs))

    def _account(self, context: Context, vcpu: Vcpu) -> None:
        now = self._clock.now()
        with self._lock:
            self._charge(context, now)
            if not runnable(vcpu):
                context.domain.cpupool.policy.sleep(vcpu.unit, now)
        vcpu.timers.left()
        if vcpu.blocked:
            set_runstate(vcpu, RUNSTATE_blocked, now)
        else:
            set_runstate(vcpu, RUNSTATE_runnable if runnable(vcpu) else RUNSTATE_offline, now)
        if vcpu.runstate_area_va:
            write_runstate_area(vcpu)

    def _charge(self, context: Context, now: int) -> None:
        """Charge whoever runs on the context for the time since it was charged last. The caller holds `_lock`."""
        if context.running is not None:
            unit = context.running.unit
            ran, unit.running_since = unit.ran(now), now
            context.domain.cpupool.policy.charge(unit, ran, now)

    # --- pCPUs -----------------------------------------------------------------------------------------

    def _acquire(self, context: Context, vcpu: Vcpu) -> None:
        """Wait for a pCPU."""
        now = self._clock.now()
        with self._lock:
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
            self._set_quantum(context, context.running, contended=True)
            if not context.preempt:
                running.append(holder)
        victim = pool.policy.victim(unit, running, now)
        if victim is not None:
            self.preempt(victim.runner)

    def _set_quantum(self, context: Context, vcpu: Vcpu, contended: bool) -> None:
        """Ask the policy once more when the vCPU that runs has used its quantum. The caller holds `_lock`."""
        now = self._clock.now()
        quantum = context.domain.cpupool.policy.quantum(vcpu.unit, contended, now)
        if quantum != NO_LIMIT:
            self._timers.set(context.quantum_timer, now - vcpu.unit.ran(now) + quantum)

    def _release(self, context: Context) -> None:
        """Give the pCPU to whom the policy picks of those that wait and may use it."""
        with self._lock:
            pool = context.domain.cpupool
            if context.running is not None:
                context.running.unit.running_since = None
                pool.release(context.running.unit)
            context.running = None
            self._dispatch(pool)
            self._lock.notify_all()
        if context.domain.shutdown_reason is not None:
            self.announce_shutdown(context.domain)

    def _dispatch(self, pool: Cpupool) -> None:
        """Let nobody wait who could have a free pCPU. The caller holds `_lock`."""
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
                    self._set_quantum(following, vcpu, contended=True)
            if pool.holders[pcpu] is None and (attracted := pool.attract(pcpu)) is not None:
                self._pin(attracted)

    def announce_shutdown(self, domain: Domain) -> None:
        """Tell dom0 that the domain has shut down, once its last vCPU has stopped (Xen: VIRQ_DOM_EXC)."""
        with self._lock:
            if domain.shutdown_announced or any(context.running is not None for context in _contexts(domain)):
                return
            domain.shutdown_announced = True
        events.send_global_virq(domain, VIRQ_DOM_EXC)

    def quantum_over(self, context: Context) -> None:
        """Whoever runs on the context makes room, or gets another quantum. If none runs, one may again."""
        now = self._clock.now()
        with self._lock:
            running = context.running
            if running is not None:
                policy, others = context.domain.cpupool.policy, self._rivals(context, running)
                if not policy.expired(running.unit, others, now):
                    quantum = policy.quantum(running.unit, bool(others), now)
                    if quantum != NO_LIMIT:
                        self._timers.set(context.quantum_timer, now + quantum)
                    return
        if running is not None:
            self.preempt(context)
        else:
            self._woken = True
            context.wake()

    def preempt(self, context: Context) -> None:
        """Make whoever runs on the context give up its pCPU. From any thread; takes no lock."""
        context.preempt = True
        running = context.running
        if running is not None:
            running.kicked = True
            context.cpu.kick()

    # --- what dom0 may change (Xen: domctl, XEN_SYSCTL_cpupool_op) ---------------------------------------------

    def adjust(self, domain: Domain, parameters: Mapping[str, int]) -> None:
        """Set some of the policy's parameters for all of a domain's vCPUs (Xen: XEN_DOMCTL_SCHEDOP_putinfo)."""
        with self._lock:
            now = self._clock.now()
            running = [context for context in _contexts(domain) if context.running is not None]
            for context in running:
                self._charge(context, now)  # what it ran so far is paid for as it was then
            for vcpu in domain.vcpus:
                vcpu.unit.parameters.update(parameters)
            for context in running:
                if context.running is not None:
                    self._set_quantum(context, context.running, contended=bool(domain.cpupool.waiting))

    def set_affinity(self, vcpus: Iterable[Vcpu], hard: frozenset[int] | None, soft: frozenset[int] | None) -> None:
        """Where vCPUs of a domain may run and where they would rather; None: leave that as it is.

        Raises ValueError where its pool has none of the hard ones.
        """
        with self._lock:
            for vcpu in vcpus:
                pool, unit = vcpu.domain.cpupool, vcpu.unit
                if hard is not None and hard.isdisjoint(pool.holders):
                    raise ValueError(f"the domain's cpupool {pool.name} has none of these pCPUs")
                unit.hard = _restriction(hard, self.pcpus) if hard is not None else unit.hard
                unit.soft = _restriction(soft, self.pcpus) if soft is not None else unit.soft
                self._reconsider(pool)

    def _reconsider(self, pool: Cpupool) -> None:
        """Affinities or pCPUs have changed. The caller holds `_lock`."""
        for unit in pool.running:
            if unit.pcpu not in pool.usable(unit):
                self.preempt(unit.runner)
        self._dispatch(pool)
        for unit in pool.waiting:
            self._make_room(pool, unit, self._clock.now())

    def create_pool(self, name: str, policy: MakePolicy, pcpus: Collection[int]) -> None:
        """Make a cpupool of pCPUs that are in none. Raises ValueError."""
        with self._lock:
            if name in self.pools or not name:
                raise ValueError(f'there is a cpupool "{name}" already' if name else "a cpupool needs a name")
            self._check_unassigned(pcpus)
            self.unassigned.difference_update(pcpus)
            self.pools[name] = Cpupool(name, policy(len(pcpus)), sorted(pcpus))

    def destroy_pool(self, name: str) -> None:
        """Its pCPUs are in no pool then. Raises ValueError where it has domains."""
        with self._lock:
            pool = self._pool(name)
            if pool.members or pool is self.first_pool:
                raise ValueError(f"the cpupool {name} " + ("has domains" if pool.members else "is the first one"))
            del self.pools[name]
            self.unassigned.update(pool.holders)

    def rename_pool(self, name: str, new_name: str) -> None:
        """Raises ValueError."""
        with self._lock:
            self._pool(name)
            if new_name in self.pools or not new_name:
                raise ValueError(f'"{new_name}" cannot be the name of another cpupool')
            self.pools = {new_name if each == name else each: pool for each, pool in self.pools.items()}
            self.pools[new_name].name = new_name

    def add_pcpus(self, name: str, pcpus: Collection[int]) -> None:
        """Give a pool pCPUs that are in none. Raises ValueError."""
        with self._lock:
            pool = self._pool(name)
            self._check_unassigned(pcpus)
            self.unassigned.difference_update(pcpus)
            pool.holders = {pcpu: pool.holders.get(pcpu) for pcpu in sorted({*pool.holders, *pcpus})}
            pool.policy.pcpus = len(pool.holders)
            self._reconsider(pool)

    def remove_pcpus(self, name: str, pcpus: Collection[int]) -> None:
        """Take pCPUs from a pool, with nobody on them when this returns. Raises ValueError. Not for guests' threads."""
        with self._lock:
            pool = self._pool(name)
            gone = set(pcpus)
            if not gone <= pool.holders.keys():
                raise ValueError(f"the cpupool {name} has not all of these pCPUs")
            if gone == pool.holders.keys() and pool.members:
                raise ValueError(f"the cpupool {name} has domains and needs a pCPU")
            leaving = [unit for pcpu in gone if (unit := pool.holders.pop(pcpu)) is not None]
            pool.policy.pcpus = max(len(pool.holders), 1)
            for unit in leaving:
                self.preempt(unit.runner)
            self._reconsider(pool)
            while any(unit.pcpu in gone and unit.running_since is not None for unit in leaving):
                self._lock.wait()
            self.unassigned |= gone

    def move_domain(self, domain: Domain, name: str) -> None:
        """Into another pool, where its vCPUs may run anywhere. It is paused. Raises ValueError."""
        contexts = _contexts(domain)
        with self._lock:
            while any(context.running is not None for context in contexts):
                self._lock.wait()
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
        with self._lock:
            self._pool(name).policy.schedparam.update(parameters)

    def pool(self, name: str) -> Cpupool:
        """Raises ValueError where there is none of this name."""
        with self._lock:
            return self._pool(name)

    def _pool(self, name: str) -> Cpupool:
        if name not in self.pools:
            raise ValueError(f"there is no cpupool {name}")
        return self.pools[name]

    def _check_unassigned(self, pcpus: Collection[int]) -> None:
        for pcpu in pcpus:
            if pcpu not in self.unassigned:
                raise ValueError(f"pCPU {pcpu} is in a cpupool already, or there is none")


def _restriction(pcpus: frozenset[int], count: int) -> frozenset[int] | None:
    """None where all pCPUs are meant."""
    return None if pcpus >= frozenset(range(count)) else pcpus


def _contexts(domain: Domain) -> list[Context]:
    return list({id(vcpu.context): vcpu.context for vcpu in domain.vcpus if vcpu.context is not None}.values())
