"""Checkpoints of a domain in a directory: `xenolith checkpoint`, `checkpoints` and `rollback`.

Each is a file, `12.checkpoint`, which goes on from the one before (`series`); the disks that belong to it are beside
the disks.  A file is complete or not there.  Of a series at least as many as wanted are kept; now and then those
before are given up, and the oldest that is kept gets all that it took from them.
"""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Final

from xenolith.dom0.disks import DiskError, DiskFormat, DiskSource
from xenolith.dom0.disks.open import open_disk
from xenolith.dom0.disks.overlay import OverlayDisk, create_overlay
from xenolith.dom0.migration.checkpoint import Checkpointer, written_disks
from xenolith.dom0.migration.series import Series, bases, join, new_ident, read_series
from xenolith.dom0.migration.stream import Reader
from xenolith.dom0.xenbus import DeviceGone
from xenolith.hypervisor.control import RecordError
from xenolith.toolstack.client import Checkpoint, ToolstackError
from xenolith.toolstack.config.disk import virtual_device
from xenolith.toolstack.daemon.codec import encode
from xenolith.toolstack.saving import open_saved
from xenolith.toolstack.whole_file import whole_file

if TYPE_CHECKING:
    from xenolith.dom0.services import Dom0, GuestDomain
    from xenolith.toolstack.config.domain import DomainConfig

SUFFIX: Final = ".checkpoint"
FEWEST_GIVEN_UP: Final = 8  # at a time, for it means writing one that has all
LONGEST_CHAIN: Final = 200  # files that are opened together
_NAME: Final = re.compile(rf"([1-9][0-9]{{0,8}}){re.escape(SUFFIX)}", re.ASCII)


def checkpoint_path(directory: Path, number: int) -> Path:
    return directory / f"{number}{SUFFIX}"


def checkpoints_in(directory: Path) -> list[Checkpoint]:
    """All checkpoints of a directory, the oldest first. Raises ToolstackError."""
    try:
        numbers = sorted(int(match[1]) for name in os.listdir(directory) if (match := _NAME.fullmatch(name)))
    except OSError as error:
        raise ToolstackError(f"cannot read {directory}: {error.strerror}") from error
    return [_look(checkpoint_path(directory, number)) for number in numbers]


def _look(path: Path) -> Checkpoint:
    series = series_of(path)
    return Checkpoint(
        number=series.number,
        path=path,
        taken=series.taken,
        size_bytes=path.stat().st_blocks * 512,
        base=series.base,
        disks=tuple(file for _, file in series.disks),
    )


def series_of(path: Path) -> Series:
    """What a checkpoint says of itself. Raises ToolstackError."""
    with open_saved(path) as file:
        try:
            return read_series(Reader(file))
        except RecordError as error:
            raise ToolstackError(f"{path} is no checkpoint: {error}.") from error


class CheckpointedDomain:
    """Takes checkpoints of one domain into one directory. Close it."""

    def __init__(self, dom0: Dom0, domain: GuestDomain, directory: Path) -> None:
        self.directory: Final = directory
        self._dom0 = dom0
        self._domain = domain
        self._checkpointer = Checkpointer(dom0, domain)
        self._last: Series | None = None
        self._chain = 0
        try:
            directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise ToolstackError(f"cannot make the directory {directory}: {error.strerror}") from error

    def take(self, config: DomainConfig, keep: int) -> Checkpoint:
        """Take one now, and give up old ones. Raises ToolstackError; the domain goes on in any case."""
        domain = self._domain
        try:
            before = self._last is not None and self._checkpointer.goes_on and self._chain < LONGEST_CHAIN
            if before and self._last and not checkpoint_path(self.directory, self._last.number).exists():
                before = False
            series = self._next(written_disks(domain), self._last if before else None)
            path = checkpoint_path(self.directory, series.number)
            with whole_file(path) as file:
                stood, pages = self._checkpointer.take(file, series, {"config": encode(config)})
        except (RecordError, DiskError, OSError) as error:
            self.forget()
            why = error.strerror if isinstance(error, OSError) else error
            raise ToolstackError(f"There can be no checkpoint of domain {domain.domid}: {why}.") from error
        self._last, self._chain = series, self._chain + 1 if before else 1
        self._give_up_old(keep)
        found = _look(path)
        found.stood_ns, found.pages = stood, pages
        found.remark = self._checkpointer.why_not_followed
        return found

    def _next(self, disks: list[int], last: Series | None) -> Series:
        taken = [int(match[1]) for name in os.listdir(self.directory) if (match := _NAME.fullmatch(name))]
        number = max(taken, default=0) + 1
        while any(path.exists() for path in self._disk_files(disks, number).values()):
            number += 1  # of a checkpoint that did not come about
        files = self._disk_files(disks, number)
        return Series(
            number,
            int(time.time()),
            new_ident(),
            f"{last.number}{SUFFIX}" if last else "",
            last.ident if last else "",
            tuple((disk, str(path)) for disk, path in files.items()),
        )

    def _disk_files(self, disks: list[int], number: int) -> dict[int, Path]:
        """What keeps each disk at a checkpoint: beside it, for a name can be given anew only within a file system."""
        sources = {disk: self._domain.disks[disk].backend.source for disk in disks}
        paths = {disk: source.path.resolve() for disk, source in sources.items() if source is not None}
        return {disk: path.with_name(f"{path.name}.{number}{SUFFIX}") for disk, path in paths.items()}

    def _give_up_old(self, keep: int) -> None:
        found = checkpoints_in(self.directory)
        if len(found) < keep + max(keep, FEWEST_GIVEN_UP):
            return
        old, kept = found[:-keep], found[-keep:]
        try:
            make_whole(kept[0].path)
            disks = [series_of(each.path).disks for each in (*old, kept[0])]
            for each in reversed(old):
                each.path.unlink()
            for lower, upper in pairwise(disks):
                for number, file in upper if lower else ():
                    self._join_disk(number, Path(file))
        except (ToolstackError, DiskError, DeviceGone, OSError) as error:  # they only take room
            self._dom0.domain.log(f"d{self._domain.domid}: old checkpoints are kept: {error}")
        self._chain = keep

    def _join_disk(self, number: int, file: Path) -> None:
        """Give up what a disk held at the checkpoint before the one that this file is of."""
        device = self._domain.disks.get(number)
        if device is not None and isinstance(disk := device.backend.disk, OverlayDisk):
            device.ask(lambda: disk.join(file))

    def forget(self) -> None:
        """The next checkpoint has all, and until then writing costs the domain nothing."""
        self._checkpointer.forget()
        self._last = None

    close = forget


def make_whole(path: Path) -> None:
    """Let a checkpoint need no other. Raises ToolstackError and OSError."""
    if not series_of(path).base:
        return
    try:
        with open_saved(path) as file, whole_file(path) as out:
            join(file, out, lambda name: open_saved(path.with_name(name)))
    except RecordError as error:
        raise ToolstackError(f"{path} cannot be read: {error}.") from error


class Schedule:
    """Has something done every so many seconds on a thread of its own, until that raises ToolstackError."""

    def __init__(self, seconds: float, work: Callable[[], None], give_up: Callable[[str], None]) -> None:
        self.seconds: Final = seconds
        self._work = work
        self._give_up = give_up
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="checkpoints", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        due = time.monotonic()
        while not self._stopping.is_set():
            try:
                self._work()
            except ToolstackError as error:
                if not self._stopping.is_set():
                    self._give_up(str(error))
                return
            due = max(due + self.seconds, time.monotonic())
            self._stopping.wait(due - time.monotonic())

    def stop(self) -> None:
        """No more; one that is under way is finished by its own."""
        self._stopping.set()

    def join(self) -> None:
        """Wait until nothing is under way."""
        if self._thread is not threading.current_thread():
            self._thread.join()


# --- rolling back ------------------------------------------------------------------------------------


def check_complete(path: Path, config: DomainConfig) -> Series:
    """Whether all files are there that a checkpoint needs. Raises ToolstackError."""
    series = series_of(path)
    try:
        with bases(series, lambda name: open_saved(path.with_name(name))):
            pass
        for _, file in series.disks:
            open_disk(DiskSource(path=Path(file), format=DiskFormat.OVERLAY, writable=False)).close()
    except (RecordError, DiskError) as error:
        raise ToolstackError(f"Checkpoint {path} is not complete: {error}.") from error
    _targets(series, config)
    return series


def _targets(series: Series, config: DomainConfig) -> list[tuple[Path, Path]]:
    """Of each disk of a checkpoint, where it belongs and the file that keeps what it held."""
    found = {virtual_device(disk.vdev or ""): disk for disk in config.disks}
    targets = []
    for number, file in series.disks:
        disk = found.get(number)
        if disk is None or not disk.target:
            raise ToolstackError(f"The checkpoint has a disk {number}, and its configuration has none.")
        targets.append((Path(disk.target).resolve(), Path(file)))
    return targets


def put_disks_back(path: Path, series: Series, config: DomainConfig) -> None:
    """Let the disks hold what they held at a checkpoint; later checkpoints are given up. Raises ToolstackError.

    Nobody uses the disks.
    """
    later = [each for each in checkpoints_in(path.parent) if each.number > series.number]
    try:
        for each in reversed(later):
            each.path.unlink()
        for target, file in _targets(series, config):
            aside = target.with_name(f".{target.name}.{os.getpid()}.new")
            aside.unlink(missing_ok=True)
            kept = open_disk(DiskSource(path=file, format=DiskFormat.OVERLAY, writable=False))
            sectors = kept.sectors
            kept.close()
            backing = Path(os.path.relpath(file, target.parent))
            create_overlay(aside, DiskSource(path=backing, format=DiskFormat.OVERLAY), sectors)
            aside.replace(target)
            for layer in _later_layers(target, series.number):
                layer.unlink()
    except (DiskError, OSError) as error:
        raise ToolstackError(f"The disks cannot be put back: {error}.") from error


def _later_layers(target: Path, number: int) -> list[Path]:
    """What kept a disk as it was after a checkpoint; also for one that did not come about."""
    name = re.compile(re.escape(target.name) + r"\." + _NAME.pattern, re.ASCII)
    return [path for path in target.parent.iterdir() if (match := name.fullmatch(path.name)) and int(match[1]) > number]
