"""Time as a domain sees it, and the timers behind it (paper 3.3.2; public/xen.h vcpu_time_info, public/vcpu.h).

Real time is nanoseconds since the hypervisor started; of a domain that came from elsewhere, it goes on from what it was
there (`Domain.clock`).  A guest computes it from the time stamp counter and the factors in its vcpu_time_info.
Wall-clock time is real time plus the offset in shared_info.  Virtual time of a vCPU
advances only while it runs.  Each vCPU has an alarm for either: the singleshot timer, raising VIRQ_TIMER, and the
virtual timer, raising VIRQ_XENOLITH_VIRTUAL_TIMER, by which a guest scheduler can measure out the CPU time of its own
processes.

PV guests are besides born with a periodic VIRQ_TIMER of 100 Hz, which ticks only while the vCPU runs.
"""

from __future__ import annotations

import heapq
import logging
import threading
from collections.abc import Callable
from itertools import count
from typing import TYPE_CHECKING, Final

from xenolith.abi.extensions import VIRQ_XENOLITH_VIRTUAL_TIMER
from xenolith.abi.hypercalls import VIRQ_TIMER
from xenolith.abi.layout import (
    SHARED_WC_NSEC,
    SHARED_WC_SEC,
    SHARED_WC_SEC_HI,
    SHARED_WC_VERSION,
    U32,
    VCPU_INFO_TIME,
    VCPU_TIME_INFO,
    XEN_PVCLOCK_TSC_STABLE_BIT,
)
from xenolith.abi.x86 import advanced
from xenolith.hypervisor import events
from xenolith.hypervisor.guest_memory import copy_to_guest
from xenolith.hypervisor.runstate import running_time
from xenolith.machine import tsc
from xenolith.machine.clock import Clock, VirtualClock

if TYPE_CHECKING:
    from xenolith.hypervisor.domain import Domain, Vcpu

NS_PER_SECOND: Final = 1_000_000_000
MILLISECOND: Final = 1_000_000
DEFAULT_PERIOD: Final = 10 * MILLISECOND
LONGEST_TICK: Final = 20 * MILLISECOND  # interval of a timer whose next time is guessed
LOOK_LATE: Final = 25_000  # ns later than guessed: kernels set a tick a little late
LONGEST_WAIT: Final = 10 * NS_PER_SECOND  # a guest may set a timer for the year 2554; threads cannot wait so long
COMPACT_ABOVE: Final = 64  # entries of the timer heap below which stale ones do not matter

_log = logging.getLogger(__name__)


class Timer:
    """A callback and the moment it is due. Belongs to one TimerQueue."""

    __slots__ = ("callback", "deadline", "queued")

    def __init__(self, callback: Callable[[], None]) -> None:
        self.callback = callback
        self.deadline = 0  # ns since boot; 0: not set
        self.queued = 0  # deadline of its earliest entry in the heap; 0: none


class TimerQueue:
    """All timers of the machine; due ones are called on the timer thread, with no lock held.

    On a VirtualClock there is no thread: `run_due` after the clock was advanced, and `jump` when the machine is
    idle, call what is due.

    A timer that is put off keeps its entry in the heap, which is pushed again when its old time comes: guests put their
    timer off all the time.  The entries that guests can leave behind are bounded by compaction.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._virtual = isinstance(clock, VirtualClock)
        self._changed = threading.Condition(threading.Lock())
        self._heap: list[tuple[int, int, Timer]] = []
        self._order = count()
        self._stale = 0  # an estimate
        self._waits_until = 0  # what the thread waits for; 0: it is awake
        self._thread: threading.Thread | None = None
        self._calling = 0  # threads that call what was due
        self._stopping = False

    def set(self, timer: Timer, deadline: int) -> None:
        """Call the timer's callback once at `deadline` (ns since boot), and not at an earlier set time."""
        with self._changed:
            timer.deadline = max(deadline, 1)
            if timer.queued:
                if timer.queued <= timer.deadline:
                    return
                self._stale += 1
            self._push(timer)
            if timer.deadline < self._waits_until:
                self._changed.notify()
            elif self._thread is None and not self._virtual:
                self.start()

    def cancel(self, timer: Timer) -> None:
        """Do not call it. A callback that has begun is not waited for."""
        timer.deadline = 0

    def next_deadline(self) -> int | None:
        """When the next timer may be due."""
        with self._changed:
            return self._heap[0][0] if self._heap else None

    def run_due(self) -> None:
        """Call everything that is due now."""
        due = self._take_due()
        for timer in due:
            try:
                timer.callback()
            except Exception:  # timers serve all domains: one failure must not end them
                _log.exception("a timer's callback failed")
        if due:
            with self._changed:
                self._calling -= 1
                self._changed.notify_all()

    def settle(self) -> None:
        """Wait until every timer that is not set any more because it was due has had its callback called."""
        with self._changed:
            while self._calling:
                self._changed.wait()

    def jump(self) -> bool:
        """The machine is idle: let a virtual clock move on to the next timer. False if there is none to wait for."""
        deadline = self.next_deadline()
        if not self._virtual or deadline is None:
            return False
        with self._changed:
            self._clock.wait(self._changed, deadline)
        self.run_due()
        return True

    def stop(self) -> None:
        """End the thread."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join()

    def _push(self, timer: Timer) -> None:
        timer.queued = timer.deadline
        if len(self._heap) > COMPACT_ABOVE and self._stale * 2 > len(self._heap):
            self._heap = [entry for entry in self._heap if entry[2].queued == entry[0]]
            heapq.heapify(self._heap)
            self._stale = 0
        heapq.heappush(self._heap, (timer.deadline, next(self._order), timer))

    def _take_due(self) -> list[Timer]:
        due = []
        with self._changed:
            now = self._clock.now()
            while self._heap and self._heap[0][0] <= now:
                at, _, timer = heapq.heappop(self._heap)
                if timer.queued != at:
                    self._stale -= 1
                    continue
                timer.queued = 0
                if timer.deadline > now:
                    self._push(timer)
                elif timer.deadline:
                    timer.deadline = 0
                    due.append(timer)
            self._calling += bool(due)
        return due

    def start(self) -> None:
        """Begin the thread, which otherwise happens when a timer is set for the first time."""
        self._thread = threading.Thread(target=self._run, name="timers", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while True:
            self.run_due()
            with self._changed:
                if self._stopping:
                    return
                now = self._clock.now()
                until = min(self._heap[0][0] if self._heap else now + LONGEST_WAIT, now + LONGEST_WAIT)
                if until > now:
                    self._waits_until = until
                    self._clock.wait(self._changed, until)
                    self._waits_until = 0


class VcpuTimers:
    """The timers of one vCPU."""

    def __init__(self, vcpu: Vcpu) -> None:
        self._vcpu = vcpu
        self._queue = vcpu.domain.hypervisor.timers
        self._clock = vcpu.domain.hypervisor.clock
        self.singleshot = Timer(self._alarm)
        self.poll = Timer(lambda: events.post_unblock(vcpu))
        self.period = DEFAULT_PERIOD  # 0: stopped
        self._next_tick = 0
        self._periodic = Timer(self._tick)
        self.virtual_deadline = 0  # in virtual time; 0: not set
        self._virtual = Timer(self._virtual_alarm)

    def entered(self) -> None:
        """The vCPU begins to run."""
        if self.period:
            now = self._clock.now()
            if self._next_tick <= now:
                self._next_tick = now - (now - self._next_tick) % self.period + self.period
                events.send_vcpu_virq(self._vcpu, VIRQ_TIMER)
            self._queue.set(self._periodic, self._next_tick)
        if self.virtual_deadline:
            self._queue.set(self._virtual, self._clock.now() + self.virtual_deadline - self.virtual_time())

    def left(self) -> None:
        """The vCPU has stopped running."""
        if self.period:
            self._queue.cancel(self._periodic)
        if self.virtual_deadline:
            self._queue.cancel(self._virtual)

    def set_singleshot(self, deadline: int) -> None:
        """Raise VIRQ_TIMER at `deadline`. On the vCPU's own thread."""
        self._note(deadline)
        self.arm(self.singleshot, deadline)

    def set_singleshot_late(self, deadline: int) -> None:
        """The same for one that the guest set some time ago. Who calls looks for events next."""
        self._note(deadline)
        if deadline <= self._vcpu.domain.clock.now():
            self._alarm()
        else:
            self.arm(self.singleshot, deadline)

    def arm(self, timer: Timer, deadline: int) -> None:
        """Have a timer go off at a moment of the domain's clock."""
        self._queue.set(timer, deadline - self._vcpu.domain.clock_ahead)

    def _note(self, deadline: int) -> None:
        vcpu = self._vcpu
        vcpu.timer_interval, vcpu.timer_deadline = deadline - vcpu.timer_deadline, deadline
        vcpu.timer_look = 0

    def _alarm(self) -> None:
        """The singleshot timer is due.

        A kernel that ticks will set it again, one interval ahead.  The engine need not stop the vCPU to tell of
        that, if it looks for it by then.
        """
        vcpu = self._vcpu
        interval = vcpu.timer_interval
        if 0 < interval <= LONGEST_TICK and not isinstance(self._clock, VirtualClock):
            vcpu.timer_look = vcpu.timer_deadline + interval + LOOK_LATE
        events.send_vcpu_virq(vcpu, VIRQ_TIMER)

    def set_period(self, period: int) -> None:
        """Tick every `period` ns from now on; 0: never. The caller holds the domain's lock."""
        self._queue.cancel(self._periodic)
        self.period = period
        if period:
            self._next_tick = self._clock.now() + period
            self._queue.set(self._periodic, self._next_tick)

    def _tick(self) -> None:
        if self.period:
            self._next_tick += self.period
            events.send_vcpu_virq(self._vcpu, VIRQ_TIMER)
            self._queue.set(self._periodic, self._next_tick)

    def virtual_time(self) -> int:
        """ns for which the vCPU has run."""
        return running_time(self._vcpu, self._clock.now())

    def set_virtual(self, deadline: int) -> None:
        """Raise the virtual alarm when virtual time reaches `deadline`; 0: never. The vCPU is running."""
        self._queue.cancel(self._virtual)
        self.virtual_deadline = deadline
        if deadline:
            self._queue.set(self._virtual, self._clock.now() + deadline - self.virtual_time())

    def _virtual_alarm(self) -> None:
        self.virtual_deadline = 0
        events.send_vcpu_virq(self._vcpu, VIRQ_XENOLITH_VIRTUAL_TIMER)

    def stop(self) -> None:
        """Cancel everything; the domain is dying."""
        self.period = self.virtual_deadline = 0
        for timer in (self.singleshot, self.poll, self._periodic, self._virtual):
            self._queue.cancel(timer)


def time_record(clock: Clock, tsc_offset: int = 0) -> tuple[int, int, int, int, int]:
    """tsc_timestamp, system_time, tsc_to_system_mul, tsc_shift and flags that hold now.

    `tsc_offset`: of the guest's counter, see protocol.Cpu; other vCPUs may have another.
    """
    stable = 0 if tsc_offset else XEN_PVCLOCK_TSC_STABLE_BIT
    if isinstance(clock, tsc.TscClock):
        return advanced(clock.tsc_at_boot, tsc_offset), clock.at_boot, clock.scale.mul, clock.scale.shift, stable
    timestamp = advanced(tsc.read_tsc(), tsc_offset)
    if isinstance(clock, VirtualClock):
        return timestamp, clock.now(), 1, -31, 0  # in effect: standing still
    factors = tsc.scale()
    return timestamp, clock.now(), factors.mul, factors.shift, 0


def update_time(vcpu: Vcpu) -> None:
    """Write vcpu_time_info in vcpu_info and in the area that the guest has registered. On the vCPU's own thread."""
    vcpu.time_outdated = False
    domain = vcpu.domain
    record = time_record(domain.clock, vcpu.cpu.tsc_offset if vcpu.cpu is not None else 0)
    _write_versioned(vcpu, record)
    if vcpu.time_area_va:
        user, vcpu.kernel_mode = not vcpu.kernel_mode, True  # the address is the guest kernel's
        version = vcpu.time_version
        data = VCPU_TIME_INFO.pack(version, 0, *record, 0)
        if copy_to_guest(vcpu, vcpu.time_area_va, U32.pack(version - 1)) and copy_to_guest(
            vcpu, vcpu.time_area_va + 4, data[4:]
        ):
            copy_to_guest(vcpu, vcpu.time_area_va, data[:4])
        vcpu.kernel_mode = not user


def _write_versioned(vcpu: Vcpu, record: tuple[int, int, int, int, int]) -> None:
    """An odd version tells the guest to read again."""
    memory = vcpu.domain.memory
    address = vcpu.info + VCPU_INFO_TIME
    vcpu.time_version = version = vcpu.time_version + 2 & 0xFFFFFFFF
    memory.d[address >> 2] = version - 1
    data = VCPU_TIME_INFO.pack(version, 0, *record, 0)
    memory.b[address + 4 : address + VCPU_TIME_INFO.size] = data[4:]
    memory.d[address >> 2] = version


def set_wall_clock(domain: Domain) -> None:
    """Write the wall-clock time at the domain's time 0 into shared_info."""
    clock = domain.clock
    seconds, nanoseconds = divmod(clock.wall() - clock.now(), NS_PER_SECOND)
    seconds = max(seconds + domain.time_offset, 0)
    d, base = domain.memory.d, domain.shared_info
    version = d[base + SHARED_WC_VERSION >> 2]
    d[base + SHARED_WC_VERSION >> 2] = (version | 1) & 0xFFFFFFFF
    d[base + SHARED_WC_SEC >> 2] = seconds & 0xFFFFFFFF
    d[base + SHARED_WC_NSEC >> 2] = nanoseconds
    d[base + SHARED_WC_SEC_HI >> 2] = seconds >> 32
    d[base + SHARED_WC_VERSION >> 2] = (version | 1) + 1 & 0xFFFFFFFF
