"""The block back-end against front-ends that the test plays, good ones and hostile ones."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from xenolith.abi import blkif
from xenolith.abi.io_ring import REQ_EVENT, REQ_PROD, RSP_EVENT, RSP_PROD
from xenolith.abi.xenbus import XenbusState as S
from xenolith.dom0.backends.block import MAX_PERSISTENT_GRANTS, BlockBackend, VbdSpec
from xenolith.dom0.disks import DiskSource
from xenolith.dom0.rings import SharedRing
from xenolith.dom0.xenbus import Device, Xenbus
from xenolith.dom0.xenstore import XenstoreService
from xenolith.machine import native

from .frontends import DEADLINE_SECONDS, FakeDom0, Follower, running_store, state

DOMID, RING_REF, PORT = 7, 8, 3
SECTORS = 2048
OKAY, ERROR, UNSUPPORTED = blkif.BLKIF_RSP_OKAY, blkif.BLKIF_RSP_ERROR, blkif.BLKIF_RSP_EOPNOTSUPP
READ, WRITE, FLUSH, DISCARD = (
    blkif.BLKIF_OP_READ,
    blkif.BLKIF_OP_WRITE,
    blkif.BLKIF_OP_FLUSH_DISKCACHE,
    blkif.BLKIF_OP_DISCARD,
)
Segment = tuple[int, int, int]  # reference, first and last sector


def transfer(operation: int, number: int, sector: int, segments: list[Segment]) -> bytes:
    head = blkif.REQUEST.pack(operation, len(segments), 0, number, sector)
    return head + b"".join(blkif.SEGMENT.pack(*segment) for segment in segments)


def indirect(operation: int, number: int, sector: int, count: int, *refs: int) -> bytes:
    refs = (*refs, *[0] * (8 - len(refs)))
    return blkif.INDIRECT.pack(blkif.BLKIF_OP_INDIRECT, operation, count, number, sector, 0, *refs)


class Frontend:
    """A front-end of a disk in `path`."""

    def __init__(
        self, store: XenstoreService, path: Path, *, writable: bool = True, persistent: bool = False, domid: int = DOMID
    ) -> None:
        self.path = path
        self.store = store
        self.dom0 = FakeDom0()
        self.xenbus = Xenbus(store, self.dom0.log)
        source = DiskSource(path=path, writable=writable)
        backend = BlockBackend(self.dom0.hypercalls, domid, VbdSpec(number=51712, name="xvda", source=source))
        self.device: Device[BlockBackend] = self.xenbus.plug(domid, 51712, backend, *backend.nodes())
        self.ring = SharedRing(memoryview(self.dom0.grant(RING_REF)), blkif.REQUEST_SIZE)
        self.ring.words[REQ_EVENT] = self.ring.words[RSP_EVENT] = 1
        self.consumed = self.produced = 0
        nodes = {"ring-ref": str(RING_REF), "event-channel": str(PORT), "protocol": "x86_64-abi"}
        if persistent:
            nodes["feature-persistent"] = "1"
        for name, value in nodes.items():
            store.write(f"{self.device.frontend}/{name}", value)
        self._state = Follower(store, f"{self.device.directory}/state")
        self.says(S.INITIALISED)

    def says(self, value: S) -> None:
        self.store.write(f"{self.device.frontend}/state", state(value))

    def sees(self, value: S) -> None:
        self._state.wait(state(value))

    def submit(self, *requests: bytes) -> None:
        for request in requests:
            at = self.ring.offset(self.produced)
            self.ring.bytes[at : at + len(request)] = request
            self.produced += 1
        self.ring.words[REQ_PROD] = self.produced
        self.dom0.event()

    def responses(self, count: int) -> list[tuple[int, int, int]]:
        """Wait for this many: (number, operation, status)."""
        wanted = self.consumed + count
        with self.dom0.notified:
            self.ring.words[RSP_EVENT] = wanted
            assert self.dom0.notified.wait_for(lambda: self.ring.words[RSP_PROD] >= wanted, DEADLINE_SECONDS)
        got = []
        for index in range(self.consumed, wanted):
            at = self.ring.offset(index)
            got.append(blkif.RESPONSE.unpack_from(self.ring.bytes, at))
        self.consumed = wanted
        return got

    def ask(self, *requests: bytes) -> list[int]:
        """Submit and wait; each one's status."""
        self.ring.words[RSP_EVENT] = self.consumed + len(requests)
        self.submit(*requests)
        return [status for _, _, status in self.responses(len(requests))]


@pytest.fixture
def store() -> Iterator[XenstoreService]:
    with running_store() as made:
        yield made


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(random.Random(3).randbytes(SECTORS * 512))
    return path


WAYS = {
    "native": {"native": True},
    "mapped anew": {"native": False},
    "persistent": {"native": False, "persistent": True},
}
READ_ONLY = {
    "native, read-only": {"native": True, "writable": False},
    "read-only": {"native": False, "writable": False},
}


@pytest.fixture(params=WAYS)
def front(
    store: XenstoreService, image: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Frontend]:
    way = {**WAYS, **READ_ONLY}[request.param].copy()
    if not way.pop("native"):
        monkeypatch.setenv("XENOLITH_NATIVE", "off")
    elif reason := native.missing():
        pytest.skip(f"no native code here: {reason}")
    made = Frontend(store, image, **way)
    made.sees(S.CONNECTED)
    yield made
    made.device.stop()
    assert made.dom0.mapped == {}, "every grant is given back"
    assert PORT in made.dom0.unbound


def test_what_the_device_offers_and_is(front: Frontend) -> None:
    read = front.store.read
    directory = front.device.directory
    assert read(f"{directory}/sectors") == str(SECTORS)
    assert read(f"{directory}/sector-size") == "512"
    assert read(f"{directory}/info") == "0"
    assert read(f"{directory}/feature-flush-cache") == "1"
    assert read(f"{directory}/feature-persistent") == str(int(native.missing() is not None))
    assert read(f"{directory}/feature-discard") == "1"
    assert str(front.path) not in "".join(read(f"{directory}/{name}") for name in front.store.directory(directory))


def test_reads_fill_the_named_parts_of_granted_frames(front: Frontend) -> None:
    data = front.path.read_bytes()
    one, two = front.dom0.grant(20), front.dom0.grant(21)
    assert front.ask(transfer(READ, 1, 10, [(20, 2, 5), (21, 0, 7)])) == [OKAY]
    assert bytes(one) == bytes(1024) + data[10 * 512 : 14 * 512] + bytes(1024)
    assert bytes(two) == data[14 * 512 : 22 * 512]


def test_writes_go_to_the_file(front: Frontend) -> None:
    before = front.path.read_bytes()
    front.dom0.grant(20, b"ab" * 2048)
    assert front.ask(transfer(WRITE, 1, 100, [(20, 1, 1), (20, 7, 7)]), transfer(FLUSH, 2, 0, [])) == [OKAY, OKAY]
    assert front.path.read_bytes() == before[: 100 * 512] + b"ab" * 512 + before[102 * 512 :]
    statistics = front.device.backend.statistics
    assert (statistics.writes, statistics.written_bytes, statistics.flushes, statistics.reads) == (1, 1024, 1, 0)


def test_indirect_requests_move_a_mebibyte(front: Frontend) -> None:
    frames = [front.dom0.grant(100 + number) for number in range(256)]
    front.dom0.grant(30, b"".join(blkif.SEGMENT.pack(100 + number, 0, 7) for number in range(256)))
    assert front.ask(indirect(READ, 1, 0, 256, 30)) == [OKAY]
    assert b"".join(frames) == front.path.read_bytes()
    for frame in frames:
        frame[:] = bytes(reversed(frame))
    assert front.ask(indirect(WRITE, 2, 0, 256, 30)) == [OKAY]
    assert front.path.read_bytes() == b"".join(frames)


def test_the_answer_to_an_indirect_request_has_the_real_operation(front: Frontend) -> None:
    front.dom0.grant(20)
    front.dom0.grant(30, blkif.SEGMENT.pack(20, 0, 7))
    front.submit(indirect(READ, 0xABCDEF, 0, 1, 30))
    assert front.responses(1) == [(0xABCDEF, READ, OKAY)]


def test_a_full_ring_is_answered_completely_and_in_order(front: Frontend) -> None:
    front.dom0.grant(20)
    for start in range(0, 320, 32):
        requests = [transfer(READ, start + number, number, [(20, 0, 0)]) for number in range(32)]
        front.ring.words[RSP_EVENT] = front.consumed + 32
        front.submit(*requests)
        assert front.responses(32) == [(start + number, READ, OKAY) for number in range(32)]


def test_a_discarded_range_reads_as_zeros(front: Frontend) -> None:
    assert front.ask(blkif.DISCARD.pack(DISCARD, 0, 0, 1, 8, 64)) == [OKAY]
    assert front.path.read_bytes()[8 * 512 : 72 * 512] == bytes(64 * 512)
    assert front.ask(blkif.DISCARD.pack(DISCARD, blkif.BLKIF_DISCARD_SECURE, 0, 2, 8, 64)) == [UNSUPPORTED]


def test_a_flush_with_data_writes_it(front: Frontend) -> None:
    front.dom0.grant(20, b"z" * 4096)
    assert front.ask(transfer(FLUSH, 1, 0, [(20, 0, 7)])) == [OKAY]
    assert front.path.read_bytes()[:4096] == b"z" * 4096


@pytest.mark.parametrize("front", ["persistent"], indirect=True)
def test_persistent_grants_stay_mapped_up_to_a_limit(front: Frontend) -> None:
    for ref in range(100, 100 + MAX_PERSISTENT_GRANTS + 44):
        front.dom0.grant(ref)
    for _ in range(2):
        for first in range(100, 100 + MAX_PERSISTENT_GRANTS + 44, 11):
            assert front.ask(transfer(READ, 1, 0, [(ref, 0, 7) for ref in range(first, first + 11)])) == [OKAY]
    assert len(front.dom0.mapped) == 1 + MAX_PERSISTENT_GRANTS, "the ring, and what is kept"
    assert front.dom0.maps == 1 + MAX_PERSISTENT_GRANTS + 2 * 44


@pytest.mark.parametrize("front", ["native", "mapped anew"], indirect=True)
def test_grants_that_are_not_persistent_are_given_back_before_the_answer(front: Frontend) -> None:
    front.dom0.grant(20)
    assert front.ask(transfer(READ, 1, 0, [(20, 0, 7)])) == [OKAY]
    assert list(front.dom0.mapped.values()) == [RING_REF]


@pytest.mark.parametrize("front", ["native, read-only", "read-only"], indirect=True)
def test_a_read_only_disk_stays_as_it_is(front: Frontend) -> None:
    before = front.path.read_bytes()
    assert front.store.read(f"{front.device.directory}/info") == str(blkif.VDISK_READONLY)
    front.dom0.grant(20, b"w" * 4096)
    front.dom0.grant(30, blkif.SEGMENT.pack(20, 0, 7))
    assert front.ask(
        transfer(WRITE, 1, 0, [(20, 0, 7)]),
        transfer(FLUSH, 2, 0, [(20, 0, 7)]),
        indirect(WRITE, 3, 0, 1, 30),
        blkif.DISCARD.pack(DISCARD, 0, 0, 4, 0, 8),
        transfer(FLUSH, 5, 0, []),
        transfer(READ, 6, 0, [(20, 0, 7)]),
    ) == [ERROR, ERROR, ERROR, UNSUPPORTED, OKAY, OKAY]
    assert front.path.read_bytes() == before


NONSENSE = {
    "no segments": transfer(READ, 1, 0, []),
    "12 segments": blkif.REQUEST.pack(READ, 12, 0, 1, 0) + blkif.SEGMENT.pack(20, 0, 7) * 11,
    "255 segments": blkif.REQUEST.pack(WRITE, 255, 0, 1, 0) + blkif.SEGMENT.pack(20, 0, 7) * 11,
    "a segment that ends before it begins": transfer(READ, 1, 0, [(20, 5, 4)]),
    "a segment that leaves its frame": transfer(READ, 1, 0, [(20, 0, 8)]),
    "a frame that was not granted": transfer(READ, 1, 0, [(20, 0, 7), (999, 0, 7)]),
    "a read into a read-only grant": transfer(READ, 1, 0, [(21, 0, 7)]),
    "one sector too far": transfer(READ, 1, SECTORS - 7, [(20, 0, 7)]),
    "a sector number that wraps": transfer(WRITE, 1, (1 << 64) - 4, [(20, 0, 7)]),
    "a sector number that wraps in bytes": transfer(WRITE, 1, 1 << 55, [(20, 0, 7)]),
    "an indirect request of none": indirect(READ, 1, 0, 0, 30),
    "an indirect request of too many": indirect(READ, 1, 0, 257, 30),
    "an indirect request of an indirect request": indirect(blkif.BLKIF_OP_INDIRECT, 1, 0, 1, 30),
    "an indirect flush": indirect(FLUSH, 1, 0, 1, 30),
    "segments in a frame that was not granted": indirect(READ, 1, 0, 1, 998),
    "a discard too far": blkif.DISCARD.pack(DISCARD, 0, 0, 1, SECTORS, 1),
    "a discard that wraps": blkif.DISCARD.pack(DISCARD, 0, 0, 1, 8, (1 << 64) - 8),
    "a flush with 12 segments": blkif.REQUEST.pack(FLUSH, 12, 0, 1, 0),
}


@pytest.mark.parametrize("request_", NONSENSE.values(), ids=NONSENSE.keys())
def test_nonsense_is_answered_with_an_error_and_moves_nothing(front: Frontend, request_: bytes) -> None:
    before = front.path.read_bytes()
    frame = front.dom0.grant(20, b"untouched" * 400)
    front.dom0.grant(21)
    front.dom0.read_only.add(21)
    front.dom0.grant(30, blkif.SEGMENT.pack(20, 0, 7))
    assert front.ask(request_) == [ERROR]
    assert front.path.read_bytes() == before
    assert bytes(frame) == (b"untouched" * 400).ljust(4096, b"\0")
    assert front.ask(transfer(READ, 2, 0, [(20, 0, 7)])) == [OKAY], "the device goes on"


@pytest.mark.parametrize("operation", [2, 4, 7, 255])
def test_an_operation_that_there_is_not_is_unsupported(front: Frontend, operation: int) -> None:
    assert front.ask(transfer(operation, 1, 0, [])) == [UNSUPPORTED]


@pytest.mark.parametrize("claim", [33, 1000, 1 << 31, (1 << 32) - 1])
def test_a_producer_that_lies_closes_the_device(front: Frontend, claim: int) -> None:
    front.ring.words[REQ_PROD] = claim
    front.dom0.event()
    front.sees(S.CLOSING)
    assert front.dom0.mapped == {}
    assert "unanswered" in front.store.read(f"{front.device.directory}/error")
    front.says(S.CLOSED)
    front.sees(S.CLOSED)


@pytest.mark.parametrize(
    "nodes",
    [
        {"ring-ref": "777"},
        {"ring-ref": "4294967296"},
        {"ring-ref": ""},
        {"event-channel": "99"},
        {"event-channel": "-3"},
        {"protocol": "x86_32-abi"},
        {"protocol": "p" * 4096},
        {"feature-persistent": "2"},
    ],
)
def test_a_front_end_that_says_nonsense_gets_no_connection(
    store: XenstoreService, image: Path, nodes: dict[str, str]
) -> None:
    front = Frontend(store, image)
    front.sees(S.CONNECTED)
    front.says(S.INITIALISING)
    front.sees(S.INIT_WAIT)
    for name, value in nodes.items():
        store.write(f"{front.device.frontend}/{name}", value)
    front.says(S.INITIALISED)
    front.sees(S.CLOSING)
    assert front.dom0.mapped == {}
    assert PORT in front.dom0.unbound
    front.device.stop()


def test_a_failing_disk_is_the_guests_error_and_one_line_in_the_log(front: Frontend) -> None:
    front.dom0.grant(20)
    os.truncate(front.path, 4096)
    requests = [transfer(READ, number, 64, [(20, 0, 7)]) for number in range(5)]
    assert front.ask(*requests) == [ERROR] * 5
    assert len([line for line in front.dom0.lines if "cut off" in line]) == 1
    assert front.ask(transfer(READ, 9, 0, [(20, 0, 7)])) == [OKAY]
    assert front.device.backend.statistics.errors == 5


def test_a_file_that_vanished_fails_the_flush(front: Frontend) -> None:
    front.dom0.grant(20)
    front.path.unlink()
    assert front.ask(transfer(WRITE, 1, 0, [(20, 0, 7)]), transfer(FLUSH, 2, 0, [])) == [OKAY, ERROR]


def test_requests_before_the_connection_are_served(store: XenstoreService, image: Path) -> None:
    front = Frontend(store, image)
    front.dom0.grant(20)
    front.submit(transfer(READ, 5, 0, [(20, 0, 7)]))
    assert front.responses(1) == [(5, READ, OKAY)]
    front.device.stop()


def test_a_disconnect_midway_answers_what_was_taken_and_gives_all_back(front: Frontend) -> None:
    front.dom0.grant(20)
    front.submit(*[transfer(READ, number, 0, [(20, 0, 7)]) for number in range(32)])
    front.says(S.CLOSED)
    front.sees(S.CLOSED)
    assert front.dom0.mapped == {}
    assert front.ring.words[RSP_PROD] in (0, 32)


@pytest.mark.parametrize("seed", range(4))
def test_100000_random_requests_are_each_answered_and_leave_nothing(front: Frontend, seed: int) -> None:
    """All that a guest can put into entries, from almost right to noise, while it changes them at will."""
    rng = random.Random(seed)
    refs = list(range(20, 40))
    for ref in refs:
        front.dom0.grant(ref, rng.randbytes(4096))
    front.dom0.read_only.update(refs[::5])

    def fuzzed() -> bytes:
        kind = rng.randrange(8)
        if kind == 0:
            return rng.randbytes(112)
        segments = [
            (rng.choice(refs) if rng.random() < 0.9 else rng.getrandbits(32), rng.randrange(9), rng.randrange(9))
            for _ in range(rng.randrange(12))
        ]
        sector = rng.choice([0, rng.randrange(SECTORS), rng.getrandbits(64), SECTORS - 1])
        if kind == 1:
            return indirect(rng.randrange(8), rng.getrandbits(64), sector, rng.getrandbits(16), *rng.choices(refs, k=8))
        if kind == 2:
            count = rng.choice([0, 1, SECTORS, rng.getrandbits(64)])
            return blkif.DISCARD.pack(DISCARD, rng.getrandbits(8), 0, 7, sector, count)
        request = bytearray(transfer(rng.choice([READ, WRITE, FLUSH]), rng.getrandbits(64), sector, segments))
        if kind == 3:
            request[rng.randrange(len(request))] = rng.getrandbits(8)
        return bytes(request)

    done = 0
    while done < 100_000 // 8:
        count = rng.randrange(1, 33)
        front.ring.words[RSP_EVENT] = front.consumed + count
        front.submit(*[fuzzed() for _ in range(count)])
        front.ring.bytes[64 + rng.randrange(3584) :][:8] = rng.randbytes(8)  # changed after it was submitted
        front.responses(count)
        done += count
    assert front.device.failure is None
    assert front.path.stat().st_size == SECTORS * 512
    assert len(front.dom0.mapped) <= 1 + len(refs)


@pytest.mark.skipif(native.missing() is not None, reason="no native code here")
def test_native_code_answers_random_requests_as_python_does(
    store: XenstoreService, image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same requests to two devices: the same responses, frames, files and counts."""
    other = tmp_path / "other.img"
    other.write_bytes(image.read_bytes())
    rng = random.Random(11)
    ours = Frontend(store, image)
    monkeypatch.setenv("XENOLITH_NATIVE", "off")
    theirs = Frontend(store, other, domid=DOMID + 1)
    monkeypatch.delenv("XENOLITH_NATIVE")
    both = (ours, theirs)
    refs = list(range(20, 36))
    contents = {ref: rng.randbytes(4096) for ref in refs}
    for front in both:
        for ref in refs:
            front.dom0.grant(ref, contents[ref])
        front.dom0.read_only.add(refs[3])
        front.sees(S.CONNECTED)

    def segments(most: int) -> list[Segment]:
        return [
            (rng.choice(refs) if rng.random() < 0.98 else 5000, *rng.choice(((0, 7), (0, 7), (2, 5), (7, 7))))
            for _ in range(rng.randrange(most + 1))
        ]

    def request(number: int, sector: int) -> bytes:
        kind = rng.random()
        if kind < 0.15:
            table = b"".join(blkif.SEGMENT.pack(*segment) for segment in segments(40))
            for front in both:
                front.dom0.grant(60, table)
            return indirect(rng.choice([READ, WRITE, 7]), number, sector, rng.randrange(300), 60)
        if kind < 0.25:
            return blkif.DISCARD.pack(DISCARD, rng.randrange(2), 0, number, sector, rng.choice([0, 8, 4 * SECTORS]))
        return transfer(rng.choice([READ, READ, WRITE, WRITE, FLUSH, 9]), number, sector, segments(11))

    for _ in range(300):
        sector = rng.randrange(SECTORS + 20)
        requests = []
        for number in range(rng.randrange(1, 33)):
            requests.append(request(number, sector))
            if rng.random() < 0.5:
                sector += 8
        answers = []
        for front in both:
            front.ring.words[RSP_EVENT] = front.consumed + len(requests)
            front.submit(*requests)
            answers.append(front.responses(len(requests)))
        assert answers[0] == answers[1]
        for ref in refs:
            assert ours.dom0.frames[ref] == theirs.dom0.frames[ref]
        assert image.read_bytes() == other.read_bytes()
    assert ours.device.backend.statistics.values() == theirs.device.backend.statistics.values()
    assert ours.device.backend.statistics.errors > 100 and ours.device.backend.statistics.reads > 100
    for front in both:
        front.device.stop()
