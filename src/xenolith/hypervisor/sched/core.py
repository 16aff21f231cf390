"""The scheduler: which vCPU runs on which physical CPU, and when (paper 3.3.1; Xen: common/sched).

A pCPU here is a token: as many vCPUs execute guest code at once as there are tokens.  Each execution context of an
engine (`Cpu`) has a thread, its `Context`.  It picks one of its vCPUs that can run, waits for a pCPU, loads the vCPU
and executes it until it blocks, its time is up and another vCPU wants the pCPU, or it is told to stop.

Who goes first, and for how long, a `policy` decides.

Waking and kicking come from any thread, in the middle of anything, so they take no lock: a context sleeps on a binary
semaphore, and whoever wakes it releases that.  `Scheduler._lock` protects the tokens and the policy, and is never held
while waiting.  Lock order: a domain's lock, then the scheduler's.
"""

from __future__ import annotations

import threading
import traceback
from collections.abc import Mapping
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
from xenolith.hypervisor.sched.policy import NO_LIMIT, Policy, Unit
from xenolith.hypervisor.shutdown import domain_crash
from xenolith.hypervisor.time import Timer, TimerQueue, update_time
from xenolith.machine.clock import Clock
from xenolith.machine.engines.protocol import EngineError
from xenolith.machine.tsc import TscClock

if TYPE_CHECKING:
    from xenolith.hypervisor.domain import Domain, Vcpu
    from xenolith.machine.engines.protocol import Cpu, TrapHandler

STORE_PATIENCE: Final = 1.0  # s between looks whether a thread that should store its vCPU's state still lives


class Context:
    """The thread of one `Cpu` and the vCPUs that run on it."""

    def __init__(self, scheduler: Scheduler, domain: Domain, cpu: Cpu) -> None:
        self.domain = domain
        self.cpu = cpu
        self.vcpus: list[Vcpu] = []
        self.running: Vcpu | None = None  # holds a pCPU
        self.pcpu = -1  # the one it holds, or held last
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
    """Gives `pcpus` tokens to the contexts that want to run, as `policy` says."""

    def __init__(self, clock: Clock, timers: TimerQueue, pcpus: int, policy: Policy) -> None:
        self.pcpus = pcpus
        self.policy = policy
        self._clock = clock
        self._timers = timers
        self._refresh_time = not isinstance(self._clock, TscClock)
        self._lock = threading.Condition(threading.Lock())
        self._free = list(range(pcpus))
        self._waiting: list[Context] = []
        self._running: list[Context] = []
        self._busy = 0  # contexts that are not idle
        self._woken = False  # a context was woken since the machine fell idle

    # --- life of a domain ------------------------------------------------------------------------------

    def _begin(self, domain: Domain) -> None:
        """Give the domain its threads; its online vCPUs may run from now on. The caller holds the domain's lock."""
        engine = domain.engine
        assert engine is not None
        contexts: dict[int, Context] = {}
        for vcpu in domain.vcpus:
            cpu = engine.cpu(vcpu.vcpu_id)
            context = contexts.get(id(cpu)) or contexts.setdefault(id(cpu), Context(self, domain, cpu))
            context.vcpus.append(vcpu)
            vcpu.context = context
            vcpu.runstate_since = self._clock.now()
            vcpu.unit = Unit(domain.domid, vcpu.vcpu_id, {**self.policy.parameters, **domain.scheduling})
        domain.contexts = len(contexts)
        with self._lock:
            self._busy += len(contexts)
            for vcpu in domain.vcpus:
                self.policy.add(vcpu.unit, self._clock.now())
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
                if vcpu.context is not None:
                    self.policy.remove(vcpu.unit, self._clock.now())
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

    def adjust(self, domain: Domain, parameters: Mapping[str, int]) -> None:
        """Set some of the policy's parameters for all of a domain's vCPUs (Xen: XEN_DOMCTL_SCHEDOP_putinfo)."""
        with self._lock:
            now = self._clock.now()
            running = [context for context in self._running if context.domain is domain and context.running is not None]
            for context in running:
                self._charge(context, now)  # what it ran so far is paid for as it was then
            domain.scheduling.update(parameters)
            for vcpu in domain.vcpus:
                if vcpu.context is not None:
                    vcpu.unit.parameters.update(parameters)
            for context in running:
                if context.running is not None:
                    self._set_quantum(context, context.running, contended=bool(self._waiting))

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
        self.policy.notified(vcpu.unit)
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
            self.policy.wake(vcpu.unit, now)

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
                self.policy.yield_(vcpu.unit, others, self._clock.now())
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
            preempts = self.policy.victim(vcpu.unit, [running.unit], self._clock.now()) is not None
            if not preempts and not context.quantum_timer.deadline:
                self._set_quantum(context, running, contended=True)
        if preempts:
            context.preempt = True
            running.may_run = False

    def _rivals(self, context: Context, vcpu: Vcpu) -> list[Unit]:
        """Those that could run in the place of a vCPU that runs on the context. The caller holds `_lock`."""
        rivals = [other.unit for other in context.vcpus if other is not vcpu and runnable(other)]
        return rivals + [waiting.wanted.unit for waiting in self._waiting if waiting.wanted is not None]

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
            moments = [self.policy.not_before(vcpu.unit, now) for vcpu in candidates]
            units = [vcpu.unit for vcpu, moment in zip(candidates, moments, strict=True) if moment <= now]
            if units:
                unit = self.policy.pick(units, now)
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
                return
            if context.loaded is not vcpu:
                self._switch(context, vcpu)
            set_runstate(vcpu, RUNSTATE_running, start)
            if vcpu.runstate_area_va:
                write_runstate_area(vcpu)
            vcpu.timers.entered()
        with self._lock:
            vcpu.unit.running_since = start  # not when it was granted the pCPU, but had yet to be woken
            contended = any(runnable(other) for other in context.vcpus if other is not vcpu)
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
                self.policy.sleep(vcpu.unit, now)
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
            self.policy.charge(unit, ran, now)

    # --- pCPUs -----------------------------------------------------------------------------------------

    def _acquire(self, context: Context, vcpu: Vcpu) -> None:
        """Wait for a pCPU."""
        now = self._clock.now()
        with self._lock:
            others = [each.running.unit for each in self._running if each.running is not None]
            others += [each.wanted.unit for each in self._waiting if each.wanted is not None]
            self.policy.queue(vcpu.unit, others, now)
            if self._free and not self._waiting:
                self._grant(context, vcpu, now, self._free.pop())
                return
            context.wanted = vcpu
            self._waiting.append(context)
            self._make_room(vcpu, now)
        context.granted.acquire()

    def _grant(self, context: Context, vcpu: Vcpu, now: int, pcpu: int) -> None:
        context.running, context.wanted = vcpu, None
        context.pcpu = pcpu
        context.preempt = False
        vcpu.unit.running_since = now
        self._running.append(context)

    def _make_room(self, vcpu: Vcpu, now: int) -> None:
        """Somebody waits: whoever runs leaves when its quantum is over, or now if the policy says so."""
        running: dict[Unit, Context] = {}
        for context in self._running:
            if context.running is None:
                continue
            self._set_quantum(context, context.running, contended=True)
            if not context.preempt:
                running[context.running.unit] = context
        victim = self.policy.victim(vcpu.unit, list(running), now)
        if victim is not None:
            self.preempt(running[victim])

    def _set_quantum(self, context: Context, vcpu: Vcpu, contended: bool) -> None:
        """Ask the policy once more when the vCPU that runs has used its quantum. The caller holds `_lock`."""
        now = self._clock.now()
        quantum = self.policy.quantum(vcpu.unit, contended, now)
        if quantum != NO_LIMIT:
            self._timers.set(context.quantum_timer, now - vcpu.unit.ran(now) + quantum)

    def _release(self, context: Context) -> None:
        """Give the pCPU to whom the policy picks of those that wait."""
        with self._lock:
            if context.running is not None:
                context.running.unit.running_since = None
            context.running = None
            self._running.remove(context)
            waiting = {each.wanted.unit: each for each in self._waiting if each.wanted is not None}
            if waiting:
                now = self._clock.now()
                following = waiting[self.policy.pick(list(waiting), now)]
                self._waiting.remove(following)
                vcpu = following.wanted
                assert vcpu is not None
                self._grant(following, vcpu, now, context.pcpu)
                following.granted.release()
                if self._waiting:
                    self._set_quantum(following, vcpu, contended=True)
            else:
                self._free.append(context.pcpu)
            self._lock.notify_all()
        if context.domain.shutdown_reason is not None:
            self.announce_shutdown(context.domain)

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
                others = self._rivals(context, running)
                if not self.policy.expired(running.unit, others, now):
                    quantum = self.policy.quantum(running.unit, bool(others), now)
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


def _contexts(domain: Domain) -> list[Context]:
    return list({id(vcpu.context): vcpu.context for vcpu in domain.vcpus if vcpu.context is not None}.values())
