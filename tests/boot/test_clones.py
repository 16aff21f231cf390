"""Clones of a guest with a disk that it writes to and a network: each goes on with a disk and addresses of its own."""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import xenolith
from debian.test_roots import needs_e2fsprogs
from dom0.netfront import why_no_passt
from xenolith.debian.packages import obtain
from xenolith.dom0.disks import DiskFormat, DiskSource
from xenolith.dom0.disks.open import open_disk
from xenolith.dom0.disks.overlay import create_overlay
from xenolith.toolstack.api import Domain, Machine
from xenolith.toolstack.config.disk import Disk
from xenolith.toolstack.config.disk import DiskFormat as Format
from xenolith.toolstack.config.domain import DomainConfig
from xenolith.toolstack.config.vif import Nic

from .conftest import DEADLINE_SECONDS

pytestmark = pytest.mark.slow

SECTORS = 32768


@pytest.fixture
def machine(engine_name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    with xenolith.power_on(800, engine_name) as machine:
        yield machine


def with_disk(path: Path, format: Format) -> DomainConfig:
    config = xenolith.debian("parent", memory_mib=128, devices=True)
    config.disks = [Disk(vdev="xvda", target=str(path), format=format)]
    config.nics = [Nic(0)]
    return config


def run(domain: Domain, line: str) -> str:
    done = domain.run(line, timeout=DEADLINE_SECONDS)
    assert done.exit_status == 0, done
    return done.stdout.decode()


def write(domain: Domain, block: int, text: str) -> None:
    run(domain, f"printf %-4096s {text} | dd of=/dev/xvda bs=4096 seek={block} conv=fsync,notrunc 2>/dev/null")


def read(domain: Domain, block: int) -> str:
    line = f"echo 3 >/proc/sys/vm/drop_caches; dd if=/dev/xvda bs=4096 skip={block} count=1 2>/dev/null"
    return run(domain, line).strip(" \0")


def contents(path: Path, format: DiskFormat, block: int) -> str:
    disk = open_disk(DiskSource(path=path, format=format, writable=False))
    data = bytearray(4096)
    disk.read(block * 4096, [memoryview(data)])
    disk.close()
    return data.decode().strip(" \0")


def check_addresses(domains: list[Domain]) -> None:
    """All have the addresses that dom0 says, no two the same, and reach each other by them."""
    known = [domain.client.networks(domain.domid)[0] for domain in domains]
    assert len({each.mac for each in known}) == len({each.address for each in known}) == len(domains)
    for domain, mine, other in zip(domains, known, [*known[1:], known[0]], strict=True):
        said = run(domain, "ip address show eth0; ip route")
        assert f"link/ether {mine.mac}" in said
        assert f"inet {mine.address}/16" in said
        assert said.count("inet ") == 1
        assert "default via 10.213.0.1" in said
        run(domain, f"ping -c 1 -W 60 {other.address} && ping -c 1 -W 60 10.213.0.1")
        assert not domain.client.networks(domain.domid)[0].dropped.get("denied")


def test_clones_of_two_generations_have_disks_and_addresses_of_their_own(machine: Machine, tmp_path: Path) -> None:
    path = tmp_path / "disk"
    create_overlay(path, None, SECTORS)
    parent = machine.create(with_disk(path, Format.OVERLAY))
    parent.unpause()
    for block in range(4):
        write(parent, block, "parent")
    run(parent, "until ip -4 address show eth0 | grep -q inet; do :; done")

    first, unstarted = (Domain(machine, domid) for domid in machine.client.clone(parent.domid, ["first", "unstarted"]))
    first.unpause()
    write(parent, 1, "later")
    write(first, 2, "first")
    young, younger = (
        Domain(machine, machine.client.clone(each.domid, [name])[0])
        for each, name in ((first, "young"), (unstarted, "younger"))
    )
    for each in (unstarted, young, younger):
        each.unpause()
    write(young, 3, "young")
    said = [[read(domain, block) for block in range(4)] for domain in (parent, first, unstarted, young, younger)]
    assert said == [
        ["parent", "later", "parent", "parent"],
        ["parent", "parent", "first", "parent"],
        ["parent", "parent", "parent", "parent"],
        ["parent", "parent", "first", "young"],
        ["parent", "parent", "parent", "parent"],
    ]
    check_addresses([parent, first, unstarted, young, younger])

    first.destroy()  # what its clone is made of stays
    unstarted.destroy()
    assert [read(young, block) for block in range(4)] == ["parent", "parent", "first", "young"]
    for each in (young, parent, younger):
        each.destroy()
    assert sorted(each.name for each in tmp_path.iterdir()) == ["disk", "state"]
    assert [contents(path, DiskFormat.OVERLAY, block) for block in range(3)] == ["parent", "later", "parent"]
    assert not [each for each in (tmp_path / "state").rglob("*") if each.is_file() and each.name != "lock"]


def test_a_clone_keeps_its_disk_when_it_is_saved_and_built_again(machine: Machine, tmp_path: Path) -> None:
    path = tmp_path / "disk"
    create_overlay(path, None, SECTORS)
    parent = machine.create(with_disk(path, Format.OVERLAY))
    parent.unpause()
    write(parent, 0, "parent")
    clone = Domain(machine, machine.client.clone(parent.domid, ["clone"])[0])
    clone.unpause()
    write(clone, 0, "clone")
    machine.client.save(clone.domid, tmp_path / "saved")
    parent.destroy()
    clone = Domain(machine, machine.client.restore(tmp_path / "saved"))
    clone.unpause()
    assert read(clone, 0) == "clone"
    config = machine.client.config(clone.domid)
    machine.client.destroy(clone.domid, again=True)
    clone = machine.create(config)
    clone.unpause()
    assert read(clone, 0) == "clone"
    clone.destroy()
    assert sorted(each.name for each in tmp_path.iterdir()) == ["disk", "saved", "state"]
    assert contents(path, DiskFormat.OVERLAY, 0) == "parent"


def test_a_disk_without_layers_is_refused_and_a_template_has_an_overlay_of_it(machine: Machine, tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(b"image".ljust(4096, b"\0") + bytes((SECTORS - 8) * 512))
    parent = machine.create(with_disk(path, Format.RAW))
    with pytest.raises(xenolith.ToolstackError, match="no overlay \\(xvda\\): make an overlay of it"):
        machine.client.clone(parent.domid, ["clone"])
    parent.destroy()

    config = with_disk(path, Format.RAW)
    warm_up = "printf %-4096s warm | dd of=/dev/xvda bs=4096 seek=1 conv=fsync,notrunc 2>/dev/null"
    template = machine.create_template("base", config, warm_up, ready=1)
    line = (
        "for n in 0 1 2; do dd if=/dev/xvda bs=4096 skip=$n count=1 2>/dev/null | tr -d ' \\0'; echo; done; "
        "printf %-4096s used | dd of=/dev/xvda bs=4096 seek=2 conv=fsync,notrunc 2>/dev/null; "
        "cat /sys/class/net/eth0/address; ip -4 address show eth0 | grep -o 'inet [0-9.]*'; "
        "ping -c 1 -W 60 10.213.0.1 >&2"
    )
    said = [template.run(line, timeout=DEADLINE_SECONDS) for _ in range(3)]
    assert [each.exit_status for each in said] == [0, 0, 0], said
    lines = [each.stdout.decode().splitlines() for each in said]
    assert [each[:3] for each in lines] == [["image", "warm", ""]] * 3
    assert len({each[3] for each in lines}) == len({each[4] for each in lines}) == 3
    template.remove()
    with machine.events() as events:
        while machine.domains():
            events.get(timeout=DEADLINE_SECONDS)
    assert contents(path, DiskFormat.RAW, 1) == ""
    assert not [each for each in (tmp_path / "state").rglob("*") if each.is_file() and each.name != "lock"]


@pytest.mark.skipif(bool(why_no_passt()), reason=why_no_passt() or "")
def test_a_published_port_stays_the_parents(machine: Machine, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    config = xenolith.debian("parent", memory_mib=128, devices=True)
    config.nics = [Nic(0, publish=[f"{port}:80"])]
    with pytest.raises(xenolith.ToolstackError, match="no published ports"):
        machine.create_template("base", config)
    parent = machine.create(config)
    parent.unpause()
    run(parent, "printf '#!/bin/sh\\nread line; hostname\\n' >/root/answer; chmod +x /root/answer")
    run(parent, "(while :; do nc -l -p 80 -e /root/answer; done) >/dev/null 2>&1 &")
    run(parent, "until ip -4 address show eth0 | grep -q inet; do :; done")
    clone = Domain(machine, machine.client.clone(parent.domid, ["clone"])[0])
    clone.unpause()
    assert run(clone, "hostname") == "clone\n"
    assert not machine.client.networks(clone.domid)[0].published
    said = b""
    until = time.monotonic() + DEADLINE_SECONDS
    while not said and time.monotonic() < until:  # the guest's server listens again a moment after it answered
        with (
            contextlib.suppress(ConnectionError),
            socket.create_connection(("127.0.0.1", port), DEADLINE_SECONDS) as connection,
        ):
            connection.sendall(b"who?\n")
            said = connection.recv(100)
    assert said == b"xenolith\n"
    for each in (parent, clone):
        each.destroy()


@needs_e2fsprogs
def test_a_template_has_the_root_and_the_network_that_run_would_give_it(machine: Machine, tmp_path: Path) -> None:
    image = tmp_path / "root.img"
    folder = tmp_path / "root"
    for name in ("bin", "etc", "dev", "proc", "sys", "srv", "root"):
        (folder / name).mkdir(parents=True)
    shutil.copy(obtain().busybox, folder / "bin/busybox")
    (folder / "bin/sh").symlink_to("busybox")
    subprocess.run(["mke2fs", "-q", "-t", "ext4", "-d", folder, image, "32M"], check=True)
    before = image.read_bytes()
    config = xenolith.debian("any", memory_mib=128, devices=True)
    template = machine.create_template("base", config, "busybox touch /srv/warm", 1, root=str(image), net="deny out")
    address = "busybox ip -4 address show eth0"
    line = f"busybox ls /srv; busybox touch /srv/used; until {address} | busybox grep inet; do :; done"
    said = [template.run(line, timeout=DEADLINE_SECONDS) for _ in range(2)]
    for each in said:
        assert each.stdout.startswith(b"warm\n    inet 10.213."), each
    assert len({each.stdout for each in said}) == 2
    template.remove()
    assert image.read_bytes() == before
