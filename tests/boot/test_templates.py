"""Templates: commands answered by clones of a guest that was booted once."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import xenolith
from people import Person, person_in
from xenolith.toolstack.api import Machine

from .conftest import DEADLINE_SECONDS

pytestmark = pytest.mark.slow


@pytest.fixture
def machine(engine_name: str) -> Iterator[Machine]:
    with xenolith.power_on(600, engine_name) as machine:
        yield machine


def test_each_command_has_a_clone_of_its_own_that_is_gone_afterwards(machine: Machine) -> None:
    at_first = machine.host.free_memory_kib
    warm_up = "echo warm >/root/state; (while :; do sleep 1; done) >/dev/null 2>&1 &"
    template = machine.create_template("base", xenolith.debian("any", memory_mib=128), warm_up, ready=2)
    line = "cat /root/state; echo used >/root/state; hostname; cat /etc/machine-id; od -An -tx1 -N32 /dev/urandom"

    def run(_: int) -> list[bytes]:
        done = template.run(line, timeout=DEADLINE_SECONDS)
        assert done.exit_status == 0, done
        return done.stdout.splitlines()

    with ThreadPoolExecutor(4) as pool:  # more at once than stand ready
        said = list(pool.map(run, range(8)))
    assert {lines[0] for lines in said} == {b"warm"}
    for field in (1, 2, 3):  # host name, machine-id, random numbers: no two alike
        assert len({lines[field] for lines in said}) == 8
    assert template.run(["cat"], input=b"in\0put").stdout == b"in\0put"
    with pytest.raises(xenolith.Timeout):
        template.run("sleep 1000", timeout=0.3)
    assert template.info.runs == 10
    template.remove()
    with pytest.raises(xenolith.ToolstackError, match="no template"):
        template.run("true")
    with machine.events() as events:
        while machine.domains():  # the last used and ready ones go in their own time
            events.get(timeout=DEADLINE_SECONDS)
    assert machine.host.free_memory_kib == at_first


def test_a_template_whose_warming_up_fails_is_none(machine: Machine) -> None:
    with pytest.raises(xenolith.ToolstackError, match="warms the template up has failed: no luck"):
        machine.create_template("base", xenolith.debian("any", memory_mib=128), "echo no luck; exit 1")
    assert not machine.templates()
    assert not machine.domains()


@pytest.fixture
def person(tmp_path: Path) -> Iterator[Person]:
    with person_in(tmp_path) as person:
        yield person


def test_run_with_a_template_as_a_person_uses_it(person: Person) -> None:
    def xenolith_(*arguments: str, input: bytes = b"") -> subprocess.CompletedProcess[bytes]:
        line = [sys.executable, "-m", "xenolith", *arguments]
        return subprocess.run(
            line,
            capture_output=True,
            timeout=DEADLINE_SECONDS,
            cwd=person.directory,
            env=person.environment,
            input=input,
        )

    missing = xenolith_("run", "--template", "base", "--", "true")
    assert (missing.returncode, b"no daemon listens" in missing.stderr) == (125, True)
    made = xenolith_("template", "create", "base", "--ready", "1", "--", "touch", "/root/made")
    assert made.returncode == 0, made.stderr
    assert xenolith_("template", "create", "base").returncode != 0
    data = os.urandom(300_000)
    done = xenolith_("run", "--template", "base", "--", "sh", "-c", "ls /root >&2; cat; exit 6", input=data)
    assert (done.returncode, done.stdout == data, done.stderr) == (6, True, b"made\n")
    done = xenolith_(
        "run",
        "--template=base",
        "--env",
        "A=1",
        "--workdir",
        "/tmp",
        "--user",
        "7",
        "--",
        "sh",
        "-c",
        "echo $A $PWD; id -u",
    )
    assert done.stdout == b"1 /tmp\n7\n"
    assert xenolith_("run", "--template", "base", "--timeout", "0.2", "--", "sleep", "1000").returncode == 119
    assert xenolith_("run", "--template", "base", "--", "nonsense").returncode == 127
    refused = xenolith_("run", "--template", "base", "--memory", "64", "--", "true")
    assert (refused.returncode, b"--memory does not go with --template" in refused.stderr) == (2, True)
    assert xenolith_("template", "list").stdout.splitlines()[1].startswith(b"base ")
    assert xenolith_("template", "rm", "base").returncode == 0
    assert xenolith_("run", "--template", "base", "--", "true").stderr == b'xenolith: There is no template "base".\n'
