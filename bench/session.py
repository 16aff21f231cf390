"""One run of one system: a child process whose standard output is the console.

Each line is stamped with the host's monotonic clock as it arrives, so that a boot can be timed from
outside and a guest whose clock runs wrong is found out.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

from bench.records import Begin, End, Marker, Record, Value, parse

LAST_LINES = 12  # of console and standard error, kept to explain a failure


class Silent(Exception):
    """Nothing was heard of the system under test for too long; the text has its last words."""


@dataclass(frozen=True)
class Stamped:
    """A record and the seconds since the process was started."""

    seconds: float
    record: Record


@dataclass
class Session:
    """A running system. Use as a context manager: at its end the process group is killed."""

    command: Sequence[str]
    directory: Path | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    cpu: int | None = None  # pin the process and its children to this CPU

    def __enter__(self) -> Session:
        self.console: list[str] = []
        self.errors = tempfile.TemporaryFile()
        self.started = time.monotonic()
        self.process = subprocess.Popen(
            self.command,
            cwd=self.directory,
            env={**os.environ, **self.environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            start_new_session=True,
            preexec_fn=None if self.cpu is None else self._pin,  # in the child, before it can start others
        )
        return self

    def _pin(self) -> None:
        assert self.cpu is not None
        os.sched_setaffinity(0, {self.cpu})

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        assert self.process.stdout
        self.process.stdout.close()
        self.errors.close()

    def records(self, patience: float) -> Iterator[Stamped]:
        """Records as they come, until the console ends. `patience` is the longest silence in seconds."""
        for seconds, line in self._lines(patience):
            self.console = [*self.console[-LAST_LINES:], line]
            record = parse(line)
            if record:
                yield Stamped(seconds, record)

    def _lines(self, patience: float) -> Iterator[tuple[float, str]]:
        assert self.process.stdout
        pending = b""
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            while selector.select(patience):
                data = os.read(self.process.stdout.fileno(), 65536)
                arrived = time.monotonic() - self.started
                if not data:
                    return
                *lines, pending = (pending + data).replace(b"\r", b"\n").split(b"\n")
                for line in lines:
                    if line.strip():
                        yield arrived, line.decode(errors="replace")
        raise Silent(self.explain(f"nothing was heard for {patience:.0f} s"))

    def ends_within(self, seconds: float) -> bool:
        """Give the process time to end by itself; whether it did."""
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        return True

    def standard_error(self) -> str:
        """What the process has written to standard error so far."""
        self.errors.seek(0)
        return self.errors.read().decode(errors="replace")

    def explain(self, what: str) -> str:
        """`what` went wrong, and the last lines of console and standard error."""
        status = self.process.poll()
        ended = "" if status is None else f" (exit status {status})"
        errors = self.standard_error().strip().splitlines()[-LAST_LINES:]
        return "\n  ".join([f"{what}{ended}; last lines:", *self.console, *errors])


@dataclass
class Observation:
    """What one session showed: when each marker came, what each row gave, and what went wrong."""

    markers: dict[str, float] = field(default_factory=dict)  # seconds since the process was started
    values: dict[str, Value] = field(default_factory=dict)
    host_seconds: dict[str, float] = field(default_factory=dict)  # from @begin to @end, by the host's clock
    failures: dict[str, str] = field(default_factory=dict)  # by row
    unfinished: str | None = None  # the row that was running when the session broke
    broken: str | None = None  # why the session did not reach @done


def observe(session: Session, patience: float) -> Observation:
    """Follow a session to its `@done`, or to its untimely end."""
    seen = Observation()
    begun = 0.0
    try:
        for stamped in session.records(patience):
            match stamped.record:
                case Marker(name):
                    seen.markers.setdefault(name, stamped.seconds)
                    if name == "done":
                        return seen
                case Begin(row):
                    seen.unfinished, begun = row, stamped.seconds
                case Value() as value:
                    seen.values[value.row] = value
                case End(row, status):
                    seen.unfinished = None
                    seen.host_seconds[row] = stamped.seconds - begun
                    if status:
                        seen.failures[row] = f"its program ended with status {status}"
                    elif row not in seen.values:
                        seen.failures[row] = "its program gave no value"
        seen.broken = session.explain("the console ended before the work was done")
    except Silent as error:
        seen.broken = str(error)
    return seen
