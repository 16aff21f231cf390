"""Copying files into a guest and out of it, by the `tar` and `cat` of the guest.

What comes out is as hostile as the guest: names are taken apart here, no link is followed, only plain files,
directories and links are made, below the one place that was asked for, and no file is set-user-ID.
"""

from __future__ import annotations

import io
import os
import shutil
import stat
import tarfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Final, Protocol

from xenolith.toolstack.agent.running import Finished, execution, finish, printable
from xenolith.toolstack.client import Execution, Outcome, ProcessEnd, ProcessStream, ToolstackError

if TYPE_CHECKING:
    from typing_extensions import Buffer

BLOCK: Final = 512
MOST_NAME: Final = 4096
_CHUNK: Final = 64 << 10

Execute = Callable[[Execution], ProcessStream]


class Files:
    """The files of a guest."""

    def __init__(self, execute: Execute) -> None:
        self._execute = execute

    def read(self, path: str) -> bytes:
        """The contents of a file. Raises ToolstackError."""
        return self._run(["cat", "--", path]).stdout

    def write(self, path: str, data: bytes | str, mode: int = 0o644) -> None:
        """Make or replace a file. Raises ToolstackError."""
        line = 'umask 077; cat >"$1" && chmod "$2" "$1"'
        self._run(["/bin/sh", "-c", line, "sh", path, f"{mode:o}"], data.encode() if isinstance(data, str) else data)

    def put(self, source: str | Path, path: str) -> None:
        """Copy a file or directory of this machine's into the guest: to `path`, or into it if it is a directory there.

        Everything belongs to root there. Raises ToolstackError.
        """
        source = Path(source)
        if not os.path.lexists(source):
            raise ToolstackError(f"There is no {source}.")
        directory, name = self._place(path, source.absolute().name)
        process = self._execute(execution(["tar", "-x", "-f", "-", "-C", directory], workdir="/"))
        try:
            with tarfile.open(None, "w|", _Input(process), format=tarfile.GNU_FORMAT) as archive:
                archive.add(source, name, filter=_of_root)
        except (OSError, tarfile.TarError) as error:
            process.close()
            raise ToolstackError(f"{source} cannot be copied: {error}.") from error
        _check(*finish(process), f"{path} cannot be written in the guest")

    def get(self, path: str, target: str | Path) -> None:
        """Copy a file or directory out of the guest: to `target`, or into it if it is a directory.

        Raises ToolstackError.
        """
        where = PurePosixPath(path)
        name = where.name
        if not name or name == "..":
            raise ToolstackError(f"{path!r} is not the name of a file or directory in the guest.")
        target = Path(target)
        if target.is_dir():
            target /= name
        command = ["tar", "-c", "-f", "-", "-C", str(where.parent), f"./{name}"]
        process = self._execute(execution(command, workdir="/"))
        process.end_input()
        output = _Output(process)
        found = False
        try:
            for entry in entries(output.read):
                found = True
                place = _inside(entry.name, name)
                _make(target, place, entry)
            output.drain()
        except OSError as error:
            raise ToolstackError(f"{target} cannot be written: {error.strerror or error}.") from error
        finally:
            process.close()
        _check(output.finished(), output.outcome, f"{path} cannot be read in the guest")
        if not found:
            raise ToolstackError(f"The guest has sent nothing for {path}.")

    def _place(self, path: str, name: str) -> tuple[str, str]:
        """The directory in the guest and the name in it that `path` stands for."""
        there = self._execute(execution(["test", "-d", path], workdir="/"))
        done, outcome = finish(there)
        if outcome is not Outcome.EXITED:
            _check(done, outcome, "the guest cannot be asked")
        if done.exit_status == 0:
            return path, name
        where = PurePosixPath(path)
        if path.endswith("/") or not where.name or where.name == "..":
            raise ToolstackError(f"{path} is no directory in the guest.")
        return str(where.parent), where.name

    def _run(self, command: list[str], input: bytes = b"") -> Finished:
        done, outcome = finish(self._execute(execution(command, workdir="/")), input)
        _check(done, outcome, "the guest cannot do that")
        return done


def _check(done: Finished, outcome: Outcome, what: str) -> None:
    if outcome is not Outcome.EXITED or done.exit_status:
        why = done.message or printable(done.stderr[-400:]).strip() or f"status {done.exit_status}"
        raise ToolstackError(f"{what[0].upper()}{what[1:]}: {why}.")


def _of_root(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
    member.uid = member.gid = 0
    member.uname = member.gname = "root"
    return member if member.isreg() or member.isdir() or member.issym() or member.islnk() else None


class _Input(io.RawIOBase):
    """A process's input as a file to write to."""

    def __init__(self, process: ProcessStream) -> None:
        self._process = process

    def write(self, data: Buffer, /) -> int:
        copy = bytes(data)
        self._process.write(copy)
        return len(copy)


class _Output:
    """A process's standard output as something to read from."""

    def __init__(self, process: ProcessStream) -> None:
        self._process = process
        self._held = b""
        self._errors = b""
        self._end: ProcessEnd | None = None

    def read(self, count: int) -> bytes:
        """At most `count` bytes; b"" at the end."""
        while not self._held and self._end is None:
            item = self._process.read()
            if isinstance(item, ProcessEnd):
                self._end = item
            elif item is not None and item.errors:
                self._errors = (self._errors + item.data)[-4096:]
            elif item is not None:
                self._held = item.data
        data, self._held = self._held[:count], self._held[count:]
        return data

    def drain(self) -> None:
        """Read what comes after the archive: nothing but zeros, of a record's size at most."""
        left = 1 << 20
        while left > 0 and (data := self.read(_CHUNK)):
            left -= len(data)

    def finished(self) -> Finished:
        end = self._end or ProcessEnd(1, Outcome.LOST, "it does not end")
        return Finished(end.status, b"", self._errors, self._errors, end.message)

    @property
    def outcome(self) -> Outcome:
        return self._end.outcome if self._end else Outcome.LOST


# --- what comes out of a guest: tar(5), ustar and GNU ---------------------------------------------------------


class Reading(Protocol):
    def __call__(self, count: int, /) -> bytes: ...


@dataclass(frozen=True)
class Entry:
    """A file of an archive; `contents` gives its bytes, once."""

    name: bytes
    kind: bytes  # of tar's
    mode: int
    link: bytes
    size: int
    contents: Iterator[bytes]


def entries(read: Reading) -> Iterator[Entry]:
    """The files of an archive as it comes. Raises ToolstackError for what is none."""
    long_name = long_link = b""
    while header := _exactly(read, BLOCK, may_end=True):
        if not header.strip(b"\0"):
            return
        size, mode = _number(header[124:136]), _number(header[100:108])
        if sum(header[:148]) + 8 * 32 + sum(header[156:]) != _number(header[148:156]):
            raise _bad("a header is damaged")
        kind = header[156:157]
        if kind in (b"L", b"K"):
            if size > MOST_NAME:
                raise _bad("a name is too long")
            text = _text(_exactly(read, -(-size // BLOCK) * BLOCK)[:size])
            long_name, long_link = (text, long_link) if kind == b"L" else (long_name, text)
            continue
        if kind not in (b"0", b"\0"):
            size = 0
        name = long_name or _text(header[:100])
        if not long_name and header[257:263] == b"ustar\0" and (prefix := _text(header[345:500])):
            name = prefix + b"/" + name
        contents = _contents(read, size)
        yield Entry(name, kind, mode & 0o777, long_link or _text(header[157:257]), size, contents)
        for _ in contents:  # that nobody wanted
            pass
        long_name = long_link = b""


def _contents(read: Reading, size: int) -> Iterator[bytes]:
    left = size
    while left:
        data = read(min(left, _CHUNK))
        if not data:
            raise _bad("it is cut off")
        left -= len(data)
        yield data
    if size % BLOCK:
        _exactly(read, BLOCK - size % BLOCK)


def _exactly(read: Reading, count: int, may_end: bool = False) -> bytes:
    parts = bytearray()
    while len(parts) < count:
        data = read(count - len(parts))
        if not data:
            if may_end and not parts:
                return b""
            raise _bad("it is cut off")
        parts += data
    return bytes(parts)


def _number(field: bytes) -> int:
    if field[0] & 0x80:
        return int.from_bytes(bytes([field[0] & 0x7F]) + field[1:], "big")
    digits = field.strip(b" \0") or b"0"
    if not digits.isdigit() or b"8" in digits or b"9" in digits:
        raise _bad("a number is none")
    return int(digits, 8)


def _text(field: bytes) -> bytes:
    return field.partition(b"\0")[0]


def _bad(why: str) -> ToolstackError:
    return ToolstackError(f"What the guest sent is no archive: {why}.")


def _inside(name: bytes, wanted: str) -> tuple[str, ...]:
    """Where an entry goes below the place that was asked for. Raises ToolstackError where that is elsewhere."""
    parts = [part for part in name.split(b"/") if part not in (b"", b".")]
    if name.startswith(b"/") or b".." in parts or b"\0" in name or not parts or parts[0] != os.fsencode(wanted):
        raise ToolstackError(f"The guest has sent a file by the name of {name!r}, which was not asked for.")
    return tuple(os.fsdecode(part) for part in parts[1:])


def _make(target: Path, place: tuple[str, ...], entry: Entry) -> None:
    """Make what an entry says. No link is followed, but for those in the name that the user gave."""
    *above, name = (target.name, *place)
    with ExitStack() as opened:
        directory = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        opened.callback(os.close, directory)
        for part in above:
            directory = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
            opened.callback(os.close, directory)
        if entry.kind == b"5":
            with suppress(FileExistsError):
                os.mkdir(name, dir_fd=directory)
            made = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
            opened.callback(os.close, made)
            os.fchmod(made, entry.mode | stat.S_IRWXU)
            return
        with suppress(FileNotFoundError):
            os.unlink(name, dir_fd=directory)
        if entry.kind == b"2":
            os.symlink(entry.link, name, dir_fd=directory)
        elif entry.kind in (b"0", b"\0"):
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            with open(os.open(name, flags, 0o600, dir_fd=directory), "wb") as file:
                for data in entry.contents:
                    file.write(data)
                os.fchmod(file.fileno(), entry.mode)
        elif entry.kind == b"1":
            _copy_linked(target, entry, name, directory)
        else:
            raise ToolstackError(f"{os.fsdecode(entry.name)!r} is a device or a pipe, which is not copied.")


def _copy_linked(target: Path, entry: Entry, name: str, directory: int) -> None:
    """A hard link to a file that came before: a copy of it."""
    parts = [os.fsdecode(part) for part in entry.link.split(b"/") if part not in (b"", b".")]
    if ".." in parts or not parts:
        raise ToolstackError(f"The guest has sent a link to {entry.link!r}, which is elsewhere.")
    *above, last = (target.name, *parts[1:])
    with ExitStack() as opened:
        there = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        opened.callback(os.close, there)
        for part in above:
            there = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=there)
            opened.callback(os.close, there)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        source = os.open(last, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=there)
        with open(source, "rb") as old, open(os.open(name, flags, 0o600, dir_fd=directory), "wb") as new:
            shutil.copyfileobj(old, new)
            os.fchmod(new.fileno(), entry.mode)
