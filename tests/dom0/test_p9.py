"""The 9pfs back-end against front-ends that the test plays, good ones and hostile ones."""

from __future__ import annotations

import os
import random
import signal
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from xenolith.abi import p9
from xenolith.abi.xenbus import XenbusState as S
from xenolith.dom0.backends.p9 import MAX_RING_ORDER, P9Backend
from xenolith.dom0.shares import ShareError, ShareSpec
from xenolith.dom0.shares.relay import MAX_IN_FLIGHT, Relay
from xenolith.dom0.xenbus import Device, Xenbus
from xenolith.dom0.xenstore import XenstoreService

from .frontends import DEADLINE_SECONDS, PAGE, FakeDom0, Follower, running_store, state
from .ninep import attach, message, needs_diod, text, u32, version, walk
from .test_shares import FUZZED, any_message

pytestmark = needs_diod
DOMID = 7
ORDER = 2
_MASK = (1 << 32) - 1


class Ring:
    """One ring, from the front-end's side."""

    def __init__(self, dom0: FakeDom0, number: int, order: int) -> None:
        self.dom0 = dom0
        self.ref, self.port = 100 * (number + 1), 3 + number
        self.words = memoryview(dom0.grant(self.ref)).cast("I")
        self.words[p9.RING_ORDER] = order
        self.frames = []
        for index in range(1 << order):
            self.words[p9.FIRST_REF + index] = self.ref + 1 + index
            self.frames.append(dom0.grant(self.ref + 1 + index))
        self.half = len(self.frames) // 2
        self.size = self.half * PAGE

    def write(self, data: bytes) -> None:
        at = self.words[p9.OUT_PROD]
        done = 0
        while done < len(data):
            place = (at + done) % self.size
            piece = data[done : done + PAGE - place % PAGE]
            self.frames[self.half + place // PAGE][place % PAGE : place % PAGE + len(piece)] = piece
            done += len(piece)
        self.words[p9.OUT_PROD] = at + len(data) & _MASK

    def room(self) -> int:
        return self.size - (self.words[p9.OUT_PROD] - self.words[p9.OUT_CONS] & _MASK)

    def has(self, count: int) -> bool:
        return (self.words[p9.IN_PROD] - self.words[p9.IN_CONS] & _MASK) >= count

    def read(self, count: int) -> bytes:
        at = self.words[p9.IN_CONS]
        data = bytes(self.frames[(at + i) % self.size // PAGE][(at + i) % PAGE] for i in range(count))
        self.words[p9.IN_CONS] = at + count & _MASK
        return data

    def answer(self) -> bytes:
        with self.dom0.notified:
            assert self.dom0.notified.wait_for(lambda: self.has(7), DEADLINE_SECONDS)
        size = struct.unpack("<I", head := self.read(4))[0]
        return head + self.read(size - 4)

    def ask(self, request: bytes) -> bytes:
        self.write(request)
        self.dom0.event()
        return self.answer()


class Frontend:
    def __init__(self, store: XenstoreService, folder: Path, *, order: int = ORDER, **changes: str) -> None:
        self.store = store
        self.dom0 = FakeDom0()
        self.xenbus = Xenbus(store, self.dom0.log)
        backend = P9Backend(self.dom0.hypercalls, DOMID, ShareSpec(number=0, tag="t", path=folder))
        self.device: Device[P9Backend] = self.xenbus.plug(DOMID, 0, backend, *backend.nodes())
        self.rings = [Ring(self.dom0, number, order) for number in range(2)]
        self._state = Follower(store, f"{self.device.directory}/state")
        self.connect(**changes)

    def connect(self, **changes: str) -> None:
        nodes = {"version": "1", "num-rings": "2"}
        for number, ring in enumerate(self.rings):
            nodes |= {f"ring-ref{number}": str(ring.ref), f"event-channel-{number}": str(ring.port)}
        for name, value in {**nodes, **changes}.items():
            self.store.write(f"{self.device.frontend}/{name.replace('_', '-')}", value)
        self.says(S.INITIALISED)

    def says(self, value: S) -> None:
        self.store.write(f"{self.device.frontend}/state", state(value))

    def sees(self, value: S) -> None:
        self._state.wait(state(value))

    def begin(self) -> Ring:
        ring = self.rings[0]
        assert ring.ask(version())[4] == p9.TVERSION + 1
        assert ring.ask(message(p9.TATTACH, 1, attach(0)))[4] == p9.TATTACH + 1
        return ring

    def gone(self) -> None:
        """It is closed, and nothing of it is left."""
        self.device.stop()
        assert self.dom0.mapped == {} and {3, 4} <= self.dom0.unbound


@pytest.fixture
def store() -> Iterator[XenstoreService]:
    with running_store() as made:
        yield made


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared/file").write_bytes(random.Random(1).randbytes(40000))
    return tmp_path / "shared"


@pytest.fixture
def front(store: XenstoreService, folder: Path) -> Iterator[Frontend]:
    made = Frontend(store, folder)
    made.sees(S.CONNECTED)
    yield made
    made.gone()


def test_what_the_device_offers_and_does_not_tell(front: Frontend, folder: Path) -> None:
    read, directory = front.store.read, front.device.directory
    assert read(f"{directory}/versions") == "1" and int(read(f"{directory}/max-rings")) >= 2
    assert read(f"{front.device.frontend}/tag") == "t"
    assert str(folder) not in "".join(read(f"{directory}/{name}") for name in front.store.directory(directory))


def test_a_file_is_read_through_both_rings_and_around_their_ends(front: Frontend, folder: Path) -> None:
    ring = front.begin()
    ring.ask(message(p9.TWALK, 1, walk(0, 1, "file")))
    ring.ask(message(p9.TLOPEN, 1, u32(1, 0)))
    data = b""
    while len(data) < 40000:
        ring = front.rings[len(data) % 2]
        answer = ring.ask(message(p9.TREAD, 1, u32(1) + struct.pack("<Q", len(data)) + u32(3001)))
        assert answer[4] == p9.TREAD + 1
        data += answer[11:]
    assert data == (folder / "file").read_bytes()


def test_a_second_mount_begins_anew(front: Frontend) -> None:
    for _ in range(2):
        ring = front.begin()
        assert ring.ask(message(p9.TWALK, 1, walk(0, 1, "file")))[4] == p9.TWALK + 1


def test_a_guest_that_begins_anew_all_the_time_waits(front: Frontend, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each session has a server of its own, and starting those is the host's work."""
    now = [time.monotonic() + 60]
    pauses: list[float] = []

    def sleep(seconds: float) -> None:
        pauses.append(seconds)
        now[0] += seconds

    monkeypatch.setattr("xenolith.dom0.backends.p9.time", SimpleNamespace(monotonic=lambda: now[0], sleep=sleep))
    for _ in range(4):
        front.begin()
    assert pauses == [0.0, 0.25, 0.25], "the first session has the server that was there"


def test_what_was_written_is_there_when_the_device_goes(store: XenstoreService, folder: Path) -> None:
    front = Frontend(store, folder)
    front.sees(S.CONNECTED)
    ring = front.begin()
    ring.ask(message(p9.TWALK, 1, walk(0, 1)))
    ring.ask(message(p9.TLCREATE, 1, u32(1) + text("new") + u32(1, 0o644, 0)))
    for tag in range(2, 10):
        ring.write(message(p9.TWRITE, tag, u32(1) + struct.pack("<Q", (tag - 2) * 500) + u32(500) + bytes([tag]) * 500))
    front.dom0.event()
    front.says(S.CLOSING)
    front.sees(S.CLOSING)
    front.says(S.CLOSED)
    front.sees(S.CLOSED)
    front.gone()
    assert (folder / "new").read_bytes() == b"".join(bytes([tag]) * 500 for tag in range(2, 10))


def test_a_front_end_that_comes_again_gets_a_new_session(front: Frontend) -> None:
    front.begin()
    front.says(S.CLOSED)
    front.sees(S.CLOSED)
    front.says(S.INITIALISING)
    front.sees(S.INIT_WAIT)
    front.rings = [Ring(front.dom0, number, ORDER) for number in range(2)]
    front.connect()
    front.sees(S.CONNECTED)
    front.begin()


def test_more_requests_than_may_be_under_way_wait_in_the_ring(front: Frontend) -> None:
    ring = front.begin()
    count = MAX_IN_FLIGHT * 3
    for tag in range(count):
        ring.write(message(p9.TGETATTR, tag, u32(0) + bytes(8)))
    front.dom0.event()
    tags = {struct.unpack_from("<H", ring.answer(), 5)[0] for _ in range(count)}
    assert tags == set(range(count)) and not front.dom0.lines


def test_one_event_is_enough_for_any_number_of_requests_that_no_server_sees(front: Frontend) -> None:
    ring = front.begin()
    count = MAX_IN_FLIGHT * 3 + 1
    ring.write(b"".join(message(p9.TCLUNK, tag, u32(77)) for tag in range(count)))
    front.dom0.event()
    assert sorted(struct.unpack_from("<H", ring.answer(), 5)[0] for _ in range(count)) == list(range(count))


def test_answers_wait_until_there_is_room_and_nobody_needs_to_tell(front: Frontend) -> None:
    ring = front.begin()
    ring.ask(message(p9.TWALK, 1, walk(0, 1, "file")))
    ring.ask(message(p9.TLOPEN, 1, u32(1, 0)))
    for tag in range(8):
        ring.write(message(p9.TREAD, tag, u32(1) + bytes(8) + u32(3000)))
    front.dom0.event()
    answers = [ring.answer() for _ in range(8)]
    assert all(len(answer) == 3011 for answer in answers)


# --- hostile front-ends -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"version": "2"},
        {"num_rings": "0"},
        {"num_rings": "9"},
        {"num_rings": "x"},
        {"ring_ref1": "999999"},
        {"ring_ref0": "-1"},
        {"event_channel_0": "77"},
        {"event_channel_1": "9" * 60},
    ],
    ids=lambda changes: "=".join(*changes.items()),
)
def test_nodes_that_make_no_sense_close_the_device(
    store: XenstoreService, folder: Path, changes: dict[str, str]
) -> None:
    front = Frontend(store, folder, **changes)
    front.sees(S.CLOSING)
    assert len(front.dom0.lines) == 1
    front.gone()


@pytest.mark.parametrize("order", [0, MAX_RING_ORDER + 1, 1 << 31])
def test_a_ring_of_an_impossible_size_closes_the_device(store: XenstoreService, folder: Path, order: int) -> None:
    front = Frontend(store, folder)
    front.sees(S.CONNECTED)
    front.says(S.CLOSED)
    front.sees(S.CLOSED)
    front.rings[1].words[p9.RING_ORDER] = order
    front.says(S.INITIALISING)
    front.sees(S.INIT_WAIT)
    front.says(S.INITIALISED)
    front.sees(S.CLOSING)
    front.gone()


def lie_about_requests(ring: Ring) -> None:
    ring.words[p9.OUT_PROD] = ring.words[p9.OUT_PROD] + ring.size + 1 & _MASK


def lie_about_answers(ring: Ring) -> None:
    ring.words[p9.IN_CONS] = ring.words[p9.IN_CONS] + 5 & _MASK
    ring.write(message(p9.TGETATTR, 1, u32(0) + bytes(8)))


def send_a_message_of_no_size(ring: Ring) -> None:
    ring.write(bytes(7))


def send_a_message_larger_than_the_ring(ring: Ring) -> None:
    ring.write(struct.pack("<IBH", ring.size + 1, p9.TGETATTR, 1))


def send_two_of_a_tag(ring: Ring) -> None:
    ring.write(message(p9.TGETATTR, 1, u32(0) + bytes(8)) * 2)


@pytest.mark.parametrize(
    "lie",
    [
        lie_about_requests,
        lie_about_answers,
        send_a_message_of_no_size,
        send_a_message_larger_than_the_ring,
        send_two_of_a_tag,
    ],
)
def test_a_lie_closes_the_device_and_leaves_nothing(store: XenstoreService, folder: Path, lie: object) -> None:
    front = Frontend(store, folder)
    front.sees(S.CONNECTED)
    ring = front.begin()
    assert callable(lie)
    lie(ring)
    front.dom0.event()
    front.sees(S.CLOSING)
    assert len(front.dom0.lines) == 1
    front.gone()


def test_a_server_that_dies_closes_the_device(store: XenstoreService, folder: Path) -> None:
    front = Frontend(store, folder)
    front.sees(S.CONNECTED)
    front.begin()
    server = front.device.backend._server
    assert server is not None
    os.kill(server.pid, signal.SIGKILL)
    front.sees(S.CLOSING)
    assert "has ended" in front.dom0.lines[0]
    front.gone()


def test_noise_in_the_ring_hurts_nobody_else(store: XenstoreService, folder: Path) -> None:
    """And afterwards no process, thread, descriptor or grant is left."""
    before = set(os.listdir("/proc/self/fd")), threading.active_count()
    dice = random.Random(9)
    for _ in range(6):
        front = Frontend(store, folder)
        front.sees(S.CONNECTED)
        ring = front.begin()
        for tag in range(40):
            kind = dice.choice(list(p9.FIELDS))
            if kind != p9.TVERSION:
                ring.write(message(kind, tag, dice.randbytes(dice.randrange(60))))
        front.dom0.event()
        ring.words[p9.IN_CONS] = ring.words[p9.IN_PROD]
        ring.write(dice.randbytes(300))
        front.dom0.event()
        front.sees(S.CLOSING)
        server = front.device.backend._server
        assert server is None
        front.gone()
        front.xenbus.remove(front.device)
        front._state.close()
    assert (set(os.listdir("/proc/self/fd")), threading.active_count()) == before
    assert (folder / "file").read_bytes() == random.Random(1).randbytes(40000)


class Imagined:
    """In place of a server: answers each request at once, with success or an error and bytes of no meaning."""

    pid = 0
    requests = 0

    def __init__(self, folder: Path, writable: bool) -> None:
        self._dice = random.Random(5)

    def start(self, answered: Callable[[bytes | None], None]) -> None:
        self._answered = answered

    def send(self, request: bytes) -> None:
        size, kind, tag = p9.HEADER.unpack_from(request)
        assert size == len(request) and kind in p9.FIELDS
        Imagined.requests += 1
        failed = self._dice.random() < 0.3
        names = request[15:17] if kind == p9.TWALK else b"\0\0"  # all found
        body = names + bytes(self._dice.randrange(40, 400))
        self._answered(message(p9.RLERROR, tag, u32(5)) if failed else message(kind + 1, tag, body))

    def close(self) -> None:
        pass


def test_a_hundred_thousand_messages_of_no_sense_are_answered_or_end_the_device(
    store: XenstoreService, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("xenolith.dom0.backends.p9.Server", Imagined)
    before = set(os.listdir("/proc/self/fd")), threading.active_count()
    dice = random.Random(2026)
    sent = answers = endings = 0
    while sent < FUZZED:
        front = Frontend(store, folder, order=MAX_RING_ORDER)
        front.sees(S.CONNECTED)
        made = Relay(b"/share", writable=True, owner=None)  # for its list of fids, to hit some
        made.fids.update(range(8))
        ring = front.rings[dice.randrange(2)]
        ring.write(b"".join([version(), *(message(p9.TATTACH, 60000 + fid, attach(fid)) for fid in range(8))]))
        closed = False
        while not closed and sent < FUZZED:
            noise = any_message(dice, made, broken=0.0002)
            if noise[4] == p9.TVERSION and dice.random() < 0.98:
                continue
            if noise[4] != p9.TVERSION and dice.random() < 0.9998:
                noise = noise[:5] + struct.pack("<H", sent % 60000) + noise[7:]
            while not closed and (sent % 50 == 0 or ring.room() < len(noise)):
                front.dom0.event()
                with front.dom0.notified:
                    front.dom0.notified.wait(0.01)
                answers += ring.has(1)
                ring.words[p9.IN_CONS] = ring.words[p9.IN_PROD]
                closed = front.device.state is not S.CONNECTED
                if ring.room() > ring.size // 2:
                    break
            ring.write(noise)
            sent += 1
        endings += closed
        front.gone()
        front.xenbus.remove(front.device)
        front._state.close()
    assert answers > 100 and endings > 10 and Imagined.requests > FUZZED // 20
    assert (set(os.listdir("/proc/self/fd")), threading.active_count()) == before


def test_a_folder_that_is_none_is_no_device(store: XenstoreService, tmp_path: Path) -> None:
    with pytest.raises(ShareError):
        P9Backend(FakeDom0().hypercalls, DOMID, ShareSpec(number=0, tag="t", path=tmp_path / "absent"))
