"""Disks of `xenolith run`: FILE[,ro|cow][,FORMAT]."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

from xenolith.dom0.backends.block import VbdSpec
from xenolith.dom0.disks import DiskFormat, DiskSource
from xenolith.toolstack.errors import UsageError

DISK_MODULES: Final = ("xen-blkfront", "ext4")
HELP: Final = (
    "Give the guest a disk, /dev/xvda being the first: read-only with ro; with cow what it writes is gone in the end "
    f"and FILE stays as it is. FORMAT: {', '.join(DiskFormat)}; raw if not given. May be repeated."
)
_XVDA: Final = 202 << 8
_MOST: Final = 16  # numbered in the way that every guest knows
_ACCESS: Final = ("rw", "ro", "cow")


def parse_disks(arguments: Sequence[str], root: DiskSource | None = None) -> tuple[VbdSpec, ...]:
    """The disks, behind that of the root if there is one. Raises UsageError."""
    sources = [*([root] if root else []), *map(parse_disk, arguments)]
    if len(sources) > _MOST:
        raise UsageError(f"{len(sources)} disks are more than {_MOST}")
    return tuple(
        VbdSpec(number=_XVDA + 16 * index, name=f"xvd{chr(ord('a') + index)}", source=source)
        for index, source in enumerate(sources)
    )


def parse_disk(argument: str) -> DiskSource:
    """FILE[,ro|cow][,FORMAT]. Raises UsageError."""
    path, access, format = argument, "rw", DiskFormat.RAW
    while "," in path:
        rest, _, word = path.rpartition(",")
        if word in _ACCESS:
            access = word
        elif word in list(DiskFormat):
            format = DiskFormat(word)
        else:
            break  # a part of the file's name
        path = rest
    if not path:
        raise UsageError(f"--disk {argument!r} names no file; it is FILE[,ro|cow][,FORMAT]")
    return DiskSource(path=Path(path).absolute(), format=format, writable=access == "rw", throw_away=access == "cow")
