"""Real Xen with a PV domU, on a machine that QEMU emulates (TCG).

Xen 4.17 boots by multiboot with Debian's kernel as domain 0, whose initramfs holds little more than
busybox and the toolstack of xen-utils.  Domain 0 loads the Xen drivers, starts xenstored and
xenconsoled and runs `xl create -c`, so that the domU's console appears on the second serial port; the
first one is Xen's and domain 0's own, and goes to a file.
"""

from __future__ import annotations

import gzip
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bench.cpio import File, Link, Tree, archive
from bench.image import busybox, device_archive
from bench.kernel import debian_kernel
from bench.packages import PackageError, cache_directory, only_file, unpacked, version
from bench.session import Session
from bench.systems.base import Absent, Boot, Form, System
from bench.systems.qemu import QEMU, qemu_version

HYPERVISOR, UTILS = "xen-hypervisor-4.17-amd64", "xen-utils-4.17"
TOOLS = "usr/lib/xen-4.17/bin"
TOOL_NAMES = ["xl", "xenstored", "xenconsoled", "xenconsole", "xen-init-dom0", "libxl-save-helper"]
LIBRARIES = [
    "libc6", "libgcc-s1", "liblzma5", "libncurses6", "libtinfo6", "libuuid1", "libyajl2", "libzstd1", "zlib1g",
    "libxencall1", "libxendevicemodel1", "libxenevtchn1", "libxenforeignmemory1", "libxengnttab1", "libxenhypfs1",
    "libxenmisc4.17", "libxenstore4", "libxentoolcore1", "libxentoollog1",
]  # fmt: skip
MODULES = ["xen-evtchn", "xen-privcmd", "xen-gntdev", "xen-gntalloc", "xenfs"]  # in the order of their dependencies

DOM0_MIB, XEN_MIB = 512, 256  # domain 0 holds the domU's kernel and initramfs twice while it builds the domain

DOM0_INIT = """#!/bin/busybox sh
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t sysfs sys /sys
/bin/busybox mount -t devtmpfs dev /dev
/bin/busybox mkdir -p /dev/pts
/bin/busybox mount -t devpts devpts /dev/pts
export PATH=/bin:/{tools}
stty -F /dev/ttyS1 115200 raw -echo
exec > /dev/ttyS1
echo @dom0
for module in {modules}; do insmod /modules/$module.ko; done
mount -t xenfs xenfs /proc/xen
xenstored --pid-file /run/xenstored.pid
until xl info > /dev/null 2>&1; do usleep 20000; done
xen-init-dom0 > /dev/null
xenconsoled --pid-file /run/xenconsoled.pid
echo @create
xl create -q -c /domu/cfg < /dev/ttyS1 2>&1
echo "xl create ended with status $?"
xl dmesg | tail -n 5
poweroff -f
"""


class XenInQemu(System):
    """The like of us, for comparison: Xen's paravirtual interface without hardware virtualisation."""

    name = "xen-in-qemu"
    title = "Xen 4.17 in QEMU TCG"
    boot_starts_at = "create"

    def prepare(self) -> str:
        try:
            _hypervisor()
            _dom0_archive()
            return f"Xen {version(HYPERVISOR)}, {qemu_version()}, Linux {debian_kernel().release}"
        except PackageError as error:
            raise Absent(str(error)) from error

    @contextmanager
    def start(self, boot: Boot) -> Iterator[Session]:
        kernel = debian_kernel()
        image = kernel.bzimage if boot.form is Form.BZIMAGE else kernel.elf
        with tempfile.TemporaryDirectory(prefix="bench-xen-", dir="/dev/shm") as scratch:
            directory = Path(scratch)
            (directory / "xen").symlink_to(_hypervisor())
            (directory / "dom0-kernel").symlink_to(image)
            domu = archive(_domu_tree(boot, image))
            (directory / "dom0-initrd").write_bytes(_dom0_archive().read_bytes() + domu)
            with Session(_command(boot, len(domu) >> 20), directory) as session:
                yield session


def _command(boot: Boot, domu_mib: int) -> list[str]:
    dom0_mib = DOM0_MIB + 2 * domu_mib
    options = f"console=com1 com1=115200,8n1 noreboot smep=0 smap=0 dom0_mem={dom0_mib}M,max:{dom0_mib}M"
    return [
        QEMU, "-accel", "tcg", "-cpu", "max,-la57", "-smp", "1", "-m", str(XEN_MIB + dom0_mib + boot.memory_mib),
        "-no-user-config", "-nodefaults", "-display", "none", "-no-reboot",
        "-serial", "file:dom0.log", "-serial", "stdio",
        "-kernel", "xen", "-append", options,
        "-initrd", "dom0-kernel console=hvc0 quiet mitigations=off,dom0-initrd",
    ]  # fmt: skip


def _domu_tree(boot: Boot, image: Path) -> Tree:
    config = {
        "name": "domu",
        "type": "pv",
        "kernel": "/domu/kernel",
        "ramdisk": "/domu/ramdisk",
        "extra": boot.command_line("hvc0"),
        "on_poweroff": "destroy",
    }
    lines = [f'{key} = "{value}"' for key, value in config.items()] + [f"memory = {boot.memory_mib}", "vcpus = 1"]
    return {
        "domu/cfg": File("\n".join([*lines, ""]).encode()),
        "domu/kernel": File(image.read_bytes()),
        "domu/ramdisk": File(boot.initramfs.read_bytes()),
    }


def _hypervisor() -> Path:
    """Xen itself, unpacked: QEMU's multiboot loader takes no gzip."""
    path = cache_directory() / "xen"
    if not path.exists():
        path.write_bytes(gzip.decompress(only_file(unpacked(HYPERVISOR), "boot/xen-*.gz").read_bytes()))
    return path


def _dom0_archive() -> Path:
    """Domain 0's initramfs, without the domU's files."""
    path = cache_directory() / "dom0.cpio"
    tree: dict[str, File | Link] = {"bin/busybox": File(busybox().read_bytes(), executable=True)}
    for applet in ["sh", "stty", "insmod", "mount", "usleep", "tail", "poweroff"]:
        tree[f"bin/{applet}"] = Link("busybox")
    script = DOM0_INIT.format(tools=TOOLS, modules=" ".join(MODULES))
    tree["init"] = File(script.encode(), executable=True)
    for name in TOOL_NAMES:
        tree[f"{TOOLS}/{name}"] = File(only_file(unpacked(UTILS), f"{TOOLS}/{name}").read_bytes(), executable=True)
    for package in LIBRARIES:
        for library in sorted(unpacked(package).glob("**/x86_64-linux-gnu/*.so*")):
            entry = Link(os.readlink(library)) if library.is_symlink() else File(library.read_bytes(), executable=True)
            tree[str(library.relative_to(unpacked(package)))] = entry
    loader = only_file(unpacked("libc6"), "lib/x86_64-linux-gnu/ld-linux-x86-64.so.2")
    tree["lib64/ld-linux-x86-64.so.2"] = File(loader.read_bytes(), executable=True)
    for module in MODULES:
        found = only_file(debian_kernel().package, f"lib/modules/*/kernel/drivers/xen/**/{module}.ko")
        tree[f"modules/{module}.ko"] = File(found.read_bytes())
    for directory in ["sys", "var/lib/xen", "var/lib/xenstored", "var/log/xen", "var/lock", "run/xen", "run/xenstored"]:
        tree[f"{directory}/.keep"] = File(b"")
    tree["var/run"] = Link("../run")
    tree["etc/xen/xl.conf"] = File(b'autoballoon="off"\n')
    partial = path.with_suffix(".partial")
    partial.write_bytes(archive(tree) + device_archive())
    shutil.move(partial, path)
    return path
