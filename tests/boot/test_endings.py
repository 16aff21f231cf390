"""However a run ends, it ends cleanly and says how."""

from __future__ import annotations

import os
import pty
import select
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Iterator

import pytest

from .conftest import DEADLINE_SECONDS, Run

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("how", "status", "said"),
    [
        ("poweroff -f", 123, b"powered off before the command finished"),
        ("poweroff", 123, b"powered off before the command finished"),
        ("reboot -f", 120, b"rebooted before the command finished"),
        ("reboot", 120, b"rebooted before the command finished"),
        ("halt", 123, b"powered off before the command finished"),
        ("echo c >/proc/sysrq-trigger", 121, b"sysrq triggered crash"),
    ],
)
def test_a_command_that_ends_the_guest(xenolith_run: Run, how: str, status: int, said: bytes) -> None:
    done = xenolith_run("--", "sh", "-c", f"echo before; {how}; sleep 1000")
    assert done.stdout.startswith(b"before\n")
    assert done.returncode == status
    assert said in done.stderr


@pytest.mark.parametrize(("command", "status"), [("poweroff", 123), ("reboot", 120)])
def test_a_command_that_is_the_end(xenolith_run: Run, command: str, status: int) -> None:
    done = xenolith_run("--", command)
    assert (done.returncode, done.stdout) == (status, b"")
    assert b"before the command finished" in done.stderr


def test_a_shell_is_fed_from_a_file_and_powers_off_at_its_end(xenolith_run: Run) -> None:
    done = xenolith_run(stdin=b"echo $((6 * 7)) is the answer\n")
    assert b"42 is the answer" in done.stdout
    assert done.returncode == 0


def test_a_kernel_panic_during_boot_is_reported(xenolith_run: Run) -> None:
    done = xenolith_run("--cmdline", "rdinit=/missing root=/dev/none", "--", "true")
    assert done.returncode == 121
    assert b"Kernel panic" in done.stderr


class Terminal:
    """`xenolith run` on a pseudo-terminal."""

    def __init__(self, engine: str) -> None:
        self.master, self.slave = pty.openpty()
        self.before = termios.tcgetattr(self.slave)
        self.engine = engine
        self.output = b""
        self.resize(33, 101)

    def run(self, *arguments: str) -> None:
        line = [sys.executable, "-m", "xenolith", "run", "--engine", self.engine, *arguments]
        become_its_session = (
            "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.argv[1], sys.argv[1:])"
        )
        self.process = subprocess.Popen(
            [sys.executable, "-c", become_its_session, *line],
            stdin=self.slave,
            stdout=self.slave,
            stderr=self.slave,
            start_new_session=True,
            env=os.environ | {"TERM": "vt220"},
        )

    def resize(self, rows: int, columns: int) -> None:
        termios.tcsetwinsize(self.master, (rows, columns))

    def expect(self, text: bytes) -> None:
        deadline = time.monotonic() + DEADLINE_SECONDS
        while text not in self.output:
            ready, _, _ = select.select([self.master], [], [], max(0, deadline - time.monotonic()))
            assert ready, f"never saw {text!r} in {self.output!r}"
            self.output += os.read(self.master, 4096)
        self.output = self.output.partition(text)[2]

    def type(self, text: bytes) -> None:
        os.write(self.master, text)

    @property
    def raw(self) -> bool:
        return not termios.tcgetattr(self.slave)[3] & termios.ICANON


@pytest.fixture
def terminal(engine_name: str) -> Iterator[Terminal]:
    terminal = Terminal(engine_name)
    yield terminal
    terminal.process.kill()
    terminal.process.wait(DEADLINE_SECONDS)
    os.close(terminal.master)
    os.close(terminal.slave)


def test_a_shell_on_a_terminal_until_the_guest_powers_off(terminal: Terminal) -> None:
    terminal.run()
    terminal.expect(b" # ")
    assert terminal.raw
    terminal.type(b"echo $((6 * 7))\r")
    terminal.expect(b"42")
    # By a process group of its own: the shell, before it has handed the terminal over, would ignore the next key.
    terminal.type(b"sh -c 'echo; echo sleeping; sleep 1000'\r")
    terminal.expect(b"\nsleeping")
    terminal.type(b"\x03")  # the guest's Ctrl-C, not ours
    terminal.expect(b" # ")
    terminal.type(b"exit\r")
    assert terminal.process.wait(DEADLINE_SECONDS) == 0
    assert termios.tcgetattr(terminal.slave) == terminal.before


def test_a_shell_has_the_terminals_type_and_its_size_and_hears_of_a_new_one(terminal: Terminal) -> None:
    terminal.run()
    terminal.expect(b" # ")
    terminal.type(b"stty size; echo $TERM\r")
    terminal.expect(b"33 101\r\nvt220\r\n")
    terminal.type(b"until [ \"$(stty size)\" = '40 90' ]; do :; done; echo re''sized\r")
    terminal.resize(40, 90)
    terminal.expect(b"resized\r\n")
    terminal.type(b"\x1d")
    assert terminal.process.wait(DEADLINE_SECONDS) == 0


def test_a_command_on_a_terminal_has_it(terminal: Terminal) -> None:
    terminal.run("--", "sh", "-c", "trap 'stty size' WINCH; stty size; tty; read x; echo got $x; cat; echo not reached")
    terminal.expect(b"33 101\r\n/dev/hvc0\r\n")
    assert terminal.raw
    terminal.type(b"a word\r")
    terminal.expect(b"got a word")
    terminal.resize(20, 70)
    terminal.type(b"\x03")
    assert terminal.process.wait(DEADLINE_SECONDS) == 128 + signal.SIGINT
    assert termios.tcgetattr(terminal.slave) == terminal.before


def test_a_command_hears_of_a_new_size(terminal: Terminal) -> None:
    terminal.run("--", "sh", "-c", "trap 'stty size; exit 7' WINCH; echo ready; while :; do sleep 0.1; done")
    terminal.expect(b"ready")
    terminal.resize(20, 70)
    terminal.expect(b"20 70")
    assert terminal.process.wait(DEADLINE_SECONDS) == 7


def test_ctrl_right_bracket_leaves_a_command_too(terminal: Terminal) -> None:
    terminal.run("--", "sh", "-c", "echo ready; cat")
    terminal.expect(b"ready")
    terminal.type(b"\x1d")
    assert terminal.process.wait(DEADLINE_SECONDS) == 0


def test_ctrl_right_bracket_leaves(terminal: Terminal) -> None:
    terminal.run()
    terminal.expect(b" # ")
    terminal.type(b"\x1d")
    assert terminal.process.wait(DEADLINE_SECONDS) == 0
    assert termios.tcgetattr(terminal.slave) == terminal.before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_killed_run_restores_the_terminal(terminal: Terminal, number: signal.Signals) -> None:
    terminal.run("-v")
    terminal.expect(b"Linux version")
    terminal.process.send_signal(number)
    assert terminal.process.wait(DEADLINE_SECONDS) == 128 + number
    assert termios.tcgetattr(terminal.slave) == terminal.before
