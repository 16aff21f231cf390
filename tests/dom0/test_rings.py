"""Rings: requests arrive whole and once, both sides hear of each other, and a lying index is caught."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xenolith.abi.io_ring import REQ_EVENT, REQ_PROD, RSP_EVENT, RSP_PROD
from xenolith.dom0.rings import RequestReader, ResponseWriter, RingError, SharedRing

MASK = (1 << 32) - 1
SIZE = 112
STARTS = st.sampled_from([0, 1, 31, 32, MASK - 40, MASK - 1, MASK]) | st.integers(0, MASK)


class Front:
    """The other side, as public/io/ring.h has it."""

    def __init__(self, start: int = 0) -> None:
        page = memoryview(bytearray(4096))
        words = page.cast("I")
        words[REQ_PROD] = words[RSP_PROD] = self.produced = self.consumed = start
        words[REQ_EVENT] = words[RSP_EVENT] = start + 1 & MASK
        self.ring = SharedRing(page, SIZE)
        self.writer = ResponseWriter(self.ring)
        self.reader = RequestReader(self.ring)

    def put(self, request: bytes) -> None:
        at = self.ring.offset(self.produced)
        self.ring.bytes[at : at + len(request)] = request
        self.produced = self.produced + 1 & MASK

    def push(self) -> bool:
        """Show what was put; whether the back-end has to be notified."""
        before, self.ring.words[REQ_PROD] = self.ring.words[REQ_PROD], self.produced
        return (self.produced - self.ring.words[REQ_EVENT] & MASK) < (self.produced - before & MASK)

    def collect(self) -> list[bytes]:
        """All responses that are there, and ask to be notified of the next."""
        got = []
        while self.consumed != self.ring.words[RSP_PROD]:
            at = self.ring.offset(self.consumed)
            got.append(bytes(self.ring.bytes[at : at + 8]))
            self.consumed = self.consumed + 1 & MASK
        self.ring.words[RSP_EVENT] = self.consumed + 1 & MASK
        return got


def test_a_page_holds_32_block_requests() -> None:
    assert SharedRing(memoryview(bytearray(4096)), SIZE).entries == 32
    assert SharedRing(memoryview(bytearray(8192)), SIZE).entries == 64
    assert SharedRing(memoryview(bytearray(4096)), 12).entries == 256


@given(STARTS, st.lists(st.tuples(st.integers(0, 32), st.integers(1, 32)), max_size=30))
def test_every_request_is_answered_once_and_nobody_waits_for_a_notification_that_does_not_come(
    start: int, rounds: list[tuple[int, int]]
) -> None:
    """Whatever the counters are, also where they wrap, and however both sides take turns."""
    front = Front(start)
    number = answered = 0
    backend_sleeps = True
    waiting: list[bytes] = []
    for puts, answers in rounds:
        for _ in range(min(puts, 32 - (number - answered))):
            front.put(number.to_bytes(8, "little"))
            number += 1
        if front.push() or not backend_sleeps:
            backend_sleeps = False
            waiting += front.reader.take()
        now, waiting = waiting[:answers], waiting[answers:]
        for request in now:
            front.writer.put(request[:8])
        notified = front.writer.push()
        assert notified == bool(now), "the front-end asked to hear of the next response"
        got = front.collect()
        assert got == [each.to_bytes(8, "little") for each in range(answered, answered + len(got))]
        answered += len(got)
        if not backend_sleeps:
            backend_sleeps = not front.reader.rearm()
    while not backend_sleeps or waiting:
        waiting += front.reader.take()
        for request in waiting:
            front.writer.put(request[:8])
        waiting = []
        front.writer.push()
        answered += len(front.collect())
        backend_sleeps = not front.reader.rearm()
    assert answered == number


def test_no_notification_before_the_response_that_was_asked_for() -> None:
    front = Front()
    for number in range(4):
        front.put(bytes([number]))
    front.push()
    front.ring.words[RSP_EVENT] = 3
    front.reader.take()
    notified = []
    for _ in range(4):
        front.writer.put(b"x")
        notified.append(front.writer.push())
    assert notified == [False, False, True, False]
    assert not front.writer.push(), "nothing new"


@given(STARTS, st.integers(0, 32), st.integers(0, 32), st.integers(0, MASK))
def test_a_producer_is_believed_only_while_every_request_has_room_for_its_response(
    start: int, before: int, answered: int, claimed: int
) -> None:
    front = Front(start)
    for _ in range(before):
        front.put(b"request")
    front.push()
    assert len(front.reader.take()) == before
    answered = min(answered, before)
    for _ in range(answered):
        front.writer.put(b"response")
    front.writer.push()
    front.ring.words[REQ_PROD] = start + before + claimed & MASK
    outstanding = before - answered
    if claimed <= 32 - outstanding:
        assert len(front.reader.take()) == claimed
    else:
        with pytest.raises(RingError):
            front.reader.take()


def test_a_request_that_is_changed_after_it_was_taken_stays_as_it_was() -> None:
    front = Front()
    front.put(b"as submitted")
    front.push()
    (request,) = front.reader.take()
    front.ring.bytes[64:76] = b"changed since"[:12]
    assert request.startswith(b"as submitted")


def test_a_new_back_end_goes_on_where_the_last_one_left_the_ring() -> None:
    front = Front(start=17)
    front.put(b"next")
    front.push()
    assert [request[:4] for request in front.reader.take()] == [b"next"]
