"""The root file system of `xenolith run`: --root DIR|TAR|IMAGE, always copy-on-write."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

from xenolith.debian.roots import RootError as RootError
from xenolith.debian.roots import store
from xenolith.debian.roots.oci import ImageConfig
from xenolith.dom0.disks import DiskSource
from xenolith.toolstack.errors import UsageError
from xenolith.toolstack.run_disks import parse_disk

HELP: Final = (
    "Run in a root file system, copy-on-write: a folder, a tar archive of one, a container image (an OCI layout, or "
    "what `docker save` wrote), a disk image (FILE[,FORMAT]), or the NAME of one made by `xenolith image`. Without "
    "COMMAND that of a container image is run, or the root's init."
)


@dataclass(frozen=True)
class Root:
    """A disk with a root file system, and how that wants to be run."""

    source: DiskSource
    config: ImageConfig = field(default_factory=ImageConfig)


def find_root(argument: str) -> Root:
    """What --root names; made into an image and kept if need be. Raises UsageError and RootError."""
    path = Path(argument)
    if path.is_dir() or (path.is_file() and store.is_archive(path)):
        kept = store.root_of(path)
        return Root(DiskSource(path=kept.path, writable=False, throw_away=True), kept.config)
    if not path.exists() and (named := store.image(argument)) is not None:
        return Root(DiskSource(path=named.path, writable=False, throw_away=True))
    source = parse_disk(argument)
    if not source.path.exists():
        raise UsageError(
            f"--root {argument}: there is no such folder, file or image; `xenolith image list` has the images there are"
        )
    return Root(replace(source, writable=False, throw_away=True))
