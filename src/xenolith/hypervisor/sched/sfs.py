"""sfs: Surplus Fair Scheduling (Chandra, Adler, Goyal and Shenoy, OSDI 2000).

Proportional shares on several processors.  Start-time fair queueing gives every vCPU a *start tag*, which advances by
what it ran divided by its weight; the *virtual time* is the least start tag of those that want to run.  On one
processor the least start tag goes first.  On several that is unfair when some are blocked or have weights that cannot
be honoured, so here the least *surplus* goes first: weight times (start tag minus virtual time), what the vCPU has
had beyond its due.

Weight readjustment: nobody can use more than one processor, so a weight above 1/p of the sum is infeasible, and would
let its owner's tag stand still while all others' run away.  Such weights are lowered to the greatest that can be
honoured (the paper's algorithm 1), whenever the set of those that want to run changes.

A vCPU that wakes starts at the virtual time, or at its own tag if that is later: sleeping earns nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import ClassVar, Final

from xenolith.hypervisor.sched.policy import LEAD, NO_LIMIT, Simple, Unit

QUANTUM: Final = 10_000_000  # ns
SLACK: Final = 1_000_000  # ns of surplus by which whoever wakes must be behind one that runs to preempt it
DEFAULT_WEIGHT: Final = 256


class SurplusFair(Simple):
    """Surplus fair scheduling. A unit's account is its start tag, in ns at the default weight."""

    name: ClassVar[str] = "sfs"
    parameters: ClassVar[Mapping[str, int]] = {"weight": DEFAULT_WEIGHT}

    def __init__(self, pcpus: int) -> None:
        super().__init__(pcpus)
        self._active: set[Unit] = set()  # those that want to run
        self._weights: dict[Unit, float] = {}  # readjusted
        self._asked: tuple[int, dict[Unit, int]] = 0, {}  # the pCPUs and weights that those were made from
        self._virtual_time = 0

    def add(self, unit: Unit, now: int) -> None:
        unit.account = self._virtual_time

    def remove(self, unit: Unit, now: int) -> None:
        self._leave(unit, now)

    def wake(self, unit: Unit, now: int) -> None:
        if unit not in self._active:
            unit.account = max(unit.account, self._advance(now))
            self._active.add(unit)

    def sleep(self, unit: Unit, now: int) -> None:
        self._leave(unit, now)

    def _leave(self, unit: Unit, now: int) -> None:
        self._advance(now)
        self._active.discard(unit)

    def queue(self, unit: Unit, others: Sequence[Unit], now: int) -> None:
        self._active.add(unit)
        self._advance(now)

    def charge(self, unit: Unit, ran: int, now: int) -> None:
        per_ns = DEFAULT_WEIGHT / self._weight(unit)
        unit.account = int(min(unit.account + ran * per_ns, self._advance(now) + LEAD * per_ns))

    def yield_(self, unit: Unit, others: Sequence[Unit], now: int) -> None:
        unit.account = max(unit.account, max(int(other.account) for other in others) + 1)

    def pick(self, units: Sequence[Unit], now: int) -> Unit:
        self._advance(now)
        return min(units, key=lambda unit: (self._surplus(unit, now), unit.account))

    def victim(self, unit: Unit, running: Sequence[Unit], now: int) -> Unit | None:
        most = max(running, key=lambda other: self._surplus(other, now), default=None)
        return most if most is not None and self._surplus(most, now) > self._surplus(unit, now) + SLACK else None

    def quantum(self, unit: Unit, contended: bool, now: int) -> int:
        return QUANTUM if contended else NO_LIMIT

    def expired(self, unit: Unit, others: Sequence[Unit], now: int) -> bool:
        mine = self._surplus(unit, now)
        return any(self._surplus(other, now) <= mine for other in others)

    # --- tags ------------------------------------------------------------------------------------------

    def _advance(self, now: int) -> int:
        """The virtual time: the least start tag of those that want to run; it never goes back."""
        least = min((int(self._tag(unit, now)) for unit in self._active), default=self._virtual_time)
        self._virtual_time = max(self._virtual_time, least)
        asked = {unit: unit.parameters["weight"] for unit in self._active}
        if (self.pcpus, asked) != self._asked:
            self._asked = self.pcpus, asked
            self._weights = {unit: float(weight) for unit, weight in readjusted(asked, self.pcpus).items()}
        return self._virtual_time

    def _tag(self, unit: Unit, now: int) -> float:
        """Its start tag, with what it has run since it was charged last."""
        return float(unit.account + unit.ran(now) * DEFAULT_WEIGHT / self._weight(unit))

    def _surplus(self, unit: Unit, now: int) -> float:
        return self._weight(unit) * (self._tag(unit, now) - self._virtual_time) / DEFAULT_WEIGHT

    def _weight(self, unit: Unit) -> float:
        return self._weights.get(unit) or float(unit.parameters["weight"])


def readjusted(weights: Mapping[Unit, int], pcpus: int) -> dict[Unit, Fraction]:
    """Weights that `pcpus` processors can honour: no one above its processor's part of the sum (algorithm 1)."""
    order = sorted(weights, key=lambda unit: weights[unit], reverse=True)
    left = Fraction(sum(weights.values()))
    infeasible = 0
    for unit in order:
        if len(order) > pcpus and (pcpus - infeasible <= 1 or weights[unit] * (pcpus - infeasible) <= left):
            break
        left -= weights[unit]
        infeasible += 1
    result = {unit: Fraction(weight) for unit, weight in weights.items()}
    if infeasible == len(order):  # a processor for each
        return dict.fromkeys(weights, Fraction(min(weights.values(), default=1)))
    for unit in order[:infeasible]:
        result[unit] = left / (pcpus - infeasible)
    return result
