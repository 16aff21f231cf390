"""The demonstration demonstrates what it says."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow


def test_the_demo_shows_that_one_domains_crash_is_not_anothers(engine_name: str) -> None:
    line = [sys.executable, "-m", "xenolith", "demo", "--engine", engine_name]
    done = subprocess.run(line, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=280, check=False)
    print(done.stdout, done.stderr)
    assert done.returncode == 0
    lines = done.stdout.splitlines()
    panic = next(number for number, text in enumerate(lines) if "Kernel panic - not syncing" in text)
    result = next(number for number, text in enumerate(lines) if text.startswith("  worker | result "))
    assert panic < result, "the worker goes on beside the dead domain"
    assert "FAILED" not in done.stdout
    assert done.stderr == ""
