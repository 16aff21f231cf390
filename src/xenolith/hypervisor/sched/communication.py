"""communication: pending input first (Govindan, Nath, Das, Urgaonkar and Sivasubramaniam, VEE 2007).

Domains that talk to each other lose more by waiting for a processor than by its share.  So within what fairness
leaves open, whoever has the most events waiting for it goes first (the paper's reception-aware dispatch), and among
equals whoever is likely to send (its sender-aware anticipation): a vCPU that used to run briefly and block, as those
do that answer requests and wait for the next.

What fairness leaves open.  In every PERIOD a vCPU has a reservation, its weight's share of all processors' time;
while it has some left it competes by its events.  Those that have used theirs up run when nobody else wants to, the
one that has used the least of its own first.  So over a period shares are those of the weights, as with the paper's
reservations.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Final

from xenolith.hypervisor.sched.policy import NO_LIMIT, Simple, Unit

PERIOD: Final = 100_000_000  # ns
QUANTUM: Final = 5_000_000  # ns
BURST: Final = 1_000_000  # ns: whoever blocks after less than this is likely to have sent
DEFAULT_WEIGHT: Final = 256


@dataclass(slots=True)
class _Account:
    sender: float = 0.0  # how often its latest turns were bursts: 0 to 1
    used: int = 0  # ns of this period
    turn: int = 0  # ns since it was last blocked
    active: bool = False  # it wants to run, or did in this period or the one before


class CommunicationAware(Simple):
    """Reservations by weight; within them, events first."""

    name: ClassVar[str] = "communication"
    parameters: ClassVar[Mapping[str, int]] = {"weight": DEFAULT_WEIGHT}

    def __init__(self, pcpus: int) -> None:
        super().__init__(pcpus)
        self._units: set[Unit] = set()
        self._period = -1
        self._weights = 0  # the sum of those that are active

    def add(self, unit: Unit, now: int) -> None:
        unit.account = _Account()
        self._units.add(unit)

    def remove(self, unit: Unit, now: int) -> None:
        self._units.discard(unit)
        self._count_weights()

    def sleep(self, unit: Unit, now: int) -> None:
        account = unit.account
        account.sender = 0.75 * account.sender + 0.25 * (account.turn < BURST)
        account.turn = 0

    def queue(self, unit: Unit, others: Sequence[Unit], now: int) -> None:
        self._begin_period(now)
        if not unit.account.active or not self._weights:
            unit.account.active = True
            self._count_weights()

    def charge(self, unit: Unit, ran: int, now: int) -> None:
        self._begin_period(now)
        account = unit.account
        account.used += min(ran, PERIOD)
        account.turn += ran
        unit.notified = 0

    def yield_(self, unit: Unit, others: Sequence[Unit], now: int) -> None:
        unit.notified = 0

    def pick(self, units: Sequence[Unit], now: int) -> Unit:
        return min(units, key=lambda unit: self._order(unit, now))

    def _order(self, unit: Unit, now: int) -> tuple[bool, int, float, float]:
        account, used = unit.account, self._used(unit, now)
        if used >= 1:
            return True, 0, used, 0.0
        return False, -unit.notified, -round(account.sender, 2), used

    def victim(self, unit: Unit, running: Sequence[Unit], now: int) -> Unit | None:
        """Whoever computes, for one that has events and a reservation left."""
        if self._used(unit, now) >= 1 or not unit.notified:
            return None
        quiet = [other for other in running if not other.notified or self._used(other, now) >= 1]
        return max(quiet, key=lambda other: self._used(other, now), default=None)

    def quantum(self, unit: Unit, contended: bool, now: int) -> int:
        return QUANTUM if contended else NO_LIMIT

    def expired(self, unit: Unit, others: Sequence[Unit], now: int) -> bool:
        mine = self._order(unit, now)
        return any(self._order(other, now) <= mine for other in others)

    # --- reservations ----------------------------------------------------------------------------------

    def _begin_period(self, now: int) -> None:
        period = now // PERIOD
        if period != self._period:
            self._period = period
            for unit in self._units:
                account = unit.account
                account.active = account.used > 0 or unit.running_since is not None
                account.used = max(0, account.used - self._reservation(unit))
            self._count_weights()

    def _reservation(self, unit: Unit) -> int:
        """ns in a period: its weight's part of all processors, and one processor at most."""
        return max(min(PERIOD * self.pcpus * unit.parameters["weight"] // max(self._weights, 1), PERIOD), 1)

    def _count_weights(self) -> None:
        self._weights = sum(unit.parameters["weight"] for unit in self._units if unit.account.active)

    def _used(self, unit: Unit, now: int) -> float:
        """How much of its reservation: 1 is all of it."""
        return float((unit.account.used + unit.ran(now)) / self._reservation(unit))
