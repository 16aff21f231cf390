"""Somebody at a shell: real `xl` processes, a daemon started on demand, in a directory of their own."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

GUESTS = Path(__file__).parents[1] / "guests" / "prebuilt"
XL = [sys.executable, "-c", "from xenolith.cli.xl import main; main()"]


class Person:
    """Somebody with a shell, a directory and a daemon of their own."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.socket = directory / "run" / "control.sock"
        self.environment = os.environ | {"XENOLITH_SOCKET": str(self.socket)}

    def configuration(self, name: str, guest: str, **settings: str | int) -> str:
        lines = [f'name="{name}"', f'kernel="{GUESTS / guest}"', "memory=32"]
        lines += [f"{key}={json.dumps(value)}" for key, value in settings.items()]
        (self.directory / f"{name}.cfg").write_text("\n".join(lines) + "\n")
        return f"{name}.cfg"

    def xl(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*XL, *arguments], cwd=self.directory, env=self.environment, capture_output=True, text=True, timeout=120
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
            person.end_daemon(signal.SIGKILL)
