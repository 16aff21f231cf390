"""bvt: Borrowed Virtual Time (Duda and Cheriton, SOSP 1999; the paper's scheduler, 3.3.1; Xen 1.x: sched_bvt.c).

Every vCPU has an *actual virtual time*, which advances while it runs, the slower the greater its weight.  The least
*effective* virtual time goes first.  It is the actual one, unless the vCPU is *warped*: then it is `warp` less, so
that a vCPU which has to answer quickly is dispatched at once when it wakes, by borrowing from its own future: it pays
afterwards, because its actual time advances as ever.  Limits keep it honest: warped it runs for `warp_limit` at a
time, and then not warped for `unwarp` (0: no limit).

One that computes is not exchanged for another before it is ahead by the *context-switch allowance*, so that there are
not many switches among equals.  One that wakes gets no credit for its sleep: its time is set to the *scheduler
virtual time*, the least among those that want to run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Final

from xenolith.hypervisor.sched.policy import LEAD, NO_LIMIT, US, Simple, Unit

ALLOWANCE: Final = 5_000  # us, the context-switch allowance
DEFAULT_WEIGHT: Final = 256


@dataclass(slots=True)
class _Account:
    actual: int = 0  # virtual ns
    warped_run: int = 0  # ns for which it has run warped since it slept last or its warp ended
    unwarped_until: int = 0


class BorrowedVirtualTime(Simple):
    """Borrowed virtual time. Parameters but the weight are in microseconds."""

    name: ClassVar[str] = "bvt"
    parameters: ClassVar[Mapping[str, int]] = {"weight": DEFAULT_WEIGHT, "warp": 0, "warp_limit": 0, "unwarp": 0}
    schedparams: ClassVar[Mapping[str, int]] = {"allowance": ALLOWANCE}

    def __init__(self, pcpus: int) -> None:
        super().__init__(pcpus)
        self._scheduler_time = 0
        self._active: set[Unit] = set()  # those that want to run

    def add(self, unit: Unit, now: int) -> None:
        unit.account = _Account(self._scheduler_time)

    def remove(self, unit: Unit, now: int) -> None:
        self._active.discard(unit)

    def wake(self, unit: Unit, now: int) -> None:
        if unit not in self._active:
            unit.account.actual = max(unit.account.actual, self._advance(now))
            self._active.add(unit)

    def _advance(self, now: int) -> int:
        """The scheduler virtual time; it never goes back."""
        least = min((_actual(other, now) for other in self._active), default=self._scheduler_time)
        self._scheduler_time = max(self._scheduler_time, least)
        return self._scheduler_time

    def sleep(self, unit: Unit, now: int) -> None:
        self._active.discard(unit)
        unit.account.warped_run = 0

    def charge(self, unit: Unit, ran: int, now: int) -> None:
        account = unit.account
        if _warped(unit, now):
            account.warped_run += ran
            limit = unit.parameters["warp_limit"] * US
            if limit and account.warped_run >= limit:
                account.warped_run = 0
                account.unwarped_until = now + unit.parameters["unwarp"] * US
        account.actual = min(account.actual + _virtual(unit, ran), self._advance(now) + _virtual(unit, LEAD))

    def yield_(self, unit: Unit, others: Sequence[Unit], now: int) -> None:
        unit.account.actual = max(unit.account.actual, max(_actual(other, now) for other in others) + 1)

    def pick(self, units: Sequence[Unit], now: int) -> Unit:
        return min(units, key=lambda unit: _effective(unit, now))

    def victim(self, unit: Unit, running: Sequence[Unit], now: int) -> Unit | None:
        most = max(running, key=lambda other: _effective(other, now), default=None)
        return most if most is not None and _effective(most, now) > _effective(unit, now) else None

    def quantum(self, unit: Unit, contended: bool, now: int) -> int:
        if not contended:
            return NO_LIMIT
        limit = unit.parameters["warp_limit"] * US
        allowance = self.schedparam["allowance"] * US
        return min(allowance, limit) if limit and _warped(unit, now) else allowance

    def expired(self, unit: Unit, others: Sequence[Unit], now: int) -> bool:
        return any(_effective(other, now) < _effective(unit, now) for other in others)


def _virtual(unit: Unit, ran: int) -> int:
    return ran * DEFAULT_WEIGHT // unit.parameters["weight"]


def _actual(unit: Unit, now: int) -> int:
    return int(unit.account.actual) + _virtual(unit, unit.ran(now))


def _warped(unit: Unit, now: int) -> bool:
    """Whether its warp is in force; one that runs uses up its limit as it does."""
    limit = unit.parameters["warp_limit"] * US
    account = unit.account
    return (
        unit.parameters["warp"] > 0
        and now >= account.unwarped_until
        and (not limit or account.warped_run + unit.ran(now) < limit or unit.running_since is None)
    )


def _effective(unit: Unit, now: int) -> int:
    return _actual(unit, now) - (unit.parameters["warp"] * US if _warped(unit, now) else 0)
