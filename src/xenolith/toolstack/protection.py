"""Protection of a domain by another daemon: `xenolith protect`, and what the other daemon does."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import mkdtemp
from typing import TYPE_CHECKING, Final

from xenolith.dom0.migration.live import Refused
from xenolith.dom0.migration.protect import Epoch, Protection, Standby
from xenolith.hypervisor.control import DomainCreateError, NoSuchDomain, NotTracked, RecordError
from xenolith.toolstack.client import ProtectionInfo, ToolstackError
from xenolith.toolstack.config.disk import DiskFormat, virtual_device
from xenolith.toolstack.config.domain import DomainConfig
from xenolith.toolstack.daemon.codec import CodecError, Json, encode
from xenolith.toolstack.peers import Connection, connected
from xenolith.toolstack.saving import configuration

if TYPE_CHECKING:
    from xenolith.dom0.services import Dom0, GuestDomain

TAKING_OVER_SECONDS: Final = 20.0  # that ports of the host may take to become free


class ProtectedDomain:
    """Keeps a domain protected on a thread of its own, until it ends, is stopped, or the other side is lost."""

    def __init__(
        self,
        dom0: Dom0,
        domain: GuestDomain,
        config: DomainConfig,
        to: str,
        seconds: float,
        lock: threading.RLock,
    ) -> None:
        """Returns when the other side holds it. `lock` is held while something is done to the domain.

        Raises ToolstackError.
        """
        self.to: Final = to
        self._dom0, self._domain = dom0, domain
        self._seconds = seconds
        self._lock = lock
        self._stopping = threading.Event()
        self._ready = threading.Event()
        self._failure = ""
        self._last: Epoch | None = None
        self._thread = threading.Thread(target=self._run, args=(encode(config),), name="protection", daemon=True)
        self._thread.start()
        self._ready.wait()
        if self._failure:
            raise ToolstackError(f"Domain {domain.domid} is not protected: {self._failure}.")

    def info(self) -> ProtectionInfo:
        last = self._last
        return ProtectionInfo(
            domid=self._domain.domid,
            to=self.to,
            failure=self._failure,
            epochs=last.number if last else 0,
            pages=last.pages if last else 0,
            blocks=last.blocks if last else 0,
            stood_ns=last.stood_ns if last else 0,
            took_ns=last.took_ns if last else 0,
        )

    def _run(self, config: Json) -> None:
        try:
            with connected(self.to, "protect") as connection:
                self._protect(connection, config)
        except (ToolstackError, Refused, RecordError, NotTracked, NoSuchDomain, OSError) as error:
            self._failure = str(error) or "the other side has gone away"
            if not self._stopping.is_set():
                self._dom0.domain.log(f"d{self._domain.domid}: not protected any more: {self._failure}")
        finally:
            self._ready.set()

    def _protect(self, connection: Connection, config: Json) -> None:
        source, out = connection.source, connection.out
        protection = Protection(self._dom0, self._domain, out, source, {"config": config})
        try:
            self._ready.set()
            while not self._stopping.is_set():
                began = time.monotonic()
                with self._lock:
                    if self._stopping.is_set() or self._domain.end is not None:
                        break
                    self._last = protection.epoch()
                self._stopping.wait(max(began + self._seconds - time.monotonic(), 0))
            protection.dismiss()
        finally:
            protection.close()

    def stop(self) -> None:
        """Need it no more. The caller does not hold the domain's lock if `join` is to follow."""
        self._stopping.set()

    def join(self) -> None:
        self._thread.join()


def standby_directory() -> Path:
    """Where the disks are kept of domains that are protected here."""
    state = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
    return Path(state).absolute() / "xenolith" / "protected"


def stand_by(
    dom0: Dom0,
    connection: Connection,
    directory: Path,
    take: Callable[[DomainConfig, Standby], int],
    arrived: Callable[[int], None],
) -> None:
    """Hold a domain for another daemon, and go on with it when that dies. Raises ToolstackError."""
    try:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        place = Path(mkdtemp(dir=directory))
        try:
            standby = Standby(dom0.control, connection.source, connection.out, place)
        except BaseException:
            os.rmdir(place)
            raise
    except (RecordError, DomainCreateError, OSError) as error:
        connection.answer(f"{error}\n".encode())
        raise ToolstackError(f"a domain cannot be protected here: {error}") from error
    taken = False
    try:
        config = configuration(standby.toolstack)
        _put_disks(config, standby)
        if standby.follow():
            arrived(take(config, standby))
            taken = True
    except (RecordError, CodecError) as error:
        raise ToolstackError(f"a domain that was protected here is lost: {error}") from error
    finally:
        if taken:
            standby.close_disks()
        else:
            standby.close()
            os.rmdir(place)


def _put_disks(config: DomainConfig, standby: Standby) -> None:
    """Its disks are the copies here."""
    for at, disk in enumerate(config.disks):
        path = standby.disk_paths.get(virtual_device(disk.vdev or "") or 0)
        if path is not None:
            config.disks[at] = replace(disk, target=str(path), format=DiskFormat.RAW)


def patiently(work: Callable[[], int]) -> int:
    """Try until the host has let go of what the dead daemon used. Raises ToolstackError."""
    deadline = time.monotonic() + TAKING_OVER_SECONDS
    while True:
        try:
            return work()
        except ToolstackError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)
