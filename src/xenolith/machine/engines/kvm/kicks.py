"""How a vCPU's thread is made to leave KVM_RUN: a signal that is blocked everywhere but inside of it.

So none is lost between a check and the entry: one that is pending makes KVM_RUN return at once (KVM_SET_SIGNAL_MASK).
"""

from __future__ import annotations

import signal
import threading
from typing import Final

from xenolith.machine.engines.kvm import api
from xenolith.machine.engines.kvm.api import ioctl
from xenolith.machine.engines.kvm.native_run import KvmFields

KICK_SIGNAL: Final = signal.SIGRTMIN + 6

_thread = threading.local()


class Kicks:
    """Those of one vCPU. `shared.kicked` says that there was one."""

    def __init__(self, fd: int, shared: KvmFields) -> None:
        self._fd = fd
        self._shared = shared
        self._lock = threading.Lock()
        self._running_thread: int | None = None
        self._masked_for = 0  # the thread whose signal mask KVM_RUN uses
        shared.signals[:] = (1 << KICK_SIGNAL - 1).to_bytes(128, "little")

    def kick(self) -> None:
        """Make `run` return. From any thread."""
        if self._shared.kicked:
            return
        self._shared.kicked = True
        self.interrupt()

    def interrupt(self) -> None:
        """Make KVM_RUN return. From any thread."""
        with self._lock:
            if self._running_thread is not None:
                signal.pthread_kill(self._running_thread, KICK_SIGNAL)

    def taken(self) -> bool:
        """Whether there was a kick; there is none then."""
        if not self._shared.kicked:
            return False  # and leave it: one may come now
        self._shared.kicked = False
        return True

    def enter_thread(self) -> bool:
        """The calling thread is the one that kicks go to. True: it was another before."""
        thread = threading.get_ident()
        if not getattr(_thread, "blocks_kicks", False):
            signal.pthread_sigmask(signal.SIG_BLOCK, (KICK_SIGNAL,))
            _thread.blocks_kicks = True
        is_new = thread != self._masked_for
        if is_new:
            blocked = signal.pthread_sigmask(signal.SIG_BLOCK, ()) - {KICK_SIGNAL}
            mask = sum(1 << number - 1 for number in blocked)
            ioctl(self._fd, api.KVM_SET_SIGNAL_MASK, bytearray(api.SIGNAL_MASK.pack(8, mask)))
            self._masked_for = thread
        with self._lock:
            self._running_thread = thread
        return is_new

    def leave_thread(self) -> None:
        with self._lock:
            self._running_thread = None


def swallow() -> bool:
    """Take the calling thread's pending signals. Whether there was one."""
    found = False
    while signal.sigtimedwait((KICK_SIGNAL,), 0):
        found = True
    return found


def repeat() -> None:
    """Send the calling thread one that was swallowed."""
    signal.pthread_kill(threading.get_ident(), KICK_SIGNAL)
