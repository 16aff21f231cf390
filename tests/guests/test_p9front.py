"""A 9pfs front-end in a tiny guest: it uses a folder, tries to leave it, and lies in every way it can think of."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from dom0.ninep import needs_diod

from .catalogue import PREBUILT, checks
from .test_blkfront import held

if TYPE_CHECKING:
    from machines import Ending, Machine

pytestmark = [pytest.mark.usefixtures("handlers"), needs_diod]
FOLDERS = 13
LIES = 10  # those that close the device


def run(machine: Machine, directory: Path, cmdline: str = "") -> Ending:
    """Run the guest to its end and destroy it. It has one folder by several names, the second read-only."""
    from xenolith.dom0.image import load_image
    from xenolith.dom0.services import DomainSpec
    from xenolith.dom0.shares import ShareSpec

    path = PREBUILT / "p9front.elf"
    shares = tuple(
        ShareSpec(number=number, tag=f"t{number}", path=directory, writable=number != 1)
        for number in range(1 if cmdline else FOLDERS)
    )
    spec = DomainSpec(
        name="p9front", image=load_image(path), kernel=str(path), cmdline=cmdline, memory_kib=32 << 10, shares=shares
    )
    domain = machine.dom0.create(spec)
    machine.dom0.start(domain)
    ending = machine.finish(domain)
    assert not checks("p9front").complaints(ending.console, ending.shutdown_reason)
    machine.check_invariants()
    machine.dom0.destroy(domain)
    return ending


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "shared"
    made.mkdir()
    (made / "greeting").write_text("hello")
    (tmp_path / "secret").write_text("secret")
    (made / "escape").symlink_to("../secret")
    return made


def test_a_guest_uses_a_folder_and_gets_nowhere_else(machine: Callable[[int], Machine], folder: Path) -> None:
    host = machine(64)
    run(host, folder, "fuzz=1")
    before = held(host)
    ending = run(host, folder)
    assert held(host) == before
    assert ending.log.count("broke the protocol") == LIES and "its back-end failed" not in ending.log
    pattern = bytes(at * 7 & 0xFF for at in range(6000))
    assert (folder / "from-guest").read_bytes() == pattern * 4
    assert (folder / "greeting").read_text() == "hello" and (folder.parent / "secret").read_text() == "secret"
    assert os.readlink(folder / "up") == "../secret" and os.stat(folder / "set-uid").st_mode & 0o7000 == 0
    assert {path.name for path in folder.iterdir()} == {"greeting", "escape", "from-guest", "up", "set-uid"}
    assert {path.name for path in folder.parent.iterdir()} == {"shared", "secret"}


@pytest.mark.parametrize("seed", [1, 2])
def test_random_messages_from_a_guest_are_all_answered(
    machine: Callable[[int], Machine], folder: Path, seed: int
) -> None:
    host = machine(64)
    ending = run(host, folder, f"fuzz={os.environ.get('XENOLITH_FUZZ', '400')} seed={seed}")
    assert "broke the protocol" not in ending.log and "failed" not in ending.log
    assert (folder.parent / "secret").read_text() == "secret"
    assert {path.name for path in folder.parent.iterdir()} == {"shared", "secret"}
