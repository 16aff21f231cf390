"""Disks as a person handles them: real commands, a daemon, and a small guest whose front-end uses them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from people import Person, person_in

HEADING = "Vdev  BE  handle state evt-ch ring-ref BE-path                       \n"
PATTERN = b"".join(bytes((sector * 7 + at) & 0xFF for at in range(512)) for sector in range(4096))


@pytest.fixture
def person(tmp_path: Path) -> Iterator[Person]:
    with person_in(tmp_path) as person:
        yield person


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(PATTERN)
    return path


def rows(person: Person, domain: str) -> list[list[str]]:
    listed = person.xl("block-list", domain)
    assert listed.returncode == 0
    assert listed.stdout.startswith(HEADING)
    return [line.split() for line in listed.stdout.splitlines()[1:]]


def test_a_guest_with_a_disk_from_its_configuration(person: Person, image: Path) -> None:
    config = person.configuration("b", "blkfront.elf", disk=["disk.img,raw,xvda,rw"], on_poweroff="preserve")
    assert person.xl("create", "-F", config).returncode == 0
    assert "FAILED=0" in person.xl_on_a_terminal("console", "b")
    assert image.read_bytes()[16 * 512 : 24 * 512] == b"\xa5" * 4096
    statistics = person.xl("top", "-b", "-i", "1")
    assert statistics.returncode == 0


def test_disks_are_attached_listed_and_detached(person: Person, image: Path) -> None:
    (image.parent / "other.img").write_bytes(bytes(1 << 20))
    config = person.configuration("b", "hello.elf", disk=["disk.img,raw,xvda,ro"])
    assert person.xl("create", "-p", "-q", config).returncode == 0
    base = "/local/domain/0/backend/vbd/1"
    assert rows(person, "b") == [["51712", "0", "1", "1", "-1", "-1", f"{base}/51712"]]
    assert person.xl("block-attach", "b", "other.img", "raw", "xvdb", "rw").returncode == 0
    assert person.xl("block-attach", "1", "format=raw,vdev=hda,target=other.img").stderr.splitlines() == [
        f"{image.parent}/other.img is in use: another disk uses it",
        "libxl_device_disk_add failed.",
    ]
    assert [row[0] for row in rows(person, "1")] == ["51712", "51728"]
    assert person.xl("block-attach", "b", "other.img,raw,xvdb").stderr.endswith("libxl_device_disk_add failed.\n")
    assert person.xl("block-detach", "b", "xvdb").returncode == 0
    assert person.xl("block-detach", "b", "51728").stderr.startswith("Device 51728 not connected.")
    assert person.xl("block-detach", "b", "nonsense").returncode == 1
    assert [row[0] for row in rows(person, "b")] == ["51712"]
    unknown = person.xl("block-list", "nope")
    assert (unknown.stdout, unknown.stderr, unknown.returncode) == (
        HEADING,
        "nope is an invalid domain identifier\n",
        1,
    )


@pytest.mark.parametrize(
    ("disk", "message"),
    [
        ("none.img,raw,xvda", "none.img: No such file"),
        ("disk.img,raw,xyz", "'xyz' is no virtual device"),
        ("disk.img,raw,xvda,rw,backend=other", "backend="),
        ("script=block-drbd,vdev=xvda,target=r0", "block script"),
        ("disk.img,overlay,xvda", "no overlay"),
        ("disk.img,extents,xvda", "table of extents"),
        ("disk.img,raw,xvda,rw,specification=virtio", "virtio"),
    ],
)
def test_a_disk_that_cannot_be_is_said_before_anything_is_made(
    person: Person, image: Path, disk: str, message: str
) -> None:
    answer = person.xl("create", "-q", person.configuration("b", "hello.elf", disk=[disk]))
    assert answer.returncode != 0
    assert message in answer.stderr
    assert person.xl("domid", "b").returncode == 1


def test_a_disk_twice_is_refused(person: Person, image: Path) -> None:
    config = person.configuration("b", "hello.elf", disk=["disk.img,raw,xvda", "disk.img,raw,xvdb"])
    assert "in use" in person.xl("create", "-q", config).stderr
    read_only = 'disk=["disk.img,raw,xvda,ro", "disk.img,raw,xvdb,ro"]'
    assert person.xl("create", "-p", "-q", config, read_only).returncode == 0
    assert [row[0] for row in rows(person, "b")] == ["51712", "51728"]


def test_a_medium_is_inserted_and_ejected(person: Person, image: Path) -> None:
    config = person.configuration("b", "hello.elf", disk=[",,xvdc,cdrom", "disk.img,raw,xvda,ro"])
    assert person.xl("create", "-p", "-q", config).returncode == 0
    assert person.xl("cd-insert", "b", "xvdc", "disk.img").returncode == 0
    assert person.xl("cd-eject", "b", "xvdc").returncode == 0
    assert person.xl("cd-insert", "b", "xvda", "disk.img").stderr == "xvda is no drive whose medium can be changed.\n"
    assert "No such file" in person.xl("cd-insert", "b", "xvdc", "none.iso").stderr


def test_an_overlay_is_made_used_and_kept(person: Person, image: Path) -> None:
    assert person.xl("disk-create", "-b", "disk.img", "top.img").returncode == 0
    assert person.xl("disk-create", "-b", "disk.img", "top.img").returncode == 1
    config = person.configuration("b", "blkfront.elf", disk=["top.img,overlay,xvda"], on_poweroff="preserve")
    assert person.xl("create", "-p", "-q", config).returncode == 0
    assert person.xl("block-snapshot", "b", "xvda", "before.img").returncode == 0
    assert "cannot keep a snapshot" in person.xl("block-snapshot", "b", "xvda", "before.img").stderr
    assert person.xl("unpause", "b").returncode == 0
    assert "FAILED=0" in person.xl_on_a_terminal("console", "b")
    assert image.read_bytes() == PATTERN
    names = sorted(path.name for path in image.parent.iterdir() if path.suffix == ".img")
    assert names == ["before.img", "disk.img", "top.img"]


@pytest.mark.parametrize("size", ["", "0", "100", "12X", "-1G", "1.5G"])
def test_a_size_that_is_none_is_refused(person: Person, size: str) -> None:
    answer = person.xl("disk-create", "-s", size, "new.img")
    assert answer.returncode == 1
    assert re.search("size", answer.stderr)


def test_an_empty_disk_has_the_size_that_was_asked_for(person: Person, tmp_path: Path) -> None:
    assert person.xl("disk-create", "-s", "3M", "new.img").returncode == 0
    assert (tmp_path / "new.img").stat().st_size == 3 << 20
