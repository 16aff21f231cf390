"""State that native code shares with Python: what an engine knows of a vCPU, and what ring 0 calls of an engine.

Both are plain C structures (see machine.native), of which Python reads and writes the fields as attributes.
"""

from __future__ import annotations

import ctypes
from ctypes import c_bool, c_uint32, c_uint64
from typing import ClassVar, Final

from xenolith.abi.hypercalls import NR_VIRQS
from xenolith.machine.native import Fields

FLAT_PAIRS: Final = 8
UNLIMITED: Final = (1 << 64) - 1

# What the native trap handler of a vCPU answers, see ModeFields.native_handler.
LEAVE: Final = 0  # handled: leave the guest
GO_ON: Final = 1  # handled: go on in the guest
NOT_HANDLED: Final = 2  # nothing was changed: it is Python's
LOOK: Final = 3  # handled, but Python is to look for events: a TRAP_NOTHING


class ModeFields(ctypes.Structure):
    """A vCPU, as far as an engine may know it: see protocol.ModeSwitchState."""

    kernel_l4: int  # MFN; 0: none
    user_l4: int  # MFN; 0: none
    kernel_sp: int
    kernel_ss: int
    other_gs_base: int  # of the mode it is not in: swapped on every mode switch
    syscall_callback: int
    event_callback: int
    shared_info: int  # machine address, bytes
    info: int  # machine address of its vcpu_info, bytes
    timer_look: int  # until then (ns since boot) an engine may keep a singleshot timer of that time to itself; 0: none
    timer_deadline: int  # of the singleshot timer, as it was last set, ns since boot
    timer_interval: int  # from the one before, modulo 2**64
    virq_port: ctypes.Array[c_uint32]  # by VIRQ_*: its event channel, 0: not bound
    untrapped_syscalls: int  # system calls of its programs that were carried out without a trap
    untrapped_ticks: int  # likewise, events of the singleshot timer
    vcpu_id: int
    kernel_mode: bool
    compatibility: bool  # runs on CS/SS that are not 64-bit flat
    syscall_masks_events: bool
    nmi_masked: bool
    architectural_iopl: bool  # frames show the I/O privilege level, and iret loads it: no engine does that
    fifo: bool  # its domain uses the FIFO event ABI: ticks without an exit are for the other
    may_run: bool  # False makes it leave the engine at the next trap boundary
    native_handler: int
    """Address of `int handler(struct vcpu *, u32 vector, u64 error_code, u64 address)`, 0: none.

    To be called in place of the Python handler, on the same thread, with or without Python's lock, in the same state
    but for RIP, which is still at the instruction for TRAP_CPUID. It answers LEAVE, GO_ON, NOT_HANDLED or LOOK.
    """
    native_timer: int
    """Address of `int timer(struct vcpu *, u64 deadline)`, 0: none: the guest's singleshot timer of that time is due.

    It answers as the trap handler does.
    """
    now: int  # address of `u64 now(void)`: ns since boot; 0: none
    native_budget: int  # traps that it may still handle; then they are Python's, until there is a new one
    new_space: bool  # the guest has pinned an L4 table; who gives budgets clears it, and until then traps are Python's

    _fields_: ClassVar[Fields] = (
        ("kernel_l4", c_uint64),
        ("user_l4", c_uint64),
        ("kernel_sp", c_uint64),
        ("kernel_ss", c_uint64),
        ("other_gs_base", c_uint64),
        ("syscall_callback", c_uint64),
        ("event_callback", c_uint64),
        ("shared_info", c_uint64),
        ("info", c_uint64),
        ("timer_look", c_uint64),
        ("timer_deadline", c_uint64),
        ("timer_interval", c_uint64),
        ("untrapped_syscalls", c_uint64),
        ("untrapped_ticks", c_uint64),
        ("native_handler", c_uint64),
        ("native_timer", c_uint64),
        ("native_budget", c_uint64),
        ("now", c_uint64),
        ("flat_pairs", c_uint32 * FLAT_PAIRS),  # cs << 16 | ss of selectors known to be 64-bit flat, 0: none
        ("vcpu_id", c_uint32),
        ("virq_port", c_uint32 * NR_VIRQS),
        ("kernel_mode", c_bool),
        ("compatibility", c_bool),
        ("syscall_masks_events", c_bool),
        ("nmi_masked", c_bool),
        ("architectural_iopl", c_bool),
        ("fifo", c_bool),
        ("may_run", c_bool),
        ("new_space", c_bool),
    )


MODES_IN_C: Final = {"now": "u64 (*{})(void)", "native_timer": "int (*{})(struct vcpu *vcpu, u64 deadline)"}


class EngineCalls(ctypes.Structure):
    """What native ring-0 code calls of a Cpu: addresses of functions as in protocol.Cpu, each with `context` last.

    `executable_mapped` and `entry_changed` are 0 where the engine does not want to know.
    """

    regs: int
    context: int
    entry_changed: int

    _fields_: ClassVar[Fields] = (
        ("regs", c_uint64),  # address of the register file
        ("context", c_uint64),
        ("get_rflags", c_uint64),
        ("set_rflags", c_uint64),
        ("switch_mode", c_uint64),
        ("flush_tlb", c_uint64),
        ("flush_page", c_uint64),
        ("executable_mapped", c_uint64),
        ("entry_changed", c_uint64),
    )


CALLS_IN_C: Final = {  # see native.declare
    "regs": "u64 *{}",
    "context": "void *{}",
    "get_rflags": "u64 (*{})(void *context)",
    "set_rflags": "void (*{})(u64 value, void *context)",
    "switch_mode": "void (*{})(u64 l4_mfn, bool user, void *context)",
    "flush_tlb": "void (*{})(void *context)",
    "flush_page": "void (*{})(u64 va, void *context)",
    "executable_mapped": "void (*{})(u64 mfn, void *context)",
    "entry_changed": "void (*{})(u64 index, u64 old, u64 new_, void *context)",
}
