"""The KVM engine's loop in native code (run.c), where there is a compiler."""

from __future__ import annotations

import ctypes
import errno
import functools
from collections.abc import Callable
from ctypes import c_bool, c_int32, c_int64, c_uint8, c_uint32, c_uint64
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar, Final

from xenolith.abi import hypercalls, layout, x86
from xenolith.machine import native
from xenolith.machine.engines import native_state, protocol
from xenolith.machine.engines.kvm import api, area, changes, fast_path_code
from xenolith.machine.native import Fields

SOURCE: Final = Path(__file__).with_name("run.c")
# What `run` answers, besides -1 for errno.
RAN: Final = 0  # KVM_RUN returned: look why
TRAPPED: Final = 1  # with a trap, whose registers are in the register file: `vector`, `error_code`, `address`
LOOK_NOW: Final = 2  # a trap was handled; look for events
LEFT: Final = 3  # likewise; leave
AGAIN: Final = 4  # likewise; enter the guest anew


class KvmFields(ctypes.Structure):
    """What native code shares of a KvmCpu and its FastPath."""

    vcpu: int  # address of the native_state.ModeFields whose traps native code may handle, 0: none
    handler: int
    l4_mfn: int
    kernel_l4: int  # for which the fast path was set up, with those down to `masks_events`
    user_l4: int
    callback: int
    info: int
    masks_events: bool
    look: int  # when the alarm goes off
    alarm: int  # the timer, if there is one
    has_alarm: bool
    host_tick: int  # ns, see alarm.host_tick_ns
    lapic: int  # address of the local APIC's registers, as start_ticks sets them; 0: there are no ticks
    ticking: bool  # the local timer is on
    tick_length: int  # then: ns
    shared_va: int  # of shared_info, for the fast path
    syscalls: int  # as of when the alarm was last set
    quiet: int  # how often it was set since the last system call
    error_code: int  # of a trap that is Python's
    address: int
    vector: int
    handled: int  # traps handled by native code
    rewriting: int  # changes with lower numbers were rewritten when it is back from the guest; 0: nothing new
    flush: bool  # before the guest is entered
    kicked: bool
    user: bool
    flat: bool  # runs on 64-bit flat CS and SS
    on: bool  # the fast path is
    info_mapped: bool  # its code is made for `info`, which is mapped
    pair_cs: int  # selectors in guest-user mode
    pair_ss: int

    _fields_: ClassVar[Fields] = (
        ("vcpu", c_uint64),
        ("handler", c_uint64),
        ("regs", c_uint64),
        ("run", c_uint64),
        ("frame", c_uint64),
        ("list", c_uint64),
        ("list_va", c_uint64),
        ("data", c_uint64),
        ("kernel_code", c_uint64),
        ("user_code", c_uint64),
        ("memory", c_uint64),
        ("memory_size", c_uint64),
        ("changes", c_uint64),
        ("l4_mfn", c_uint64),
        ("kernel_l4", c_uint64),
        ("user_l4", c_uint64),
        ("callback", c_uint64),
        ("info", c_uint64),
        ("look", c_uint64),
        ("code_va", c_uint64),
        ("syscall_page", c_uint64),
        ("gate_rips", c_uint64 * 2),
        ("slow", c_uint64 * 2),  # offsets of the OUT in the user's and in the kernel's view
        ("landing_slow", c_uint64),
        ("iret_slow", c_uint64),
        ("slot", c_uint64),
        ("view_entries", c_uint64 * 2),
        ("selectors", c_uint64 * 4),
        ("alias", c_uint64),
        ("entries_end", c_uint64),
        ("tables_end", c_uint64),
        ("entry_size", c_uint64),
        ("table_size", c_uint64),
        ("flush_stub", c_uint64),
        ("go_stub", c_uint64),
        ("alarm", c_uint64),
        ("host_tick", c_uint64),
        ("lapic", c_uint64),
        ("tick_length", c_uint64),
        ("shared_va", c_uint64),
        ("syscalls", c_uint64),
        ("signals", c_uint8 * 128),  # a sigset_t of the kick signal
        ("error_code", c_uint64),
        ("address", c_uint64),
        ("handled", c_uint64),
        ("rewriting", c_uint64),
        ("pair_cs", c_uint32),
        ("pair_ss", c_uint32),
        ("vector", c_uint32),
        ("quiet", c_uint32),
        ("fd", c_int32),
        ("number", c_uint32),  # of the vCPU
        ("kernel_start", c_uint8 * 5 * 2),  # of its code while the fast path is off, and on
        ("user_start", c_uint8 * 2 * 2),
        ("flat_code", c_uint8 * api.SEGMENT.size),
        ("flat_stack", c_uint8 * api.SEGMENT.size),
        ("code0", c_uint8 * api.SEGMENT.size),
        ("data0", c_uint8 * api.SEGMENT.size),
        ("flush", c_bool),
        ("kicked", c_bool),
        ("user", c_bool),
        ("flat", c_bool),
        ("on", c_bool),
        ("masks_events", c_bool),
        ("shadows", c_bool),
        ("has_alarm", c_bool),
        ("ticking", c_bool),
        ("info_mapped", c_bool),
    )


_IN_C: Final = {
    "vcpu": "struct vcpu *{}",
    "handler": "int (*{})(struct vcpu *vcpu, u32 vector, u64 error_code, u64 address)",
    "regs": "u64 *{}",
    "run": "u8 *{}",
    "frame": "u64 *{}",
    "list": "u64 *{}",
    "data": "u64 *{}",
    "kernel_code": "u8 *{}",
    "user_code": "u8 *{}",
    "memory": "u8 *{}",
    "lapic": "u8 *{}",
    "changes": "struct changes *{}",
}
_CALLS: Final = ("get_rflags", "set_rflags", "switch_mode", "flush_tlb", "flush_page", "entry_changed")


def declarations() -> str:
    """Of everything that run.c uses."""
    data = SimpleNamespace(**{name.upper(): offset // 8 for name, offset in fast_path_code.FIELDS.items()})
    numbers = SimpleNamespace(
        MOST=area.EntryStubs.MOST,
        ENTRY_FLAGS=protocol.ENTRY_FLAGS,
        ALWAYS_SET=protocol.ALWAYS_SET,
        NO_SELECTOR=fast_path_code.NO_SELECTOR,
        NO_TIMER=fast_path_code.NO_TIMER,
        TIMER_SLOP=fast_path_code.TIMER_SLOP,
        TICKS=fast_path_code.TICKS,
        SEGMENT_SIZE=api.SEGMENT.size,
    )
    return "".join(
        (
            native.define(
                x86,
                "RAX RBX RCX RDX RSI RDI RSP RBP R8 R11 RIP RFLAGS CS SS FS_BASE GS_BASE EFLAGS_RESERVED_ONE VECTOR_GP "
                "VECTOR_PF VECTOR_BP VECTOR_OF PTE_P PTE_A PTE_D PTE_PSE PTE_ADDRESS OPCODE_INT3 OPCODE_INT_N",
            ),
            native.define(
                api,
                "KVM_RUN KVM_SET_LAPIC LAPIC_INITIAL_COUNT LAPIC_CURRENT_COUNT KVM_EXIT_IO "
                "KVM_SYNC_X86_REGS KVM_SYNC_X86_SREGS RUN_EXIT_REASON RUN_IO_PORT RUN_DIRTY_REGS "
                "RUN_REGS RUN_SREGS SREGS_CS SREGS_SS SREGS_DS SREGS_FS SREGS_GS SREGS_CR2 SREGS_CR3 "
                "RUN_EVENTS EVENTS_EXCEPTION_INJECTED EVENTS_EXCEPTION_PENDING EVENTS_EXCEPTION_VECTOR",
            ),
            native.define(
                area,
                "MAX_CPUS PORT_SYSCALL USER_CODE64 USER_DATA GATE_IN_RIP GATE_OUT_RIP KERNEL_CR3 USER_CR3 TICK_CR3 "
                "NO_RIP NO_CR3",
            ),
            native.define(layout, "FLAT_RING3_CS64 FLAT_RING3_SS64 SHARED_EVTCHN_PENDING"),
            native.define(changes, "KEPT MAY_NOT_LOSE MAY_NOT_GAIN"),
            native.define(
                data,
                "KERNEL_SP KERNEL_SS OTHER_GS ENTRY USER_CS USER_SS HOLD VCPU_ID TIMER_FROM TIMER USED SAVED_RCX "
                "SAVED_R11 SAVED_RSP SWITCHES TICKS_LEFT TICK_NOW TICK_LENGTH TICK_ENTRY "
                "TICK_WORD TICK_BIT TICK_SELECTOR",
            ),
            native.define(numbers, "MOST ENTRY_FLAGS ALWAYS_SET NO_SELECTOR NO_TIMER TIMER_SLOP TICKS SEGMENT_SIZE"),
            native.define(native_state, "LEAVE GO_ON NOT_HANDLED LOOK FLAT_PAIRS UNLIMITED"),
            native.define(protocol, "TRAP_SYSCALL"),
            native.define(hypercalls, "HYPERVISOR_iret VIRQ_TIMER"),
            native.define(errno, "EINTR"),
            "".join(
                f"#define {name} {value}\n"
                for name, value in (
                    ("RAN", RAN),
                    ("TRAPPED", TRAPPED),
                    ("LOOK_NOW", LOOK_NOW),
                    ("LEFT", LEFT),
                    ("AGAIN", AGAIN),
                )
            ),
            native.declare("vcpu", native_state.ModeFields, native_state.MODES_IN_C),
            native.declare("changes", changes.ChangesFields, {"tables": "u64 *{}"}),
            native.declare("kvm_cpu", KvmFields, _IN_C),
        )
    )


class Library:
    """run.c: its loop, called without Python's lock, and the functions that ring 0 calls."""

    def __init__(self) -> None:
        path = native.build(SOURCE, declarations())
        library = ctypes.CDLL(str(path), use_errno=True)
        run = library["run"]
        run.argtypes, run.restype = (c_uint64,), ctypes.c_int
        self.run: Callable[[int], int] = run
        until = library["until_host_tick"]
        until.argtypes, until.restype = (c_uint64, c_int64, c_uint64), c_int64
        self.until_host_tick: Callable[[int, int, int], int] = until
        self.calls = {name: native.function_address(library[name]) for name in _CALLS}


@functools.cache
def library() -> Library | None:
    """None where there is no native code."""
    try:
        return Library()
    except native.Missing:
        return None
