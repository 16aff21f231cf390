"""What a scheduling algorithm must answer (paper 3.3.1; Xen: struct scheduler in common/sched/private.h).

`core` does what is the same for all: threads, pCPU tokens, blocking and waking, the time that was used.  An algorithm
is one file: a class with these methods.  It decides from what it is told, all times being ns of one clock that it gets
as arguments.  It has no thread and no lock: its methods are called one at a time, under the scheduler's lock, so they
must be short and call nothing.  So a simulator, or a test, can drive it with units of its own.

The life of a unit: `add`; then again and again `wake` (it was blocked), `queue` (it wants a pCPU), `pick` until it is
picked, running, `charge` when it leaves the pCPU, and `sleep` if it is blocked or paused; `remove`.  Where several
units share one execution context, core lets `first` choose among those before one of them queues.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Final, Protocol

NO_LIMIT: Final = 0  # as a quantum
US: Final = 1000  # ns
LEAD: Final = 100_000_000
"""ns of its own running that a vCPU can be ahead of the others' virtual time, where an algorithm has one.

Who had a pCPU that those behind could not use, by their affinity or their number, must not stand still for it later."""


@dataclass(eq=False, slots=True)
class Unit:
    """A vCPU as an algorithm sees it (Xen: struct sched_unit). `account` is the algorithm's own, anything."""

    domid: int
    vcpu_id: int
    parameters: dict[str, int] = field(default_factory=dict)  # a value for each of Policy.parameters
    running_since: int | None = None  # begin of the time that it runs and was not charged for; None: it does not run
    account: Any = None
    notified: int = 0  # events that it was sent since the algorithm looked: counted by any thread, so it is a hint
    hard: frozenset[int] | None = None  # the pCPUs that it may use; None: any (see cpupool)
    soft: frozenset[int] | None = None  # those that it prefers
    pcpu: int = -1  # the one it holds, or held last
    runner: Any = None  # what executes it, core's or the simulator's own

    def ran(self, now: int) -> int:
        """ns for which it has run without being charged so far."""
        return 0 if self.running_since is None else now - self.running_since


class Policy(Protocol):
    """A scheduling algorithm."""

    name: ClassVar[str]
    parameters: ClassVar[Mapping[str, int]]
    """What can be set for each domain or vCPU, with what holds where nothing was (weight, cap, ...)."""
    schedparams: ClassVar[Mapping[str, int]]
    """What can be set of the algorithm itself, for its whole cpupool, likewise. In microseconds."""

    schedparam: dict[str, int]
    pcpus: int  # how many the cpupool has; core keeps it up to date

    def add(self, unit: Unit, now: int) -> None:
        """There is one more unit. It does not want to run yet."""

    def remove(self, unit: Unit, now: int) -> None:
        """It is no more, and does not run."""

    def wake(self, unit: Unit, now: int) -> None:
        """It was blocked or paused and has become runnable."""

    def sleep(self, unit: Unit, now: int) -> None:
        """It has been charged, and is blocked or paused."""

    def queue(self, unit: Unit, others: Sequence[Unit], now: int) -> None:
        """It wants a pCPU, beside the `others` that have one or wait for one."""

    def charge(self, unit: Unit, ran: int, now: int) -> None:
        """It has run for `ran` ns and leaves its pCPU."""

    def yield_(self, unit: Unit, others: Sequence[Unit], now: int) -> None:
        """It runs, and lets the `others`, at least one, go first."""

    def not_before(self, unit: Unit, now: int) -> int:
        """The moment from which it may run: not after `now`, unless it has used up what it may have."""

    def pick(self, units: Sequence[Unit], now: int) -> Unit:
        """Which of these, at least one, goes first."""

    def first(self, units: Sequence[Unit], now: int) -> Unit:
        """Which of these, at least one, would go before the others of them, were they to queue."""

    def victim(self, unit: Unit, running: Sequence[Unit], now: int) -> Unit | None:
        """Which of those that run must make room for this one at once; None: it waits until a quantum is over."""

    def quantum(self, unit: Unit, contended: bool, now: int) -> int:
        """ns for which it runs before `expired` is asked; NO_LIMIT: for ever. `contended`: others wait."""

    def expired(self, unit: Unit, others: Sequence[Unit], now: int) -> bool:
        """Its quantum is over: whether it leaves now, for one of the `others` that wait, or gets another quantum."""


class Simple(Policy):
    """An algorithm that does not care: one inherits from it and answers what makes it different, at least `pick`."""

    parameters: ClassVar[Mapping[str, int]] = {}
    schedparams: ClassVar[Mapping[str, int]] = {}

    def __init__(self, pcpus: int) -> None:
        self.pcpus = pcpus
        self.schedparam = dict(self.schedparams)

    def add(self, unit: Unit, now: int) -> None:
        pass

    def remove(self, unit: Unit, now: int) -> None:
        pass

    def wake(self, unit: Unit, now: int) -> None:
        pass

    def sleep(self, unit: Unit, now: int) -> None:
        pass

    def queue(self, unit: Unit, others: Sequence[Unit], now: int) -> None:
        pass

    def charge(self, unit: Unit, ran: int, now: int) -> None:
        pass

    def yield_(self, unit: Unit, others: Sequence[Unit], now: int) -> None:
        pass

    def first(self, units: Sequence[Unit], now: int) -> Unit:
        return self.pick(units, now)

    def not_before(self, unit: Unit, now: int) -> int:
        return now

    def victim(self, unit: Unit, running: Sequence[Unit], now: int) -> Unit | None:
        return None

    def quantum(self, unit: Unit, contended: bool, now: int) -> int:
        return NO_LIMIT

    def expired(self, unit: Unit, others: Sequence[Unit], now: int) -> bool:
        return bool(others)


MakePolicy = Callable[[int], Policy]
"""An algorithm for a cpupool of so many pCPUs."""
