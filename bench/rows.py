"""What can be measured: the rows of the evaluation, in the order of the paper's tables.

A row's name is the word that goes through the whole program: the guest's command line, the record on
its console, the JSON, `--rows`.  Rows of the group "boot" are measured by the host's clock from
outside; all others by a program inside the system under test (see workloads/).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum


class Group(Enum):
    """Sections of the table."""

    BOOT = "boot"
    SYSTEM_CALL = "system calls and signals (paper, table 3)"
    PROCESS = "processes (paper, table 3)"
    CONTEXT_SWITCH = "context switches (paper, table 4)"
    FILE_AND_MEMORY = "files and virtual memory (paper, table 5)"
    NETWORK = "network"
    COMPUTE = "compute"
    MACRO = "macro workloads (paper, figure 3)"


@dataclass(frozen=True)
class Row:
    """One line of the table. `unit` is what its program prints; boot rows are in seconds."""

    name: str
    title: str
    unit: str
    group: Group
    quick: bool = False

    @property
    def higher_is_better(self) -> bool:
        """Rates are better when higher, times when lower."""
        return self.unit.endswith("/s")


BOOT_BZIMAGE = Row("boot_bzimage", "boot to shell, bzImage", "s", Group.BOOT, quick=True)
BOOT_ELF = Row("boot_elf", "boot to shell, ELF", "s", Group.BOOT, quick=True)

_CALL, _PROCESS, _SWITCH = Group.SYSTEM_CALL, Group.PROCESS, Group.CONTEXT_SWITCH
_MEMORY, _NET, _COMPUTE, _MACRO = Group.FILE_AND_MEMORY, Group.NETWORK, Group.COMPUTE, Group.MACRO

ROWS: tuple[Row, ...] = (
    BOOT_BZIMAGE,
    BOOT_ELF,
    Row("null_syscall", "null system call", "us", _CALL, quick=True),
    Row("read_zero", "read /dev/zero", "us", _CALL),
    Row("write_null", "write /dev/null", "us", _CALL),
    Row("stat", "stat", "us", _CALL, quick=True),
    Row("open_close", "open and close", "us", _CALL),
    Row("select_tcp", "select, 100 TCP sockets", "us", _CALL),
    Row("signal_install", "signal install", "us", _CALL),
    Row("signal_handle", "signal handle", "us", _CALL, quick=True),
    Row("fork_exit", "fork, exit, wait", "us", _PROCESS, quick=True),
    Row("fork_exec", "fork, exec, wait", "us", _PROCESS, quick=True),
    Row("fork_sh", "fork, sh -c program", "us", _PROCESS, quick=True),
    Row("ctx_2p_0k", "context switch, 2 processes, 0 K", "us", _SWITCH, quick=True),
    Row("ctx_2p_16k", "context switch, 2 processes, 16 K", "us", _SWITCH),
    Row("ctx_2p_64k", "context switch, 2 processes, 64 K", "us", _SWITCH),
    Row("ctx_8p_16k", "context switch, 8 processes, 16 K", "us", _SWITCH),
    Row("ctx_8p_64k", "context switch, 8 processes, 64 K", "us", _SWITCH),
    Row("ctx_16p_16k", "context switch, 16 processes, 16 K", "us", _SWITCH),
    Row("ctx_16p_64k", "context switch, 16 processes, 64 K", "us", _SWITCH),
    Row("pipe", "pipe round trip", "us", _SWITCH, quick=True),
    Row("create_0k", "create a file, 0 K", "us", _MEMORY, quick=True),
    Row("delete_0k", "delete a file, 0 K", "us", _MEMORY),
    Row("create_10k", "create a file, 10 K", "us", _MEMORY),
    Row("delete_10k", "delete a file, 10 K", "us", _MEMORY),
    Row("mmap_munmap", "mmap and munmap, 64 MB", "us", _MEMORY),
    Row("protection_fault", "protection fault", "us", _MEMORY),
    Row("page_fault", "page fault, anonymous", "us", _MEMORY, quick=True),
    Row("cow_fault", "copy-on-write fault", "us", _MEMORY, quick=True),
    Row("tcp_rtt", "TCP loopback round trip", "us", _NET, quick=True),
    Row("tcp_bandwidth", "TCP loopback bandwidth", "MB/s", _NET, quick=True),
    Row("sieve", "integer sieve to 8,000,000", "ms", _COMPUTE, quick=True),
    Row("sha256", "SHA-256", "MB/s", _COMPUTE, quick=True),
    Row("matmul", "matrix product, doubles", "Mflop/s", _COMPUTE, quick=True),
    Row("memcpy", "memcpy of 8 MB", "MB/s", _COMPUTE, quick=True),
    Row("tcc", "compile 10 C files with tcc", "ms", _MACRO, quick=True),
    Row("shell", "shell script, 100 fork+exec", "ms", _MACRO, quick=True),
    Row("text", "text pipeline, tar, gzip", "ms", _MACRO, quick=True),
    Row("sqlite", "SQLite, 200 transactions", "ms", _MACRO, quick=True),
    Row("http", "HTTP server, 4 KB files", "req/s", _MACRO, quick=True),
    Row("dbench", "dbench, 1 client", "MB/s", _MACRO, quick=True),
)

BY_NAME = {row.name: row for row in ROWS}


class UnknownRow(Exception):
    """A name that is not a row's."""


def select(names: Sequence[str]) -> tuple[Row, ...]:
    """The rows with these names, in the table's order; a group's first word names all its rows."""
    wanted: set[str] = set()
    for name in names:
        matching = {row.name for row in ROWS if name in (row.name, row.group.name.lower())}
        if not matching:
            groups = ", ".join(group.name.lower() for group in Group)
            raise UnknownRow(f"no row or group is called '{name}'; `--list` shows the rows; the groups are {groups}")
        wanted |= matching
    return tuple(row for row in ROWS if row.name in wanted)


def quick_rows() -> tuple[Row, ...]:
    """The set that a person runs to see where we stand, within ten minutes for all systems."""
    return tuple(row for row in ROWS if row.quick)
