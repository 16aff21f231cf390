"""Somebody at a shell: real `xl` processes, a daemon started on demand, in a directory of their own."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

GUESTS = Path(__file__).parents[1] / "guests" / "prebuilt"
XL = [sys.executable, "-c", "from xenolith.cli.xl import main; main()"]


class Person:
    """Somebody with a shell, a directory and a daemon of their own."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.socket = directory / "run" / "control.sock"
        self.environment = os.environ | {"XENOLITH_SOCKET": str(self.socket)}

    def configuration(self, name: str, guest: str, **settings: str | int | list[str]) -> str:
        lines = [f'name="{name}"', f'kernel="{GUESTS / guest}"', "memory=32"]
        lines += [f"{key}={json.dumps(value)}" for key, value in settings.items()]
        (self.directory / f"{name}.cfg").write_text("\n".join(lines) + "\n")
        return f"{name}.cfg"

    def xl(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*XL, *arguments], cwd=self.directory, env=self.environment, capture_output=True, text=True, timeout=120
        )

    def xenolith(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        program = [sys.executable, "-c", "from xenolith.cli.entry import xenolith; xenolith()"]
        environment = self.environment | {"XDG_STATE_HOME": str(self.directory / "state")}
        return subprocess.run(
            [*program, *arguments], cwd=self.directory, env=environment, capture_output=True, text=True, timeout=120
        )

    def xl_on_a_terminal(self, *arguments: str) -> str:
        """Everything that appears on the screen until the command ends."""
        person, program = pty.openpty()
        process = subprocess.Popen(
            [*XL, *arguments], cwd=self.directory, env=self.environment, stdin=program, stdout=program, stderr=program
        )
        os.close(program)
        screen = b""
        try:
            while data := os.read(person, 4096):
                screen += data
        except OSError:
            pass  # the last process has closed the terminal
        os.close(person)
        process.wait()
        return screen.decode(errors="replace").replace("\r\n", "\n")

    @contextmanager
    def console(self, name: str) -> Iterator[Screen]:
        """Attached to a domain's console."""
        screen = Screen(self, "console", name)
        try:
            yield screen
        finally:
            screen.close()

    def wait_for(self, *arguments: str, shows: str, seconds: float = 60) -> str:
        """Repeat a command until it shows something; what it showed."""
        deadline = time.monotonic() + seconds
        while shows not in (out := self.xl(*arguments).stdout):
            assert time.monotonic() < deadline, f"xl {' '.join(arguments)} never showed {shows!r} but {out!r}"
        return out

    def log(self) -> list[dict[str, object]]:
        path = self.socket.with_name("control.sock.d") / "daemon.log"
        return [json.loads(line) for line in path.read_text().splitlines() if line.startswith("{")]

    def daemon_pid(self) -> int:
        return next(int(str(entry["pid"])) for entry in reversed(self.log()) if entry["event"] == "serving")

    def end_daemon(self, number: int) -> None:
        """Send a signal and wait until the process is gone."""
        pidfd = os.pidfd_open(self.daemon_pid())
        signal.pidfd_send_signal(pidfd, number)
        select.select([pidfd], [], [])
        os.close(pidfd)


@contextmanager
def person_in(directory: Path) -> Iterator[Person]:
    """A person, whose daemon is gone afterwards."""
    person = Person(directory)
    try:
        yield person
    finally:
        if person.socket.exists():
            with suppress(ProcessLookupError):
                person.end_daemon(signal.SIGKILL)


class Ended(AssertionError):
    """A command has ended although more was expected of it."""


class Screen:
    """A command on a pseudo-terminal, and somebody in front of it."""

    def __init__(self, person: Person, *arguments: str, program: Sequence[str] = XL) -> None:
        self._terminal, other_end = pty.openpty()
        self._process = subprocess.Popen(
            # So that Ctrl-C is a signal, also where whoever runs the tests ignores that one.
            ["setsid", "--ctty", "--wait", "env", "--default-signal=INT", *program, *arguments],
            cwd=person.directory,
            env=person.environment | {"TERM": "xterm", "COLUMNS": "120", "LINES": "40"},
            stdin=other_end,
            stdout=other_end,
            stderr=other_end,
        )
        os.close(other_end)
        self.shown = b""  # all of it
        self._unseen = b""  # since what was expected last

    def expect(self, text: bytes, seconds: float) -> None:
        """Wait until this appears after what was expected before."""
        deadline = time.monotonic() + seconds
        while text not in self._unseen:
            ready, _, _ = select.select([self._terminal], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                raise AssertionError(f"{text!r} did not appear in {seconds} s, but {self._unseen!r}")
            data = self._read()
            self._unseen += data
            self.shown += data
        self._unseen = self._unseen.partition(text)[2]

    def _read(self) -> bytes:
        try:
            data = os.read(self._terminal, 4096)
        except OSError:
            data = b""
        if not data:
            raise Ended(f"the command has ended; it showed {self.shown!r}")
        return data

    def type(self, text: bytes) -> None:
        os.write(self._terminal, text)

    def wait(self, seconds: float) -> int:
        """Read on until the command ends; its exit status."""
        with suppress(Ended):
            self.expect(b"\0never shown\0", seconds)
        return self._process.wait(seconds)

    def close(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        os.close(self._terminal)
