"""Running a command in a guest from its start to its end, as subprocess.run does with a process."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from xenolith.toolstack.client import Execution, Outcome, ProcessEnd, ProcessStream, ToolstackError

MOST_OUTPUT = 1 << 30  # bytes that are kept of a command's output: a guest must not fill this program's memory


@dataclass(frozen=True)
class Finished:
    """A command that has ended.

    `exit_status` is what a shell would have in $?: 128 and the number of the signal that ended it; 126 and 127 where it
    could not be started, for which `message` says why. `output` is both streams, as they came.
    """

    exit_status: int
    stdout: bytes
    stderr: bytes
    output: bytes = field(repr=False)
    message: str = ""

    @property
    def returncode(self) -> int:
        """As subprocess calls it."""
        return self.exit_status

    def check(self) -> Finished:
        """Raises ToolstackError where it has failed."""
        if self.exit_status:
            words = self.message or printable(self.stderr[-400:]).strip()
            raise ToolstackError(f"The command ended with status {self.exit_status}: {words or 'it said nothing'}.")
        return self


def execution(
    command: str | Sequence[str],
    env: Mapping[str, str] | None = None,
    workdir: str = "/root",
    user: str = "",
    timeout: float | None = None,
    limits: Mapping[str, int] | None = None,
    terminal: tuple[int, int] | None = None,
) -> Execution:
    """What to run: words, or a line for the guest's shell."""
    words = ("/bin/sh", "-c", command) if isinstance(command, str) else tuple(command)
    return Execution(
        command=words,
        environment=dict(env or {}),
        directory=workdir,
        user=user,
        timeout=timeout,
        limits=dict(limits or {}),
        terminal=terminal,
    )


def finish(process: ProcessStream, input: bytes = b"") -> tuple[Finished, Outcome]:
    """Give a command its input and wait for its end; the process is closed then."""
    output, streams = bytearray(), (bytearray(), bytearray())  # pieces may be of a byte each
    feeder = threading.Thread(target=_feed, args=(process, input), name="input", daemon=True)
    try:
        if input:
            feeder.start()  # a command may want to be read before it reads on
        else:
            process.end_input()
        while not isinstance(item := process.read(), ProcessEnd):
            if item is not None:
                output += item.data
                streams[item.errors].extend(item.data)
            if len(output) > MOST_OUTPUT:
                raise ToolstackError(f"The command has printed more than {MOST_OUTPUT >> 20} MiB.")
    finally:
        process.close()
    stdout, stderr = map(bytes, streams)
    return Finished(item.status, stdout, stderr, bytes(output), item.message), item.outcome


def _feed(process: ProcessStream, data: bytes) -> None:
    with suppress(ToolstackError):
        process.write(data)
        process.end_input()


def printable(data: bytes) -> str:
    """What a guest has said, without anything that a terminal would obey."""
    text = data.decode("utf-8", "replace")
    return "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)
