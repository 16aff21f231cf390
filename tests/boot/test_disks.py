"""Disks in the stock Debian kernel: its own xen-blkfront and ext4 on our back-end."""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from xenolith.debian.initramfs import Command, build_initramfs, kernel_arguments
from xenolith.debian.modules import kernel_modules
from xenolith.debian.packages import obtain
from xenolith.dom0.backends.block import VbdSpec
from xenolith.dom0.console import Overflow
from xenolith.dom0.disks import DiskSource
from xenolith.dom0.image import load_image

from .conftest import Run

if TYPE_CHECKING:
    from machines import Machine
    from xenolith.dom0.services import GuestDomain

pytestmark = pytest.mark.slow
MIB = 1 << 20
XVDA = 51712
DEADLINE_SECONDS = 200
COPY = "dd if=/dev/xvda of=/dev/null bs=1M iflag=fullblock 2>/dev/null"


@pytest.fixture(params=["unicorn", "kvm", "adaptive"])
def engine_name(request: pytest.FixtureRequest) -> str:
    from machines import missing

    engine = str(request.param)
    if reason := missing(engine):
        pytest.skip(f"no {engine} engine here: {reason}")
    return engine


class Guest:
    """A running Debian kernel; its script says `DONE` in the end."""

    def __init__(self, machine: Machine, domain: GuestDomain) -> None:
        self.machine = machine
        self.domain = domain
        self.text = ""
        self._reader = domain.console.open_reader(Overflow.WAIT)

    def wait_for(self, word: str) -> None:
        """Read the console until the guest says this word."""
        while word not in self.text:
            data = self._reader.read(DEADLINE_SECONDS)
            assert data, f"the guest never said {word!r}:\n{self.text}"
            self.text += data.decode("utf-8", "replace")

    def finish(self) -> str:
        """What it printed, up to its clean end."""
        self.wait_for("DONE")
        assert self.domain.wait(DEADLINE_SECONDS) is not None
        self.wait_for("exit 0")
        assert self.machine.dom0.control.info(self.domain.domid).shutdown_reason == 0
        assert "timeout closing device" not in self.text, "power-off has waited for a back-end"
        return self.text


Boot = Callable[..., Guest]


def disk(path: Path, number: int = 0, writable: bool = True) -> VbdSpec:
    name = "abcdefgh"[number]
    return VbdSpec(number=XVDA + 16 * number, name=f"xvd{name}", source=DiskSource(path=path, writable=writable))


@pytest.fixture
def boot(machine: Callable[[int], Machine]) -> Boot:
    """Boot a kernel with disks and run a script in it."""

    def make(script: str, disks: Sequence[VbdSpec] = (), kernel: str = "6.1", vcpus: int = 1) -> Guest:
        from xenolith.dom0.services import DomainSpec

        debian = obtain(kernel)
        ramdisk = build_initramfs(
            debian.busybox,
            command=Command(["sh", "-c", f"modprobe xen-blkfront\n{script}\necho DONE"], "disks"),
            modules=kernel_modules(debian, ["xen-blkfront", "ext4", "isofs"]),
        )
        host = machine(256)
        domain = host.dom0.create(
            DomainSpec(
                name="disks",
                image=load_image(debian.elf),
                kernel=str(debian.elf),
                ramdisk=ramdisk,
                cmdline=kernel_arguments(vcpus, verbose=True) + " loglevel=4",
                memory_kib=224 << 10,
                vcpus=vcpus,
                disks=tuple(disks),
            )
        )
        host.dom0.start(domain)
        return Guest(host, domain)

    return make


@pytest.fixture
def ext4(tmp_path: Path) -> Path:
    """An empty file system of 64 MiB."""
    path = tmp_path / "ext4.img"
    path.touch()
    os.truncate(path, 64 * MIB)
    subprocess.run([tool("mke2fs"), "-q", "-F", "-t", "ext4", path], check=True)
    return path


def tool(name: str) -> str:
    found = shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
    if found is None:
        pytest.skip(f"no {name} here (Debian: e2fsprogs)")
    return found


def check_file_system(path: Path) -> None:
    checked = subprocess.run([tool("e2fsck"), "-f", "-n", path], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout + checked.stderr


def contents(path: Path, name: str) -> bytes:
    return subprocess.run([tool("debugfs"), "-R", f"cat {name}", path], capture_output=True, check=True).stdout


def sized(path: Path, size: int) -> Path:
    path.touch()
    os.truncate(path, size)
    return path


@pytest.mark.parametrize("kernel", ["6.1", "6.1-cloud", "6.12"])
def test_ext4_is_written_read_back_and_sound_afterwards(boot: Boot, ext4: Path, kernel: str) -> None:
    guest = boot(
        """
        mount -t ext4 /dev/xvda /mnt
        seq 1000000 >/mnt/numbers
        for i in $(seq 200); do echo file $i >/mnt/small-$i; done
        sync; umount /mnt; mount -t ext4 /dev/xvda /mnt
        sha256sum /mnt/numbers
        rm /mnt/small-1*
        umount /mnt
        """,
        [disk(ext4)],
        kernel,
    )
    text = guest.finish()
    numbers = b"".join(b"%d\n" % number for number in range(1, 1_000_001))
    assert hashlib.sha256(numbers).hexdigest() in text
    check_file_system(ext4)
    assert contents(ext4, "/numbers") == numbers
    assert contents(ext4, "/small-200") == b"file 200\n"
    statistics = guest.domain.disks[XVDA].backend.statistics
    assert statistics.written_bytes > len(numbers)
    assert statistics.flushes > 0
    assert statistics.errors == 0


def test_a_kernel_reads_what_the_file_holds(boot: Boot, tmp_path: Path) -> None:
    path = tmp_path / "data.img"
    path.write_bytes(random.Random(7).randbytes(24 * MIB))
    text = boot(f"sha256sum /dev/xvda; {COPY}; cat /sys/block/xvda/size", [disk(path)], vcpus=2).finish()
    assert hashlib.sha256(path.read_bytes()).hexdigest() in text
    assert str(24 * MIB // 512) in text.split()


def test_several_disks_and_one_of_them_read_only(boot: Boot, tmp_path: Path) -> None:
    paths = [tmp_path / f"{number}.img" for number in range(5)]
    for number, path in enumerate(paths):
        path.write_bytes(bytes([number]) * MIB)
    guest = boot(
        """
        for d in a b c d e; do head -c 1 /dev/xvd$d | od -An -tu1; cat /sys/block/xvd$d/ro; done | tr -d ' \\n'; echo
        for d in a b c d e; do echo changed-$d | dd of=/dev/xvd$d bs=512 seek=7 2>/dev/null || echo refused-$d; done
        sync
        """,
        [disk(path, number, writable=number != 2) for number, path in enumerate(paths)],
    )
    text = guest.finish()
    assert "0010213040" in text
    assert "refused-c" in text
    assert text.count("refused") == 1
    for number, path in enumerate(paths):
        changed = path.read_bytes()[7 * 512 :].startswith(f"changed-{'abcde'[number]}".encode())
        assert changed == (number != 2)


def test_what_the_file_system_trims_takes_no_room_on_the_host(boot: Boot, ext4: Path) -> None:
    guest = boot(
        """
        mount -t ext4 /dev/xvda /mnt
        dd if=/dev/urandom of=/mnt/big bs=1M count=32 2>/dev/null; sync
        echo FILLED; until [ -e /dev/xvdb ]; do sleep 0.1; done
        rm /mnt/big; sync; fstrim /mnt; umount /mnt
        """,
        [disk(ext4)],
    )
    guest.wait_for("FILLED")
    full = ext4.stat().st_blocks * 512
    path = sized(ext4.with_name("second.img"), MIB)
    guest.machine.dom0.plug_disk(guest.domain, disk(path, 1))
    guest.finish()
    assert full > 32 * MIB
    assert ext4.stat().st_blocks * 512 < full - 30 * MIB
    check_file_system(ext4)


def test_a_disk_is_plugged_and_unplugged_while_the_guest_runs(boot: Boot, tmp_path: Path) -> None:
    guest = boot(
        """
        echo READY
        until [ -e /dev/xvdb ]; do sleep 0.1; done
        head -c 16 /dev/xvdb; echo; echo SEEN
        while [ -e /dev/xvdb ]; do sleep 0.1; done
        echo GONE
        until [ -e /dev/xvdb ]; do sleep 0.1; done
        head -c 16 /dev/xvdb; echo
        """
    )
    guest.wait_for("READY")
    dom0 = guest.machine.dom0
    for content, word in ((b"the first disk..", "SEEN"), (b"and another one.", "DONE")):
        path = tmp_path / word
        path.write_bytes(content * 1024)
        dom0.plug_disk(guest.domain, disk(path, 1))
        guest.wait_for(word)
        assert content.decode() in guest.text
        if word == "SEEN":
            assert dom0.unplug_disk(guest.domain, XVDA + 16, DEADLINE_SECONDS)
            assert not dom0.xenstore.exists(f"/local/domain/0/backend/vbd/{guest.domain.domid}/{XVDA + 16}")
            guest.wait_for("GONE")
    guest.finish()


def test_a_failing_disk_gives_the_guest_input_output_errors(boot: Boot, tmp_path: Path) -> None:
    path = sized(tmp_path / "disk.img", 4 * MIB)
    guest = boot(
        """
        head -c 65536 /dev/xvda >/dev/null && echo READABLE
        until [ -e /dev/xvdb ]; do sleep 0.1; done
        dd if=/dev/xvda of=/dev/null bs=4k skip=512 count=1 || echo NO-READ
        dd if=/dev/xvda of=/dev/null bs=4k count=1 2>/dev/null && echo STILL-READABLE
        """,
        [disk(path)],
    )
    guest.wait_for("READABLE")
    os.truncate(path, MIB)
    second = sized(tmp_path / "second.img", MIB)
    guest.machine.dom0.plug_disk(guest.domain, disk(second, 1))
    text = guest.finish()
    assert "Input/output error" in text
    assert "NO-READ" in text
    assert "STILL-READABLE" in text
    assert "cut off" in guest.machine.dom0.hypervisor.log_text


def test_a_disk_that_grows_is_seen_to(boot: Boot, tmp_path: Path) -> None:
    path = sized(tmp_path / "disk.img", 4 * MIB)
    guest = boot(
        """
        echo READY
        until [ "$(cat /sys/block/xvda/size)" = 16384 ]; do sleep 0.1; done
        echo more | dd of=/dev/xvda bs=512 seek=16000 2>/dev/null; sync
        """,
        [disk(path)],
    )
    guest.wait_for("READY")
    os.truncate(path, 8 * MIB)
    guest.machine.dom0.measure_disk(guest.domain, XVDA)
    guest.finish()
    assert path.read_bytes()[16000 * 512 :].startswith(b"more")


def test_a_drive_gets_a_medium_and_gives_it_back(boot: Boot, tmp_path: Path) -> None:
    guest = boot(
        """
        cat /sys/block/xvda/size; echo READY
        until [ "$(cat /sys/block/xvda/size)" = 2048 ]; do sleep 0.1; done
        head -c 8 /dev/xvda; echo; echo SEEN
        until [ "$(cat /sys/block/xvda/size)" = 0 ]; do sleep 0.1; done
        """,
        [VbdSpec(number=XVDA, name="xvda", source=None, cdrom=True)],
    )
    guest.wait_for("READY")
    path = tmp_path / "medium.iso"
    path.write_bytes(b"a medium".ljust(MIB, b"\0"))
    guest.machine.dom0.change_medium(guest.domain, XVDA, DiskSource(path=path, writable=False))
    guest.wait_for("SEEN")
    assert "a medium" in guest.text
    guest.machine.dom0.change_medium(guest.domain, XVDA, None)
    guest.finish()


@pytest.mark.parametrize("access", ["rw", "ro", "cow"])
def test_run_gives_a_command_a_disk(xenolith_run: Run, ext4: Path, access: str) -> None:
    before = ext4.read_bytes()
    script = "mount /dev/xvda /mnt && touch /mnt/new; sync; ls -1 /mnt; umount /mnt"
    done = xenolith_run("--disk", f"{ext4},{access}", "--", "sh", "-c", script)
    if access == "ro":
        assert b"Read-only file system" in done.stderr
        assert ext4.read_bytes() == before
    else:
        assert done.stdout == b"lost+found\nnew\n"
        assert (ext4.read_bytes() == before) == (access == "cow")


def test_run_says_which_disk_it_cannot_open(xenolith_run: Run, tmp_path: Path) -> None:
    done = xenolith_run("--disk", str(tmp_path / "none"), "--", "true")
    assert done.returncode == 125
    assert f"{tmp_path}/none: No such file".encode() in done.stderr
