"""This terminal and these streams: connecting them to a domain's console, as xenconsole does.

What is typed goes to the guest byte by byte, which needs the terminal in raw mode: the guest's own line discipline
echoes and edits. One character, Ctrl-] unless told otherwise, is kept back and ends the attachment.
"""

from __future__ import annotations

import os
import signal
import termios
import threading
import tty
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Self

from xenolith.cli.xl_command import Failure
from xenolith.ready import readable, writable
from xenolith.toolstack.client import ConsoleStream

_CHUNK = 4096


def escape_character(text: str) -> bytes:
    """The byte that "^]" or "x" stands for."""
    if len(text) == 2 and text[0] == "^" and "@" <= text[1].upper() <= "_":
        return bytes([ord(text[1].upper()) & 0x1F])
    if len(text) == 1 and text.isascii():
        return text.encode()
    raise Failure(f"`{text}' is no escape character: give one character, or ^ and one for a control character.")


class OutputLost(Failure):
    """Standard output takes no more: nobody reads it (status 141, as by SIGPIPE), or it cannot be written."""

    def __init__(self, error: OSError) -> None:
        closed = isinstance(error, BrokenPipeError)
        super().__init__(f"standard output cannot be written: {error.strerror}", 141 if closed else 1)


def attach(stream: ConsoleStream, escape: bytes, stdin: int = 0, stdout: int = 1) -> None:
    """Copy between this terminal and the console until it ends or `escape` is typed; closes the stream.

    `stdin` and `stdout` are descriptors. When stdin ends (it is a file or a pipe) output goes on. Raises OutputLost.
    """
    woken, wake = os.pipe()
    lost: list[OSError] = []

    def copy_output() -> None:
        try:
            while data := stream.read():
                try:
                    write_all(stdout, data)
                except OSError as error:
                    lost.append(error)
                    return
        finally:
            os.close(wake)

    printer = threading.Thread(target=copy_output, name="console output", daemon=True)
    with RawTerminal(stdin) as raw:
        raw.enter()
        printer.start()
        try:
            _copy_input(stream, stdin, woken, escape)
        finally:
            stream.close()
            printer.join()
            os.close(woken)
    if lost:
        raise OutputLost(lost[0])


def _copy_input(stream: ConsoleStream, stdin: int, woken: int, escape: bytes) -> None:
    """Until `woken` says that the console has ended, or the escape character is typed."""
    sources = [stdin, woken]
    while True:
        ready = readable(*sources)
        if woken in ready:
            return
        data = os.read(stdin, _CHUNK)
        if not data:
            sources = [woken]
            continue
        before, found, _ = data.partition(escape)
        if before:
            stream.write(before)
        if found:
            return


class RawTerminal:
    """A terminal that may be put into raw mode, and is as before when this is left; nothing for what is none."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._before: list[Any] | None = None
        self._lock = threading.Lock()
        self._left = False

    def enter(self) -> None:
        """By any thread."""
        with self._lock:
            if self._before is None and not self._left and os.isatty(self._descriptor):
                self._before = termios.tcgetattr(self._descriptor)
                tty.setraw(self._descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._left = True
            if self._before is not None:
                termios.tcsetattr(self._descriptor, termios.TCSADRAIN, self._before)


def terminal_size(descriptor: int) -> tuple[int, int] | None:
    """The terminal's rows and columns, if it is one and knows."""
    try:
        size = os.get_terminal_size(descriptor)
    except OSError:
        return None
    return (size.lines, size.columns) if size.lines and size.columns else None


def write_all(descriptor: int, data: bytes) -> None:
    """Write all of it, also to a descriptor that does not block; raises the OSError of one that takes no more."""
    view = memoryview(data)
    while view:
        try:
            view = view[os.write(descriptor, view) :]
        except BlockingIOError:
            writable(descriptor)


@contextmanager
def signals_carried(
    numbers: Iterable[int], signalled: Callable[[int], object], resized: Callable[[tuple[int, int]], object]
) -> Iterator[None]:
    """While this lasts, these signals are told to `signalled` and do nothing else, and a new size to `resized`.

    Python runs a handler when the main thread next executes Python, and one that has just gone to wait might never.  So
    a thread reads from the pipe that the interpreter's own, immediate handler writes each number into.
    """
    come, note = os.pipe()
    os.set_blocking(note, False)

    def carry() -> None:
        while read := os.read(come, 64):
            for number in read:
                if number != signal.SIGWINCH:
                    signalled(number)
                elif size := terminal_size(1):
                    resized(size)

    before = {number: signal.signal(number, lambda *_: None) for number in (*numbers, signal.SIGWINCH)}
    signal.set_wakeup_fd(note)
    thread = threading.Thread(target=carry, name="signals", daemon=True)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(-1)
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(note)
        thread.join()
        os.close(come)
