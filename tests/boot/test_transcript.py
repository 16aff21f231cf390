"""docs/transcript.md is a session at a real terminal: each command is typed again and shows what the page says.

What differs from run to run (numbers, times, whether a vCPU runs or is blocked) is compared by its shape. To write the
page anew from what the commands show: XENOLITH_UPDATE_TRANSCRIPT=1 pytest tests/boot/test_transcript.py
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from people import GUESTS, Person, Screen, person_in
from xenolith.debian.initramfs import build_initramfs
from xenolith.debian.packages import obtain

from .conftest import DEADLINE_SECONDS

pytestmark = pytest.mark.slow

PAGE = Path(__file__).parents[2] / "docs" / "transcript.md"
UPDATE = os.environ.get("XENOLITH_UPDATE_TRANSCRIPT") == "1"

KEYS: Final = {
    "xl console web": [(b"~ # ", b"uname -s\r"), (b"Linux", b"\x1d")],
    "xl create -F crash.cfg": [(b"Waiting for domain crash", b""), (b"Waiting for domain crash", b"\x03")],
}
"""What the person waits for and types while a command runs; Ctrl-] leaves a console, Ctrl-C the last one."""


@pytest.fixture
def person(tmp_path: Path) -> Iterator[Person]:
    if not shutil.which("xenstore-ls"):
        pytest.skip("xenstore-ls (Debian: xenstore-utils) is not installed")
    with person_in(tmp_path) as person:
        guest = obtain("6.1-cloud")
        (tmp_path / "vmlinuz").symlink_to(guest.kernel)
        (tmp_path / "initrd").write_bytes(build_initramfs(guest.busybox))
        for path in GUESTS.glob("*.elf"):
            (tmp_path / path.name).symlink_to(path)
        for file, text in re.findall(r"```sh\n# (\S+)\n(.*?)```", PAGE.read_text(), re.DOTALL):
            (tmp_path / file).write_text(text)
        yield person


def type_command(person: Person, command: str) -> str:
    """Type a command with the keys it needs; what appears on the screen."""
    words = shlex.split(command)
    if words[0] == "xenstore-ls":
        socket = person.xl("info", "xenstore_socket").stdout.strip()
        words = ["env", f"XENSTORED_PATH={socket}", *words]
    screen = Screen(person, *words[1:]) if words[0] == "xl" else Screen(person, *words, program=())
    try:
        for text, keys in KEYS.get(command, []):
            screen.expect(text, DEADLINE_SECONDS)
            screen.type(keys)
        screen.wait(DEADLINE_SECONDS)
    finally:
        screen.close()
    return screen.shown.decode(errors="replace").replace("\r\n", "\n").replace("\r", "")


def shape(text: str) -> list[str]:
    """The lines of a screen without what differs from run to run."""
    lines = []
    for line in re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text).splitlines():
        line = re.sub(r"(?<!\S)[r-][b-]([p-][s-][c-][d-])(?!\S)", r"..\1", line)
        line = re.sub(r"[0-9a-f]{8}-[0-9a-f-]{27}|\d+(\.\d+)?%?", "N", re.sub(r"/\S*/dump/", ".../dump/", line))
        lines.append(re.sub(r"\s+", " ", line).strip())
    return [line for line in lines if line]


def readable(command: str, shown: str, directory: Path) -> str:
    """What the page has of a screen: the end of a long one, and no directory of this run."""
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown).replace(str(directory), "/home/user")
    if command == "xl console web":
        shown = "...\n~ # uname -s\n" + shown.rpartition("uname -s\n")[2].partition("~ #")[0]
    if command.startswith("xl create -F"):  # up to Ctrl-C, which is no sooner than the second life
        shown = "Waiting for".join(shown.split("Waiting for")[:3]).replace("^C", "")
        shown = shown[: shown.index("\n", shown.rindex("Waiting for"))] + "\n^C\n"
    lines = [line.rstrip() for line in shown.splitlines()]
    return "".join(line + "\n" for line in lines if line and "━" not in line)  # no progress bars


def agrees(command: str, shown: list[str], page: list[str]) -> bool:
    if command.startswith("xl top"):  # whose rows are in the order of what they used lately
        return sorted(shown) == sorted(page)
    if page and page[0] == "...":
        return shown[-len(page[1:]) :] == page[1:]
    return shown == page


def test_every_command_of_the_transcript_shows_what_the_page_says(person: Person) -> None:
    page, failures = PAGE.read_text(), []

    def run(block: re.Match[str]) -> str:
        new = ""
        for command, expected in re.findall(r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", block[1], re.MULTILINE):
            shown = readable(command, type_command(person, command), person.directory)
            while command == "xl destroy crash" and shown:  # between two lives it is gone, for two seconds
                shown = readable(command, type_command(person, command), person.directory)
            new += f"$ {command}\n{shown}"
            if not agrees(command, shape(shown), shape(expected)):
                failures.append(f"$ {command}\nshows\n{shown}\nwhere the page has\n{expected}")
        return f"```console\n{new}```"

    written = re.sub(r"```console\n(.*?)```", run, page, flags=re.DOTALL)
    if UPDATE:
        PAGE.write_text(written)
    else:
        assert not failures, "\n".join(failures)
