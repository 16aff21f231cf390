"""What a guest sees through its ring page: answers, events, errors; and what a hostile one cannot do to others."""

from __future__ import annotations

import mmap
import os
import random
import subprocess
import sys
from typing import Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xenolith.abi import xs_wire
from xenolith.abi.xs_wire import RING_SIZE, Op, RingError
from xenolith.dom0.xenstore.ring import OWN_EVENTS_MOST, OWN_EVENTS_WAIT, OWN_EVENTS_WAIT_MOST, RingConnection
from xenolith.dom0.xenstore.xenstored import Xenstored

from .wire import Client, Message, pack, unpack


class Guest:
    """A guest's half of the ring, written as Linux's xenbus driver does it."""

    def __init__(
        self, daemon: Xenstored, domid: int, start: int = 0, page: bytearray | memoryview | None = None
    ) -> None:
        self.page: Final = bytearray(4096) if page is None else page
        self.notified = 0
        for index in (xs_wire.REQ_CONS, xs_wire.REQ_PROD, xs_wire.RSP_CONS, xs_wire.RSP_PROD):
            self.set(index, start)
        self.now = 0.0
        self.alarms: Final[list[float]] = []
        self.ring: Final = RingConnection(
            daemon,
            domid,
            memoryview(self.page),
            self._notify,
            lambda connection: None,
            lambda connection, moment: self.alarms.append(moment),
            lambda: self.now,
        )
        daemon.introduce(self.ring)

    def _notify(self) -> None:
        self.notified += 1

    def get(self, offset: int) -> int:
        return memoryview(self.page).cast("I")[offset >> 2]

    def set(self, offset: int, value: int) -> None:
        memoryview(self.page).cast("I")[offset >> 2] = value & 0xFFFFFFFF

    def put(self, data: bytes) -> int:
        """Write as much as fits into the request ring; returns how much that was."""
        produced = self.get(xs_wire.REQ_PROD)
        room = RING_SIZE - ((produced - self.get(xs_wire.REQ_CONS)) & 0xFFFFFFFF)
        for byte in data[:room]:
            self.page[xs_wire.REQ_RING + produced % RING_SIZE] = byte
            produced += 1
        self.set(xs_wire.REQ_PROD, produced)
        return min(room, len(data))

    def take(self) -> bytes:
        """Read everything in the response ring."""
        consumed, produced = self.get(xs_wire.RSP_CONS), self.get(xs_wire.RSP_PROD)
        data = bytearray()
        while consumed != produced:
            data.append(self.page[xs_wire.RSP_RING + consumed % RING_SIZE])
            consumed = (consumed + 1) & 0xFFFFFFFF
        self.set(xs_wire.RSP_CONS, consumed)
        return bytes(data)

    def turn(self) -> None:
        """dom0 serves the ring once."""
        if self.ring.serve(16):
            self.ring.notify()

    def exchange(self, stream: bytes) -> list[Message]:
        """Send a stream of any length and collect all that comes back."""
        received = b""
        while True:
            stream = stream[self.put(stream) :]
            self.turn()
            chunk = self.take()
            received += chunk
            if not stream and not chunk and not self.ring.wants_turn:
                return unpack(received)


@pytest.fixture
def daemon() -> Xenstored:
    return Xenstored()


def give_home(daemon: Xenstored, domid: int) -> None:
    """The domain's own directory, as libxl makes it."""
    dom0 = Client(daemon)
    dom0.ok(Op.MKDIR, b"/local/domain/%d/data\0" % domid)
    dom0.ok(Op.SET_PERMS, b"/local/domain/%d\0n0\0r%d\0" % (domid, domid))
    dom0.ok(Op.SET_PERMS, b"/local/domain/%d/data\0n%d\0" % (domid, domid))


def test_a_guest_writes_and_reads_in_its_home_through_the_ring(daemon: Xenstored) -> None:
    give_home(daemon, 3)
    guest = Guest(daemon, 3)
    answers = guest.exchange(pack(Op.WRITE, b"data/x\0hello", req=7) + pack(Op.READ, b"data/x\0", req=8))
    assert answers == [(Op.WRITE, 7, 0, b"OK\0"), (Op.READ, 8, 0, b"hello")]
    assert guest.notified


@pytest.mark.parametrize("start", [0, 1000, 0xFFFFFFF0])
def test_rings_wrap_at_their_end_and_indices_at_2_to_the_32(daemon: Xenstored, start: int) -> None:
    give_home(daemon, 3)
    guest = Guest(daemon, 3, start)
    for number in range(100):
        value = b"%d" % number * 37
        assert guest.exchange(pack(Op.WRITE, b"data/v\0" + value) + pack(Op.READ, b"data/v\0"))[1][3] == value


def test_a_message_larger_than_the_ring_travels_in_pieces(daemon: Xenstored) -> None:
    give_home(daemon, 3)
    guest = Guest(daemon, 3)
    value = bytes(range(1, 200)) * 9
    answers = guest.exchange(pack(Op.WRITE, b"data/v\0" + value) + pack(Op.READ, b"data/v\0"))
    assert [answer[0] for answer in answers] == [Op.WRITE, Op.READ]
    assert answers[1][3] == value


def test_half_a_message_is_kept_until_the_rest_arrives(daemon: Xenstored) -> None:
    give_home(daemon, 3)
    guest = Guest(daemon, 3)
    message = pack(Op.WRITE, b"data/x\0hello")
    for cut in range(len(message)):
        assert guest.exchange(message[:cut]) == []
        assert guest.exchange(message[cut:]) == [(Op.WRITE, 0, 0, b"OK\0")]


def test_a_guest_that_lies_about_a_length_loses_only_its_own_connection(daemon: Xenstored) -> None:
    give_home(daemon, 3)
    give_home(daemon, 4)
    liar, honest = Guest(daemon, 3), Guest(daemon, 4)
    liar.exchange(pack(Op.WATCH, b"data\0t\0"))
    liar.put(xs_wire.HEADER.pack(Op.READ, 0, 0, xs_wire.PAYLOAD_MAX + 1))
    liar.turn()
    assert liar.get(xs_wire.ERROR) == RingError.PROTO
    assert not daemon.watches
    assert liar.exchange(pack(Op.READ, b"data\0")) == []
    assert honest.exchange(pack(Op.READ, b"data\0")) == [(Op.READ, 0, 0, b"")]


def test_impossible_indices_cost_the_guest_its_connection(daemon: Xenstored) -> None:
    give_home(daemon, 3)
    for offset in (xs_wire.REQ_PROD, xs_wire.RSP_CONS):
        guest = Guest(daemon, 3)
        guest.put(pack(Op.READ, b"data\0"))
        guest.set(offset, guest.get(offset) + RING_SIZE + 1)
        guest.turn()
        assert guest.get(xs_wire.ERROR) == RingError.RINGIDX


def test_our_own_indices_are_never_believed_from_the_page(daemon: Xenstored) -> None:
    give_home(daemon, 3)
    guest = Guest(daemon, 3)
    guest.put(pack(Op.READ, b"data\0"))
    guest.turn()
    produced = guest.get(xs_wire.RSP_PROD)
    guest.set(xs_wire.REQ_CONS, 12345)
    guest.set(xs_wire.RSP_PROD, 54321)
    guest.set(xs_wire.REQ_PROD, 21 + 21)
    guest.page[21:42] = pack(Op.READ, b"data\0")
    guest.turn()
    assert guest.get(xs_wire.REQ_CONS) == 42
    assert guest.get(xs_wire.RSP_PROD) == 2 * produced


def test_a_lost_guest_starts_over_with_the_reconnection_feature(daemon: Xenstored) -> None:
    give_home(daemon, 3)
    guest = Guest(daemon, 3)
    assert guest.get(xs_wire.SERVER_FEATURES) & xs_wire.SERVER_FEATURE_RECONNECTION
    guest.put(xs_wire.HEADER.pack(Op.READ, 0, 0, 1 << 30))
    guest.turn()
    guest.set(xs_wire.CONNECTION, xs_wire.Connection.RECONNECT)
    guest.turn()
    assert guest.get(xs_wire.CONNECTION) == xs_wire.Connection.CONNECTED
    assert guest.get(xs_wire.ERROR) == RingError.NONE
    assert guest.exchange(pack(Op.READ, b"data\0")) == [(Op.READ, 0, 0, b"")]


def test_a_guest_that_fetches_no_answers_is_not_listened_to(daemon: Xenstored) -> None:
    give_home(daemon, 3)
    guest = Guest(daemon, 3)
    flood = pack(Op.READ, b"data\0") * 20000
    accepted = 0
    for _ in range(1000):
        accepted += guest.put(flood[accepted : accepted + RING_SIZE])
        guest.turn()
    assert accepted < 5 * RING_SIZE
    assert not guest.ring.wants_turn


def test_events_that_nobody_fetches_are_bounded(daemon: Xenstored) -> None:
    give_home(daemon, 3)
    guest = Guest(daemon, 3)
    guest.exchange(pack(Op.WATCH, b"data\0t\0"))
    dom0 = Client(daemon)
    for _ in range(1000):
        dom0.ok(Op.WRITE, b"/local/domain/3/data/same\0x")
    guest.turn()
    assert len(unpack(guest.take())) == 1, "equal events that wait are one event"
    long_name = b"n" * 1900
    for number in range(2000):
        dom0.ok(Op.WRITE, b"/local/domain/3/data/%b%d\0x" % (long_name, number))
        dom0.ok(Op.RM, b"/local/domain/3/data/%b%d\0" % (long_name, number))
    guest.turn()
    assert guest.get(xs_wire.ERROR) == RingError.COMM
    assert not guest.ring.output_waiting


@given(st.data())
def test_a_guest_can_write_anything_anywhere_and_another_still_gets_its_answers(data: st.DataObject) -> None:
    daemon = Xenstored()
    give_home(daemon, 3)
    give_home(daemon, 4)
    hostile, honest = Guest(daemon, 3), Guest(daemon, 4)
    rng = random.Random(data.draw(st.integers(0, 2**32)))
    for _ in range(data.draw(st.integers(1, 20))):
        kind = rng.randrange(4)
        if kind == 0:
            hostile.put(rng.randbytes(rng.randrange(1024)))
        elif kind == 1:
            hostile.put(pack(rng.randrange(24), rng.randbytes(rng.randrange(40)), rng.randrange(3)))
        elif kind == 2:
            hostile.page[rng.randrange(4096)] = rng.randrange(256)
        else:
            hostile.set(2048 + 4 * rng.randrange(7), rng.choice([0, 1, 1024, 2**31, 2**32 - 1]))
        hostile.turn()
        assert honest.exchange(pack(Op.WRITE, b"data/x\0ok") + pack(Op.READ, b"data/x\0"))[1][3] == b"ok"


def events_of_all_lengths(daemon: Xenstored, guest: Guest) -> list[bytes]:
    """Have the guest hear of many changes at once, far more than its ring holds; their paths."""
    dom0 = Client(daemon)
    guest.exchange(pack(Op.WATCH, b"data\0t\0"))
    names = [b"data/" + b"n" * (number % 60) + b"%d" % number for number in range(300)]
    dom0.ok(Op.WRITE, b"/local/domain/1/data\0")
    dom0.ok(Op.SET_PERMS, b"/local/domain/1/data\0n1\0")
    guest.exchange(b"")
    for name in names:
        dom0.ok(Op.WRITE, b"/local/domain/1/" + name + b"\0")
    return names


def test_a_guest_that_says_only_that_its_ring_was_full_gets_everything(daemon: Xenstored) -> None:
    """As Linux does: it sends no event after it has emptied a ring that was not full."""
    guest = Guest(daemon, 1)
    names = events_of_all_lengths(daemon, guest)
    received = b""
    full = True
    while full:
        guest.turn()
        full = guest.get(xs_wire.RSP_PROD) - guest.get(xs_wire.RSP_CONS) == RING_SIZE
        received += guest.take()
    assert heard(unpack(received)) == names


def test_a_guest_that_reads_while_its_ring_is_filled_gets_everything(
    daemon: Xenstored, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It saw a ring that was not full, so that no event of its comes; what was taken from it meanwhile must be used."""
    guest = Guest(daemon, 1)
    names = events_of_all_lengths(daemon, guest)
    received: list[bytes] = []
    sent = guest.ring.sent

    def taken_at_once(count: int) -> None:
        sent(count)
        received.append(guest.take())

    monkeypatch.setattr(guest.ring, "sent", taken_at_once)
    guest.turn()
    assert heard(unpack(b"".join(received))) == names


_READS: Final = """
import mmap, sys
words = memoryview(mmap.mmap(int(sys.argv[1]), 4096)).cast("I")
consumed, produced = int(sys.argv[2]) >> 2, int(sys.argv[3]) >> 2
before = 0, 0
print("ready", flush=True)
while not words[1000]:
    now = words[consumed], words[produced]
    assert now[0] >= before[0] and now[1] >= before[1], (before, now)
    before = now
"""


def test_another_vcpu_sees_each_index_before_or_after_never_between(daemon: Xenstored) -> None:
    """One that reads while dom0 writes: Linux takes an index that is nonsense for a broken ring, and starts over."""
    descriptor = os.memfd_create("ring")
    os.ftruncate(descriptor, 4096)
    with mmap.mmap(descriptor, 4096) as page:
        guest = Guest(daemon, 1, page=memoryview(page))
        arguments = [str(number) for number in (descriptor, xs_wire.REQ_CONS, xs_wire.RSP_PROD)]
        command = [sys.executable, "-c", _READS, *arguments]
        with subprocess.Popen(command, pass_fds=[descriptor], stdout=subprocess.PIPE, text=True) as reader:
            assert reader.stdout is not None
            assert reader.stdout.readline() == "ready\n"
            for _ in range(10_000):
                guest.exchange(pack(Op.DIRECTORY, b"/\0"))
            guest.set(4000, 1)
            assert reader.wait(60) == 0
        guest.ring.detach()
        guest.page.release()
    os.close(descriptor)


# --- what a front-end hears of its own writes


@pytest.fixture
def frontend(daemon: Xenstored) -> Guest:
    """A domain with a device, of whose directory it hears."""
    guest = Guest(daemon, 1)
    dom0 = Client(daemon)
    dom0.ok(Op.WRITE, b"/local/domain/1/device/console/1/state\x001")
    dom0.ok(Op.SET_PERMS, b"/local/domain/1/device/console/1\0n1\0")
    dom0.ok(Op.SET_PERMS, b"/local/domain/1/device/console/1/state\0n1\0")
    guest.exchange(pack(Op.WATCH, b"device\0t\0"))
    return guest


def heard(messages: list[Message]) -> list[bytes]:
    """The paths of the events among these."""
    return [data.split(b"\0")[0] for kind, _, _, data in messages if kind == Op.WATCH_EVENT]


def test_a_front_end_hears_of_its_own_writes_later(frontend: Guest) -> None:
    assert heard(frontend.exchange(pack(Op.WRITE, b"device/console/1/ring-ref\x008"))) == []
    assert frontend.alarms == [OWN_EVENTS_WAIT]
    frontend.now = OWN_EVENTS_WAIT
    assert heard(frontend.exchange(b"")) == [b"device/console/1/ring-ref"]
    assert heard(frontend.exchange(b"")) == []


def test_a_front_end_hears_of_what_others_write_at_once(frontend: Guest, daemon: Xenstored) -> None:
    Client(daemon).ok(Op.WRITE, b"/local/domain/1/device/console/1/state\x006")
    assert heard(frontend.exchange(b"")) == [b"device/console/1/state"]


def test_a_domain_hears_of_its_other_writes_at_once(daemon: Xenstored) -> None:
    guest = Guest(daemon, 1)
    dom0 = Client(daemon)
    dom0.ok(Op.WRITE, b"/local/domain/1/data\0")
    dom0.ok(Op.SET_PERMS, b"/local/domain/1/data\0n1\0")
    guest.exchange(pack(Op.WATCH, b"data\0t\0"))
    assert heard(guest.exchange(pack(Op.WRITE, b"data/a\x001"))) == [b"data/a"]


def test_a_front_end_does_not_hear_of_them_while_it_is_about_to_switch(frontend: Guest) -> None:
    """Else Linux 7 may see the state before in the store and the one after in its driver, and unplugs the device."""
    frontend.exchange(pack(Op.WRITE, b"device/console/1/ring-ref\x008"))
    number = frontend.exchange(pack(Op.TRANSACTION_START, b"\0"))[0][3][:-1]
    frontend.now = 2 * OWN_EVENTS_WAIT
    assert heard(frontend.exchange(pack(Op.WRITE, b"device/console/1/state\x003", int(number)))) == []
    told = heard(frontend.exchange(pack(Op.TRANSACTION_END, b"T\0", int(number))))
    assert told == [b"device/console/1/ring-ref", b"device/console/1/state"]


def test_a_transaction_that_never_ends_does_not_keep_events(frontend: Guest) -> None:
    frontend.exchange(pack(Op.TRANSACTION_START, b"\0"))
    frontend.exchange(pack(Op.WRITE, b"device/console/1/ring-ref\x008"))
    frontend.now = OWN_EVENTS_WAIT_MOST
    assert heard(frontend.exchange(b"")) == [b"device/console/1/ring-ref"]


def test_own_events_that_wait_travel_and_are_bounded(frontend: Guest) -> None:
    names = [b"device/console/1/%d" % number for number in range(OWN_EVENTS_MOST + 8)]
    told = heard(frontend.exchange(b"".join(pack(Op.WRITE, name + b"\0") for name in names)))
    assert told == names[OWN_EVENTS_MOST:]
    assert len(frontend.ring.state().output) == OWN_EVENTS_MOST


def test_a_watch_that_is_gone_says_nothing_more(frontend: Guest) -> None:
    frontend.exchange(pack(Op.WRITE, b"device/console/1/ring-ref\x008"))
    frontend.exchange(pack(Op.UNWATCH, b"device\0t\0"))
    frontend.now = OWN_EVENTS_WAIT
    assert heard(frontend.exchange(b"")) == []
