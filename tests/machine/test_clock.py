"""Clocks: the virtual one is deterministic, the real one never goes back."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xenolith.machine.clock import RealClock, VirtualClock
from xenolith.machine.tsc import Scale, TscClock, is_stable


def test_a_virtual_clock_stands_still_until_it_is_advanced() -> None:
    clock = VirtualClock(wall=1000)
    assert (clock.now(), clock.wall()) == (0, 1000)
    assert (clock.now(), clock.wall()) == (0, 1000)
    clock.advance(5)
    assert (clock.now(), clock.wall()) == (5, 1005)


@given(st.lists(st.integers(0, 1 << 60), min_size=1))
def test_waiting_on_a_virtual_clock_takes_it_to_the_deadline_and_never_back(deadlines: list[int]) -> None:
    clock = VirtualClock()
    condition = threading.Condition()
    with condition:
        for deadline in deadlines:
            clock.wait(condition, deadline)
            assert clock.now() >= deadline
    assert clock.now() == max(deadlines)


def test_waiting_without_a_deadline_ends_when_notified() -> None:
    for clock in (VirtualClock(), RealClock()):
        condition = threading.Condition()

        def notify(condition: threading.Condition = condition) -> None:
            with condition:
                condition.notify_all()

        with condition:
            notifier = threading.Thread(target=notify)
            notifier.start()
            clock.wait(condition, None)
        notifier.join()


def test_a_real_clock_does_not_wait_for_what_is_past() -> None:
    clock = RealClock()
    condition = threading.Condition()
    with condition:
        clock.wait(condition, clock.now() - 1)


def test_a_real_clock_starts_at_boot_and_goes_forward() -> None:
    readings = [clock.now() for clock in [RealClock()] for _ in range(1000)]
    assert readings == sorted(readings)
    assert readings[0] >= 0


@pytest.mark.skipif(not is_stable(), reason="this host's time stamp counter is no clock")
def test_the_time_stamp_clock_goes_forward() -> None:
    clock = TscClock()
    readings = [clock.now() for _ in range(1000)]
    assert readings == sorted(readings)


@given(st.integers(10_000_000, 10_000_000_000), st.integers(0, 3_600_000_000_000))
def test_factors_turn_ticks_into_nanoseconds_to_within_a_millionth(hertz: int, nanoseconds: int) -> None:
    """An hour of ticks is an hour, with the arithmetic that a guest does."""
    ticks = nanoseconds * hertz // 1_000_000_000
    assert abs(Scale.of(hertz).nanoseconds(ticks) - nanoseconds) <= nanoseconds / 1_000_000 + 200


@pytest.mark.parametrize("nanoseconds", [5_000_000_000, -2_000_000_000])
def test_a_clock_ahead_of_another_goes_on_with_it(nanoseconds: int) -> None:
    clock = VirtualClock()
    clock.advance(3_000_000_000)
    other = clock.ahead(nanoseconds)
    assert other.now() == 3_000_000_000 + nanoseconds
    clock.advance(7)
    assert other.now() == 3_000_000_007 + nanoseconds
    assert other.wall() == clock.wall()
    assert other.ahead(-nanoseconds).now() == clock.now()
    condition = threading.Condition()
    other.wait(condition, other.now() + 100)
    assert clock.now() == 3_000_000_107


@pytest.mark.parametrize("make", [RealClock, TscClock])
def test_a_real_clock_ahead_shows_the_same_difference(make: Callable[[], RealClock]) -> None:
    clock = make()
    ahead, behind = clock.ahead(1 << 40), clock.ahead(-1_000)
    before = clock.now()
    shown = ahead.now()
    after = clock.now()
    assert before <= shown - (1 << 40) <= after
    assert behind.now() + 1_000 >= after
