"""How every command begins and ends: with standard descriptors that exist, and with one line for what went wrong.

Whatever a command runs into becomes a sentence on standard error and a status that is not 0: output that cannot be
written (a full disk, a closed descriptor), memory or processes that the host does not give, also while the command is
being loaded. A reader that went away (`xl list | head -1`) and Ctrl-C end it quietly with the status that a shell gives
to programs which those kill.
"""

from __future__ import annotations

import errno
import io
import os
import select
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, NoReturn, TextIO

from xenolith.cli import INTERRUPTED, PIPE_CLOSED

if TYPE_CHECKING:
    import click
    from typing_extensions import Buffer

FAILED = 1
_OF_OUTPUT = (errno.ENOSPC, errno.EBADF, errno.EFBIG, errno.EIO, errno.EDQUOT, errno.EAGAIN)


def run(name: str, load: Callable[[], click.Command | int], arguments: list[str] | None = None) -> NoReturn:
    """Run a command as this process and end it; or one that was run while it was loaded, and had this status."""
    _complete_standard_descriptors()
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, _end)  # what is left half done is undone
    try:
        status = _run(name, load, arguments)
        sys.stdout.flush()
    except OSError as error:
        status = _failed(name, error)
    except KeyboardInterrupt:
        status = INTERRUPTED
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # what is left to do is Python's own end
    _let_go_of_output()
    sys.exit(status)


def _end(number: int, frame: object) -> NoReturn:
    raise SystemExit(128 + number)


def _run(name: str, load: Callable[[], click.Command | int], arguments: list[str] | None) -> int:
    try:
        command = load()
        if isinstance(command, int):
            return command
        if signal.getsignal(signal.SIGINT) not in (signal.SIG_IGN, None):
            signal.signal(signal.SIGINT, signal.default_int_handler)
        return _status(command, name, arguments)
    except SystemExit as error:  # click's way out when the output was closed, and our own on SIGTERM
        return error.code if isinstance(error.code, int) else FAILED
    except MemoryError:
        return _say(name, "the host does not give this command the memory that it needs (see `ulimit -v`)")
    except ImportError as error:
        reason = str(error).strip().rpartition("\n")[2]  # numpy has a page of advice before it
        return _say(name, f"a part of this program cannot be loaded: {reason}")
    except RuntimeError as error:
        if "new thread" not in str(error):
            raise
        return _say(name, "the host does not let this command start a thread (see `ulimit -u`)")


def _status(command: click.Command, name: str, arguments: list[str] | None) -> int:
    import click

    try:
        status = command.main(arguments, prog_name=name, standalone_mode=False)
        return status if isinstance(status, int) else 0
    except click.Abort:  # what click makes of KeyboardInterrupt and of an end of input
        return INTERRUPTED
    except click.ClickException as error:
        error.show()
        return error.exit_code


def _failed(name: str, error: OSError) -> int:
    if error.errno == errno.EPIPE:
        return PIPE_CLOSED
    about = f"{error.filename}: " if error.filename else "cannot write the output: " * (error.errno in _OF_OUTPUT)
    return _say(name, f"{about}{error.strerror or error}")


def _say(name: str, text: str) -> int:
    with suppress(OSError):
        print(f"{name}: {text}", file=sys.stderr, flush=True)
    return FAILED


def _complete_standard_descriptors() -> None:
    """Descriptors 0 to 2 exist, so that no file or socket gets their number; writing to one that was closed fails."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open("/dev/null", os.O_RDONLY)  # as the lowest number that is free, which is this one
            os.set_inheritable(number, True)
    sys.stdout, sys.stderr = _output(1), _output(2)


def _output(number: int) -> TextIO:
    """A text stream to a descriptor: by lines on a terminal, and patient with one that does not block."""
    raw = _Patient(number, "w", closefd=False)
    interactive = raw.isatty()
    buffer = io.BufferedWriter(raw)
    return io.TextIOWrapper(buffer, errors="backslashreplace", line_buffering=interactive or number == 2)


class _Patient(io.FileIO):
    """A descriptor that may be non-blocking, which whoever shares it decides: when it is full, this waits."""

    def write(self, data: Buffer, /) -> int:
        while (count := super().write(data)) is None:
            select.select([], [self], [])
        return count


def _let_go_of_output() -> None:
    """What could not be written was told; give Python's own flush at the end somewhere to put it."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            nowhere = os.open("/dev/null", os.O_WRONLY)
            with suppress(OSError, ValueError):
                os.dup2(nowhere, stream.fileno())
            os.close(nowhere)
