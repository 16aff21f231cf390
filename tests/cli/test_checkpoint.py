"""`xenolith checkpoint` and `rollback`, typed: a daemon that is killed costs a domain no more than a moment."""

from __future__ import annotations

import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from people import Person, person_in
from xenolith.dom0.disks.overlay import create_overlay


@pytest.fixture
def person(tmp_path: Path) -> Iterator[Person]:
    with person_in(tmp_path) as person:
        yield person


def test_a_domain_goes_on_from_its_last_checkpoint_when_its_daemon_was_killed(person: Person) -> None:
    config = person.configuration("rec", "blkfront-records.elf", disk=["disk,overlay,xvda"])
    create_overlay(person.directory / "disk", None, 2048)
    assert person.xl("create", "-q", config).returncode == 0
    done = person.xenolith("checkpoint", "rec", "--every", "0.05", "--keep", "2")
    assert re.fullmatch(r"every 0.05 s into .*/state/xenolith/checkpoints/rec\n", done.stdout), done
    deadline = time.monotonic() + 120
    while int(person.xenolith("checkpoints", "rec").stdout.split("\n")[-2].split()[0]) < 9:
        assert time.monotonic() < deadline
    person.end_daemon(signal.SIGKILL)

    listed = person.xenolith("checkpoints", "rec").stdout.splitlines()
    assert listed[0].split() == ["NUMBER", "TAKEN", "MiB", "GOES", "ON", "FROM", "DISKS"]
    last = int(listed[-1].split()[0])
    done = person.xenolith("rollback", "rec")
    assert done.stdout == f"rec goes on from checkpoint {last} as domain 1\n", done
    with person.console("rec") as console:
        console.expect(b"flushed", 60)
    done = person.xenolith("rollback", "rec", str(last + 1))
    assert done.stderr == f"Error: There is no checkpoint {last + 1} of rec.\n"
    done = person.xenolith("checkpoint", "rec")
    assert re.fullmatch(rf"checkpoint {last + 1}: \d+ pages at a standstill of \d+\.\d ms\n", done.stdout), done
