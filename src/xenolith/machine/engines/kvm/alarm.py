"""An alarm that interrupts one thread by a signal: timer_create(2) with SIGEV_THREAD_ID.

It needs no thread of its own, which would have to wake, take Python's lock and send the signal, each time.
"""

from __future__ import annotations

import ctypes
import functools
import os
import re
import threading
import time
from struct import Struct
from typing import Final

_CLOCK_MONOTONIC: Final = 1
_CLOCK_MONOTONIC_COARSE: Final = 6
LONGEST_HOST_TICK: Final = 4_000_000  # ns for which a guest's tick may wait for it
ALIGNED_SINCE: Final = 6, 4  # the Linux whose ticks come at multiples of their length
_SIGEV_THREAD_ID: Final = 4
_SIGEVENT: Final = Struct("<qiii44x")  # value, signal, how to notify, thread
_ITIMERSPEC: Final = Struct("<4q")  # interval and time, each in s and ns

_libc: Final = ctypes.CDLL(None, use_errno=True)
_libc.timer_create.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.POINTER(ctypes.c_void_p))
_libc.timer_settime.argtypes = (ctypes.c_void_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
_libc.timer_delete.argtypes = (ctypes.c_void_p,)


@functools.cache
def host_tick_ns() -> int:
    """The length of this host's own tick, which comes at multiples of it on CLOCK_MONOTONIC; 0: not known, or long."""
    version = re.match(r"(\d+)\.(\d+)", os.uname().release)
    if version is None or (int(version[1]), int(version[2])) < ALIGNED_SINCE:
        return 0
    length = round(time.clock_getres(_CLOCK_MONOTONIC_COARSE) * 1e9)
    return length if length <= LONGEST_HOST_TICK else 0


class Alarm:
    """Sends `signal` to the thread that called `follow_thread` last. Raises OSError where there is no timer left."""

    def __init__(self, signal: int) -> None:
        self._signal = signal
        self._timer = ctypes.c_void_p()
        self._exists = False

    def follow_thread(self) -> None:
        """Signals go to the calling thread from now on; an alarm that was set is off."""
        self.close()
        event = _SIGEVENT.pack(0, self._signal, _SIGEV_THREAD_ID, threading.get_native_id())
        _check(_libc.timer_create(_CLOCK_MONOTONIC, event, ctypes.byref(self._timer)))
        self._exists = True

    def set(self, nanoseconds: int) -> None:
        """Go off once, so many (at least one) from now, and not at a time that was set before."""
        _check(_libc.timer_settime(self._timer, 0, _ITIMERSPEC.pack(0, 0, *divmod(nanoseconds, 1_000_000_000)), None))

    @property
    def timer(self) -> int:
        """The timer_t."""
        return self._timer.value or 0

    def close(self) -> None:
        """Give the timer back."""
        if self._exists:
            self._exists = False
            _libc.timer_delete(self._timer)


def _check(result: int) -> None:
    if result:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
