"""`xl save` and `xl restore`, as a person and as xendomains use them, with the stock Debian kernel."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from people import Person, person_in
from xenolith.debian.initramfs import build_initramfs
from xenolith.debian.packages import obtain

from .conftest import DEADLINE_SECONDS

pytestmark = pytest.mark.slow


@pytest.fixture
def person(tmp_path: Path) -> Iterator[Person]:
    with person_in(tmp_path) as person:
        guest = obtain("6.1-cloud")
        (tmp_path / "initrd").write_bytes(build_initramfs(guest.busybox))
        lines = ['name="deb"', f'kernel="{guest.elf}"', 'ramdisk="initrd"', "memory=160", 'extra="console=hvc0"']
        (tmp_path / "deb.cfg").write_text("\n".join(lines) + "\n")
        assert person.xl("create", "-q", "deb.cfg").returncode == 0
        with person.console("deb") as console:
            console.expect(b"~ # ", DEADLINE_SECONDS)
            console.type(b"here=before; echo $((6*7)) >/kept; echo $here\r")
            console.expect(b"before\r\n", DEADLINE_SECONDS)
        yield person


def _works_as_before(person: Person, name: str = "deb") -> None:
    with person.console(name) as console:
        console.expect(b"before\r\n", DEADLINE_SECONDS)  # what was printed before it was saved
        console.type(b"echo still-$here-$(cat /kept)\r")
        console.expect(b"still-before-42", DEADLINE_SECONDS)


def test_a_domain_is_saved_and_restored_with_its_shell(person: Person) -> None:
    done = person.xl("save", "deb", "deb.save")
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith("Saving to deb.save new xl format")
    assert "deb" not in person.xl("list").stdout
    assert (person.directory / "deb.save").read_bytes()[:16] == b"Xen saved domain"
    (person.directory / "initrd").unlink()  # nothing but the file is needed
    done = person.xl("restore", "deb.save")
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[0] == "Loading new save file deb.save (new xl format)"
    assert person.xl("domid", "deb").stdout == "2\n"
    _works_as_before(person)
    asked = person.xl("shutdown", "-w", "deb")  # the guest sees what is written to its xenstore here
    assert asked.stderr.splitlines()[-1] == "Domain 2 has been shut down, reason code 0"


def test_a_checkpoint_leaves_the_domain_as_it_is_and_can_be_gone_back_to(person: Person) -> None:
    assert person.xl("save", "-c", "-z", "deb", "point").returncode == 0
    with person.console("deb") as console:
        console.expect(b"before\r\n", DEADLINE_SECONDS)
        console.type(b"here=after; rm /kept; echo $here\r")
        console.expect(b"after\r\n", DEADLINE_SECONDS)
    assert person.xl("restore", "point").returncode != 0  # its name is in use
    assert person.xl("destroy", "deb").returncode == 0
    assert person.xl("restore", "-p", "point").returncode == 0
    assert person.xl("list", "deb").stdout.split()[-2][2] == "p"
    person.xl("unpause", "deb")
    _works_as_before(person)


def test_what_cannot_be_written_or_read_is_said_and_changes_nothing(person: Person) -> None:
    failed = person.xl("save", "deb", "missing/deb.save")
    assert (failed.returncode, "cannot write" in failed.stderr) == (3, True)
    (person.directory / "old").write_text("old")
    failed = person.xl("restore", "old")
    assert failed.returncode == 3
    assert failed.stderr.splitlines()[-1] == "This is no domain that can be restored: it is cut off."
    _works_as_before(person)


def test_a_guest_suspends_itself_and_is_resumed(person: Person) -> None:
    assert person.xl("resume", "deb").returncode != 0
    done = person.xl("suspend", "deb")
    assert done.returncode == 0, done.stderr
    assert person.xl("list", "deb").stdout.split()[-2] in ("---ss-", "---s--")
    done = person.xl("resume", "deb")
    assert done.returncode == 0, done.stderr
    _works_as_before(person)


def test_clones_have_the_shell_of_their_parent_and_a_store_of_their_own(person: Person) -> None:
    done = person.xl("clone", "--count", "2", "deb", "copy")
    assert done.stdout.splitlines() == ["2 copy-1", "3 copy-2"], done.stderr
    _works_as_before(person, "copy-1")
    with person.console("copy-2") as console:
        console.expect(b"before\r\n", DEADLINE_SECONDS)
        console.type(b"rm /kept; echo gone\r")
        console.expect(b"gone\r\n", DEADLINE_SECONDS)
    assert person.xl("clone", "-p", "copy-1", "copy-3").stdout == "4 copy-3\n"
    for number, name in ((2, "copy-1"), (3, "copy-2")):
        asked = person.xl("shutdown", "-w", name)
        assert asked.stderr.splitlines()[-1] == f"Domain {number} has been shut down, reason code 0"
    _works_as_before(person)
    person.xl("unpause", "copy-3")
    _works_as_before(person, "copy-3")
    assert person.xl("clone", "deb", "copy-3").returncode != 0
