"""Disks in files: what is written is read, what fails says so."""

from __future__ import annotations

import errno
import os
import random
import resource
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from xenolith.dom0.disks import DiskError, rest
from xenolith.dom0.disks.raw import RawDisk


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(random.Random(1).randbytes(64 << 10))
    return path


def buffers(*sizes: int) -> list[memoryview]:
    return [memoryview(bytearray(size)) for size in sizes]


def test_a_disk_has_what_its_file_has(image: Path) -> None:
    disk = RawDisk(image, writable=False)
    assert disk.sectors == 128
    got = buffers(512, 4096, 1024)
    disk.read(1024, got)
    assert b"".join(got) == image.read_bytes()[1024 : 1024 + 5632]
    disk.close()


def test_what_was_written_is_in_the_file(image: Path) -> None:
    disk = RawDisk(image)
    before = image.read_bytes()
    disk.write(512, [memoryview(b"a" * 512), memoryview(b"b" * 4096)])
    disk.flush()
    assert image.read_bytes() == before[:512] + b"a" * 512 + b"b" * 4096 + before[5120:]
    disk.close()


def test_what_was_discarded_reads_as_zeros_and_takes_no_room(image: Path) -> None:
    disk = RawDisk(image)
    disk.discard(8192, 16384)
    disk.flush()
    assert image.read_bytes()[8192 : 8192 + 16384] == bytes(16384)
    assert image.stat().st_blocks * 512 == (64 << 10) - 16384
    assert disk.discard_granularity == image.stat().st_blksize
    disk.close()


def test_a_disk_that_is_not_to_be_discarded_from_says_so(image: Path) -> None:
    for writable, discard in ((True, False), (False, True)):
        disk = RawDisk(image, writable, discard)
        assert disk.discard_granularity == 0
        disk.close()


def test_a_file_that_was_cut_off_gives_an_error_and_no_zeros(image: Path) -> None:
    disk = RawDisk(image)
    os.truncate(image, 10_000)
    disk.read(0, buffers(8192))
    with pytest.raises(OSError, match="cut off") as caught:
        disk.read(8192, buffers(4096))
    assert caught.value.errno == errno.EIO
    disk.close()


def test_a_file_that_was_removed_fails_to_flush(image: Path) -> None:
    disk = RawDisk(image)
    image.unlink()
    with pytest.raises(FileNotFoundError, match="removed"):
        disk.flush()
    disk.close()


def test_one_writer_or_many_readers(image: Path) -> None:
    readers = [RawDisk(image, writable=False) for _ in range(2)]
    with pytest.raises(DiskError, match="in use: another disk uses it"):
        RawDisk(image)
    for reader in readers:
        reader.close()
    writer = RawDisk(image)
    with pytest.raises(DiskError, match="another disk writes"):
        RawDisk(image, writable=False)
    writer.close()
    RawDisk(image).close()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "No such file"),
        (lambda path: path.mkdir(), "Is a directory|neither a file"),
        (lambda path: path.write_bytes(b"x" * 511), "no sector"),
        (lambda path: os.mkfifo(path), "neither a file"),
    ],
    ids=["nothing", "directory", "tiny", "pipe"],
)
@pytest.mark.parametrize("writable", [True, False])
def test_what_is_no_disk_is_refused_with_its_name(
    tmp_path: Path, make: Callable[[Path], object], message: str, writable: bool
) -> None:
    path = tmp_path / "thing"
    make(path)
    descriptors = len(os.listdir("/proc/self/fd"))
    with pytest.raises(DiskError, match=message) as caught:
        RawDisk(path, writable)
    assert str(path) in str(caught.value)
    assert len(os.listdir("/proc/self/fd")) == descriptors


def test_the_rest_of_buffers() -> None:
    parts = [memoryview(b"abc"), memoryview(b"de"), memoryview(b"fgh")]
    whole = b"abcdefgh"
    for count in range(9):
        assert b"".join(rest(parts, count)) == whole[count:]


def test_a_full_file_system_is_an_error_after_what_fitted(tmp_path: Path) -> None:
    """RLIMIT_FSIZE stands in for a full disk: the host writes a part, and then nothing."""
    path = tmp_path / "disk.img"
    path.touch()
    os.truncate(path, 1 << 20)
    disk = RawDisk(path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
        with pytest.raises(OSError) as caught:
            disk.write(8192, [memoryview(b"x" * 4096)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert caught.value.errno == errno.EFBIG
    assert path.read_bytes()[8192:10_000] == b"x" * 1808
    disk.close()
