"""The committed guest binaries are what their sources say, byte for byte."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from .catalogue import CATALOGUE, PARTS_OF_TESTS, PREBUILT, WITH_DEVICES

GUESTS = PREBUILT.parent
MOST_BYTES = 24 * 1024  # of one prebuilt guest


def copy_of_the_sources(to: Path) -> Path:
    """A private copy, so that the build leaves nothing behind in the working tree."""
    return shutil.copytree(GUESTS, to / "guests", ignore=shutil.ignore_patterns("build"))


def test_rebuilding_the_guests_gives_the_committed_bytes(tmp_path: Path) -> None:
    for tool in ("make", "gcc", "ld"):
        if not shutil.which(tool):
            pytest.skip(f"{tool} is not installed, so the guests cannot be rebuilt here")
    done = subprocess.run(
        ["make", "-s", "-C", str(copy_of_the_sources(tmp_path)), "check"], capture_output=True, text=True, check=False
    )
    if done.stdout.startswith("skipped: "):
        pytest.skip(done.stdout.strip())
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_rebuild_check_notices_a_changed_binary(tmp_path: Path) -> None:
    for tool in ("make", "gcc", "ld"):
        if not shutil.which(tool):
            pytest.skip(f"{tool} is not installed, so the guests cannot be rebuilt here")
    guests = copy_of_the_sources(tmp_path)
    elf = guests / "prebuilt" / "hello.elf"
    elf.write_bytes(elf.read_bytes()[:-1] + b"\xff")
    done = subprocess.run(["make", "-s", "-C", str(guests), "check"], capture_output=True, text=True, check=False)
    if done.stdout.startswith("skipped: "):
        pytest.skip(done.stdout.strip())
    assert done.returncode != 0
    assert "hello.elf" in done.stdout + done.stderr


def test_every_guest_of_the_catalogue_is_there_and_small() -> None:
    used = {guest.path.name for guest in CATALOGUE + WITH_DEVICES} | set(PARTS_OF_TESTS)
    assert used == {path.name for path in PREBUILT.glob("*.elf")}
    for path in PREBUILT.glob("*.elf"):
        assert path.stat().st_size <= MOST_BYTES, f"{path.name} is {path.stat().st_size} bytes"


def test_every_run_has_a_name_of_its_own() -> None:
    names = [guest.name for guest in CATALOGUE]
    assert len(names) == len(set(names))
