"""Shared rings, from a back-end's side (public/io/ring.h).

A front-end puts requests into entries and moves REQ_PROD; the back-end puts the responses into the same entries, in any
order, and moves RSP_PROD.  Each side says by an event threshold when the other has to notify it, so that a busy ring
needs no notifications.

All of the ring is the guest's to write at any time.  So a request is copied out once and only the copy is looked at;
the back-end keeps its own positions here and reads from the ring just the front-end's producer, which is checked, and
its threshold, of which no value does harm.

Between moving one's own producer (or threshold) and reading the other's threshold (or producer) must lie a full fence:
the processor would otherwise load before it stores, both sides could miss each other, and the ring would stand still.
"""

from __future__ import annotations

from typing import Final

from xenolith.abi.io_ring import ENTRIES, REQ_EVENT, REQ_PROD, RSP_EVENT, RSP_PROD
from xenolith.machine.atomic import fence

_MASK: Final = (1 << 32) - 1


class RingError(Exception):
    """The front-end's producer index is impossible."""


class SharedRing:
    """The frames of a ring, side by side, and how they are divided."""

    def __init__(self, memory: memoryview, entry_size: int) -> None:
        self.bytes: Final = memory
        self.words: Final = memory.cast("I")
        self.entry_size: Final = entry_size
        self.entries: Final = 1 << ((len(memory) - ENTRIES) // entry_size).bit_length() - 1

    def offset(self, index: int) -> int:
        """Where entry number `index` begins."""
        return ENTRIES + (index & self.entries - 1) * self.entry_size


class ResponseWriter:
    """Puts responses. A ring that was in use before goes on where its last back-end left it."""

    def __init__(self, ring: SharedRing) -> None:
        self._ring: Final = ring
        self.produced = self._pushed = ring.words[RSP_PROD]

    def put(self, response: bytes) -> None:
        """Write a response, which the front-end sees after `push`."""
        at = self._ring.offset(self.produced)
        self._ring.bytes[at : at + len(response)] = response
        self.produced = self.produced + 1 & _MASK

    def push(self) -> bool:
        """Let the front-end see what was put; whether it has to be notified."""
        before, now = self._pushed, self.produced
        if now == before:
            return False
        words = self._ring.words
        words[RSP_PROD] = self._pushed = now
        fence()
        return (now - words[RSP_EVENT] & _MASK) < (now - before & _MASK)


class RequestReader:
    """Takes requests, never more than there is room for responses."""

    def __init__(self, ring: SharedRing, responses: ResponseWriter) -> None:
        self._ring: Final = ring
        self._responses: Final = responses
        self.consumed = responses.produced

    def take(self) -> list[bytes]:
        """Copies of all requests that have come. Raises RingError."""
        ring = self._ring
        produced = ring.words[REQ_PROD]
        unanswered = produced - self._responses.produced & _MASK
        waiting = produced - self.consumed & _MASK
        if unanswered > ring.entries or waiting > unanswered:
            raise RingError(f"{unanswered} requests are unanswered in a ring of {ring.entries}")
        memory, size, offset, first = ring.bytes, ring.entry_size, ring.offset, self.consumed
        self.consumed = produced
        return [bytes(memory[(at := offset(first + number)) : at + size]) for number in range(waiting)]

    def rearm(self) -> bool:
        """Ask to be notified of the next request; True where it has come already and no notification will."""
        words = self._ring.words
        words[REQ_EVENT] = self.consumed + 1 & _MASK
        fence()
        return words[REQ_PROD] != self.consumed
