"""Archives in cpio's "newc" format, as Linux unpacks them into its root file system.

Format: Linux, Documentation/driver-api/early-userspace/buffer-format.rst.  Archives may be concatenated.
"""

from __future__ import annotations

import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath


@dataclass(frozen=True)
class File:
    """A regular file."""

    content: bytes
    executable: bool = False


@dataclass(frozen=True)
class Link:
    """A symbolic link."""

    target: str


@dataclass(frozen=True)
class Device:
    """A character device."""

    major: int
    minor: int


Tree = Mapping[str, File | Link | Device]
"""Entries by path, without the leading slash. Directories follow from the paths."""


def archive(tree: Tree) -> bytes:
    """The archive of a tree, directories first."""
    parts: list[bytes] = []
    directories: set[str] = set()
    for path, entry in sorted(tree.items()):
        for parent in reversed(PurePosixPath(path).parents[:-1]):
            if str(parent) not in directories:
                directories.add(str(parent))
                parts.append(_member(str(parent), stat.S_IFDIR | 0o755))
        match entry:
            case File(content, executable):
                parts.append(_member(path, stat.S_IFREG | (0o755 if executable else 0o644), content))
            case Link(target):
                parts.append(_member(path, stat.S_IFLNK | 0o777, target.encode()))
            case Device(major, minor):
                parts.append(_member(path, stat.S_IFCHR | 0o666, device=(major, minor)))
    parts.append(_member("TRAILER!!!", 0))
    return b"".join(parts)


def _member(path: str, mode: int, content: bytes = b"", device: tuple[int, int] = (0, 0)) -> bytes:
    name = path.encode() + b"\0"
    inode, owner, group, links, mtime, check = 0, 0, 0, 1, 0, 0
    fields = (inode, mode, owner, group, links, mtime, len(content), 0, 0, *device, len(name), check)
    header = b"070701" + b"".join(b"%08x" % field for field in fields)
    return _padded(header + name) + _padded(content)


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)
