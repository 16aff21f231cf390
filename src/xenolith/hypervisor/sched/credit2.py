"""credit2: Xen's default algorithm (Xen: common/sched/credit2.c; docs/features/credit2).

Every vCPU has *credit*, which it burns while it runs, the slower the greater its weight.  The most credit goes first.
When the one whose turn it is has none left, all get CREDIT_INIT more, and whoever is blocked keeps no more than that:
it does not save up, and still has more than those that compute when it wakes, and preempts them.  Nobody owes more than
LEAD: who ran while no one waited does not pay for all of that.

A `cap` (percent of one CPU, for the whole domain; 0: none) is a budget: cap percent of BUDGET_PERIOD in every such
period, for all vCPUs of the domain together.  Used up, they do not run before the next period, whatever is idle; what
was used beyond it is taken from the next.

Whoever wakes preempts one that runs if it has RESISTANCE more credit and that one has run for `ratelimit`, which is set
for a whole cpupool: none unless somebody asks for one (Xen's is 1 ms).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Final

from xenolith.hypervisor.sched.policy import LEAD, NO_LIMIT, US, Simple, Unit

CREDIT_INIT: Final = 10_000_000  # ns of running at the default weight
MIN_QUANTUM: Final = 1_000_000  # ns
MAX_QUANTUM: Final = 10_000_000  # ns
RESISTANCE: Final = 50_000  # ns
MIN_BUDGET: Final = 50_000  # ns for which it is worth dispatching
BUDGET_PERIOD: Final = 10_000_000  # ns
DEFAULT_WEIGHT: Final = 256


@dataclass(slots=True)
class _Budget:
    """Of a domain that has a cap."""

    left: int = 0  # ns; negative: what it owes
    period: int = -1  # the period that it was last filled up for


class Credit2(Simple):
    """Credits by weight, budgets by cap."""

    name: ClassVar[str] = "credit2"
    parameters: ClassVar[Mapping[str, int]] = {"weight": DEFAULT_WEIGHT, "cap": 0}
    schedparams: ClassVar[Mapping[str, int]] = {"ratelimit": 0}

    def __init__(self, pcpus: int) -> None:
        super().__init__(pcpus)
        self._units: set[Unit] = set()
        self._active: set[Unit] = set()  # those that want to run
        self._woken: set[Unit] = set()  # those that wait for a pCPU since they were woken
        self._budgets: dict[int, _Budget] = {}  # by domid
        self._choices = 0
        self._chosen: dict[Unit, int] = {}  # when each was first among its domain's, by number of choice

    def add(self, unit: Unit, now: int) -> None:
        unit.account = CREDIT_INIT
        self._units.add(unit)

    def remove(self, unit: Unit, now: int) -> None:
        for each in (self._units, self._active, self._woken):
            each.discard(unit)
        self._chosen.pop(unit, None)
        if not any(other.domid == unit.domid for other in self._units):
            self._budgets.pop(unit.domid, None)

    def wake(self, unit: Unit, now: int) -> None:
        self._active.add(unit)
        self._woken.add(unit)

    def sleep(self, unit: Unit, now: int) -> None:
        self._active.discard(unit)

    def charge(self, unit: Unit, ran: int, now: int) -> None:
        unit.account = max(unit.account - _burnt(unit, ran), -_burnt(unit, LEAD))
        self._woken.discard(unit)
        if unit.parameters["cap"]:
            self._budget(unit, now).left -= ran

    def yield_(self, unit: Unit, others: Sequence[Unit], now: int) -> None:
        """Whoever yields goes behind those that wait, without losing more than it must."""
        unit.account = min(unit.account, min(int(other.account) for other in others) - 1)

    def not_before(self, unit: Unit, now: int) -> int:
        if not unit.parameters["cap"] or self._left(unit, now) > 0:
            return now
        return (now // BUDGET_PERIOD + 1) * BUDGET_PERIOD

    def pick(self, units: Sequence[Unit], now: int) -> Unit:
        best = max(units, key=_credit)
        if best.account <= 0:
            self._reset(int(best.account), now)
        self._woken.discard(best)
        return best

    def first(self, units: Sequence[Unit], now: int) -> Unit:
        """Nobody gets credit for that: it is not its turn yet. So those that are as poor as can be take turns."""
        unit = max(units, key=lambda unit: (_credit(unit), -self._chosen.get(unit, 0)))
        self._choices += 1
        self._chosen[unit] = self._choices
        return unit

    def _reset(self, best: int, now: int) -> None:
        """Everybody gets as much as lifts the one whose turn it is above 0 (Xen: reset_credit)."""
        credit = (1 - best // CREDIT_INIT) * CREDIT_INIT
        for unit in self._units:
            most = CREDIT_INIT + _burnt(unit, unit.ran(now)) + (MAX_QUANTUM if unit in self._active else 0)
            unit.account = min(unit.account + credit, most)

    def victim(self, unit: Unit, running: Sequence[Unit], now: int) -> Unit | None:
        limit = self.schedparam["ratelimit"] * US
        may = [other for other in running if other.ran(now) >= limit]
        least = min(may, key=lambda other: _credit_now(other, now), default=None)
        return least if least is not None and _credit_now(least, now) + RESISTANCE < unit.account else None

    def quantum(self, unit: Unit, contended: bool, now: int) -> int:
        """As long as its credit lasts, and its domain's budget; a look soon, if one that has just been woken waits."""
        quantum = NO_LIMIT
        if contended:
            lasts = int(unit.account) * unit.parameters["weight"] // DEFAULT_WEIGHT
            quantum = MIN_QUANTUM if self._woken else max(min(lasts, MAX_QUANTUM), MIN_QUANTUM)
            quantum = max(quantum, self.schedparam["ratelimit"] * US)
        if unit.parameters["cap"]:
            left = max(self._left(unit, now) // max(len(self._running(unit)), 1), MIN_BUDGET)
            return min(quantum, left) if quantum else left
        return quantum

    def expired(self, unit: Unit, others: Sequence[Unit], now: int) -> bool:
        if unit.parameters["cap"] and self._left(unit, now) <= 0:
            return True
        mine = _credit_now(unit, now)
        return any(other.account >= mine for other in others)

    # --- caps ------------------------------------------------------------------------------------------

    def _budget(self, unit: Unit, now: int) -> _Budget:
        """Of the unit's domain, filled up for every period that has begun; nothing is saved up."""
        budget = self._budgets.setdefault(unit.domid, _Budget())
        period = now // BUDGET_PERIOD
        if period > budget.period:
            share = unit.parameters["cap"] * BUDGET_PERIOD // 100
            passed = period - budget.period if budget.period >= 0 else 1
            uncharged = sum(other.ran(now) for other in self._running(unit))
            budget.left = min(budget.left + passed * share, share + uncharged)
            budget.period = period
        return budget

    def _running(self, unit: Unit) -> list[Unit]:
        """Those of its domain that run."""
        return [other for other in self._units if other.domid == unit.domid and other.running_since is not None]

    def _left(self, unit: Unit, now: int) -> int:
        """ns that its domain may still run in this period."""
        return self._budget(unit, now).left - sum(other.ran(now) for other in self._running(unit))


def _credit(unit: Unit) -> int:
    return int(unit.account)


def _burnt(unit: Unit, ran: int) -> int:
    return ran * DEFAULT_WEIGHT // unit.parameters["weight"]


def _credit_now(unit: Unit, now: int) -> int:
    return int(unit.account) - _burnt(unit, unit.ran(now))
