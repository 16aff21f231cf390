"""Whether guests' user mode can run in stub processes on this host: found out by doing it, once a process."""

from __future__ import annotations

import ctypes
import functools
import os
from contextlib import suppress
from typing import Final

from xenolith.abi.x86 import EFLAGS_IF, EFLAGS_RESERVED_ONE, PAGE_SHIFT
from xenolith.machine.cpuid import native_cpuid
from xenolith.machine.engines.protocol import EngineError
from xenolith.machine.engines.unicorn.user import code, stub
from xenolith.machine.engines.unicorn.user.stub import Stub, StubDied
from xenolith.machine.memory import MachineMemory

SETTING: Final = "XENOLITH_NATIVE_USER"
OFF, ON, FORCE = "off", "on", "force"
KNOWN_COMPONENTS: Final = 0xE7  # of XSAVE: x87, SSE, AVX, and the three of AVX-512

_AT_HWCAP2: Final = 26
_HWCAP2_FSGSBASE: Final = 1 << 1
_VA: Final = 0x40_0000
_SYSCALL: Final = bytes.fromhex("48 c7 c0 ff ff ff ff 0f 05")  # mov rax, -1; syscall
_PROBE: Final = _SYSCALL + bytes.fromhex("0f 0b")  # ud2
_FLAGS: Final = EFLAGS_IF | EFLAGS_RESERVED_ONE
_EXECUTABLE: Final = 5
_ROUNDS: Final = 20


def setting() -> str:
    """What the environment says: OFF, ON or FORCE. Raises EngineError for anything else."""
    value = os.environ.get(SETTING, OFF)
    if value not in (OFF, ON, FORCE):
        raise EngineError(f"{SETTING}={value}: it may be {OFF}, {ON} or {FORCE}")
    return value


def missing() -> str | None:
    """Why stubs cannot be used on this host; None: they can."""
    return _found()[0]


def overhead() -> tuple[int, int]:
    """What of a stub's time from its going on to its next trap is the kernel's, in ticks of the TSC.

    Up to a system call, and up to an exception.
    """
    return _found()[1]


@functools.cache
def _found() -> tuple[str | None, tuple[int, int]]:
    try:
        return None, _probe()
    except (EngineError, StubDied) as error:
        return str(error), (0, 0)


@functools.cache
def components() -> int:
    """XCR0 of programs of this host, as far as guests get it."""
    eax, _, _, edx = native_cpuid(0xD, 0)
    return (edx << 32 | eax) & KNOWN_COMPONENTS


def _probe() -> tuple[int, int]:
    libc = ctypes.CDLL(None)
    libc.getauxval.argtypes, libc.getauxval.restype = (ctypes.c_ulong,), ctypes.c_ulong
    if not libc.getauxval(_AT_HWCAP2) & _HWCAP2_FSGSBASE:
        raise EngineError("programs cannot set their FS and GS bases here (FSGSBASE; Linux 5.9)")
    memory = MachineMemory(2)
    try:
        memory.b[1 << PAGE_SHIFT : (1 << PAGE_SHIFT) + len(_PROBE)] = _PROBE
        made = Stub(memory.fd)
        try:
            return _execute(made)
        finally:
            made.close()
    finally:
        with suppress(OSError):
            memory.close()


def _execute(made: Stub) -> tuple[int, int]:
    """Have a program make system calls, and exceptions; how long the shortest took, ticks."""
    error = made.carry_out([stub.map_pages(_VA, 1, _EXECUTABLE, 1)])
    if error:
        raise EngineError(f"a domain's memory cannot be mapped executable: {os.strerror(error)}")
    after = _VA + len(_SYSCALL)
    return _shortest(made, _VA, code.SIGSYS, after), _shortest(made, after, code.SIGILL, after)


def _shortest(made: Stub, start: int, signal: int, end: int) -> int:
    """The code at `start` has to end at `end` with this signal."""
    q, frame = made.words, made.frame // 8
    shortest = 1 << 62
    for _ in range(_ROUNDS):
        q[frame + stub.RIP // 8] = start
        q[code.FLAGS // 8] = q[frame + stub.FLAGS // 8] = _FLAGS
        number = made.run(lambda: False)
        rip = q[frame + stub.RIP // 8]
        if (number, rip) != (signal, end):
            raise EngineError(f"code in a stub process ends as signal {number} at {rip:#x}, not {signal} at {end:#x}")
        shortest = min(shortest, made.stopped - q[code.RESUMED // 8])
    return shortest
