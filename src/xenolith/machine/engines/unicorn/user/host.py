"""Whether guests' user mode can run in stub processes on this host: found out by doing it, once a process."""

from __future__ import annotations

import ctypes
import functools
import os
from contextlib import suppress
from typing import Final

from xenolith.abi.x86 import PAGE_SHIFT
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
_PROBE: Final = bytes.fromhex("48 c7 c0 ff ff ff ff 0f 05")  # mov rax, -1; syscall
_EXECUTABLE: Final = 5


def setting() -> str:
    """What the environment says: OFF, ON or FORCE. Raises EngineError for anything else."""
    value = os.environ.get(SETTING, OFF)
    if value not in (OFF, ON, FORCE):
        raise EngineError(f"{SETTING}={value}: it may be {OFF}, {ON} or {FORCE}")
    return value


@functools.cache
def missing() -> str | None:
    """Why stubs cannot be used on this host; None: they can."""
    try:
        _probe()
    except (EngineError, StubDied) as error:
        return str(error)
    return None


@functools.cache
def components() -> int:
    """XCR0 of programs of this host, as far as guests get it."""
    eax, _, _, edx = native_cpuid(0xD, 0)
    return (edx << 32 | eax) & KNOWN_COMPONENTS


def _probe() -> None:
    libc = ctypes.CDLL(None)
    libc.getauxval.argtypes, libc.getauxval.restype = (ctypes.c_ulong,), ctypes.c_ulong
    if not libc.getauxval(_AT_HWCAP2) & _HWCAP2_FSGSBASE:
        raise EngineError("programs cannot set their FS and GS bases here (FSGSBASE; Linux 5.9)")
    memory = MachineMemory(2)
    try:
        memory.b[1 << PAGE_SHIFT : (1 << PAGE_SHIFT) + len(_PROBE)] = _PROBE
        made = Stub(memory.fd)
        try:
            _execute(made)
        finally:
            made.close()
    finally:
        with suppress(OSError):
            memory.close()


def _execute(made: Stub) -> None:
    error = made.carry_out([stub.map_pages(_VA, 1, _EXECUTABLE, 1)])
    if error:
        raise EngineError(f"a domain's memory cannot be mapped executable: {os.strerror(error)}")
    q, frame = made.words, made.frame // 8
    q[frame + stub.RIP // 8] = _VA
    q[code.FLAGS // 8] = q[frame + stub.FLAGS // 8] = 0x202
    number, *_ = made.run(lambda: False)
    rip = q[frame + stub.RIP // 8]
    if number != code.SIGSYS or rip != _VA + len(_PROBE):
        raise EngineError(f"a system call in a stub process ends as signal {number} at {rip:#x}")
