"""Sockets in the file system: long paths, and files that are not ours."""

from __future__ import annotations

import os
import socket
import stat
from pathlib import Path

import pytest

from xenolith.dom0.unix_socket import InTheWay, ListeningSocket, connect


def long_directory(base: Path) -> Path:
    """One whose path is nearly as long as the kernel takes."""
    directory = base
    while len(str(directory)) < 3600:
        directory /= "d" * 200
    directory.mkdir(parents=True)
    return directory


@pytest.mark.parametrize("name", ["s", "n" * 100, "n" * 255])
@pytest.mark.parametrize("deep", [False, True])
def test_a_path_may_be_as_long_as_the_system_allows(tmp_path: Path, name: str, deep: bool) -> None:
    path = (long_directory(tmp_path) if deep else tmp_path) / name
    listener = ListeningSocket(path, 5, "tests")
    with connect(path) as client, listener.socket.accept()[0] as server:
        client.sendall(b"x")
        assert server.recv(1) == b"x"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert os.listdir(path.parent) == [name]
    listener.close()
    assert not path.exists()


def test_what_somebody_serves_is_left_to_them(tmp_path: Path) -> None:
    first = ListeningSocket(tmp_path / "s", 5, "tests")
    with pytest.raises(InTheWay, match="another daemon serves tests on"):
        ListeningSocket(tmp_path / "s", 5, "tests")
    connect(tmp_path / "s").close()
    first.close()


def test_the_socket_of_a_program_that_was_killed_is_replaced(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(tmp_path / "s"))
    ListeningSocket(tmp_path / "s", 5, "tests").close()


@pytest.mark.parametrize("kind", ["file", "directory", "FIFO", "symbolic link"])
def test_what_is_no_socket_is_never_removed(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "it"
    make = {"file": path.touch, "directory": path.mkdir, "FIFO": lambda: os.mkfifo(path)}
    make.get(kind, lambda: path.symlink_to("elsewhere"))()
    before = path.lstat().st_ino, path.lstat().st_mtime_ns
    with pytest.raises(InTheWay, match=f"is no socket but a {kind}"):
        ListeningSocket(path, 5, "tests")
    if kind != "symbolic link":
        with pytest.raises(InTheWay, match=f"is no socket but a {kind}"):
            connect(path)
    assert (path.lstat().st_ino, path.lstat().st_mtime_ns) == before


def test_closing_leaves_a_file_that_took_its_place(tmp_path: Path) -> None:
    listener = ListeningSocket(tmp_path / "s", 5, "tests")
    (tmp_path / "s").unlink()
    (tmp_path / "s").write_text("mine")
    listener.close()
    assert (tmp_path / "s").read_text() == "mine"
