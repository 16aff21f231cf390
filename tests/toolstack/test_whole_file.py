"""A file is complete or as it was before, and what is no file stays what it is."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from xenolith.toolstack.whole_file import whole_file


def test_a_file_is_replaced_when_it_is_complete(tmp_path: Path) -> None:
    path = tmp_path / ("n" * 255)
    path.write_bytes(b"old")
    with whole_file(path) as file:
        file.write(b"new")
        file.flush()
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"
    with pytest.raises(KeyError), whole_file(path) as file:
        file.write(b"half")
        raise KeyError
    assert path.read_bytes() == b"new"
    assert os.listdir(tmp_path) == [path.name]


def test_a_link_stays_and_what_it_leads_to_is_written(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("real")
    for content in (b"made", b"made again"):
        with whole_file(tmp_path / "link") as file:
            file.write(content)
        assert (tmp_path / "link").is_symlink()
        assert (tmp_path / "real").read_bytes() == content


def test_a_device_is_written_to(tmp_path: Path) -> None:
    with pytest.raises(OSError) as full, whole_file(Path("/dev/full")) as file:
        file.write(b"x")
    assert full.value.errno == errno.ENOSPC
    assert Path("/dev/full").is_char_device()


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_what_is_neither_stays(tmp_path: Path, make: object) -> None:
    assert callable(make)
    make(tmp_path / "it")
    before = (tmp_path / "it").stat().st_ino
    with pytest.raises(OSError, match="neither a file nor a device"), whole_file(tmp_path / "it"):
        pass
    assert (tmp_path / "it").stat().st_ino == before
