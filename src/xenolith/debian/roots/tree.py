"""A file system in memory, made of tar archives one upon the other (tar(5), pax; OCI image-spec, layer.md).

An archive is anybody's.  Its members become entries of dictionaries here and contents become numbered files of a
directory of ours, so that no name, link or device of an archive is ever a path on this host.  A member whose directory
is a symbolic link goes where that leads *inside* the tree, which has nothing above its root.
"""

from __future__ import annotations

import io
import stat
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Final, cast

import zstandard

from xenolith.debian.roots import RootError

MAX_FILES: Final = 2_000_000
MAX_LINKS: Final = 40  # followed for one name, as Linux does
MAX_DEPTH: Final = 200
MAX_HEADER: Final = 1 << 20  # of a long name or of attributes
MAX_NAME: Final = 255
MAX_PATH: Final = 4096
WHITEOUT: Final = ".wh."
OPAQUE: Final = ".wh..wh..opq"

_XATTR: Final = "SCHILY.xattr."
_KINDS: Final = {
    tarfile.REGTYPE: stat.S_IFREG,
    tarfile.AREGTYPE: stat.S_IFREG,
    tarfile.CONTTYPE: stat.S_IFREG,
    tarfile.GNUTYPE_SPARSE: stat.S_IFREG,
    tarfile.SYMTYPE: stat.S_IFLNK,
    tarfile.DIRTYPE: stat.S_IFDIR,
    tarfile.CHRTYPE: stat.S_IFCHR,
    tarfile.BLKTYPE: stat.S_IFBLK,
    tarfile.FIFOTYPE: stat.S_IFIFO,
}


@dataclass(eq=False)
class Inode:
    """A file of the tree; under several names, if it has hard links."""

    mode: int  # st_mode
    uid: int = 0
    gid: int = 0
    mtime: int = 0
    content: Path | None = None  # a regular file's, on this host
    target: str = ""  # a symbolic link's
    device: tuple[int, int] = (0, 0)
    xattrs: dict[str, bytes] = field(default_factory=dict)
    children: dict[str, Inode] = field(default_factory=dict)  # a directory's

    @property
    def is_directory(self) -> bool:
        return stat.S_ISDIR(self.mode)


class FileTree:
    """The file system. `contents` is an empty directory for the contents of its files."""

    def __init__(self, contents: Path) -> None:
        self.root: Final = Inode(stat.S_IFDIR | 0o755)
        self.bytes = 0
        """Of all contents that were unpacked."""
        self.files = 0
        self._contents: Final = contents

    def add(self, archive: IO[bytes], *, layer: bool = False) -> None:
        """Put an archive, compressed or not, upon what there is; whiteouts of a `layer` remove what lies below it.

        Raises RootError, also for OSErrors.
        """
        try:
            with tarfile.open(
                fileobj=decompressed(archive), mode="r|", errors="surrogateescape", tarinfo=_Member
            ) as tar:
                own: set[Inode] = set()  # what an opaque directory does not hide
                for member in tar:
                    self._add(tar, member, layer, own)
                    tar.members.clear()  # type: ignore[attr-defined]  # it would keep them all
        except (tarfile.TarError, zlib.error, zstandard.ZstdError, EOFError, ValueError) as error:
            raise RootError(f"it is no readable tar archive: {error}") from error
        except OSError as error:
            raise RootError(f"it cannot be unpacked: {error}") from error

    def walk(self) -> Iterator[tuple[str, Inode]]:
        """All files by path ("/etc/passwd"), each directory before what is in it; "" is the root."""
        waiting = [("", self.root)]
        while waiting:
            path, inode = waiting.pop()
            yield path, inode
            waiting += [(f"{path}/{name}", child) for name, child in inode.children.items()]

    def find(self, path: str) -> Inode | None:
        """The file that a path leads to, all links followed."""
        try:
            return self._lookup(path.split("/"), make=False)
        except RootError:
            return None

    def make(self, path: str, inode: Inode) -> None:
        """A file at an absolute path, in place of what is there; its directories are made."""
        parts = _parts(path)
        self._directory(parts[:-1]).children[parts[-1]] = inode

    def file(self, data: bytes, mode: int) -> Inode:
        """A new regular file, which is not in the tree yet. Raises RootError."""
        self.files += 1
        self.bytes += len(data)
        path = self._contents / str(self.files)
        try:
            path.write_bytes(data)
        except OSError as error:
            raise RootError(f"it cannot be unpacked: {error}") from error
        return Inode(mode, content=path)

    def _add(self, tar: tarfile.TarFile, member: tarfile.TarInfo, layer: bool, own: set[Inode]) -> None:
        self.files += 1
        if self.files > MAX_FILES:
            raise RootError(f"it has more than {MAX_FILES} files")
        kind = _KINDS.get(member.type)
        parts = _parts(member.name)
        if not parts:
            if kind == stat.S_IFDIR:
                _describe(self.root, member, kind)
            return
        name = parts[-1]
        parent = self._directory(parts[:-1])
        if layer and name.startswith(WHITEOUT):
            if name == OPAQUE:
                _hide_lower(parent, own)
            else:
                parent.children.pop(name.removeprefix(WHITEOUT), None)
            return
        if member.islnk():
            inode = self._lookup(_parts(member.linkname), make=False, follow=False)
            if inode is None or inode.is_directory:
                raise RootError(f"{member.name} is a hard link to {member.linkname}, which is no file before it")
            parent.children[name] = inode
            own.add(inode)
            return
        if kind is None:
            raise RootError(f"{member.name} is of an unknown kind ({member.type!r})")
        before = parent.children.get(name)
        if kind == stat.S_IFDIR and before is not None:
            if before.is_directory:
                _describe(before, member, kind)
                own.add(before)
                return
            if stat.S_ISLNK(before.mode) and not layer:
                return  # as tar does, a directory that is a link here stays one
        inode = parent.children[name] = Inode(kind)
        own.add(inode)
        _describe(inode, member, kind)
        if kind == stat.S_IFREG:
            inode.content = self._unpack(tar, member)

    def _unpack(self, tar: tarfile.TarFile, member: tarfile.TarInfo) -> Path:
        path = self._contents / str(self.files)
        source = tar.extractfile(member)
        assert source is not None
        with path.open("xb") as file:
            while data := source.read(1 << 20):
                file.write(data)
        self.bytes += member.size
        return path

    def _directory(self, parts: list[str]) -> Inode:
        """The directory of this path, made if need be."""
        inode = self._lookup(parts, make=True)
        if inode is None or not inode.is_directory:
            raise RootError(f"{'/'.join(parts)} is no directory, but has a file in it")
        return inode

    def _lookup(self, parts: list[str], *, make: bool, follow: bool = True) -> Inode | None:
        """Where a path leads, inside the tree; None: nowhere. With `make` missing directories are made."""
        way = [self.root]
        waiting = list(reversed(parts))
        links = 0
        while waiting:
            name = waiting.pop()
            if name in ("", "."):
                continue
            if name == "..":
                way = way[:-1] or way
                continue
            if not way[-1].is_directory:
                return None
            child = way[-1].children.get(name)
            if child is None:
                if not make:
                    return None
                child = way[-1].children[name] = Inode(stat.S_IFDIR | 0o755)
            if stat.S_ISLNK(child.mode) and (waiting or follow):
                links += 1
                if links > MAX_LINKS:
                    raise RootError(f"{'/'.join(parts)} leads through too many links")
                if child.target.startswith("/"):
                    way = [self.root]
                waiting += reversed(child.target.split("/"))
            else:
                way.append(child)
                if len(way) > MAX_DEPTH:
                    raise RootError(f"{'/'.join(parts)[:60]}... is in more than {MAX_DEPTH} directories")
        return way[-1]


class _Member(tarfile.TarInfo):
    """A member whose extended headers are of a size that is worth reading."""

    def _proc_member(self, tar: tarfile.TarFile) -> tarfile.TarInfo:
        extended = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
        if self.type in (*extended, tarfile.SOLARIS_XHDTYPE) and self.size > MAX_HEADER:
            raise tarfile.ReadError(f"a header of {self.size} bytes")
        return super()._proc_member(tar)  # type: ignore[misc,no-any-return]


def _hide_lower(directory: Inode, own: set[Inode]) -> bool:
    """Take what is not this layer's own out of a directory; whether something stays."""
    directory.children = {
        name: child
        for name, child in directory.children.items()
        if (_hide_lower(child, own) if child.is_directory else False) or child in own
    }
    return bool(directory.children)


def _parts(path: str) -> list[str]:
    """The names of a path. Raises RootError where it is one that no archive of a root file system has."""
    parts = [part for part in path.split("/") if part not in ("", ".")]
    if ".." in parts:
        raise RootError(f"{path!r} leads out of the archive")
    if len(path) > MAX_PATH or any(len(part.encode(errors="surrogateescape")) > MAX_NAME for part in parts):
        raise RootError(f"{path[:60]!r}... is longer than a path can be")
    if "\0" in path or "\n" in path:
        raise RootError(f"{path!r} has a character that we can put into no file system")
    return parts


def _describe(inode: Inode, member: tarfile.TarInfo, kind: int) -> None:
    inode.mode = kind | member.mode & 0o7777
    inode.uid, inode.gid = member.uid & 0xFFFFFFFF, member.gid & 0xFFFFFFFF
    inode.mtime = max(0, min(int(member.mtime), (1 << 32) - 1))
    inode.target = member.linkname if kind == stat.S_IFLNK else ""
    if kind == stat.S_IFLNK and ("\0" in inode.target or not 0 < len(inode.target) < MAX_PATH):
        raise RootError(f"{member.name} is a link to nothing that can be")
    if kind in (stat.S_IFCHR, stat.S_IFBLK):
        inode.device = member.devmajor & 0xFFF, member.devminor & 0xFFFFF
    inode.xattrs = {
        key.removeprefix(_XATTR): value.encode("utf-8", "surrogateescape")
        for key, value in member.pax_headers.items()
        if key.startswith(_XATTR) and key.isascii() and key.isprintable() and " " not in key and '"' not in key
    }


def decompressed(archive: IO[bytes]) -> IO[bytes]:
    """What is in a file that may be compressed, by its first bytes."""
    buffered = io.BufferedReader(cast(io.RawIOBase, archive)) if not hasattr(archive, "peek") else archive
    magic = buffered.peek(6)[:6]
    if magic.startswith(b"\x1f\x8b"):
        import gzip

        return cast(IO[bytes], gzip.GzipFile(fileobj=buffered))
    if magic.startswith(b"\x28\xb5\x2f\xfd"):
        return cast(IO[bytes], zstandard.ZstdDecompressor().stream_reader(buffered, read_across_frames=True))
    if magic == b"\xfd7zXZ\0":
        import lzma

        return cast(IO[bytes], lzma.LZMAFile(buffered))
    if magic.startswith(b"BZh"):
        import bz2

        return cast(IO[bytes], bz2.BZ2File(buffered))
    return buffered
