"""The part of the KVM interface that the engine uses, as data, and the ioctls as plain calls.

Sources: the kernel's Documentation/virt/kvm/api.rst and the public headers linux/kvm.h and asm/kvm.h (x86).
Every offset is in bytes from the start of the structure named.  KVM_RUN goes through ctypes with fixed
argument types: fcntl.ioctl costs 1-2 us more a call.
"""

from __future__ import annotations

import ctypes
import errno
import grp
import os
from struct import Struct
from typing import Final

from xenolith.machine.engines.protocol import EngineError

# --- ioctls ----------------------------------------------------------------------------------------
KVM_GET_API_VERSION: Final = 0xAE00
KVM_CREATE_VM: Final = 0xAE01
KVM_CHECK_EXTENSION: Final = 0xAE03
KVM_GET_VCPU_MMAP_SIZE: Final = 0xAE04
KVM_GET_SUPPORTED_CPUID: Final = 0xC008AE05
KVM_CREATE_VCPU: Final = 0xAE41
KVM_SET_USER_MEMORY_REGION: Final = 0x4020AE46
KVM_SET_TSS_ADDR: Final = 0xAE47
KVM_SET_IDENTITY_MAP_ADDR: Final = 0x4008AE48
KVM_RUN: Final = 0xAE80
KVM_SET_REGS: Final = 0x4090AE82
KVM_GET_SREGS: Final = 0x8138AE83
KVM_SET_SREGS: Final = 0x4138AE84
KVM_GET_MSRS: Final = 0xC008AE88
KVM_SET_MSRS: Final = 0x4008AE89
KVM_SET_SIGNAL_MASK: Final = 0x4004AE8B
KVM_GET_LAPIC: Final = 0x8400AE8E
KVM_SET_LAPIC: Final = 0x4400AE8F
KVM_SET_CPUID2: Final = 0x4008AE90
KVM_SET_MP_STATE: Final = 0x4004AE99
KVM_GET_VCPU_EVENTS: Final = 0x8040AE9F
KVM_SET_VCPU_EVENTS: Final = 0x4040AEA0
KVM_GET_DEBUGREGS: Final = 0x8080AEA1
KVM_SET_DEBUGREGS: Final = 0x4080AEA2
KVM_SET_XSAVE: Final = 0x5000AEA5
KVM_GET_XSAVE: Final = 0x9000AEA4
KVM_ENABLE_CAP: Final = 0x4068AEA3
KVM_SET_XCRS: Final = 0x4188AEA7
KVM_SET_DEVICE_ATTR: Final = 0x4018AEE1

KVM_API_VERSION: Final = 12
KVM_CAP_NR_MEMSLOTS: Final = 10
KVM_CAP_SYNC_REGS: Final = 74
KVM_CAP_MAX_VCPUS: Final = 66
KVM_CAP_SPLIT_IRQCHIP: Final = 121
KVM_SYNC_X86_REGS: Final = 1
KVM_SYNC_X86_SREGS: Final = 2
KVM_SYNC_X86_EVENTS: Final = 4

# --- exit reasons ----------------------------------------------------------------------------------
KVM_EXIT_UNKNOWN: Final = 0
KVM_EXIT_IO: Final = 2
KVM_EXIT_DEBUG: Final = 4
KVM_EXIT_HLT: Final = 5
KVM_EXIT_MMIO: Final = 6
KVM_EXIT_SHUTDOWN: Final = 8
KVM_EXIT_FAIL_ENTRY: Final = 9
KVM_EXIT_INTR: Final = 10
KVM_EXIT_INTERNAL_ERROR: Final = 17
EXIT_NAMES: Final = {
    KVM_EXIT_UNKNOWN: "unknown",
    KVM_EXIT_IO: "I/O",
    KVM_EXIT_DEBUG: "debug",
    KVM_EXIT_HLT: "halt",
    KVM_EXIT_MMIO: "access outside of machine memory",
    KVM_EXIT_SHUTDOWN: "triple fault",
    KVM_EXIT_FAIL_ENTRY: "entry refused by the processor",
    KVM_EXIT_INTR: "interrupted",
    KVM_EXIT_INTERNAL_ERROR: "KVM internal error",
}

# --- struct kvm_run --------------------------------------------------------------------------------
RUN_IMMEDIATE_EXIT: Final = 1  # u8
RUN_EXIT_REASON: Final = 8  # u32
RUN_IO_PORT: Final = 34  # u16
RUN_DETAIL: Final = 32  # the union of exit details: 64-bit words for error messages
RUN_VALID_REGS: Final = 288  # u64: what to copy out at every exit
RUN_DIRTY_REGS: Final = 296  # u64: what to copy in at the next entry
RUN_REGS: Final = 304  # struct kvm_regs
RUN_SREGS: Final = 448  # struct kvm_sregs
RUN_EVENTS: Final = 760  # struct kvm_vcpu_events

# struct kvm_regs, 64-bit words: rax rbx rcx rdx rsi rdi rsp rbp r8..r15 rip rflags

# struct kvm_sregs
SREGS_CS: Final = 0
SREGS_DS: Final = 24
SREGS_ES: Final = 48
SREGS_FS: Final = 72
SREGS_GS: Final = 96
SREGS_SS: Final = 120
SREGS_TR: Final = 144
SREGS_LDT: Final = 168
SREGS_GDT: Final = 192
SREGS_IDT: Final = 208
SREGS_CR0: Final = 224
SREGS_CR2: Final = 232
SREGS_CR3: Final = 240
SREGS_CR4: Final = 248
SREGS_EFER: Final = 264
SREGS_APIC_BASE: Final = 272
SREGS_INTERRUPTS: Final = 280  # bitmap of vectors: one that waits for delivery
SREGS_SIZE: Final = 312
SEGMENT: Final = Struct("<QIHBBBBBBBBBx")  # base limit selector type present dpl db s l g avl unusable
DTABLE: Final = Struct("<QH6x")  # base limit

# --- other structures ------------------------------------------------------------------------------
MEMORY_REGION: Final = Struct("<IIQQQ")  # slot flags guest_phys_addr memory_size userspace_addr
MSRS_HEADER: Final = Struct("<II")  # nmsrs pad
MSR_ENTRY: Final = Struct("<IIQ")  # index reserved data
CPUID_HEADER: Final = Struct("<II")  # nent padding
CPUID_ENTRY: Final = Struct("<IIIIIII12x")  # function index flags eax ebx ecx edx
CPUID_FLAG_SIGNIFICANT_INDEX: Final = 1
SIGNAL_MASK: Final = Struct("<IQ")  # len sigset (the kernel's 64-bit set, unaligned after the length)
VCPU_EVENTS_SIZE: Final = 64
EVENTS_EXCEPTION_INJECTED: Final = 0
EVENTS_EXCEPTION_VECTOR: Final = 1
EVENTS_EXCEPTION_PENDING: Final = 3
EVENTS_INTERRUPT_INJECTED: Final = 8
DEBUGREGS: Final = Struct("<4QQQQ72x")  # db[4] dr6 dr7 flags
XCRS: Final = Struct("<II" + "IIQ" * 16 + "128x")  # nr_xcrs flags {xcr reserved value}[16]
XSAVE_SIZE: Final = 4096
DEVICE_ATTR: Final = Struct("<IIQQ")  # flags group attr addr
KVM_VCPU_TSC_CTRL: Final = 0  # a group of attributes of vCPUs; its only one:
KVM_VCPU_TSC_OFFSET: Final = 0
ENABLE_CAP: Final = Struct("<IIQ88x")  # cap flags args[0]
IRQCHIP_ROUTES: Final = 24  # of an I/O APIC that user space would have

# --- the local APIC (Intel SDM vol. 3, ch. 11): registers of struct kvm_lapic_state; KVM counts ns -------
LAPIC_SIZE: Final = 1024
LAPIC_SPURIOUS: Final = 0xF0
LAPIC_TIMER: Final = 0x320
LAPIC_INITIAL_COUNT: Final = 0x380
LAPIC_CURRENT_COUNT: Final = 0x390
LAPIC_DIVIDE: Final = 0x3E0
LAPIC_ENABLED: Final = 0x1FF
LAPIC_PERIODIC: Final = 1 << 17
LAPIC_DIVIDE_BY_1: Final = 0xB
X2APIC: Final = 3 << 10  # in IA32_APIC_BASE: enabled, and not in memory

_libc = ctypes.CDLL(None, use_errno=True)
_ioctl_pointer = ctypes.CDLL(None, use_errno=True).ioctl
_ioctl_pointer.argtypes = (ctypes.c_int, ctypes.c_ulong, ctypes.c_void_p)
_ioctl_pointer.restype = ctypes.c_int
run_ioctl = ctypes.CDLL(None, use_errno=True).ioctl  # KVM_RUN alone: drops the GIL while the guest runs
run_ioctl.argtypes = (ctypes.c_int, ctypes.c_ulong, ctypes.c_long)
run_ioctl.restype = ctypes.c_int


def ioctl(fd: int, request: int, argument: bytearray | int = 0) -> int:
    """One ioctl with an integer or a buffer (read or filled by the kernel). Raises OSError."""
    if isinstance(argument, int):
        result = _ioctl_pointer(fd, request, argument)
    else:
        buffer = (ctypes.c_char * len(argument)).from_buffer(argument)
        result = _ioctl_pointer(fd, request, ctypes.addressof(buffer))
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return int(result)


DEVICE = "/dev/kvm"


def _who_may_open(path: str) -> str:
    """Advice for somebody who may not, by the device's owner and mode."""
    status = os.stat(path)
    try:
        group = grp.getgrgid(status.st_gid).gr_name
    except KeyError:
        group = str(status.st_gid)
    if status.st_mode & 0o060 == 0o060 and status.st_gid:
        return f"it is for the group {group}: add the user to it, and log in anew"
    return f"it is for root alone (group {group}, mode {status.st_mode & 0o777:o}): change that with chgrp and chmod"


def open_device() -> int:
    """A descriptor of the KVM device. Raises EngineError with the reason it cannot be had."""
    path = DEVICE
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        advice = {
            errno.ENOENT: "this kernel has no KVM, or its module is not loaded",
            errno.ENODEV: "the KVM module does not run on this processor",
        }.get(error.errno or 0, "")
        if error.errno in (errno.EACCES, errno.EPERM):
            advice = _who_may_open(path)
        raise EngineError(f"cannot open {path}: {error.strerror}" + (f" ({advice})" if advice else "")) from error
    try:
        version = ioctl(fd, KVM_GET_API_VERSION)
    except OSError as error:
        os.close(fd)
        raise EngineError(f"{path} is not a KVM device: {error.strerror}") from error
    if version != KVM_API_VERSION:
        os.close(fd)
        raise EngineError(f"{path} speaks KVM API version {version}; version {KVM_API_VERSION} is needed")
    return fd
