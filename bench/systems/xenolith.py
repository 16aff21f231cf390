"""Xenolith: one domain by `xenolith run`, on one of its engines."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

from bench.kernel import debian_kernel
from bench.session import Session
from bench.systems.base import Absent, Boot, Form, System

PROGRAM = Path(sys.executable).with_name("xenolith")  # of the environment that runs the evaluation


class Xenolith(System):
    """Our own domains. `engine` is what --engine takes."""

    counts_traps = True

    def __init__(self, engine: str, stubs: bool = False) -> None:
        """`stubs`: with user mode in stub processes, where that is quicker."""
        self.engine = engine
        self.name = "xenolith-stubs" if stubs else f"xenolith-{engine}"
        self.title = f"Xenolith, {engine}{' with stubs' if stubs else ''}"
        self._setting = f"XENOLITH_NATIVE_USER={'on' if stubs else 'off'}"

    def prepare(self) -> str:
        if not PROGRAM.exists():
            raise Absent(f"there is no {PROGRAM}: `{sys.executable} -m pip install -e .` makes it")
        if self.engine != "unicorn" and not os.access("/dev/kvm", os.R_OK | os.W_OK):
            raise Absent("/dev/kvm is missing or may not be opened")
        return f"Xenolith {metadata.version('xenolith')}, Linux {debian_kernel().release}"

    @contextmanager
    def start(self, boot: Boot) -> Iterator[Session]:
        kernel = debian_kernel()
        command = [
            "env", self._setting, str(PROGRAM), "run", "--engine", self.engine, "--memory", str(boot.memory_mib),
            "--kernel", str(kernel.bzimage if boot.form is Form.BZIMAGE else kernel.elf),
            "--ramdisk", str(boot.initramfs), "--cmdline", boot.command_line("hvc0"), "--stats",
        ]  # fmt: skip
        with Session(command) as session:
            yield session
