"""State that native code (run.c) shares with Python, of stubs, what they have mapped, and the vCPU."""

from __future__ import annotations

import ctypes
from ctypes import c_bool, c_int32, c_uint8, c_uint32, c_uint64
from typing import ClassVar, Final

from xenolith.machine.engines.unicorn import layout
from xenolith.machine.native import Fields

EXCEPTION: Final = 2  # what a page fault on Unicorn counts, a system call being 1: in a stub a page would be mapped

# What the native loop ends with.
KERNEL: Final = 0  # guest-kernel mode goes on
LEFT: Final = 1  # a trap was handled; leave
NOTHING: Final = 2  # nothing was done, or a whole number of rounds: Python does the next
SIGNAL: Final = 3  # the stub stands at a signal, and its registers are in its frame
TRAP: Final = 4  # the registers are back, and there is this trap
DIED: Final = 5  # the stub has to be ended, or has ended

FPU_START, FPU_SIZE = layout.FPSTT, layout.XMM + 16 * layout.XMM_STRIDE - layout.FPSTT
"""What Unicorn has of x87 and SSE, and what lies in between, in bytes of CPUX86State."""

PER_WINDOW: Final = 512
"""Pages that an L1 table maps: a window of the address space."""

WINDOWS: Final = 256  # that native code finds, of a space
MOST_STUBS: Final = 16  # of a domain
FIXED: Final = 48  # bytes of a signal frame up to R8, with the signal stack
SOFTWARE_SIZE: Final = 48  # of an XSAVE image in a signal frame, what the kernel says of it


class StubFields(ctypes.Structure):
    """What native code knows of a stub: see stub.Stub."""

    mailbox: int  # address
    frame_va: int
    guest: int  # the kernel's number of the hand-over of the guest's task that is to be answered
    mapper: int  # likewise, of the mapper
    task: int  # the guest's
    pid: int  # 0: it is no more
    selectors: int  # CS and SS of a frame
    listener: int
    pidfd: int
    frame: int  # offsets in the mailbox, bytes
    xsave: int
    xsave_size: int

    _fields_: ClassVar[Fields] = (
        ("mailbox", c_uint64),
        ("frame_va", c_uint64),
        ("guest", c_uint64),
        ("mapper", c_uint64),
        ("selectors", c_uint64),
        ("arguments", c_uint64 * 6),  # of the last hand-over of the guest's task
        ("listener", c_int32),
        ("pidfd", c_int32),
        ("task", c_int32),
        ("pid", c_int32),
        ("frame", c_uint32),
        ("xsave", c_uint32),
        ("xsave_size", c_uint32),
        ("fixed", c_uint8 * FIXED),
        ("software", c_uint8 * SOFTWARE_SIZE),
    )


class SpaceFields(ctypes.Structure):
    """What native code knows of an address space in a stub: see spaces.Space."""

    l4_mfn: int
    stub: int  # address of its StubFields
    ready: bool  # what is mapped is what the tables say, but for what was reported since
    regions: int

    _fields_: ClassVar[Fields] = (
        ("l4_mfn", c_uint64),
        ("stub", c_uint64),
        ("bases", c_uint64 * WINDOWS),  # of windows, by window_slot
        ("windows", c_uint64 * WINDOWS),  # the addresses of what is mapped there, 0: there is none
        ("regions", c_uint32),
        ("ready", c_bool),
    )


class UserFields(ctypes.Structure):
    """What native code shares of a NativeUserCpu. Addresses, where nothing else is said."""

    vcpu: int  # the native_state.ModeFields whose traps native code may handle, 0: none
    handler: int
    space: int  # the one that was used last
    shown_by: int  # the StubFields whose frame holds the image, 0: none
    handled: int  # of the image's Extended, when it was last shown
    missed_l4: int  # the address space of a page fault that the guest's kernel is to resolve, 0: none
    missed_va: int
    error_code: int  # of the trap that is left
    address: int
    tsc: int  # of the signal that is left
    fs_base: int
    gs_base: int
    traps: int
    faults: int  # of pages
    vector: int
    signal: int
    reason: int  # that the stub has died of: see run.c
    running_pid: int  # where guest code may run now
    running_task: int
    left: int  # what the loop last ended with, if Python has to see
    missed_fetch: bool
    is_converted: bool  # `converted` and the image are the same state
    kicked: bool
    enabled: bool
    held: bool  # no stub may begin to run
    renewed: bool  # what stubs have mapped is to be mapped anew

    _fields_: ClassVar[Fields] = (
        ("vcpu", c_uint64),
        ("handler", c_uint64),
        ("extended", c_uint64),
        ("env", c_uint64),
        ("memory", c_uint64),
        ("memory_size", c_uint64),
        ("frames", c_uint64),
        ("get_rflags", c_uint64),
        ("set_rflags", c_uint64),
        ("stays", c_uint64),
        ("distrusts", c_uint64),
        ("reports", c_uint64),
        ("writable", c_uint64),
        ("written", c_uint64),
        ("wanted", c_uint64),
        ("regret", c_uint64),
        ("patience", c_uint64),
        ("overhead", c_uint64 * 2),  # ticks of the TSC, up to a system call and up to an exception
        ("tsc_mul", c_uint64),
        ("components", c_uint64),  # of XSAVE: those that are kept
        ("spaces", c_uint64 * MOST_STUBS),
        ("space", c_uint64),
        ("shown_by", c_uint64),
        ("handled", c_uint64),
        ("missed_l4", c_uint64),
        ("missed_va", c_uint64),
        ("error_code", c_uint64),
        ("address", c_uint64),
        ("tsc", c_uint64),
        ("fs_base", c_uint64),
        ("gs_base", c_uint64),
        ("traps", c_uint64),
        ("faults", c_uint64),
        ("vector", c_uint32),
        ("signal", c_uint32),
        ("tsc_shift", c_int32),
        ("image_size", c_uint32),
        ("reason", c_int32),
        ("running_pid", c_int32),
        ("running_task", c_int32),
        ("left", c_uint32),
        ("converted", c_uint8 * FPU_SIZE),  # what Unicorn's state was when it and the image were last the same
        ("missed_fetch", c_bool),
        ("is_converted", c_bool),
        ("kicked", c_bool),
        ("enabled", c_bool),
        ("held", c_bool),
        ("renewed", c_bool),
    )


BREAKPOINTS: Final = 0xFF  # of DR7: the processor is to stop somewhere
NULL_SELECTOR: Final = 3  # the highest selector of a null segment
