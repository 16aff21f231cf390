"""The hypervisor and its guests compute the same time from the same counter."""

from __future__ import annotations

import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xenolith.machine import tsc


@given(st.integers(50_000_000, 8_000_000_000), st.integers(0, 1 << 55))
def test_the_factors_of_any_frequency_give_the_right_nanoseconds(hertz: int, ticks: int) -> None:
    scale = tsc.Scale.of(hertz)
    assert 1 << 31 <= scale.mul < 1 << 32
    exact = ticks * 1_000_000_000 // hertz
    # Rounding of mul (2**-31) and of the frequency when it is halved (2**-29), and of the shifted-out ticks.
    assert abs(scale.nanoseconds(ticks) - exact) <= exact * 2**-28 + 4


def test_the_clock_lies_between_a_guests_readings_before_and_after() -> None:
    clock = tsc.TscClock()
    for _ in range(1000):
        before = clock.scale.nanoseconds(tsc.read_tsc() - clock.tsc_at_boot)
        now = clock.now()
        after = clock.scale.nanoseconds(tsc.read_tsc() - clock.tsc_at_boot)
        assert before <= now <= after


def test_the_clock_never_goes_back_on_any_thread() -> None:
    if not tsc.is_stable():
        pytest.skip("this host's time stamp counters are not synchronised")
    clock = tsc.TscClock()
    latest = 0
    lock = threading.Lock()
    failures = []

    def watch() -> None:
        nonlocal latest
        for _ in range(5000):
            with lock:
                now = clock.now()
                if now < latest:
                    failures.append((latest, now))
                latest = now

    threads = [threading.Thread(target=watch) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
