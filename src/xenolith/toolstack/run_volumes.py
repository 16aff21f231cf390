"""Folders of `xenolith run`: --volume HOST:GUEST[:ro]."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Final

from xenolith.debian.initramfs import Mount
from xenolith.dom0.shares import ShareSpec
from xenolith.dom0.shares.relay import MAX_MSIZE
from xenolith.toolstack.errors import UsageError

VOLUME_MODULES: Final = ("9pnet_xen", "9p")
HELP: Final = (
    "Mount a folder of the host in the guest, read-only with ro; diod serves it (Debian: diod). Links in it lead "
    "nowhere else. May be repeated."
)
_OPTIONS: Final = f"trans=xen,version=9p2000.L,msize={MAX_MSIZE},cache=mmap"


def parse_volumes(arguments: Sequence[str]) -> tuple[tuple[ShareSpec, ...], tuple[Mount, ...]]:
    """The folders, and how the guest mounts them. Raises UsageError."""
    shares, mounts = [], []
    for number, argument in enumerate(arguments):
        path, guest, writable = _parsed(argument)
        tag = f"volume{number}"
        shares.append(ShareSpec(number=number, tag=tag, path=path, writable=writable))
        mounts.append(Mount(tag, guest, "9p", _OPTIONS + ("" if writable else ",ro")))
    return tuple(shares), tuple(mounts)


def _parsed(argument: str) -> tuple[Path, str, bool]:
    rest, writable = argument, True
    for suffix in (":ro", ":rw"):
        if argument.endswith(suffix):
            rest, writable = argument.removesuffix(suffix), suffix == ":rw"
    host, _, guest = rest.rpartition(":")
    target = PurePosixPath(guest)
    if not host or not target.is_absolute() or ".." in target.parts or not target.name or not guest.isprintable():
        raise UsageError(f"--volume {argument!r} is not HOST:GUEST[:ro], where GUEST is an absolute path in the guest")
    path = Path(host)
    if not path.is_dir():
        raise UsageError(f"--volume {argument!r}: {host} is no folder")
    return path.resolve(), str(target), writable
