"""`xl migrate` as Ganeti and Pacemaker's agent call it; whatever is cut or killed when, a domain runs in one place."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from people import XL, Person, person_in

pytestmark = pytest.mark.slow

# Passes bytes on between its caller and `xl migrate-receive`. When a step of the conversation is reached it does
# something instead of, or before, passing that on: cuts the connection, or kills a daemon. The sections of the stream
# have a header of 32 bytes; kinds: 1 description, 2 pages, 3 frames, 4 state, 5 end, 6 go.
RELAY = """
import os, signal, struct, subprocess, sys, threading
step, what, *command = sys.argv[1:]
if "-q" in command: os.execvp(command[0], command)
far = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
def read(file, count):
    data = b""
    while len(data) < count and (piece := os.read(file, count - len(data))): data += piece
    return data
def write(file, data):
    while data: data = data[os.write(file, data):]
def at(name):
    if name != step: return
    if what == "cut": far.stdin.close(); os._exit(1)
    pid = int(what)
    fd = os.pidfd_open(pid)
    os.kill(pid, signal.SIGKILL)
    import select; select.select([fd], [], [])
def back():
    write(1, read(far.stdout.fileno(), %d))
    for name in ("ready", "started"):
        line = far.stdout.readline()
        at("before " + name); write(1, line); at("after " + name)
    while data := os.read(far.stdout.fileno(), 4096): write(1, data)
    os._exit(0)
threading.Thread(target=back, daemon=True).start()
out = far.stdin.fileno()
try:
    write(out, read(0, 24))
    while len(header := read(0, 32)) == 32:
        kind, flags, stored, _, _ = struct.unpack("<IIQQQ", header)
        at(f"before {kind}")
        write(out, header + read(0, stored))
        at(f"after {kind}")
except BrokenPipeError:
    pass
far.stdin.close()
far.wait()
threading.Event().wait(1)
"""
BANNER = b"xl migration receiver ready, send binary domain data.\n"
SAID = re.compile(rb"^flushed (\d+)\r?\n", re.MULTILINE)


class Two:
    """Two people who can each see the other's disk."""

    def __init__(self, here: Person, there: Person) -> None:
        self.here, self.there = here, there
        (here.directory / "disk").write_bytes(bytes(1 << 20))
        path = str(here.directory / "disk")
        config = here.configuration("rec", "blkfront-records.elf", disk=[f"{path},raw,xvda"])
        assert here.xl("create", "-q", config).returncode == 0
        with here.console("rec") as console:
            console.expect(b"flushed 20\n", 60)
        assert there.xl("list").returncode == 0
        self.receive = ["env", f"XENOLITH_SOCKET={there.socket}", *XL, "migrate-receive"]

    def migrate(self, step: str, what: str) -> subprocess.CompletedProcess[str]:
        relay = [sys.executable, "-c", RELAY % len(BANNER), step, what, *self.receive]
        return self.here.xl("migrate", "-s", "", "rec", shlex.join(relay))


@pytest.fixture
def two(tmp_path: Path) -> Iterator[Two]:
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
    with person_in(tmp_path / "here") as here, person_in(tmp_path / "there") as there:
        yield Two(here, there)


def states(person: Person) -> dict[str, str]:
    """The domains of a machine and whether each runs or is paused."""
    rows = [line.split() for line in person.xl("list").stdout.splitlines()[2:]]
    return {row[0]: "paused" if "p" in row[4] else "runs" for row in rows}


def check_it_goes_on(person: Person) -> None:
    """It runs here with its disk: every record that it says is there comes after the one before, from the first on."""
    with person.console("rec") as console:
        console.expect(b"flushed ", 60)
        last = max(map(int, SAID.findall(console.shown)), default=0)
        console.expect(b"flushed %d\n" % (last + 30), 60)
    numbers = list(map(int, SAID.findall(console.shown)))
    assert numbers == list(range(numbers[0], numbers[-1] + 1))


def test_a_domain_goes_there_and_back(two: Two) -> None:
    done = two.here.xl("migrate", "-s", "", "rec", shlex.join(two.receive))
    assert done.returncode == 0, done
    said = [line for line in done.stderr.splitlines() if not re.match(r"migration sender: (round )?\d", line)]
    assert said == [
        "migration target: Ready to receive domain.",
        "Saving to migration stream new xl format",
        "migration target: Domain started successsfully.",
        "migration sender: Target reports successful startup.",
        "Migration successful.",
    ]
    assert (states(two.here), states(two.there)) == ({}, {"rec": "runs"})
    check_it_goes_on(two.there)
    back = ["env", f"XENOLITH_SOCKET={two.here.socket}", *XL, "migrate-receive"]
    assert two.there.xl("migrate", "-s", "", "rec", shlex.join(back)).returncode == 0
    assert (states(two.here), states(two.there)) == ({"rec": "runs"}, {})
    check_it_goes_on(two.here)


STEPS = ("before 1", "after 2", "after 3", "after 5", "before ready", "after ready", "before 6", "after 6")


def test_a_connection_that_is_cut_at_any_step_leaves_one_running_domain(two: Two) -> None:
    for step in (*STEPS, "before started", "after started"):
        print(step)
        done = two.migrate(step, "cut")
        found = states(two.here), states(two.there)
        assert found in (({"rec": "runs"}, {}), ({}, {"rec": "runs"})), (step, done)
        assert (done.returncode == 0) == (not found[0]), (step, done)
        if not found[0]:
            assert step in ("after 6", "before started", "after started")
            check_it_goes_on(two.there)
            back = ["env", f"XENOLITH_SOCKET={two.here.socket}", *XL, "migrate-receive"]
            assert two.there.xl("migrate", "-s", "", "rec", shlex.join(back)).returncode == 0
        check_it_goes_on(two.here)


@pytest.mark.parametrize("step", ["after 2", "after 5", "after ready", "after 6"])
def test_a_receiver_that_is_killed_leaves_the_domain_here_unless_it_ran_there(two: Two, step: str) -> None:
    done = two.migrate(step, str(two.there.daemon_pid()))
    if step == "after 6" and done.returncode == 0:  # it had come there, and went with that machine
        assert states(two.here) == {}
        return
    assert done.returncode != 0, done
    assert (states(two.here), states(two.there)) == ({"rec": "runs"}, {}), done
    check_it_goes_on(two.here)


@pytest.mark.parametrize("step", ["after 2", "after ready", "before 6", "after 6"])
def test_a_sender_that_is_killed_takes_the_domain_along_unless_it_was_given_away(two: Two, step: str) -> None:
    two.migrate(step, str(two.here.daemon_pid()))
    if step.endswith("6"):
        two.there.wait_for("list", shows="rec ")
        assert states(two.there) == {"rec": "runs"}
        check_it_goes_on(two.there)
    else:
        assert states(two.there) == {}


def test_a_rate_and_a_drawing(two: Two) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not here")
    drawing = two.here.directory / "took.svg"
    done = two.here.xl("migrate", "--rate", "400", "--plot", str(drawing), "-s", "", "rec", shlex.join(two.receive))
    assert done.returncode == 0, done
    assert re.search(r"^migration sender: round 1: \d+ pages at 12 MB/s$", done.stderr, re.MULTILINE)
    assert re.search(r"^migration sender: \d+ pages in [\d.]+ s; it stood still for \d+ ms", done.stderr, re.MULTILINE)
    assert drawing.read_text().startswith("<?xml")
