"""A command in a domain is a program among others: its input, output and status can be piped, and nothing gets lost."""

from __future__ import annotations

import hashlib
import os
import random
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import xenolith

from .conftest import DEADLINE_SECONDS, Run

pytestmark = pytest.mark.slow

DATA = bytes(range(256)) * 40 + random.Random(3).randbytes(200_000) + b"\x0f\x0f\x0f0\n\x1e"


def test_standard_input_reaches_the_command_with_its_end(xenolith_run: Run) -> None:
    done = xenolith_run("--", "sh", "-c", "cat; echo end", stdin=b"hi\n")
    assert (done.stdout, done.returncode) == (b"hi\nend\n", 0)


def test_binary_data_goes_both_ways_byte_for_byte(xenolith_run: Run) -> None:
    assert xenolith_run("--", "cat", stdin=DATA).stdout == DATA


def test_a_command_that_does_not_read_its_input_is_not_held_up(xenolith_run: Run) -> None:
    done = xenolith_run("--", "sh", "-c", "head -c 3; exit 5", stdin=DATA)
    assert (done.stdout, done.returncode) == (DATA[:3], 5)


def test_standard_error_comes_out_apart_byte_for_byte(xenolith_run: Run) -> None:
    done = xenolith_run("--", "sh", "-c", "cat >&2; echo out; exit 4", stdin=DATA)
    assert (done.stdout, done.stderr, done.returncode) == (b"out\n", DATA, 4)


def test_standard_error_keeps_its_place_where_both_lead_to_the_same(engine_name: str) -> None:
    line = [sys.executable, "-m", "xenolith", "run", "--engine", engine_name, "--", "sh", "-c"]
    script = "for i in 1 2 3; do echo $i; echo error $i >&2; done"
    done = subprocess.run(
        [*line, script], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=DEADLINE_SECONDS, check=True
    )
    assert done.stdout == b"".join(b"%d\nerror %d\n" % (number, number) for number in (1, 2, 3))


def test_standard_error_that_cannot_be_written_ends_the_run(engine_name: str) -> None:
    line = [sys.executable, "-m", "xenolith", "run", "--engine", engine_name, "--", "sh", "-c", "echo error >&2; cat"]
    with open("/dev/full", "wb") as full:
        done = subprocess.run(line, stdout=subprocess.PIPE, stderr=full, timeout=DEADLINE_SECONDS, check=False)
    assert done.returncode == 118


def test_input_from_a_file(engine_name: str, tmp_path: Path) -> None:
    (tmp_path / "data").write_bytes(DATA)
    line = [sys.executable, "-m", "xenolith", "run", "--engine", engine_name, "--", "sha256sum"]
    with (tmp_path / "data").open("rb") as source:
        done = subprocess.run(line, stdin=source, capture_output=True, timeout=DEADLINE_SECONDS, check=True)
    assert done.stdout.split()[0].decode() == hashlib.sha256(DATA).hexdigest()


def test_input_is_passed_on_as_it_comes(engine_name: str) -> None:
    """A conversation over pipes: the answer must come before there is more to read."""
    line = [sys.executable, "-m", "xenolith", "run", "--engine", engine_name, "--", "sh", "-c"]
    script = "echo ready; while read word; do echo $word, indeed; done"
    with subprocess.Popen([*line, script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0) as process:
        assert process.stdin and process.stdout
        watchdog = threading.Timer(DEADLINE_SECONDS, process.kill)
        watchdog.start()
        assert process.stdout.read(6) == b"ready\n"
        for word in (b"one", b"two"):
            process.stdin.write(word + b"\n")
            assert process.stdout.read(len(word) + 9) == word + b", indeed\n"
        process.stdin.close()
        assert process.wait() == 0
        watchdog.cancel()


def test_output_to_a_pipe_that_does_not_block_is_complete(engine_name: str) -> None:
    """One that its reader begins to empty only when it is full."""
    line = [sys.executable, "-m", "xenolith", "run", "--engine", engine_name, "--", "seq", "100000"]
    come, go = os.pipe()
    os.set_blocking(go, False)
    with subprocess.Popen(line, stdin=subprocess.DEVNULL, stdout=go) as process:
        os.close(go)
        with open(come, "rb") as source:
            assert source.read() == b"".join(b"%d\n" % number for number in range(1, 100001))
        assert process.wait(DEADLINE_SECONDS) == 0


def test_a_full_disk_and_a_closed_pipe_are_told_apart(engine_name: str) -> None:
    line = [sys.executable, "-m", "xenolith", "run", "--engine", engine_name, "--", "seq", "100000"]
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            line, stdin=subprocess.DEVNULL, stdout=full, stderr=subprocess.PIPE, timeout=DEADLINE_SECONDS, check=False
        )
    assert done.returncode == 118
    assert b"No space left" in done.stderr
    come, go = os.pipe()
    os.close(come)
    done = subprocess.run(
        line, stdin=subprocess.DEVNULL, stdout=go, stderr=subprocess.PIPE, timeout=DEADLINE_SECONDS, check=False
    )
    os.close(go)
    assert (done.returncode, done.stderr) == (141, b"")


def test_environment_directory_and_user(xenolith_run: Run) -> None:
    options = ["--env", "GREETING=it's me", "--workdir", "/tmp", "--user", "1000"]
    done = xenolith_run(*options, "--", "sh", "-c", 'echo "$GREETING"; pwd; id -u; id -g; cat', stdin=b"input\n")
    assert done.stdout == b"it's me\n/tmp\n1000\n1000\ninput\n"
    assert xenolith_run("--workdir", "/none", "--", "true").returncode == 126
    assert xenolith_run("--", "no-such-command").returncode == 127


def test_a_run_that_takes_too_long_is_ended(xenolith_run: Run) -> None:
    done = xenolith_run("--timeout", "0.5", "--", "sleep", "1000")
    assert done.returncode == 119
    assert b"0.5 seconds are over" in done.stderr


def test_a_program_runs_a_command_as_the_command_does(engine_name: str) -> None:
    done = xenolith.run(["sh", "-c", "tr a-z A-Z; exit 3"], input=b"some words", engine=engine_name)
    assert (done.output, done.returncode, done.message) == (b"SOME WORDS", 3, "")
    with pytest.raises(xenolith.RunError, match="give it more memory"):
        xenolith.run(["true"], memory_mib=32, engine=engine_name)
