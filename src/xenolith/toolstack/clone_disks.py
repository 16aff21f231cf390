"""The disks of clones: copy-on-write overlays of their own, of what their parent's disks held when it was frozen.

A disk that the parent writes to is an overlay, which gets a new layer at that moment (`OverlayDisk.snapshot`, in
constant time).  The layer below, a file `DISK.N.kept` beside it, is what clones' overlays are of.  It is part of the
parent's disk too, until nobody else needs it: then the two become one again, once the parent does not use its disk.

Overlays of clones are files in a directory of this daemon's, and go when the clone does.  Those of clones that were
saved, or went to another daemon, stay until they have come back and are destroyed.  What a daemon leaves that was
killed the next one removes.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Final

from xenolith.dom0.disks import DiskError, DiskFormat, DiskSource
from xenolith.dom0.disks.open import open_disk
from xenolith.dom0.disks.overlay import OverlayDisk, create_overlay, join_layers
from xenolith.dom0.xenbus import DeviceGone
from xenolith.toolstack import devices
from xenolith.toolstack.client import NotSupported
from xenolith.toolstack.config import disk as config_disk
from xenolith.toolstack.config.disk import virtual_device

if TYPE_CHECKING:
    from xenolith.dom0.disks import Disk
    from xenolith.dom0.services import GuestDomain
    from xenolith.toolstack.config.domain import DomainConfig

SUFFIX: Final = ".kept"
_ELSEWHERE: Final = "elsewhere"  # in the directory of a clone that was saved or went away
_LOCK: Final = "lock"


def clones_directory() -> Path:
    """Where daemons have the disks of clones."""
    state = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
    return Path(state).absolute() / "xenolith" / "clones"


@dataclass(eq=False)
class _Kept:
    """What a disk held at a moment."""

    path: Path
    top: Path  # the disk's, which is above it
    disk: Disk | None  # while it is open nobody can write to the file, or to those below
    users: set[object] = field(default_factory=set)  # overlays and kept files above it; who may make more of these


class KeptDisks:
    """What the disks of a frozen domain held, by number. Close it when no more clones are wanted."""

    def __init__(self, owner: CloneDisks) -> None:
        self._owner = owner
        self.kept: Final[dict[int, _Kept]] = {}

    def close(self) -> None:
        self._owner.release(self)


class CloneDisks:
    """The overlays of a daemon's clones. Methods may be called by any thread.

    They raise DiskError, and OSError where the directory cannot be written to.
    """

    def __init__(self, root: Path) -> None:
        self._root: Final = root.resolve()
        self._lock: Final = threading.RLock()  # of what follows
        self._own: Path | None = None
        self._own_lock = -1
        self._kept: dict[Path, _Kept] = {}  # in the order in which they were made

    # --- of those who are cloned -------------------------------------------------------------------------

    def names(self, domain: GuestDomain) -> dict[int, Path]:
        """Of each disk that a domain writes to, what is to keep what it holds. Raises NotSupported."""
        names = {}
        for number, device in domain.disks.items():
            disk, source = device.backend.disk, device.backend.source
            if not disk.writable:
                continue
            if not isinstance(disk, OverlayDisk) or source is None or source.throw_away:
                name = device.backend.spec.name
                raise NotSupported(
                    f"A domain cannot be cloned with a disk that it can write to and that is no overlay ({name}): "
                    "make an overlay of it (`xl disk-create -b DISK FILE`), and let the domain have that."
                )
            top = source.path.resolve()
            count = 1
            while (path := top.with_name(f"{top.name}.{count}{SUFFIX}")).exists():
                count += 1
            names[number] = path
        return names

    def tidy(self, domain: GuestDomain) -> None:
        """Make one of the layers of a running domain's disks that nobody but itself needs any more."""
        for device in domain.disks.values():
            disk, source = device.backend.disk, device.backend.source
            if not isinstance(disk, OverlayDisk) or source is None:
                continue
            with self._lock:
                alone = self._alone(source.path.resolve())
            for lower, upper in pairwise(alone):
                with suppress(DiskError, DeviceGone):  # then both stay
                    device.ask(lambda: disk.join(upper.path))  # noqa: B023  it is waited for
                    self._forget_kept(lower)

    def note(self, domain: GuestDomain, names: dict[int, Path]) -> KeptDisks:
        """It was frozen, as far as these files were made."""
        keeping = KeptDisks(self)
        with self._lock:
            for number, path in names.items():
                source = domain.disks[number].backend.source
                if source is None or not path.exists():
                    continue
                top = source.path.resolve()
                for other in self._kept.values():
                    if other.top == top or top in other.users:
                        other.users.add(path)
                disk = open_disk(DiskSource(path=path, format=DiskFormat.OVERLAY, writable=False))
                keeping.kept[number] = self._kept[path] = _Kept(path, top, disk, {keeping})
        return keeping

    def release(self, keeping: KeptDisks) -> None:
        """No more clones are made of what was kept."""
        with self._lock:
            for kept in keeping.kept.values():
                kept.users.discard(keeping)
            self.reap()

    # --- of clones ---------------------------------------------------------------------------------------

    def overlay(self, keeping: KeptDisks, config: DomainConfig) -> None:
        """Give a clone overlays of what was kept, into its configuration too."""
        with self._lock:
            for disk in config.disks:
                kept = keeping.kept.get(virtual_device(disk.vdev or "") or -1)
                if kept is not None and kept.disk is not None:
                    source = DiskSource(path=kept.path, format=DiskFormat.OVERLAY)
                    kept.users.add(self._overlay(config, disk, source, kept.disk.sectors))

    def overlay_all(self, config: DomainConfig) -> None:
        """Give a domain that will be a template overlays of the disks that it writes to, which stay as they are."""
        for disk in config.disks:
            if disk.writable and not disk.is_cdrom and disk.target:
                source = devices.virtual_block_device(disk).source
                assert source is not None
                opened = open_disk(replace(source, writable=False))
                try:
                    with self._lock:
                        self._overlay(config, disk, source, opened.sectors)
                finally:
                    opened.close()

    def _overlay(self, config: DomainConfig, disk: config_disk.Disk, source: DiskSource, sectors: int) -> Path:
        directory = self._own_directory() / str(config.uuid)
        directory.mkdir(exist_ok=True)
        path = directory / (disk.vdev or "disk").replace("/", "_")
        create_overlay(path, source, sectors)
        disk.target, disk.format = str(path), config_disk.DiskFormat.OVERLAY
        return path

    def remove(self, config: DomainConfig) -> None:
        """A domain is gone for good, its disks closed: what it had of ours goes too."""
        with self._lock:
            for path in self._ours(config):
                path.unlink(missing_ok=True)
                (path.parent / _ELSEWHERE).unlink(missing_ok=True)
                for kept in self._kept.values():
                    kept.users.discard(path)
            self.reap()
            for path in self._ours(config):
                with suppress(OSError):
                    path.parent.rmdir()

    def keep(self, config: DomainConfig) -> None:
        """A domain was saved, or may go on elsewhere: its disks are not gone when it is, or this daemon."""
        for path in self._ours(config):
            (path.parent / _ELSEWHERE).touch()

    def _ours(self, config: DomainConfig) -> list[Path]:
        paths = [Path(disk.target) for disk in config.disks if disk.target and disk.writable]
        return [path for path in paths if path.parent.parent.parent == self._root]

    # --- kept files --------------------------------------------------------------------------------------

    def reap(self) -> None:
        """Give up what nobody needs, as far as no domain uses it now."""
        with self._lock:
            for top in {kept.top: None for kept in reversed(self._kept.values())}:
                if top.exists():
                    for kept in reversed(self._alone(top)):
                        try:
                            join_layers(kept.path, top)
                        except DiskError:  # the domain uses it, or somebody elsewhere
                            break
                        self._forget_kept(kept)
                elif self._root in top.parents:
                    self._unlink(top)

    def _of(self, top: Path) -> list[_Kept]:
        return [kept for kept in self._kept.values() if kept.top == top]

    def _alone(self, top: Path) -> list[_Kept]:
        """What was kept of a disk, from the lowest on, if only that disk needs it."""
        found = self._of(top)
        paths = {kept.path for kept in found}
        if any(kept.users - paths for kept in found):
            return []
        for kept in found:
            self._close(kept)
        return found

    def _unlink(self, top: Path) -> None:
        """The disk of a clone that is gone: what was kept of it goes as soon as nothing is above it."""
        for kept in reversed(self._of(top)):
            if kept.users:
                break
            self._forget_kept(kept)
            kept.path.unlink(missing_ok=True)
            with suppress(OSError):
                kept.path.parent.rmdir()

    def _forget_kept(self, kept: _Kept) -> None:
        with self._lock:
            self._close(kept)
            del self._kept[kept.path]
            for other in self._kept.values():
                other.users.discard(kept.path)

    @staticmethod
    def _close(kept: _Kept) -> None:
        if kept.disk is not None:
            kept.disk.close()
            kept.disk = None

    # --- the directory -----------------------------------------------------------------------------------

    def _own_directory(self) -> Path:
        if self._own is None:
            self._root.mkdir(parents=True, exist_ok=True, mode=0o700)
            for other in self._root.iterdir():
                self._sweep(other)
            own = self._root / secrets.token_hex(8)
            own.mkdir()
            self._own_lock = _lock(own)
            self._own = own
        return self._own

    @staticmethod
    def _sweep(directory: Path) -> None:
        """Remove what a daemon left that is no more."""
        try:
            lock = _lock(directory)
        except OSError:
            return
        _remove_clones(directory)
        os.close(lock)

    def close(self) -> None:
        """All domains are gone."""
        with self._lock:
            self.reap()
            for kept in self._kept.values():
                self._close(kept)
            if self._own is not None:
                _remove_clones(self._own)
                os.close(self._own_lock)
                self._own = None


def _lock(directory: Path) -> int:
    """The descriptor that holds it. Raises OSError where a daemon has it."""
    lock = os.open(directory / _LOCK, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        raise
    return lock


def _remove_clones(directory: Path) -> None:
    """All but those that are elsewhere."""
    for each in _directories(directory):
        if not (each / _ELSEWHERE).exists():
            shutil.rmtree(each, ignore_errors=True)
    with suppress(OSError):
        if not any(_directories(directory)):
            (directory / _LOCK).unlink()
        directory.rmdir()


def _directories(directory: Path) -> Iterator[Path]:
    return (each for each in directory.iterdir() if each.is_dir())
