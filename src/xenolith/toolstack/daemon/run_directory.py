"""Where the daemon lives in the file system, and what one that was killed has left there.

One directory per daemon, for its user only:

    control.sock     the socket; its path may be chosen, the directory is then `<socket>.d`
    lock             locked by the running daemon; the kernel lets go of it however the daemon ends
    state.json       the domains that exist, written whenever one comes or goes
    daemon.log       the log of a daemon that was started on demand
    xenstore.sock    xenstore, for tools
    dump/            core files of domains that crashed

A daemon ended by SIGKILL or a power cut had no time to clean up: the next one finds a lock that nobody holds and a
state.json with domains in it, says which they were, and removes what is left. A directory by that name which is not
empty and has no lock was made by somebody else for another purpose; nothing is put into it.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from xenolith.dom0 import unix_socket
from xenolith.toolstack.client import ToolstackError
from xenolith.toolstack.daemon.socket_path import SOCKET_VARIABLE as SOCKET_VARIABLE
from xenolith.toolstack.daemon.socket_path import default_socket_path

_ELSEWHERE: Final = f"choose another socket with --socket or {SOCKET_VARIABLE}"


def default_socket() -> Path:
    """See `socket_path`."""
    return Path(default_socket_path())


class AlreadyRunning(ToolstackError):
    """Another daemon serves this socket."""


class UnsafeDirectory(ToolstackError):
    """The directory belongs to somebody else, who could put another socket in our place."""


class UnusableDirectory(ToolstackError):
    """The directory cannot be made or written to, or holds something else."""


@dataclass(frozen=True, slots=True)
class LostDomain:
    """A domain that was running when its daemon was killed."""

    domid: int
    name: str


@dataclass(frozen=True, slots=True)
class Leftovers:
    """What a daemon that was killed has left."""

    pid: int
    domains: tuple[LostDomain, ...]

    def describe(self) -> str:
        """One sentence for people."""
        names = ", ".join(f"{domain.name} (domid {domain.domid})" for domain in self.domains)
        lost = f"its domains are lost: {names}" if names else "it had no domains"
        return f"The daemon that ran before (pid {self.pid}) was killed; {lost}."


class RunDirectory:
    """The directory of one daemon; only the daemon that holds the lock may make one."""

    def __init__(self, socket_path: Path) -> None:
        self.socket_path = socket_path
        self.path = socket_path.with_name(socket_path.name + ".d")
        self._lock: int | None = None

    @property
    def log_path(self) -> Path:
        return self.path / "daemon.log"

    @property
    def dump_path(self) -> Path:
        return self.path / "dump"

    @property
    def xenstore_socket_path(self) -> Path:
        return self.path / "xenstore.sock"

    @property
    def _state_path(self) -> Path:
        return self.path / "state.json"

    def exists(self) -> bool:
        """Whether a daemon has been here before."""
        return (self.path / "lock").exists()

    def prepare(self) -> None:
        """Make the directories, for this user only. Raises UnsafeDirectory and UnusableDirectory."""
        try:
            unix_socket.is_there(self.socket_path)
        except OSError as error:
            raise UnusableDirectory(str(error)) from error
        for directory in (self.socket_path.parent, self.path):
            try:
                directory.mkdir(mode=0o700, exist_ok=True)
                status = directory.lstat()
                names = os.listdir(self.path) if directory == self.path else []
            except OSError as error:
                reason = error.strerror
                raise UnusableDirectory(f"the directory {directory} cannot be used: {reason}; {_ELSEWHERE}") from error
            ours = status.st_uid in (os.getuid(), 0)
            sticky_or_closed = bool(status.st_mode & 0o1000) or not status.st_mode & 0o022
            if not ours or not sticky_or_closed:
                raise UnsafeDirectory(f"{directory} can be changed by others: {_ELSEWHERE}")
            if names and not {"lock", "starting"} & set(names):
                raise UnusableDirectory(f"{self.path} holds something else than a daemon's files: {_ELSEWHERE}")

    @contextmanager
    def starting(self) -> Iterator[None]:
        """Held by a program that is about to start the daemon, so that only one does. Raises as `prepare` does."""
        self.prepare()
        lock = self._open("starting")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
        finally:
            os.close(lock)

    def acquire(self) -> Leftovers | None:
        """Become the daemon of this directory; what a killed one left, cleaned away. Raises AlreadyRunning."""
        self.prepare()
        lock = self._open("lock")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            raise AlreadyRunning(f"a daemon serves {self.socket_path} already") from None
        self._lock = lock
        leftovers = self._leftovers()
        self.write_state([])
        return leftovers

    def _open(self, name: str) -> int:
        try:
            return os.open(self.path / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise UnusableDirectory(f"{self.path / name} cannot be written: {error.strerror}; {_ELSEWHERE}") from error

    def _leftovers(self) -> Leftovers | None:
        try:
            state = json.loads(self._state_path.read_text())
            domains = tuple(LostDomain(int(domain["domid"]), str(domain["name"])) for domain in state["domains"])
            return Leftovers(int(state["pid"]), domains)
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError, OSError):
            return Leftovers(0, ())  # it was killed while it wrote; there is nothing to tell

    def write_state(self, domains: list[LostDomain]) -> None:
        """Note which domains exist. A reader sees the old state or the new one, nothing between."""
        state = {"pid": os.getpid(), "domains": [{"domid": lost.domid, "name": lost.name} for lost in domains]}
        fresh = self._state_path.with_suffix(".new")
        try:
            fresh.write_text(json.dumps(state))
            fresh.replace(self._state_path)
        except OSError as error:
            raise UnusableDirectory(f"{fresh} cannot be written: {error.strerror}") from error

    def release(self) -> None:
        """Clean up after an orderly end; whoever is not this directory's daemon changes nothing."""
        if self._lock is not None:
            self._state_path.unlink(missing_ok=True)
            os.close(self._lock)
            self._lock = None
