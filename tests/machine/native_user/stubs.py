"""A hostile program in a stub: code of its choice, in memory that it may read, write and execute."""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Callable
from pathlib import Path

from xenolith.machine.engines.native_state import NOT_HANDLED, ModeFields
from xenolith.machine.engines.unicorn.user import code, stub
from xenolith.machine.engines.unicorn.user.stub import Stub, map_pages
from xenolith.machine.memory import MachineMemory

PROGRAM = 0x40_0000
FRAMES = 64
FIRST = 8  # frames mapped from PROGRAM on
PAGES = 16
ALL_RIGHTS = 7
SYSCALL = "0f 05"
STACK = PROGRAM + (PAGES << 12)

REGISTERS = ["r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15", "rdi", "rsi", "rbp", "rbx", "rdx", "rax", "rcx"]
REGISTERS += ["rsp", "rip", "rflags"]


HANDLER = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_uint64, ctypes.c_uint32, ctypes.c_uint64, ctypes.c_uint64)


class Unhandled(ModeFields):
    """A vCPU whose native handler leaves every trap to Python's."""

    def __init__(self) -> None:
        self.traps = 0  # that it was asked about
        self.address = ctypes.addressof(self)
        self.flat_selectors: set[tuple[int, int]] = set()

        def handler(_: int, vector: int, error_code: int, address: int) -> int:
            self.traps += 1
            return NOT_HANDLED

        self._handler = HANDLER(handler)
        self.native_handler = ctypes.cast(self._handler, ctypes.c_void_p).value or 0

    @property
    def timer_port(self) -> int:
        return 0

    @property
    def syscalls(self) -> int:
        return 0

    def count_syscalls(self, count: int) -> None: ...

    def count_ticks(self, count: int, length: int) -> None: ...

    def set_timer_late(self, deadline: int) -> None: ...

    def until(self, moment: int) -> int:
        return 10**9


class Hostile:
    """It has frames FIRST to FIRST + PAGES of a memory of FRAMES, at PROGRAM."""

    def __init__(self) -> None:
        self.memory = MachineMemory(FRAMES)
        self.stub = Stub(self.memory.fd)
        assert not self.stub.carry_out([map_pages(PROGRAM, PAGES, ALL_RIGHTS, FIRST)])

    def place(self, content: bytes, offset: int = 0) -> int:
        """Put bytes into its memory; where they lie."""
        start = (FIRST << 12) + offset
        self.memory.b[start : start + len(content)] = content
        return PROGRAM + offset

    def register(self, name: str) -> int:
        return self.stub.words[(self.stub.frame + stub.R8) // 8 + REGISTERS.index(name)]

    def run(
        self,
        program: str | bytes = b"",
        rip: int = PROGRAM,
        kicked: Callable[[], bool] = lambda: False,
        **registers: int,
    ) -> int:
        """Execute this code, or what is there, until a signal: its number. Raises StubDied."""
        if program:
            self.place(bytes.fromhex(program) if isinstance(program, str) else program)
        q, at = self.stub.words, (self.stub.frame + stub.R8) // 8
        for name, value in {"rip": rip, "rsp": STACK, "rflags": 0x202, **registers}.items():
            q[at + REGISTERS.index(name)] = value & (1 << 64) - 1
        q[code.FLAGS // 8] = 0x202
        return self.stub.run(kicked)

    @property
    def tasks(self) -> list[int]:
        return sorted(int(task) for task in os.listdir(f"/proc/{self.stub.pid}/task"))

    def descriptors(self, task: int) -> dict[int, str]:
        folder = Path(f"/proc/{self.stub.pid}/task/{task}/fd")
        return {int(each.name): os.readlink(each) for each in folder.iterdir()}

    def mappings(self) -> dict[int, tuple[int, str, str]]:
        """By address: end, rights, what."""
        found = {}
        for line in Path(f"/proc/{self.stub.pid}/maps").read_text().splitlines():
            match = re.match(r"(\w+)-(\w+) (\S+) \S+ \S+ \S+ *(.*)", line)
            assert match
            found[int(match[1], 16)] = (int(match[2], 16), match[3], match[4])
        return found

    def close(self) -> None:
        self.stub.close()
        self.memory.close()
