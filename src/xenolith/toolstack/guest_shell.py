"""Running a command at the shell that a guest has on its console, as a person would: by typing it.

Nothing is needed in the guest but a POSIX shell at a prompt. What is typed comes back as an echo among the output, so
the marks around the output are typed in two halves, which only the shell joins. A shell that is not there yet loses
what is typed: a mark alone is typed again and again until it comes back.
"""

from __future__ import annotations

import secrets
import shlex
import time
from typing import Final, NamedTuple, Protocol

from xenolith.toolstack.errors import ToolstackError

ATTEMPT_S: Final = 1.0  # between two tries to find a shell
LONGEST_LINE: Final = 1000  # busybox's shell takes 1023 characters


class ShellResult(NamedTuple):
    """What a command at a guest's shell came to; a terminal tells standard output and error not apart."""

    returncode: int
    output: bytes


class Expecting(Protocol):
    """A console that can be read up to some words (api.Console)."""

    def expect(self, wanted: str | bytes, timeout: float | None = None) -> bytes: ...

    def write(self, data: str | bytes) -> None: ...


def run_at_shell(
    console: Expecting, command: str, timeout: float | None, timed_out: type[ToolstackError]
) -> ShellResult:
    """Raises `timed_out` when the time is up, which `console.expect` raises too."""
    deadline = None if timeout is None else time.monotonic() + timeout
    mark = secrets.token_hex(8)
    line = f"echo {_halved(mark)}-begin; sh -c {shlex.quote(command)}; echo {_halved(mark)}-end $?"
    if len(line.encode()) > LONGEST_LINE:
        raise ToolstackError(f"A command of {len(command)} characters is too long to be typed at a shell.")
    while True:
        left = ATTEMPT_S if deadline is None else min(ATTEMPT_S, max(deadline - time.monotonic(), 0.0))
        console.write(f"echo {_halved(mark)}\r")
        try:
            console.expect(f"{mark}\r\n", left)
            break
        except timed_out:
            if deadline is not None and time.monotonic() >= deadline:
                raise timed_out(f"There is no shell on the console after {timeout} seconds.") from None
    begin, end = f"{mark}-begin\r\n", f"{mark}-end "
    console.write(f"{line}\r".replace("\n", "\r"))
    console.expect(begin, _left(deadline))
    output = console.expect(end, _left(deadline))[: -len(end)]
    status = console.expect("\r\n", _left(deadline))
    return ShellResult(int(status), output.replace(b"\r\n", b"\n"))


def _halved(mark: str) -> str:
    """Text that the shell makes the mark of."""
    return f'{mark[:4]}""{mark[4:]}'


def _left(deadline: float | None) -> float | None:
    return None if deadline is None else max(deadline - time.monotonic(), 0.0)
