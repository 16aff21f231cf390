"""The machine's clock: real time for running domains, a virtual one for tests.

Everything in Xenolith that asks for the time or waits for it does so through a Clock, so that a test on a
VirtualClock is deterministic and never sleeps (house rule; compare Trio's mock clock).
"""

from __future__ import annotations

import threading
import time
from copy import copy
from typing import Protocol


class Clock(Protocol):
    """Time since boot, wall-clock time, and waiting."""

    def now(self) -> int:
        """Nanoseconds since boot; never goes back."""

    def wall(self) -> int:
        """Nanoseconds since 1970-01-01 00:00 UTC."""

    def wait(self, condition: threading.Condition, deadline: int | None) -> None:
        """Wait, holding `condition`, until it is notified or `deadline` (ns since boot; None: for ever) has come."""

    def ahead(self, nanoseconds: int) -> Clock:
        """A clock that always shows so many ns more than this one (fewer, where they are negative)."""


class RealClock:
    """The host's monotonic clock, starting at zero when made."""

    def __init__(self) -> None:
        self._boot = time.monotonic_ns()

    def now(self) -> int:
        return time.monotonic_ns() - self._boot

    def wall(self) -> int:
        return time.time_ns()

    def wait(self, condition: threading.Condition, deadline: int | None) -> None:
        if deadline is None:
            condition.wait()
        else:
            remaining = deadline - self.now()
            if remaining > 0:
                condition.wait(remaining / 1e9)

    def ahead(self, nanoseconds: int) -> RealClock:
        clock = copy(self)
        clock._boot -= nanoseconds
        return clock


class VirtualClock:
    """A clock that stands still until somebody waits for it or advances it.

    Waiting for a deadline moves the clock there at once, so an idle machine jumps from timer to timer.
    """

    def __init__(self, wall: int = 1_000_000_000_000_000_000) -> None:
        self._now = 0
        self._wall_at_boot = wall

    def now(self) -> int:
        return self._now

    def wall(self) -> int:
        return self._wall_at_boot + self._now

    def advance(self, nanoseconds: int) -> None:
        self._now += nanoseconds

    def wait(self, condition: threading.Condition, deadline: int | None) -> None:
        if deadline is None:
            condition.wait()
        else:
            self._now = max(self._now, deadline)

    def ahead(self, nanoseconds: int) -> VirtualClock:
        return _AheadOfVirtual(self, nanoseconds)


class _AheadOfVirtual(VirtualClock):
    """Another clock's time, and some ns."""

    def __init__(self, clock: VirtualClock, nanoseconds: int) -> None:
        super().__init__()
        self._clock = clock
        self._ahead = nanoseconds

    def now(self) -> int:
        return self._clock.now() + self._ahead

    def wall(self) -> int:
        return self._clock.wall()

    def advance(self, nanoseconds: int) -> None:
        self._clock.advance(nanoseconds)

    def wait(self, condition: threading.Condition, deadline: int | None) -> None:
        self._clock.wait(condition, None if deadline is None else deadline - self._ahead)
