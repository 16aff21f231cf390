"""Fairness between interfaces: whose packets are looked at next, and whose leave first (paper 3.4.1: round robin).

Whoever floods must not take from others what is theirs.  Two places are contended: the router itself, which one thread
at a time goes through (`Turns`), and each interface's way out, where the packets of several senders wait (`FairQueue`).
Both count bytes, and for each packet as many as could be moved in the time that it costs whatever its size: else a
flood of small packets would take most of the time for its share of the bytes.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from typing import Final

from xenolith.dom0.network.frame import Frame

TURN_BYTES: Final = 128 << 10  # that an interface may send in one turn; at least one frame
QUANTUM: Final = 64 << 10  # of each sender's bytes before the next one's; at least one frame
LIMIT_BYTES: Final = 768 << 10  # of one sender's that wait for one receiver
LIMIT_FRAMES: Final = 1024
CONTENDED_SECONDS: Final = 0.1  # after which a sender of whom nothing came does not count
MOST_SENDERS: Final = 64  # that are remembered
FRAME_BYTES: Final = 8 << 10  # that a packet counts for beside its own


class Turns:
    """A lock that goes to those who wait for it in the order in which they came.

    With the bytes of each turn limited, nobody waits longer than one turn of each other.
    """

    def __init__(self) -> None:
        self._lock: Final = threading.Lock()
        self._waiting: Final[deque[threading.Lock]] = deque()
        self._taken = False

    def __enter__(self) -> None:
        with self._lock:
            if not self._taken:
                self._taken = True
                return
            mine = threading.Lock()
            mine.acquire()
            self._waiting.append(mine)
        mine.acquire()

    def __exit__(self, *_: object) -> None:
        with self._lock:
            if self._waiting:
                self._waiting.popleft().release()
            else:
                self._taken = False


class _Waiting:
    """One sender's frames."""

    __slots__ = ("bytes", "credit", "frames", "sender")

    def __init__(self, sender: int) -> None:
        self.sender = sender
        self.frames: deque[Frame] = deque()
        self.bytes = 0
        self.credit = 0


class FairQueue:
    """Frames that wait for one receiver: deficit round robin over the senders (Shreedhar and Varghese, 1996)."""

    def __init__(self) -> None:
        self._lock: Final = threading.Lock()
        self._senders: Final[dict[int, _Waiting]] = {}  # of those that have frames here
        self._round: Final[deque[_Waiting]] = deque()
        self._heard: Final[dict[int, float]] = {}  # when something came last, by sender

    @property
    def contended(self) -> bool:
        """Several senders have put frames here of late."""
        with self._lock:
            since = time.monotonic() - CONTENDED_SECONDS
            return sum(heard > since for heard in self._heard.values()) > 1

    def put(self, sender: int, frame: Frame) -> bool:
        """Let a frame wait; False where its sender has too many here already."""
        size = len(frame.data)
        with self._lock:
            if sender not in self._heard and len(self._heard) >= MOST_SENDERS:
                del self._heard[next(iter(self._heard))]
            self._heard[sender] = time.monotonic()
            waiting = self._senders.get(sender)
            if waiting is None:
                waiting = self._senders[sender] = _Waiting(sender)
            elif waiting.bytes + size > LIMIT_BYTES or len(waiting.frames) >= LIMIT_FRAMES:
                return False
            if not waiting.frames:
                waiting.credit = QUANTUM
                self._round.append(waiting)
            waiting.frames.append(frame)
            waiting.bytes += size
        return True

    def take(self) -> Frame | None:
        """The frame whose turn it is."""
        with self._lock:
            while self._round:
                waiting = self._round[0]
                if waiting.credit <= 0:
                    waiting.credit += QUANTUM
                    self._round.rotate(-1)
                    continue
                frame = waiting.frames.popleft()
                waiting.bytes -= len(frame.data)
                waiting.credit -= len(frame.data) + FRAME_BYTES
                if not waiting.frames:
                    self._round.popleft()
                    del self._senders[waiting.sender]
                return frame
            return None

    def clear(self) -> None:
        with self._lock:
            self._senders.clear()
            self._round.clear()

    def __bool__(self) -> bool:
        return bool(self._round)
