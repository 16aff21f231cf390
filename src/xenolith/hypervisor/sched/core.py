"""The scheduler: which vCPU runs on which physical CPU, and when (paper 3.3.1; Xen: common/sched).

Each execution context of an engine (`context`) has a thread.  It picks one of its vCPUs that can run, waits for a pCPU
(`cpupools`), loads the vCPU and executes it until it blocks, its time is up and another vCPU wants the pCPU, or it is
told to stop.

Waking and kicking come from any thread, in the middle of anything, so they take no lock.
"""

from __future__ import annotations

import threading
import traceback
from collections.abc import Sequence
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
from xenolith.hypervisor.sched.context import Context, contexts_of
from xenolith.hypervisor.sched.cpupools import Cpupools
from xenolith.hypervisor.sched.policy import MakePolicy, Unit
from xenolith.hypervisor.shutdown import domain_crash
from xenolith.hypervisor.time import TimerQueue, update_time
from xenolith.machine.clock import Clock
from xenolith.machine.engines.protocol import EngineError
from xenolith.machine.tsc import TscClock

if TYPE_CHECKING:
    from xenolith.hypervisor.domain import Domain, Vcpu

STORE_PATIENCE: Final = 1.0  # s between looks whether a thread that should store its vCPU's state still lives


class Scheduler:
    """Runs the vCPUs of all domains on `pcpus` pCPUs, as `policy` says; `host_cpus`: see `Cpupools`."""

    def __init__(
        self, clock: Clock, timers: TimerQueue, pcpus: int, policy: MakePolicy, host_cpus: Sequence[int] = ()
    ) -> None:
        self.pcpus = pcpus
        self.pools = Cpupools(clock, timers, pcpus, policy, host_cpus)
        self._clock = clock
        self._timers = timers
        self._refresh_time = not isinstance(self._clock, TscClock)
        self._busy = 0  # contexts that are not idle
        self._woken = False  # a context was woken since the machine fell idle

    # --- life of a domain ------------------------------------------------------------------------------

    def init_domain(self, domain: Domain) -> None:
        """The domain is there: its vCPUs are units of the first pool (Xen: sched_init_domain)."""
        with self.pools.lock:
            pool = domain.cpupool = self.pools.first
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
            context = contexts.get(id(cpu))
            if context is None:
                context = contexts[id(cpu)] = Context(domain, cpu, self.run_context, self.quantum_over)
            context.vcpus.append(vcpu)
            vcpu.context = vcpu.unit.runner = context
            vcpu.runstate_since = self._clock.now()
        domain.contexts = len(contexts)
        with self.pools.lock:
            self._busy += len(contexts)
            for vcpu in domain.vcpus:
                domain.cpupool.policy.add(vcpu.unit, self._clock.now())
        for context in contexts.values():
            context.thread.start()

    def stop(self, domain: Domain) -> None:
        """End the domain's threads. `dying` is set; neither its lock nor a thread of its own may be the caller's."""
        contexts = contexts_of(domain)
        for context in contexts:
            context.stopping = True
            context.leave_guest()
        for context in contexts:
            context.thread.join()
        with self.pools.lock:
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
        with self.pools.lock:
            self.pools.wait_until_stopped(domain)

    def store_states(self, domain: Domain) -> None:
        """Bring `Vcpu.state` of a domain that is paused or has shut down up to date, for whoever wants to look at it.

        A Cpu can be asked for it by its own thread only.
        """
        waiting = []
        for context in contexts_of(domain):
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
            contexts = contexts_of(domain)
            if not contexts and not domain.paused_by_control and not domain.dying:
                self._begin(domain)
        for context in contexts:
            context.wake()

    def tell_to_leave(self, domain: Domain) -> None:
        """Make all vCPUs leave the guest soon. The caller holds the domain's lock."""
        for vcpu in domain.vcpus:
            vcpu.may_run = False
        for context in contexts_of(domain):
            context.leave_guest()

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
        with self.pools.lock:
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
        with self.pools.lock:
            others = self.pools.rivals(context, vcpu)
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
        with self.pools.lock:
            policy = context.domain.cpupool.policy
            preempts = policy.victim(vcpu.unit, [running.unit], self._clock.now()) is not None
            if not preempts and not context.quantum_timer.deadline:
                self.pools.set_quantum(context, running, contended=True)
        if preempts:
            context.preempt = True
            running.may_run = False

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
        self.pools.acquire(context, first)
        try:
            self._execute(context, first)
        finally:
            first.in_guest = False
            self.pools.release(context)
            if domain.shutdown_reason is not None:
                self.announce_shutdown(domain)

    def _pick(self, context: Context, candidates: list[Vcpu]) -> Vcpu | None:
        """The vCPU that goes first; None where none may run now."""
        if not candidates:
            return None
        with self.pools.lock:
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
        with self.pools.lock:
            self._busy += 1

    def _fall_idle(self) -> None:
        """A context has nothing to run. When none has, a virtual clock goes on to the next timer that wakes one."""
        with self.pools.lock:
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
        with self.pools.lock:
            vcpu.unit.running_since = start  # not when it was granted the pCPU, but had yet to be woken
            contended = bool(domain.cpupool.waiting)
            contended = contended or any(runnable(other) for other in context.vcpus if other is not vcpu)
            if contended or not context.quantum_timer.deadline:
                self.pools.set_quantum(context, vcpu, contended)
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
        with self.pools.lock:
            self.pools.charge(context, now)
            if not runnable(vcpu):
                context.domain.cpupool.policy.sleep(vcpu.unit, now)
        vcpu.timers.left()
        if vcpu.blocked:
            set_runstate(vcpu, RUNSTATE_blocked, now)
        else:
            set_runstate(vcpu, RUNSTATE_runnable if runnable(vcpu) else RUNSTATE_offline, now)
        if vcpu.runstate_area_va:
            write_runstate_area(vcpu)

    def announce_shutdown(self, domain: Domain) -> None:
        """Tell dom0 that the domain has shut down, once its last vCPU has stopped (Xen: VIRQ_DOM_EXC)."""
        with self.pools.lock:
            if domain.shutdown_announced or any(context.running is not None for context in contexts_of(domain)):
                return
            domain.shutdown_announced = True
        events.send_global_virq(domain, VIRQ_DOM_EXC)

    def quantum_over(self, context: Context) -> None:
        """On the timers' thread. Where none runs on the context, one may again."""
        if not self.pools.quantum_over(context):
            self._woken = True
            context.wake()
