"""A domain goes on at another daemon when its own is killed; relocation between daemons over TLS and UNIX sockets."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from people import Person, person_in

pytestmark = pytest.mark.slow

SAID = re.compile(rb"^flushed (\d+)\r?\n", re.MULTILINE)


@pytest.fixture
def people(tmp_path: Path) -> Iterator[tuple[Person, Person]]:
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
    with person_in(tmp_path / "here") as here, person_in(tmp_path / "there") as there:
        (here.directory / "disk").write_bytes(bytes(1 << 20))
        config = here.configuration("rec", "blkfront-records.elf", disk=[f"{here.directory / 'disk'},raw,xvda"])
        assert here.xl("create", "-q", config).returncode == 0
        yield here, there


def last_said(person: Person, more: int) -> int:
    """Wait for so many more records; the last one. None is missing of what the console shows."""
    with person.console("rec") as console:
        console.expect(b"flushed ", 60)
        last = max(map(int, SAID.findall(console.shown)), default=0)
        console.expect(b"flushed %d\n" % (last + more), 60)
        numbers = list(map(int, SAID.findall(console.shown)))
    assert numbers == list(range(numbers[0], numbers[-1] + 1))
    return numbers[-1]


def test_a_domain_goes_on_elsewhere_when_its_daemon_is_killed(people: tuple[Person, Person]) -> None:
    here, there = people
    address = f"unix:{there.directory / 'come'}"
    assert there.xenolith("listen", address).returncode == 0
    done = here.xenolith("protect", "rec", "--to", address, "--every", "20")
    assert done.stdout == f"rec is held by {address}\n", done
    before = last_said(here, 200)
    assert re.search(r"^1 at unix:\S+: epoch \d+: \d+ pages, ", here.xenolith("protect").stdout)
    here.end_daemon(signal.SIGKILL)
    there.wait_for("list", shows="rec ")
    assert last_said(there, 100) > before - 5000

    assert there.xl("destroy", "rec").returncode == 0


def test_a_domain_that_needs_no_protection_any_more_is_forgotten(people: tuple[Person, Person]) -> None:
    here, there = people
    address = f"unix:{there.directory / 'come'}"
    assert there.xenolith("listen", address).returncode == 0
    for end in (("protect", "rec", "--stop"), ("destroy", "rec")):
        assert here.xenolith("protect", "rec", "--to", address).returncode == 0
        assert here.xenolith(*end).returncode == 0
    assert len(there.xl("list").stdout.splitlines()) == 2
    assert not list((there.directory / "state" / "xenolith" / "protected").glob("*"))


def certificates(directory: Path) -> None:
    """An authority, and a certificate of its for 127.0.0.1."""
    directory.mkdir()

    def openssl(*arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=directory, check=True, capture_output=True)

    key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")
    openssl("req", "-x509", *key, "-keyout", "ca.key", "-out", "ca.pem", "-subj", "/CN=authority", "-days", "2")
    openssl("req", *key, "-keyout", "key.pem", "-out", "request.pem", "-subj", "/CN=host")
    (directory / "extensions").write_text("subjectAltName=IP:127.0.0.1\n")
    signing = ("-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-days", "2", "-extfile", "extensions")
    openssl("x509", "-req", "-in", "request.pem", *signing, "-out", "cert.pem")


@pytest.mark.parametrize("kind", ["unix", "tls"])
def test_a_domain_is_relocated_from_daemon_to_daemon(people: tuple[Person, Person], tmp_path: Path, kind: str) -> None:
    here, there = people
    address = f"unix:{there.directory / 'come'}"
    if kind == "tls":
        if shutil.which("openssl") is None:
            pytest.skip("no openssl here")
        certificates(tmp_path / "tls")
        address = "tls:127.0.0.1:18002"
        here.end_daemon(signal.SIGKILL)
        for person in people:
            person.environment["XENOLITH_TLS"] = str(tmp_path / "tls")
        assert here.xl("create", "-q", "rec.cfg").returncode == 0
    done = there.xenolith("listen", address)
    assert done.returncode == 0, done
    last_said(here, 20)
    done = here.xl("migrate", "rec", address)
    assert done.returncode == 0, done
    assert done.stderr.splitlines()[-1] == "Migration successful."
    assert len(here.xl("list").stdout.splitlines()) == 2
    last_said(there, 50)
    if kind == "tls":
        certificates(tmp_path / "other")
        there.end_daemon(signal.SIGKILL)
        there.environment["XENOLITH_TLS"] = str(tmp_path / "other")
        assert there.xenolith("listen", address).returncode == 0
        assert here.xl("create", "-q", "rec.cfg").returncode == 0
        done = here.xl("migrate", "rec", address)
        assert done.returncode != 0 and "certificate" in done.stderr, done
        last_said(here, 5)
