"""User-Mode Linux: a Linux kernel that is an ordinary program, and runs its processes under ptrace.

It cannot run a stock kernel image; Debian's package user-mode-linux has a kernel built for it.
The kernel and its processes are processes of the host, which take turns: on one CPU a system call costs a
quarter of what it costs where each turn wakes up another CPU, so they are held to one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from bench.packages import PackageError, only_file, unpacked, version
from bench.session import Session
from bench.systems.base import Absent, Boot, Form, System, last_cpu


class UserModeLinux(System):
    """Paravirtualisation without a hypervisor."""

    name = "uml"
    title = "User-Mode Linux"
    forms = (Form.ELF,)

    def prepare(self) -> str:
        try:
            only_file(unpacked("user-mode-linux"), "usr/bin/linux.uml")
            return f"Linux {version('user-mode-linux')}"
        except PackageError as error:
            raise Absent(str(error)) from error

    @contextmanager
    def start(self, boot: Boot) -> Iterator[Session]:
        program = only_file(unpacked("user-mode-linux"), "usr/bin/linux.uml")
        command = [
            str(program), f"mem={boot.memory_mib}M", f"initrd={boot.initramfs}",
            "con0=null,fd:1", "con=null", "ssl=null", *boot.command_line("tty0").split(),
        ]  # fmt: skip
        # Its memory is a file that must be on a tmpfs, or every write goes to a disk.
        with Session(command, environment={"TMPDIR": "/dev/shm"}, cpu=last_cpu()) as session:
            yield session
