"""A hostile program in a stub: code of its choice, in memory that it may read, write and execute."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

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
        number, *_ = self.stub.run(kicked)
        return number

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
