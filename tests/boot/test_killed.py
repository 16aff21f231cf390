"""SIGKILL of a run at any moment leaves nothing behind: no process, no file."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from .conftest import DEADLINE_SECONDS

pytestmark = pytest.mark.slow

KILLS = 5
MOST_OUTPUT = 12_000  # bytes: a boot to the shell writes some more


def session(leader: int) -> list[int]:
    """The processes of a session, those that nobody has waited for included."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:  # it has just ended
                continue
            if int(fields[3]) == leader:
                found.append(int(entry.name))
    return found


def test_a_killed_run_leaves_no_process_and_no_file(engine_name: str, tmp_path: Path) -> None:
    """The moment is counted in bytes of console output, so it is the same on any host."""
    places = {"TMPDIR": tmp_path / "tmp", "XDG_RUNTIME_DIR": tmp_path / "runtime"}
    for place in places.values():
        place.mkdir()
    environment = os.environ | {name: str(place) for name, place in places.items()}
    line = [sys.executable, "-m", "xenolith", "run", "--engine", engine_name, "--verbose"]
    moments = random.Random(7)
    for _ in range(KILLS):
        wanted = moments.randrange(1, MOST_OUTPUT)
        process = subprocess.Popen(
            line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, start_new_session=True
        )
        assert process.stdin is not None
        assert process.stdout is not None
        with process.stdin, process.stdout as output:
            seen = len(output.read(wanted))
            process.send_signal(signal.SIGKILL)
            assert process.wait(DEADLINE_SECONDS) == -signal.SIGKILL
            output.read()  # its end: nobody holds the pipe any more, no thread and no child
        assert seen == wanted
        assert session(process.pid) == []
        for place in places.values():
            assert list(place.rglob("*")) == []
