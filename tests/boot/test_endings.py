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
        ("reboot -f", 120, b"rebooted before the command finished"),
        ("echo c >/proc/sysrq-trigger", 121, b"sysrq triggered crash"),
    ],
)
def test_a_command_that_ends_the_guest(xenolith_run: Run, how: str, status: int, said: bytes) -> None:
    done = xenolith_run("--", "sh", "-c", f"echo before; {how}; sleep 1000")
    assert done.stdout.startswith(b"before\n")
    assert done.returncode == status
    assert said in done.stderr


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
        line = [sys.executable, "-m", "xenolith", "run", "--engine", engine]
        self.process = subprocess.Popen(
            line, stdin=self.slave, stdout=self.slave, stderr=self.slave, start_new_session=True
        )
        self.output = b""

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
    terminal.process.wait()
    os.close(terminal.master)
    os.close(terminal.slave)


def test_a_shell_on_a_terminal_until_the_guest_powers_off(terminal: Terminal) -> None:
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


def test_ctrl_right_bracket_leaves(terminal: Terminal) -> None:
    terminal.expect(b" # ")
    terminal.type(b"\x1d")
    assert terminal.process.wait(DEADLINE_SECONDS) == 0
    assert termios.tcgetattr(terminal.slave) == terminal.before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_killed_run_restores_the_terminal(terminal: Terminal, number: signal.Signals) -> None:
    terminal.expect(b"Linux version")
    terminal.process.send_signal(number)
    assert terminal.process.wait(DEADLINE_SECONDS) == 128 + number
    assert termios.tcgetattr(terminal.slave) == terminal.before
