"""Bounce frames: how a guest kernel is entered, and how its own faults reach it (Xen: create_bounce_frame, traps.c).

An event, an exception or a system call *bounces* to the handler that the guest kernel has registered for it.  The frame
on its stack holds, low to high: rcx, r11, [error code], rip, cs with the saved upcall mask in its upper half, rflags,
rsp, ss (public/arch-x86/xen-x86_64.h).
"""

from __future__ import annotations

from struct import Struct
from typing import TYPE_CHECKING, Final

from xenolith.abi import layout
from xenolith.abi.x86 import (
    CS,
    EFLAGS_AC,
    EFLAGS_DF,
    EFLAGS_IF,
    EFLAGS_IOPL,
    EFLAGS_NT,
    EFLAGS_RF,
    EFLAGS_TF,
    EFLAGS_VM,
    EXCEPTION_NAMES,
    GS_BASE,
    MASK64,
    PFEC_INSN,
    PFEC_PRESENT,
    PFEC_USER,
    PFEC_WRITE,
    R11,
    RCX,
    RIP,
    RSP,
    SS,
    VECTOR_PF,
    VECTOR_UD,
    advanced,
)
from xenolith.hypervisor.guest_memory import WRITE, copy_to_guest, translate
from xenolith.hypervisor.shutdown import domain_crash
from xenolith.machine.engines.protocol import ALWAYS_SET

if TYPE_CHECKING:
    from xenolith.hypervisor.domain import Vcpu
    from xenolith.machine.engines.protocol import Cpu

GUEST_CS: Final = layout.FLAT_RING3_CS64
GUEST_SS: Final = layout.FLAT_RING3_SS64
# RFLAGS at an entry of the guest kernel, and by a system call: bits that are kept, bits that are set.
KERNEL_ENTRY_FLAGS: Final = ~(EFLAGS_AC | EFLAGS_VM | EFLAGS_RF | EFLAGS_NT | EFLAGS_TF | EFLAGS_IOPL) & MASK64
SYSCALL_FLAGS: Final = KERNEL_ENTRY_FLAGS & ~EFLAGS_DF
SAVED_FLAGS: Final = ~(EFLAGS_IF | EFLAGS_IOPL) & MASK64
_pack_frame = Struct("<7Q").pack_into
_frame = Struct("<7Q").pack
_frame_with_error = Struct("<8Q").pack
_failsafe_frame = Struct("<11Q").pack


def enter_kernel_mode(vcpu: Vcpu, cpu: Cpu) -> None:
    """Guest-user to guest-kernel mode: page table, GS base (Xen: toggle_guest_mode)."""
    regs = cpu.regs
    vcpu.kernel_mode = True
    regs[GS_BASE], vcpu.other_gs_base = vcpu.other_gs_base, regs[GS_BASE]
    cpu.switch_mode(vcpu.kernel_l4, False)


def enter_user_mode(vcpu: Vcpu, cpu: Cpu) -> None:
    """Guest-kernel to guest-user mode. The vCPU has a user page table."""
    regs = cpu.regs
    vcpu.kernel_mode = False
    regs[GS_BASE], vcpu.other_gs_base = vcpu.other_gs_base, regs[GS_BASE]
    cpu.switch_mode(vcpu.user_l4, True)


def saved_flags(vcpu: Vcpu, rflags: int) -> int:
    """RFLAGS as a frame shows them: IF tells of upcalls, IOPL of the virtual level if the domain wants to see that."""
    shown = vcpu.iopl * EFLAGS_IOPL // 3 if vcpu.architectural_iopl else 0
    return rflags & SAVED_FLAGS | shown | (0 if vcpu.domain.memory.b[vcpu.info + 1] else EFLAGS_IF)


def bounce(vcpu: Vcpu, cpu: Cpu, handler: int, error_code: int | None, mask_events: bool) -> None:
    """Build a bounce frame on the guest-kernel stack and go on at `handler` (Xen: create_bounce_frame)."""
    regs = cpu.regs
    memory = vcpu.domain.memory.b
    info = vcpu.info
    rflags = cpu.get_rflags()
    upcall_mask = memory[info + 1]
    saved_rflags = saved_flags(vcpu, rflags)
    rsp = regs[RSP]
    if vcpu.kernel_mode:
        stack = rsp & ~15
        selector = regs[CS] & 0xFFFC
    else:
        stack = vcpu.kernel_sp & ~15
        selector = regs[CS] & 0xFFFF | 3
        enter_kernel_mode(vcpu, cpu)
    selector |= upcall_mask << 32
    if error_code is None:
        size = 56
        frame = _frame(regs[RCX], regs[R11], regs[RIP], selector, saved_rflags, rsp, regs[SS] & 0xFFFF)
    else:
        size = 64
        frame = _frame_with_error(
            regs[RCX], regs[R11], error_code, regs[RIP], selector, saved_rflags, rsp, regs[SS] & 0xFFFF
        )
    stack -= size
    _finish_bounce(vcpu, cpu, handler, stack, frame, rflags, mask_events)


def bounce_failsafe(vcpu: Vcpu, cpu: Cpu, selectors: tuple[int, int, int, int]) -> None:
    """A vCPU is put on a Cpu with a data segment that cannot be loaded: tell its failsafe callback.

    `selectors` are DS, ES, FS and GS as they should be.
    """
    if not vcpu.failsafe_callback:
        crash(vcpu, "a data segment could not be loaded and no failsafe callback is registered")
        return
    regs = cpu.regs
    upcall_mask = vcpu.domain.memory.b[vcpu.info + 1]
    rflags, rsp, selector = cpu.get_rflags(), regs[RSP], regs[CS] & 0xFFFF | 3
    if vcpu.kernel_mode:
        stack = rsp & ~15
        selector &= 0xFFFC
    else:
        stack = vcpu.kernel_sp & ~15
        enter_kernel_mode(vcpu, cpu)
    saved_rflags = saved_flags(vcpu, rflags)
    frame = _failsafe_frame(
        regs[RCX], regs[R11], *selectors, regs[RIP], selector | upcall_mask << 32, saved_rflags, rsp, regs[SS] & 0xFFFF
    )
    _finish_bounce(vcpu, cpu, vcpu.failsafe_callback, stack - 88, frame, rflags, vcpu.failsafe_masks_events)


def _finish_bounce(
    vcpu: Vcpu, cpu: Cpu, handler: int, stack: int, frame: bytes, rflags: int, mask_events: bool
) -> None:
    regs = cpu.regs
    stack &= MASK64
    if stack & 0xFFF <= 0xFA0 and (address := translate(vcpu, stack, WRITE)) >= 0:
        vcpu.domain.memory.b[address : address + len(frame)] = frame
    elif not copy_to_guest(vcpu, stack, frame):
        crash(vcpu, f"fault while building a bounce frame at stack {stack:#x} for handler {handler:#x}")
        return
    if vcpu.compatibility:
        leave_compatibility_mode(vcpu, cpu)
    regs[CS] = GUEST_CS
    regs[SS] = GUEST_SS
    regs[RSP] = stack
    regs[RIP] = handler
    cpu.set_rflags(rflags & KERNEL_ENTRY_FLAGS | ALWAYS_SET)
    if mask_events:
        vcpu.domain.memory.b[vcpu.info + 1] = 1


def bounce_syscall(vcpu: Vcpu, cpu: Cpu) -> None:
    """A system call from guest-user mode (Xen: lstar_enter). RIP is after the instruction."""
    regs = cpu.regs
    compatibility = vcpu.compatibility
    handler = vcpu.syscall32_callback if compatibility else vcpu.syscall_callback
    if not handler:
        regs[RIP] = advanced(regs[RIP], -2)
        inject(vcpu, cpu, VECTOR_UD, None)
        return
    rflags = cpu.get_rflags()
    info = vcpu.info
    memory = vcpu.domain.memory.b
    upcall_mask = memory[info + 1]
    rip, rsp = regs[RIP], regs[RSP]
    regs[RCX] = rip
    regs[R11] = rflags
    vcpu.kernel_mode = True
    regs[GS_BASE], vcpu.other_gs_base = vcpu.other_gs_base, regs[GS_BASE]
    cpu.switch_mode(vcpu.kernel_l4, False)
    stack = advanced(vcpu.kernel_sp & ~15, -56)
    saved = saved_flags(vcpu, rflags)
    if stack & 0xFFF <= 0xFC8 and (address := translate(vcpu, stack, WRITE)) >= 0:
        _pack_frame(memory, address, rip, rflags, rip, GUEST_CS | upcall_mask << 32, saved, rsp, GUEST_SS)
    else:
        frame = _frame(rip, rflags, rip, GUEST_CS | upcall_mask << 32, saved, rsp, GUEST_SS)
        if not copy_to_guest(vcpu, stack, frame):
            crash(vcpu, f"fault while building a system-call frame at stack {stack:#x}")
            return
    if compatibility:
        leave_compatibility_mode(vcpu, cpu)
    regs[CS] = GUEST_CS
    regs[SS] = GUEST_SS
    regs[RSP] = stack
    regs[RIP] = handler
    cpu.set_rflags(rflags & SYSCALL_FLAGS | ALWAYS_SET)
    if vcpu.syscall32_masks_events if compatibility else vcpu.syscall_masks_events:
        memory[info + 1] = 1


def leave_compatibility_mode(vcpu: Vcpu, cpu: Cpu) -> None:
    """Back to Xen's own 64-bit flat selectors, before guest-kernel code runs."""
    cpu.set_code_stack(GUEST_CS, GUEST_SS)
    vcpu.compatibility = False


def inject(vcpu: Vcpu, cpu: Cpu, vector: int, error_code: int | None) -> None:
    """Raise an exception in the guest through its trap table (Xen: pv_inject_event)."""
    handler = vcpu.trap_address[vector]
    if not handler:
        code = "" if error_code is None else f", error code {error_code:#x}"
        crash(vcpu, f"{EXCEPTION_NAMES.get(vector, 'interrupt')} (vector {vector}{code}) and no handler for it")
        return
    bounce(vcpu, cpu, handler, error_code, vcpu.trap_flags[vector] & layout.TRAP_INFO_MASK_EVENTS != 0)


def inject_page_fault(vcpu: Vcpu, cpu: Cpu, error_code: int, address: int) -> None:
    """A page fault is the guest's: it finds the address in vcpu_info."""
    error_code = error_code & ~PFEC_USER if vcpu.kernel_mode else error_code | PFEC_USER
    vcpu.domain.memory.b[vcpu.info + layout.VCPU_INFO_ARCH_CR2 : vcpu.info + layout.VCPU_INFO_ARCH_CR2 + 8] = (
        layout.U64.pack(address)
    )
    handler = vcpu.trap_address[VECTOR_PF]
    if not handler:
        present = "not allowed by its page" if error_code & PFEC_PRESENT else "of no page"
        kind = "an instruction fetch" if error_code & PFEC_INSN else "a write" if error_code & PFEC_WRITE else "a read"
        why = f"#PF (vector {VECTOR_PF}, error code {error_code:#x}) at {address:#x}, {kind} {present}"
        crash(vcpu, f"{why}, and no handler for it")
        return
    bounce(vcpu, cpu, handler, error_code, vcpu.trap_flags[VECTOR_PF] & layout.TRAP_INFO_MASK_EVENTS != 0)


def crash(vcpu: Vcpu, why: str) -> None:
    """The guest has brought itself into a state that nothing can continue from."""
    regs = vcpu.regs
    mode = "kernel" if vcpu.kernel_mode else "user"
    registers = " ".join(
        f"{name} {regs[index]:016x}"
        for index, name in enumerate(
            ("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", *(f"r{n}" for n in range(8, 16)))
        )
    )
    domain_crash(vcpu, f"{vcpu!r} crashed in guest-{mode} mode at rip {regs[RIP]:#x}: {why}\n{registers}")
