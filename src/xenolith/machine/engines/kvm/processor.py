"""The state of a virtual processor that is not in its kvm_run page: set up once, or moved by ioctls."""

from __future__ import annotations

from contextlib import suppress
from struct import pack_into, unpack_from
from typing import TYPE_CHECKING, Final

from xenolith.abi.layout import HYPERVISOR_VIRT_END, HYPERVISOR_VIRT_START
from xenolith.abi.x86 import (
    CR4_FSGSBASE,
    CR4_OSFXSR,
    CR4_OSXMMEXCPT,
    CR4_OSXSAVE,
    CR4_PAE,
    CR4_SMAP,
    CR4_SMEP,
    DR6_ONES,
    EFER_LMA,
    EFER_LME,
    EFER_NX,
    EFER_SCE,
    EFLAGS_AC,
    EFLAGS_DF,
    EFLAGS_IF,
    EFLAGS_IOPL,
    EFLAGS_NT,
    EFLAGS_TF,
    MSR_STAR,
    MSR_TSC,
    XSAVE_EXTENDED,
    XSAVE_HEADER,
    XSAVE_MXCSR,
    XSAVE_MXCSR_MASK,
    is_canonical,
    is_legal_xcr0,
)
from xenolith.machine.engines.kvm import api, area
from xenolith.machine.engines.kvm.api import ioctl
from xenolith.machine.engines.kvm.segment_registers import FLAT_CODE, FLAT_STACK, NULL_IMAGE
from xenolith.machine.engines.kvm.traits import Counter
from xenolith.machine.engines.protocol import CpuState, EngineError
from xenolith.machine.native import buffer_address
from xenolith.machine.tsc import read_tsc

if TYPE_CHECKING:
    from xenolith.machine.engines.kvm.vm import VirtualMachine

CR0: Final = 0x8005_0033  # PG AM WP NE ET MP PE
_EFER: Final = EFER_SCE | EFER_LME | EFER_LMA | EFER_NX
_MSR_LSTAR: Final = 0xC000_0082
_MSR_CSTAR: Final = 0xC000_0083
_MSR_SFMASK: Final = 0xC000_0084
_OLD_MXCSR_MASK: Final = 0xFFBF
_HEADER: Final = slice(XSAVE_HEADER + 8, XSAVE_EXTENDED)  # behind that: which format, and what must be 0
_READINGS: Final = 16
_LOW_HALF: Final = 0xFFFF_FFFF  # all that DR6 and DR7 have
_DR7_GD: Final = 1 << 13
_DR7_INITIAL: Final = 0x400
_SEGMENTS: Final = (api.SREGS_CS, api.SREGS_DS, api.SREGS_ES, api.SREGS_FS, api.SREGS_GS, api.SREGS_SS)


def set_up(fd: int, vm: VirtualMachine, tss_va: int, syscall_page: int, fast_path: bool) -> bytearray:
    """Bring a new virtual processor into long mode, on the hypervisor area: its system registers (struct kvm_sregs)."""
    ioctl(fd, api.KVM_SET_CPUID2, vm.cpuid_table())
    cr4 = CR4_PAE | CR4_OSFXSR | CR4_OSXMMEXCPT
    if vm.kvm_xsave:
        cr4 |= CR4_OSXSAVE
    sregs = bytearray(api.SREGS_SIZE)
    ioctl(fd, api.KVM_GET_SREGS, sregs)
    for offset in _SEGMENTS:
        sregs[offset : offset + api.SEGMENT.size] = NULL_IMAGE
    pack = api.SEGMENT.pack_into
    pack(sregs, api.SREGS_CS, *api.SEGMENT.unpack(FLAT_CODE))
    pack(sregs, api.SREGS_SS, *api.SEGMENT.unpack(FLAT_STACK))
    pack(sregs, api.SREGS_TR, tss_va, area.TSS_LIMIT, area.TSS_SELECTOR, 0xB, 1, 0, 0, 0, 0, 0, 0, 0)
    pack(sregs, api.SREGS_LDT, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 1)
    api.DTABLE.pack_into(sregs, api.SREGS_GDT, area.GDT, area.GDT_LIMIT)
    api.DTABLE.pack_into(sregs, api.SREGS_IDT, area.IDT, area.IDT_LIMIT)
    for offset, value in (
        (api.SREGS_CR0, CR0),
        (api.SREGS_CR3, 0),
        (api.SREGS_CR4, cr4),
        (api.SREGS_EFER, _EFER),
    ):
        pack_into("<Q", sregs, offset, value)
    if vm.has_ticks:  # guests must not find the local APIC in memory, whatever frames they have
        (base,) = unpack_from("<Q", sregs, api.SREGS_APIC_BASE)
        pack_into("<Q", sregs, api.SREGS_APIC_BASE, base | api.X2APIC)
    try:
        ioctl(fd, api.KVM_SET_SREGS, sregs)
    except OSError as error:
        raise EngineError(f"KVM refuses the processor state of a 64-bit guest: {error.strerror}") from error
    # The gates of the fast path read the guest kernel's data at CPL 0, which SMAP forbids.
    smap = (CR4_SMAP,) if vm.traits.smap and not fast_path else ()
    for bit in (CR4_FSGSBASE, CR4_SMEP, *smap):
        pack_into("<Q", sregs, api.SREGS_CR4, cr4 | bit)
        with suppress(OSError):
            ioctl(fd, api.KVM_SET_SREGS, sregs)
            cr4 |= bit
    pack_into("<Q", sregs, api.SREGS_CR4, cr4)
    # STAR: SYSCALL loads CS and SS from bits 47..32; SYSRET is never executed.
    flags_cleared = EFLAGS_TF | EFLAGS_DF | EFLAGS_IOPL | EFLAGS_NT | EFLAGS_AC
    if not fast_path:  # which is at CPL 3 and cannot set it again: the local timer would stay silent
        flags_cleared |= EFLAGS_IF
    entries = (
        (MSR_STAR, area.CODE0 << 32 | area.USER_CODE32 << 48),
        (_MSR_LSTAR, syscall_page),
        (_MSR_CSTAR, area.SYSCALL32_STUB),
        (_MSR_SFMASK, flags_cleared),
    )
    table = api.MSRS_HEADER.pack(len(entries), 0)
    table += b"".join(api.MSR_ENTRY.pack(index, 0, value) for index, value in entries)
    if ioctl(fd, api.KVM_SET_MSRS, bytearray(table)) != len(entries):
        raise EngineError("KVM refuses the system-call registers of a 64-bit guest")
    return sregs


def set_counter(fd: int, how: Counter) -> int:
    """Make a new virtual processor's time stamp counter the host's: by how much it is ahead, at least.

    KVM begins each at 0.  Raises EngineError where the host cannot do that in this way.
    """
    if how is Counter.NATIVE:
        return 0
    if how is Counter.OFFSET:
        offset = bytearray(8)
        where = api.KVM_VCPU_TSC_CTRL, api.KVM_VCPU_TSC_OFFSET
        attribute = api.DEVICE_ATTR.pack(0, *where, buffer_address(offset))
        try:
            ioctl(fd, api.KVM_SET_DEVICE_ATTR, bytearray(attribute))
        except OSError as error:
            raise EngineError(f"KVM cannot set the offset of a time stamp counter: {error.strerror}") from error
        return 0
    message = api.MSRS_HEADER.pack(1, 0)
    ioctl(fd, api.KVM_SET_MSRS, bytearray(message + api.MSR_ENTRY.pack(MSR_TSC, 0, read_tsc())))
    least, most = -(1 << 63), 1 << 63
    for _ in range(_READINGS):
        reading = bytearray(message + api.MSR_ENTRY.pack(MSR_TSC, 0, 0))
        before = read_tsc()
        ioctl(fd, api.KVM_GET_MSRS, reading)
        after = read_tsc()
        counter = api.MSR_ENTRY.unpack_from(reading, api.MSRS_HEADER.size)[2]
        least, most = max(least, counter - after), min(most, counter - before)
    return 0 if least <= 0 <= most else least


def clear_events(fd: int, *offsets: int) -> None:
    """Clear these bytes of struct kvm_vcpu_events."""
    events = bytearray(api.VCPU_EVENTS_SIZE)
    ioctl(fd, api.KVM_GET_VCPU_EVENTS, events)
    for offset in offsets:
        events[offset] = 0
    ioctl(fd, api.KVM_SET_VCPU_EVENTS, events)


def forget_vector(fd: int) -> None:
    """Clear KVM's memory of the last exception's number."""
    clear_events(fd, api.EVENTS_EXCEPTION_VECTOR)


def forget_exception(fd: int) -> None:
    """Take back an exception that KVM holds queued."""
    clear_events(fd, api.EVENTS_EXCEPTION_INJECTED, api.EVENTS_EXCEPTION_PENDING, api.EVENTS_EXCEPTION_VECTOR)


class DebugRegisters:
    """DR0 to DR7, as ring 0 set them."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._values = [0] * 8

    def load(self, values: list[int]) -> None:
        self._values = list(values)
        self._write()

    def set(self, number: int, value: int) -> None:
        self._values[number] = value
        self._write()

    def read_status(self) -> int:
        """DR6 as the processor left it."""
        registers = bytearray(api.DEBUGREGS.size)
        ioctl(self._fd, api.KVM_GET_DEBUGREGS, registers)
        self._values[6] = int(api.DEBUGREGS.unpack(registers)[4])
        return self._values[6]

    def stored(self) -> list[int]:
        """All of them."""
        self.read_status()
        return list(self._values)

    def _write(self) -> None:
        *addresses, _, _, dr6, dr7 = self._values
        addresses = [address if _may_watch(address) else 0 for address in addresses]
        dr6, dr7 = dr6 & _LOW_HALF or DR6_ONES, dr7 & _LOW_HALF & ~_DR7_GD or _DR7_INITIAL
        registers = api.DEBUGREGS.pack(*addresses, dr6, dr7, 0)
        try:
            ioctl(self._fd, api.KVM_SET_DEBUGREGS, bytearray(registers))
        except OSError as error:
            raise EngineError(f"KVM refuses the vCPU's debug registers: {error.strerror}") from error


def _may_watch(address: int) -> bool:
    """Whether a breakpoint may be there: neither where there is nothing, nor in Xen's part of the address space."""
    return is_canonical(address) and not HYPERVISOR_VIRT_START <= address < HYPERVISOR_VIRT_END


class ExtendedState:
    """x87, SSE and what else the host has, in the standard format of XSAVE, and XCR0."""

    def __init__(self, fd: int, vm: VirtualMachine) -> None:
        self._fd = fd
        self._vm = vm
        self.xcr0 = 1
        (mask,) = unpack_from("<I", self.image(), XSAVE_MXCSR_MASK)
        self._mxcsr_mask = mask or _OLD_MXCSR_MASK

    def image(self) -> bytearray:
        image = bytearray(api.XSAVE_SIZE)
        ioctl(self._fd, api.KVM_GET_XSAVE, image)
        return image[: self._vm.xsave_size]

    def load(self, state: CpuState) -> None:
        image = bytearray(api.XSAVE_SIZE)
        image[: len(state.xsave)] = state.xsave
        (components,) = unpack_from("<Q", image, XSAVE_HEADER)
        unknown = components & ~self._vm.xcr0_mask
        if unknown:
            raise EngineError(f"the vCPU has extended state that this host lacks (XSAVE components {unknown:#x})")
        # What comes from elsewhere need not be what a processor would have let a guest load: KVM would refuse it.
        (mxcsr,) = unpack_from("<I", image, XSAVE_MXCSR)
        pack_into("<I", image, XSAVE_MXCSR, mxcsr & self._mxcsr_mask)
        image[_HEADER] = bytes(_HEADER.stop - _HEADER.start)
        try:
            ioctl(self._fd, api.KVM_SET_XSAVE, image)
        except OSError as error:
            raise EngineError(f"KVM refuses the vCPU's extended state: {error.strerror}") from error
        self.set_xcr0(state.xcr0)

    def set_xcr0(self, value: int) -> None:
        if not is_legal_xcr0(value) or value & ~self._vm.xcr0_mask:
            raise EngineError(f"the vCPU's XCR0, {value:#x}, is none that this host can have")
        self.xcr0 = value
        if self._vm.traits.xcr0_settable and not self.try_xcr0(value):
            raise EngineError(f"KVM refuses XCR0 = {value:#x}")

    def try_xcr0(self, value: int) -> bool:
        """Whether KVM takes this XCR0."""
        try:
            ioctl(self._fd, api.KVM_SET_XCRS, bytearray(api.XCRS.pack(1, 0, 0, 0, value, *(0,) * 45)))
        except OSError:
            return False
        return True
