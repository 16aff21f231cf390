"""QEMU's own emulation (TCG) of a microvm, with the same kernel and initramfs.

The uncompressed ELF enters through its PVH note (PHYS32_ENTRY), the bzImage through its 64-bit entry after
it has unpacked itself on the emulated CPU.

QEMU's guests read the host's time stamp counter, whose rate Linux finds by comparing it with an emulated
timer.  On a busy host that fails about every third time, and the boot then hangs; or later ticks are late, the
counter is blamed, and the clock has steps of 4 ms.  So the kernel is told the rate, and to trust the counter.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

from bench.kernel import debian_kernel
from bench.session import Session
from bench.systems.base import Absent, Boot, Form, System
from xenolith.machine import tsc

QEMU = "qemu-system-x86_64"

# QEMU's own default. Its CPU "max" has fast string instructions, by name only: they make Linux and glibc move
# memory by `rep movsb`, which costs TCG twice to four times as much for each fault or copy.
CPU = "qemu64"


def qemu_version() -> str:
    """QEMU's version, or Absent."""
    if not shutil.which(QEMU):
        raise Absent(f"{QEMU} is not installed (Debian package qemu-system-x86)")
    text = subprocess.run([QEMU, "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"version (\S+)", text)
    return f"QEMU {found[1]}" if found else "QEMU"


class QemuTcg(System):
    """A whole emulated machine in one user process."""

    name = "qemu-tcg"
    title = "QEMU TCG microvm"

    def prepare(self) -> str:
        return f"{qemu_version()}, Linux {debian_kernel().release}"

    @contextmanager
    def start(self, boot: Boot) -> Iterator[Session]:
        kernel = debian_kernel()
        command_line = f"{boot.command_line('ttyS0')} tsc_early_khz={tsc.frequency() // 1000} tsc=reliable"
        command = [
            QEMU, "-accel", "tcg", "-M", "microvm", "-cpu", CPU, "-smp", "1", "-m", str(boot.memory_mib),
            "-no-user-config", "-nodefaults", "-display", "none", "-no-reboot", "-serial", "stdio",
            "-kernel", str(kernel.bzimage if boot.form is Form.BZIMAGE else kernel.elf),
            "-initrd", str(boot.initramfs), "-append", command_line,
        ]  # fmt: skip
        with Session(command) as session:
            yield session
