"""The alarm that interrupts a vCPU's thread."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator

import pytest

from xenolith.machine.engines.kvm.alarm import Alarm, host_tick_ns

SIGNAL = signal.SIGRTMIN + 7
MILLISECOND = 1_000_000


@pytest.fixture
def alarm() -> Iterator[Alarm]:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (SIGNAL,))
    made = Alarm(SIGNAL)
    yield made
    made.close()
    while signal.sigtimedwait((SIGNAL,), 0):
        pass
    signal.pthread_sigmask(signal.SIG_SETMASK, before)


@pytest.mark.parametrize(
    ("release", "length", "known"),
    [
        ("6.18.44-fc", 0.004, 4 * MILLISECOND),
        ("6.4.0", 0.001, MILLISECOND),
        ("7.0", 0.004, 4 * MILLISECOND),
        ("6.3.13", 0.004, 0),  # whose ticks come at any time
        ("6.18.0", 0.01, 0),  # too long to wait for
        ("unheard of", 0.004, 0),
    ],
)
def test_the_hosts_tick_is_known_where_its_times_are(
    monkeypatch: pytest.MonkeyPatch, release: str, length: float, known: int
) -> None:
    monkeypatch.setattr(os, "uname", lambda: os.uname_result(("Linux", "host", release, "", "x86_64")))
    monkeypatch.setattr(time, "clock_getres", lambda _clock: length)
    assert host_tick_ns.__wrapped__() == known


def test_it_goes_off_once(alarm: Alarm) -> None:
    alarm.follow_thread()
    alarm.set(1)
    assert signal.sigtimedwait((SIGNAL,), 60)
    assert signal.sigtimedwait((SIGNAL,), 0.01) is None


def test_setting_it_again_puts_it_off(alarm: Alarm) -> None:
    alarm.follow_thread()
    alarm.set(60_000 * MILLISECOND)
    alarm.set(3_600_000 * MILLISECOND)
    assert signal.sigtimedwait((SIGNAL,), 0.01) is None
    alarm.set(MILLISECOND)
    assert signal.sigtimedwait((SIGNAL,), 60)


def test_it_goes_to_the_thread_that_it_follows(alarm: Alarm) -> None:
    alarm.follow_thread()
    arrived: list[object] = []

    def other() -> None:
        alarm.follow_thread()
        alarm.set(1)
        arrived.append(signal.sigtimedwait((SIGNAL,), 60))

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert arrived[0]
    assert signal.sigtimedwait((SIGNAL,), 0) is None


def test_one_that_was_closed_cannot_be_set(alarm: Alarm) -> None:
    alarm.follow_thread()
    alarm.set(60_000 * MILLISECOND)
    alarm.close()
    with pytest.raises(OSError, match=os.strerror(22)):
        alarm.set(1)
