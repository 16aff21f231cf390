"""fair: shares of the CPU by weight, and quick service for those that use little of theirs.

Every vCPU carries its *share*: the CPU time it had, divided by its domain's weight.  The lowest share goes first.  A
vCPU that wakes after a long sleep does not bring more than WAKE_CREDIT of unused time along; that much lets it preempt
at once one that computes all the time, so that events are served quickly.  The share is all of a unit's `account`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Final

from xenolith.hypervisor.sched.policy import LEAD, NO_LIMIT, Simple, Unit

QUANTUM: Final = 10_000_000  # ns for which a vCPU runs while others wait
WAKE_CREDIT: Final = 5_000_000  # ns of unused share that a vCPU keeps over a sleep
DEFAULT_WEIGHT: Final = 256


class Fair(Simple):
    """Fair shares by weight."""

    name: ClassVar[str] = "fair"
    parameters: ClassVar[Mapping[str, int]] = {"weight": DEFAULT_WEIGHT}

    def __init__(self, pcpus: int) -> None:
        super().__init__(pcpus)
        self._least = 0  # the lowest share of those that want to run

    def add(self, unit: Unit, now: int) -> None:
        unit.account = 0

    def wake(self, unit: Unit, now: int) -> None:
        unit.account = max(unit.account, self._least - WAKE_CREDIT)

    def queue(self, unit: Unit, others: Sequence[Unit], now: int) -> None:
        least = min((_share_now(other, now) for other in others), default=unit.account)
        self._least = max(self._least, least)
        unit.account = max(unit.account, self._least - WAKE_CREDIT)

    def charge(self, unit: Unit, ran: int, now: int) -> None:
        unit.account = min(unit.account + _weighted(unit, ran), self._least + _weighted(unit, LEAD))

    def yield_(self, unit: Unit, others: Sequence[Unit], now: int) -> None:
        unit.account = max(unit.account, max(other.account for other in others) + 1)

    def pick(self, units: Sequence[Unit], now: int) -> Unit:
        return min(units, key=_share)

    def victim(self, unit: Unit, running: Sequence[Unit], now: int) -> Unit | None:
        """Whoever had far more of the CPU."""
        most = max(running, key=lambda other: _share_now(other, now), default=None)
        return most if most is not None and _share_now(most, now) > unit.account + WAKE_CREDIT // 2 else None

    def quantum(self, unit: Unit, contended: bool, now: int) -> int:
        return QUANTUM if contended else NO_LIMIT

    def expired(self, unit: Unit, others: Sequence[Unit], now: int) -> bool:
        """If one that waits has had less."""
        return any(other.account <= _share_now(unit, now) for other in others)


def _share(unit: Unit) -> int:
    return int(unit.account)


def _weighted(unit: Unit, ran: int) -> int:
    return ran * DEFAULT_WEIGHT // unit.parameters["weight"]


def _share_now(unit: Unit, now: int) -> int:
    """With what it has had since it was charged last."""
    return int(unit.account) + _weighted(unit, unit.ran(now))
