"""A Debian guest under way, for tests of saving, restoring, cloning and relocating it.

It counts on its console, checks files against their checksums, sleeps by its timer, all without end. Nothing may be
missing or come twice, wherever it is.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache

from bench import relocation
from machines import DEADLINE_SECONDS
from xenolith.debian.initramfs import Command, build_initramfs, kernel_arguments
from xenolith.debian.modules import kernel_modules
from xenolith.debian.packages import obtain
from xenolith.dom0.backends.block import VbdSpec
from xenolith.dom0.backends.net import VifSpec
from xenolith.dom0.console import Console, Overflow
from xenolith.dom0.image import load_image
from xenolith.dom0.migration import live
from xenolith.dom0.services import Dom0, DomainSpec, GuestDomain

SCRIPT = """
dd if=/dev/urandom of=/data bs=64k count=16 2>/dev/null; sha256sum /data >/sums
count() {
    i=0
    while :; do
        i=$((i+1))
        echo "$1 $i"
        case $i in *0) sha256sum -c -s /sums && echo "$1 good" || echo "$1 BAD"; sleep 0.02;; esac
    done
}
%s
"""

# Two counters, one of which keeps its number on the disk, past the guest's cache, and finds it there again.
WITH_A_DISK = """
keep() {
    i=0
    while :; do
        i=$((i+1))
        printf '%-512s' "d $i" | dd of=/dev/xvda bs=512 seek=$((i % 64)) count=1 conv=fsync,notrunc 2>/dev/null
        echo 3 >/proc/sys/vm/drop_caches
        set -- $(dd if=/dev/xvda bs=512 skip=$((i % 64)) count=1 2>/dev/null)
        [ "$2" = "$i" ] && echo "d $i" || echo "d BAD $i $2"
    done
}
until [ -b /dev/xvda ]; do :; done
count a & keep & wait
"""


@cache
def _guest(script: str) -> tuple[object, bytes]:
    guest = obtain("6.1")
    command = Command(["/bin/sh", "-c", script], nonce="")
    modules = kernel_modules(guest, ["xen-blkfront", "xen-netfront"])
    return load_image(guest.elf), build_initramfs(guest.busybox, command=command, modules=modules)


def counting(
    vcpus: int = 1,
    memory_mib: int = 128,
    script: str = "",
    disks: Sequence[VbdSpec] = (),
    nets: Sequence[VifSpec] = (),
) -> DomainSpec:
    """The guest: as many counters, called a, b, ..., as it has vCPUs."""
    counters = "\n".join(f"count {name} &" for name in "abcd"[:vcpus]) + "\nwait"
    image, ramdisk = _guest(SCRIPT % (script or counters))
    return DomainSpec(
        name="counting",
        image=image,  # type: ignore[arg-type]
        kernel="vmlinuz",
        ramdisk=ramdisk,
        cmdline=kernel_arguments(vcpus),
        memory_kib=memory_mib << 10,
        vcpus=vcpus,
        disks=tuple(disks),
        nets=tuple(nets),
    )


def relocate(here: Dom0, there: Dom0, domain: GuestDomain) -> tuple[GuestDomain, live.Figures]:
    """Move a domain from one machine to another; how it goes is printed."""
    return relocation.relocate(here, there, domain, print)


def follow(console: Console, until: str) -> str:
    """What the guest printed from its beginning to a line `until`, which comes if it does not come to a standstill."""
    pattern = re.compile(rf"^{re.escape(until)}\r?\n", re.MULTILINE)
    printed = ""
    with console.open_reader(Overflow.WAIT, 1 << 22) as reader:
        while not pattern.search(printed):
            data = reader.read(DEADLINE_SECONDS)
            assert data, f"nothing comes any more, not {until!r}; the end of what came:\n{printed[-2000:]}"
            printed += data.decode("utf-8", "replace")
    return printed


def said(printed: str, name: str) -> list[int]:
    """The numbers that a counter has said."""
    return [int(number) for number in re.findall(rf"^{name} (\d+)\r?$", printed, re.MULTILINE)]


def check(printed: str, names: str = "a", first: int | None = 1) -> None:
    """Each counter has said every number once, in order, from `first` on, and found its file right each time."""
    for name in names:
        numbers = said(printed, name)
        start = numbers[0] if first is None else first
        assert numbers == list(range(start, start + len(numbers)))
    assert "BAD" not in printed
    assert not re.search(r"soft lockup|Call Trace|BUG:|Oops", printed), printed[-3000:]
