"""The very commands by which xendomains, Ganeti and Pacemaker's agent take domains away from where they are."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from people import XL, Person, person_in

pytestmark = pytest.mark.slow


@pytest.fixture
def people(tmp_path: Path) -> Iterator[tuple[Person, Person]]:
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
    with person_in(tmp_path / "here") as here, person_in(tmp_path / "there") as there:
        disk = here.directory / "disk"
        disk.write_bytes(bytes(1 << 20))
        config = here.configuration("rec", "blkfront-records.elf", disk=[f"{disk},raw,xvda"])
        assert here.xl("create", "--quiet", "--defconfig", config).returncode == 0
        yield here, there


def names(person: Person) -> list[str]:
    return [line.split()[0] for line in person.xl("list").stdout.splitlines()[2:]]


def test_xendomains_stops_and_starts_by_save_and_restore(people: tuple[Person, Person]) -> None:
    here, _ = people
    (found,) = [each for each in json.loads(here.xl("list", "-l").stdout) if each["domid"]]
    assert found["config"]["c_info"]["name"] == "rec"
    saved = here.directory / "rec"
    done = here.xl("save", str(found["domid"]), str(saved))
    assert (done.returncode, done.stdout) == (0, "")
    assert done.stderr == f"Saving to {saved} new xl format\n"
    assert names(here) == []
    assert saved.read_bytes()[:16] == b"Xen saved domain"
    done = here.xl("restore", str(saved))
    assert done.returncode == 0
    assert done.stderr == (
        f"Loading new save file {saved} (new xl format)\n Savefile contains xl domain config\n"
        "Parsing config from <saved>\n"
    )
    assert names(here) == ["rec"] and here.xl("domid", "rec").stdout == "2\n"


def test_ganeti_migrates_by_a_command_that_hides_the_host(people: tuple[Person, Person]) -> None:
    here, there = people
    far = shlex.join(["env", f"XENOLITH_SOCKET={there.socket}", *XL, "migrate-receive"])
    done = here.xl("migrate", "-s", f"{far} #", "-C", "rec.cfg", "rec", "192.0.2.7")
    assert done.returncode == 0, done
    assert (names(here), names(there)) == ([], ["rec"])
    back = here.xl("migrate", "-s", "false #", "-C", "rec.cfg", "rec", "192.0.2.7")
    assert back.returncode == 1, "there is no such domain"
    back = there.xl("migrate", "-s", "false #", "rec", "192.0.2.7")
    assert back.returncode != 0 and back.stderr.endswith("migration failed\n")
    assert names(there) == ["rec"], "not NAME--migratedaway"


def test_pacemaker_migrates_over_ssh(people: tuple[Person, Person]) -> None:
    here, there = people
    programs = here.directory / "bin"
    programs.mkdir()
    xl = f"exec {shlex.join(XL)}"
    for name, text in {
        "ssh": f'echo "$@" >{programs}/called; shift; XENOLITH_SOCKET={there.socket} exec "$@"',
        "xl": f'{xl} "$@"',
    }.items():
        (programs / name).write_text(f"#!/bin/sh\n{text}\n")
        (programs / name).chmod(0o755)
    here.environment["PATH"] = f"{programs}:{os.environ['PATH']}"
    done = here.xl("migrate", "rec", "other-host")
    assert done.returncode == 0, done
    assert (programs / "called").read_text() == "other-host xl migrate-receive\n"
    assert (names(here), names(there)) == ([], ["rec"])
    assert sys.executable in xl
