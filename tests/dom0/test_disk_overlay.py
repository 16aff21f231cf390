"""Overlays: the base is untouched, snapshots keep what was, and what was flushed is there whatever dies."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from xenolith.dom0.disks import Buffers, DiskError, DiskFormat, DiskSource
from xenolith.dom0.disks.open import open_disk
from xenolith.dom0.disks.overlay import BLOCK, MAX_LAYERS, OverlayDisk, create_overlay
from xenolith.dom0.disks.raw import RawDisk

SECTORS = 203  # the last block is not whole


@pytest.fixture
def base(tmp_path: Path) -> Path:
    path = tmp_path / "base.img"
    path.write_bytes(random.Random(1).randbytes(SECTORS * 512))
    return path


def make(path: Path, base: Path, sectors: int = SECTORS, format: DiskFormat = DiskFormat.RAW) -> Path:
    create_overlay(path, DiskSource(path=base, format=format), sectors)
    return path


def opened(path: Path, writable: bool = True) -> OverlayDisk:
    disk = open_disk(DiskSource(path=path, format=DiskFormat.OVERLAY, writable=writable))
    assert isinstance(disk, OverlayDisk)
    return disk


def all_of(disk: OverlayDisk) -> bytes:
    data = bytearray(disk.sectors * 512)
    disk.read(0, [memoryview(data)])
    return bytes(data)


def test_an_overlay_begins_as_its_base_and_leaves_it_alone(tmp_path: Path, base: Path) -> None:
    before = base.read_bytes()
    disk = opened(make(tmp_path / "o", base))
    assert all_of(disk) == before
    disk.write(512, [memoryview(b"x" * 512)])
    disk.write(8192, [memoryview(b"y" * 8192)])
    expected = before[:512] + b"x" * 512 + before[1024:8192] + b"y" * 8192 + before[16384:]
    assert all_of(disk) == expected
    disk.close()
    assert base.read_bytes() == before
    disk = opened(tmp_path / "o")
    assert all_of(disk) == expected
    disk.close()
    assert (tmp_path / "o").stat().st_blocks * 512 <= 6 * BLOCK, "header, bitmap and three blocks"


def test_many_overlays_of_one_base(tmp_path: Path, base: Path) -> None:
    disks = [opened(make(tmp_path / str(number), base)) for number in range(5)]
    for number, disk in enumerate(disks):
        disk.write(0, [memoryview(bytes([number]) * 512)])
    for number, disk in enumerate(disks):
        assert all_of(disk) == bytes([number]) * 512 + base.read_bytes()[512:]
        disk.close()


def test_an_overlay_may_be_larger_than_its_base(tmp_path: Path, base: Path) -> None:
    disk = opened(make(tmp_path / "o", base, SECTORS + 100))
    assert all_of(disk) == base.read_bytes() + bytes(51200)
    disk.write((SECTORS + 50) * 512, [memoryview(b"z" * 512)])
    assert all_of(disk) == base.read_bytes() + bytes(25600) + b"z" * 512 + bytes(25088)
    disk.close()


def test_snapshots_keep_what_was_and_take_the_same_time_whatever_the_disk_holds(tmp_path: Path, base: Path) -> None:
    path = make(tmp_path / "disk", base)
    disk = opened(path)
    contents = []
    for number in range(4):
        disk.write(number * BLOCK, [memoryview(bytes([number]) * BLOCK * 2)])
        contents.append(all_of(disk))
        disk.snapshot(tmp_path / f"snapshot-{number}")
        assert path.stat().st_blocks <= 16, "a new overlay is empty"
        assert all_of(disk) == contents[-1]
    disk.write(0, [memoryview(b"last" * 1024)])
    last = all_of(disk)
    for number, content in enumerate(contents):  # while the disk is in use
        snapshot = opened(tmp_path / f"snapshot-{number}", writable=False)
        assert all_of(snapshot) == content
        snapshot.close()
        clone = opened(make(tmp_path / f"clone-{number}", tmp_path / f"snapshot-{number}", format=DiskFormat.OVERLAY))
        clone.write(0, [memoryview(b"c" * 512)])
        assert all_of(clone) == b"c" * 512 + content[512:]
        clone.close()
    disk.close()
    disk = opened(path)
    assert all_of(disk) == last
    disk.close()


def test_a_snapshot_that_cannot_be_kept_changes_nothing(tmp_path: Path, base: Path) -> None:
    path = make(tmp_path / "disk", base)
    disk = opened(path)
    disk.write(0, [memoryview(b"a" * 512)])
    (tmp_path / "taken").touch()
    for place in (tmp_path / "taken", tmp_path / "no" / "directory"):
        with pytest.raises(DiskError, match="snapshot"):
            disk.snapshot(place)
    disk.write(512, [memoryview(b"b" * 512)])
    assert all_of(disk)[:1024] == b"a" * 512 + b"b" * 512
    assert sorted(file.name for file in tmp_path.iterdir()) == ["base.img", "disk", "taken"]
    disk.close()


def test_a_frozen_layer_is_written_by_nobody(tmp_path: Path, base: Path) -> None:
    path = make(tmp_path / "disk", base)
    disk = opened(path)
    disk.snapshot(tmp_path / "kept")
    with pytest.raises(DiskError, match="in use"):
        opened(tmp_path / "kept")
    disk.close()


def test_an_overlay_to_throw_away_leaves_no_file(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    before = base.read_bytes()
    disk = open_disk(DiskSource(path=base, throw_away=True))
    disk.write(0, [memoryview(b"t" * 1024)])
    disk.flush()
    got = bytearray(2048)
    disk.read(0, [memoryview(got)])
    assert bytes(got) == b"t" * 1024 + before[1024:2048]
    assert list(tmp_path.iterdir()) == [base]
    disk.close()
    assert base.read_bytes() == before


def test_what_was_discarded_reads_as_zeros_not_as_the_base(tmp_path: Path, base: Path) -> None:
    disk = opened(make(tmp_path / "o", base))
    disk.write(BLOCK, [memoryview(b"d" * BLOCK * 4)])
    disk.discard(BLOCK * 2 + 512, BLOCK * 4)
    expected = bytearray(base.read_bytes())
    expected[BLOCK : BLOCK * 5] = b"d" * BLOCK * 4
    expected[BLOCK * 3 : BLOCK * 6] = bytes(BLOCK * 3)
    assert all_of(disk) == expected
    disk.close()
    disk = opened(tmp_path / "o")
    assert all_of(disk) == expected
    disk.close()


HEADERS = {  # that say what no overlay of ours says
    "deep": "[" * 4000,
    "infinite": '{"sectors": 1e999, "backing": null, "format": "raw"}',
    "vast": '{"sectors": 34359738369, "backing": null, "format": "raw"}',
    "nul": r'{"sectors": 203, "backing": "a\u0000b", "format": "raw"}',
    "surrogate": r'{"sectors": 203, "backing": "\ud800", "format": "raw"}',
}


@pytest.mark.parametrize(
    "damage",
    ["short", "magic", "json", "cut", "sectors", "format", "loop", "deep", "infinite", "vast", "nul", "surrogate"],
)
def test_a_damaged_overlay_is_refused_by_name(tmp_path: Path, base: Path, damage: str) -> None:
    path = make(tmp_path / "disk", base)
    data = path.read_bytes()
    if damage == "short":
        path.write_bytes(data[:1000])
    elif damage == "magic":
        path.write_bytes(b"?" + data[1:])
    elif damage == "json":
        path.write_bytes(data.replace(b'"sectors"', b'"sectors', 1))
    elif damage == "cut":
        path.write_bytes(data[:-4096])
    elif damage == "sectors":
        path.write_bytes(data.replace(b'"sectors": 203', b'"sectors": -03', 1))
    elif damage == "format":
        path.write_bytes(data.replace(b'"raw"', b'"sub"', 1))
    elif damage in HEADERS:
        header = HEADERS[damage].replace("BASE", str(base)).encode()
        path.write_bytes((data[: data.index(b"{")] + header).ljust(4096, b"\0") + data[4096:])
        if damage == "vast":
            os.truncate(path, 1 << 43)
    else:
        path.unlink()
        make(path, path, format=DiskFormat.OVERLAY)
    descriptors = len(os.listdir("/proc/self/fd"))
    with pytest.raises(DiskError, match=r"disk"):
        opened(path, writable=damage != "loop")
    assert len(os.listdir("/proc/self/fd")) == descriptors


def test_more_layers_than_can_be_told_apart_are_refused(tmp_path: Path, base: Path) -> None:
    path = make(tmp_path / "disk", base)
    disk = opened(path)
    for number in range(MAX_LAYERS - 1):
        disk.snapshot(tmp_path / f"s{number}")
    with pytest.raises(DiskError, match="layers"):
        disk.snapshot(tmp_path / "one too many")
    assert all_of(disk) == base.read_bytes()
    disk.close()


class Histories(RuleBasedStateMachine):
    """An overlay against a string of bytes, through writes, discards, flushes, snapshots and being opened again."""

    @initialize(seed=st.integers(0, 1 << 32))
    def begin(self, seed: int) -> None:
        import tempfile

        self.directory = tempfile.TemporaryDirectory()
        self.root = Path(self.directory.name)
        self.model = bytearray(random.Random(seed).randbytes(SECTORS * 512))
        (self.root / "base").write_bytes(self.model)
        self.disk = opened(make(self.root / "disk", self.root / "base"))
        self.snapshots: list[bytes] = []

    @rule(first=st.integers(0, SECTORS - 1), count=st.integers(1, 40), seed=st.integers(0, 255), cuts=st.integers(1, 3))
    def write(self, first: int, count: int, seed: int, cuts: int) -> None:
        count = min(count, SECTORS - first)
        data = random.Random(seed).randbytes(count * 512)
        step = -(-len(data) // cuts)
        self.disk.write(first * 512, [memoryview(data[at : at + step]) for at in range(0, len(data), step)])
        self.model[first * 512 : (first + count) * 512] = data

    @rule(first=st.integers(0, SECTORS - 1), count=st.integers(1, 40))
    def discard(self, first: int, count: int) -> None:
        end = min(first + count, SECTORS) * 512
        self.disk.discard(first * 512, end - first * 512)
        whole = -(-first * 512 // BLOCK) * BLOCK, end // BLOCK * BLOCK
        if whole[0] < whole[1]:
            self.model[whole[0] : whole[1]] = bytes(whole[1] - whole[0])

    @rule()
    def flush(self) -> None:
        self.disk.flush()

    @precondition(lambda self: len(self.snapshots) < 6)
    @rule()
    def snapshot(self) -> None:
        self.disk.snapshot(self.root / f"s{len(self.snapshots)}")
        self.snapshots.append(bytes(self.model))

    @rule()
    def open_again(self) -> None:
        self.disk.close()
        self.disk = opened(self.root / "disk")

    @rule(first=st.integers(0, SECTORS - 1), count=st.integers(1, SECTORS))
    def read(self, first: int, count: int) -> None:
        end = min(first + count, SECTORS)
        got = bytearray((end - first) * 512)
        self.disk.read(first * 512, [memoryview(got)])
        assert got == self.model[first * 512 : end * 512]

    def teardown(self) -> None:
        if hasattr(self, "disk"):
            assert all_of(self.disk) == self.model
            for number, content in enumerate(self.snapshots):
                kept = opened(self.root / f"s{number}", writable=False)
                assert all_of(kept) == content
                kept.close()
            self.disk.close()
            self.directory.cleanup()


TestHistories = Histories.TestCase
TestHistories.settings = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))


# --- losing power ------------------------------------------------------------------------------------------


class Journal:
    """What an overlay wrote to its file since the last flush of that file, in order."""

    def __init__(self, path: Path) -> None:
        self.stable = bytearray(path.read_bytes())
        self.unstable: list[tuple[int, bytes]] = []

    def write(self, position: int, buffers: Buffers) -> None:
        data = b"".join(buffers)
        for at in range(0, len(data), 512):  # the storage may keep any of the sectors of a write
            self.unstable.append((position + at, data[at : at + 512]))

    def flush(self) -> None:
        for position, data in self.unstable:
            self.stable[position : position + len(data)] = data
        self.unstable = []

    def after_power_loss(self, rng: random.Random) -> bytes:
        """What a disk may hold that lost power now: all that was flushed, and any of the rest."""
        left = bytearray(self.stable)
        kept = [each for each in self.unstable if rng.random() < 0.5]
        for position, data in kept:
            left[position : position + len(data)] = data
        return bytes(left)


@pytest.mark.parametrize("seed", range(12))
def test_no_flush_is_lost_with_the_power_and_no_sector_is_what_it_never_was(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """After every step the power goes: each sector has what the last flush left or what was written since."""
    rng = random.Random(seed)
    path = make(tmp_path / "disk", base)
    journal = Journal(path)
    write, flush = RawDisk.write, RawDisk.flush

    def noted_write(disk: RawDisk, position: int, buffers: Buffers) -> None:
        if disk.path == path:
            journal.write(position, buffers)
        write(disk, position, buffers)

    def noted_flush(disk: RawDisk) -> None:
        flush(disk)
        if disk.path == path:
            journal.flush()

    monkeypatch.setattr(RawDisk, "write", noted_write)
    monkeypatch.setattr(RawDisk, "flush", noted_flush)
    disk = opened(path)
    content = base.read_bytes()
    allowed = [{content[at : at + 512]} for at in range(0, len(content), 512)]  # by sector
    latest = [content[at : at + 512] for at in range(0, len(content), 512)]
    wrecked = tmp_path / "wrecked"

    def look() -> None:
        wrecked.write_bytes(journal.after_power_loss(rng))
        with monkeypatch.context() as undone:
            undone.setattr(RawDisk, "write", write)
            undone.setattr(RawDisk, "flush", flush)
            after = opened(wrecked, writable=False)
            got = all_of(after)
            after.close()
        for sector in range(SECTORS):
            assert got[sector * 512 : (sector + 1) * 512] in allowed[sector], f"sector {sector}"

    real = journal.flush

    def torn_flush() -> None:
        look()  # the power may go while a flush is at work, also between its two halves
        real()

    monkeypatch.setattr(journal, "flush", torn_flush)
    for _ in range(60):
        if rng.random() < 0.25:
            disk.flush()
            allowed = [{data} for data in latest]
        else:
            first = rng.randrange(SECTORS)
            count = min(rng.choice([1, 3, 8, 8, 16, 30]), SECTORS - first)
            data = rng.randbytes(count * 512)
            disk.write(first * 512, [memoryview(data)])
            for number in range(count):
                latest[first + number] = data[number * 512 : (number + 1) * 512]
                allowed[first + number].add(latest[first + number])
        look()
    disk.close()


WRITER = """
import random, sys
from pathlib import Path
from xenolith.dom0.disks import DiskFormat, DiskSource
from xenolith.dom0.disks.open import open_disk
path, first = Path(sys.argv[1]), int(sys.argv[2])
disk = open_disk(DiskSource(path=path, format=DiskFormat.OVERLAY))
rng = random.Random(first)
for number in range(first, first + 100_000):
    record = number.to_bytes(8, "little") * 64
    slots = [rng.randrange(disk.sectors // 8) for _ in range(4)]
    for slot in slots:
        disk.write(slot * 4096 + number % 8 * 512, [memoryview(record)])
    if number % 50 == 0:
        disk.snapshot(path.with_name(f"s{number}"))
    disk.flush()
    print(number, *slots, flush=True)
"""


def test_every_record_whose_flush_returned_is_there_after_kill_9(tmp_path: Path, base: Path) -> None:
    path = make(tmp_path / "disk", base, 8192)
    newest: dict[tuple[int, int], int] = {}  # by slot and sector in it: the latest record that was flushed there
    number = 1
    for round_ in range(20):
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(path), str(number)], stdout=subprocess.PIPE, text=True
        )
        assert writer.stdout is not None
        lines = [writer.stdout.readline() for _ in range(5 + round_ * 7 % 60)]
        writer.send_signal(signal.SIGKILL)
        lines += writer.stdout.readlines()
        writer.wait()
        for line in lines:
            if line.endswith("\n"):
                number, *slots = map(int, line.split())
                newest.update({(slot, number % 8): number for slot in slots})
        disk = opened(path)
        content = all_of(disk)
        disk.close()
        for (slot, sector), record in newest.items():
            at = slot * 4096 + sector * 512
            found = int.from_bytes(content[at : at + 8], "little")
            assert content[at : at + 512] == found.to_bytes(8, "little") * 64, "no record is torn"
            assert record <= found <= number + 1
        number += 2


def test_layers_are_joined_under_a_running_disk(tmp_path: Path, base: Path) -> None:
    disk = opened(make(tmp_path / "o", base))
    chance = random.Random(2)
    contents = [all_of(disk)]
    for number in range(1, 6):
        for _ in range(8):
            position, count = chance.randrange(SECTORS), chance.choice((1, 3, 8, 16))
            count = min(count, SECTORS - position)
            disk.write(position * 512, [memoryview(chance.randbytes(count * 512))])
        disk.discard(chance.randrange(SECTORS // 8) * BLOCK, BLOCK)
        contents.append(all_of(disk))
        disk.snapshot(tmp_path / f"o.{number}")
    for number in (2, 3, 5):  # 1 goes into 2, that into 3, and 4 into 5
        disk.join(tmp_path / f"o.{number}")
        assert all_of(disk) == contents[-1]
    assert sorted(path.name for path in tmp_path.glob("o.*")) == ["o.3", "o.5"]
    disk.write(0, [memoryview(b"x" * 512)])
    for number in (3, 5):
        kept = opened(tmp_path / f"o.{number}", writable=False)
        assert all_of(kept) == contents[number]
        kept.close()
    last = all_of(disk)
    disk.close()
    again = opened(tmp_path / "o")
    assert all_of(again) == last
    again.close()


def test_a_layer_that_others_use_is_not_joined(tmp_path: Path, base: Path) -> None:
    disk = opened(make(tmp_path / "o", base))
    for number in (1, 2):
        disk.write(number * BLOCK, [memoryview(b"x" * 512)])
        disk.snapshot(tmp_path / f"o.{number}")
    before = all_of(disk)
    other = opened(make(tmp_path / "other", tmp_path / "o.1", format=DiskFormat.OVERLAY))
    with pytest.raises(DiskError, match="in use"):
        disk.join(tmp_path / "o.2")
    with pytest.raises(DiskError, match="no layer"):
        disk.join(tmp_path / "o.1")
    assert all_of(disk) == before
    other.close()
    disk.close()
