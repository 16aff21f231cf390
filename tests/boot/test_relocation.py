"""`xl migrate` between two daemons: the domain goes on there and is here no more; whatever goes wrong, it runs once."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from machines import missing
from people import XL, Person, person_in
from xenolith.debian.initramfs import build_initramfs
from xenolith.debian.packages import obtain

from .conftest import DEADLINE_SECONDS

pytestmark = pytest.mark.slow

# Its own shell counts; what it says of itself never stops, and nothing is left out.
COUNT = b"i=0; while :; do i=$((i+1)); echo n $i; [ $((i % 25)) = 0 ] && sleep 0.1; done &\r"


@pytest.fixture(params=["adaptive"])
def hosts(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[tuple[Person, Person]]:
    if reason := missing(request.param):
        pytest.skip(f"no {request.param} engine here: {reason}")
    (tmp_path / "here").mkdir()
    (tmp_path / "there").mkdir()
    with person_in(tmp_path / "here") as here, person_in(tmp_path / "there") as there:
        for person in (here, there):
            person.environment["XENOLITH_ENGINE"] = request.param
        guest = obtain("6.1-cloud")
        (here.directory / "initrd").write_bytes(build_initramfs(guest.busybox))
        lines = ['name="deb"', f'kernel="{guest.elf}"', 'ramdisk="initrd"', "memory=128", 'extra="console=hvc0"']
        (here.directory / "deb.cfg").write_text("\n".join(lines) + "\n")
        assert here.xl("create", "-q", "deb.cfg").returncode == 0
        with here.console("deb") as console:
            console.expect(b"~ # ", DEADLINE_SECONDS)
            console.type(COUNT)
            console.expect(b"n 50\r\n", DEADLINE_SECONDS)
        yield here, there


def receiver(there: Person, before: str = "") -> str:
    """The command that reaches the other host, as ssh would run it there."""
    return f"cd {there.directory}; {before} XENOLITH_SOCKET={there.socket} {shlex.join(XL)} migrate-receive"


def names(person: Person) -> list[str]:
    return [line.split()[0] for line in person.xl("list").stdout.splitlines()[2:]]


def numbers(shown: bytes) -> list[int]:
    lines = shown.decode(errors="replace").replace("\r", "").splitlines()
    return [int(line[2:]) for line in lines if line.startswith("n ") and line[2:].isdigit()]


@pytest.mark.parametrize("hosts", ["unicorn", "kvm", "adaptive"], indirect=True)
def test_a_domain_goes_there_and_back_while_it_runs(hosts: tuple[Person, Person]) -> None:
    here, there = hosts
    for _ in range(2):
        done = here.xl("migrate", "-s", "", "deb", receiver(there))
        assert done.returncode == 0, done.stderr
        assert done.stderr.splitlines()[0] == "migration target: Ready to receive domain."
        assert done.stderr.splitlines()[-1] == "Migration successful."
        assert (names(here), names(there)) == ([], ["deb"])
        with there.console("deb") as console:
            console.expect(b"n ", DEADLINE_SECONDS)
            for _ in range(60):
                console.expect(b"\nn ", DEADLINE_SECONDS)
            seen = numbers(console.shown)[1:-1]
        assert seen == list(range(seen[0], seen[0] + len(seen)))
        here, there = there, here


@pytest.mark.parametrize(
    "command",
    [
        "false",  # nobody there
        "echo hello",  # somebody else
        "printf 'xl migration receiver ready, send binary domain data.\\n'; head -c 100000 >/dev/null",  # breaks off
        "printf 'xl migration receiver ready, send binary domain data.\\n'; echo no room; cat >/dev/null",
    ],
)
def test_what_goes_wrong_before_the_word_leaves_it_here(hosts: tuple[Person, Person], command: str) -> None:
    here, _ = hosts
    done = here.xl("migrate", "-s", "", "deb", command)
    assert done.returncode != 0
    assert names(here) == ["deb"]
    with here.console("deb") as console:
        for _ in range(30):
            console.expect(b"\nn ", DEADLINE_SECONDS)
        seen = numbers(console.shown)[1:-1]
    assert seen == list(range(seen[0], seen[0] + len(seen)))


def test_it_is_not_there_if_the_word_never_came(hosts: tuple[Person, Person]) -> None:
    """The connection breaks when all but the last section has passed."""
    here, there = hosts
    done = here.xl("migrate", "-s", "", "deb", f"head -c 3000000 | ({receiver(there)})")
    assert done.returncode != 0
    assert (names(here), names(there)) == (["deb"], [])
