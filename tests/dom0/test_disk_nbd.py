"""Disks that qemu-nbd serves, and servers that fail."""

from __future__ import annotations

import errno
import os
import random
import shutil
import socket
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from xenolith.dom0.disks import DiskError, DiskFormat, DiskSource
from xenolith.dom0.disks.nbd import NbdDisk
from xenolith.dom0.disks.open import open_disk

SIZE = 8 << 20
needs_qemu = pytest.mark.skipif(
    shutil.which("qemu-nbd") is None or shutil.which("qemu-img") is None, reason="no qemu-nbd here (Debian: qemu-utils)"
)


def image(path: Path, format: str, contents: bytes) -> Path:
    raw = path.with_suffix(".raw")
    raw.write_bytes(contents)
    subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", format, raw, path], check=True)
    return path


def read(disk: NbdDisk, position: int, *sizes: int) -> bytes:
    buffers = [memoryview(bytearray(size)) for size in sizes]
    disk.read(position, buffers)
    return b"".join(buffers)


@needs_qemu
@pytest.mark.parametrize("format", ["qcow2", "vmdk", "vhdx", "vpc"])
def test_an_image_of_another_format_is_read_and_written(tmp_path: Path, format: str) -> None:
    contents = random.Random(2).randbytes(SIZE)
    path = image(tmp_path / "disk", format, contents)
    descriptors = len(os.listdir("/proc/self/fd"))
    disk = open_disk(DiskSource(path=path, format=DiskFormat(format)))
    assert isinstance(disk, NbdDisk)
    assert disk.sectors * 512 >= SIZE
    assert read(disk, 512, 512, 1 << 20, 4096) == contents[512 : 1024 + (1 << 20) + 4096]
    disk.write(4096, [memoryview(b"a" * 4096), memoryview(b"b" * 512)])
    disk.flush()
    if disk.discard_granularity:
        disk.discard(1 << 20, 1 << 20)
    disk.close()
    assert len(os.listdir("/proc/self/fd")) == descriptors
    subprocess.run(["qemu-img", "convert", "-f", format, "-O", "raw", path, tmp_path / "after"], check=True)
    after = (tmp_path / "after").read_bytes()
    assert after[: 1 << 20] == contents[:4096] + b"a" * 4096 + b"b" * 512 + contents[8704 : 1 << 20]
    assert after[2 << 20 : SIZE] == contents[2 << 20 :]


@needs_qemu
def test_an_overlay_of_a_qcow2_image(tmp_path: Path) -> None:
    contents = random.Random(3).randbytes(SIZE)
    path = image(tmp_path / "disk", "qcow2", contents)
    before = path.read_bytes()
    disk = open_disk(DiskSource(path=path, format=DiskFormat.QCOW2, throw_away=True))
    disk.write(512, [memoryview(b"o" * 512)])
    got = bytearray(4096)
    disk.read(0, [memoryview(got)])
    assert got == contents[:512] + b"o" * 512 + contents[1024:4096]
    disk.close()
    assert path.read_bytes() == before


@needs_qemu
def test_a_format_is_what_the_owner_says(tmp_path: Path) -> None:
    path = image(tmp_path / "disk", "qcow2", bytes(SIZE))
    with pytest.raises(DiskError, match="qemu-nbd cannot serve"):
        open_disk(DiskSource(path=path, format=DiskFormat.VMDK))
    with pytest.raises(DiskError, match="No such file"):
        open_disk(DiskSource(path=tmp_path / "none", format=DiskFormat.QCOW2))


@needs_qemu
def test_a_server_that_is_killed_fails_every_request_from_then_on(tmp_path: Path) -> None:
    path = image(tmp_path / "disk", "qcow2", bytes(SIZE))
    disk = open_disk(DiskSource(path=path, format=DiskFormat.QCOW2))
    disk.write(0, [memoryview(b"k" * 512)])
    server = disk._server  # type: ignore[attr-defined]
    server.kill()
    server.wait()
    for request in (
        lambda: disk.read(0, [memoryview(bytearray(512))]),
        lambda: disk.write(0, [memoryview(bytes(512))]),
        disk.flush,
    ):
        with pytest.raises(OSError):
            request()
    disk.close()


def test_without_qemu_the_message_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(DiskError, match="apt install qemu-utils"):
        open_disk(DiskSource(path=tmp_path / "disk", format=DiskFormat.QCOW2))


GREETING = b"NBDMAGIC" + b"IHAVEOPT" + b"\0\3"
INFO = bytes.fromhex("0003e889045565a9 00000007 00000003 0000000c 0000 0000000000100000 0025")
ACK = bytes.fromhex("0003e889045565a9 00000007 00000001 00000000")
OPTION_BYTES, REQUEST_BYTES = 4 + 16 + 6, 28


def served_by(serve: Callable[[socket.socket], None]) -> socket.socket:
    ours, theirs = socket.socketpair()

    def run() -> None:
        with theirs:
            serve(theirs)

    threading.Thread(target=run, daemon=True).start()
    return ours


@pytest.mark.parametrize(
    "said",
    [
        b"",
        b"NBDMAGIC",
        b"x" * 100,
        b"NBDMAGIC" + bytes(16),
        GREETING,
        GREETING + b"x" * 200,
        GREETING + ACK,
        GREETING + bytes.fromhex("0003e889045565a9 00000007 80000006 00000004") + b"none",
        GREETING + bytes.fromhex("0003e889045565a9 00000007 00000003 ffffffff"),
    ],
)
def test_what_is_no_server_is_refused(said: bytes) -> None:
    descriptors = len(os.listdir("/proc/self/fd"))

    def serve(stream: socket.socket) -> None:
        stream.sendall(said)
        stream.shutdown(socket.SHUT_WR)

    with pytest.raises(OSError):
        NbdDisk(served_by(serve))
    assert len(os.listdir("/proc/self/fd")) <= descriptors + 1


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        (bytes.fromhex("67446698 0000001c 0000000000000001"), errno.ENOSPC),
        (bytes.fromhex("67446698 00000000 0000000000000009"), errno.EIO),
        (b"no answer at all", errno.EIO),
        (b"", errno.EIO),
    ],
)
def test_what_a_server_answers_reaches_the_guest_as_an_error(answer: bytes, code: int) -> None:
    def serve(stream: socket.socket) -> None:
        stream.sendall(GREETING + INFO + ACK)
        stream.recv(OPTION_BYTES, socket.MSG_WAITALL)
        stream.recv(REQUEST_BYTES, socket.MSG_WAITALL)
        stream.sendall(answer)
        stream.shutdown(socket.SHUT_WR)
        stream.recv(1 << 20)

    disk = NbdDisk(served_by(serve))
    assert disk.sectors == 2048
    with pytest.raises(OSError) as caught:
        disk.read(0, [memoryview(bytearray(512))])
    assert caught.value.errno == code
    disk.close()
