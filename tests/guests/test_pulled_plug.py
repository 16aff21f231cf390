"""The plug is pulled while a guest writes: every record whose flush returned is on the disk."""

from __future__ import annotations

import os
import random
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from xenolith.dom0.disks import DiskFormat, DiskSource
from xenolith.dom0.disks.open import open_disk
from xenolith.dom0.disks.overlay import create_overlay

from .catalogue import PREBUILT

if TYPE_CHECKING:
    from machines import Machine

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
BLOCKS = 256
ROUNDS = 50
GUEST = PREBUILT / "blkfront-records.elf"
FLUSHED = re.compile(rb"^flushed (\d+)\r?\n", re.MULTILINE)


def make(directory: Path, kind: str) -> DiskSource:
    base = directory / "base.img"
    base.write_bytes(bytes(BLOCKS * 4096))
    if kind == "overlay":
        create_overlay(directory / "top.img", DiskSource(path=base), BLOCKS * 8)
        return DiskSource(path=directory / "top.img", format=DiskFormat.OVERLAY)
    if kind == "qcow2":
        if shutil.which("qemu-nbd") is None:
            pytest.skip("no qemu-nbd here (Debian: qemu-utils)")
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", directory / "q.img", str(BLOCKS * 4096)], check=True)
        return DiskSource(path=directory / "q.img", format=DiskFormat.QCOW2)
    return DiskSource(path=base)


class Checker:
    """Knows which records were said to be flushed."""

    def __init__(self, source: DiskSource) -> None:
        self.source = source
        self.newest: dict[int, int] = {}  # by block
        self.number = 0

    def note(self, console: bytes) -> None:
        for match in FLUSHED.finditer(console):
            self.number = int(match[1])
            self.newest[self.number * 17 % BLOCKS] = self.number

    def check(self) -> None:
        disk = open_disk(DiskSource(path=self.source.path, format=self.source.format, writable=False))
        data = bytearray(BLOCKS * 4096)
        disk.read(0, [memoryview(data)])
        disk.close()
        for block in range(BLOCKS):
            content = data[block * 4096 : (block + 1) * 4096]
            record = int.from_bytes(content[:8], "little")
            assert content == record.to_bytes(8, "little") * 512, f"block {block} is torn"
            assert record >= self.newest.get(block, 0), f"block {block} has lost record {self.newest[block]}"
            assert not record or record * 17 % BLOCKS == block


kinds = pytest.mark.parametrize("kind", ["raw", "overlay", "qcow2"])


@kinds
def test_domains_that_are_destroyed(machine: Callable[[int], Machine], tmp_path: Path, kind: str) -> None:
    from xenolith.dom0.backends.block import VbdSpec
    from xenolith.dom0.console import Overflow
    from xenolith.dom0.image import load_image
    from xenolith.dom0.services import DomainSpec

    dom0 = machine(64).dom0
    image = load_image(GUEST)
    source = make(tmp_path, kind)
    checker = Checker(source)
    rng = random.Random(4)
    for _ in range(ROUNDS):
        domain = dom0.create(
            DomainSpec(
                name="records",
                image=image,
                kernel=str(GUEST),
                cmdline=f"first={checker.number + 1}",
                memory_kib=16 << 10,
                disks=(VbdSpec(number=51712, name="xvda", source=source),),
            )
        )
        said = b""
        wanted = rng.randrange(1, 40)
        with domain.console.open_reader(Overflow.WAIT) as reader:
            dom0.start(domain)
            while said.count(b"flushed") < wanted and (data := reader.read(60)):
                said += data
            destroying = threading.Thread(target=dom0.destroy, args=(domain,))
            destroying.start()
            while data := reader.read(60):
                said += data
            destroying.join()
        assert said.count(b"flushed") >= wanted, said
        checker.note(said)
        checker.check()
    assert checker.number > ROUNDS * 10


RUNNER = """
import sys
from pathlib import Path
from xenolith.dom0.backends.block import VbdSpec
from xenolith.dom0.console import Overflow
from xenolith.dom0.disks import DiskFormat, DiskSource
from xenolith.dom0.image import load_image
from xenolith.dom0.power import power_on
from xenolith.dom0.services import DomainSpec
guest, engine, path, format, first = sys.argv[1:]
dom0 = power_on([32], engine)
source = DiskSource(path=Path(path), format=DiskFormat(format))
domain = dom0.create(DomainSpec(name="records", image=load_image(Path(guest)), kernel=guest, cmdline="first=" + first,
    memory_kib=16 << 10, disks=(VbdSpec(number=51712, name="xvda", source=source),)))
reader = domain.console.open_reader(Overflow.WAIT)
dom0.start(domain)
while data := reader.read():
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()
"""


@kinds
def test_a_process_that_is_killed(engine_name: str, tmp_path: Path, kind: str) -> None:
    source = make(tmp_path, kind)
    checker = Checker(source)
    rng = random.Random(5)
    for _ in range(ROUNDS):
        words = [str(GUEST), engine_name, str(source.path), source.format, str(checker.number + 1)]
        process = subprocess.Popen([sys.executable, "-c", RUNNER, *words], stdout=subprocess.PIPE)
        assert process.stdout is not None
        wanted = rng.randrange(1, 40)
        said = b""
        while said.count(b"flushed") < wanted and (data := os.read(process.stdout.fileno(), 4096)):
            said += data
        process.kill()
        said += process.stdout.read()
        process.wait()
        assert said.count(b"flushed") >= wanted, said
        checker.note(said)
        checker.check()
