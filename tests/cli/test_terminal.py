"""Attaching a terminal to a console: a real pty on one side, a console in memory on the other."""

from __future__ import annotations

import fcntl
import os
import pty
import termios
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import ClassVar

import pytest

from toolstack.fake import FakeConsole
from xenolith.cli import inside
from xenolith.cli.terminal import OutputLost, attach, escape_character, write_all
from xenolith.cli.xl_command import Failure
from xenolith.toolstack.client import ProcessEnd, ProcessOutput

HIGH = 1024  # descriptors from here on are none for select(): a program with many domains has them


class Terminal:
    """A pty: `program` is the terminal of the program, `person` the end where a person would sit."""

    def __init__(self) -> None:
        self.person, program = pty.openpty()
        self.program = fcntl.fcntl(program, fcntl.F_DUPFD, HIGH)
        os.close(program)

    def read_until(self, text: bytes) -> bytes:
        seen = b""
        while text not in seen:
            seen += os.read(self.person, 4096)
        return seen

    def type(self, data: bytes) -> None:
        os.write(self.person, data)

    def close(self) -> None:
        os.close(self.program)
        os.close(self.person)

    def attached_to(self, console: FakeConsole, stdin: int | None = None) -> threading.Thread:
        source = self.program if stdin is None else stdin
        thread = threading.Thread(target=attach, args=(console, b"\x1d", source, self.program))
        thread.start()
        return thread


@pytest.fixture
def terminal() -> Iterator[Terminal]:
    terminal = Terminal()
    yield terminal
    terminal.close()


def typed(console: FakeConsole, data: bytes) -> bool:
    with console.changed:
        return console.changed.wait_for(lambda: bytes(console.typed) == data, timeout=20)


def test_keys_reach_the_guest_one_by_one_and_its_output_the_screen(terminal: Terminal) -> None:
    console = FakeConsole()
    thread = terminal.attached_to(console)
    console.print(b"login: ")
    assert terminal.read_until(b"login: ") == b"login: "
    terminal.type(b"root\x03\r")
    assert typed(console, b"root\x03\r")
    console.close()
    thread.join()


def test_the_escape_character_detaches_and_is_not_sent(terminal: Terminal) -> None:
    console = FakeConsole()
    before = termios.tcgetattr(terminal.program)
    thread = terminal.attached_to(console)
    console.print(b"ready")
    terminal.read_until(b"ready")
    terminal.type(b"ab\x1dcd")
    thread.join(timeout=20)
    assert not thread.is_alive()
    assert bytes(console.typed) == b"ab"
    assert console.closed
    assert termios.tcgetattr(terminal.program) == before


def test_the_attachment_ends_with_the_console(terminal: Terminal) -> None:
    console = FakeConsole()
    console.print(b"last words\n")
    thread = terminal.attached_to(console)
    terminal.read_until(b"last words")
    console.close()
    thread.join(timeout=20)
    assert not thread.is_alive()


def test_output_goes_on_when_stdin_has_ended(terminal: Terminal) -> None:
    nothing = os.open("/dev/null", os.O_RDONLY)
    console = FakeConsole()
    thread = terminal.attached_to(console, nothing)
    console.print(b"still here")
    assert terminal.read_until(b"here") == b"still here"
    console.close()
    thread.join()
    os.close(nothing)


def test_a_pipe_that_does_not_block_gets_everything(terminal: Terminal) -> None:
    """2 MiB through a pipe of 64 KiB whose reader has not begun yet."""
    come, go = os.pipe()
    os.set_blocking(go, False)
    data = bytes(range(256)) * 8192
    writer = threading.Thread(target=write_all, args=(go, data))
    writer.start()
    received = b""
    while len(received) < len(data):
        received += os.read(come, 1 << 16)
    writer.join()
    assert received == data
    os.close(come)
    os.close(go)


@pytest.mark.parametrize(("full", "status"), [(True, 1), (False, 141)])
def test_output_that_cannot_be_written_ends_the_attachment_with_the_reason(full: bool, status: int) -> None:
    come, go = os.pipe()
    os.close(come)
    out = os.open("/dev/full", os.O_WRONLY) if full else go
    nothing = os.open("/dev/null", os.O_RDONLY)
    console = FakeConsole()
    console.print(b"lost")
    with pytest.raises(OutputLost, match="No space left" if full else "Broken pipe") as lost:
        attach(console, b"\x1d", nothing, out)
    assert lost.value.status == status
    os.close(nothing)
    os.close(go)
    if full:
        os.close(out)


def test_the_escape_character_may_be_chosen() -> None:
    assert escape_character("^]") == b"\x1d"
    assert escape_character("^a") == b"\x01"
    assert escape_character("q") == b"q"
    for wrong in ("", "^^^", "ab", "é"):
        with pytest.raises(Failure, match="escape character"):
            escape_character(wrong)


def test_a_list_of_a_guests_processes_has_nothing_that_our_terminal_would_obey(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    class Listing:
        said: ClassVar[list[ProcessOutput | ProcessEnd]] = [
            ProcessOutput(b"1 init\x1b]0;owned\x07\n"),
            ProcessOutput(b"\x1b[2J", errors=True),
            ProcessEnd(0),
        ]

        def read(self) -> ProcessOutput | ProcessEnd:
            return self.said.pop(0)

        def end_input(self) -> None: ...
        def signal(self, number: int) -> None: ...
        def close(self) -> None: ...

    toolstack = SimpleNamespace(client=SimpleNamespace(execute=lambda domid, wanted: Listing()))
    monkeypatch.setattr(inside, "connect_to_daemon", lambda: toolstack)
    monkeypatch.setattr(inside, "find", lambda client, name: 1)
    monkeypatch.setattr(os, "isatty", lambda descriptor: True)
    assert inside.ps.callback is not None
    with pytest.raises(SystemExit):
        inside.ps.callback("web")
    out, errors = capfd.readouterr()
    assert "init" in out and not {"\x1b", "\x07"} & {*out, *errors}
