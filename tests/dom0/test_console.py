"""The console back-end, with the test in the guest's place."""

from __future__ import annotations

import struct
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xenolith.dom0.console import READER_BYTES, SCROLLBACK_BYTES, Console, ConsoleClosed, Overflow

IN_CONS, IN_PROD, OUT_CONS, OUT_PROD = 3072, 3076, 3080, 3084
WORD = 1 << 32


class GuestEnd:
    """The guest's use of the ring page, by the public header and not by our back-end."""

    def __init__(self, start: int = 0) -> None:
        self.page = bytearray(4096)
        for index in (IN_CONS, IN_PROD, OUT_CONS, OUT_PROD):
            self.set(index, start)
        self.events = 0
        self.console = Console(memoryview(self.page), self.notified)

    def notified(self) -> None:
        self.events += 1

    def get(self, index: int) -> int:
        return struct.unpack_from("<I", self.page, index)[0]

    def set(self, index: int, value: int) -> None:
        struct.pack_into("<I", self.page, index, value % WORD)

    def put(self, data: bytes) -> int:
        """Write what there is room for, without an event; how many bytes."""
        produced = self.get(OUT_PROD)
        count = min(len(data), 2048 - (produced - self.get(OUT_CONS)) % WORD)
        for offset in range(count):
            self.page[1024 + (produced + offset) % 2048] = data[offset]
        self.set(OUT_PROD, produced + count)
        return count

    def print(self, data: bytes) -> None:
        """Write everything, with an event after each piece, as hvc_xen does."""
        while data:
            count = self.put(data)
            assert count, "the guest would wait for ever"
            data = data[count:]
            self.console.service()

    def typed(self) -> bytes:
        """Read all input."""
        consumed, produced = self.get(IN_CONS), self.get(IN_PROD)
        count = (produced - consumed) % WORD
        assert count <= 1024
        data = bytes(self.page[(consumed + offset) % 1024] for offset in range(count))
        self.set(IN_CONS, produced)
        return data


def test_what_the_guest_prints_is_read_and_the_guest_is_told() -> None:
    guest = GuestEnd()
    reader = guest.console.open_reader(Overflow.WAIT)
    guest.print(b"hello\n")
    assert reader.read() == b"hello\n"
    assert guest.get(OUT_CONS) == 6
    assert guest.events == 1


@given(start=st.integers(0, WORD - 1), pieces=st.lists(st.binary(min_size=1, max_size=5000), max_size=8))
def test_output_arrives_whole_wherever_the_indices_stand(start: int, pieces: list[bytes]) -> None:
    guest = GuestEnd(start)
    reader = guest.console.open_reader(Overflow.WAIT)
    received = b""
    for piece in pieces:
        guest.print(piece)
        received += reader.read() or b""
    assert received == b"".join(pieces)


@given(start=st.integers(0, WORD - 1), pieces=st.lists(st.binary(min_size=1, max_size=1024), max_size=8))
def test_input_arrives_whole_wherever_the_indices_stand(start: int, pieces: list[bytes]) -> None:
    guest = GuestEnd(start)
    received = b""
    for piece in pieces:
        guest.console.write(piece)
        received += guest.typed()
    assert received == b"".join(pieces)


def test_every_reader_gets_everything_with_the_scrollback_first() -> None:
    guest = GuestEnd()
    guest.print(b"early ")
    first = guest.console.open_reader(Overflow.WAIT)
    guest.print(b"late")
    second = guest.console.open_reader(Overflow.DROP_OLDEST)
    assert first.read() == second.read() == b"early late"


def test_with_no_reader_the_guest_never_waits_and_the_latest_output_is_kept() -> None:
    guest = GuestEnd()
    lines = b"".join(b"%07d\n" % number for number in range(40_000))
    guest.print(lines)
    assert guest.get(OUT_CONS) == guest.get(OUT_PROD)
    assert lines.endswith(guest.console.scrollback)
    assert SCROLLBACK_BYTES <= len(guest.console.scrollback) <= SCROLLBACK_BYTES + 2048


def test_a_reader_that_must_lose_nothing_makes_the_guest_wait() -> None:
    guest = GuestEnd()
    reader = guest.console.open_reader(Overflow.WAIT)
    sent = 0
    while count := guest.put(b"x" * 1000):
        sent += count
        guest.console.service()
    assert sent == READER_BYTES + 2048
    received = len(reader.read() or b"")
    assert received == READER_BYTES
    assert guest.put(b"y") == 1, "the reader made room, so the guest may go on"
    assert (reader.read() or b"").count(b"x") == 2048
    guest.console.service()
    assert reader.read() == b"y"


def test_a_reader_that_may_lose_never_makes_the_guest_wait_and_keeps_the_latest() -> None:
    guest = GuestEnd()
    reader = guest.console.open_reader(Overflow.DROP_OLDEST, capacity=4096)
    lines = b"".join(b"%07d\n" % number for number in range(5000))
    guest.print(lines)
    kept = reader.read() or b""
    assert lines.endswith(kept)
    assert 4096 <= len(kept) <= 4096 + 2048


def test_a_reader_that_leaves_no_longer_makes_the_guest_wait() -> None:
    guest = GuestEnd()
    reader = guest.console.open_reader(Overflow.WAIT, capacity=100)
    guest.put(b"x" * 2048)
    guest.console.service()
    assert guest.put(b"x" * 2048) == 100
    reader.close()
    assert guest.put(b"x" * 2048) == 2048
    assert reader.read() == b""


def test_all_output_is_read_after_the_domain_has_shut_down() -> None:
    guest = GuestEnd()
    reader = guest.console.open_reader(Overflow.WAIT, capacity=100)
    guest.put(b"a" * 100)
    guest.console.service()
    guest.put(b"z" * 2048)  # more than the reader has room for, and no event follows
    guest.console.close()
    assert reader.read() == b"a" * 100 + b"z" * 2048
    assert reader.read() == b""
    assert guest.console.open_reader(Overflow.WAIT).read() == b"a" * 100 + b"z" * 2048


def test_a_reader_waits_for_output_and_is_woken_by_it() -> None:
    guest = GuestEnd()
    reader = guest.console.open_reader(Overflow.WAIT)
    assert reader.read(timeout=0) is None
    received: list[bytes | None] = []
    thread = threading.Thread(target=lambda: received.append(reader.read()))
    thread.start()
    guest.print(b"now")
    thread.join()
    assert received == [b"now"]


def test_typing_waits_while_the_guest_does_not_read_and_ends_with_the_domain() -> None:
    guest = GuestEnd()
    assert guest.console.offer(b"i" * 3000) == 1024
    assert guest.console.offer(b"i") == 0
    outcome: list[str] = []

    def type_more() -> None:
        try:
            guest.console.write(b"j" * 10)
            outcome.append("typed")
            guest.console.write(b"k" * 2000)
        except ConsoleClosed:
            outcome.append("closed")

    thread = threading.Thread(target=type_more)
    thread.start()
    assert guest.typed() == b"i" * 1024
    while not outcome:
        guest.console.service()
    guest.console.close()
    thread.join()
    assert outcome == ["typed", "closed"]
    with pytest.raises(ConsoleClosed):
        guest.console.offer(b"x")


@given(values=st.lists(st.integers(0, WORD - 1), min_size=4, max_size=4), data=st.binary(max_size=100))
def test_whatever_the_guest_writes_into_the_indices_harms_only_its_console(values: list[int], data: bytes) -> None:
    guest = GuestEnd()
    reader = guest.console.open_reader(Overflow.WAIT)
    for index, value in zip((IN_CONS, IN_PROD, OUT_CONS, OUT_PROD), values, strict=True):
        guest.set(index, value)
    before = bytes(guest.page)
    guest.console.service()
    assert guest.console.offer(data) <= len(data)
    assert len(reader.read(timeout=0) or b"") <= 2048
    assert guest.page[3088:] == before[3088:]
    assert guest.page[1024:3072] == before[1024:3072], "the ring that the guest writes is never written"


def test_impossible_indices_are_ignored_until_they_make_sense() -> None:
    guest = GuestEnd()
    reader = guest.console.open_reader(Overflow.WAIT)
    guest.set(OUT_PROD, 2049)
    guest.console.service()
    assert reader.read(timeout=0) is None
    assert guest.get(OUT_CONS) == 0
    guest.set(OUT_PROD, 0)
    guest.print(b"sorry")
    assert reader.read() == b"sorry"
