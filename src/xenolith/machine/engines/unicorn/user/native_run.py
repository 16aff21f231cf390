"""The loop of guest-user mode in stubs in native code (run.c), where there is a compiler.

Python's (cpu.py, stub.py, spaces.py, placement.py) is the reference, and goes on with whatever this leaves.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Final

from xenolith.abi import x86
from xenolith.machine import native, page_walk
from xenolith.machine.engines import native_state, protocol
from xenolith.machine.engines.adaptive import extended_native
from xenolith.machine.engines.unicorn import layout
from xenolith.machine.engines.unicorn.user import code, placement, shared, spaces, stub
from xenolith.machine.engines.unicorn.user.shared import SpaceFields, StubFields, UserFields

SOURCE: Final = Path(__file__).with_name("run.c")
HALVES: Final = (page_walk.SOURCE, extended_native.SOURCE)

_USER_IN_C: Final = {
    "vcpu": "void *{}",
    "handler": "int (*{})(void *vcpu, u32 vector, u64 error_code, u64 address)",
    "extended": "struct extended *{}",
    "env": "u8 *{}",
    "memory": "u8 *{}",
    "get_rflags": "u64 (*{})(void)",
    "set_rflags": "void (*{})(u64 value)",
    "stays": "bool *{}",
    "distrusts": "bool *{}",
    "reports": "u64 *{}",
    "writable": "u8 *{}",
    "written": "u8 *{}",
    "wanted": "u8 *{}",
    "regret": "i64 *{}",
    "patience": "i64 *{}",
    "spaces": "struct space *{}[MOST_STUBS]",
    "space": "struct space *{}",
    "shown_by": "struct stub *{}",
}
_NAMED: Final = SimpleNamespace(  # by what run.c calls them
    MAILBOX_FS_BASE=code.FS_BASE,
    MAILBOX_GS_BASE=code.GS_BASE,
    MAILBOX_FLAGS=code.FLAGS,
    FRAME_R8=stub.R8,
    FRAME_FLAGS=stub.FLAGS,
    FRAME_CS=stub.CS,
    FRAME_ERROR=stub.ERROR,
    FRAME_VECTOR=stub.VECTOR,
    FRAME_CR2=stub.CR2,
    FS_BASE=x86.FS_BASE,
    GS_BASE=x86.GS_BASE,
    CS64=stub.HOST_CS64,
    ARCH_X86_64=stub.ARCH_X86_64,
    VSYSCALL=stub.VSYSCALL,
)


def declarations() -> str:
    """Of everything that run.c uses."""
    return (
        extended_native.declarations()
        + native.define(
            x86,
            "R8 RDI RSI RBP RBX RCX RSP ES DS FS GS RFLAGS PAGE_SHIFT PTE_A PTE_RW PTE_NX EFLAGS_IF EFLAGS_NT "
            "EFLAGS_ID EFLAGS_RF EFLAGS_TF EFLAGS_RESERVED_ONE PFEC_PRESENT PFEC_WRITE PFEC_INSN PFEC_USER VECTOR_PF",
        )
        + native.define(protocol, "TRAP_SYSCALL TRAP_NOTHING")
        + native.define(native_state, "NOT_HANDLED LOOK LEAVE")
        + native.define(layout, "HF_KERNEL DR")
        + native.define(
            code,
            "MAILBOX MAILBOX_SIZE FRAME RESUMED COMMAND_SIZE COMMAND_WORDS GUEST_HANDS_OVER MAPPER_HANDS_OVER SIGSYS "
            "SIGSEGV SIGKICK USER_END AREA_SLOT SYS_MMAP MAP_SHARED_FIXED",
        )
        + native.define(
            stub,
            "SIGNAL_MASK FPSTATE SOFTWARE MAGIC_AT_END SIGNAL_CALL SIGNAL_ARCH SEND RECEIVE SYS_TGKILL POLLIN PIECE_MS "
            "ANSWER_PIECES MAPPER_PIECES",
        )
        + native.define(spaces, "READ WRITE EXECUTE MOST_REGIONS AROUND")
        + native.define(placement, "SPEED TRAP_NS MOST_NS MOST_CHARGED_NS PATIENCE LESSON MOST_PATIENCE")
        + native.define(
            shared,
            "MOST_STUBS WINDOWS PER_WINDOW FPU_START FPU_SIZE KERNEL LEFT NOTHING SIGNAL TRAP DIED BREAKPOINTS "
            "NULL_SELECTOR",
        )
        + native.define(_NAMED, " ".join(vars(_NAMED)))
        + native.declare("stub", StubFields, {"mailbox": "u8 *{}"})
        + native.declare("space", SpaceFields, {"stub": "struct stub *{}", "windows": "u64 *{}[WINDOWS]"})
        + native.declare("user", UserFields, _USER_IN_C)
    )


@functools.cache
def _library() -> ctypes.CDLL:
    return ctypes.CDLL(str(native.build(SOURCE, declarations(), HALVES)))


def loop(fields: UserFields) -> tuple[Callable[[], int], int]:
    """The loop, to be called without Python's lock, and its address. Raises native.Missing."""
    function = _library().run_user
    function.restype, function.argtypes = ctypes.c_uint32, (ctypes.c_void_p,)
    return functools.partial(function, ctypes.addressof(fields)), native.function_address(function)
