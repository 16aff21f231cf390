"""Connecting this terminal to a domain's console, as xenconsole does.

What is typed goes to the guest byte by byte, which needs the terminal in raw mode: the guest's own line discipline
echoes and edits. One character, Ctrl-] unless told otherwise, is kept back and ends the attachment.
"""

from __future__ import annotations

import os
import select
import termios
import threading
import tty
from collections.abc import Iterator
from contextlib import contextmanager

from xenolith.cli.xl_command import Failure
from xenolith.toolstack.client import ConsoleStream

_CHUNK = 4096


def escape_character(text: str) -> bytes:
    """The byte that "^]" or "x" stands for."""
    if len(text) == 2 and text[0] == "^" and "@" <= text[1].upper() <= "_":
        return bytes([ord(text[1].upper()) & 0x1F])
    if len(text) == 1 and text.isascii():
        return text.encode()
    raise Failure(f"`{text}' is no escape character: give one character, or ^ and one for a control character.")


def attach(stream: ConsoleStream, escape: bytes, stdin: int = 0, stdout: int = 1) -> None:
    """Copy between this terminal and the console until it ends or `escape` is typed; closes the stream.

    `stdin` and `stdout` are descriptors. When stdin ends (it is a file or a pipe) output goes on.
    """
    woken, wake = os.pipe()

    def copy_output() -> None:
        try:
            while data := stream.read():
                _write_all(stdout, data)
        except OSError:
            pass  # stdout is gone: nobody looks any more
        finally:
            os.close(wake)

    printer = threading.Thread(target=copy_output, name="console output", daemon=True)
    with _raw(stdin):
        printer.start()
        try:
            _copy_input(stream, stdin, woken, escape)
        finally:
            stream.close()
            printer.join()
            os.close(woken)


def _copy_input(stream: ConsoleStream, stdin: int, woken: int, escape: bytes) -> None:
    """Until `woken` says that the console has ended, or the escape character is typed."""
    sources = [stdin, woken]
    while True:
        ready, _, _ = select.select(sources, [], [])
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


@contextmanager
def _raw(descriptor: int) -> Iterator[None]:
    """The terminal in raw mode, if it is one."""
    if not os.isatty(descriptor):
        yield
        return
    saved = termios.tcgetattr(descriptor)
    tty.setraw(descriptor)
    try:
        yield
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, saved)


def _write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]
