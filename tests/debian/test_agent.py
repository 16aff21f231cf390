"""The agent that is in our initramfs is what its source says, byte for byte."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from xenolith.debian.initramfs import AGENT

GUESTS = Path(__file__).parents[2] / "guests"
MOST_BYTES = 12 * 1024


def test_rebuilding_the_agent_gives_the_committed_bytes(tmp_path: Path) -> None:
    for tool in ("make", "gcc", "ld"):
        if not shutil.which(tool):
            pytest.skip(f"{tool} is not installed, so the agent cannot be rebuilt here")
    shutil.copytree(GUESTS / "agent", tmp_path / "agent", ignore=shutil.ignore_patterns("build"))
    (tmp_path / "prebuilt").mkdir()
    shutil.copy(GUESTS / "prebuilt" / "TOOLCHAIN", tmp_path / "prebuilt")
    line = ["make", "-s", "-C", str(tmp_path / "agent"), "check", f"PREBUILT={AGENT}"]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    if done.stdout.startswith("skipped: "):
        pytest.skip(done.stdout.strip())
    assert done.returncode == 0, done.stdout + done.stderr
    assert AGENT.stat().st_size < MOST_BYTES
