"""struct vcpu_guest_context of a 64-bit guest: a vCPU's start-up state (public/arch-x86/xen.h)."""

from __future__ import annotations

from struct import Struct
from typing import Final, NamedTuple

from xenolith.abi.layout import TRAP_INFO

SIZE: Final = 5168

VGCF_I387_VALID: Final = 1 << 0
VGCF_in_kernel: Final = 1 << 2
VGCF_failsafe_disables_events: Final = 1 << 3
VGCF_syscall_disables_events: Final = 1 << 4
VGCF_online: Final = 1 << 5

_FPU_SIZE: Final = 512
_FLAGS: Final = Struct("<Q")
# r15 r14 r13 r12 rbp rbx r11 r10 r9 r8 rax rcx rdx rsi rdi; error_code, entry_vector; rip; cs, pad,
# saved_upcall_mask, pad; rflags; rsp; ss es ds fs gs, each u16 and padded to 8 bytes
_USER_REGS: Final = Struct("<15Q II Q HHBBH Q Q H6x H6x H6x H6x H6x")
_TRAPS: Final = 256
_REST: Final = Struct("<2Q 16QQ 2Q 8Q 8Q 4Q 3Q")


class UserRegisters(NamedTuple):
    """struct cpu_user_regs: the general registers and selectors."""

    r15: int
    r14: int
    r13: int
    r12: int
    rbp: int
    rbx: int
    r11: int
    r10: int
    r9: int
    r8: int
    rax: int
    rcx: int
    rdx: int
    rsi: int
    rdi: int
    error_code: int
    entry_vector: int
    rip: int
    cs: int
    cs_pad: int
    saved_upcall_mask: int
    mask_pad: int
    mask_pad2: int
    rflags: int
    rsp: int
    ss: int
    es: int
    ds: int
    fs: int
    gs: int


class VcpuContext(NamedTuple):
    """The structure, taken apart."""

    fpu: bytes  # FXSAVE image
    flags: int  # VGCF_*
    regs: UserRegisters
    traps: list[tuple[int, int, int, int, int]]  # TRAP_INFO, 256 of them
    ldt_base: int
    ldt_entries: int
    gdt_frames: tuple[int, ...]  # 16 MFNs
    gdt_entries: int
    kernel_ss: int
    kernel_sp: int
    ctrlreg: tuple[int, ...]  # CR0..CR7; 3: kernel base pointer, 1: user base pointer, machine addresses
    debugreg: tuple[int, ...]  # DR0..DR7
    event_callback: int
    failsafe_callback: int
    syscall_callback: int
    vm_assist: int
    fs_base: int
    gs_base_kernel: int
    gs_base_user: int


def parse(data: bytes) -> VcpuContext:
    """Take apart `SIZE` bytes."""
    offset = _FPU_SIZE
    (flags,) = _FLAGS.unpack_from(data, offset)
    offset += _FLAGS.size
    regs = UserRegisters(*_USER_REGS.unpack_from(data, offset))
    offset += _USER_REGS.size
    end = offset + _TRAPS * TRAP_INFO.size
    traps = list(TRAP_INFO.iter_unpack(data[offset:end]))
    rest = _REST.unpack_from(data, end)
    return VcpuContext(
        fpu=data[:_FPU_SIZE],
        flags=flags,
        regs=regs,
        traps=traps,
        ldt_base=rest[0],
        ldt_entries=rest[1],
        gdt_frames=rest[2:18],
        gdt_entries=rest[18],
        kernel_ss=rest[19],
        kernel_sp=rest[20],
        ctrlreg=rest[21:29],
        debugreg=rest[29:37],
        event_callback=rest[37],
        failsafe_callback=rest[38],
        syscall_callback=rest[39],
        vm_assist=rest[40],
        fs_base=rest[41],
        gs_base_kernel=rest[42],
        gs_base_user=rest[43],
    )


def pack(context: VcpuContext) -> bytes:
    """The structure as `SIZE` bytes."""
    rest = (
        context.ldt_base,
        context.ldt_entries,
        *context.gdt_frames,
        context.gdt_entries,
        context.kernel_ss,
        context.kernel_sp,
        *context.ctrlreg,
        *context.debugreg,
        context.event_callback,
        context.failsafe_callback,
        context.syscall_callback,
        context.vm_assist,
        context.fs_base,
        context.gs_base_kernel,
        context.gs_base_user,
    )
    traps = b"".join(TRAP_INFO.pack(*trap) for trap in context.traps)
    return context.fpu + _FLAGS.pack(context.flags) + _USER_REGS.pack(*context.regs) + traps + _REST.pack(*rest)


assert _FPU_SIZE + _FLAGS.size + _USER_REGS.size + _TRAPS * TRAP_INFO.size + _REST.size == SIZE
