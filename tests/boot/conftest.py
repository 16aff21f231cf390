"""Running the `xenolith run` command itself, as a user does."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest

DEADLINE_SECONDS = 250

Run = Callable[..., "subprocess.CompletedProcess[bytes]"]


@pytest.fixture
def xenolith_run(engine_name: str) -> Run:
    """Run it with these arguments on this engine, and `stdin` as its input."""

    def run(*arguments: str, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
        line = [sys.executable, "-m", "xenolith", "run", "--engine", engine_name, *arguments]
        done = subprocess.run(line, input=stdin, capture_output=True, timeout=DEADLINE_SECONDS, check=False)
        print(f"--- {' '.join(line[1:])}: exit status {done.returncode}")
        print(done.stdout.decode("utf-8", "replace"), done.stderr.decode("utf-8", "replace"), sep="\n--- stderr\n")
        return done

    return run
