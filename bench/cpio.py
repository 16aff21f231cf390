"""Archives in cpio's "newc" format, as Linux unpacks them into its root file system.

Format: Linux, Documentation/driver-api/early-userspace/buffer-format.rst.  Archives may be concatenated.
"""

from __future__ import annotations

import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath

from xenolith.debian.initramfs import Node, pack


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
    return pack(_nodes(tree))


def _nodes(tree: Tree) -> Iterator[Node]:
    directories: set[str] = set()
    for path, entry in sorted(tree.items()):
        for parent in reversed(PurePosixPath(path).parents[:-1]):
            if str(parent) not in directories:
                directories.add(str(parent))
                yield Node(str(parent), stat.S_IFDIR | 0o755)
        match entry:
            case File(content, executable):
                yield Node(path, stat.S_IFREG | (0o755 if executable else 0o644), content)
            case Link(target):
                yield Node(path, stat.S_IFLNK | 0o777, target.encode())
            case Device(major, minor):
                yield Node(path, stat.S_IFCHR | 0o666, device=(major, minor))
