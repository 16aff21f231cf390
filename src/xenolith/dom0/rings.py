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

import ctypes
from ctypes import c_uint32, c_uint64
from pathlib import Path
from typing import ClassVar, Final

from xenolith.abi import io_ring
from xenolith.abi.io_ring import ENTRIES, REQ_EVENT, REQ_PROD, RSP_EVENT, RSP_PROD
from xenolith.machine import native
from xenolith.machine.atomic import fence
from xenolith.machine.native import Fields, buffer_address

SOURCE: Final = Path(__file__).with_name("rings.c")  # what native code of back-ends is built on

_MASK: Final = (1 << 32) - 1


class RingError(Exception):
    """The front-end's producer index is impossible."""


class SharedRing(ctypes.Structure):
    """The frames of a ring, side by side, how they are divided, and how far the back-end has got."""

    entries: int
    entry_size: int
    consumed: int  # requests that were taken
    produced: int  # responses that were put
    pushed: int  # those that the front-end sees

    _fields_: ClassVar[Fields] = (
        ("address", c_uint64),
        ("entries", c_uint32),
        ("entry_size", c_uint32),
        ("consumed", c_uint32),
        ("produced", c_uint32),
        ("pushed", c_uint32),
    )

    def __init__(self, memory: memoryview, entry_size: int) -> None:
        """A ring that was in use before goes on where its last back-end left it."""
        self.bytes: Final = memory
        self.words: Final = memory.cast("I")
        self.address = buffer_address(memory)
        self.entry_size = entry_size
        self.entries = 1 << ((len(memory) - ENTRIES) // entry_size).bit_length() - 1
        self.consumed = self.produced = self.pushed = self.words[RSP_PROD]

    def offset(self, index: int) -> int:
        """Where entry number `index` begins."""
        return ENTRIES + (index & self.entries - 1) * self.entry_size


def declarations() -> str:
    """Of everything that rings.c uses."""
    return native.define(io_ring, "REQ_PROD REQ_EVENT RSP_PROD RSP_EVENT ENTRIES") + native.declare(
        "ring", SharedRing, {"address": "u8 *{}"}
    )


class ResponseWriter:
    """Puts responses."""

    def __init__(self, ring: SharedRing) -> None:
        self._ring: Final = ring

    def put(self, response: bytes) -> None:
        """Write a response, which the front-end sees after `push`."""
        ring = self._ring
        at = ring.offset(ring.produced)
        ring.bytes[at : at + len(response)] = response
        ring.produced += 1

    def push(self) -> bool:
        """Let the front-end see what was put; whether it has to be notified."""
        ring, words = self._ring, self._ring.words
        before, now = ring.pushed, ring.produced
        if now == before:
            return False
        words[RSP_PROD] = ring.pushed = now
        fence()
        return (now - words[RSP_EVENT] & _MASK) < (now - before & _MASK)

    def drained(self) -> bool:
        """The front-end has looked at all responses, and waits for the next."""
        return self._ring.words[RSP_EVENT] == (self._ring.pushed + 1 & _MASK)


class RequestReader:
    """Takes requests, never more than there is room for responses."""

    def __init__(self, ring: SharedRing) -> None:
        self._ring: Final = ring

    def take(self) -> list[bytes]:
        """Copies of all requests that have come. Raises RingError."""
        ring = self._ring
        produced = ring.words[REQ_PROD]
        unanswered = produced - ring.produced & _MASK
        waiting = produced - ring.consumed & _MASK
        if unanswered > ring.entries or waiting > unanswered:
            raise RingError(f"{unanswered} requests are unanswered in a ring of {ring.entries}")
        memory, size, offset, first = ring.bytes, ring.entry_size, ring.offset, ring.consumed
        ring.consumed = produced
        return [bytes(memory[(at := offset(first + number)) : at + size]) for number in range(waiting)]

    def rearm(self) -> bool:
        """Ask to be notified of the next request; True where it has come already and no notification will."""
        ring, words = self._ring, self._ring.words
        words[REQ_EVENT] = ring.consumed + 1 & _MASK
        fence()
        return words[REQ_PROD] != ring.consumed
