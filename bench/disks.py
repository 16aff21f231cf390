"""Disks: how fast a Debian domain reads and writes a raw file of the host's, and what the back-end costs.

    python -m bench.disks [--engine unicorn|kvm|adaptive ...] [--qemu] [--seconds S]

Each row is requests of one kind for some seconds, past the guest's page cache; the file is in the host's. Prints for
each row operations a second (or MB/s), the least and the median time of one, and the back-end thread's CPU time for
each. With --qemu the same kernel, program and file on QEMU TCG's q35 and virtio-blk, for comparison.
"""

from __future__ import annotations

import argparse
import re
import stat
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from xenolith.debian.initramfs import Command, HostFile, Node, build_initramfs, kernel_arguments
from xenolith.debian.modules import kernel_modules
from xenolith.debian.packages import DebianGuest, kernel_package_files, obtain
from xenolith.dom0.backends.block import VbdSpec
from xenolith.dom0.console import Overflow
from xenolith.dom0.disks import DiskSource
from xenolith.dom0.image import load_image
from xenolith.dom0.power import power_on
from xenolith.dom0.services import DomainSpec

SOURCE = Path(__file__).parent / "workloads" / "disk.c"
VIRTIO = ("virtio_ring", "virtio", "virtio_pci_modern_dev", "virtio_pci_legacy_dev", "virtio_pci", "virtio_blk")
DISK_MIB = 256
MEMORY_MIB = 256


@dataclass(frozen=True)
class Row:
    name: str
    arguments: str  # of the program, without device and seconds
    bytes: int


ROWS = (
    Row("4 KiB random read, QD 1", "read 4096 1 random", 4096),
    Row("4 KiB random read, QD 32", "read 4096 32 random", 4096),
    Row("4 KiB random write, QD 1", "write 4096 1 random", 4096),
    Row("4 KiB random write, QD 32", "write 4096 32 random", 4096),
    Row("1 MiB sequential read, QD 4", "read 1048576 4 sequential", 1 << 20),
    Row("1 MiB sequential write, QD 4", "write 1048576 4 sequential", 1 << 20),
    Row("4 KiB write and fsync", "fsync 4096 1 random", 4096),
)


def script(device: str, seconds: float) -> str:
    lines = [f"until [ -e {device} ]; do sleep 0.1; done"]
    lines += [f"/disk {device} {row.arguments} {seconds}" for row in ROWS]
    return "\n".join(lines)


def report(system: str, row: Row, result: str, backend_us: float | None) -> None:
    operations, seconds, least, median = map(float, result.split()[1:])
    rate = operations / seconds
    amount = f"{rate * row.bytes / 1e6:8.0f} MB/s" if row.bytes > 4096 else f"{rate:8.0f} /s  "
    cost = "" if backend_us is None else f"  back-end {backend_us / max(operations, 1):6.1f} us of CPU each"
    print(f"{system:9} {row.name:29} {amount}  min {least:7.1f} us  median {median:7.1f} us{cost}", flush=True)


def measure_xenolith(engine: str, program: Path, disk: Path, seconds: float) -> None:
    guest = obtain()
    ramdisk = build_initramfs(
        guest.busybox,
        command=Command(["sh", "-c", script("/dev/xvda", seconds)], "bench"),
        files=[HostFile.parse(f"{program}:/disk")],
        modules=kernel_modules(guest, ["xen-blkfront"]),
    )
    with power_on([MEMORY_MIB], engine) as dom0:
        domain = dom0.create(
            DomainSpec(
                name="disks",
                image=load_image(guest.elf),
                kernel=str(guest.elf),
                ramdisk=ramdisk,
                cmdline=kernel_arguments(1) + " xen_blkfront.max_indirect_segments=256",
                memory_kib=MEMORY_MIB << 10,
                disks=(VbdSpec(number=51712, name="xvda", source=DiskSource(path=disk)),),
            )
        )
        device = domain.disks[51712]
        dom0.start(domain)
        rows = iter(ROWS)
        text, before = "", device.cpu_time_ns()
        with domain.console.open_reader(Overflow.WAIT) as reader:
            while data := reader.read():
                text += data.decode("utf-8", "replace")
                while "RESULT" in text and "\n" in text.partition("RESULT")[2]:
                    line, _, text = text.partition("RESULT")[2].partition("\n")
                    now = device.cpu_time_ns()
                    report(engine, next(rows), "RESULT" + line, (now - before) / 1000)
                    before = now
        if next(rows, None) is not None:
            raise SystemExit(f"{engine}: not all rows were measured: {domain.console.scrollback[-500:]!r}")


def qemu_modules(guest: DebianGuest, wanted: Sequence[str]) -> list[Node]:
    """These modules of the guest's kernel, as far as it has them as modules, in this order."""
    names = re.compile(rf".*/({'|'.join(wanted)})\.ko(\.xz)?")
    files = kernel_package_files(guest, lambda path: bool(names.match(path)))
    found = {PurePosixPath(path).name.partition(".")[0]: data for path, data in files}
    return [Node(f"m/{name}.ko", stat.S_IFREG | 0o644, found[name]) for name in wanted if name in found]


def measure_qemu(program: Path, disk: Path, seconds: float) -> None:
    guest = obtain()
    nodes = qemu_modules(guest, VIRTIO)
    load = "".join(f"insmod /{node.path}\n" for node in nodes)
    ramdisk = build_initramfs(
        guest.busybox,
        command=Command(["sh", "-c", load + script("/dev/vda", seconds)], "bench"),
        files=[HostFile.parse(f"{program}:/disk")],
        modules=nodes,
    )
    archive = program.with_name("initrd")
    archive.write_bytes(ramdisk)
    command = [
        *("qemu-system-x86_64", "-M", "q35", "-accel", "tcg,thread=multi", "-cpu", "max", "-m", str(MEMORY_MIB)),
        *("-nodefaults", "-display", "none", "-serial", "stdio", "-kernel", str(guest.kernel), "-initrd", str(archive)),
        *("-append", "console=ttyS0 panic=-1 quiet no_timer_check", "-no-reboot"),
        *("-drive", f"file={disk},format=raw,if=none,id=d", "-device", "virtio-blk-pci,drive=d"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120 + 10 * seconds * len(ROWS), check=False)
    results = [line for line in done.stdout.splitlines() if line.startswith("RESULT")]
    for row, result in zip(ROWS, results, strict=True):
        report("qemu q35", row, result, None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", action="append", choices=["unicorn", "kvm", "adaptive"])
    parser.add_argument("--qemu", action="store_true")
    parser.add_argument("--seconds", type=float, default=3.0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-") as directory:
        program, disk = Path(directory, "disk"), Path(directory, "disk.img")
        subprocess.run(["gcc", "-O2", "-static", "-Wall", "-o", program, SOURCE], check=True)
        disk.write_bytes(bytes(range(256)) * (DISK_MIB << 12))
        print(f"# {time.strftime('%F')}, {options.seconds} s a row, a raw file of {DISK_MIB} MiB in the page cache")
        for engine in options.engine or ["unicorn", "kvm", "adaptive"]:
            measure_xenolith(engine, program, disk, options.seconds)
        if options.qemu:
            measure_qemu(program, disk, options.seconds)


if __name__ == "__main__":
    main()
