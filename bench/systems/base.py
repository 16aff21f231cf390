"""What a system under test is."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from bench.session import Session


def last_cpu() -> int:
    """The CPU for systems that are held to one."""
    return max(os.sched_getaffinity(0))


class Absent(Exception):
    """A system cannot run here; the text is the reason, and what would change it."""


class Form(Enum):
    """The form in which the kernel is handed to the system."""

    BZIMAGE = "bzImage"
    ELF = "ELF"


@dataclass(frozen=True)
class Boot:
    """What to boot: an initramfs, in how much memory, and which rows to measure there (none: only boot)."""

    initramfs: Path
    form: Form
    memory_mib: int = 512
    rows: Sequence[str] = ()
    budget: float = 0.5
    macro_budget: int = 2

    def command_line(self, console: str) -> str:
        """The kernel's command line, the same for every system but for the console's name."""
        line = f"console={console} quiet mitigations=off nr_cpus=1 noreplace-smp"
        if self.rows:
            line += (
                f" bench.budget={self.budget} bench.macro_budget={self.macro_budget} bench.rows={','.join(self.rows)}"
            )
        return line


class System(ABC):
    """One column of the table."""

    name: str  # for --systems and the JSON
    title: str  # for people
    forms: tuple[Form, ...] = (Form.BZIMAGE, Form.ELF)  # the kernel forms whose boot can be measured
    preferred_form = Form.ELF  # for everything else
    boot_starts_at: str | None = None  # the marker from which a boot is timed; None: the process's start
    counts_traps = False  # prints statistics as JSON on standard error when it ends

    @abstractmethod
    def prepare(self) -> str:
        """Find or fetch what is needed. Returns the version for the report, or raises Absent."""

    @abstractmethod
    def start(self, boot: Boot) -> AbstractContextManager[Session]:
        """Start it."""
