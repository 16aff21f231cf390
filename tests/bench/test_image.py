"""The initramfs and the pieces that it is made of."""

from __future__ import annotations

import lzma
import shutil
import struct
import subprocess
from pathlib import Path

import pytest
from bench.cpio import Device, File, Link, archive
from bench.image import dbench_load
from bench.kernel import elf_inside
from bench.packages import PackageError


@pytest.mark.skipif(not shutil.which("cpio"), reason="cpio is not installed")
def test_the_archive_is_one_that_cpio_unpacks(tmp_path: Path) -> None:
    tree = {"a/b/run": File(b"#!/bin/sh\n", executable=True), "a/odd": File(b"12345"), "a/link": Link("odd")}
    subprocess.run(["cpio", "-i", "-d", "--quiet"], input=archive(tree), cwd=tmp_path, check=True)
    assert (tmp_path / "a/b/run").read_bytes() == b"#!/bin/sh\n"
    assert (tmp_path / "a/b/run").stat().st_mode & 0o777 == 0o755
    assert (tmp_path / "a/link").read_bytes() == b"12345"


def test_the_archive_names_directories_before_what_they_hold_and_ends_with_the_trailer() -> None:
    data = archive({"d/e/f": File(b"x"), "dev": Device(5, 1)})
    assert data.index(b"\0d\0" if b"\0d\0" in data else b"d\0") < data.index(b"d/e\0") < data.index(b"d/e/f\0")
    assert b"TRAILER!!!" in data[-124:]
    assert len(data) % 4 == 0


def test_the_dbench_load_is_cut_where_no_file_is_open() -> None:
    load = (
        'Mkdir "d" NT_STATUS_OK\n'
        'NTCreateX "d/a" 0x1 0x2 7 NT_STATUS_OK\n'
        'NTCreateX "d/b" 0x1 0x2 8 NT_STATUS_OBJECT_NAME_NOT_FOUND\n'
        "WriteX 7 0 10 10 NT_STATUS_OK\n"
        "Close 7 NT_STATUS_OK\n"
        'Unlink "d/a" 0x6 NT_STATUS_OK\n'
    )
    assert dbench_load(load, 2) == "".join(load.splitlines(keepends=True)[:5])
    assert dbench_load(load, 1) == load.splitlines(keepends=True)[0]
    assert dbench_load(load, 99) == load


def bzimage_with(payload: bytes) -> bytes:
    image = bytearray(1024 + len(payload))
    image[0x1F1] = 1  # one sector of set-up code
    struct.pack_into("<II", image, 0x248, 0, len(payload))
    image[1024:] = payload
    return bytes(image)


def test_the_kernels_elf_file_comes_out_of_the_bzimage() -> None:
    payload = lzma.compress(b"\x7fELF and more") + struct.pack("<I", 13)
    assert elf_inside(bzimage_with(payload)) == b"\x7fELF and more"


def test_another_compression_is_refused_by_name() -> None:
    with pytest.raises(PackageError, match="28b52ffd"):
        elf_inside(bzimage_with(b"\x28\xb5\x2f\xfd zstd"))
