"""How a trap finds its handler: the vCPU's native one first where there is native code (deliver.c), else Python's."""

from __future__ import annotations

import ctypes
import functools
from ctypes import c_bool, c_uint32, c_uint64
from pathlib import Path
from typing import ClassVar, Final

from xenolith.abi import layout as abi_layout
from xenolith.abi import x86
from xenolith.machine import native, page_walk
from xenolith.machine.engines import native_state, protocol, segment_loads
from xenolith.machine.engines.unicorn import layout
from xenolith.machine.engines.unicorn.user import shared
from xenolith.machine.native import Fields

SOURCE: Final = Path(__file__).with_name("deliver.c")
HALVES: Final = (page_walk.SOURCE,)


MOST_UNTOLD: Final = 8  # leaves of CPUID


class Hook(ctypes.Structure):
    """What Unicorn's hooks know of the vCPU that runs. All are addresses."""

    handler: int  # its native trap handler, see native_state.ModeFields
    vcpu: int  # 0: Python handles its traps
    interrupt: int  # Python's handler, of all traps but system calls
    system_call: int
    invalid: int
    cpuid: int
    extended: int  # what `carry_out` needs to execute XSAVE and its kin; 0: they are undefined
    carry_out: int
    wanted: (
        int  # of a byte for each frame: not 0 for L4 tables whose guest-user mode does not run here; 0: there are none
    )
    env: int
    regs: int  # the register file
    memory: int
    memory_size: int
    get_rflags: int  # functions, as in native_state.EngineCalls
    set_rflags: int
    kernels_far_transfers: int  # see segment_loads.SegmentCpu
    user_l4: int  # where there are such: the L4 table on which guest-user mode ran here last, ...
    user_since: int  # ... since when (TSC), ...
    user_ticks: int  # ... for how long on end, up to then, without translation, ...
    user_traps: int  # ... and with how many traps
    run_user: int  # guest-user mode elsewhere, in native code (user/run.c), with `user` its argument; 0: it is Python's
    user: int
    marked: int  # of a byte for each frame of which there are translated blocks
    writable: int  # of a byte for each frame that guest-user mode elsewhere may have written to
    frames: int  # so many of both; 0: it is not known
    translating: int  # of the ticks that translation has taken so far
    translated: int  # what they were at `user_since`
    untold_count: int  # of CPUID, what programs are not told of: leaf, then bits of EAX, EBX, ECX, EDX
    far_transfers: int  # since the last trap
    watch_hits: int  # the bits of DR6 for breakpoints on data that the instruction has met
    serializes: bool  # there were many in a row
    cpuid_is_pythons: bool  # whatever answers the native handler knows
    stays: bool  # guest-user mode runs here all the same, until its next trap
    distrusts: bool  # guest-user mode has run elsewhere: translated code of its may have changed
    watches: bool  # breakpoints on data are armed, and so each instruction is stepped, see watchpoints.py
    steps: bool  # then: TF was set when the instruction began
    to_user: bool  # Unicorn was stopped because guest-user mode does not run here, or because of that

    _fields_: ClassVar[Fields] = (
        ("handler", c_uint64),
        ("vcpu", c_uint64),
        ("interrupt", c_uint64),
        ("system_call", c_uint64),
        ("invalid", c_uint64),
        ("cpuid", c_uint64),
        ("extended", c_uint64),
        ("carry_out", c_uint64),
        ("wanted", c_uint64),
        ("env", c_uint64),
        ("regs", c_uint64),
        ("memory", c_uint64),
        ("memory_size", c_uint64),
        ("get_rflags", c_uint64),
        ("set_rflags", c_uint64),
        ("kernels_far_transfers", c_uint64),
        ("user_l4", c_uint64),
        ("user_since", c_uint64),
        ("user_ticks", c_uint64),
        ("user_traps", c_uint64),
        ("run_user", c_uint64),
        ("user", c_uint64),
        ("marked", c_uint64),
        ("writable", c_uint64),
        ("frames", c_uint64),
        ("translating", c_uint64),
        ("translated", c_uint64),
        ("far_transfers", c_uint64),
        ("watch_hits", c_uint64),
        ("untold", c_uint32 * 5 * MOST_UNTOLD),
        ("untold_count", c_uint32),
        ("cpuid_is_pythons", c_bool),
        ("stays", c_bool),
        ("distrusts", c_bool),
        ("watches", c_bool),
        ("steps", c_bool),
        ("to_user", c_bool),
        ("serializes", c_bool),
    )


_IN_C = {
    "handler": "int (*{})(u64 vcpu, u32 vector, u64 error_code, u64 address)",
    "interrupt": "bool (*{})(u32 vector, u64 error_code, u64 address)",
    "system_call": "bool (*{})(u32 vector, u64 error_code, u64 address)",
    "invalid": "bool (*{})(u32 vector, u64 error_code, u64 address)",
    "cpuid": "bool (*{})(u32 vector, u64 error_code, u64 address)",
    "carry_out": "bool (*{})(u64 extended)",
    "wanted": "const u8 *{}",
    "env": "u8 *{}",
    "regs": "u64 *{}",
    "memory": "const u8 *{}",
    "get_rflags": "u64 (*{})(void)",
    "set_rflags": "void (*{})(u64 value)",
    "translating": "const u64 *{}",
    "run_user": "u32 (*{})(u64 user)",
    "marked": "const u8 *{}",
    "writable": "const u8 *{}",
}
SERIALIZES: Final = 256  # far transfers without a trap in between: a kernel that uses IRET to serialize, as Linux does
READ: Final = x86.PTE_P | x86.PTE_US | x86.PTE_A


def declarations() -> str:
    """Of everything that deliver.c uses."""
    return (
        native.define(native_state, "NOT_HANDLED LOOK")
        + native.define(protocol, "TRAP_NOTHING TRAP_CPUID")
        + native.define(
            x86,
            "VECTOR_DB VECTOR_UD VECTOR_PF DR6_STEP DR6_BREAKPOINTS PAGE_SHIFT PTE_ADDRESS PTE_PSE RAX RBX RCX RDX RIP "
            "RSP CS SS OPCODE_IRET EFLAGS_TF EFLAGS_NT EFLAGS_RF EFLAGS_VM EFLAGS_DEFINED",
        )
        + native.define(abi_layout, "FLAT_RING3_CS64 FLAT_RING3_SS64")
        + native.define(segment_loads, "KEPT_FLAGS")
        + native.define(layout, "HFLAGS HF_KERNEL HF_CS64 CR3 DR6")
        + native.define(shared, "KERNEL EXCEPTION")
        + f"#define READ {READ}\n#define SERIALIZES {SERIALIZES}\n"
        + native.declare("hook", Hook, _IN_C)
    )


@functools.cache
def library() -> ctypes.PyDLL | None:
    """deliver.c; None where there is no native code."""
    try:
        return native.load(SOURCE, declarations(), HALVES)
    except native.Missing:
        return None
