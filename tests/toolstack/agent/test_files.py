"""Files out of a guest: what a hostile one sends goes nowhere but where the user wanted it."""

from __future__ import annotations

import io
import os
import stat
import tarfile
from pathlib import Path

import pytest

from xenolith.toolstack.agent.files import Files
from xenolith.toolstack.client import Execution, Outcome, ProcessEnd, ProcessOutput, ToolstackError


class Sending:
    """A process that prints this and ends."""

    def __init__(self, data: bytes, piece: int = 700, end: ProcessEnd | None = None) -> None:
        self._items: list[ProcessOutput | ProcessEnd] = [
            ProcessOutput(data[at : at + piece]) for at in range(0, len(data), piece)
        ]
        self._items.append(end or ProcessEnd(0))

    def read(self, timeout: float | None = None) -> ProcessOutput | ProcessEnd:
        return self._items.pop(0) if len(self._items) > 1 else self._items[0]

    def write(self, data: bytes) -> None: ...
    def end_input(self) -> None: ...
    def signal(self, number: int) -> None: ...
    def resize(self, rows: int, columns: int) -> None: ...
    def close(self) -> None: ...


def sent(data: bytes, end: ProcessEnd | None = None) -> Files:
    def execute(execution: Execution) -> Sending:
        return Sending(data, end=end)

    return Files(execute)


def archive(*members: tuple[str, dict[str, object], bytes], kind: int = tarfile.GNU_FORMAT) -> bytes:
    file = io.BytesIO()
    with tarfile.open(None, "w", file, format=kind) as tar:
        for name, fields, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            for key, value in fields.items():
                setattr(info, key, value)
            tar.addfile(info, io.BytesIO(data))
    return file.getvalue()


DIRECTORY = {"type": tarfile.DIRTYPE, "mode": 0o755}


@pytest.mark.parametrize("kind", [tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_files_directories_and_links_come_with_their_modes(tmp_path: Path, kind: int) -> None:
    long = "/".join(["d" * 60] * 3)
    data = archive(
        ("./d", DIRECTORY, b""),
        *((f"./d/{'/'.join([('d' * 60)] * n)}", DIRECTORY, b"") for n in (1, 2)),
        (f"./d/{long}", {"mode": 0o640}, b"deep"),
        ("./d/run", {"mode": 0o4755}, b"x" * 5000),
        ("./d/link", {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"}, b""),
        ("./d/again", {"type": tarfile.LNKTYPE, "linkname": "./d/run", "mode": 0o755}, b""),
        kind=kind,
    )
    sent(data).get("/data/d", tmp_path / "there")
    there = tmp_path / "there"
    assert (there / long).read_bytes() == b"deep"
    assert (there / "run").read_bytes() == (there / "again").read_bytes() == b"x" * 5000
    assert stat.S_IMODE((there / "run").stat().st_mode) == 0o755  # and not set-user-ID
    assert os.readlink(there / "link") == "/etc/passwd"
    sent(data).get("/data/d", tmp_path)  # a directory: into it
    assert (tmp_path / "d" / "run").exists()


def bent(data: bytes, at: int, with_: bytes) -> bytes:
    """The first header changed, its checksum right again."""
    header = bytearray(data[:512])
    header[at : at + len(with_)] = with_
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + data[512:]


def long_link(kind: bytes, target: bytes) -> bytes:
    """A link in a directory whose target comes before it, as GNU tar sends long ones."""
    name = bent(archive(("./@LongLink", {}, target)), 156, b"K")[: 512 + 512]
    return archive(("./f", DIRECTORY, b""))[:512] + name + bent(archive(("./f/l", {}, b"")), 156, kind)


FILE = archive(("./f", {}, b"data"))
HOSTILE = {
    "an absolute name": archive(("/etc/f", {}, b"x")),
    "a name of another": archive(("./g", {}, b"x")),
    "a way up": archive(("./f", DIRECTORY, b""), ("./f/../../up", {}, b"x")),
    "a way through a link": archive(
        ("./f", DIRECTORY, b""), ("./f/l", {"type": tarfile.SYMTYPE, "linkname": ".."}, b""), ("./f/l/up", {}, b"x")
    ),
    "the place itself a link": archive(("./f", {"type": tarfile.SYMTYPE, "linkname": ".."}, b""), ("./f/up", {}, b"x")),
    "a hard link to the outside": archive(
        ("./f", DIRECTORY, b""), ("./f/l", {"type": tarfile.LNKTYPE, "linkname": "../secret"}, b"")
    ),
    "a hard link to a symbolic one": archive(
        ("./f", DIRECTORY, b""),
        ("./f/s", {"type": tarfile.SYMTYPE, "linkname": "../secret"}, b""),
        ("./f/l", {"type": tarfile.LNKTYPE, "linkname": "f/s"}, b""),
    ),
    "a link to a NUL": long_link(b"2", b"\0/x"),
    "a hard link to a NUL": long_link(b"1", b"f/a\0b"),
    "a device": archive(("./f", {"type": tarfile.CHRTYPE, "devmajor": 1, "devminor": 1}, b"")),
    "a pipe": archive(("./f", {"type": tarfile.FIFOTYPE}, b"")),
    "a name without an end": archive(("./" + "f" * 5000, {}, b"x")),
    "a wrong checksum": b"./g" + FILE[3:],
    "a size that is none": bent(FILE, 124, b"9999999999"),
    "more than comes": bent(FILE, 124, b"77777777777"),
    "a size beyond all bounds": bent(FILE, 124, b"\xff" * 12),
    "an end in the middle": FILE[:700],
    "nothing": b"",
    "noise": bytes(range(256)) * 8,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_leads_elsewhere_or_is_no_archive_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "in").mkdir()
    with pytest.raises(ToolstackError):
        sent(HOSTILE[name]).get("/data/f", tmp_path / "in" / "f")
    assert {path.name for path in tmp_path.iterdir()} == {"in", "secret"}
    for path in (tmp_path / "in").rglob("*"):
        assert not path.is_file() or b"secret" not in path.read_bytes() or path.is_symlink()


def test_a_copy_that_failed_in_the_guest_says_what_the_guest_said_and_nothing_a_terminal_obeys(tmp_path: Path) -> None:
    class Failing(Sending):
        def __init__(self) -> None:
            super().__init__(b"")
            self._items = [ProcessOutput(b"tar: \x1b[2Jno such file\n", errors=True), ProcessEnd(1)]

    with pytest.raises(ToolstackError, match="no such file") as failed:
        Files(lambda execution: Failing()).get("/f", tmp_path / "f")
    assert "\x1b" not in str(failed.value)
    with pytest.raises(ToolstackError, match="domain has ended"):
        sent(FILE, ProcessEnd(125, Outcome.LOST, "the domain has ended")).get("/f", tmp_path / "f")
